"""What the figures were measured on, and the state of its file cache."""

from __future__ import annotations

import os
import platform
import subprocess
from importlib.metadata import version
from pathlib import Path
from typing import Any

from backend.memory.hardware import GIB, Hardware
from backend.version import VERSION

PACKAGES = ("torch", "transformers", "diffusers", "safetensors", "gradio")


def describe(device: str) -> dict[str, Any]:
    """The machine and the software, as they go into the results."""
    hardware = Hardware.detect(device)
    return {
        "processor": _processor(),
        "cores": os.cpu_count(),
        "device": hardware.device,
        "accelerator": None if hardware.device == "cpu" else hardware.name,
        "memory_gib": round(hardware.total_bytes / GIB, 1),
        "ram_gib": round(hardware.ram_bytes / GIB, 1),
        "bf16": hardware.bf16,
        "system": platform.platform(),
        "python": platform.python_version(),
        "packages": {name: version(name) for name in PACKAGES},
        "triptych": VERSION,
        "commit": _commit(),
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def _commit() -> str | None:
    command = ["git", "describe", "--always", "--dirty"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=Path(__file__).parent)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()


def cool(folder: Path) -> None:
    """Take the folder's files out of the file cache, so that the next read comes from the disk."""
    for path in _files(folder):
        with path.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def warm(folder: Path) -> None:
    """Read the folder's files once, so that the next read comes from memory."""
    for path in _files(folder):
        with path.open("rb", buffering=0) as file:
            while file.read(1 << 24):
                pass


def _files(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file()]
