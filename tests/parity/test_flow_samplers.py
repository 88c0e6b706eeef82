"""The rectified-flow samplers against the reference's schedulers, step by step, on a fixed toy network."""

from __future__ import annotations

import math
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from diffusers.pipelines.stable_diffusion_3.pipeline_stable_diffusion_3 import calculate_shift
from torch import Tensor

from backend.sampling.catalog import FLOW_SAMPLER_INFO
from backend.sampling.flow import FlowConfig, flow_schedule, sample_flow
from backend.sampling.noise import Noise

SEEDS = (7, 8)
SHAPE = (4, 6, 5)
STEPS = (1, 2, 4, 20, 28)

SD3 = {  # as published
    "_class_name": "FlowMatchEulerDiscreteScheduler",
    "_diffusers_version": "0.29.0.dev0",
    "num_train_timesteps": 1000,
    "shift": 3.0,
}
DYNAMIC = {**SD3, "use_dynamic_shifting": True, "base_shift": 0.5, "max_shift": 1.15, "shift_terminal": None}
CONFIGS: dict[str, dict[str, Any]] = {
    "shift 1": {**SD3, "shift": 1.0},
    "shift 3": SD3,
    "shift 6": {**SD3, "shift": 6.0},
    "dynamic": DYNAMIC,
    "dynamic, other lengths": {**DYNAMIC, "base_image_seq_len": 100, "max_image_seq_len": 8000},
    "linear": {**DYNAMIC, "time_shift_type": "linear", "base_shift": 1.0, "max_shift": 3.0},
    "fewer levels": {**SD3, "num_train_timesteps": 300},
    "karras": {**SD3, "use_karras_sigmas": True},
    "dynamic karras": {**DYNAMIC, "use_karras_sigmas": True},
    "defaults": {},
}
COMPARED = [  # with Karras sigmas, the reference's DPM++ leaves the flow for the sigmas of a diffusion
    (name, config)
    for name in FLOW_SAMPLER_INFO
    for config in CONFIGS
    if not (name == "dpmpp_2m" and "karras" in config)
]


def network(latents: Tensor, timestep: Tensor, step: int = 0) -> Tensor:
    """Smooth, and different at every pixel and timestep."""
    t = timestep.float() / 1000
    return torch.tanh(0.9 * latents + torch.sin(3 * t + latents.roll(1, -1))) * (0.6 + 0.4 * t)


def reference(name: str, published: dict[str, Any], steps: int, tokens: int) -> Any:
    """The reference's scheduler, ready for `steps`, as its pipeline for Stable Diffusion 3 would make it."""
    euler: Any = diffusers.FlowMatchEulerDiscreteScheduler.from_config(published)
    c = euler.config
    lengths = (c.base_image_seq_len, c.max_image_seq_len, c.base_shift, c.max_shift)
    mu = calculate_shift(tokens, *lengths) if c.use_dynamic_shifting else None
    euler.set_timesteps(steps, mu=mu)
    if name == "euler":
        return euler
    if name == "heun":
        scheduler: Any = diffusers.FlowMatchHeunDiscreteScheduler(c.num_train_timesteps, c.shift)
        scheduler.set_timesteps(steps)
        if c.use_dynamic_shifting or c.use_karras_sigmas:  # which it does not know: on Euler's grid
            twice = [euler.timesteps[:1], euler.timesteps[1:].repeat_interleave(2)]
            scheduler.timesteps = torch.cat(twice)
            scheduler.sigmas = torch.cat([*twice, torch.zeros(1)]) / c.num_train_timesteps
        return scheduler
    settings: dict[str, Any] = {"flow_shift": c.shift, "use_dynamic_shifting": c.use_dynamic_shifting}
    if c.use_dynamic_shifting and c.time_shift_type == "linear":  # which it does not know: as a fixed shift
        settings, mu = {"flow_shift": mu}, None
    scheduler = diffusers.DPMSolverMultistepScheduler(
        c.num_train_timesteps, use_flow_sigmas=True, prediction_type="flow_prediction", **settings
    )
    scheduler.set_timesteps(steps, mu=mu)
    return scheduler


