"""Flax's weight files: nested maps of arrays, as flax.serialization writes them, in msgpack (msgpack.org).

The keys of the maps are the parts of a name. An array is an extension of msgpack's, which holds a list of
its shape, the name of its dtype, and its numbers in C order. One beyond 1 GiB is a map of its shape and its
chunks. The numbers begin wherever the bytes before them end, which is seldom a multiple of their size.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from mmap import ACCESS_COPY, mmap
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from backend.errors import CheckpointError

if TYPE_CHECKING:
    from torch import Tensor

SUFFIX = ".msgpack"
ARRAYS = (1, 3)  # types of the extension: an array, or a number that is one without sides
CHUNKED = "__msgpack_chunked_array__"  # a key of the maps that stand for an array
DEEPEST = 32  # maps in maps; those of a UNet have 6
MOST = 20_000  # entries of all maps; those of a UNet have 1,100
LONGEST = 255  # bytes of a key
SIDES = 8  # of an array

SIZES = {  # bytes of a number, by the names that numpy and torch have in common
    "float64": 8, "float32": 4, "float16": 2, "bfloat16": 2,
    "int64": 8, "int32": 4, "int16": 2, "int8": 1, "uint8": 1, "bool": 1,
}  # fmt: skip

# What the first byte of a value says. Of the small ones, kind and size; the rest of the byte is the size.
SMALL = (("number", 0x00, 0x80), ("map", 0x80, 0x90), ("list", 0x90, 0xA0), ("text", 0xA0, 0xC0))
SIZED = {  # kind, and how many bytes hold its size; a number is what they hold
    0xC4: ("bytes", 1), 0xC5: ("bytes", 2), 0xC6: ("bytes", 4),
    0xC7: ("extension", 1), 0xC8: ("extension", 2), 0xC9: ("extension", 4),
    0xCC: ("number", 1), 0xCD: ("number", 2), 0xCE: ("number", 4), 0xCF: ("number", 8),
    0xD9: ("text", 1), 0xDA: ("text", 2), 0xDB: ("text", 4),
    0xDC: ("list", 2), 0xDD: ("list", 4), 0xDE: ("map", 2), 0xDF: ("map", 4),
}  # fmt: skip
FIXED = {  # kind and size; "other" are nothing, truth, and numbers below 0 or with a fraction
    0xC0: ("other", 0), 0xC2: ("other", 0), 0xC3: ("other", 0), 0xCA: ("other", 4), 0xCB: ("other", 8),
    0xD0: ("other", 1), 0xD1: ("other", 2), 0xD2: ("other", 4), 0xD3: ("other", 8),
    **{0xD4 + power: ("extension", 2**power) for power in range(5)},
    **dict.fromkeys(range(0xE0, 0x100), ("other", 0)),
}  # fmt: skip


class Array(NamedTuple):
    """An array in a file: `chunks` are first byte and number of bytes, of one place or several."""

    shape: tuple[int, ...]
    dtype: str
    chunks: tuple[tuple[int, int], ...]


def begins(start: bytes) -> bool:
    """Whether a file may be one of Flax's: it begins with a map that is not empty."""
    return start[:1] in (b"\xde", b"\xdf") or b"\x80" < start[:1] < b"\x90"


def index(path: Path) -> dict[str, Array]:
    """The arrays in a file by name, its parts joined by dots; the numbers are passed over, and not read.

    Raises CheckpointError for a file that is truncated, damaged, or holds what is no part of weights.
    """
    with _mapped(path) as data:
        return _Walk(path, data).arrays()


class Arrays(Mapping[str, "Tensor"]):
    """The arrays of Flax's files as one mapping of tensors.

    A tensor is a view of the mapped file: asking for it reads and copies nothing, unless it is in chunks. It
    is not to be written to, and what computes takes a copy, as its numbers may lie at odd addresses.
    """

    def __init__(self, paths: Iterable[Path]) -> None:
        self._places: dict[str, tuple[mmap, Array]] = {}
        for path in paths:
            data = _mapped(path)
            for name, array in _Walk(path, data).arrays().items():
                if name in self._places:
                    raise CheckpointError(
                        f"{path} repeats the tensor {name} of another part of the checkpoint"
                    )
                self._places[name] = data, array

    def __getitem__(self, name: str) -> Tensor:
        import torch

        data, array = self._places[name]
        dtype = getattr(torch, array.dtype)
        parts = [
            torch.frombuffer(data, dtype=dtype, count=size // dtype.itemsize, offset=start)
            for start, size in array.chunks
            if size
        ]
        if len(parts) == 1:
            return parts[0].reshape(array.shape)
        return (torch.cat(parts) if parts else torch.empty(0, dtype=dtype)).reshape(array.shape)

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)

    def __contains__(self, name: object) -> bool:
        return name in self._places  # the mixin's would fetch the tensor


def _mapped(path: Path) -> mmap:
    """Private to this process, so that torch takes it for writable; nobody writes to it."""
    try:
        with path.open("rb") as file:
            return mmap(file.fileno(), 0, access=ACCESS_COPY)
    except ValueError as error:  # there is nothing to map
        raise CheckpointError(f"{path} is empty") from error
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror or error}") from error


