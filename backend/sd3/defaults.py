"""What a checkpoint of this family paints with unless told otherwise. No torch here: the page asks for it."""

from __future__ import annotations

from pathlib import PurePath
from typing import Any

from backend import catalog
from backend.weights.source import Source

FAMILY = "sd3"

# The reference scheduler that a checkpoint names → the sampler that equals it.
SAMPLERS = {
    "FlowMatchEulerDiscreteScheduler": "euler",
    "FlowMatchHeunDiscreteScheduler": "heun",
    "DPMSolverMultistepScheduler": "dpmpp_2m",
}


def defaults(source: Source) -> dict[str, Any]:
    """Steps, guidance scale, sampler, shift and size: the checkpoint's own where it states them, else
    those of the published one that it is, or most resembles.

    Raises CheckpointError for a config that cannot be read.
    """
    transformer, vae, scheduler = (source.config(name) for name in ("transformer", "vae", "scheduler"))
    entry = _resembled(source.name, transformer)
    widths, side = vae.get("block_out_channels"), transformer.get("sample_size")
    scale = 2 ** (len(widths) - 1) if isinstance(widths, list | tuple) else 8
    values = {
        **entry.defaults,
        "sampler": SAMPLERS.get(str(scheduler.get("_class_name")), "euler"),
        "shift": scheduler.get("shift", entry.defaults["shift"]),
    }
    if isinstance(side, int) and side > 0:
        values |= {"width": side * scale, "height": side * scale}
    stated = source.extras().get("defaults", {})
    return values | {name: value for name, value in stated.items() if name in values}


def _resembled(name: str, transformer: dict[str, Any]) -> catalog.CatalogueEntry:
    """By name, also that of a folder; a fine-tune of any name has its base's settings."""
    known = [entry for entry in catalog.entries(FAMILY) if not entry.bundled]
    for entry in known:
        if name == entry.name or name in entry.repositories or name == PurePath(entry.repositories[0]).name:
            return entry
    layers = transformer.get("num_layers")
    if isinstance(layers, int) and layers >= 38:
        kind = "sd3.5-large-turbo" if "turbo" in name.lower() else "sd3.5-large"
    else:
        kind = "sd3.5-medium" if transformer.get("dual_attention_layers") else "sd3-medium"
    return next(entry for entry in known if entry.name == kind)
