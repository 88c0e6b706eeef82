"""Tensors under other names: from the original releases' files to the names of the hub layout."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

Table = Mapping[str, str | None]  # the start of a name → what stands in its place; None drops the tensor


@dataclass(frozen=True)
class Origin:
    """Where one of our tensors lies: its name in the file, and its shape here, less axes of length 1.

    `chunk` is (which, of how many): it is that share of the file's tensor along the first axis.
    """

    name: str
    shape: tuple[int, ...]
    chunk: tuple[int, int] | None = None


class Renamed(Mapping[str, "Tensor"]):
    """The tensors of `origins` out of `tensors`, each fetched when it is asked for, as a view."""

    def __init__(self, tensors: Mapping[str, Tensor], origins: Mapping[str, Origin]) -> None:
        self._tensors = tensors
        self._origins = origins

    def __getitem__(self, name: str) -> Tensor:
        origin = self._origins[name]
        tensor = self._tensors[origin.name]
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
