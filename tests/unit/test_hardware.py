"""What the machine has, as files and torch tell it; free memory read again; the peak meter."""

from __future__ import annotations

import mmap
import pickle
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import torch

from backend import Hardware, InvalidRequest
from backend.memory import hardware
from backend.memory.hardware import GIB, Free, PeakMeter, cpu_has_bf16, cpu_name, current_bytes, ram_bytes

MEMINFO = "MemTotal: 16777216 kB\nMemFree: 1 kB\nMemAvailable: 8388608 kB\n"
HUGE = 0x7FFFFFFFFFFFF000  # "no limit" of the first control groups


def written(folder: Path, **files: str) -> Path:
    folder.mkdir(exist_ok=True)
    for name, text in files.items():
        (folder / name.replace("__", ".")).write_text(text)
    return folder


def test_ram_is_no_more_than_the_containers(tmp_path: Path) -> None:
    written(tmp_path, meminfo=MEMINFO)
    assert ram_bytes(tmp_path / "meminfo", tmp_path) == (16 * GIB, 8 * GIB)
    # of the 3 GiB in use, 1 GiB are pages of files, which leave when memory is asked for
    stat = f"anon 1\nactive_file {GIB}\ninactive_file 0\n"
    written(tmp_path, memory__max="max\n", memory__current=f"{3 * GIB}\n", memory__stat=stat)
    assert ram_bytes(tmp_path / "meminfo", tmp_path) == (16 * GIB, 8 * GIB)
    written(tmp_path, memory__max=f"{4 * GIB}\n")
    assert ram_bytes(tmp_path / "meminfo", tmp_path) == (4 * GIB, 2 * GIB)
    written(tmp_path, memory__max=f"{GIB}\n")
    assert ram_bytes(tmp_path / "meminfo", tmp_path) == (GIB, 0)


def test_the_older_control_groups_limit_too(tmp_path: Path) -> None:
    written(tmp_path, meminfo=MEMINFO)
    # what its own group counts is less than what counts against its limit
    stat = f"active_file 0\ninactive_file 0\ntotal_active_file {GIB}\ntotal_inactive_file {GIB}\n"
    files = {"memory__usage_in_bytes": f"{3 * GIB}\n", "memory__stat": stat}
    written(tmp_path / "memory", memory__limit_in_bytes=f"{HUGE}\n", **files)
    assert ram_bytes(tmp_path / "meminfo", tmp_path) == (16 * GIB, 8 * GIB)
    written(tmp_path / "memory", memory__limit_in_bytes=f"{6 * GIB}\n")
    assert ram_bytes(tmp_path / "meminfo", tmp_path) == (6 * GIB, 5 * GIB)


def test_where_there_are_no_files_of_linux_the_system_is_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    memory = SimpleNamespace(total=32 * GIB, available=20 * GIB)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: memory)
    assert ram_bytes(tmp_path / "absent", tmp_path) == (32 * GIB, 20 * GIB)
    monkeypatch.setattr(hardware, "Path", lambda _: tmp_path / "absent")
    before = current_bytes("cpu")
    with mmap.mmap(-1, 64 << 20) as held:  # not from what the process let go of before
        held.write(b"x" * len(held))
        assert current_bytes("cpu") - before > len(held) // 2


@pytest.mark.parametrize(
    ("flags", "expected"),
    [("flags : fpu avx512_bf16 sse", True), ("Features : asimd bf16", True), ("flags : avx512f avx2", False)],
)
def test_bf16_instructions(tmp_path: Path, flags: str, expected: bool) -> None:
    (tmp_path / "cpuinfo").write_text(flags)
    assert cpu_has_bf16(tmp_path / "cpuinfo") is expected
    assert cpu_has_bf16(tmp_path / "absent") is False


@pytest.mark.parametrize(
    ("capability", "allows"),
    [
        ((7, 5), ()),
        ((8, 0), ("bf16", "flash attention")),
        ((8, 6), ("bf16", "flash attention")),
        ((8, 9), ("bf16", "fp8", "flash attention")),
        ((12, 0), ("bf16", "fp8", "flash attention")),
    ],
)
def test_a_generation_allows(capability: tuple[int, int], allows: tuple[str, ...]) -> None:
    assert Hardware.card(gib=8, capability=capability).allows == allows
    apple = replace(Hardware.card(gib=8), device="mps", capability=None)
    assert apple.allows == ("bf16",)


def test_described_cards() -> None:
    card = Hardware.card(gib=12, ram_gib=20)
    assert (card.device, card.name, card.others) == ("cuda", "a 12 GiB card", ())
    assert (card.total_bytes, card.free_bytes, card.ram_free_bytes) == (12 * GIB, 12 * GIB, 20 * GIB)
    three = Hardware.card(gib=12, count=3)
    assert [other.device for other in three.others] == ["cuda:1", "cuda:2"]
    assert {(other.name, other.free_bytes) for other in three.others} == {("a 12 GiB card", 12 * GIB)}
    assert three.now() is three


def test_now_reads_free_memory_and_nothing_else() -> None:
    readings = iter([Free(5, (6,), 7), Free(1, (2,), 3)])
    here = replace(Hardware.card(gib=8, count=2), read=lambda: next(readings))
    first, second = here.now(), here.now()
    assert (first.free_bytes, first.others[0].free_bytes, first.ram_free_bytes) == (5, 6, 7)
    assert (second.free_bytes, second.others[0].free_bytes, second.ram_free_bytes) == (1, 2, 3)
    assert first.others[0] == replace(here.others[0], free_bytes=6)
    assert (first.total_bytes, first.name, first.read) == (here.total_bytes, here.name, here.read)


