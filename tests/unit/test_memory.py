"""Hardware as read from files, the plan as a pure function, and who leaves when the budget is short."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from backend.manager import Manager
from backend.memory.hardware import GIB, Hardware, PeakMeter, cpu_has_bf16, ram_bytes
from backend.memory.plan import RESERVE_BYTES, budget_bytes, gib, make_plan
from backend.phases import Component, PhaseCache

MEMINFO = "MemTotal: 16777216 kB\nMemFree: 1 kB\nMemAvailable: 8388608 kB\n"


def test_ram_is_no_more_than_the_containers(tmp_path: Path) -> None:
    (tmp_path / "meminfo").write_text(MEMINFO)
    assert ram_bytes(tmp_path / "meminfo", tmp_path) == (16 * GIB, 8 * GIB)
    (tmp_path / "memory.max").write_text("max\n")
    (tmp_path / "memory.current").write_text(f"{3 * GIB}\n")
    (tmp_path / "memory.stat").write_text(f"anon 1\nactive_file {GIB}\ninactive_file 0\n")
    assert ram_bytes(tmp_path / "meminfo", tmp_path) == (16 * GIB, 8 * GIB)
    (tmp_path / "memory.max").write_text(f"{4 * GIB}\n")
    # of the 3 GiB in use, 1 GiB are pages of files, which leave when memory is asked for
    assert ram_bytes(tmp_path / "meminfo", tmp_path) == (4 * GIB, 2 * GIB)


@pytest.mark.parametrize(
    ("flags", "expected"),
    [("flags : fpu avx512_bf16 sse", True), ("Features : asimd bf16", True), ("flags : avx512f avx2", False)],
)
def test_bf16_instructions(tmp_path: Path, flags: str, expected: bool) -> None:
    (tmp_path / "cpuinfo").write_text(flags)
    assert cpu_has_bf16(tmp_path / "cpuinfo") is expected
    assert cpu_has_bf16(tmp_path / "absent") is False


def test_plan_counts_all_components_and_the_largest_work() -> None:
    plan = make_plan(
        {"text_encoder": (GIB, "float16"), "unet": (2 * GIB, "float16"), "vae": (GIB // 2, "float32")},
        [("encode", ["text_encoder"], 0), ("denoise", ["unet"], GIB // 2), ("decode", ["vae"], GIB)],
        hardware=Hardware.card(gib=8),
    )
    assert plan.peak_bytes == int(4.5 * GIB)
    assert plan.budget_bytes == 8 * GIB - RESERVE_BYTES["cuda"]
    assert plan.fits
    assert "4.5 GiB" in plan.decisions[0]
    plain = plan.to_dict()
    assert set(plain) == {"device", "budget_bytes", "peak_bytes", "phases", "decisions"}
    assert plain["phases"][1] == {
        "name": "denoise",
        "work_bytes": GIB // 2,
        "peak_bytes": 4 * GIB,
        "components": [{"name": "unet", "placement": "resident", "precision": "float16", "bytes": 2 * GIB}],
    }
    assert isinstance(plain["decisions"], list)
    assert "unet float16 resident" in str(plan)


def test_plan_says_when_nothing_fits() -> None:
    plan = make_plan(
        {"unet": (4 * GIB, "float16")}, [("denoise", ["unet"], GIB)], hardware=Hardware.card(gib=4)
    )
    assert not plan.fits
    assert "denoise needs 5.0 GiB, 4.0 GiB of it weights" in plan.decisions[0]
    assert "weights alone are too large" in plan.decisions[0]


def test_budget_is_capped_and_never_negative() -> None:
    card = Hardware.card(gib=24)
    assert budget_bytes(card, 6) == 6 * GIB - RESERVE_BYTES["cuda"]
    assert budget_bytes(card, 100) == 24 * GIB - RESERVE_BYTES["cuda"]
    assert budget_bytes(card, 0.1) == 0


def test_sizes_are_readable() -> None:
    assert (gib(GIB * 3 // 2), gib(50 * 1024**2)) == ("1.5 GiB", "50 MiB")


def test_peak_meter_keeps_the_highest_reading() -> None:
    readings = iter([5, 9, 7, *[6] * 1000])
    with PeakMeter("cpu", read=lambda: next(readings)) as meter:
        peaks = [meter.peak for _ in range(3)]
    assert peaks[-1] == 9
    assert meter.peak == 9


def component(name: str, size: int, loads: list[str]) -> Component:
    def load() -> Any:
        loads.append(name)
        return object()

    return Component(name=name, identity=name, bytes=size, precision="float32", dtype="float32", load=load)


def test_manager_loads_once_and_evicts_the_least_recent_never_the_lent() -> None:
    loads: list[str] = []
    manager = Manager()
    a, b, c = (component(name, 10, loads) for name in "abc")
    for part in (a, b, c, a):
        with manager.use(part) as first, manager.use(part) as again:
            assert first is again
    assert loads == ["a", "b", "c"]
    with manager.use(b):
        assert manager.make_room(30, [a]) == []
        assert manager.make_room(29, [a, component("d", 9, loads)]) == [
            "c"
        ]  # b is lent, a wanted, d on its way
        assert manager.make_room(0, []) == ["a"]
        manager.clear()
        assert manager.holds(b)
    manager.clear()
    assert manager.bytes == 0


def test_manager_lends_nothing_that_failed_to_load() -> None:
    manager = Manager()

    def fail() -> Any:
        raise OSError("gone")

    broken = Component(name="unet", identity="unet", bytes=1, precision="float32", dtype="float32", load=fail)
    with pytest.raises(OSError, match="gone"), manager.use(broken):
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
