"""Noise, schedules and samplers by known answers; the steps against the reference are in tests/parity."""

from __future__ import annotations

import subprocess
import sys
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from backend.errors import CheckpointError, InvalidRequest
from backend.sampling import catalog
from backend.sampling.catalog import SAMPLER_INFO
from backend.sampling.noise import Noise
from backend.sampling.samplers import SAMPLERS, Sample, euler, heun, sample, unipc
from backend.sampling.schedules import (
    ScheduleConfig,
    alpha_bars,
    karras_sigmas,
    sigma_schedule,
    sigma_table,
    spaced_timesteps,
)
from backend.sampling.wuerstchen import CosineSchedule, sample_wuerstchen

SD15 = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "steps_offset": 1,
    "clip_sample": False,
    "skip_prk_steps": True,
    "set_alpha_to_one": False,
}
STOCHASTIC = {"euler_ancestral", "dpmpp_2m_sde_karras", "lcm"}
SHAPE = (2, 4, 4)


def configured(**changes: Any) -> ScheduleConfig:
    return ScheduleConfig.from_dict({**SD15, **changes})


def network(latents: Tensor, timestep: Tensor) -> Tensor:
    return torch.tanh(latents + timestep / 1000)


def run(name: str, steps: int, *seeds: int, **changes: Any) -> list[Sample]:
    return list(sample(name, network, Noise(seeds or (7,), SHAPE), configured(**changes), steps))


# Noise


def test_a_batch_draws_what_its_images_draw_alone() -> None:
    batch = Noise([3, 4], SHAPE)
    alone = [Noise([3], SHAPE), Noise([4], SHAPE)]
    for _ in range(3):
        torch.testing.assert_close(batch.draw(), torch.cat([n.draw() for n in alone]), rtol=0, atol=0)


def test_noise_is_that_of_torch_with_this_seed() -> None:
    expected = torch.randn(1, *SHAPE, generator=torch.Generator().manual_seed(11))
    assert torch.equal(Noise([11], SHAPE).draw(), expected)


def test_restored_noise_goes_on_from_there() -> None:
    noise = Noise([1, 2], SHAPE)
    noise.draw()
    state = noise.state()
    expected = noise.draw()
    other = Noise([8, 9], SHAPE)
    other.restore(state)
    assert torch.equal(other.draw(), expected)


# Schedules


def test_known_noise_levels_of_stable_diffusion() -> None:
    table = sigma_table(configured())
    assert table[0] == pytest.approx(0.0291675, rel=1e-5)
    assert table[-1] == pytest.approx(14.614641, rel=1e-5)


@pytest.mark.parametrize(
    ("spacing", "expected"),
    [
        ("leading", [801, 601, 401, 201, 1]),
        ("trailing", [999, 799, 599, 399, 199]),
        ("linspace", [999, 749.25, 499.5, 249.75, 0]),
    ],
)
def test_timestep_spacings(spacing: str, expected: list[float]) -> None:
    assert spaced_timesteps(configured(timestep_spacing=spacing), 5).tolist() == expected


def test_an_open_end_leaves_the_last_point_out() -> None:
    assert spaced_timesteps(configured(timestep_spacing="leading"), 4, open_end=True).tolist() == [
        801,
        601,
        401,
        201,
    ]


def test_karras_sigmas_keep_their_ends_and_are_even_in_the_seventh_root() -> None:
    sigmas = karras_sigmas(0.03, 14.6, 9)
    assert (sigmas[0], sigmas[-1]) == (pytest.approx(14.6), pytest.approx(0.03))
    np.testing.assert_allclose(np.diff(sigmas ** (1 / 7), 2), 0, atol=1e-12)


@pytest.mark.parametrize("multistep", [True, False])
@pytest.mark.parametrize("karras", [True, False])
def test_sigmas_fall_to_their_end(karras: bool, multistep: bool) -> None:
    for end, last in (("zero", 0.0), ("sigma_min", 0.0291675)):
        config = configured(use_karras_sigmas=karras, final_sigmas_type=end)
        timesteps, sigmas = sigma_schedule(config, 20, multistep=multistep)
        assert all(a >= b for a, b in pairwise(sigmas))
        assert all(a >= b for a, b in pairwise(timesteps))
        assert sigmas[-1] == pytest.approx(last, rel=1e-5)


