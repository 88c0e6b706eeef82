"""The sampling loops.

Two families. The sigma solvers work on y = x/α, where a noise level is one number and most methods are one
line; they know nothing of timesteps or of what the network predicts: `to_denoised(y, i)` gives the x0
estimate at sigmas[i]. The timestep samplers (DDIM, PNDM, LCM) stay in x = α·x0 + σ·ε, so they also reach
α = 0. All state lives in the generators' frames.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from itertools import pairwise
from math import expm1, log, sqrt
from typing import Any

import torch
from torch import Tensor

from backend.errors import CheckpointError, InvalidRequest
from backend.sampling.catalog import SAMPLER_INFO, SamplerInfo
from backend.sampling.noise import Noise
from backend.sampling.schedules import (
    Array,
    ScheduleConfig,
    alpha_bars,
    lcm_timesteps,
    sigma_schedule,
    spaced_timesteps,
)

Network = Callable[[Tensor, float], Tensor]  # latents, timestep → prediction, float32
Draw = Callable[[], Tensor]
ToDenoised = Callable[[Tensor, int], Tensor]
Path = Iterator[tuple[Tensor, Tensor]]  # latents after the step, x0 estimate
Solver = Callable[[Tensor, Sequence[float], ToDenoised], Path]
Run = Callable[[Network, Draw, ScheduleConfig, int], Path]


@dataclass(frozen=True, kw_only=True)
class Sampler(SamplerInfo):
    """A sampler with its loop.

    defaults: what the reference's class assumes of keys that a config leaves out. fixed: what holds whatever
    the config says: keys that the class does not read, and what the sampler's name promises.
    """

    run: Run
    defaults: Mapping[str, Any]
    fixed: Mapping[str, Any]


@dataclass(frozen=True)
class Sample:
    """One step done: the latents (B, C, H, W) after it, float32, and its x0 estimate, for previews."""

    step: int
    steps: int
    latents: Tensor
    denoised: Tensor


def sample(
    name: str,
    denoise: Callable[[Tensor, Tensor], Tensor],
    noise: Noise,
    config: ScheduleConfig,
    steps: int,
    device: torch.device | str = "cpu",
) -> Iterator[Sample]:
    """Runs a sampler from pure noise, yielding `steps` Samples; the last one's latents are the result.

    denoise: takes float32 latents (B, C, H, W), scaled for the network, and a 0-d float32 timestep, both on
    `device`; returns the prediction, guidance included, of config.prediction_type and of any float type.
    Raises InvalidRequest at once for a sampler or a number of steps that cannot be served, and, on the first
    step, CheckpointError for a schedule that this sampler cannot follow.
    """
    if name not in SAMPLERS:
        raise InvalidRequest(f"sampler is {name!r}; it can be {', '.join(SAMPLERS)}")
    most = config.num_train_timesteps - 1
    if not 1 <= steps <= most:
        raise InvalidRequest(f"steps is {steps}; it can be 1 to {most} with this checkpoint")
    sampler = SAMPLERS[name]

    def network(latents: Tensor, timestep: float) -> Tensor:
        return denoise(latents, torch.tensor(timestep, dtype=torch.float32, device=device)).float()

    filled = config.filled(sampler.defaults, sampler.fixed)
    path = sampler.run(network, partial(noise.draw, device), filled, steps)
    return (Sample(step, steps, latents, denoised) for step, (latents, denoised) in enumerate(path, start=1))


def split(
    config: ScheduleConfig, latents: Tensor, prediction: Tensor, alpha: float, sigma: float
) -> tuple[Tensor, Tensor]:
    """x0 and ε of latents = alpha·x0 + sigma·ε, from either or from v = alpha·ε − sigma·x0 (2202.00512)."""
    kind = config.prediction_type
    if kind == "v_prediction":
        denoised, epsilon = alpha * latents - sigma * prediction, alpha * prediction + sigma * latents
    elif kind == "sample":
        denoised, epsilon = prediction, (latents - alpha * prediction) / sigma
    elif alpha > 0:
        denoised, epsilon = (latents - sigma * prediction) / alpha, prediction
    else:
        raise CheckpointError(
            "The scheduler's prediction_type is 'epsilon'; at zero SNR it can be 'v_prediction'."
        )
    if config.clip_sample:
        denoised = denoised.clamp(-config.clip_sample_range, config.clip_sample_range)
    return denoised, epsilon


# ── Sigma solvers ───────────────────────────────────────────────────────────────────────────────────────────


def toward(target: Tensor, y: Tensor, ratio: float) -> Tensor:
    """`y`, its distance from `target` scaled by `ratio`: the ODE's exact solution if x0 were `target`."""
    return target + ratio * (y - target)