class Cards:
    """Stands in for torch.cuda: cards of 24 and 16 GiB, of which others hold 4 and we 3, 1 of it unused."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.names = ["large card", "old card"]
        self.totals, self.capabilities = [24 * GIB, 16 * GIB], [(8, 9), (7, 5)]
        self.taken, self.reserved, self.allocated = [4 * GIB, 0], [3 * GIB, 0], [2 * GIB, 0]
        self.resets: list[int] = []
        answers: dict[str, Any] = {
            "is_available": lambda: True,
            "device_count": lambda: len(self.names),
            "get_device_name": self.names.__getitem__,
            "get_device_capability": self.capabilities.__getitem__,
            "mem_get_info": lambda i: (self.totals[i] - self.taken[i] - self.reserved[i], self.totals[i]),
            "memory_reserved": self.reserved.__getitem__,
            "memory_allocated": lambda device: self.allocated[int(str(device).partition(":")[2] or device)],
            "max_memory_allocated": lambda index: 100 + index,
            "reset_peak_memory_stats": self.resets.append,
        }
        for name, answer in answers.items():
            monkeypatch.setattr(torch.cuda, name, answer)


@pytest.fixture
def cards(monkeypatch: pytest.MonkeyPatch) -> Cards:
    return Cards(monkeypatch)


def test_all_cards_are_seen_once(cards: Cards) -> None:
    here = Hardware.detect()
    assert (here.device, here.name, here.capability) == ("cuda", "large card", (8, 9))
    # what others hold and our living tensors are taken; what our allocator keeps unused is free
    assert (here.total_bytes, here.free_bytes) == (24 * GIB, 18 * GIB)
    (other,) = here.others
    assert (other.device, other.name, other.free_bytes) == ("cuda:1", "old card", 16 * GIB)
    assert (here.bf16, other.bf16, other.capability) == (True, False, (7, 5))
    cards.names[:] = ["another", "yet another"]
    cards.allocated[0], cards.taken[1] = 0, GIB
    now = here.now()
    assert (now.name, now.free_bytes, now.others[0].free_bytes) == ("large card", 20 * GIB, 15 * GIB)
    assert pickle.loads(pickle.dumps(here)) == here


def test_amds_numbers_are_not_nvidias(cards: Cards, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "hip", "6.3")
    here = Hardware.detect("cuda")
    assert (here.capability, here.allows) == (None, ("bf16",))


def test_an_apple_gpu_shares_the_ram(monkeypatch: pytest.MonkeyPatch) -> None:
    used = {"current": 2 * GIB, "driver": 3 * GIB}
    apple = SimpleNamespace(
        recommended_max_memory=lambda: 12 * GIB,
        driver_allocated_memory=lambda: used["driver"],
        current_allocated_memory=lambda: used["current"],
    )
    monkeypatch.setattr(torch, "mps", apple)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(hardware, "ram_bytes", lambda: (16 * GIB, 20 * GIB))
    here = Hardware.detect("mps")
    assert (here.device, here.fused_attention, here.allows) == ("mps", False, ("bf16",))
    assert (here.total_bytes, here.free_bytes) == (12 * GIB, 10 * GIB)
    monkeypatch.setattr(hardware, "ram_bytes", lambda: (16 * GIB, GIB))
    assert here.now().free_bytes == 2 * GIB  # the RAM's, and what our allocator keeps unused
    assert current_bytes("mps") == 2 * GIB
    with PeakMeter("mps") as meter:
        used["current"] = 7 * GIB
        assert meter.peak == 7 * GIB
        used["current"] = GIB
    assert meter.peak == 7 * GIB


def test_a_processor_and_what_is_not_here(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hardware, "ram_bytes", lambda: (16 * GIB, 3 * GIB))
    here = Hardware.detect("cpu")
    assert (here.device, here.total_bytes, here.free_bytes, here.others) == ("cpu", 16 * GIB, 3 * GIB, ())
    monkeypatch.setattr(hardware, "ram_bytes", lambda: (16 * GIB, 2 * GIB))
    assert (here.now().free_bytes, here.now().ram_free_bytes) == (2 * GIB, 2 * GIB)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    assert Hardware.detect().device == "cpu"
    with pytest.raises(InvalidRequest, match="device is 'cuda', which this machine lacks"):
        Hardware.detect("cuda")


def test_current_bytes(cards: Cards) -> None:
    assert (current_bytes("cuda:0"), current_bytes("cuda:1")) == (2 * GIB, 0)
    before = current_bytes("cpu")
    kept = bytes(64 * 1024**2)  # zeros that nobody read take no memory
    kept = bytearray(kept)
    assert current_bytes("cpu") - before > 32 * 1024**2
    del kept


def test_peak_meter_keeps_the_highest_reading() -> None:
    readings = iter([5, 9, 7, *[6] * 1000])
    with PeakMeter("cpu", read=lambda: next(readings)) as meter:
        peaks = [meter.peak for _ in range(3)]
    assert peaks[-1] == 9
    assert meter.peak == 9


def test_peak_meter_of_several_cards(cards: Cards) -> None:
    with PeakMeter("cuda") as meter:
        assert cards.resets == [0, 1]
    assert meter.peak == 100


def test_the_processors_name(tmp_path: Path) -> None:
    file = tmp_path / "cpuinfo"
    file.write_text("processor : 0\nmodel name\t: Some 9000 Processor\nmodel name\t: another\n")
    assert cpu_name(file) == "Some 9000 Processor"
    file.write_text("processor : 0\n")
    assert cpu_name(file) == cpu_name(tmp_path / "absent") != ""