def test_zero_terminal_snr_ends_in_noise_alone_and_keeps_its_start() -> None:
    plain, rescaled = alpha_bars(configured()), alpha_bars(configured(rescale_betas_zero_snr=True))
    assert rescaled[-1] == 0
    assert rescaled[0] == pytest.approx(plain[0])


def test_trained_betas_are_the_schedule() -> None:
    bars = alpha_bars(ScheduleConfig.from_dict({"trained_betas": [0.5, 0.5], "num_train_timesteps": 2}))
    assert bars.tolist() == [0.5, 0.25]


def test_missing_keys_take_the_defaults_of_each_sampler() -> None:
    config = ScheduleConfig.from_dict({"beta_start": 0.001})
    filled = {name: config.filled(s.defaults, s.fixed) for name, s in SAMPLERS.items()}
    assert filled["ddim"].clip_sample
    assert not filled["lcm"].clip_sample
    assert filled["ddim"].timestep_spacing == "leading"
    assert filled["euler"].timestep_spacing == "linspace"
    assert (filled["lcm"].beta_start, filled["lcm"].beta_end) == (0.001, 0.012)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("beta_schedule", "sigmoid"),
        ("prediction_type", "flow"),
        ("timestep_spacing", ["leading"]),
        ("final_sigmas_type", "one"),
        ("beta_end", "0.02"),
        ("beta_end", float("nan")),
        ("beta_start", 1.5),
        ("num_train_timesteps", 0),
        ("num_train_timesteps", 1000.5),
        ("steps_offset", -1),
        ("original_inference_steps", 0),
        ("clip_sample", 1),
        ("trained_betas", [0.1, 0.2]),
        ("trained_betas", [0.1, "x"]),
        ("thresholding", True),
        ("use_beta_sigmas", True),
    ],
)
def test_a_config_that_cannot_be_served_is_named(key: str, value: object) -> None:
    with pytest.raises(CheckpointError, match=f"{key}|beta ") as error:
        configured(**{key: value})
    assert "can be" in str(error.value)


# Stable Cascade's schedule and sampler


def test_the_published_cosine_schedule() -> None:
    """ᾱ(t) = cos²((t + s) / (1 + s) · π/2) / cos²(s / (1 + s) · π/2), never quite 0 or 1."""
    ratios = torch.tensor([0.0, 0.25, 0.5, 0.75, 1.0])
    expected = [0.9999, 0.847012, 0.493843, 0.144274, 0.0001]
    assert CosineSchedule().alpha_bars(ratios).tolist() == pytest.approx(expected, abs=1e-5)
    dense = CosineSchedule().alpha_bars(torch.linspace(0, 1, 101))
    assert (dense[1:] <= dense[:-1]).all()


@pytest.mark.parametrize("scaler", [0.5, 2.0])
def test_a_scaler_means_more_noise(scaler: float) -> None:
    ratios = torch.linspace(0.05, 0.95, 19)
    plain, scaled = (CosineSchedule(scaler=each).alpha_bars(ratios) for each in (1.0, scaler))
    assert (scaled < plain).all()
    bent = {0.5: ratios**0.5, 2.0: 1 - (1 - ratios) ** 2}[scaler]
    torch.testing.assert_close(scaled, CosineSchedule().alpha_bars(bent))


def test_a_published_cosine_schedule_is_read() -> None:
    published = {
        "_class_name": "DDPMWuerstchenScheduler",
        "_diffusers_version": "0.27",
        "scaler": 2,
        "s": 0.01,
    }
    assert CosineSchedule.from_dict(published) == CosineSchedule(scaler=2, s=0.01)
    assert CosineSchedule.from_dict({}) == CosineSchedule(scaler=1.0, s=0.008)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"_class_name": "PNDMScheduler"}, "'PNDMScheduler'; it can be 'DDPMWuerstchenScheduler'"),
        ({"scaler": float("inf")}, "scaler is inf and s 0.008; both can be any number above 0"),
        ({"scaler": 0}, "scaler is 0 and s 0.008; both can be any number above 0"),
        ({"scaler": -1.0}, "above 0"),
        ({"scaler": float("nan")}, "above 0"),
        ({"s": 0.0}, "s 0; both can be any number above 0"),
        ({"scaler": "1.0"}, "scaler is '1.0', of a wrong type"),
        ({"s": None}, "s is None, of a wrong type"),
        ({"scaler": True}, "wrong type"),
    ],
    ids=str,
)
def test_another_schedule_is_refused(changes: dict[str, Any], told: str) -> None:
    with pytest.raises(CheckpointError, match=told):
        CosineSchedule.from_dict({"_class_name": "DDPMWuerstchenScheduler", **changes})


