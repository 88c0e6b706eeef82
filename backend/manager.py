"""Lends components to phases.

Assumptions: one request at a time; a component on loan is never evicted; when the budget is short, the
least recently used one that is not on loan leaves first; equal identities share one copy; a passing one
leaves when it is given back.
"""

from __future__ import annotations

import gc
from collections import OrderedDict
from collections.abc import Generator, Hashable, Iterable
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from backend.memory.hardware import anonymous_bytes
from backend.phases import Component


@dataclass
class _Loaded:
    component: Component
    value: Any
    anonymous_bytes: int  # of the process's memory, as measured; a mapped file's pages do not count
    lent: int = 0


class Manager:
    def __init__(self) -> None:
        self._loaded: OrderedDict[Hashable, _Loaded] = OrderedDict()  # least recently used first

    # the plan is asked for from other threads meanwhile, so everything that iterates takes a copy

    def holds(self, component: Component) -> bool:
        return component.identity in self._loaded

    @property
    def bytes(self) -> int:
        """What the loaded components take together."""
        return sum(entry.component.bytes for entry in list(self._loaded.values()))

    @property
    def anonymous_bytes(self) -> int:
        """What loading them added to the process's anonymous memory."""
        return sum(entry.anonymous_bytes for entry in list(self._loaded.values()))

    def names(self) -> list[str]:
        return [entry.component.name for entry in list(self._loaded.values())]

    @contextmanager
    def use(self, component: Component) -> Generator[Any, None, None]:
        """Lend the component, loading it first if need be. Raises CheckpointError as its `load` does."""
        entry = self._loaded.get(component.identity)
        if entry is None:
            before = anonymous_bytes()
            value = component.load()
            entry = _Loaded(component, value, max(anonymous_bytes() - before, 0))
            self._loaded[component.identity] = entry
        self._loaded.move_to_end(component.identity)
        entry.lent += 1
        try:
            yield entry.value
        finally:
            entry.lent -= 1
            if component.passing and not entry.lent:
                self._loaded.pop(component.identity, None)

    def make_room(self, budget_bytes: int, wanted: Iterable[Component]) -> list[str]:
        """Evict until `budget_bytes` hold what stays and what is `wanted` beside it. → names evicted.

        Neither what is wanted nor what is lent is evicted, even if the budget is short for them alone.
        """
        needed = {component.identity: component for component in wanted}
        missing = sum(component.bytes for component in needed.values() if not self.holds(component))
        evicted = []
        for identity, entry in list(self._loaded.items()):
            if self.bytes + missing <= budget_bytes:
                break
            if not entry.lent and identity not in needed:
                del self._loaded[identity]
                evicted.append(entry.component.name)
        if evicted:
            release()
        return evicted

    def clear(self) -> None:
        """Free everything that is not on loan."""
        for identity, entry in list(self._loaded.items()):
            if not entry.lent:
                del self._loaded[identity]
        release()


def release() -> None:
    """Hand freed memory back to the system, not only to the allocator."""
    gc.collect()
    import torch

    if torch.cuda.is_available():
        torch.cuda.empty_cache()
