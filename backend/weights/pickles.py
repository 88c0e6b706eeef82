"""What a pickled checkpoint says, read as text: nothing in it is run, and no torch is needed."""

from __future__ import annotations

import io
import pickle
import pickletools
import zipfile
import zlib
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from backend.errors import CheckpointError

MOST = 4 * 2**20  # bytes that are looked at: the tensors themselves lie behind the pickle, or beside it
PREAMBLE = 3  # pickles before the one that counts, in the format before torch 1.6
TRUSTED = ("torch", "collections", "_codecs", "numpy")  # where what weights are made of comes from
HARMLESS = ("set", "frozenset", "dict", "list", "tuple", "int", "float", "complex", "bytearray", "slice")
UNPACKING = (zipfile.BadZipFile, zlib.error, pickle.UnpicklingError)
DAMAGED = (
    ValueError,
    LookupError,
    EOFError,
    OverflowError,
    RuntimeError,
    TypeError,
    AttributeError,
    MemoryError,
)

T = TypeVar("T")


@dataclass(frozen=True)
class Pickle:
    """The texts in it, tensors' names among them, and the classes and functions that it would call."""

    texts: frozenset[str]
    calls: frozenset[str]

    @property
    def more_than_weights(self) -> list[str]:
        """What it would call that no tensor is made of."""
        return sorted(call for call in self.calls if not _harmless(call))


@dataclass(frozen=True)
class Stored:
    """A tensor that was not read."""

    shape: tuple[int, ...]


def look(path: Path) -> Pickle:
    """Read a .ckpt, .pt, .pth or .bin file. Raises CheckpointError for one that is none."""
    return _read(path, _parsed)


def skeleton(path: Path) -> Any:
    """What such a file holds, nested as it is there: plain values, `Stored` for tensors, and for all other
    objects one that only has what theirs had. Raises CheckpointError as `look` does, and for a file that
    would call what no tensor is made of."""
    sound(path)
    return _read(path, _built)


def sound(path: Path) -> Pickle:
    """As `look`, but raises CheckpointError for one that would call what no tensor is made of, too."""
    found = look(path)
    if found.more_than_weights:
        raise CheckpointError(
            f"{path} is a pickle that holds more than weights, so reading it could run somebody's code: "
            "it was not read. Take the .safetensors version of it"
        )
    return found


def _read(path: Path, parse: Callable[[io.BytesIO, int], T]) -> T:
    try:
        with path.open("rb") as file:
            start = file.read(4)
            if not start:
                raise CheckpointError(f"{path} is empty")
            return parse(*_content(path, file, zipped=start == b"PK\x03\x04"))
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror or error}") from error
    except (*DAMAGED, *UNPACKING) as error:
        raise CheckpointError(f"{path} is damaged, or no checkpoint") from error


def _content(path: Path, file: io.BufferedReader, *, zipped: bool) -> tuple[io.BytesIO, int]:
    """The pickle, and how many others come before the one with the weights."""
    if not zipped:
        file.seek(0)
        return io.BytesIO(file.read(MOST)), PREAMBLE
    with zipfile.ZipFile(path) as archive:
        names = [name for name in archive.namelist() if name.endswith("data.pkl")]
        with archive.open(names[0]) as content:
            return io.BytesIO(content.read(MOST)), 0


def _parsed(content: io.BytesIO, before: int) -> Pickle:
    texts: set[str] = set()
    calls: set[str] = set()
    for number in range(before + 1):
        last: list[str] = []
        for operation, value, _ in pickletools.genops(content):
            if operation.name in ("GLOBAL", "INST"):
                calls.add(str(value))
            elif operation.name == "STACK_GLOBAL":  # it takes the two texts that came last
                calls.add(" ".join(last[-2:]))
            elif isinstance(value, str):
                last = [*last[-1:], value]
                if number == before:
                    texts.add(value)
    return Pickle(frozenset(texts), frozenset(calls))


def _harmless(call: str) -> bool:
    module, _, name = call.partition(" ")
    if module in ("builtins", "__builtin__"):
        return name in HARMLESS
    return module.partition(".")[0] in TRUSTED


class _Thing:
    """In place of an object that is not made."""

    def __init__(self, *_: Any) -> None: ...


class _Skeleton(pickle._Unpickler):  # the one in Python: the other makes room for whatever a file asks
    """No class or function that a pickle names is ever looked up."""

    def find_class(self, module: str, name: str) -> Any:
        makes = {"_rebuild_tensor": _stored, "_rebuild_tensor_v2": _stored, "OrderedDict": OrderedDict}
        return _first if name.startswith("_rebuild_parameter") else makes.get(name, _Thing)

    def persistent_load(self, pid: Any) -> None:
        """The numbers of a tensor, which lie elsewhere in the file."""


def _stored(_storage: object, _offset: object, shape: Any, *_: object) -> Stored:
    return Stored(tuple(int(n) for n in shape))


def _first(value: object, *_: object) -> object:
    return value


def _built(content: io.BytesIO, before: int) -> Any:
    for _ in range(before):
        _Skeleton(content).load()
    return _Skeleton(content).load()
