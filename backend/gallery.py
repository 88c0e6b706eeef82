"""Pictures on disk: `<home>/outputs/<day>/<name>.png`, and an index of them in `<home>/history.sqlite`.

The picture is what counts: it is written whole or not at all, and an index that fails costs only its row.
Whatever ends the program at whatever moment, `reconcile` makes folder and index agree again.
"""

from __future__ import annotations

import errno
import json
import logging
import os
import re
import secrets
import sqlite3
import tempfile
import threading
import time
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from backend import infotext, png
from backend.errors import InvalidRequest, StorageError
from backend.gallery_index import LISTED, OWNED, changing, folded, insert, reading, storable, where

if TYPE_CHECKING:
    from PIL.Image import Image

PROBE_BYTES = 1 << 20  # `check` wants room for this much, or the disk counts as full
KEPT_SECONDS = 3600.0  # a deleted picture can be had back for so long, unless the program ends before
BATCH = 500  # rows a transaction: whoever saves a picture meanwhile must not wait for thousands
MOST_ROWS = 2**31  # beyond it, SQLite takes no number
PART = re.compile(r"\..+\.png(\.(?P<process>\d{1,9}))?\.part")
CLOCK_SECONDS = 2.0  # the start of a process is known to a second or so
COLUMNS = "file, created, prompt, parameters, facts, owner, favourite, family"

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Entry:
    """A picture of the index; `created` in seconds since 1970, `facts` as they were given to `save`.

    `name` is the path below the outputs, with which the gallery is asked about it. Of a picture that was only
    found, the owner is unknown ("") and `facts` are what its `parameters` text tells.
    """

    file: Path
    name: str
    created: float
    prompt: str
    parameters: str
    facts: dict[str, Any]
    owner: str = ""
    favourite: bool = False
    family: str = ""


