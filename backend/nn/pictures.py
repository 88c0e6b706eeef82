"""From tensors to pictures."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from PIL import Image
from torch import Tensor

# Previews are four times as large as the latents, but for the longer side of at least 128 and at most 512.
PREVIEW_SCALE, LEAST_SIDE, MOST_SIDE = 4, 128, 512


def to_pictures(pixels: Tensor) -> list[Image.Image]:
    """(B, 3, H, W) in [0, 1] → B pictures; what lies outside is clamped."""
    values = pixels.float().clamp(0, 1).mul(255).round().byte()
    return [Image.fromarray(array) for array in values.permute(0, 2, 3, 1).contiguous().cpu().numpy()]


def linear_previews(latents: Tensor, rgb: Mapping[str, Any]) -> tuple[Image.Image, ...]:
    """Latents (B, C, h, w) → small pictures by a linear map of the channels to RGB in [-1, 1]."""
    factors, bias = (torch.tensor(rgb[part], device=latents.device) for part in ("factors", "bias"))
    colours = torch.einsum("bchw,cr->brhw", latents.float(), factors.float()) + bias.float().view(1, 3, 1, 1)
    return tuple(enlarged(picture) for picture in to_pictures(colours / 2 + 0.5))


def enlarged(picture: Image.Image) -> Image.Image:
    longer = max(picture.size)
    scale = min(max(PREVIEW_SCALE, LEAST_SIDE / longer), max(MOST_SIDE / longer, 1))
    width, height = (round(scale * side) for side in picture.size)
    return picture.resize((width, height), Image.Resampling.BICUBIC)
