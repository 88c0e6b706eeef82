"""Lends components to phases, each where the plan puts it.

Assumptions: one request at a time; a component on loan is never evicted; when a budget is short, the least
recently used one that is not on loan leaves first: a card for RAM, RAM for the file; equal identities share
one copy. What is swapped or streamed is on the device for its phase only, and waits in RAM or is let go.
"""

from __future__ import annotations

import gc
import threading
from collections import OrderedDict
from collections.abc import Callable, Collection, Generator, Hashable, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from backend.memory.blocks import slots
from backend.memory.hardware import anonymous_bytes, ram_bytes
from backend.memory.plan import RAM_RESERVE_BYTES, PlannedComponent
from backend.phases import Adapted, Component

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from backend.nn.lowrank import Merged

RAM = "RAM"


@dataclass(frozen=True, kw_only=True)
class LoadedPart:
    """A component in memory, as the page lists it; `key` names it to `free`."""

    key: str
    name: str
    checkpoint: str
    family: str
    precision: str
    placement: str
    where: str  # "cpu", "cuda", "cuda:1"; what waits beside them in "RAM", or is read from its "file"
    bytes: int
    lent: bool


@dataclass
class _Entry:
    component: Component
    value: Any
    planned: PlannedComponent
    where: str
    homes: Mapping[str, Tensor] | None = None  # its weights in RAM, or as the file has them
    opened: bool = False  # whether those are the file's, which need not be in the dtype they run in
    pinned: bool = False
    anonymous_bytes: int = 0  # of the process's memory, as measured; a mapped file's pages do not count
    lent: int = 0
    merged: Merged | None = None  # terms in its weights, and which those are
    merged_key: Hashable = None

    @property
    def merged_bytes(self) -> int:
        """What its weights as they were before take of RAM."""
        return self.merged.bytes if self.merged is not None else 0

    def unmerge(self) -> None:
        if self.merged is not None:
            self.merged.undo()
        self.merged = self.merged_key = None

    def bytes_on(self, device: str) -> int:
        """What it takes of a device's memory."""
        if self.where == RAM or self.planned.placement == "cpu":
            return 0
        if self.planned.shares:
            return dict(self.planned.shares).get(device, 0)
        if self.planned.device != device:
            return 0
        if self.planned.placement == "streamed" and self.planned.home:
            return self.planned.held_bytes
        if self.where == "cpu":
            return self.component.copied_bytes + self.merged_bytes
        return self.component.bytes

    @property
    def ram_bytes(self) -> int:
        """What it takes of RAM beside a card."""
        if self.planned.placement == "cpu":
            return self.component.copied_bytes
        if self.homes is None or self.opened:
            return self.merged_bytes
        return self.component.bytes if self.pinned else self.component.copied_bytes


