"""What a demo shows while it paints is what it will have painted."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from backend import SD3Request, SD15Request, StableCascadeRequest, studio
from backend.events import Finished, Step
from backend.requests import Request
from backend.settings import Settings
from training.hub import colour_fit

STEPS = {"steps": 6}
STAGES = {"prior_steps": 6, "decoder_steps": 6}
PROMPTS = ["a red lighthouse on green hills at noon", "a blue house in snowy mountains at night, full moon"]


def colours(picture: Image.Image, side: int) -> np.ndarray:
    small = picture.resize((side, side), Image.Resampling.BOX)
    return np.asarray(small).reshape(-1, 3) / 255


@pytest.fixture(scope="module")
def painter(tmp_path_factory: pytest.TempPathFactory) -> studio.Studio:
    return studio.Studio(Settings(device="cpu", home=tmp_path_factory.mktemp("home")))


@pytest.mark.parametrize("prompt", PROMPTS)
@pytest.mark.parametrize(
    ("kind", "steps", "phase", "side", "error", "alike"),
    [
        (SD15Request, STEPS, "denoise", 16, 0.25, 0.7),
        (SD3Request, STEPS, "denoise", 16, 0.25, 0.8),
        (StableCascadeRequest, STAGES, "stage_c", 3, 0.25, 0.6),
        (StableCascadeRequest, STAGES, "stage_b", 32, 0.15, 0.9),
    ],
    ids=["sd15", "sd3", "stage_c", "stage_b"],
)
def test_the_last_preview_has_the_pictures_colours(
    painter: studio.Studio,
    monkeypatch: pytest.MonkeyPatch,
    kind: type[Request],
    steps: dict[str, Any],
    phase: str,
    side: int,
    error: float,
    alike: float,
    prompt: str,
) -> None:
    monkeypatch.setattr(studio, "PREVIEW_SECONDS", 0)
    previews: list[Image.Image] = []
    made: list[Image.Image] = []
    painter.unload()  # or else a stage's results would be kept, and nothing shown
    for event in painter.generate(kind(checkpoint="demo", prompt=prompt, seed=1, **steps)):
        if isinstance(event, Step) and event.phase == phase:
            previews += event.previews
        elif isinstance(event, Finished):
            made += event.result.images
    shown, painted = colours(previews[-1], side), colours(made[0], side)
    assert (np.sqrt(np.square(shown - painted).mean(0)) < error).all()
    assert np.corrcoef(shown.ravel(), painted.ravel())[0, 1] > alike


def test_colours_are_fitted_to_millions_of_latents() -> None:
    """As uneven as Stable Diffusion 3's: what channels of small spread tell is not dropped."""
    torch.manual_seed(0)
    spread = torch.linspace(0.3, 5, 16)[:, None]
    latents = torch.randn(4000, 16, 16, 16) * spread[:, :, None] + 0.3
    factors, bias = torch.randn(16, 3) / 10 / spread, torch.randn(3)

    def drawn(fit: torch.Tensor) -> torch.Tensor:
        return torch.einsum("nchw,cr->nrhw", latents, fit[:-1]) + fit[-1].view(3, 1, 1)

    shown = drawn(torch.cat([factors, bias[None]]))
    assert ((drawn(colour_fit(latents, shown)) - shown).square().mean((0, 2, 3)).sqrt() < 0.05).all()


def test_colours_do_not_hang_on_what_equal_channels_differ_in() -> None:
    torch.manual_seed(0)
    latents = torch.randn(50, 1, 16, 16).repeat(1, 2, 1, 1)
    shown = latents[:, :1].repeat(1, 3, 1, 1) / 2
    for apart in (0.0, 0.01):
        latents[:, 1] += apart * torch.randn(50, 16, 16)
        assert torch.allclose(colour_fit(latents, shown)[:2], torch.tensor(0.25), atol=0.01)
