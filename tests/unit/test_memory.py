"""Who leaves when the budget is short, and which results of phases are kept."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from backend.manager import Manager
from backend.memory.plan import PlannedComponent
from backend.phases import Component, PhaseCache


def component(name: str, size: int, loads: list[str]) -> Component:
    def load(device: str) -> Any:
        loads.append(name)
        return object()

    return Component(name=name, identity=name, bytes=size, precision="float32", dtype="float32", load=load)


def planned(part: Component) -> PlannedComponent:
    return PlannedComponent(
        name=part.name, placement="resident", precision=part.precision, bytes=part.bytes,
        held_bytes=part.bytes, device="cpu",
    )  # fmt: skip


def test_manager_loads_once_and_evicts_the_least_recent_never_the_lent() -> None:
    loads: list[str] = []
    manager = Manager()
    a, b, c = (component(name, 10, loads) for name in "abc")
    for part in (a, b, c, a):
        with manager.use(part, planned(part)) as first, manager.use(part, planned(part)) as again:
            assert first is again
    assert loads == ["a", "b", "c"]
    assert [part.name for part in manager.parts()] == ["a", "c", "b"]  # the most recent first
    with manager.use(b, planned(b)):
        assert manager.make_room("cpu", 20, [a.identity]) == []
        assert manager.make_room("cpu", 19, [a.identity]) == ["c"]  # b is lent, a wanted
        assert manager.make_room("cpu", 0, []) == ["a"]
        assert not manager.free()  # the one that is left is lent
        assert manager.holds(b)
    assert manager.free()
    assert manager.bytes_on("cpu") == 0


def test_manager_frees_one_by_its_key_but_never_what_is_lent() -> None:
    manager = Manager()
    a, b = (component(name, 10, []) for name in "ab")
    for part in (a, b):
        with manager.use(part, planned(part)):
            pass
    keys = {part.name: part.key for part in manager.parts()}
    with manager.use(a, planned(a)):
        assert [part.name for part in manager.parts() if part.lent] == ["a"]
        assert not manager.free(keys["a"])
        assert manager.free(keys["b"])
    assert not manager.free(keys["b"])
    assert [part.name for part in manager.parts()] == ["a"]


def test_manager_keeps_nothing_that_a_cpu_holds_for_its_phase_only() -> None:
    loads: list[str] = []
    manager, t5 = Manager(), component("t5", 10, loads)
    passing = replace(planned(t5), placement="swapped", home="file")
    for _ in range(2):
        with manager.use(t5, passing):
            assert manager.bytes_on("cpu") == 10
        assert not manager.holds(t5)
    assert loads == ["t5", "t5"]


def test_manager_lends_nothing_that_failed_to_load() -> None:
    manager = Manager()

    def fail(device: str) -> Any:
        raise OSError("gone")

    broken = Component(name="unet", identity="unet", bytes=1, precision="float32", dtype="float32", load=fail)
    with pytest.raises(OSError, match="gone"), manager.use(broken, planned(broken)):
        pass
    assert not manager.holds(broken)


def test_phase_cache_forgets_the_least_recent() -> None:
    cache = PhaseCache(size=2)
    cache.put("a", 1)
    cache.put("b", 2)
    assert cache.get("a") == 1
    cache.put("c", 3)
    assert (cache.get("a"), cache.get("b"), cache.get("c")) == (1, None, 3)
    cache.put(None, 4)
    assert cache.get(None) is None
