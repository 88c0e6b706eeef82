"""The settings of a running Triptych: a field for every command-line flag, of the same name."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field
from pathlib import Path

from backend.catalog import CATALOGUE
from backend.errors import InvalidRequest
from backend.requests import DTYPES, T5

DEVICES = ("auto", "cpu", "cuda", "mps")
SWITCH = ("auto", "on", "off")
HOST = re.compile(r"[\w-]+(?:\.[\w-]+)*")
# What each of these settings can be; "auto" leaves it to the plan.
CHOICES = {
    "device": DEVICES,
    "dtype": DTYPES,
    "offload": ("auto", "none", "model", "sequential"),
    "attention": ("auto", "flash", "efficient", "cudnn", "math", "xformers"),
    "attention_slicing": SWITCH,
    "vae_slicing": SWITCH,
    "vae_tiling": SWITCH,
    "t5": T5,
    "device_map": ("auto", "single", "balanced"),
}


@dataclass(frozen=True, kw_only=True)
class Settings:
    """`vram` caps the memory budget, in GiB (on a CPU: of RAM). `home` holds outputs and history,
    `models_dir` the downloaded checkpoints and those named without a path (None: the hub's own cache).
    `public` is for strangers: the catalogue's checkpoints alone, within limits. `compile` compiles what
    networks repeat. `hosts` are further names that the page is called by, behind a proxy. `mcp` serves the
    endpoints as tools of the Model Context Protocol. `fetch` names checkpoints to download at the start: on a
    public server nothing else is.

    What saves memory, or else is the plan's to decide: `offload` keeps waiting networks in RAM ("model"), or
    their parts, too ("sequential"). `attention` is the kernel. Slicing attends to a part of the queries, or
    decodes one picture, at a time; tiling decodes parts of a picture. `t5` stands for a request's "auto".
    `device_map` spreads networks over several cards ("balanced") or not ("single").
    """

    host: str = "127.0.0.1"
    port: int = 7860
    share: bool = False
    auth: str | None = field(default=None, repr=False)  # USER:PASSWORD
    hosts: tuple[str, ...] = ()
    no_browser: bool = False
    mcp: bool = False
    fetch: tuple[str, ...] = ()
    device: str = "auto"
    dtype: str = "auto"
    vram: float | None = None
    models_dir: Path | None = None
    home: Path = Path("~/.triptych")
    offline: bool = False
    public: bool = False
    compile: bool = False
    offload: str = "auto"
    attention: str = "auto"
    attention_slicing: str = "auto"
    vae_slicing: str = "auto"
    vae_tiling: str = "auto"
    t5: str = "auto"
    device_map: str = "auto"

    def __post_init__(self) -> None:
        object.__setattr__(self, "home", Path(self.home).expanduser().absolute())
        if self.models_dir is not None:
            object.__setattr__(self, "models_dir", Path(self.models_dir).expanduser().absolute())
        for name in self.hosts:
            if not HOST.fullmatch(name):
                raise InvalidRequest(f"hosts has {name!r}; it can be names such as studio.example.org")
        known = [entry.name for entry in CATALOGUE if not entry.bundled]
        for name in self.fetch:
            if name not in known:
                raise InvalidRequest(f"fetch has {name!r}; it can be {', '.join(known)}")
        for name, allowed in CHOICES.items():
            value = getattr(self, name)
            if value not in allowed:
                raise InvalidRequest(f"{name} is {value!r}; it can be {', '.join(allowed)}")
        if not 0 <= self.port <= 65535:
            raise InvalidRequest(f"port is {self.port}; it can be 0 to 65535 (0 takes a free one)")
        if self.vram is not None and not (math.isfinite(self.vram) and self.vram > 0):
            raise InvalidRequest(f"vram is {self.vram}; it can be any positive number of GiB")
        if self.auth is not None and not all(self.auth.partition(":")):
            raise InvalidRequest("auth must be USER:PASSWORD, both non-empty")