def toward_with_noise(target: Tensor, y: Tensor, ratio: float, next_sigma: float, draw: Draw) -> Tensor:
    """The SDE's step: keeps ratio² of the old noise, then adds fresh noise up to `next_sigma`."""
    return toward(target, y, ratio**2) + draw() * (next_sigma * sqrt(1 - ratio**2))


def euler(y: Tensor, sigmas: Sequence[float], to_denoised: ToDenoised) -> Path:
    """Euler's method on the probability-flow ODE (EDM, 2206.00364, algorithm 1 without its correction)."""
    for i, (sigma, next_sigma) in enumerate(pairwise(sigmas)):
        denoised = to_denoised(y, i)
        y = toward(denoised, y, next_sigma / sigma)
        yield y, denoised


def euler_ancestral(y: Tensor, sigmas: Sequence[float], to_denoised: ToDenoised, draw: Draw) -> Path:
    """Ancestral sampling: DDPM's posterior between any two noise levels (2006.11239, equation 7)."""
    for i, (sigma, next_sigma) in enumerate(pairwise(sigmas)):
        denoised = to_denoised(y, i)
        y = toward_with_noise(denoised, y, next_sigma / sigma, next_sigma, draw)
        yield y, denoised


def heun(y: Tensor, sigmas: Sequence[float], to_denoised: ToDenoised) -> Path:
    """Heun's method: the mean of the slopes at both ends (EDM, algorithm 1); the step to zero is Euler's."""
    for i, (sigma, next_sigma) in enumerate(pairwise(sigmas)):
        denoised = to_denoised(y, i)
        slope = (y - denoised) / sigma
        if next_sigma > 0:
            guess = y + (next_sigma - sigma) * slope
            denoised = to_denoised(guess, i + 1)
            slope = (slope + (guess - denoised) / next_sigma) / 2
        y = y + (next_sigma - sigma) * slope
        yield y, denoised


def dpmpp_2m(
    y: Tensor,
    sigmas: Sequence[float],
    to_denoised: ToDenoised,
    draw: Draw | None = None,
    *,
    first_order_end: bool = True,
) -> Path:
    """DPM-Solver++ of order 2, multistep midpoint (2211.01095, algorithm 2); with `draw`, its SDE form."""
    history: list[Tensor] = []
    for i, (sigma, next_sigma) in enumerate(pairwise(sigmas)):
        history = [*history[-1:], to_denoised(y, i)]
        target = extrapolated(history, sigmas, i, first_order_end)
        ratio = next_sigma / sigma
        y = toward_with_noise(target, y, ratio, next_sigma, draw) if draw else toward(target, y, ratio)
        yield y, history[-1]


def unipc(
    y: Tensor, sigmas: Sequence[float], to_denoised: ToDenoised, *, first_order_end: bool = True
) -> Path:
    """UniPC of order 2 with B(h) = e^h − 1 (2302.04867).

    Its predictor is then DPM++ 2M's step; each new x0 estimate first corrects the step that led to it.
    """
    start, history = y, []
    for i, (sigma, next_sigma) in enumerate(pairwise(sigmas)):
        history = [*history[-2:], to_denoised(y, i)]
        if i > 0:
            y = toward(corrected(history, sigmas, i), start, sigma / sigmas[i - 1])
        start = y
        y = toward(extrapolated(history, sigmas, i, first_order_end), y, next_sigma / sigma)
        yield y, history[-1]


def extrapolated(
    denoised: Sequence[Tensor], sigmas: Sequence[float], i: int, first_order_end: bool
) -> Tensor:
    """x0 halfway (in log sigma) through step i, by the last two estimates; where order 1 is due, the last."""
    at_end = i == len(sigmas) - 2
    if i == 0 or sigmas[i + 1] == 0 or (at_end and first_order_end):
        return denoised[-1]
    halfway = log(sigmas[i] / sigmas[i + 1]) / log(sigmas[i - 1] / sigmas[i]) / 2
    return denoised[-1] + halfway * (denoised[-1] - denoised[-2])


def corrected(denoised: Sequence[Tensor], sigmas: Sequence[float], i: int) -> Tensor:
    """The x0 that the step to sigmas[i] should have used, now that the network has been asked there (UniC).

    Of two estimates, the mean. Through three goes a parabola in log sigma; the step over it is then exact.
    """
    if len(denoised) == 2:
        return (denoised[0] + denoised[1]) / 2
    older, old, new = denoised
    h = log(sigmas[i - 1] / sigmas[i])
    r = log(sigmas[i - 1] / sigmas[i - 2]) / h  # `old` lies at 0, `new` at 1, `older` at r < 0
    mean = -1 / expm1(-h) - 1 / h  # of τ over the step, under the solver's exponential weight
    mean_square = -1 / expm1(-h) - 2 * mean / h  # of τ²
    weight = (mean - mean_square) / (1 - r)
    return old + weight / r * (older - old) + (mean - weight) * (new - old)


