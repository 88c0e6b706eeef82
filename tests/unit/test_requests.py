"""Bad values are refused when the request is made, by name, with what is allowed."""

from __future__ import annotations

import math
from typing import Any

import pytest

from backend.errors import InvalidRequest, TriptychError
from backend.requests import SD15Request, StableCascadeRequest
from backend.settings import Settings


@pytest.mark.parametrize(
    ("field", "value", "allowed"),
    [
        ("steps", 0, "1 to 150"),
        ("steps", 1000, "1 to 150"),
        ("steps", 2.5, "whole number"),
        ("steps", "20", "whole number"),
        ("steps", True, "whole number"),
        ("guidance_scale", math.nan, "0 to 30"),
        ("guidance_scale", math.inf, "0 to 30"),
        ("guidance_scale", -1, "0 to 30"),
        ("guidance_scale", 30.5, "0 to 30"),
        ("guidance_scale", "7", "0 to 30"),
        ("width", 100, "multiples of 8"),
        ("height", 56, "64 to 2048"),
        ("height", 2056, "64 to 2048"),
        ("seed", -2, "4294967295"),
        ("seed", 2**32, "4294967295"),
        ("seed", math.nan, "whole number"),
        ("seed", math.inf, "whole number"),
        ("num_images", 0, "1 to 8"),
        ("num_images", 100, "1 to 8"),
        ("sampler", "dpm_fast", "euler_ancestral"),
        ("dtype", "int8", "bfloat16"),
        ("prefer", "cheap", "quality"),
        ("clip_skip", 12, "0 to 11"),
        ("prompt", None, "text"),
        ("prompt", 7, "text"),
        ("prompt", "x \ud83d", "half of a character at place 3"),
        ("seed", 10**400, "whole number"),
        pytest.param("guidance_scale", 10**5000, "0 to 30", id="a number too long to print"),
        ("checkpoint", " ", "hub repository"),
        ("raw_prompt", "yes", "True or False"),
        ("loras", "style", "a list of 0 to 32"),
        ("loras", (("style", 1.0),) * 33, "a list of 0 to 32"),
        ("loras", ("style",), "pairs of a name or file and a weight"),
        ("loras", (("", 1.0),), "pairs of a name or file and a weight"),
        ("loras", (("style",),), "pairs of a name or file and a weight"),
        ("loras", (("style", float("nan")),), "from -10 to 10"),
        ("loras", (("style", 0.5, "much"),), "from -10 to 10"),
    ],
)
def test_refused(field: str, value: Any, allowed: str) -> None:
    fields: dict[str, Any] = {"prompt": "a red house", field: value}
    with pytest.raises(InvalidRequest) as caught:
        SD15Request(**fields)
    assert str(caught.value).startswith(field)
    assert allowed in str(caught.value)
    if value is True or isinstance(value, str | float) or value in (0, -1, -2):
        assert repr(value) in str(caught.value) or field == "checkpoint"


@pytest.mark.parametrize(
    ("field", "value", "allowed"),
    [
        *(
            (f"{stage}_steps", value, "a whole number from 1 to 150")
            for stage in ("prior", "decoder")
            for value in (0, 151, -1, 2.5, "20", True, math.nan, math.inf, [20])
        ),
        *(
            (f"{stage}_guidance_scale", value, "a number from 0 to 30")
            for stage in ("prior", "decoder")
            for value in (-0.1, 31, 30.5, math.nan, math.inf, -math.inf, True, "4", 10**400)
        ),
        *(
            (field, value, "auto, full, lite")
            for field in ("stages", "stage_c", "stage_b")
            for value in ("medium", "Full", "", 1, True, ["full"])
        ),
        ("stages", None, "auto, full, lite"),
        *(
            (field, value, "from 64 to 2048 in multiples of 64")
            for field in ("width", "height")
            for value in (0, 8, 100, 1000, 1032, 2112, -64, 64.5, "1024", True)
        ),
        ("num_images", 9, "1 to 8"),
        ("clip_skip", -1, "0 to 11"),
        ("negative_prompt", None, "must be text"),
        ("loras", "style", "a list of 0 to 32"),
    ],
)
def test_cascade_refused(field: str, value: Any, allowed: str) -> None:
    fields: dict[str, Any] = {"prompt": "a red house", field: value}
    with pytest.raises(InvalidRequest) as caught:
        StableCascadeRequest(**fields)
    assert str(caught.value).startswith(f"{field} is ")
    assert allowed in str(caught.value)
    assert len(str(caught.value)) < 200


def test_cascade_limits_are_inside() -> None:
    largest = StableCascadeRequest(
        prior_steps=150, decoder_steps=1, prior_guidance_scale=30, decoder_guidance_scale=0,
        width=2048, height=64, num_images=8,
    )  # fmt: skip
    assert (largest.prior_guidance_scale, largest.decoder_guidance_scale) == (30.0, 0.0)
    assert isinstance(largest.prior_guidance_scale, float)
    plain = StableCascadeRequest()
    assert (plain.prior_steps, plain.decoder_steps, plain.images, plain.stages) == (None, None, (), "auto")
    assert StableCascadeRequest(images=[]).images == ()  # type: ignore[arg-type]
    assert StableCascadeRequest(prior_steps=20.0).prior_steps == 20  # type: ignore[arg-type]


def test_a_field_of_another_family_is_unknown() -> None:
    for field in ("steps", "guidance_scale", "sampler", "t5"):
        with pytest.raises(TypeError, match=field):
            StableCascadeRequest(**{field: 1})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("fields", "wishes"),
    [
        ({}, ("auto", "auto")),
        ({"stages": "lite"}, ("lite", "lite")),
        ({"stages": "lite", "stage_c": "full"}, ("full", "lite")),
        ({"stages": "full", "stage_b": "lite"}, ("full", "lite")),
        ({"stages": "lite", "stage_b": "auto"}, ("lite", "auto")),
        ({"stage_c": "lite", "stage_b": "full"}, ("lite", "full")),
    ],
)
def test_one_stages_wish_over_that_for_both(fields: dict[str, Any], wishes: tuple[str, str]) -> None:
    request = StableCascadeRequest(**fields)
    assert (request.wish("stage_c"), request.wish("stage_b")) == wishes


def test_whole_floats_of_json_clients_become_ints() -> None:
    request = SD15Request(seed=7.0, steps=20.0, width=512.0)  # type: ignore[arg-type]
    assert (request.seed, request.steps, request.width) == (7, 20, 512)
    assert all(isinstance(value, int) for value in (request.seed, request.steps, request.width))


@pytest.mark.parametrize("seed", [-1, 0, 2**32 - 1])
def test_limits_are_inside(seed: int) -> None:
    request = SD15Request(seed=seed, steps=150, guidance_scale=30, num_images=8, width=2048, height=64)
    assert request.guidance_scale == 30.0


@pytest.mark.parametrize(
    "wrong",
    [
        {"device": "tpu"},
        {"dtype": "int8"},
        {"port": 70000},
        {"vram": 0},
        {"vram": math.nan},
        {"auth": "nobody"},
        {"auth": "user:"},
    ],
)
def test_settings_are_checked(wrong: dict[str, Any]) -> None:
    with pytest.raises(TriptychError, match=next(iter(wrong))):
        Settings(**wrong)


def test_settings_do_not_print_the_password() -> None:
    assert "secret" not in repr(Settings(auth="user:secret"))
