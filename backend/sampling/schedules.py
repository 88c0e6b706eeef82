"""From a published scheduler_config.json to timesteps and noise levels, as pure functions of numbers.

A diffused latent is x = α·x0 + σ·ε with α² + σ² = 1 and α² the "alpha bar" of its timestep. The sigma
samplers divide by α: y = x0 + (σ/α)·ε, and call σ/α the sigma (Karras et al., EDM, 2206.00364).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any, TypeGuard

import numpy as np
from numpy.typing import NDArray

from backend.errors import CheckpointError

Array = NDArray[np.floating[Any]]

CHOICES = {
    "beta_schedule": ("linear", "scaled_linear", "squaredcos_cap_v2"),
    "prediction_type": ("epsilon", "v_prediction", "sample"),
    "timestep_spacing": ("leading", "trailing", "linspace"),
    "final_sigmas_type": ("zero", "sigma_min"),
}

# Published keys that would change the result, with the one value that is served.
ONLY = {
    "thresholding": False,
    "use_exponential_sigmas": False,
    "use_beta_sigmas": False,
    "use_lu_lambdas": False,
    "use_flow_sigmas": False,
    "interpolation_type": "linear",
    "timestep_type": "discrete",
    "predict_x0": True,
    "disable_corrector": [],
    "lambda_min_clipped": -math.inf,
    "sigma_min": None,
    "sigma_max": None,
}

# Zero terminal SNR makes the last sigma infinite; the reference's sigma samplers stop at 4096.
LEAST_ALPHA_BAR = 2.0**-24


@dataclass(frozen=True, kw_only=True)
class ScheduleConfig:
    """The keys of scheduler_config.json that the samplers read, under their published names.

    Made by `from_dict`. `published` holds the keys that the file gave; each sampler has defaults for others.
    """

    num_train_timesteps: int = 1000
    beta_start: float = 0.0001
    beta_end: float = 0.02
    beta_schedule: str = "linear"
    trained_betas: tuple[float, ...] | None = None
    rescale_betas_zero_snr: bool = False
    prediction_type: str = "epsilon"
    timestep_spacing: str = "linspace"
    steps_offset: int = 0
    set_alpha_to_one: bool = True
    clip_sample: bool = False
    clip_sample_range: float = 1.0
    skip_prk_steps: bool = False
    use_karras_sigmas: bool = False
    final_sigmas_type: str = "zero"
    solver_order: int = 2
    solver_type: str = "bh2"
    lower_order_final: bool = True
    euler_at_final: bool = False
    original_inference_steps: int = 50
    timestep_scaling: float = 10.0
    published: frozenset[str] = field(default=frozenset(), repr=False)

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> ScheduleConfig:
        """Reads a scheduler_config.json, whichever scheduler class it names; null counts as not given.

        Raises CheckpointError for a value of the wrong kind, or one that no sampler here can serve.
        """
        for key, allowed in ONLY.items():
            if config.get(key, allowed) not in (allowed, None):
                raise _refused(key, config[key], f"only {allowed!r}")
        known = {f.name: f.default for f in fields(cls) if f.name != "published"}
        given = {k: _checked(k, v, known[k]) for k, v in config.items() if k in known and v is not None}
        made = cls(**given, published=frozenset(given))
        made._check_ranges()
        return made

    def filled(self, defaults: Mapping[str, Any], fixed: Mapping[str, Any]) -> ScheduleConfig:
        """This config with `defaults` where the file gave nothing, and `fixed` in any case."""
        missing = {key: value for key, value in defaults.items() if key not in self.published}
        return replace(self, **missing, **fixed)

    def _check_ranges(self) -> None:
        count = self.num_train_timesteps
        limits = {
            "num_train_timesteps": (2, 100_000),
            "steps_offset": (0, count - 1),
            "original_inference_steps": (1, count),
        }
        for key, (low, high) in limits.items():
            if key in self.published and not low <= getattr(self, key) <= high:
                raise _refused(key, getattr(self, key), f"{low} to {high}")
        if self.trained_betas is not None and len(self.trained_betas) != count:
            raise _refused(
                "number of trained_betas", len(self.trained_betas), f"{count}, its num_train_timesteps"
            )
        for beta in (self.beta_start, self.beta_end, *(self.trained_betas or ())):
            if not 0 < beta < 1:
                raise _refused("beta", beta, "between 0 and 1")


def _refused(key: str, value: object, allowed: str) -> CheckpointError:
    return CheckpointError(f"The scheduler's {key} is {value!r}; it can be {allowed}.")


def _checked(key: str, value: Any, default: Any) -> Any:
    """`value` as the type of the field's default."""
    if key in CHOICES and value not in CHOICES[key]:
        raise _refused(key, value, ", ".join(CHOICES[key]))
    if key == "trained_betas" and isinstance(value, list | tuple) and all(map(_is_number, value)):
        return tuple(value)
    if isinstance(default, float) and _is_number(value):
        return float(value)
    if type(value) is type(default) and not isinstance(default, float):
        return value
    raise _refused(
        key, value, "a list of numbers" if default is None else f"of type {type(default).__name__}"
    )


