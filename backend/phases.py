"""What a pipeline is made of: components that can be loaded, phases that use them, and how a phase reports.

A phase's work is a generator. It yields after each step, so progress, preview and cancelling belong to
whoever iterates, and returns its result.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Generator, Hashable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from backend.events import Notice

if TYPE_CHECKING:
    from PIL.Image import Image


@dataclass(frozen=True, kw_only=True)
class Component:
    """A part of a checkpoint: `identity` says which file, precision and device; equals load once.

    `dtype` is what it computes in; its `precision` is that, too, but for quantised weights. A `passing` one
    leaves memory as soon as its phase is done.
    """

    name: str
    identity: Hashable
    bytes: int
    precision: str
    dtype: str
    load: Callable[[], Any]
    passing: bool = False


@dataclass(frozen=True, kw_only=True)
class Progress:
    """`step` of `steps` is done; `preview` draws small pictures of the state, if asked to."""

    step: int
    steps: int
    preview: Callable[[], tuple[Image, ...]] | None = None


# parts on loan by name, results of the earlier phases by name → progress, then the result
Work = Callable[[Mapping[str, Any], Mapping[str, Any]], Generator[Progress | Notice, None, Any]]


@dataclass(frozen=True, kw_only=True)
class Phase:
    """`key` holds all that the result depends on: an equal key means an equal result. None: never kept."""

    name: str
    components: tuple[str, ...]
    work_bytes: int
    key: Hashable | None
    run: Work


@dataclass(frozen=True, kw_only=True)
class Pipeline:
    """`settings` are the request's values, defaults filled in; the last phase's result is the pictures;
    `decisions` say in plain sentences what was chosen for this machine, `notices` what a user is to know."""

    components: Mapping[str, Component]
    phases: tuple[Phase, ...]
    settings: dict[str, Any]
    decisions: tuple[str, ...] = ()
    notices: tuple[str, ...] = ()


class PhaseCache:
    """The results of the last few phases, least recently used first out."""

    def __init__(self, size: int = 16) -> None:
        self._size = size
        self._results: OrderedDict[Hashable, Any] = OrderedDict()

    def get(self, key: Hashable | None) -> Any | None:
        if key not in self._results:
            return None
        self._results.move_to_end(key)
        return self._results[key]

    def put(self, key: Hashable | None, result: Any) -> None:
        if key is None:
            return
        self._results[key] = result
        self._results.move_to_end(key)
        while len(self._results) > self._size:
            self._results.popitem(last=False)

    def clear(self) -> None:
        self._results.clear()
