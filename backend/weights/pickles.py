"""What a pickled checkpoint says, read as text: nothing in it is run, and no torch is needed."""

from __future__ import annotations

import io
import pickletools
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path

from backend.errors import CheckpointError

MOST = 4 * 2**20  # bytes that are looked at: the tensors themselves lie behind the pickle, or beside it
PREAMBLE = 3  # pickles before the one that counts, in the format before torch 1.6
TRUSTED = ("torch", "collections", "_codecs", "numpy")  # where what weights are made of comes from
HARMLESS = ("set", "frozenset", "dict", "list", "tuple", "int", "float", "complex", "bytearray", "slice")
UNPACKING = (zipfile.BadZipFile, zlib.error)


@dataclass(frozen=True)
class Pickle:
    """The texts in it, tensors' names among them, and the classes and functions that it would call."""

    texts: frozenset[str]
    calls: frozenset[str]

    @property
    def more_than_weights(self) -> list[str]:
        """What it would call that no tensor is made of."""
        return sorted(call for call in self.calls if not _harmless(call))


def look(path: Path) -> Pickle:
    """Read a .ckpt, .pt, .pth or .bin file. Raises CheckpointError for one that is none."""
    try:
        with path.open("rb") as file:
            start = file.read(4)
            if not start:
                raise CheckpointError(f"{path} is empty")
            return _parsed(*_content(path, file, zipped=start == b"PK\x03\x04"))
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror or error}") from error
    except (ValueError, LookupError, EOFError, OverflowError, RuntimeError, *UNPACKING) as error:
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