class Manager:
    """`stands_in` is what computes in place of a card that is only described: "cpu", in tests."""

    def __init__(
        self, ram_free: Callable[[], int] = lambda: ram_bytes()[1], stands_in: str | None = None
    ) -> None:
        self._loaded: OrderedDict[Hashable, _Entry] = OrderedDict()  # least recently used first
        self._table = threading.Lock()  # the page frees components while a job takes others
        self._ram_free = ram_free
        self._stands_in = stands_in

    # the page's threads look on meanwhile, so everything that iterates takes a copy

    def holds(self, component: Component) -> bool:
        return component.identity in self._loaded

    def bytes_on(self, device: str) -> int:
        """What the loaded components take of a device."""
        return sum(entry.bytes_on(device) for entry in list(self._loaded.values()))

    @property
    def ram_bytes(self) -> int:
        """What waits in RAM beside a card, or runs there."""
        return sum(entry.ram_bytes for entry in list(self._loaded.values()))

    @property
    def anonymous_bytes(self) -> int:
        """What loading them added to the process's anonymous memory."""
        return sum(entry.anonymous_bytes + entry.merged_bytes for entry in list(self._loaded.values()))

    def parts(self) -> list[LoadedPart]:
        """What is in memory, the most recently used first."""
        return [
            LoadedPart(
                key=_key(identity), name=entry.component.name, checkpoint=entry.component.checkpoint,
                family=entry.component.family,
                precision=entry.component.precision, placement=entry.planned.placement,
                where="file" if entry.opened and entry.where == RAM else entry.where,
                bytes=entry.component.bytes, lent=entry.lent > 0,
            )
            for identity, entry in reversed(list(self._loaded.items()))
        ]  # fmt: skip

    @contextmanager
    def use(self, component: Component, planned: PlannedComponent) -> Generator[Any, None, None]:
        """Lend the component where it is planned, with the terms that go with it, loading it if need be.

        Raises CheckpointError as its `load` does, and what a device raises that has no memory left.
        """
        entry = self._lend(component, planned)
        try:
            with self._placed(entry, component.added_bytes), self._adapted(entry, component.adapted):
                yield entry.value
        finally:
            entry.lent -= 1
            if not entry.lent and planned.home == "file" and not entry.opened:
                self._drop(component.identity)

    def _lend(self, component: Component, planned: PlannedComponent) -> _Entry:
        """The component in memory, in a state from which it can go where it is planned; lent from now on."""
        with self._table:
            entry = self._loaded.get(component.identity)
            if entry is not None and (entry.lent or _suits(entry, planned)):
                entry.lent += 1
                entry.planned = planned if not planned.shares else entry.planned
                self._loaded.move_to_end(component.identity)
                return entry
        if entry is not None:  # to be read again
            self._drop(component.identity)
            del entry
            release()
        entry = self._load(component, planned)
        entry.lent = 1
        with self._table:
            self._loaded[component.identity] = entry
        return entry

    def _drop(self, identity: Hashable) -> None:
        with self._table:
            entry = self._loaded.get(identity)
            if entry is not None and not entry.lent:
                del self._loaded[identity]

    def _load(self, component: Component, planned: PlannedComponent) -> _Entry:
        before = anonymous_bytes()
        from_file = planned.placement == "streamed" and planned.home == "file"
        if from_file:
            assert component.open is not None, f"{component.name} cannot be read block by block"
            entry = _Entry(component, component.open(), planned, RAM, opened=True)
            entry.homes = _homes(entry.value)
        elif planned.placement == "cpu":
            self._make_ram(component.copied_bytes)
            entry = _Entry(component, component.load("cpu"), planned, "cpu")
        elif planned.home == "ram":
            self._make_ram(component.copied_bytes)
            entry = _Entry(component, component.load("cpu"), planned, RAM)
            entry.homes, entry.pinned = self._pinned(_homes(entry.value), component.bytes)
            self._park(entry)  # with the pinned ones for its weights, so that the others can go
        elif planned.shares:
            entry = _Entry(component, component.load("cpu"), planned, planned.device)
            self._divide(entry)
        else:
            device = self._stands_in or planned.device
            entry = _Entry(component, component.load(device), planned, planned.device)
        entry.anonymous_bytes = max(anonymous_bytes() - before, 0)
        return entry

    @contextmanager
    def _adapted(self, entry: _Entry, adapted: Adapted | None) -> Generator[None, None, None]:
        """While it is lent, with these terms and no others."""
        from backend.memory import placement

        module = placement.module_of(entry.value)
        if module is None or entry.lent > 1:
            yield
            return
        if adapted is None or not entry.planned.merged:
            entry.unmerge()
        if adapted is None:
            yield
            return
        from backend.nn import lowrank

        if not entry.planned.merged:
            device, dtype = self._device(entry.planned), getattr(_torch(), entry.component.dtype)
            with lowrank.attached(module, adapted.terms(), device, dtype):
                yield
            return
        if entry.merged is None:
            entry.merged = lowrank.Merged(module, entry.homes or {})
        if entry.merged_key != adapted.key:
            entry.merged_key = None  # half of them, if this fails
            entry.merged.set(adapted.terms())
            entry.merged_key = adapted.key
        yield

    def _device(self, planned: PlannedComponent) -> torch.device:
        where = "cpu" if planned.placement == "cpu" else planned.device
        return _torch().device(self._stands_in or where)

    @contextmanager
    def _placed(self, entry: _Entry, added_bytes: int) -> Generator[None, None, None]:
        """While it is lent, where its plan says; so many bytes go with it."""
        from backend.memory import placement

        planned, module = entry.planned, placement.module_of(entry.value)
        if module is None or entry.lent > 1 or planned.placement == "cpu":
            yield
            return
        device = self._device(planned)
        streamed = planned.placement == "streamed" and planned.home != ""
        if entry.where != RAM and (streamed or entry.where != planned.device):
            self._park(entry)
        if entry.where == RAM:
            assert entry.homes is not None, "what waits in RAM has its weights there"
        if streamed:
            assert entry.homes is not None, "what is streamed has a home"
            count = slots(planned.device)
            held = planned.held_bytes - added_bytes
            with placement.Streamer(module, entry.homes, device, held, count):
                entry.where = planned.device
                try:
                    yield
                finally:
                    entry.where = RAM
            return
        if entry.where == RAM and entry.homes is not None:
            placement.move(module, entry.homes, device)
            entry.where = planned.device
        try:
            yield
        finally:
            if planned.placement == "swapped" and planned.home == "ram":
                self._park(entry)

    def _divide(self, entry: _Entry) -> None:
        from backend.memory import placement

        module = placement.module_of(entry.value)
        if module is not None:
            shares = {
                int(card.partition(":")[2] or 0): size  # "cuda" is the first
                for card, size in entry.planned.shares
            }
            placement.divide(module, shares)

    def _park(self, entry: _Entry) -> None:
        """Off the device; into RAM where it is not there yet."""
        from backend.memory import placement

        module = placement.module_of(entry.value)
        if module is None:
            return
        if entry.homes is None:
            entry.unmerge()
            entry.homes = {name: tensor.cpu() for name, tensor in placement.tensors_of(module).items()}
        placement.put(module, entry.homes)
        entry.where = RAM
        entry.merged = entry.merged_key = None

    def _pinned(self, homes: Mapping[str, Tensor], size: int) -> tuple[Mapping[str, Tensor], bool]:
        """Where a card can read by itself, if RAM has room for copies of what is mapped, too."""
        import torch

        from backend.memory.placement import pin

        if not torch.cuda.is_available() or self._ram_free() - RAM_RESERVE_BYTES < size:
            return homes, False
        return pin(homes), True

    def make_room(self, device: str, allowed_bytes: int, wanted: Collection[Hashable]) -> list[str]:
        """Evict until what is not `wanted` takes no more than `allowed_bytes` of a device. → names evicted.

        What is lent stays, even if the budget is short for it alone. Off a card goes into RAM if that has
        room: it comes back without a look at its file.
        """
        evicted: list[str] = []
        for identity, entry in list(self._loaded.items()):
            others = sum(e.bytes_on(device) for i, e in list(self._loaded.items()) if i not in wanted)
            if others <= allowed_bytes:
                break
            if entry.lent or identity in wanted or not entry.bytes_on(device):
                continue
            evicted.append(entry.component.name)
            room = entry.homes is not None or self._ram_free() - RAM_RESERVE_BYTES >= entry.component.bytes
            if entry.where != "cpu" and room and not entry.planned.shares:
                self._park(entry)
            else:
                self._drop(identity)
        if evicted:
            release()
        return evicted

    def _make_ram(self, size: int) -> None:
        """Let go of what waits in RAM until there is room for so many bytes more."""
        for identity, entry in list(self._loaded.items()):
            if self._ram_free() - RAM_RESERVE_BYTES >= size:
                return
            if entry.where == RAM and not entry.lent:
                self._drop(identity)
                release()

    def free(self, key: str | None = None) -> bool:
        """Let go of one component, or of all that are not on loan; False where it is on loan, or not here."""
        with self._table:
            chosen = [
                identity
                for identity, entry in self._loaded.items()
                if not entry.lent and key in (None, _key(identity))
            ]
            for identity in chosen:
                del self._loaded[identity]
        if chosen:
            release()
        return bool(chosen)


def _suits(entry: _Entry, planned: PlannedComponent) -> bool:
    """Whether a component as it is in memory can be placed so without being read again."""
    if entry.planned.shares or planned.shares:  # as it was divided once: cards' free bytes differ each time
        return bool(entry.planned.shares and planned.shares)
    from_file = planned.placement == "streamed" and planned.home == "file"
    if entry.opened:
        return from_file
    if entry.where == "cpu":  # the device is the CPU, or it runs there beside a card
        return not from_file and planned.device == "cpu"
    return planned.placement != "cpu" and not from_file


def _homes(value: Any) -> Mapping[str, Tensor]:
    from backend.memory.placement import homes_of, module_of

    module = module_of(value)
    return homes_of(module) if module is not None else {}


def _torch() -> Any:
    import torch  # when something is lent: the page imports this module

    return torch


def _key(identity: Hashable) -> str:
    return f"{hash(identity) & 0xFFFFFFFFFFFFFFFF:016x}"


def release() -> None:
    """Hand freed memory back to the system, not only to the allocator."""
    gc.collect()
    import torch

    if torch.cuda.is_available():
        torch.cuda.empty_cache()
