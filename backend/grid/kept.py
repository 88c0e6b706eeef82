"""What a grid has come to, on disk: whoever starts it again finds the pictures that are there already.

`<home>/grids/<key>/` holds `grid.json`, which says what was asked for, the pictures that a request brought
along, and `cells.json`: the file of each finished cell, below `<home>/outputs`. JSON is written whole or not
at all. A grid that is finished is forgotten.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from backend.errors import InvalidRequest
from backend.grid.axes import Axis
from backend.grid.cells import Grid, Spot
from backend.image_prompts import ImagePrompt
from backend.requests import REQUESTS

if TYPE_CHECKING:
    from PIL.Image import Image

MOST_KEPT = 200  # unfinished grids of all owners; the oldest go first
KEY = re.compile(r"[0-9a-f]{32}")

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Unfinished:
    """A grid that was begun: `done` of its `cells` pictures are there. `changed` in seconds since 1970."""

    home: Path
    key: str
    family: str
    prompt: str
    axes: tuple[str, ...]
    done: int
    cells: int
    changed: float

    def grid(self) -> Grid:
        """What was asked for. Raises InvalidRequest where this version does not take it any more."""
        return _read_grid(self.home / "grids" / self.key)


class Book:
    """Which cells of one grid are done. What cannot be written costs only the way to resume."""

    def __init__(self, home: Path, grid: Grid, owner: str) -> None:
        self.outputs = home / "outputs"
        self.key = key_of(grid, owner)
        self.folder = home / "grids" / self.key
        self._grid, self._owner = grid, owner
        self._files = _read_cells(self.folder, self.outputs)

    def made(self, spot: Spot) -> tuple[Path, Image] | None:
        """The picture of a cell, if it is done, still there, and opens."""
        file = self._files.get(spot)
        picture = opened(file) if file is not None else None
        return (file, picture) if file is not None and picture is not None else None

    def note(self, spot: Spot, file: Path) -> None:
        """A cell is done. A picture that had to go elsewhere, as the home is full, is not kept track of."""
        if not file.is_relative_to(self.outputs):
            return
        if not (self.folder / "grid.json").is_file():  # nothing was worth keeping before the first picture
            self._begin(self._grid)
        self._files[spot] = file
        names = {
            f"{column},{row}": path.relative_to(self.outputs).as_posix()
            for (column, row), path in self._files.items()
        }
        self._write("cells.json", json.dumps(names).encode())

    def close(self) -> None:
        """The grid is finished."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def _begin(self, grid: Grid) -> None:
        told = {
            **_told(grid),
            "owner": self._owner,
            "titled": grid.titled,
            "prompt": grid.base.prompt,
            "cells": grid.count,
        }
        with suppress(OSError):
            self.folder.mkdir(parents=True, exist_ok=True)
        for index, image in enumerate(getattr(grid.base, "images", ())):
            with suppress(OSError):
                image.picture.save(self.folder / f"image-{index}.png")
        self._write("grid.json", json.dumps(told).encode())
        _prune(self.folder.parent)

    def _write(self, name: str, content: bytes) -> None:
        try:
            with tempfile.NamedTemporaryFile(dir=self.folder, prefix=".", delete=False) as part:
                try:
                    part.write(content)
                    part.flush()
                    os.fsync(part.fileno())
                    Path(part.name).replace(self.folder / name)
                except BaseException:
                    Path(part.name).unlink(missing_ok=True)
                    raise
        except OSError as error:
            log.warning("the grid %s could not be kept: %s", self.key, error)


def unfinished(home: Path, family: str, owner: str = "") -> list[Unfinished]:
    """The grids that an owner has begun in a family, the newest first."""
    found = []
    for folder in _folders(home / "grids"):
        told = _read(folder / "grid.json")
        if told.get("family") != family or told.get("owner") != owner:
            continue
        files = _read_cells(folder, home / "outputs").values()
        with suppress(KeyError, TypeError, ValueError):  # of another version, or damaged
            found.append(
                Unfinished(
                    home=home,
                    key=folder.name,
                    family=family,
                    prompt=str(told["prompt"]),
                    axes=tuple(str(told[side]["field"]) for side in "xy" if side in told),
                    done=sum(file.is_file() for file in files),
                    cells=int(told["cells"]),
                    changed=_changed(folder),
                )
            )
    return sorted(found, key=lambda each: -each.changed)


