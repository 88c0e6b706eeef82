"""The sheet of a grid: its pictures side by side, what varies written along the edges."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

from backend import catalog
from backend.grid.axes import label
from backend.grid.cells import Grid, Spot, side
from backend.grid.lettering import font_for, reads_leftward, wrapped, written

if TYPE_CHECKING:
    from PIL.Image import Image
    from PIL.ImageFont import FreeTypeFont

MOST_SIDE = 8192  # pixels
MOST_PIXELS = 64_000_000  # as many as a picture that is dropped in again may have
PREVIEW_SIDE = 720

PAPER, EMPTY, INK, QUIET, PROBLEM = "#f7f6f3", "#e9e6e0", "#1c1b1a", "#6d6962", "#93341d"
LEAST_LETTER = 13  # pixels high, below which words cannot be read
LEAST_SLOT = 88  # pixels wide, so that a label has room
LINES = 3  # of a label, at most
LEADING = 1.3  # from line to line, in letters
UNKNOWN = (512, 512)  # a size until the first picture tells

Sizes = Mapping[Spot, tuple[int, int]]


@dataclass(frozen=True)
class Line:
    """A line of text: `x` is its left end, its middle ("m") or its right end ("r"), `y` its top."""

    x: float
    y: float
    anchor: str
    text: str
    font: FreeTypeFont
    colour: str = INK


@dataclass(frozen=True)
class Box:
    x: int
    y: int
    width: int
    height: int


@dataclass(frozen=True)
class Writing:
    """Text in lines of a certain size; `height` pixels in all."""

    lines: Sequence[str]
    font: FreeTypeFont
    step: int

    @property
    def height(self) -> int:
        return self.step * len(self.lines)

    @property
    def width(self) -> float:
        return max(map(self.font.getlength, self.lines), default=0.0)

    def at(self, x: float, y: float, anchor: str = "l", colour: str = INK) -> Iterable[Line]:
        for index, text in enumerate(self.lines):
            yield Line(x, y + index * self.step, anchor, text, self.font, colour)


@dataclass(frozen=True)
class Layout:
    """Where everything goes on a sheet whose pictures are `scale` times their size, or smaller."""

    grid: Grid
    sizes: Sizes
    scale: float
    least: int = LEAST_LETTER

    @cached_property
    def em(self) -> int:
        """The size of the letters: to be read on a whole sheet, and several a column."""
        most = max(sum(self.widths), sum(self.heights))
        return max(round(min(most / 68, min(self.widths) / 8, min(self.heights) / 2)), self.least)

    @cached_property
    def widths(self) -> list[int]:
        least = LEAST_SLOT * self.least // LEAST_LETTER
        widths = [max(self._scaled(w) for (c, _), (w, _) in self.sizes.items() if c == column)
                  for column in range(self.grid.columns)]  # fmt: skip
        return [max(width, least) for width in widths]

    @cached_property
    def heights(self) -> list[int]:
        return [max(self._scaled(h) for (_, r), (_, h) in self.sizes.items() if r == row)
                for row in range(self.grid.rows)]  # fmt: skip

    @property
    def margin(self) -> int:
        return round(self.em * 1.6)

    @property
    def gap(self) -> int:
        return max(round(self.em / 3), 2)

    @cached_property
    def columns(self) -> list[Writing]:
        """The labels above the columns."""
        return [_writing(text, self.em, width - self.gap, LINES)
                for text, width in zip(self.grid.x.labels, self.widths, strict=True)]  # fmt: skip

    @cached_property
    def rows(self) -> list[Writing]:
        """The labels before the rows, none where there is but one."""
        if self.grid.y is None:
            return []
        width = self.em * 11
        return [_writing(text, self.em, width, max(min(LINES + 1, height // round(self.em * LEADING)), 1))
                for text, height in zip(self.grid.y.labels, self.heights, strict=True)]  # fmt: skip

    @cached_property
    def names(self) -> tuple[Writing, Writing | None]:
        """What varies along either side."""
        x, y = self.grid.x, self.grid.y
        small = max(round(self.em * 0.85), self.least)
        return _writing(x.title, small, sum(self.widths), 1), _writing(
            y.title, small, self.em * 11, 2
        ) if y else None

    @cached_property
    def left(self) -> int:
        """Where the pictures begin."""
        name = self.names[1]
        labels = [*self.rows, *([name] if name else [])]
        width = max((each.width for each in labels), default=0)
        return self.margin + (math.ceil(width) + self.em if labels else 0)

    @cached_property
    def right(self) -> int:
        return self.left + sum(self.widths) + self.gap * (self.grid.columns - 1)

    @cached_property
    def heading(self) -> list[tuple[Writing, str]]:
        """The prompt, and what else all pictures have in common."""
        if not self.grid.titled:
            return []
        width = self.right - self.margin
        prompt = _writing(self.grid.base.prompt, round(self.em * 1.25), width, 2)
        facts = _writing(common(self.grid), max(round(self.em * 0.85), self.least), width, 2)
        return [(prompt, INK), (facts, QUIET)]

    @cached_property
    def top(self) -> int:
        """Where the pictures begin."""
        labels = max(each.height for each in self.columns)
        return self._names_top + self.names[0].height + labels + round(self.em * 0.75)

    @property
    def _names_top(self) -> int:
        title = sum(writing.height + self._apart for writing, _ in self.heading)
        return self.margin + (title + self.em if title else 0)

    @property
    def _apart(self) -> int:
        """Between one text and the next."""
        return round(self.em / 4)

    @cached_property
    def size(self) -> tuple[int, int]:
        height = self.top + sum(self.heights) + self.gap * (self.grid.rows - 1) + self.margin
        return self.right + self.margin, height

    def slot(self, spot: Spot) -> Box:
        """The room of a cell."""
        column, row = spot
        x = self.left + sum(self.widths[:column]) + self.gap * column
        y = self.top + sum(self.heights[:row]) + self.gap * row
        return Box(x, y, self.widths[column], self.heights[row])

    def place(self, spot: Spot) -> Box:
        """Where a picture goes: scaled as all are, in the middle of its room."""
        slot, size = self.slot(spot), self.sizes[spot]
        scale = min(self.scale, slot.width / size[0], slot.height / size[1])
        width, height = (max(round(each * scale), 1) for each in size)
        return Box(slot.x + (slot.width - width) // 2, slot.y + (slot.height - height) // 2, width, height)

    def lines(self) -> Iterable[Line]:
        y = self.margin
        for writing, colour in self.heading:
            leftward = reads_leftward(" ".join(writing.lines))
            x = self.right if leftward else self.margin
            yield from writing.at(x, y, "r" if leftward else "l", colour)
            y += writing.height + self._apart
        across, down = self.names
        yield from across.at(self.left, self._names_top, colour=QUIET)
        bottom = self.top - round(self.em * 0.5)
        for column, writing in enumerate(self.columns):
            slot = self.slot((column, 0))
            yield from writing.at(slot.x + slot.width / 2, bottom - writing.height, "m")
        if down is not None:
            yield from down.at(self.left - self.em, bottom - down.height, "r", QUIET)
        for row, writing in enumerate(self.rows):
            slot = self.slot((0, row))
            yield from writing.at(self.left - self.em, slot.y + (slot.height - writing.height) / 2, "r")

    def _scaled(self, pixels: int) -> int:
        return max(round(pixels * self.scale), 1)


def arranged(grid: Grid, sizes: Sizes) -> Layout:
    """The layout with the largest pictures, up to their own size, that stays within the limits."""
    scale = 1.0
    while True:
        layout = Layout(grid, sizes, scale)
        width, height = layout.size
        excess = max(width / MOST_SIDE, height / MOST_SIDE, math.sqrt(width * height / MOST_PIXELS))
        if excess <= 1:
            return layout
        scale *= min(0.995 / excess, 0.995)


def in_small(layout: Layout) -> Layout:
    """The same for a preview, where words need not be read."""
    share = min(PREVIEW_SIDE / max(layout.size), 1.0)
    least = max(round(layout.least * share), 5)
    return Layout(layout.grid, layout.sizes, layout.scale * share, least)


class Sheet:
    """A sheet that is being filled."""

    def __init__(self, layout: Layout) -> None:
        from PIL import Image

        self.layout = layout
        self.image = Image.new("RGB", layout.size, PAPER)
        self._write(layout.lines())
        for spot in layout.sizes:
            self._fill(layout.place(spot), EMPTY)

    def put(self, spot: Spot, picture: Image) -> None:
        """A picture at its place; one of another size is scaled to it."""
        self._fill(self.layout.slot(spot), PAPER)
        _paste(self.image, picture, self.layout.place(spot))

    def fail(self, spot: Spot, reason: str) -> None:
        """An empty cell, and why it is."""
        slot, em = self.layout.slot(spot), max(round(self.layout.em * 0.85), self.layout.least)
        self._fill(slot, EMPTY)
        most = max((slot.height - em) // round(em * LEADING), 1)
        text = _writing(reason, em, slot.width - em, most)
        y = slot.y + (slot.height - text.height) / 2
        self._write(text.at(slot.x + slot.width / 2, y, "m", PROBLEM))

    def with_live(self, spot: Spot, picture: Image) -> Image:
        """The sheet as it is, and in one cell what is being painted there."""
        image = self.image.copy()
        _paste(image, picture, self.layout.place(spot))
        return image

    def _write(self, lines: Iterable[Line]) -> None:
        from PIL import ImageDraw

        pen = ImageDraw.Draw(self.image)
        for line in lines:
            pen.text((line.x, line.y), line.text, line.colour, line.font, anchor=f"{line.anchor}a")

    def _fill(self, box: Box, colour: str) -> None:
        self.image.paste(colour, (box.x, box.y, box.x + box.width, box.y + box.height))


def sizes_of(grid: Grid, known: Sizes) -> Sizes:
    """The size of every cell: its picture's, or what its request asks for, or that of another picture."""
    other = next(iter(known.values()), UNKNOWN)
    return {cell.spot: known.get(cell.spot) or side(cell.request) or other for cell in grid.cells()}


