"""A grid: one request, and what varies in it along two sides."""

from __future__ import annotations

import re
import secrets
from dataclasses import dataclass, replace
from typing import Any

from backend import public
from backend.errors import InvalidRequest
from backend.grid.axes import MOST_VALUES, WORDS, Axis, changed, fields, too_many
from backend.requests import MAX_SEED, Request

MOST_CELLS = 100
MOST_CELLS_PUBLIC = 9

Spot = tuple[int, int]  # column and row


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One picture of a grid; `spot` is its column and row."""

    spot: Spot
    request: Request


@dataclass(frozen=True)
class Grid:
    """`x` goes along the columns, `y` along the rows. A cell is one picture, whatever `base` says of their
    number, and a random seed is drawn once for all. `titled` writes the prompt above the sheet.

    Raises InvalidRequest for what cannot be painted: too many cells, or one whose request is refused.
    """

    base: Request
    x: Axis
    y: Axis | None = None
    titled: bool = True

    def __post_init__(self) -> None:
        known = fields(self.base.family)
        for axis in self.axes:
            if axis.field not in known:
                raise InvalidRequest(f"an axis is {axis.field!r:.80}; it can be {', '.join(known)}")
            if not 1 <= len(axis.values) <= MOST_VALUES:
                raise InvalidRequest(too_many(axis.field, len(axis.values)))
        if self.y is not None and self.x.field == self.y.field != WORDS:
            raise InvalidRequest(f"x and y are both {self.x.field}; they can be two that differ")
        if self.count > MOST_CELLS:
            raise InvalidRequest(
                f"the grid has {self.columns} x {self.rows} pictures; it can have up to {MOST_CELLS}"
            )
        self._check_words()
        object.__setattr__(self, "base", replace(self.base, num_images=1, seed=self._seed()))
        self.cells()

    @property
    def axes(self) -> tuple[Axis, ...]:
        return (self.x,) if self.y is None else (self.x, self.y)

    @property
    def columns(self) -> int:
        return len(self.x.values)

    @property
    def rows(self) -> int:
        return len(self.y.values) if self.y else 1

    @property
    def count(self) -> int:
        return self.columns * self.rows

    def check_public(self) -> None:
        """Raise InvalidRequest for what a public server does not do for strangers."""
        if self.count > MOST_CELLS_PUBLIC:
            raise InvalidRequest(
                f"the grid has {self.columns} x {self.rows} pictures; on this public server it can have "
                f"up to {MOST_CELLS_PUBLIC}"
            )
        for cell in self.cells():
            public.check(cell.request)

    def cells(self) -> list[Cell]:
        """All pictures, in an order that repeats little work: what costs more to change changes less."""
        spots = [(column, row) for row in range(self.rows) for column in range(self.columns)]
        if self.y is not None and self.x.rank < self.y.rank:
            spots.sort()
        return [Cell(spot=spot, request=self.request(spot)) for spot in spots]

    def request(self, spot: Spot) -> Request:
        """The request of one cell."""
        chosen = [(axis, axis.values[index]) for axis, index in zip(self.axes, spot, strict=False)]
        request = changed(self.base, {axis.field: value for axis, value in chosen})
        swaps = {str(axis.values[0]): str(value) for axis, value in chosen if axis.field == WORDS}
        if not swaps:
            return request
        # all at once, the longest first: what one axis puts in is not the other's to replace
        found = re.compile("|".join(map(re.escape, sorted(swaps, key=len, reverse=True))))
        return replace(
            request,
            prompt=found.sub(lambda word: swaps[word[0]], request.prompt),
            negative_prompt=found.sub(lambda word: swaps[word[0]], request.negative_prompt),
        )

    def _check_words(self) -> None:
        wanted = [str(axis.values[0]) for axis in self.axes if axis.field == WORDS]
        for word in wanted:
            if not word or (word not in self.base.prompt and word not in self.base.negative_prompt):
                raise InvalidRequest(
                    f"{WORDS} begins with {word!r:.80}, which the prompt does not have; it can begin with "
                    "any words of the prompt, which the others then replace"
                )
        if len(set(wanted)) < len(wanted):
            raise InvalidRequest(
                f"{WORDS} begins with {wanted[0]!r:.80} on both sides; they can be two that differ"
            )

    def _seed(self) -> int:
        """One for all; along an axis of seeds none is needed, and the same grid is the same again."""
        seeds = [axis.values[0] for axis in self.axes if axis.field == "seed"]
        if seeds:
            return int(seeds[0])  # pyright: ignore[reportArgumentType]
        return self.base.seed if self.base.seed >= 0 else secrets.randbelow(MAX_SEED + 1)


def side(request: Any) -> tuple[int, int] | None:
    """The width and height that a request asks for, if it does."""
    return (request.width, request.height) if request.width and request.height else None


def effort(request: Any) -> float:
    """How long a picture takes, against others of its family: steps × pixels, as far as its fields tell."""
    steps = sum(getattr(request, name, None) or 0 for name in ("steps", "prior_steps", "decoder_steps"))
    width, height = side(request) or (1, 1)
    return max(steps, 1) * width * height
