"""What a checkpoint of this family paints with unless told otherwise. No torch here: the page asks for it."""

from __future__ import annotations

from typing import Any

from backend import catalog
from backend.weights.source import Source


def defaults(source: Source) -> dict[str, Any]:
    """Steps and guidance scales of both stages, width and height: the checkpoint's own where its
    triptych.json states them, else the published ones.

    Raises CheckpointError for a triptych.json that cannot be read.
    """
    values = dict(catalog.published("stable_cascade").defaults)
    stated = source.extras().get("defaults", {})
    return values | {name: value for name, value in stated.items() if name in values}