def reference_path(name: str, published: dict[str, Any], steps: int, tokens: int) -> list[Tensor]:
    scheduler = reference(name, published, steps, tokens)
    scheduler.set_begin_index(0)  # where two timesteps are cut to one, it would start at the second
    x = Noise(SEEDS, SHAPE).draw()
    after: list[Tensor] = []
    for t in scheduler.timesteps:
        x = scheduler.step(network(x, t), t, x).prev_sample
        after.append(x)
    return [*after[1:-1:2], after[-1]] if name == "heun" else after


def largest_difference(
    name: str, published: dict[str, Any], theirs: dict[str, Any], steps: int, tokens: int, **settings: Any
) -> float:
    """Over all steps, the largest difference by the largest value."""
    config = FlowConfig.from_dict(published)
    path = sample_flow(name, network, Noise(SEEDS, SHAPE), config, steps, tokens=tokens, **settings)
    pairs = list(zip(path, reference_path(name, theirs, steps, tokens), strict=True))
    assert len(pairs) == steps
    return max(((a.latents - b).abs().max() / b.abs().max()).item() for a, b in pairs)


@pytest.mark.parametrize(("name", "config"), COMPARED)
def test_every_step_equals_the_reference(name: str, config: str) -> None:
    published = CONFIGS[config]
    for steps in STEPS:
        for tokens in (256, 1536, 4096, 16384) if "use_dynamic_shifting" in published else (4096,):
            worst = largest_difference(name, published, published, steps, tokens)
            assert worst <= 1e-5, f"{worst:.1e} with {steps} steps, {tokens} tokens"


@pytest.mark.parametrize("published", [SD3, DYNAMIC], ids=["fixed", "dynamic"])
@pytest.mark.parametrize("name", FLOW_SAMPLER_INFO)
def test_a_shift_that_is_asked_for_is_one_that_the_scheduler_is_built_with(
    name: str, published: dict[str, Any]
) -> None:
    for shift in (0.5, 1.0, 6.0):
        theirs = {**SD3, "shift": shift}
        for steps in STEPS:
            assert largest_difference(name, published, theirs, steps, 4096, shift=shift) <= 1e-5


@pytest.mark.parametrize(("name", "config"), [pair for pair in COMPARED if pair[0] != "heun"])
def test_timesteps_and_sigmas_at_every_step_count(name: str, config: str) -> None:
    published = FlowConfig.from_dict(CONFIGS[config])
    for steps in range(1, 151):
        scheduler = reference(name, CONFIGS[config], steps, 1536)
        timesteps, sigmas = flow_schedule(published, steps, 1536, multistep=name == "dpmpp_2m")
        np.testing.assert_allclose(sigmas, scheduler.sigmas, rtol=1e-6)
        # DPM++ 2M's are whole numbers, and the same ones
        np.testing.assert_allclose(timesteps, scheduler.timesteps, rtol=1e-6 if name == "euler" else 0)


@pytest.mark.parametrize("name", ["euler", "heun"])
def test_the_network_sees_the_timesteps_of_the_reference(name: str) -> None:
    seen: list[Tensor] = []

    def watched(latents: Tensor, timestep: Tensor, step: int) -> Tensor:
        seen.append(timestep)
        return network(latents, timestep)

    config = FlowConfig.from_dict(SD3)
    list(sample_flow(name, watched, Noise(SEEDS, SHAPE), config, 28, tokens=4096))
    expected = reference(name, SD3, 28, 4096).timesteps
    torch.testing.assert_close(torch.stack(seen), expected, rtol=2e-7, atol=0)  # to float32's last bit


def test_the_reference_shifts_the_least_sigma_twice() -> None:
    """What makes its grid: without it, 28 steps at shift 3 would end at 0.0030 and not at 0.0089."""
    assert math.isclose(reference("euler", SD3, 28, 4096).sigmas[-2], 0.00893, rel_tol=1e-3)
    _, sigmas = flow_schedule(FlowConfig.from_dict(SD3), 28, 4096, multistep=False)
    assert math.isclose(sigmas[-2], 0.00893, rel_tol=1e-3)
