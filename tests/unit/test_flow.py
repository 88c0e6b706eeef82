"""The rectified-flow samplers by known answers; the steps against the reference are in tests/parity."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from backend.errors import CheckpointError, InvalidRequest
from backend.sampling.catalog import FLOW_SAMPLER_INFO
from backend.sampling.flow import SOLVERS, FlowConfig, flow_schedule, sample_flow, shifted
from backend.sampling.noise import Noise
from backend.sampling.samplers import Sample

SHAPE = (2, 4, 4)
SD3 = FlowConfig(shift=3.0)
DYNAMIC = FlowConfig(shift=3.0, use_dynamic_shifting=True)


def network(latents: Tensor, timestep: Tensor, step: int) -> Tensor:
    return torch.tanh(latents + timestep / 1000)


def run(name: str, steps: int, *seeds: int, denoise: Any = network, config: FlowConfig = SD3) -> list[Sample]:
    return list(sample_flow(name, denoise, Noise(seeds or (7,), SHAPE), config, steps, tokens=4096))


# The published config


def test_the_published_configs_are_read() -> None:
    first = {"_class_name": "FlowMatchEulerDiscreteScheduler", "_diffusers_version": "0.29", "shift": 3}
    later = {
        **first,
        "base_image_seq_len": 256,
        "base_shift": 0.5,
        "max_image_seq_len": 4096,
        "max_shift": 1.15,
        "num_train_timesteps": 1000,
        "use_dynamic_shifting": False,
        "invert_sigmas": False,
        "shift_terminal": None,
        "time_shift_type": "exponential",
        "use_beta_sigmas": False,
        "use_exponential_sigmas": False,
        "use_karras_sigmas": False,
        "stochastic_sampling": False,
    }
    assert FlowConfig.from_dict(first) == FlowConfig.from_dict(later) == SD3
    assert FlowConfig.from_dict({"_class_name": "FlowMatchHeunDiscreteScheduler"}) == FlowConfig()
    assert FlowConfig.from_dict(dict.fromkeys(later)) == FlowConfig()


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("_class_name", "DPMSolverMultistepScheduler"),
        ("_class_name", 3),
        ("num_train_timesteps", 1),
        ("num_train_timesteps", 1000.0),
        ("num_train_timesteps", 10**9),
        ("shift", "3.0"),
        ("shift", True),
        ("shift", [3.0]),
        ("shift", 0),
        ("shift", -3.0),
        ("shift", float("nan")),
        ("shift", float("inf")),
        ("use_dynamic_shifting", 1),
        ("base_shift", float("nan")),
        ("max_shift", float("-inf")),
        ("base_image_seq_len", 4096),
        ("base_image_seq_len", -1),
        ("max_image_seq_len", 0),
        ("time_shift_type", "cubic"),
        ("shift_terminal", 0.02),
        ("use_exponential_sigmas", True),
        ("use_beta_sigmas", True),
        ("invert_sigmas", True),
        ("stochastic_sampling", True),
    ],
)
def test_a_config_that_cannot_be_served_is_named(key: str, value: object) -> None:
    with pytest.raises(CheckpointError, match=rf"scheduler config: {key} is .*(it can be|of a wrong type)"):
        FlowConfig.from_dict({"shift": 3.0, key: value})


# The schedule


@pytest.mark.parametrize("kind", ["exponential", "linear"])
def test_the_shift_follows_the_size_of_the_picture(kind: str) -> None:
    config = FlowConfig(use_dynamic_shifting=True, time_shift_type=kind)
    shifts = [config.shift_for(tokens) for tokens in (256, 2176, 4096)]
    line = [0.5, 0.825, 1.15]
    assert shifts == pytest.approx(line if kind == "linear" else np.exp(line))
    assert SD3.shift_for(256) == SD3.shift_for(4096) == 3.0


def test_a_shift_by_size_that_leaves_all_bounds_is_named() -> None:
    steep: dict[str, Any] = {"use_dynamic_shifting": True, "base_shift": 0.1, "max_shift": 3.0}
    for kind, tokens in (("exponential", 16384), ("linear", 16), ("exponential", 10**9)):
        config = FlowConfig(**steep, time_shift_type=kind)
        with pytest.raises(CheckpointError, match=f"max_shift 3 come to a shift of .* at {tokens} patches"):
            sample_flow("euler", network, Noise([1], SHAPE), config, 5, tokens=tokens)
        # which a shift of one's own does not touch
        sample_flow("euler", network, Noise([1], SHAPE), config, 5, tokens=tokens, shift=3.0)


def test_a_shift_multiplies_the_ratio_of_noise_to_picture() -> None:
    sigma = np.linspace(0.1, 0.9, 9)
    np.testing.assert_allclose(shifted(sigma, 3.0) / (1 - shifted(sigma, 3.0)), 3 * sigma / (1 - sigma))
    assert shifted(0.0, 3.0) == 0
    assert shifted(1.0, 3.0) == 1


@pytest.mark.parametrize("multistep", [True, False])
@pytest.mark.parametrize("karras", [True, False])
@pytest.mark.parametrize("dynamic", [True, False])
def test_levels_fall_to_the_picture(dynamic: bool, karras: bool, multistep: bool) -> None:
    for shift in (0.1, 1.0, 3.0, 20.0):
        config = FlowConfig(shift=shift, use_dynamic_shifting=dynamic, use_karras_sigmas=karras)
        plain = FlowConfig(shift=shift, use_dynamic_shifting=dynamic)
        for steps in (1, 2, 28, 150):
            timesteps, sigmas = flow_schedule(config, steps, 4096, multistep=multistep)
            assert (len(timesteps), len(sigmas)) == (steps, steps + 1)
            assert all(a > b for a, b in pairwise(sigmas))
            assert all(a >= b for a, b in pairwise(timesteps))
            assert sigmas[-1] == 0
            assert sigmas[0] < 1 if multistep else sigmas[0] == pytest.approx(1, abs=1e-12)
            exact = sigmas[:-1] * 1000
            np.testing.assert_array_equal(timesteps, np.floor(exact) if multistep else exact)
            ends = flow_schedule(plain, steps, 4096, multistep=multistep)[1]
            assert sigmas[[0, -2]] == pytest.approx(ends[[0, -2]])  # Karras spaces what is between


# Samplers


@pytest.mark.parametrize("name", FLOW_SAMPLER_INFO)
@pytest.mark.parametrize("steps", [1, 2, 3, 14, 15, 28, 150, 1000])
def test_steps_and_forwards_are_counted(name: str, steps: int) -> None:
    seen: list[int] = []

    def counted(latents: Tensor, timestep: Tensor, step: int) -> Tensor:
        assert latents.dtype == timestep.dtype == torch.float32
        assert latents.shape == (1, *SHAPE)
        assert timestep.shape == ()
        assert 0 <= timestep <= 1000
        seen.append(step)
        return network(latents, timestep, step).bfloat16()

    path = run(name, steps, denoise=counted)
    assert [(s.step, s.steps) for s in path] == [(step, steps) for step in range(1, steps + 1)]
    assert all(torch.isfinite(s.latents).all() and torch.isfinite(s.denoised).all() for s in path)
    assert all(s.latents.dtype == s.denoised.dtype == torch.float32 for s in path)
    twice = name == "heun"  # and once in its last step
    assert seen == [step for step in range(steps) for _ in range(2 if twice and step + 1 < steps else 1)]


@pytest.mark.parametrize("name", FLOW_SAMPLER_INFO)
def test_a_step_is_asked_for_only_when_its_sample_is(name: str) -> None:
    """So a caller that stops iterating stops the network."""
    seen: list[int] = []

    def counted(latents: Tensor, timestep: Tensor, step: int) -> Tensor:
        seen.append(step)
        return network(latents, timestep, step)

    path = sample_flow(name, counted, Noise([1], SHAPE), SD3, 10, tokens=4096)
    assert seen == []
    next(path)
    assert set(seen) == {0}


@pytest.mark.parametrize("name", FLOW_SAMPLER_INFO)
@pytest.mark.parametrize("steps", [1, 2, 10])
def test_a_straight_flow_is_integrated_exactly(name: str, steps: int) -> None:
    """One velocity everywhere: the start less it, from the level where the sampler starts; x0 is the end."""
    velocity = torch.linspace(-1, 1, 32).reshape(1, *SHAPE)
    path = run(name, steps, denoise=lambda latents, timestep, step: velocity)
    _, sigmas = flow_schedule(SD3, steps, 4096, multistep=name == "dpmpp_2m")
    start = Noise([7], SHAPE).draw()
    for sample, sigma in zip(path, sigmas[1:].tolist(), strict=True):
        expected = start + (sigma - sigmas[0].item()) * velocity
        torch.testing.assert_close(sample.latents, expected, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(sample.denoised, path[-1].latents, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", FLOW_SAMPLER_INFO)
def test_a_perfect_network_finds_the_picture(name: str) -> None:
    picture = torch.linspace(-1, 1, 32).reshape(1, *SHAPE)
    _, sigmas = flow_schedule(SD3, 10, 4096, multistep=name == "dpmpp_2m")

    def exact(latents: Tensor, timestep: Tensor, step: int) -> Tensor:
        sigma = sigmas[step].item() if name == "dpmpp_2m" else timestep / 1000  # its timesteps are cut off
        return (latents - picture) / sigma

    last = run(name, 10, denoise=exact)[-1]
    torch.testing.assert_close(last.latents, picture, rtol=0, atol=1e-5)
    torch.testing.assert_close(last.denoised, picture, rtol=0, atol=1e-5)


def test_the_preview_is_what_the_velocity_points_at() -> None:
    start = Noise([7], SHAPE).draw()
    velocity = network(start, torch.tensor(1000.0), 0)
    torch.testing.assert_close(run("euler", 5)[0].denoised, start - velocity)


def normal_flow(x: Tensor, sigma: Tensor | float, deviation: float = 0.5) -> Tensor:
    """The picture behind x, if pictures are normal with this deviation."""
    alpha = 1 - sigma
    return x * alpha * deviation**2 / (alpha**2 * deviation**2 + sigma**2)


def solved(name: str, steps: int) -> float:
    """The error at sigma 0.1 on that flow, from sigma 0.9: exactly, x goes with its own deviation."""
    sigmas = np.linspace(0.9, 0.1, steps + 1).tolist()
    start = torch.tensor([1.0], dtype=torch.float64)
    *_, (x, _) = SOLVERS[name](start, sigmas, lambda x, i: normal_flow(x, sigmas[i]))
    return abs(x.item() - ((0.45**2 + 0.1**2) / (0.05**2 + 0.9**2)) ** 0.5)


@pytest.mark.parametrize(("name", "order"), [("euler", 1), ("heun", 2), ("dpmpp_2m", 2)])
def test_solvers_converge_at_their_order(name: str, order: int) -> None:
    """Twice the steps divide the error by 2 to the order."""
    assert solved(name, 40) / solved(name, 80) > 0.85 * 2**order


def test_the_second_order_is_nearer_in_the_same_steps() -> None:
    """From pure noise to the picture, as the samplers are called."""
    errors: dict[str, float] = {}
    for name in FLOW_SAMPLER_INFO:

        def flow(latents: Tensor, timestep: Tensor, step: int) -> Tensor:
            sigma = timestep / 1000
            return (latents - normal_flow(latents, sigma)) / sigma

        exact = 0.5 * Noise([7], SHAPE).draw()
        errors[name] = (run(name, 20, denoise=flow)[-1].latents - exact).abs().max().item()
    assert errors["heun"] < errors["euler"] / 4
    assert errors["dpmpp_2m"] < errors["euler"] / 4


@pytest.mark.parametrize("config", [SD3, DYNAMIC], ids=["fixed", "dynamic"])
@pytest.mark.parametrize("name", FLOW_SAMPLER_INFO)
def test_a_batch_equals_its_images_and_a_run_equals_its_repeat(name: str, config: FlowConfig) -> None:
    batch = run(name, 6, 5, 6, config=config)[-1].latents
    assert torch.equal(batch, run(name, 6, 5, 6, config=config)[-1].latents)
    alone = torch.cat([run(name, 6, seed, config=config)[-1].latents for seed in (5, 6)])
    torch.testing.assert_close(batch, alone, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", FLOW_SAMPLER_INFO)
def test_two_runs_at_once_do_not_touch_each_other(name: str) -> None:
    alone = run(name, 6)[-1].latents
    first, second = (sample_flow(name, network, Noise([7], SHAPE), SD3, 6, tokens=64) for _ in range(2))
    *_, (last, _) = zip(first, second, strict=True)
    assert torch.equal(last.latents, alone)


@pytest.mark.parametrize("name", FLOW_SAMPLER_INFO)
def test_only_the_start_is_drawn(name: str) -> None:
    noise, once = Noise([7], SHAPE), Noise([7], SHAPE)
    list(sample_flow(name, network, noise, SD3, 4, tokens=64))
    once.draw()
    assert torch.equal(noise.draw(), once.draw())


def test_bad_requests_are_named_at_once() -> None:
    noise = Noise([1], SHAPE)
    with pytest.raises(InvalidRequest, match=r"sampler is 'ddim'; it can be euler, heun, dpmpp_2m"):
        sample_flow("ddim", network, noise, SD3, 5, tokens=64)
    for steps in (0, -3, 1001):
        with pytest.raises(InvalidRequest, match=f"steps is {steps}; it can be 1 to 1000"):
            sample_flow("euler", network, noise, SD3, steps, tokens=64)
    for shift in (0.0, -1.0, 101.0, float("nan")):
        with pytest.raises(InvalidRequest, match=f"shift is {shift!r}; it can be 0.01 to 100"):
            sample_flow("euler", network, noise, SD3, 5, tokens=64, shift=shift)


def test_every_sampler_has_its_solver() -> None:
    assert list(SOLVERS) == list(FLOW_SAMPLER_INFO)