def sigma_sampler(choose: Callable[[ScheduleConfig, Draw, int], Solver], *, multistep: bool = False) -> Run:
    """Joins a sigma solver, chosen for (config, draw, steps), to a network of timesteps and scaled latents.

    The multistep solvers are published in x: their result is x, the others' is y.
    """

    def run(network: Network, draw: Draw, config: ScheduleConfig, steps: int) -> Path:
        timesteps, sigmas = (values.tolist() for values in sigma_schedule(config, steps, multistep=multistep))
        alphas = [1 / sqrt(1 + sigma**2) for sigma in sigmas]

        def to_denoised(y: Tensor, i: int) -> Tensor:
            x = y * alphas[i]
            denoised, _ = split(config, x, network(x, timesteps[i]), alphas[i], sigmas[i] * alphas[i])
            return denoised

        # The first latents have unit variance as x, or, where the timesteps start at the top, as y/sigma.
        at_top = not multistep and config.timestep_spacing != "leading"
        y = draw() * (sigmas[0] if at_top else 1 / alphas[0])
        path = choose(config, draw, steps)(y, sigmas, to_denoised)
        for alpha, (y, denoised) in zip(alphas[1:], path, strict=True):
            yield y * alpha if multistep else y, denoised

    return run


def choose_dpmpp_2m(config: ScheduleConfig, draw: Draw, steps: int, *, stochastic: bool = False) -> Solver:
    first_order_end = config.euler_at_final or (config.lower_order_final and steps < 15)
    return partial(dpmpp_2m, draw=draw if stochastic else None, first_order_end=first_order_end)


def choose_unipc(config: ScheduleConfig, draw: Draw, steps: int) -> Solver:
    if config.solver_order != 2 or config.solver_type == "bh1":
        given = f"order {config.solver_order} with {config.solver_type}"
        raise CheckpointError(f"The scheduler asks for UniPC of {given}; here it is of order 2 with bh2.")
    return partial(unipc, first_order_end=config.lower_order_final)


# ── Timestep samplers ───────────────────────────────────────────────────────────────────────────────────────


class Levels:
    """(alpha, sigma) by timestep; a timestep below 0 is the picture's end."""

    def __init__(self, config: ScheduleConfig) -> None:
        self._bars = alpha_bars(config)
        self._end = 1.0 if config.set_alpha_to_one else self._bars[0]

    def __getitem__(self, timestep: int) -> tuple[float, float]:
        bar = float(self._bars[timestep] if timestep >= 0 else self._end)
        return sqrt(bar), sqrt(1 - bar)


def ddim(network: Network, draw: Draw, config: ScheduleConfig, steps: int) -> Path:
    """DDIM with eta 0 (2010.02502, equation 12)."""
    levels, stride = Levels(config), config.num_train_timesteps // steps
    x = draw()
    for t in whole(spaced_timesteps(config, steps)):
        x, denoised = transfer(config, x, network(x, t), levels[t], levels[t - stride])
        yield x, denoised


# By the number of slopes: their weights, the newest first.
ADAMS_BASHFORTH = (
    (1,),
    (3 / 2, -1 / 2),
    (23 / 12, -16 / 12, 5 / 12),
    (55 / 24, -59 / 24, 37 / 24, -9 / 24),
)


def pndm(network: Network, draw: Draw, config: ScheduleConfig, steps: int) -> Path:
    """Pseudo linear multistep, order 4 (PNDM, 2202.09778).

    It needs four slopes. With 4 steps or more it starts by three Runge-Kutta steps of four forwards
    (algorithm 1); with fewer, or under `skip_prk_steps`, by one trapezoid step of two, and the order grows.
    """
    levels, stride = Levels(config), config.num_train_timesteps // steps
    timesteps = whole(spaced_timesteps(config, steps))

    def move(x: Tensor, slope: Tensor, start: int, end: int) -> tuple[Tensor, Tensor]:
        return transfer(config, x, slope, levels[start], levels[end])

    x, slopes = draw(), []  # newest first
    if steps > 3 and not config.skip_prk_steps:
        half = stride // 2
        for t, end in pairwise(timesteps[:4]):
            first = network(x, t)
            second = network(move(x, first, t, t - half)[0], end + half)
            third = network(move(x, second, t, end + half)[0], end + half)
            last = network(move(x, third, t, end)[0], end)
            slopes = [first, *slopes]
            x, denoised = move(x, (first + 2 * second + 2 * third + last) / 6, t, end)
            yield x, denoised
        timesteps = timesteps[3:]
    elif steps > 1:
        t, end = timesteps[:2]
        slopes = [network(x, t)]
        guess, _ = move(x, slopes[0], t, t - stride)
        x, denoised = move(x, (slopes[0] + network(guess, end)) / 2, end + stride, end)
        yield x, denoised
        timesteps = timesteps[1:]

    for t in timesteps:
        slopes = [network(x, t), *slopes[:3]]
        weights = ADAMS_BASHFORTH[len(slopes) - 1]
        slope = sum((w * s for w, s in zip(weights, slopes, strict=True)), start=torch.zeros_like(x))
        x, denoised = move(x, slope, t, t - stride)
        yield x, denoised


