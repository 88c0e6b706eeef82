"""Painting a grid: cell by cell through the studio, each a picture of its own; then the sheet of them all."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

from backend import infotext
from backend.errors import Cancelled, StorageError, TriptychError
from backend.events import Event, Finished, GridProgress, Notice, Planned, Result, Step
from backend.grid.cells import Cell, Grid, Spot, effort
from backend.grid.kept import Book, opened
from backend.grid.sheet import PREVIEW_SIDE, Sheet, arranged, in_small, sizes_of
from backend.requests import Request

if TYPE_CHECKING:
    from PIL.Image import Image

    from backend.memory.plan import Plan
    from backend.studio import Studio

PREVIEW_SECONDS = 0.7  # between previews of the sheet
OWN = ("sampler", "shift", "width", "height")  # like steps and guidance: a checkpoint has its own values
RAN = ("t5", "stage_c", "stage_b")

Generate = Callable[[Request, threading.Event, str], Iterator[Event]]


def paint(
    studio: Studio,
    grid: Grid,
    stop: threading.Event | None = None,
    owner: str = "",
    generate: Generate | None = None,
) -> Iterator[Event]:
    """Yield each cell's events but for its Finished, GridProgress between them, and Finished with the sheet.

    What a step previews is shown within a GridProgress, in its place on the sheet. Cells that were finished
    before, by a grid that was stopped or killed, are taken from disk. One that fails stays empty, with the
    reason in it. `generate` stands in for the studio's own.

    Raises InvalidRequest, StorageError or Cancelled; where no cell could be painted, what the last raised.
    """
    stop, generate = stop or threading.Event(), generate or studio.generate
    if studio.settings.public:
        grid.check_public()
    begin = time.perf_counter()
    book = Book(studio.settings.home, grid, owner)
    run = _Run(grid, grid.cells())
    for cell in run.cells:
        if made := book.made(cell.spot):
            run.take(cell.spot, *made)
        _check(stop)
    yield run.progress()
    for cell in run.left:
        _check(stop)
        yield from _paint(cell, run, book, generate(cell.request, stop, owner))
        yield run.progress()
    if not run.files:
        raise next(reversed(run.failed.values()))
    image = _sheet(run, stop)
    timings = {**run.timings, "total": round(time.perf_counter() - begin, 3)}
    result = _result(studio, run, image, timings, owner)
    if not run.failed:
        book.close()
    yield Finished(result=result)


def _paint(cell: Cell, run: _Run, book: Book, events: Iterator[Event]) -> Iterator[Event]:
    try:
        for event in events:
            match event:
                case Finished(result=result):
                    run.took(cell, result)
                    book.note(cell.spot, result.files[0])
                case Step():
                    yield from run.live(cell.spot, event)
                case Notice(text=text):
                    if text not in run.notices:  # once is enough
                        run.notices.append(text)
                        yield event
                case _:
                    run.plan = event.plan if isinstance(event, Planned) else run.plan
                    yield event
    except (Cancelled, StorageError):
        raise
    except TriptychError as error:
        error.__context__ = error.__cause__ = None  # their tracebacks hold tensors
        run.fail(cell.spot, error.with_traceback(None))


def _check(stop: threading.Event) -> None:
    if stop.is_set():
        raise Cancelled("Stopped.")


@dataclass
class _Run:
    """What a grid has come to. `pace` is the seconds by effort of the cells that were painted now."""

    grid: Grid
    cells: list[Cell]
    files: dict[Spot, Path] = field(default_factory=dict)
    failed: dict[Spot, TriptychError] = field(default_factory=dict)
    sizes: dict[Spot, tuple[int, int]] = field(default_factory=dict)
    timings: dict[str, float] = field(default_factory=dict)
    notices: list[str] = field(default_factory=list)
    plan: Plan | None = None
    peak_bytes: int = 0
    pace: list[float] = field(default_factory=list)
    small: dict[Spot, Image] = field(default_factory=dict)
    board: Sheet | None = None  # the small sheet so far
    shown: float = float("-inf")  # when its last preview was

    @property
    def left(self) -> list[Cell]:
        return [cell for cell in self.cells if cell.spot not in self.files and cell.spot not in self.failed]

    def take(self, spot: Spot, file: Path, picture: Image) -> None:
        """A cell is done: kept are its picture's file, and what the preview needs."""
        self.files[spot], self.sizes[spot] = file, picture.size
        small = picture.copy()
        small.thumbnail((PREVIEW_SIDE // 2, PREVIEW_SIDE // 2))
        self.small[spot] = small
        if self.board is not None:
            self.board.put(spot, small)

    def took(self, cell: Cell, result: Result) -> None:
        """A cell has been painted."""
        self.take(cell.spot, result.files[0], result.images[0])
        busy = sum(spent for phase, spent in result.timings.items() if phase != "total")
        self.pace.append(busy / effort(cell.request))  # starting up takes time once
        self.plan, self.peak_bytes = result.plan, max(self.peak_bytes, result.peak_bytes)
        for phase, spent in result.timings.items():
            self.timings[phase] = round(self.timings.get(phase, 0.0) + spent, 3)

    def fail(self, spot: Spot, error: TriptychError) -> None:
        self.failed[spot] = error
        if self.board is not None:
            self.board.fail(spot, str(error))

    def progress(self) -> GridProgress:
        """With a preview, unless the last was just now."""
        return self._told(self._board().image.copy() if self.sizes and self._is_due() else None)

    def live(self, spot: Spot, step: Step) -> Iterator[Event]:
        """A cell's step; what it previews is shown in its place on the sheet."""
        if step.previews and self._is_due():
            yield self._told(self._board().with_live(spot, step.previews[0]))
        yield replace(step, previews=())

    def _is_due(self) -> bool:
        return time.monotonic() - self.shown >= PREVIEW_SECONDS

    def _told(self, preview: Image | None) -> GridProgress:
        if preview is not None:
            self.shown = time.monotonic()
        left = sum(effort(cell.request) for cell in self.left)
        return GridProgress(
            done=len(self.cells) - len(self.left),
            cells=len(self.cells),
            failed=len(self.failed),
            eta_s=round(median(self.pace) * left, 2) if self.pace else None,
            preview=preview,
        )

    def _board(self) -> Sheet:
        sizes = sizes_of(self.grid, self.sizes)
        if self.board is None or self.board.layout.sizes != sizes:  # the first picture tells its size
            self.board = Sheet(in_small(arranged(self.grid, sizes)))
            for spot, small in self.small.items():
                self.board.put(spot, small)
            for spot, error in self.failed.items():
                self.board.fail(spot, str(error))
        return self.board


# ---- the sheet


def _sheet(run: _Run, stop: threading.Event) -> Image:
    sheet = Sheet(arranged(run.grid, sizes_of(run.grid, run.sizes)))
    for spot, file in run.files.items():
        _check(stop)
        if picture := opened(file):
            sheet.put(spot, picture)
        else:
            sheet.fail(spot, "Its file is gone.")
    for spot, error in run.failed.items():
        sheet.fail(spot, str(error))
    return sheet.image


def _result(studio: Studio, run: _Run, image: Image, timings: dict[str, float], owner: str) -> Result:
    """Save the sheet, and tell what it is of."""
    grid, first = run.grid, run.cells[0]
    settings = _settings(run, image)
    seed = grid.base.seed
    facts = {**settings, "seed": seed, "family": grid.base.family, "timings": timings}
    file = studio.gallery.save(image, described(grid, settings), facts, owner=owner)
    notices = list(run.notices)
    if run.failed:
        notices.append(
            f"{len(run.failed)} of {grid.count} pictures could not be painted; their cells say why. The same "
            "grid, started again, tries those once more."
        )
    return Result(
        images=[image],
        files=[file],
        seeds=[seed],
        plan=run.plan or studio.plan(first.request),
        timings=timings,
        settings=settings,
        peak_bytes=run.peak_bytes,
        notices=notices,
    )


def _settings(run: _Run, image: Image) -> dict[str, Any]:
    """The base's values, and as `grid` the axes and the size of the sheet. What the base leaves to the
    checkpoint is told by a picture that was made of it."""
    base = run.grid.base
    picture = opened(run.files[min(run.files)])
    told = infotext.restore(str(picture.info.get("parameters", ""))) if picture else {}
    settings = {each.name: getattr(base, each.name) for each in fields(base)}
    own = {name for name in settings if name in OWN or name.endswith(("steps", "guidance_scale"))}
    settings |= {name: told.get(name) for name in own if settings[name] is None}
    if "images" in settings:
        settings["images"] = [str(each) for each in settings["images"]]
    axes = {
        name: {"field": axis.field, "values": axis.values, "text": axis.text}
        for name, axis in zip("xy", run.grid.axes, strict=False)
    }
    sheet = {"titled": run.grid.titled, "width": image.width, "height": image.height, "cells": len(run.files)}
    return {
        **settings,
        "ran": {name: told.get(name) for name in RAN if name in settings},
        "grid": axes | sheet,
    }


def described(grid: Grid, settings: dict[str, Any]) -> str:
    """The sheet's `parameters` text: what is common to all its pictures, and the axes, as other tools do."""
    text = infotext.parse(infotext.describe(settings, grid.base.seed))
    axes = {
        key: value
        for name, axis in zip("XY", grid.axes, strict=False)
        for key, value in ((f"{name} Type", axis.title), (f"{name} Values", axis.text))
    }
    return infotext.write(text.prompt, text.negative_prompt, {**text.fields, **axes})
