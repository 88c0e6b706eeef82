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
class Blocks:
    """A component in the pieces in which it can be streamed: what is `kept` on the device all the time, and
    the bytes of each block, in the order of the network."""

    kept: int
    blocks: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class Adapted:
    """Low-rank terms that go with a component: `key` says which and with what weights, `paths` are those of
    the layers that they are for, by which `terms` reads them, and `bytes` are theirs as they run.

    `merging_bytes` are those of the weights that they can be merged into, 0 where they cannot; for so few
    `forwards` of the network it may not be worth it. `names` are what they are called.
    """

    key: Hashable
    names: tuple[str, ...]
    paths: frozenset[str]
    terms: Callable[[], Mapping[str, Any]]
    bytes: int
    merging_bytes: int = 0
    forwards: int = 1


@dataclass(frozen=True, kw_only=True)
class Component:
    """A part of a checkpoint: `identity` says which file and precision; equals load once.

    `dtype` is what it computes in; its `precision` is that, too, but for quantised weights. Of its `bytes`
    as it runs, so many are `copied` when it is in RAM: the rest stays mapped from the file. `load` makes what
    is lent on a device ("cpu", "cuda:1"); `open`, where there is one, makes it with its weights still as the
    files have them, and those, so that it can be streamed from there. `blocks` tells how it is streamed.

    A `passing` one is used once a prompt and leaves a CPU's memory with its phase; one that `stands_aside`
    may run on the CPU of a machine whose card cannot hold it. What is `adapted` is the same component with
    something added while it is lent.
    """

    name: str
    identity: Hashable
    bytes: int
    precision: str
    dtype: str
    load: Callable[[str], Any]
    checkpoint: str = ""
    family: str = ""
    copied: int = -1
    blocks: Callable[[], Blocks] | None = None
    open: Callable[[], Any] | None = None
    passing: bool = False
    stands_aside: bool = False
    adapted: Adapted | None = None

    @property
    def state(self) -> Hashable:
        """What results depend on: the component, and what is added to it."""
        return self.identity if self.adapted is None else (self.identity, self.adapted.key)

    @property
    def added_bytes(self) -> int:
        return self.adapted.bytes if self.adapted else 0

    @property
    def copied_bytes(self) -> int:
        return self.bytes if self.copied < 0 else self.copied


@dataclass(frozen=True, kw_only=True)
class Manner:
    """How a phase cuts its work: the pictures of one forward, guidance's halves together or `apart`, a
    decoder's tiles (their side in latent pixels), attention's queries at once (`rows`; None: all)."""

    images: int = 1
    apart: bool = False
    tile: int | None = None
    rows: int | None = None


@dataclass(frozen=True, kw_only=True)
class Progress:
    """`step` of `steps` is done; `preview` draws small pictures of the state, if asked to."""

    step: int
    steps: int
    preview: Callable[[], tuple[Image, ...]] | None = None


class NotFinite(Exception):
    """A component's result holds values that are no numbers, which a wider dtype may mend."""

    def __init__(self, component: str, what: str) -> None:
        super().__init__(f"{what} gave values that are not numbers")
        self.component = component
        self.what = what


# parts on loan by name, results of the earlier phases by name, how to go about it → progress, then the result
Work = Callable[[Mapping[str, Any], Mapping[str, Any], Manner], Generator[Progress | Notice, None, Any]]


@dataclass(frozen=True, kw_only=True)
class Phase:
    """`key` holds all that the result depends on: an equal key means an equal result. None: never kept.

    `manners` are the ways to run it, the fastest first and the leanest last; `work` tells the bytes of
    activations that one of them takes at its peak. `pictures` is how many it makes in all.
    """

    name: str
    components: tuple[str, ...]
    work: Callable[[Manner], int]
    key: Hashable | None
    run: Work
    manners: tuple[Manner, ...] = (Manner(),)
    pictures: int = 1


@dataclass(frozen=True, kw_only=True)
class Pipeline:
    """`settings` are the request's values, defaults filled in; the last phase's result is the pictures;
    `decisions` say in plain sentences what was chosen, `notices` what a user is to know."""

    components: Mapping[str, Component]
    phases: tuple[Phase, ...]
    settings: dict[str, Any]
    decisions: tuple[str, ...] = ()
    notices: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Way:
    """One of the ways to make the pictures: `label` says what sets it apart ("T5 runs with 8 bits a weight").
    One that is `lacking` a part is for when nothing else can be had; `pace` orders ways by how much there is
    to compute, where that differs. `make` reads configs and loads nothing."""

    make: Callable[[], Pipeline]
    label: str = ""
    lacking: bool = False
    pace: float = 0.0


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


def split(images: int, *, guided: bool) -> tuple[Manner, ...]:
    """The manners of a network that paints: all pictures in one forward, then half of them, down to one, then
    guidance's halves apart."""
    counts = []
    while images:
        counts.append(images)
        images = -(-images // 2) if images > 1 else 0
    together = tuple(Manner(images=count) for count in counts)
    return (*together, Manner(images=1, apart=True)) if guided else together
