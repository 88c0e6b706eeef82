"""Pictures on disk: `<home>/outputs/<day>/<name>.png`, and an index of them in `<home>/history.sqlite`.

The picture is what counts: it is written whole or not at all, and an index that fails costs only its row.
"""

from __future__ import annotations

import errno
import io
import json
import logging
import os
import secrets
import sqlite3
import tempfile
import time
from collections.abc import Generator, Mapping
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from backend.errors import StorageError

if TYPE_CHECKING:
    from PIL.Image import Image

SCHEMA = """
CREATE TABLE IF NOT EXISTS pictures (
    id INTEGER PRIMARY KEY, file TEXT NOT NULL UNIQUE, created REAL NOT NULL,
    prompt TEXT NOT NULL, parameters TEXT NOT NULL, facts TEXT NOT NULL
)
"""
PROBE_BYTES = 1 << 20  # `check` wants room for this much, or the disk counts as full
LOCK_SECONDS = 5.0

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Entry:
    """A picture of the index; `created` in seconds since 1970, `facts` as they were given to `save`."""

    file: Path
    created: float
    prompt: str
    parameters: str
    facts: dict[str, Any]


class Gallery:
    """Writes pictures below `home` and lists them. Safe from several threads and processes.

    Nothing on disk is touched before the first call.
    """

    def __init__(self, home: Path) -> None:
        self.home = home
        self.outputs = home / "outputs"
        self.index = home / "history.sqlite"

    def check(self) -> None:
        """Raise StorageError if a picture could not be written now; better before the work than after it."""
        with _explained(self.outputs):
            self.outputs.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=self.outputs) as probe:
                probe.write(bytes(PROBE_BYTES))
                probe.flush()

    def save(self, image: Image, parameters: str, facts: Mapping[str, Any]) -> Path:
        """Write one picture with its `parameters` text → its path. Raises StorageError that holds the image.

        `facts` go into the index as JSON; its "prompt" is what `entries` searches.
        """
        now = time.time()
        moment = time.localtime(now)
        folder = self.outputs / time.strftime("%Y-%m-%d", moment)
        # the token keeps strangers from guessing the address of a served picture
        path = (
            folder / f"{time.strftime('%H%M%S', moment)}{int(now % 1 * 1000):03}-{secrets.token_hex(12)}.png"
        )
        with _explained(folder, (image,)):
            folder.mkdir(parents=True, exist_ok=True)
            _write_whole(path, _png(image, parameters))
        try:
            self._record(path, now, parameters, facts)
        except (sqlite3.Error, OSError) as error:
            log.warning("%s is saved, but the index %s could not be written: %s", path, self.index, error)
        return path

    def entries(self, search: str = "", limit: int = 100) -> list[Entry]:
        """The newest first, with `search` in the prompt. Raises StorageError for an unreadable index."""
        if not self.index.exists():
            return []
        query = (
            "SELECT file, created, prompt, parameters, facts FROM pictures"
            " WHERE instr(lower(prompt), lower(?)) ORDER BY created DESC, id DESC LIMIT ?"
        )
        try:
            with closing(self._open()) as database:
                rows = database.execute(query, (search, limit)).fetchall()
        except sqlite3.Error as error:
            raise StorageError(
                f"the index {self.index} cannot be read: {error}. The pictures are safe in {self.outputs};"
                " move the index away and a new one is begun"
            ) from error
        return [
            Entry(
                file=self.home / file,
                created=created,
                prompt=prompt,
                parameters=text,
                facts=json.loads(facts),
            )
            for file, created, prompt, text, facts in rows
        ]

    def _record(self, path: Path, created: float, parameters: str, facts: Mapping[str, Any]) -> None:
        row = (
            path.relative_to(self.home).as_posix(), created, str(facts.get("prompt", "")), parameters,
            json.dumps(dict(facts), default=str),
        )  # fmt: skip
        row = tuple(
            value.encode("utf-8", "replace").decode() if isinstance(value, str) else value for value in row
        )
        with closing(self._open()) as database, database:
            database.execute(
                "INSERT INTO pictures (file, created, prompt, parameters, facts) VALUES (?, ?, ?, ?, ?)", row
            )

    def _open(self) -> sqlite3.Connection:
        database = sqlite3.connect(self.index, timeout=LOCK_SECONDS)
        try:
            database.execute(SCHEMA)
        except sqlite3.Error:
            database.close()
            raise
        return database


def _png(image: Image, parameters: str) -> bytes:
    from PIL.PngImagePlugin import PngInfo

    info = PngInfo()
    info.add_text("parameters", parameters)  # an iTXt chunk where Latin-1 cannot hold it
    buffer = io.BytesIO()
    image.save(buffer, "PNG", pnginfo=info)
    return buffer.getvalue()


def _write_whole(path: Path, content: bytes) -> None:
    """Write beside the file, then rename: whoever sees it sees all of it, even after a power cut."""
    part = path.with_name(f".{path.name}.part")
    try:
        with part.open("xb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
    except BaseException:
        with suppress(OSError):
            part.unlink()
        raise


@contextmanager
def _explained(folder: Path, images: tuple[Image, ...] = ()) -> Generator[None]:
    """An OSError as a StorageError that says what to do."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            message = f"the disk of {folder} is full; free some space, or start with --home on another disk"
        else:
            message = (
                f"cannot write to {folder}: {error.strerror or error};"
                " make it writable, or start with --home and another folder"
            )
        raise StorageError(message, images) from error