def cascade_path(noise: Noise, steps: int, denoise: Any = None) -> list[Sample]:
    def network(latents: Tensor, ratio: Tensor) -> Tensor:
        return torch.tanh(latents + ratio)

    return list(sample_wuerstchen(denoise or network, noise, CosineSchedule(), steps))


@pytest.mark.parametrize("steps", [1, 2, 10, 150])
def test_cascade_steps_are_counted_and_finite(steps: int) -> None:
    ratios: list[float] = []

    def seen(latents: Tensor, ratio: Tensor) -> Tensor:
        assert latents.dtype == ratio.dtype == torch.float32
        ratios.append(ratio.item())
        return torch.tanh(latents).bfloat16()

    path = cascade_path(Noise([7], SHAPE), steps, seen)
    assert [s.step for s in path] == list(range(1, steps + 1))
    assert ratios == pytest.approx([1 - index / steps for index in range(steps)], abs=1e-6)
    assert all(torch.isfinite(s.latents).all() and s.latents.dtype == torch.float32 for s in path)


def test_a_perfect_network_finds_the_picture_in_cascade_too() -> None:
    picture = torch.linspace(-1, 1, 32).reshape(1, *SHAPE)

    def exact(latents: Tensor, ratio: Tensor) -> Tensor:
        alpha_bar = CosineSchedule().alpha_bars(ratio)
        return (latents - alpha_bar**0.5 * picture) / (1 - alpha_bar) ** 0.5

    last = cascade_path(Noise([1], SHAPE), 10, exact)[-1]
    torch.testing.assert_close(last.denoised, picture, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(last.latents, picture, rtol=0, atol=0.03)  # ᾱ ends at 0.9999


def test_the_noise_runs_on_from_stage_c_into_stage_b() -> None:
    """Restored states give Stage B, of another shape, what one pair of generators would have given it."""
    seeds, outer = [3, 4], (1, 8, 8)
    stage_c = Noise(seeds, SHAPE)
    cascade_path(stage_c, 5)
    stage_b = Noise([8, 9], outer)
    stage_b.restore(stage_c.state())
    path = cascade_path(stage_b, 3)[-1].latents

    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    for generator in generators:
        for _ in range(6):  # the start, and one a step
            torch.randn(SHAPE, generator=generator)
    drawn = Noise(seeds, outer)
    drawn.restore([generator.get_state() for generator in generators])
    assert torch.equal(cascade_path(drawn, 3)[-1].latents, path)
    assert not torch.equal(cascade_path(Noise(seeds, outer), 3)[-1].latents, path)  # not begun anew


def test_noise_of_another_batch_is_not_restored() -> None:
    with pytest.raises(ValueError):
        Noise([1, 2], SHAPE).restore(Noise([1], SHAPE).state())


# Samplers


@pytest.mark.parametrize("name", SAMPLERS)
def test_every_step_count_ends_in_a_finite_picture(name: str) -> None:
    for prediction in ("epsilon", "v_prediction"):
        for spacing in ("leading", "trailing"):
            for steps in (1, 2, 3, 4, 5, 14, 15, 61, 150):
                changes = {
                    "prediction_type": prediction,
                    "timestep_spacing": spacing,
                    "skip_prk_steps": False,
                }
                path = run(name, steps, **changes)
                assert [s.step for s in path] == list(range(1, steps + 1))
                assert all(torch.isfinite(s.latents).all() and torch.isfinite(s.denoised).all() for s in path)


@pytest.mark.parametrize("name", SAMPLERS)
def test_a_perfect_network_finds_the_picture(name: str) -> None:
    """If the network always sees the same picture behind the noise, that picture is the result."""
    picture = torch.linspace(-1, 1, 32).reshape(1, *SHAPE)
    config = configured(prediction_type="sample", set_alpha_to_one=True, timestep_spacing="trailing")
    *_, last = sample(name, lambda latents, t: picture, Noise([1], SHAPE), config, 10)
    torch.testing.assert_close(
        last.denoised, picture, rtol=1e-3, atol=1e-3
    )  # LCM mixes a little of its input in
    torch.testing.assert_close(last.latents, picture, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name", SAMPLERS)
def test_a_batch_equals_its_images_and_a_run_equals_its_repeat(name: str) -> None:
    batch = run(name, 6, 5, 6)[-1].latents
    assert torch.equal(batch, run(name, 6, 5, 6)[-1].latents)
    alone = torch.cat([run(name, 6, seed)[-1].latents for seed in (5, 6)])
    torch.testing.assert_close(batch, alone, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", SAMPLERS)
def test_two_runs_at_once_do_not_touch_each_other(name: str) -> None:
    alone = run(name, 6)[-1].latents
    first, second = (sample(name, network, Noise([7], SHAPE), configured(), 6) for _ in range(2))
    *_, (last, _) = zip(first, second, strict=True)
    assert torch.equal(last.latents, alone)


@pytest.mark.parametrize("name", SAMPLERS)
def test_cost_and_fresh_noise_are_as_told(name: str) -> None:
    timesteps: list[float] = []

    def counted(latents: Tensor, timestep: Tensor) -> Tensor:
        timesteps.append(timestep.item())
        return network(latents, timestep)

    noise, once = Noise([7], SHAPE), Noise([7], SHAPE)
    list(sample(name, counted, noise, configured(), 20))
    once.draw()
    assert abs(len(timesteps) - 20 * SAMPLER_INFO[name].cost) <= 1
    assert torch.equal(noise.draw(), once.draw()) == (name not in STOCHASTIC)


@pytest.mark.parametrize("name", SAMPLERS)
def test_the_network_gets_float32_of_unit_variance_and_may_answer_in_another_type(name: str) -> None:
    seen: list[tuple[Tensor, Tensor]] = []

    def half(latents: Tensor, timestep: Tensor) -> Tensor:
        seen.append((latents, timestep))
        return network(latents, timestep).bfloat16()

    first = next(sample(name, half, Noise(range(8), (4, 16, 16)), configured(), 20))
    latents, timestep = seen[0]
    assert latents.dtype == timestep.dtype == first.latents.dtype == torch.float32
    assert timestep.shape == ()
    assert abs(latents.std().item() - 1) < 0.03


def solved(solver: Any, steps: int) -> float:
    """The error at sigma 1 on the exact score of a normal picture with deviation 0.5, from sigma 10."""
    sigmas = np.geomspace(10, 1, steps + 1).tolist()
    start = torch.tensor([10.0], dtype=torch.float64)
    *_, (y, _) = solver(start, sigmas, lambda y, i: y * 0.25 / (0.25 + sigmas[i] ** 2))
    return abs(y.item() - 10 * ((0.25 + 1) / (0.25 + 100)) ** 0.5)


@pytest.mark.parametrize(("solver", "order"), [(euler, 1), (heun, 2), (unipc, 2)])
def test_solvers_converge_at_their_order(solver: Any, order: int) -> None:
    """Twice the steps divide the error by 2 to the order."""
    assert solved(solver, 40) / solved(solver, 80) > 0.85 * 2**order


def test_bad_requests_are_named_at_once() -> None:
    with pytest.raises(InvalidRequest, match=r"'plms'.*dpmpp_2m"):
        sample("plms", network, Noise([1], SHAPE), configured(), 5)
    for steps in (0, -3, 1000):
        with pytest.raises(InvalidRequest, match=f"{steps}; it can be 1 to 999"):
            sample("ddim", network, Noise([1], SHAPE), configured(), steps)


def test_schedules_that_a_sampler_cannot_follow_are_named() -> None:
    zero_snr = {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    with pytest.raises(CheckpointError, match="v_prediction"):
        run("ddim", 5, **zero_snr)
    with pytest.raises(CheckpointError, match="order 3"):
        run("unipc", 5, solver_order=3)


def test_the_catalogue_needs_no_torch_and_lists_every_sampler() -> None:
    code = f"import runpy, sys; runpy.run_path({catalog.__file__!r}); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
    assert list(SAMPLER_INFO) == list(SAMPLERS)
