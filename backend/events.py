"""What `Studio.generate` yields, in this order: Waiting*, Planned, (Loading | Step | Notice | Planned)*,
Finished."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from PIL.Image import Image

    from backend.memory.plan import Plan


@dataclass(frozen=True, kw_only=True)
class Waiting:
    """Another request holds the device."""


@dataclass(frozen=True, kw_only=True)
class Planned:
    """The plan, before anything loads."""

    plan: Plan


@dataclass(frozen=True, kw_only=True)
class Loading:
    """A component on its way: `action` is "download" or "load"; `total_bytes` is 0 where it is not known."""

    component: str
    action: str
    done_bytes: int
    total_bytes: int


@dataclass(frozen=True, kw_only=True)
class Step:
    """`step` of `steps` of the phase is done; `eta_s` is the time left in it, None before it can be told.

    `previews` holds one small picture per image while denoising, at most a few times a second;
    `memory_bytes` is what the process takes of the device, above its start.
    """

    phase: str
    step: int
    steps: int
    eta_s: float | None
    previews: tuple[Image, ...] = ()
    memory_bytes: int = 0


@dataclass(frozen=True, kw_only=True)
class Notice:
    """Something the user should know; the work goes on."""

    text: str


@dataclass(frozen=True, kw_only=True)
class GridProgress:
    """Of a grid's `cells` so many are `done`, some of those `failed`; `eta_s` is the time left in all, None
    before it can be told. `preview` is the sheet so far, at most once in a while."""

    done: int
    cells: int
    failed: int = 0
    eta_s: float | None = None
    preview: Image | None = None


@dataclass(frozen=True, kw_only=True)
class Result:
    """What was made. `timings` are seconds per phase and `total`; `settings` are the request's values with
    every default filled in; `peak_bytes` is the measured peak of memory above the start."""

    images: list[Image]
    files: list[Path]
    seeds: list[int]
    plan: Plan
    timings: dict[str, float]
    settings: dict[str, Any]
    peak_bytes: int
    notices: list[str] = field(default_factory=list)


@dataclass(frozen=True, kw_only=True)
class Finished:
    result: Result


Event = Waiting | Planned | Loading | Step | Notice | GridProgress | Finished
