"""What a checkpoint of this family paints with unless told otherwise. No torch here: the page asks for it."""

from __future__ import annotations

from typing import Any

from backend.weights.source import Source

# The reference scheduler that a checkpoint names → the sampler that equals it.
SAMPLERS = {
    "PNDMScheduler": "pndm",
    "DDIMScheduler": "ddim",
    "EulerDiscreteScheduler": "euler",
    "EulerAncestralDiscreteScheduler": "euler_ancestral",
    "HeunDiscreteScheduler": "heun",
    "DPMSolverMultistepScheduler": "dpmpp_2m",
    "UniPCMultistepScheduler": "unipc",
    "LCMScheduler": "lcm",
}


def defaults(source: Source) -> dict[str, Any]:
    """Steps, guidance scale, sampler, width and height: the checkpoint's own where it states them, else its
    networks' native size, its scheduler's sampler, and the published 50 steps at 7.5.

    Raises CheckpointError for a config that cannot be read.
    """
    unet, vae, scheduler = (source.config(name) for name in ("unet", "vae", "scheduler"))
    widths = vae.get("block_out_channels")
    scale = 2 ** (len(widths) - 1) if isinstance(widths, list | tuple) else 8
    height, width = _sample_size(unet.get("sample_size"))
    values: dict[str, Any] = {
        "steps": 50,
        "guidance_scale": 7.5,
        "sampler": SAMPLERS.get(str(scheduler.get("_class_name")).removeprefix("Flax"), "pndm"),
        "width": width * scale,
        "height": height * scale,
    }
    stated = source.extras().get("defaults", {})
    return values | {name: value for name, value in stated.items() if name in values}


def _sample_size(stated: Any) -> tuple[int, int]:
    """Height and width in latent pixels, from a config that states one number, two, or none."""
    match stated:
        case int(side) if side > 0:
            return side, side
        case [int(height), int(width)] if height > 0 and width > 0:
            return height, width
        case _:
            return 64, 64