def common(grid: Grid) -> str:
    """What all pictures of a grid have in common, in a line."""
    varied = {axis.field for axis in grid.axes}
    base = grid.base
    told = {
        "checkpoint": label("checkpoint", base.checkpoint),
        "steps": _counted(base, "steps", "{} steps"),
        "prior_steps": _counted(base, "prior_steps", "{} steps of composition"),
        "decoder_steps": _counted(base, "decoder_steps", "{} of detail"),
        "guidance_scale": _counted(base, "guidance_scale", "guidance {:g}"),
        "prior_guidance_scale": _counted(base, "prior_guidance_scale", "guidance {:g}"),
        "sampler": label("sampler", getattr(base, "sampler", None) or ""),
        "seed": f"seed {base.seed}",
    }
    facts = [text for name, text in told.items() if text and name not in varied]
    return " · ".join([catalog.FAMILIES[base.family].title, *(each for each in facts if each != "(none)")])


def _counted(base: object, name: str, text: str) -> str:
    value = getattr(base, name, None)
    return "" if value is None else text.format(value)


def _writing(text: str, em: int, width: float, most: int) -> Writing:
    font = font_for(text, em)
    return Writing(wrapped(written(text, font), font, width, most), font, round(em * LEADING))


def _paste(image: Image, picture: Image, place: Box) -> None:
    from PIL.Image import Resampling

    size = (place.width, place.height)
    picture = picture.convert("RGB")
    scaled = picture if picture.size == size else picture.resize(size, Resampling.LANCZOS)
    image.paste(scaled, (place.x, place.y))
