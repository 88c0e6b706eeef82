"""Tensors under other names: from the original releases' files to the names of the hub layout."""

from __future__ import annotations

import re
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from backend.errors import CheckpointError

if TYPE_CHECKING:
    from torch import Tensor

Table = Mapping[str, str | None]  # the start of a name → what stands in its place; None drops the tensor


@dataclass(frozen=True)
class Origin:
    """Where one of our tensors lies: its name in the file, and its shape here, less axes of length 1.

    `chunk` is (which, of how many): it is that share of the file's tensor along the first axis. `swapped`:
    the halves of the first axis lie in the other order there. `axes`: which of the file's axes each of ours
    is, where they lie in another order. Without a name it is in no file, and stands for the identity matrix.
    """

    name: str | None
    shape: tuple[int, ...]
    chunk: tuple[int, int] | None = None
    swapped: bool = False
    axes: tuple[int, ...] | None = None


class Place(NamedTuple):
    """Where a layer of a file belongs: the path of one of ours, which takes the share `chunk` of its rows, or
    whose halves are `swapped`; as in `Origin`."""

    path: str
    chunk: tuple[int, int] | None = None
    swapped: bool = False


class Renamed(Mapping[str, "Tensor"]):
    """The tensors of `origins` out of `tensors`, each fetched when asked for, as a view where it can be."""

    def __init__(self, tensors: Mapping[str, Tensor], origins: Mapping[str, Origin]) -> None:
        self._tensors = tensors
        self._origins = origins

    def __getitem__(self, name: str) -> Tensor:
        origin = self._origins[name]
        if origin.name is None:
            return _identity(origin.shape)
        tensor = self._tensors[origin.name]
        if origin.axes is not None:
            tensor = tensor.permute(origin.axes)
        if origin.swapped:
            tensor = tensor.roll(len(tensor) // 2, 0)
        if origin.chunk is not None:
            index, count = origin.chunk
            tensor = tensor.chunk(count)[index]
        return tensor.reshape(origin.shape)

    def __iter__(self) -> Iterator[str]:
        return iter(self._origins)

    def __len__(self) -> int:
        return len(self._origins)

    def __contains__(self, name: object) -> bool:
        return name in self._origins  # the mixin's would fetch the tensor


def place(name: str, table: Table) -> str | None:
    """`name` with its start replaced by the longest row of `table` that fits; None where that row drops it.

    Raises KeyError where no row fits.
    """
    start = max((row for row in table if name.startswith(row)), key=len, default=None)
    if start is None:
        raise KeyError(name)
    end = table[start]
    return None if end is None else end + name.removeprefix(start)


def inside(name: str, table: Mapping[str, str]) -> str:
    """`name` with every part of it that is in `table` replaced, row by row."""
    for part, replacement in table.items():
        name = name.replace(part, replacement)
    return name


def shares(name: str, shape: tuple[int, ...], ours: Sequence[str]) -> dict[str, Origin]:
    """Several tensors of ours that lie on top of each other in the file's tensor `name`.

    Raises CheckpointError where its rows cannot be as many of a kind.
    """
    count = len(ours)
    if shape[0] % count:
        raise CheckpointError(f"{name} has {shape[0]} rows, which are not {count} of a kind")
    share = (shape[0] // count, *shape[1:])
    return {each: Origin(name, share, chunk=(index, count)) for index, each in enumerate(ours)}


def numbers(pattern: str, names: Iterable[str]) -> set[str]:
    """The different numbers that `pattern` captures at the start of the names."""
    return {match[1] for name in names if (match := re.match(pattern, name))}


def inverted(origins: Mapping[str, Origin], paths: Container[str]) -> dict[str, list[Place]]:
    """From `origins` of weights, the names of their layers in the file → the layers of ours, of those in
    `paths`, that they are."""
    found: dict[str, list[Place]] = {}
    for name, origin in origins.items():
        path = name.removesuffix(".weight")
        if path in paths and origin.name is not None:
            place = Place(path, origin.chunk, origin.swapped)
            found.setdefault(origin.name.removesuffix(".weight"), []).append(place)
    return found


def _identity(shape: tuple[int, ...]) -> Tensor:
    import torch

    return torch.eye(*shape)
