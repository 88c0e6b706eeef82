"""The samplers of rectified flow, for Stable Diffusion 3: x = (1 − σ)·x0 + σ·ε, and the network gives ε − x0.

Along this path dx/dσ = (x − x0)/σ, which is also the equation of the sigma solvers in y = x/α; so Euler's and
Heun's methods of `samplers` run on x itself, and reach σ = 1, where α = 1 − σ is 0. The exponential solver
DPM++ 2M depends on the ratio σ/α, and runs in y.

Sources: Esser et al. (arXiv:2403.03206; the shift is its equation 23), FLUX.1's published code for the shift
by picture size, and the published `scheduler_config.json` files.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import count
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from backend.errors import CheckpointError, InvalidRequest
from backend.nn.configs import read_config, require
from backend.sampling.catalog import FLOW_SAMPLER_INFO
from backend.sampling.noise import Noise
from backend.sampling.samplers import Path, Sample, Solver, ToDenoised, dpmpp_2m, euler, heun
from backend.sampling.schedules import Array, karras_sigmas

Level = TypeVar("Level", float, Array)

# Published are shifts of 1 to 6, and by size 1.6 to 25 (256² to 2048²); far beyond, the levels fall together.
LEAST_SHIFT, MOST_SHIFT = 0.01, 100.0

SERVED: dict[str, tuple[Any, ...]] = {
    "_class_name": ("FlowMatchEulerDiscreteScheduler", "FlowMatchHeunDiscreteScheduler"),
    "time_shift_type": ("exponential", "linear"),
    # Published for other families' networks only.
    "shift_terminal": (None,),
    "use_exponential_sigmas": (False,),
    "use_beta_sigmas": (False,),
    "invert_sigmas": (False,),
    "stochastic_sampling": (False,),
}


@dataclass(frozen=True, kw_only=True)
class FlowConfig:
    """The keys of scheduler_config.json that the samplers read, under their published names.

    shift: above 1, more of the steps go where there is much noise. With `use_dynamic_shifting` it follows the
    picture's size instead, along the line from `base_shift` at `base_image_seq_len` patches to `max_shift` at
    `max_image_seq_len`; with a `time_shift_type` of "exponential", that line is the shift's logarithm.
    """

    num_train_timesteps: int = 1000
    shift: float = 1.0
    use_dynamic_shifting: bool = False
    base_shift: float = 0.5
    max_shift: float = 1.15
    base_image_seq_len: int = 256
    max_image_seq_len: int = 4096
    time_shift_type: str = "exponential"
    use_karras_sigmas: bool = False

    @classmethod
    def from_dict(cls, published: Mapping[str, Any]) -> FlowConfig:
        """Reads a scheduler_config.json; null counts as not given.

        Raises CheckpointError for another scheduler, and for a value of the wrong kind or that is not served.
        """
        given = {key: value for key, value in published.items() if value is not None}
        require("scheduler", given, SERVED)
        config = read_config(cls, "scheduler", given)
        limits = {
            "num_train_timesteps": (2, 100_000),
            "shift": (LEAST_SHIFT, MOST_SHIFT),
            "base_shift": (-MOST_SHIFT, MOST_SHIFT),
            "max_shift": (-MOST_SHIFT, MOST_SHIFT),
            "max_image_seq_len": (1, 1_000_000),
            "base_image_seq_len": (0, config.max_image_seq_len - 1),
        }
        for key, (low, high) in limits.items():
            value = getattr(config, key)
            if not low <= value <= high:
                raise CheckpointError(f"scheduler config: {key} is {value!r}; it can be {low:g} to {high:g}")
        return config

    def shift_for(self, tokens: int) -> float:
        """The shift for a picture of so many patches. Raises CheckpointError where it leaves all bounds."""
        if not self.use_dynamic_shifting:
            return self.shift
        slope = (self.max_shift - self.base_shift) / (self.max_image_seq_len - self.base_image_seq_len)
        # Added up as published: another rounding would cut some of DPM++ 2M's timesteps one lower.
        mu = slope * tokens + (self.base_shift - slope * self.base_image_seq_len)
        shift = mu if self.time_shift_type == "linear" else math.exp(min(mu, MOST_SHIFT))
        if not LEAST_SHIFT <= shift <= MOST_SHIFT:
            raise CheckpointError(
                f"scheduler config: base_shift {self.base_shift:g} and max_shift {self.max_shift:g} come to "
                f"a shift of {shift:g} at {tokens} patches; it can be {LEAST_SHIFT:g} to {MOST_SHIFT:g}"
            )
        return shift


def sample_flow(
    name: str,
    denoise: Callable[[Tensor, Tensor, int], Tensor],
    noise: Noise,
    config: FlowConfig,
    steps: int,
    device: torch.device | str = "cpu",
    *,
    shift: float | None = None,
    tokens: int,
) -> Iterator[Sample]:
    """Runs a sampler from pure noise, yielding `steps` Samples; the last one's latents are the result.

    denoise: takes float32 latents (B, C, H, W), a 0-d float32 timestep, 0 to config.num_train_timesteps, both
    on `device`, and the step from 0, which both forwards of a Heun step share; returns the velocity ε − x0,
    guidance included, of any float type.
    shift: instead of the checkpoint's, fixed or by size. tokens: the picture's patches, for a shift by size.
    Raises, at once, InvalidRequest for what cannot be served, and CheckpointError for a shift out of bounds.
    """
    if name not in FLOW_SAMPLER_INFO:
        raise InvalidRequest(f"sampler is {name!r}; it can be {', '.join(FLOW_SAMPLER_INFO)}")
    if not 1 <= steps <= config.num_train_timesteps:
        raise InvalidRequest(
            f"steps is {steps}; it can be 1 to {config.num_train_timesteps} with this checkpoint"
        )
    if shift is not None:
        if not LEAST_SHIFT <= shift <= MOST_SHIFT:
            raise InvalidRequest(f"shift is {shift!r}; it can be {LEAST_SHIFT:g} to {MOST_SHIFT:g}")
        config = replace(config, shift=shift, use_dynamic_shifting=False)
    schedule = flow_schedule(config, steps, tokens, multistep=name == "dpmpp_2m")
    timesteps, sigmas = (values.tolist() for values in schedule)
    forwards, forwards_a_step = count(), int(FLOW_SAMPLER_INFO[name].cost)

    def to_denoised(x: Tensor, i: int) -> Tensor:
        timestep = torch.tensor(timesteps[i], dtype=torch.float32, device=device)
        return x - sigmas[i] * denoise(x, timestep, next(forwards) // forwards_a_step).float()

    path = SOLVERS[name](noise.draw(device), sigmas, to_denoised)
    return (Sample(step, steps, latents, denoised) for step, (latents, denoised) in enumerate(path, start=1))


def flow_schedule(config: FlowConfig, steps: int, tokens: int, *, multistep: bool) -> tuple[Array, Array]:
    """Timesteps (steps,) and sigmas (steps + 1,), both falling; the last sigma is 0, the picture.

    One-step solvers start at σ = 1. DPM++ 2M, which cannot, starts a training step below it, and gives the
    network whole timesteps, cut off, as the reference does.
    """
    shift, levels = config.shift_for(tokens), config.num_train_timesteps
    if multistep:
        sigmas = shifted(1 - np.linspace(1, 1 / levels, steps + 1), shift)[:0:-1]
    else:
        # A fixed shift bends the training levels, and then once more the even grid between their ends: the
        # published pictures were made so. A shift by picture size bends only the grid.
        least = 1 / levels if config.use_dynamic_shifting else shifted(1 / levels, shift)
        sigmas = shifted(np.linspace(1, least, steps), shift)
    if config.use_karras_sigmas:
        sigmas = karras_sigmas(sigmas[-1], sigmas[0], steps)
    timesteps = np.floor(sigmas * levels) if multistep else sigmas * levels
    return timesteps, np.append(sigmas, 0.0)


def shifted(sigma: Level, shift: float) -> Level:
    """The level whose σ/α is `shift` times that of `sigma` (2403.03206, equation 23)."""
    return shift * sigma / (1 + (shift - 1) * sigma)


def flow_dpmpp_2m(x: Tensor, sigmas: Sequence[float], to_denoised: ToDenoised) -> Path:
    """DPM++ 2M in y = x/α, whose sigma is σ/α; it takes the step to 0 at first order."""
    alphas = [1 - sigma for sigma in sigmas]
    ratios = [sigma / alpha for sigma, alpha in zip(sigmas, alphas, strict=True)]
    path = dpmpp_2m(x / alphas[0], ratios, lambda y, i: to_denoised(y * alphas[i], i))
    for alpha, (y, denoised) in zip(alphas[1:], path, strict=True):
        yield y * alpha, denoised


SOLVERS: dict[str, Solver] = {"euler": euler, "heun": heun, "dpmpp_2m": flow_dpmpp_2m}
