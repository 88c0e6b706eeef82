"""The settings of a running Triptych: a field for every command-line flag, of the same name."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path

from backend.errors import InvalidRequest
from backend.requests import DTYPES

DEVICES = ("auto", "cpu", "cuda", "mps")


@dataclass(frozen=True, kw_only=True)
class Settings:
    """`vram` caps the memory budget, in GiB (on a CPU: of RAM). `home` holds outputs and history,
    `models_dir` the downloaded checkpoints and those named without a path (None: the hub's own cache).
    `public` serves the catalogue's checkpoints alone. `compile` compiles what networks repeat."""

    host: str = "127.0.0.1"
    port: int = 7860
    share: bool = False
    auth: str | None = field(default=None, repr=False)  # USER:PASSWORD
    device: str = "auto"
    dtype: str = "auto"
    vram: float | None = None
    models_dir: Path | None = None
    home: Path = Path("~/.triptych")
    offline: bool = False
    public: bool = False
    compile: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "home", Path(self.home).expanduser().absolute())
        if self.models_dir is not None:
            object.__setattr__(self, "models_dir", Path(self.models_dir).expanduser().absolute())
        if self.device not in DEVICES:
            raise InvalidRequest(f"device is {self.device!r}; it can be {', '.join(DEVICES)}")
        if self.dtype not in DTYPES:
            raise InvalidRequest(f"dtype is {self.dtype!r}; it can be {', '.join(DTYPES)}")
        if not 0 <= self.port <= 65535:
            raise InvalidRequest(f"port is {self.port}; it can be 0 to 65535 (0 takes a free one)")
        if self.vram is not None and not (math.isfinite(self.vram) and self.vram > 0):
            raise InvalidRequest(f"vram is {self.vram}; it can be any positive number of GiB")
        if self.auth is not None and not all(self.auth.partition(":")):
            raise InvalidRequest("auth must be USER:PASSWORD, both non-empty")