class Gallery:
    """Writes pictures below `home` and lists them. Safe from several threads and processes.

    Nothing on disk is touched before the first call. Where an `owner` is asked for, only the owner's pictures
    count: None is everybody's, "" is unknown and finds none.
    """

    def __init__(self, home: Path) -> None:
        self.home = home
        self.outputs = home / "outputs"
        self.index = home / "history.sqlite"
        self._began = self._purged = time.time()
        self._agreed = False  # folder and index, at some time since then
        self._reconciling = threading.Lock()
        self._shrinking = threading.Semaphore(2)  # a page asks for dozens, each takes a picture's memory

    # ---- writing

    def check(self) -> None:
        """Raise StorageError if a picture could not be written now; better before the work than after it."""
        with _explained(self.outputs):
            self.outputs.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=self.outputs) as probe:
                probe.write(bytes(PROBE_BYTES))
                probe.flush()

    def save(self, image: Image, parameters: str, facts: Mapping[str, Any], owner: str = "") -> Path:
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
            _write_whole(path, png.encoded(image, parameters))
        try:
            row = self._row(path, _state(path.stat()), now, parameters, facts, owner)
            with changing(self.index) as database:
                insert(database, [row], found="UPDATE")  # `reconcile` may have found the file before
        except (sqlite3.Error, OSError) as error:
            self._agreed = False
            log.warning("%s is saved, but the index %s could not be written: %s", path, self.index, error)
        return path

    # ---- listing

    def entries(
        self,
        search: str = "",
        limit: int = 100,
        offset: int = 0,
        *,
        owner: str | None = None,
        favourites: bool = False,
    ) -> list[Entry]:
        """The newest first, with every word of `search` in the prompt. Raises StorageError for an unreadable
        index."""
        self._agree()
        asked = where(search, owner, favourites)
        window = [min(max(number, 0), MOST_ROWS) for number in (limit, offset)]
        found = self._page(asked, window)
        if not all(_is_there(entry.file) for entry in found):  # taken away by hand, or a whole disk is
            self.reconcile()
            found = [entry for entry in self._page(asked, window) if _is_there(entry.file)]
        return found

    def count(self, search: str = "", *, owner: str | None = None, favourites: bool = False) -> int:
        """How many there are to list. Raises StorageError for an unreadable index."""
        self._agree()
        terms, values = where(search, owner, favourites)
        rows = self._rows(f"SELECT count(*) FROM pictures WHERE {terms}", values)
        return rows[0][0] if rows else 0

    def entry(self, name: str, owner: str | None = None) -> Entry | None:
        """The listed picture of that name (`<day>/<file>.png`). Raises StorageError, as `entries` does."""
        terms, values = where("", owner, favourites=False)
        query = f"SELECT {COLUMNS} FROM pictures WHERE file = ? AND {terms}"
        rows = self._rows(query, [_file(name), *values])
        return self._entry(rows[0]) if rows else None

    def owner(self, name: str) -> str | None:
        """Whose picture it is, "" if that is unknown; None if there is no such picture."""
        entry = self.entry(name)
        return entry.owner if entry else None

    def thumbnail(self, name: str) -> bytes:
        """A picture in small, as WebP; made when it is first asked for. Raises StorageError where there is no
        such picture, or it does not open."""
        file = _file(name)
        kept = f"SELECT webp FROM pictures LEFT JOIN thumbnails USING (file) WHERE file = ? AND {LISTED}"
        rows = self._rows(kept, [file])
        if not rows:
            raise StorageError(f"there is no picture {name!r:.80}")
        if rows[0][0] is not None:
            return rows[0][0]
        with self._shrinking:
            webp = png.thumbnail(self.home / file)
        with suppress(sqlite3.Error), changing(self.index) as database:  # or it is made once more
            database.execute("INSERT OR REPLACE INTO thumbnails (file, webp) VALUES (?, ?)", (file, webp))
        return webp

    # ---- changing; each tells whether there was such a picture, and raises StorageError if the index fails

    def favourite(self, name: str, on: bool, owner: str | None = None) -> bool:
        """Make it a favourite, or no longer one."""
        return self._change("favourite", int(on), LISTED, name, owner)

    def delete(self, name: str, owner: str | None = None) -> bool:
        """Take it from the list; the file goes after an hour, or when the program is next started."""
        return self._change("deleted", time.time(), LISTED, name, owner)

    def undelete(self, name: str, owner: str | None = None) -> bool:
        """Put it back on the list."""
        return self._change("deleted", None, "deleted IS NOT NULL", name, owner)

    def _change(self, column: str, value: float | None, terms: str, name: str, owner: str | None) -> bool:
        self._purge_in_time()
        query = f"UPDATE pictures SET {column} = ? WHERE file = ? AND {terms}"
        values: list[Any] = [value, _file(name)]
        if owner is not None:
            query, values = f"{query} AND {OWNED}", [*values, storable(owner)]
        if not self.index.exists():
            return False
        with self._told("written"), changing(self.index) as database:
            return database.execute(query, values).rowcount > 0

    def _rows(self, query: str, values: Sequence[Any]) -> list[tuple[Any, ...]]:
        if not self.index.exists():
            return []
        with self._told("read"), reading(self.index) as database:
            return database.execute(query, values).fetchall()

    @contextmanager
    def _told(self, done: str) -> Generator[None]:
        """An error of the index as a StorageError that says what to do."""
        try:
            yield
        except sqlite3.Error as error:
            busy = getattr(error, "sqlite_errorcode", 0) & 0xFF in (
                sqlite3.SQLITE_BUSY,
                sqlite3.SQLITE_LOCKED,
            )
            advice = "try again in a moment" if busy else "move the index away and a new one is begun"
            raise StorageError(
                f"the index {self.index} cannot be {done}: {error}. The pictures are safe in {self.outputs};"
                f" {advice}"
            ) from error

    # ---- agreeing

    def reconcile(self) -> None:
        """Make folder and index agree, and remove for good what was deleted before this start.

        Files without a row get one, from their text; rows whose file is not there or does not open are hidden
        until it is and does; what processes left half-written is removed. What fails is logged.
        """
        with self._reconciling:
            try:
                self._reconcile()
            except (sqlite3.Error, OSError) as error:
                log.warning("the index %s could not be compared with the files: %s", self.index, error)
            else:
                self._agreed = True

    def _agree(self) -> None:
        """At the first listing, and when the index was moved away."""
        self._purge_in_time()
        if not self._agreed or not self.index.exists():
            self.reconcile()

    def _reconcile(self) -> None:
        if not self.outputs.exists() and not self.index.exists():
            return
        seen = dict(self._on_disk())
        self._purge(self._began)
        with reading(self.index) as database:
            rows = database.execute("SELECT file, seen, gone FROM pictures WHERE deleted IS NULL").fetchall()
            deleted = database.execute("SELECT file FROM pictures WHERE deleted IS NOT NULL").fetchall()
        changes: list[tuple[str, int, str]] = []
        for file, before, gone in rows:
            now = seen.pop(file, None)
            if now != before or now is None:  # the others were found to open, and are as they were
                now = _seen(self.home / file)
            if (now is None) != bool(gone) or (now is not None and now != before):
                changes.append((now or before, now is None, file))
        for (file,) in deleted:
            seen.pop(file, None)
        for batch in _batches(changes):
            with changing(self.index) as database:
                database.executemany("UPDATE pictures SET seen = ?, gone = ? WHERE file = ?", batch)
        for batch in _batches(sorted(seen)):
            found = [row for file in batch if (row := self._found(self.home / file))]
            with changing(self.index) as database:
                insert(database, found, found="NOTHING")

    def _on_disk(self) -> Iterator[tuple[str, str]]:
        """Paths of pictures below the home, with their size and time. Removes what was left half-written."""
        for day in _scanned(self.outputs):
            if not day.is_dir(follow_symlinks=False):
                continue
            for file in _scanned(Path(day.path)):
                if _is_remains(file):
                    Path(file.path).unlink(missing_ok=True)
                elif file.name.endswith(".png") and file.is_file(follow_symlinks=False):
                    yield f"{self.outputs.name}/{day.name}/{file.name}", _state(file.stat())

    def _purge_in_time(self) -> None:
        now = time.time()
        if now - self._purged > KEPT_SECONDS / 10:
            self._purged = now
            try:
                self._purge(now - KEPT_SECONDS)
            except (sqlite3.Error, OSError) as error:
                log.warning("deleted pictures could not be removed from %s: %s", self.outputs, error)

    def _purge(self, before: float) -> None:
        """Remove what was deleted before that time: first the file, then its row. The other way round, a kill
        in between would bring it back."""
        if not self.index.exists():
            return
        with reading(self.index) as database:
            doomed = database.execute("SELECT 1 FROM pictures WHERE deleted < ?", (before,)).fetchone()
        if not doomed:
            return
        with changing(self.index) as database:
            rows = database.execute("SELECT file FROM pictures WHERE deleted < ?", (before,)).fetchall()
            removed = [row for row in rows if _removed(self.home / row[0])]
            for table in ("thumbnails", "pictures"):
                database.executemany(f"DELETE FROM {table} WHERE file = ?", removed)

    # ---- rows

    def _row(
        self, path: Path, seen: str, created: float, parameters: str, facts: Mapping[str, Any], owner: str
    ) -> tuple[Any, ...]:
        """The values of `INSERTED`."""
        prompt = str(facts.get("prompt", ""))
        row = (
            path.relative_to(self.home).as_posix(), created, prompt, parameters,
            json.dumps(dict(facts), default=str), owner, str(facts.get("family", "")),
            folded(prompt), seen,
        )  # fmt: skip
        return tuple(storable(value) if isinstance(value, str) else value for value in row)

    def _found(self, path: Path) -> tuple[Any, ...] | None:
        """The row of a file that has none; None if it is no picture that opens."""
        try:
            found, read = path.stat(), png.read(path)
        except (InvalidRequest, OSError):
            return None
        if not read.whole:
            return None
        text = read.parameters or ""
        told = infotext.understand(text)
        facts = {**told.settings, "family": told.family} if text else {}
        return self._row(path, _state(found), found.st_mtime, text, facts, owner="")

    def _page(self, asked: tuple[str, list[Any]], window: Sequence[int]) -> list[Entry]:
        terms, values = asked
        newest = "ORDER BY created DESC, id DESC"
        # The inner query walks an index alone: what the page does not show is not read.
        query = (
            f"SELECT {COLUMNS} FROM pictures WHERE id IN"
            f" (SELECT id FROM pictures WHERE {terms} {newest} LIMIT ? OFFSET ?) {newest}"
        )
        return [self._entry(row) for row in self._rows(query, [*values, *window])]

    def _entry(self, row: tuple[Any, ...]) -> Entry:
        file, created, prompt, parameters, facts, owner, favourite, family = row
        try:
            known = json.loads(facts)
        except ValueError:  # damaged by hand
            known = {}
        return Entry(
            file=self.home / file,
            name=file.partition("/")[2],
            created=created,
            prompt=prompt,
            parameters=parameters,
            facts=known if isinstance(known, dict) else {},
            owner=owner,
            favourite=bool(favourite),
            family=family,
        )


