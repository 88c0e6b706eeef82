"""What strangers may ask for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from backend import Hardware, SD3Request, SD15Request, Settings, StableCascadeRequest, Studio, public
from backend.errors import InvalidRequest
from backend.requests import Request

HERE = Hardware.card(gib=24, ram_gib=32)


@pytest.mark.parametrize(
    "request_",
    [
        SD15Request(prompt="a" * 1000),
        SD15Request(width=1536, height=680, steps=50, num_images=4),
        SD15Request(checkpoint="sd15"),
        SD3Request(checkpoint="sd3.5-large", width=1024, height=1024),
        StableCascadeRequest(checkpoint="stable-cascade"),
    ],
)
def test_what_is_within_the_caps(request_: Request) -> None:
    public.check(request_)


@pytest.mark.parametrize(
    ("family", "asked", "message"),
    [
        (SD15Request, {"checkpoint": "/etc/passwd"}, "checkpoint is '/etc/passwd'; .* it can be demo, sd15"),
        (SD15Request, {"checkpoint": "somebody/model"}, "checkpoint is 'somebody/model'"),
        (SD15Request, {"checkpoint": "sd3-medium"}, "checkpoint is 'sd3-medium'"),
        (SD15Request, {"config_from": "somebody/model"}, "config_from is 'somebody/model'"),
        (SD15Request, {"prompt": "a" * 1001}, "prompt has 1001 characters; .* up to 1000"),
        (SD15Request, {"negative_prompt": "a" * 5000}, "negative_prompt has 5000 characters"),
        (SD15Request, {"num_images": 5}, "num_images is 5; .* 1 to 4"),
        (SD15Request, {"steps": 51}, "steps is 51; .* 1 to 50"),
        (StableCascadeRequest, {"prior_steps": 51}, "prior_steps is 51"),
        (StableCascadeRequest, {"decoder_steps": 150}, "decoder_steps is 150"),
        (SD15Request, {"width": 2048, "height": 64}, "2048 × 64; .* no side longer than 1536"),
        (SD15Request, {"width": 1032, "height": 1024}, "1032 × 1024; .* up to 1048576 pixels"),
        (SD3Request, {"checkpoint": "sd3-medium", "width": 1040}, "1040 × 1024"),
    ],
)
def test_what_is_beyond(family: type[Request], asked: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidRequest, match=message):
        public.check(family(**asked))


def test_the_caps_hold_for_a_public_studio_alone(tmp_path: Path) -> None:
    asked = SD15Request(steps=150)
    strangers = Studio(Settings(public=True, device="cpu", home=tmp_path), HERE)
    for call in (strangers.plan, strangers.run):
        with pytest.raises(InvalidRequest, match="on this public server"):
            call(asked)
    assert Studio(Settings(device="cpu", home=tmp_path), HERE).plan(asked).fits
