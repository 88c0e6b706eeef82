"""What every source of a checkpoint's parts offers. No torch at import: the plan and the page ask sources."""

from __future__ import annotations

import importlib
import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from backend.catalog import FAMILIES
from backend.errors import CheckpointError
from backend.events import Loading
from backend.weights.files import WEIGHTS, Shapes, precision

if TYPE_CHECKING:
    from torch import Tensor

DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}

# In which precision weights are best kept for a run, the best first. Between the two that take 16 bits, what
# was trained in bfloat16 can overflow float16, so plain files come first there; the other way round they lose
# little, and are half the size.
PREFERENCE = {
    "float32": ("float32", "bfloat16", "float16"),
    "bfloat16": ("bfloat16", "float32", "float16"),
    "float16": ("float16", "bfloat16", "float32"),
}


class Amount(NamedTuple):
    """Of files, in bytes: what is on this machine, and all of it; 0 where that is not known."""

    here: int
    total: int


class Source(ABC):
    """A checkpoint's parts, by the component names of the hub layout."""

    def __init__(self, name: str, family: str) -> None:
        self.name = name
        self.family = family

    def fetch(self, components: Iterable[str], dtype: str, *, weights: bool = True) -> Iterator[Loading]:
        """Download what is missing, with progress; nothing is yielded when all is there.

        `weights=False` leaves out all but configs and tokenizers. Raises AccessError where the hub refuses.
        """
        yield from ()

    @abstractmethod
    def has(self, component: str) -> bool:
        """Whether this checkpoint offers the component; before a download, by what is published."""

    @abstractmethod
    def config(self, component: str) -> dict[str, Any]:
        """The parsed config.json of a component, or the settings file that `config_name` names."""

    @abstractmethod
    def tensors(self, component: str, dtype: str) -> Mapping[str, Tensor]:
        """The tensors by their hub-layout names, mapped into memory and not read, in the dtype they have."""

    @abstractmethod
    def shapes(self, component: str, dtype: str) -> Shapes:
        """The shapes of those tensors, from the files' headers."""

    @abstractmethod
    def tokenizer(self, component: str = "tokenizer") -> Path:
        """A folder with the tokenizer's files."""

    @abstractmethod
    def files(self, component: str, dtype: str) -> list[Path]:
        """What `component` is read from."""

    def precision(self, component: str, dtype: str) -> str:
        """The dtype that most of the component's numbers are kept in: "float16", "float8_e4m3fn", ..."""
        paths = self.files(component, dtype)
        return precision(next(path for path in paths if path.suffix in WEIGHTS))  # shards are alike

    def present(self, components: Iterable[str], dtype: str) -> bool:
        """Whether these components can be loaded without a download."""
        try:
            return all(path.is_file() for component in components for path in self.files(component, dtype))
        except CheckpointError:
            return False

    def amount(self, components: Iterable[str], dtype: str) -> Amount:
        """How much there is of the files that `fetch` is to bring; asks no hub."""
        return Amount(0, 0)  # local files are not brought

    def parameter_bytes(self, component: str, dtype: str) -> int:
        """The size of the component's weights when they run at `dtype`; loads and downloads nothing."""
        return sum(math.prod(shape) for shape in self.shapes(component, dtype).values()) * DTYPE_BYTES[dtype]

    def extras(self) -> dict[str, Any]:
        """What a checkpoint of ours says of itself in triptych.json (defaults, preview colours, examples)."""
        return {}

    def fingerprint(self, component: str, dtype: str) -> str:
        """A text that changes when what the component is made from does, its companion included."""
        companion = companion_of(component)
        paths = self.files(component, dtype)
        if companion and self.has(companion):
            paths = [*paths, *self.files(companion, dtype)]
        return "|".join(map(stamp, paths))


def keys_of(family: str) -> Any:
    """The names of a family's tensors and its published configs: the module `keys` of its room."""
    return importlib.import_module(f"{FAMILIES[family].room}.keys")


def config_name(component: str) -> str:
    """What the settings of a component are kept in."""
    if component == "feature_extractor":
        return "preprocessor_config.json"
    return "scheduler_config.json" if component.endswith("scheduler") else "config.json"


def companion_of(component: str) -> str | None:
    """What prepares a network's input: text_encoder_2 → tokenizer_2, image_encoder → feature_extractor."""
    if component == "image_encoder":
        return "feature_extractor"
    return component.replace("text_encoder", "tokenizer") if component.startswith("text_encoder") else None


def alternatives(keys: Any, component: str) -> tuple[str, ...]:
    """The component, and those that do its work: a checkpoint's full network is not to be exchanged for
    another checkpoint's small one."""
    return next((pair for pair in keys.LITE.items() if component in pair), (component,))


def stamp(path: Path) -> str:
    real = path.resolve()  # the hub's cache links to files that its revisions share
    return f"{real}:{real.stat().st_size}:{real.stat().st_mtime_ns}"


def holds_tokenizer(folder: Path) -> bool:
    parts = (folder / "vocab.json").is_file() and (folder / "merges.txt").is_file()
    return parts or any((folder / name).is_file() for name in ("tokenizer.json", "spiece.model"))


def tokenizer_files(tokenizer: str) -> str:
    """What a tokenizer's folder must hold, in words; the third is T5's, of SentencePiece."""
    return "tokenizer.json or spiece.model" if tokenizer == "tokenizer_3" else "vocab.json and merges.txt"
