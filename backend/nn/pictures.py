"""From tensors to pictures."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from PIL import Image
from torch import Tensor

PREVIEW_SCALE, PREVIEW_SIDE = 4, 512  # previews are that much larger than the latents, up to that many pixels


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
    scale = max(1.0, min(PREVIEW_SCALE, PREVIEW_SIDE / max(picture.size)))
    width, height = (round(scale * side) for side in picture.size)
    return picture.resize((width, height), Image.Resampling.BICUBIC)