def forget(home: Path, key: str, owner: str = "") -> bool:
    """Let go of an owner's grid; its pictures stay. → whether there was one."""
    folder = home / "grids" / key
    if not KEY.fullmatch(key) or _read(folder / "grid.json").get("owner") != owner:
        return False
    shutil.rmtree(folder, ignore_errors=True)
    return True


def key_of(grid: Grid, owner: str) -> str:
    """The same for the same pictures of the same owner."""
    told = json.dumps([_told(grid), owner], sort_keys=True)
    return hashlib.sha256(told.encode("utf-8", "backslashreplace")).hexdigest()[:32]


def opened(file: Path) -> Image | None:
    """The picture in a file; None for one that is gone or damaged."""
    from PIL import Image

    try:
        with Image.open(file) as picture:
            picture.load()
            return picture
    except (OSError, SyntaxError, ValueError):
        return None


def _told(grid: Grid) -> dict[str, Any]:
    """A grid as JSON; of the pictures that its request brought along the digests."""
    base = {each.name: getattr(grid.base, each.name) for each in dataclasses.fields(grid.base)}
    if "images" in base:
        base["images"] = [image.digest for image in base["images"]]
    axes = {name: dataclasses.asdict(axis) for name, axis in zip("xy", grid.axes, strict=False)}
    return {"family": grid.base.family, "base": base, **axes}


def _read_grid(folder: Path) -> Grid:
    told = _read(folder / "grid.json")
    try:
        base: dict[str, Any] = {name: _frozen(value) for name, value in told["base"].items()}
        if "images" in base:
            base["images"] = tuple(
                ImagePrompt.read(f"images[{index}]", opened(folder / f"image-{index}.png"))
                for index in range(len(base["images"]))
            )
        axes = [
            Axis(axis["field"], tuple(map(_frozen, axis["values"])))
            for axis in (told["x"], told.get("y"))
            if axis is not None
        ]
        return Grid(REQUESTS[told["family"]](**base), *axes, titled=bool(told.get("titled", True)))
    except (KeyError, TypeError, AttributeError) as error:
        raise InvalidRequest(
            f"the grid {folder.name} cannot be read ({error}); it can be started anew"
        ) from error


def _read_cells(folder: Path, outputs: Path) -> dict[Spot, Path]:
    files: dict[Spot, Path] = {}
    for spot, name in _read(folder / "cells.json").items():
        column, _, row = spot.partition(",")
        file = outputs / str(name)
        if column.isdecimal() and row.isdecimal() and ".." not in file.parts and file.suffix == ".png":
            files[int(column), int(row)] = file
    return files


def _read(file: Path) -> dict[str, Any]:
    """A JSON object; an empty one for what is missing or damaged."""
    try:
        told = json.loads(file.read_bytes())
    except (OSError, ValueError):
        return {}
    return told if isinstance(told, dict) else {}


def _folders(grids: Path) -> Iterator[Path]:
    with suppress(OSError):
        for folder in sorted(grids.iterdir()):
            if KEY.fullmatch(folder.name):
                yield folder


def _changed(folder: Path) -> float:
    with suppress(OSError):
        return folder.stat().st_mtime  # files are put in place by renaming, which changes the folder
    return 0.0


def _prune(grids: Path) -> None:
    for folder in sorted(_folders(grids), key=_changed)[:-MOST_KEPT]:
        shutil.rmtree(folder, ignore_errors=True)


def _frozen(value: Any) -> Any:
    return tuple(_frozen(item) for item in value) if isinstance(value, list) else value
