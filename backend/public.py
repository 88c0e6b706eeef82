"""What strangers may ask for on a public server: the catalogue's checkpoints, within these caps."""

from __future__ import annotations

from typing import Any

from backend import catalog
from backend.errors import InvalidRequest
from backend.requests import Request

MOST_PIXELS = 1024 * 1024
MOST_SIDE = 1536
MOST_STEPS = 50  # the most that a catalogued checkpoint recommends
MOST_IMAGES = 4
MOST_CHARACTERS = 1000  # of a prompt
STEPS = ("steps", "prior_steps", "decoder_steps")


def check(request: Request) -> None:
    """Raise InvalidRequest for what goes beyond the caps; it names the value and what is allowed."""
    names = catalog.names(request.family)
    if request.checkpoint not in names:
        _refuse("checkpoint", request.checkpoint, ", ".join(names))
    if request.config_from:
        _refuse("config_from", request.config_from, "left out only")
    for name in ("prompt", "negative_prompt"):
        length = len(getattr(request, name))
        if length > MOST_CHARACTERS:
            raise InvalidRequest(
                f"{name} has {length} characters; on this public server it can have up to {MOST_CHARACTERS}"
            )
    if request.num_images > MOST_IMAGES:
        _refuse("num_images", request.num_images, f"1 to {MOST_IMAGES}")
    for name in STEPS:
        steps = getattr(request, name, None) or 0
        if steps > MOST_STEPS:
            _refuse(name, steps, f"1 to {MOST_STEPS}")
    width, height = (_side(request, name) for name in ("width", "height"))
    if max(width, height) > MOST_SIDE or width * height > MOST_PIXELS:
        raise InvalidRequest(
            f"width × height is {width} × {height}; on this public server it can be up to {MOST_PIXELS} "
            f"pixels, and no side longer than {MOST_SIDE}"
        )


def _side(request: Request, name: str) -> int:
    """What is asked for, or the checkpoint's own; a demo's is small."""
    entry = catalog.entry(request.family, request.checkpoint)
    own: Any = entry.defaults.get(name, 0) if entry else 0
    return getattr(request, name) or own


def _refuse(name: str, value: object, allowed: str) -> None:
    raise InvalidRequest(f"{name} is {value!r:.80}; on this public server it can be {allowed}")
