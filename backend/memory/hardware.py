"""What the machine has: devices, free memory, what runs fast on them."""

from __future__ import annotations

import platform
import threading
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

from backend.errors import InvalidRequest

GIB = 1024**3
AMPERE, ADA = (8, 0), (8, 9)  # bf16 and flash attention came with the one, fp8 with the other


class Free(NamedTuple):
    """Free bytes at one moment: of the device, of each further card, of the RAM."""

    device: int
    others: tuple[int, ...]
    ram: int


@dataclass(frozen=True, kw_only=True)
class Card:
    """A CUDA card beside the first; `device` is torch's name of it, "cuda:1" and on."""

    device: str
    name: str
    total_bytes: int
    free_bytes: int
    capability: tuple[int, int] | None
    bf16: bool


@dataclass(frozen=True, kw_only=True)
class Hardware:
    """One device and the memory around it, in bytes. On a CPU the device's memory is the RAM.

    Free is what neither others nor our own living tensors take; what our allocator keeps unused is free.
    `capability` is CUDA's; `fused_attention` says that attention never holds all its scores. `others` are
    further cards. `read` tells free memory anew; described hardware has none, and `stand_in` may be what
    computes in its place ("cpu").
    """

    device: str  # "cpu", "cuda" or "mps"
    name: str
    total_bytes: int
    free_bytes: int
    ram_bytes: int
    ram_free_bytes: int
    bf16: bool
    capability: tuple[int, int] | None = None
    fused_attention: bool = True
    others: tuple[Card, ...] = ()
    read: Callable[[], Free] | None = field(default=None, compare=False, repr=False)
    stand_in: str | None = None

    @classmethod
    def card(
        cls, gib: float, ram_gib: float = 32.0, *, count: int = 1, capability: tuple[int, int] = AMPERE
    ) -> Hardware:
        """`count` equal CUDA cards of `gib` GiB, otherwise free, beside `ram_gib` GiB of free RAM."""
        article = "an" if f"{gib:g}".startswith(("8", "11", "18")) else "a"
        name, memory, ram = f"{article} {gib:g} GiB card", int(gib * GIB), int(ram_gib * GIB)
        bf16 = capability >= AMPERE
        others = tuple(
            Card(
                device=f"cuda:{index}", name=name, total_bytes=memory, free_bytes=memory,
                capability=capability, bf16=bf16,
            )
            for index in range(1, count)
        )  # fmt: skip
        return cls(
            device="cuda", name=name, total_bytes=memory, free_bytes=memory, ram_bytes=ram,
            ram_free_bytes=ram, bf16=bf16, capability=capability, others=others,
        )  # fmt: skip

    @classmethod
    def detect(cls, device: str = "auto") -> Hardware:
        """Look at this machine; `device` "auto" takes CUDA, then MPS, then the CPU.

        Raises InvalidRequest for a device that is not here.
        """
        if device == "cpu":
            return _cpu()
        import torch

        if torch.cuda.is_available() and device in ("auto", "cuda"):
            return _cuda()
        if torch.backends.mps.is_available() and device in ("auto", "mps"):
            return _mps()
        if device != "auto":
            raise InvalidRequest(f"device is {device!r}, which this machine lacks; it can be auto or cpu")
        return _cpu()

    def now(self) -> Hardware:
        """The same with its free memory read again; described hardware stays as it is."""
        if self.read is None:
            return self
        free = self.read()
        cards = zip(self.others, free.others, strict=True)
        others = tuple(replace(card, free_bytes=left) for card, left in cards)
        return replace(self, free_bytes=free.device, others=others, ram_free_bytes=free.ram)

    @property
    def flash(self) -> bool:
        return self.capability is not None and self.capability >= AMPERE

    @property
    def fp8(self) -> bool:
        return self.capability is not None and self.capability >= ADA

    @property
    def allows(self) -> tuple[str, ...]:
        """What runs fast here, in words."""
        words = {"bf16": self.bf16, "fp8": self.fp8, "flash attention": self.flash}
        return tuple(word for word, here in words.items() if here)


def _cpu() -> Hardware:
    total, free = ram_bytes()
    return Hardware(
        device="cpu", name=cpu_name(), total_bytes=total,
        free_bytes=free, ram_bytes=total, ram_free_bytes=free, bf16=cpu_has_bf16(), read=_cpu_free,
    )  # fmt: skip


def _cpu_free() -> Free:
    free = ram_bytes()[1]
    return Free(free, (), free)


def _cuda() -> Hardware:
    import torch

    first, *others = (_cuda_card(index) for index in range(torch.cuda.device_count()))
    total, free = ram_bytes()
    return Hardware(
        device="cuda", name=first.name, total_bytes=first.total_bytes, free_bytes=first.free_bytes,
        ram_bytes=total, ram_free_bytes=free, bf16=first.bf16, capability=first.capability,
        others=tuple(others), read=partial(_cuda_free, 1 + len(others)),
    )  # fmt: skip


def _cuda_card(index: int) -> Card:
    import torch

    # AMD's cards answer as CUDA with numbers of their own; those that torch runs on all have bf16
    capability = None if torch.version.hip else torch.cuda.get_device_capability(index)
    return Card(
        device=f"cuda:{index}", name=torch.cuda.get_device_name(index),
        total_bytes=torch.cuda.mem_get_info(index)[1], free_bytes=_card_free(index), capability=capability,
        bf16=capability is None or capability >= AMPERE,
    )  # fmt: skip