class _Walk:
    """From value to value through a file. What it says of itself is believed as far as the file goes."""

    def __init__(self, path: Path, data: mmap) -> None:
        self.path, self.data = path, data
        self.at, self.end = 0, len(data)
        self.left = MOST

    def arrays(self) -> dict[str, Array]:
        tree = self._value("", 0)
        if self.at != self.end:
            raise self._unsound(f"its last array ends at byte {self.at} of {self.end}")
        return self._flat(tree, "") if isinstance(tree, dict) else {}

    def _flat(self, tree: Mapping[str, Any], start: str) -> dict[str, Array]:
        """The arrays of a tree by name."""
        found: dict[str, Array] = {}
        for key, value in tree.items():
            name = f"{start}{key}"
            if isinstance(value, dict) and CHUNKED in value:
                value = self._joined(name, value)
            inner = self._flat(value, f"{name}.") if isinstance(value, dict) else {name: value}
            if twice := found.keys() & inner.keys():
                raise self._unsound(f"it holds {min(twice)} twice")
            found |= {name: each for name, each in inner.items() if isinstance(each, Array)}
        return found

    def _joined(self, name: str, value: Mapping[str, Any]) -> Array:
        """The array that a map of chunks stands for."""
        sides, parts = value.get("shape"), value.get("chunks")
        shape = self._in_order(sides if isinstance(sides, dict) else {}, int)
        chunks = self._in_order(parts if isinstance(parts, dict) else {}, Array)
        dtypes = {chunk.dtype for chunk in chunks}
        places = tuple(place for chunk in chunks for place in chunk.chunks)
        array = Array(shape, min(dtypes, default=""), places)
        if len(dtypes) != 1 or not self._fits(array):
            raise self._unsound(f"the numbers of {name} do not fit its shape")
        return array

    def _in_order(self, value: Mapping[str, Any], kind: type) -> tuple[Any, ...]:
        """What Flax makes of a tuple: a map with its places as keys."""
        return tuple(each for place in range(len(value)) if isinstance(each := value.get(str(place)), kind))

    def _value(self, name: str, depth: int) -> Any:
        """The value at `at`, which moves behind it: a map, an array, a number; None for anything else."""
        start = self.at
        kind, size = self._head()
        match kind:
            case "map":
                return self._entries(name, size, depth)
            case "extension":
                return self._array(name, size, start)
            case "number":
                return size
            case "list":
                raise self._foreign(start)
            case _:
                self._pass(size)
                return None

    def _entries(self, name: str, count: int, depth: int) -> dict[str, Any]:
        self.left -= count
        if self.left < 0:
            raise self._unsound(f"it holds more than {MOST} values")
        if depth == DEEPEST:
            raise self._unsound(f"its maps are nested deeper than {DEEPEST}")
        out: dict[str, Any] = {}
        for _ in range(count):
            start = self.at
            kind, size = self._head()
            if kind != "text" or size > LONGEST:
                raise self._foreign(start)
            key = self._text(size)
            inner = f"{name}.{key}" if name else key
            if key in out:
                raise self._unsound(f"it holds {inner} twice")
            out[key] = self._value(inner, depth + 1)
        return out

    def _array(self, name: str, size: int, start: int) -> Array:
        if self._number(1) not in ARRAYS:
            raise self._foreign(start)
        behind = self._pass(size) + size
        self.at, self.end = behind - size, behind  # what is in it ends with it
        if self._head_of(start, "list") != 3:
            raise self._foreign(start)
        count = self._head_of(start, "list")
        if count > SIDES:
            raise self._foreign(start)
        sides = [self._head_of(start, "number") for _ in range(count)]
        dtype = self._text(self._head_of(start, "text", "bytes"))
        numbers = self._head_of(start, "bytes", "text")
        first = self._pass(numbers)
        if dtype not in SIZES:
            raise self._unsound(f"{name} is of {dtype}, which cannot be read")
        array = Array(tuple(sides), dtype, ((first, numbers),))
        if self.at != behind or not self._fits(array):
            raise self._unsound(f"the numbers of {name} do not fit its shape")
        self.end = len(self.data)
        return array

    def _fits(self, array: Array) -> bool:
        """Whether it has as many numbers as its shape says; without any, no side is beyond reason."""
        size = sum(size for _, size in array.chunks)
        sides = max(array.shape, default=0) <= len(self.data)
        return sides and math.prod(array.shape) * SIZES[array.dtype] == size

    def _head(self) -> tuple[str, int]:
        """Kind and size of the value at `at`, which moves behind them; of a number, itself."""
        start = self.at
        first = self._number(1)
        for kind, low, high in SMALL:
            if low <= first < high:
                return kind, first - low
        if first in SIZED:
            kind, width = SIZED[first]
            return kind, self._number(width)
        if first not in FIXED:
            raise self._foreign(start)
        return FIXED[first]

    def _head_of(self, start: int, *kinds: str) -> int:
        """The size of the value at `at`, in the array at `start`, which is to be of one of these kinds."""
        kind, size = self._head()
        if kind not in kinds:
            raise self._foreign(start)
        return size

    def _number(self, width: int) -> int:
        start = self._pass(width)
        return int.from_bytes(self.data[start : start + width], "big")

    def _text(self, size: int) -> str:
        start = self._pass(size)
        try:
            return self.data[start : start + min(size, LONGEST)].decode()
        except UnicodeDecodeError as error:
            raise self._foreign(start) from error

    def _pass(self, size: int) -> int:
        """Pass over so many bytes → where they begin."""
        start, self.at = self.at, self.at + size
        if self.at > len(self.data):
            raise CheckpointError(
                f"{self.path} is truncated: at least {self.at} bytes are due, and {len(self.data)} are "
                "there; download it again"
            )
        if self.at > self.end:
            raise self._foreign(start)
        return start

    def _foreign(self, start: int) -> CheckpointError:
        return self._unsound(f"at byte {start} begins what is no part of weights")

    def _unsound(self, problem: str) -> CheckpointError:
        return CheckpointError(f"{self.path} is not a valid Flax file: {problem}")
