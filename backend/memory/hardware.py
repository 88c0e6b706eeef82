"""What the machine has: devices, free memory, the precisions that run fast on them."""

from __future__ import annotations

import os
import platform
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from backend.errors import InvalidRequest

GIB = 1024**3


@dataclass(frozen=True, kw_only=True)
class Hardware:
    """One device and the memory around it, in bytes. On a CPU the device's memory is the RAM."""

    device: str  # "cpu", "cuda" or "mps"
    name: str
    total_bytes: int
    free_bytes: int
    ram_bytes: int
    ram_free_bytes: int
    bf16: bool

    @classmethod
    def card(cls, gib: float, ram_gib: float = 32.0) -> Hardware:
        """A CUDA card of `gib` GiB, otherwise free, in a machine with `ram_gib` GiB of free RAM."""
        memory, ram = int(gib * GIB), int(ram_gib * GIB)
        return cls(
            device="cuda", name=f"a {gib:g} GiB card", total_bytes=memory, free_bytes=memory,
            ram_bytes=ram, ram_free_bytes=ram, bf16=True,
        )  # fmt: skip

    @classmethod
    def detect(cls, device: str = "auto") -> Hardware:
        """Look at this machine; `device` "auto" takes CUDA, then MPS, then the CPU.

        Raises InvalidRequest for a device that is not here.
        """
        ram, ram_free = ram_bytes()
        if device == "cpu":
            return _cpu(ram, ram_free)
        import torch

        if torch.cuda.is_available() and device in ("auto", "cuda"):
            free, total = torch.cuda.mem_get_info()
            free += torch.cuda.memory_reserved()  # what our own allocator holds is ours to use
            bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
            return cls(
                device="cuda", name=torch.cuda.get_device_name(), total_bytes=total, free_bytes=free,
                ram_bytes=ram, ram_free_bytes=ram_free, bf16=bf16,
            )  # fmt: skip
        if torch.backends.mps.is_available() and device in ("auto", "mps"):
            total = torch.mps.recommended_max_memory()
            free = min(total - torch.mps.driver_allocated_memory(), ram_free)
            return cls(
                device="mps", name="Apple GPU", total_bytes=total, free_bytes=free,
                ram_bytes=ram, ram_free_bytes=ram_free, bf16=True,
            )  # fmt: skip
        if device != "auto":
            raise InvalidRequest(f"device is {device!r}, which this machine lacks; it can be auto or cpu")
        return _cpu(ram, ram_free)


def _cpu(ram: int, ram_free: int) -> Hardware:
    return Hardware(
        device="cpu", name=platform.processor() or platform.machine() or "CPU", total_bytes=ram,
        free_bytes=ram_free, ram_bytes=ram, ram_free_bytes=ram_free, bf16=cpu_has_bf16(),
    )  # fmt: skip


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
        total = (
            os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else 8 * GIB
        )
        free = total // 2
    try:
        limit = int((cgroup / "memory.max").read_text())
        stat = dict(line.split() for line in (cgroup / "memory.stat").read_text().splitlines())
        # pages of files can be dropped, so they do not count as used
        used = (
            int((cgroup / "memory.current").read_text())
            - int(stat["inactive_file"])
            - int(stat["active_file"])
        )
    except (OSError, KeyError, ValueError):  # no container, or "max"
        return total, free
    return min(total, limit), max(min(free, limit - used), 0)


def anonymous_bytes() -> int:
    """This process's memory that no file backs: mapped weights do not count until they are copied."""
    try:
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("RssAnon:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    if sys.platform == "win32":
        return 0
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


class PeakMeter:
    """`with PeakMeter(device) as meter`: the highest memory seen meanwhile, in `meter.peak` (bytes).

    CUDA counts its allocations itself; on a CPU a thread reads the anonymous memory every 20 ms.
    """

    def __init__(self, device: str, read: Callable[[], int] = anonymous_bytes) -> None:
        self._device = device
        self._read = read
        self._done = threading.Event()
        self._thread: threading.Thread | None = None
        self._peak = 0

    @property
    def peak(self) -> int:
        if self._device == "cuda":
            import torch

            return torch.cuda.max_memory_allocated()
        self._peak = max(self._peak, self._read())
        return self._peak

    def __enter__(self) -> PeakMeter:
        if self._device == "cuda":
            import torch

            torch.cuda.reset_peak_memory_stats()
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