# ---- files and rows


def _batches(items: Sequence[Any]) -> Iterator[Sequence[Any]]:
    return (items[start : start + BATCH] for start in range(0, len(items), BATCH))


def _file(name: str) -> str:
    """The path below the home, as the index has it."""
    return storable(f"outputs/{name}")


def _scanned(folder: Path) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(folder) as entries:
            return [entry for entry in entries if storable(entry.name) == entry.name]
    except FileNotFoundError:
        return []


def _is_there(file: Path) -> bool:
    try:
        return file.stat().st_size > 0
    except OSError:
        return False


def _state(found: os.stat_result) -> str:
    return f"{found.st_size} {found.st_mtime_ns}"


def _seen(file: Path) -> str | None:
    """Size and time of a picture that is there and opens; None for any other."""
    try:
        return _state(file.stat()) if png.read(file).whole else None
    except (InvalidRequest, OSError):
        return None


def _is_remains(file: os.DirEntry[str]) -> bool:
    """Whether it is the half-written picture of a process that is no more."""
    import psutil

    part = PART.fullmatch(file.name)
    if part is None:
        return False
    if part["process"] is None:  # of a version that did not tell
        return True
    try:
        process = psutil.Process(int(part["process"]))
        # A container gives each start the same few numbers: one that began later is another process.
        began = process.create_time() - CLOCK_SECONDS
        return process.status() == psutil.STATUS_ZOMBIE or file.stat().st_mtime < began
    except psutil.NoSuchProcess:
        return True
    except (psutil.Error, FileNotFoundError):  # it cannot be asked; it was finished meanwhile
        return False


def _removed(file: Path) -> bool:
    try:
        file.unlink(missing_ok=True)
    except OSError as error:
        log.warning("the deleted picture %s could not be removed: %s", file, error)
        return False
    return True


def _write_whole(path: Path, content: bytes) -> None:
    """Write beside the file, then rename: whoever sees it sees all of it, even after a power cut."""
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
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