def _cuda_free(count: int) -> Free:
    first, *others = (_card_free(index) for index in range(count))
    return Free(first, tuple(others), ram_bytes()[1])


def _card_free(index: int) -> int:
    """What the driver calls free, and what our allocator holds without using it."""
    import torch

    free = torch.cuda.mem_get_info(index)[0]
    return free + torch.cuda.memory_reserved(index) - torch.cuda.memory_allocated(index)


def _mps() -> Hardware:
    import torch

    free, total = _mps_free(), ram_bytes()[0]
    return Hardware(
        device="mps", name="Apple GPU", total_bytes=torch.mps.recommended_max_memory(),
        free_bytes=free.device, ram_bytes=total, ram_free_bytes=free.ram, bf16=True, fused_attention=False,
        read=_mps_free,
    )  # fmt: skip


def _mps_free() -> Free:
    """The device's memory is a part of the RAM: free is what both have left."""
    import torch

    used, ram = torch.mps.current_allocated_memory(), ram_bytes()[1]
    unused = torch.mps.driver_allocated_memory() - used  # our allocator's
    return Free(max(min(torch.mps.recommended_max_memory() - used, ram + unused), 0), (), ram)


def cpu_name(cpuinfo: Path = Path("/proc/cpuinfo")) -> str:
    """As its maker calls it, where the system tells."""
    try:
        lines = cpuinfo.read_text(errors="replace").splitlines()
    except OSError:
        lines = []
    named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(named, "") or platform.processor() or platform.machine() or "CPU"


def cpu_has_bf16(cpuinfo: Path = Path("/proc/cpuinfo")) -> bool:
    """Whether the processor has bf16 instructions; without them bf16 is emulated, slower than fp32."""
    try:
        flags = cpuinfo.read_text().lower()
    except OSError:
        return False
    return any(flag in flags.split() for flag in ("avx512_bf16", "amx_bf16", "bf16"))


def ram_bytes(
    meminfo: Path = Path("/proc/meminfo"), cgroup: Path = Path("/sys/fs/cgroup")
) -> tuple[int, int]:
    """Total and available RAM in bytes, no more than the container's limit."""
    try:
        lines = dict(line.split(":", 1) for line in meminfo.read_text().splitlines())
        total, free = (int(lines[key].split()[0]) * 1024 for key in ("MemTotal", "MemAvailable"))
    except (OSError, KeyError, ValueError):  # not Linux
        import psutil

        memory = psutil.virtual_memory()
        total, free = memory.total, memory.available
    limits = (
        _container(cgroup, "memory.max", "memory.current", ""),
        _container(cgroup / "memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_"),
    )
    for limit, used in filter(None, limits):
        total, free = min(total, limit), min(free, limit - used)
    return total, max(free, 0)


def _container(folder: Path, limit: str, usage: str, prefix: str) -> tuple[int, int] | None:
    """A control group's limit and use, by the files' names in its version; None without a limit."""
    try:
        stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
        # pages of files can be dropped, so they do not count as used
        files = sum(int(stat[f"{prefix}{kind}_file"]) for kind in ("active", "inactive"))
        return int((folder / limit).read_text()), int((folder / usage).read_text()) - files
    except (OSError, KeyError, ValueError):  # no container, or "max"
        return None


def anonymous_bytes() -> int:
    """This process's memory that no file backs: mapped weights do not count until they are copied."""
    try:
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("RssAnon:"):
                return int(line.split()[1]) * 1024
    except OSError:  # not Linux
        pass
    import psutil

    memory = psutil.Process().memory_info()
    return getattr(memory, "private", memory.rss)  # Windows alone tells the private ones


def current_bytes(device: str) -> int:
    """What this process takes on the device ("cuda", "cuda:1", …) now; on a CPU its anonymous memory."""
    if device == "cpu":
        return anonymous_bytes()
    import torch

    return torch.mps.current_allocated_memory() if device == "mps" else torch.cuda.memory_allocated(device)


class PeakMeter:
    """`with PeakMeter(device) as meter`: the highest memory seen meanwhile, in `meter.peak` (bytes).

    CUDA counts its allocations itself, of several cards `peak` is the first's; elsewhere a thread reads
    every 20 ms what `read`, or else `current_bytes`, tells.
    """

    def __init__(self, device: str, read: Callable[[], int] | None = None) -> None:
        self._device = device
        self._read = read or partial(current_bytes, device)
        self._done = threading.Event()
        self._thread: threading.Thread | None = None
        self._peak = 0

    @property
    def peak(self) -> int:
        if self._device == "cuda":
            import torch

            return torch.cuda.max_memory_allocated(0)
        self._peak = max(self._peak, self._read())
        return self._peak

    def __enter__(self) -> PeakMeter:
        if self._device == "cuda":
            import torch

            for index in range(torch.cuda.device_count()):
                torch.cuda.reset_peak_memory_stats(index)
        else:
            self._peak = self._read()
            self._thread = threading.Thread(target=self._watch, name="peak-meter", daemon=True)
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        if self._thread is not None:
            self._thread.join()

    def _watch(self) -> None:
        while not self._done.wait(0.02):
            self._peak = max(self._peak, self._read())