def lcm(network: Network, draw: Draw, config: ScheduleConfig, steps: int) -> Path:
    """Consistency sampling (LCM, 2310.04378, algorithm 3): jump to the picture, add noise anew, repeat."""
    levels = Levels(config)
    timesteps = whole(lcm_timesteps(config, steps))
    x = draw()
    for t, next_t in zip(timesteps, [*timesteps[1:], None], strict=True):
        denoised, _ = split(config, x, network(x, t), *levels[t])
        scaled = t * config.timestep_scaling
        near = scaled**2 + 0.5**2  # 0.5: the data's deviation in the boundary condition
        x = denoised = scaled / sqrt(near) * denoised + 0.5**2 / near * x
        if next_t is not None:
            alpha, sigma = levels[next_t]
            x = alpha * denoised + sigma * draw()
        yield x, denoised


def transfer(
    config: ScheduleConfig,
    x: Tensor,
    prediction: Tensor,
    here: tuple[float, float],
    there: tuple[float, float],
) -> tuple[Tensor, Tensor]:
    """DDIM's step between two levels, and its x0."""
    denoised, epsilon = split(config, x, prediction, *here)
    return there[0] * denoised + there[1] * epsilon, denoised


def whole(timesteps: Array) -> list[int]:
    return timesteps.round().astype(int).tolist()


# ── The table ───────────────────────────────────────────────────────────────────────────────────────────────

LEADING = {"timestep_spacing": "leading"}
SD_BETAS = {"beta_start": 0.00085, "beta_end": 0.012}
NO_CLIP = {"clip_sample": False}
NO_RESCALE = {"rescale_betas_zero_snr": False}
TO_ZERO = {"final_sigmas_type": "zero"}
KARRAS = {"use_karras_sigmas": True}


def _sampler(name: str, run: Run, defaults: Mapping[str, Any], fixed: Mapping[str, Any]) -> Sampler:
    return Sampler(**asdict(SAMPLER_INFO[name]), run=run, defaults=defaults, fixed=fixed)


_euler = sigma_sampler(lambda config, draw, steps: euler)
_euler_ancestral = sigma_sampler(lambda config, draw, steps: partial(euler_ancestral, draw=draw))
_heun = sigma_sampler(lambda config, draw, steps: heun)
_dpmpp_2m = sigma_sampler(choose_dpmpp_2m, multistep=True)
_dpmpp_2m_sde = sigma_sampler(partial(choose_dpmpp_2m, stochastic=True), multistep=True)
_unipc = sigma_sampler(choose_unipc, multistep=True)

SAMPLERS: dict[str, Sampler] = {
    sampler.name: sampler
    for sampler in (
        _sampler("pndm", pndm, LEADING | {"set_alpha_to_one": False}, NO_CLIP | NO_RESCALE),
        _sampler("ddim", ddim, LEADING | {"clip_sample": True}, {}),
        _sampler("euler", _euler, {}, NO_CLIP),
        _sampler("euler_ancestral", _euler_ancestral, {}, NO_CLIP | TO_ZERO | {"use_karras_sigmas": False}),
        _sampler("heun", _heun, SD_BETAS, NO_RESCALE | TO_ZERO),
        _sampler("dpmpp_2m", _dpmpp_2m, {}, NO_CLIP),
        _sampler("dpmpp_2m_karras", _dpmpp_2m, {}, NO_CLIP | KARRAS),
        _sampler("dpmpp_2m_sde_karras", _dpmpp_2m_sde, {}, NO_CLIP | KARRAS),
        _sampler("unipc", _unipc, {}, NO_CLIP),
        _sampler("lcm", lcm, LEADING | SD_BETAS | {"beta_schedule": "scaled_linear"}, {}),
    )
}