def _is_number(value: object) -> TypeGuard[float]:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e30


def alpha_bars(config: ScheduleConfig) -> Array:
    """(num_train_timesteps,): the share of signal power left at each timestep, falling."""
    count = config.num_train_timesteps
    if config.trained_betas is not None:
        betas = np.array(config.trained_betas)
    elif config.beta_schedule == "linear":
        betas = np.linspace(config.beta_start, config.beta_end, count)
    elif config.beta_schedule == "scaled_linear":
        betas = np.linspace(config.beta_start**0.5, config.beta_end**0.5, count) ** 2
    else:  # squaredcos_cap_v2: Nichol and Dhariwal, 2102.09672
        kept = np.cos((np.arange(count + 1) / count + 0.008) / 1.008 * np.pi / 2) ** 2
        betas = np.minimum(1 - kept[1:] / kept[:-1], 0.999)
    # The checkpoints were trained on tables of float32 betas, so the rounding is part of the schedule.
    bars = np.cumprod(1 - betas.astype(np.float32), dtype=np.float64)
    if config.rescale_betas_zero_snr:  # 2305.08891: shift √ᾱ to end at 0, scale it to keep its start
        roots = np.sqrt(bars)
        bars = ((roots - roots[-1]) * roots[0] / (roots[0] - roots[-1])) ** 2
    return bars


def sigma_table(config: ScheduleConfig) -> Array:
    """(num_train_timesteps,): σ/α at each timestep, rising."""
    bars = alpha_bars(config)
    if config.rescale_betas_zero_snr:
        bars[-1] = LEAST_ALPHA_BAR
    return np.sqrt((1 - bars) / bars)


def spaced_timesteps(config: ScheduleConfig, steps: int, *, open_end: bool = False) -> Array:
    """(steps,): falling timesteps. With `open_end`, a grid of one more point, whose last is left out."""
    count, points = config.num_train_timesteps, steps + open_end
    if config.timestep_spacing == "trailing":
        # Cut to `steps`: at 61, 103, 121 and 122 of 1000 a rounding gives one more, below 0.
        return np.round(np.arange(count, 0, -count / steps)[:steps]) - 1
    if config.timestep_spacing == "leading":
        timesteps = np.arange(points)[: -steps - 1 : -1] * float(count // points) + config.steps_offset
        return np.minimum(timesteps, count - 1)
    return np.linspace(0, count - 1, points)[: -steps - 1 : -1]


def karras_sigmas(smallest: float, largest: float, steps: int, rho: float = 7.0) -> Array:
    """(steps,): sigmas from largest to smallest, evenly spaced in their rho-th root (EDM, equation 5)."""
    sigmas = np.linspace(largest ** (1 / rho), smallest ** (1 / rho), steps) ** rho
    return sigmas.clip(smallest, largest)  # the powers may overshoot by a rounding


def sigma_schedule(config: ScheduleConfig, steps: int, *, multistep: bool) -> tuple[Array, Array]:
    """Timesteps (steps,) and sigmas (steps + 1,), both falling; the last sigma is where the picture ends.

    The multistep solvers (DPM++, UniPC) leave room for one more step and take whole timesteps.
    """
    table = sigma_table(config)
    numbers = np.arange(len(table))
    timesteps = spaced_timesteps(config, steps, open_end=multistep)
    if multistep:
        timesteps = np.round(timesteps)
    sigmas = np.interp(timesteps, numbers, table)
    if config.use_karras_sigmas:
        span = table if multistep else sigmas[::-1]
        sigmas = karras_sigmas(span[0], span[-1], steps)
        timesteps = np.interp(np.log(sigmas), np.log(table), numbers)
        if multistep:  # the reference rounds, but cuts off under the cosine schedule
            timesteps = (
                np.floor(timesteps) if config.beta_schedule == "squaredcos_cap_v2" else np.round(timesteps)
            )
    end = table[0] if config.final_sigmas_type == "sigma_min" else 0.0
    return timesteps, np.append(sigmas, end)


def lcm_timesteps(config: ScheduleConfig, steps: int) -> Array:
    """(steps,): falling timesteps out of the grid that the checkpoint was distilled on (LCM, 2310.04378).

    More steps than that grid has are spread over all timesteps.
    """
    count = config.num_train_timesteps
    distilled = min(config.original_inference_steps, count)
    if steps > distilled:
        return spaced_timesteps(replace(config, timestep_spacing="trailing"), steps)
    grid = np.arange(distilled, 0, -1) * (count // distilled) - 1
    return grid[np.arange(steps) * distilled // steps].astype(np.float64)
