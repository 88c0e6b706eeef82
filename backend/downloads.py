"""Downloads of the catalogue's checkpoints: one at a time, in a thread of its own, whatever the pages do.

Nothing begins by itself. What a run of the program leaves half downloaded is found by its files, and goes on
where it stopped.
"""

from __future__ import annotations

import logging
import shutil
import threading
import time
from collections import deque
from collections.abc import Callable, Generator
from contextlib import closing
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING

from backend import catalog
from backend.catalog import CatalogueEntry
from backend.errors import AccessError, CheckpointError, InvalidRequest, StorageError, TriptychError
from backend.events import Loading
from backend.requests import REQUESTS
from backend.weights.base import Amount
from backend.weights.hub import Repository, cache_folder, is_offline
from backend.weights.source import Source, resolve

if TYPE_CHECKING:
    from backend.studio import Studio

log = logging.getLogger("triptych")

WAITING, RUNNING, PAUSED, FAILED, DONE = "waiting", "running", "paused", "failed", "done"
LOOK = 0.5  # seconds between two looks at how far it is
WINDOW = 20  # of those looks tell the speed
STALLED = 5.0  # seconds without a byte, after which no speed is told
NOTHING = Amount(0, 0)


@dataclass(frozen=True, kw_only=True)
class Download:
    """How far a download is: bytes here and in all (0 where that is not known yet), the component on its way,
    bytes a second (0 where that cannot be told), and `error` in words where it failed."""

    family: str
    name: str
    state: str
    here_bytes: int = 0
    total_bytes: int = 0
    part: str = ""
    speed: float = 0.0
    error: str = ""

    @property
    def seconds_left(self) -> float | None:
        left = self.total_bytes - self.here_bytes
        return left / self.speed if self.speed and self.total_bytes else None


@dataclass
class _Job:
    """A download that was asked for. Each time it runs it has a `stop` of its own."""

    entry: CatalogueEntry
    state: str = WAITING
    stop: threading.Event = field(default_factory=threading.Event)
    measure: Callable[[], Amount] = lambda: NOTHING
    part: str = ""
    error: str = ""
    looks: tuple[tuple[float, int], ...] = ()  # when, bytes here

    def look(self) -> None:
        self.looks = (*self.looks[1 - WINDOW :], (time.monotonic(), self.measure().here))

    @property
    def speed(self) -> float:
        looks = self.looks  # the thread exchanges them meanwhile
        grown = [when for (when, here), (_, before) in zip(looks[1:], looks, strict=False) if here > before]
        if self.state != RUNNING or not grown or time.monotonic() - grown[-1] > STALLED:
            return 0.0
        (begin, first), (end, last) = looks[0], looks[-1]
        return (last - first) / max(end - begin, 1e-3)

    @property
    def told(self) -> Download:
        try:
            amount = self.measure()  # by its files: while the hub is silent, too
        except (TriptychError, OSError):  # it changes meanwhile
            amount = NOTHING
        return Download(
            family=self.entry.family,
            name=self.entry.name,
            state=self.state,
            here_bytes=amount.here,
            total_bytes=amount.total,
            part=self.part,
            speed=self.speed,
            error=self.error,
        )


class Downloads:
    """The line of downloads. Safe to share between threads; it starts its own with the first download."""

    def __init__(self, studio: Studio) -> None:
        self.studio = studio
        self._jobs: dict[tuple[str, str], _Job] = {}
        self._line: deque[_Job] = deque()
        self._busy: _Job | None = None  # what the thread works on, perhaps stopping already
        self._thread: threading.Thread | None = None
        self._closed = False
        self._lock = threading.Lock()

    def start(self, family: str, name: str) -> None:
        """Download what a run needs of a checkpoint, or go on with it; it waits for those before it.

        Raises InvalidRequest for one that is not in the catalogue, or on a public server; AccessError where
        downloads are off.
        """
        entry, settings = self._entry(family, name), self.studio.settings
        if is_offline(settings.offline):
            raise AccessError(f"{name} is not downloaded: downloads are off (--offline)")
        with self._lock:
            if self._closed:
                return
            job = self._jobs.setdefault((family, name), _Job(entry))
            if job in self._line or (job is self._busy and not job.stop.is_set()):
                return
            job.state, job.error, job.stop = WAITING, "", threading.Event()
            job.looks = ()
            self._line.append(job)
            if self._thread is None:
                self._thread = threading.Thread(target=self._work, daemon=True, name="downloads")
                self._thread.start()

    def pause(self, family: str, name: str) -> None:
        """Stop a download, or take it out of the line; what is downloaded stays."""
        with self._lock:
            job = self._jobs.get((family, name))
            if job is not None and job.state in (WAITING, RUNNING):
                job.stop.set()
                job.state = PAUSED
                if job in self._line:
                    self._line.remove(job)

    def status(self, family: str, name: str) -> Download | None:
        """How far a download is, or has been when the program ended; None for one that nobody began."""
        with self._lock:
            job = self._jobs.get((family, name))
        if job is not None:
            return job.told
        entry = catalog.entry(family, name)
        if entry is None or not any(repository.begun() for repository in self._repositories(entry)):
            return None
        return _Job(entry, PAUSED, measure=lambda: self._measured(entry)).told

    def working(self) -> bool:
        """Whether anything is being downloaded, or waits for it."""
        with self._lock:
            return any(job.state in (WAITING, RUNNING) for job in self._jobs.values())

    def line(self) -> list[str]:
        """The names of what is being downloaded, and of what waits, in their order."""
        with self._lock:
            busy = [self._busy] if self._busy and self._busy.state == RUNNING else []
            return [job.entry.name for job in (*busy, *self._line)]

    def idle(self) -> bool:
        """Whether the thread has come to rest; what was paused may take a moment."""
        with self._lock:
            return self._busy is None and not self._line

    def remove(self, family: str, name: str) -> int:
        """Delete a checkpoint from the hub's cache → the bytes that were freed.

        Raises InvalidRequest where it is being downloaded or used, StorageError where it cannot be deleted.
        """
        entry = self._entry(family, name)
        with self._lock:
            job = self._jobs.get((family, name))
            if job is not None and (job is self._busy or job.state in (WAITING, RUNNING)):
                raise InvalidRequest(f"{name} is not removed: it is being downloaded")
            parts = [
                part for part in self.studio.loaded() if (part.family, part.checkpoint) == (family, name)
            ]
            if any(part.lent for part in parts):
                raise InvalidRequest(f"{name} is not removed: a picture is being made with it")
            for part in parts:  # they may be read from its files
                self.studio.free(part.key)
            self._jobs.pop((family, name), None)
            try:
                return sum(repository.remove() for repository in self._repositories(entry))
            except OSError as error:
                raise StorageError(f"{name} cannot be removed: {error.strerror or error}") from error

    def close(self, timeout: float = 1.0) -> None:
        """Stop whatever runs, and wait for it so many seconds; what is downloaded stays."""
        with self._lock:
            self._closed = True
            self._line.clear()
            for job in self._jobs.values():
                job.stop.set()
                job.state = PAUSED if job.state in (WAITING, RUNNING) else job.state
            thread = self._thread
        if thread is not None:
            thread.join(timeout)

    def _entry(self, family: str, name: str) -> CatalogueEntry:
        if self.studio.settings.public:
            raise InvalidRequest("On this public server checkpoints are neither downloaded nor removed.")
        known = [entry for entry in catalog.entries(family) if not entry.bundled]
        for entry in known:
            if entry.name == name:
                return entry
        names = ", ".join(entry.name for entry in known) or "none"
        raise InvalidRequest(
            f"checkpoint is {name!r:.80}; what can be downloaded of {family!r:.80} is {names}"
        )

    def _repositories(self, entry: CatalogueEntry) -> list[Repository]:
        folder = self.studio.settings.models_dir
        return [Repository(name, cache=folder) for name in entry.repositories]

    # ---- in the thread

    def _work(self) -> None:
        while (job := self._next()) is not None:
            stop, state, error = job.stop, DONE, ""
            try:
                self._run(job, stop)
            except TriptychError as refused:
                state, error = FAILED, str(refused)
            except Exception as unforeseen:
                log.exception("the download of %s failed", job.entry.name)
                state, error = FAILED, f"{type(unforeseen).__name__}: {unforeseen}"
            with self._lock:
                self._busy = None
                if not stop.is_set():
                    job.state, job.error = state, error

    def _next(self) -> _Job | None:
        with self._lock:
            if not self._line:
                self._thread = None
                return None
            job = self._busy = self._line.popleft()
            job.state = RUNNING
            return job

    def _run(self, job: _Job, stop: threading.Event) -> None:
        entry, settings = job.entry, self.studio.settings
        source, needs = resolve(entry.name, entry.family, settings), self._needs(entry)
        job.measure = partial(_amount, source, needs)
        for weights in (False, True):  # the small files of all come first, and tell what there is to come
            looked = 0.0
            with closing(_fetched(source, needs, weights=weights)) as events:
                for event in events:
                    if stop.is_set():
                        return
                    job.part = event.component
                    if time.monotonic() - looked >= LOOK:
                        looked = time.monotonic()
                        job.look()
            amount = job.measure()
            free = shutil.disk_usage(cache_folder(settings.models_dir)).free
            if amount.total - amount.here > free:
                raise CheckpointError(
                    f"{entry.name} needs {(amount.total - amount.here) / 1e9:.1f} GB more in "
                    f"{cache_folder(settings.models_dir)}, where {free / 1e9:.1f} GB are free"
                )

    def _needs(self, entry: CatalogueEntry) -> dict[str, list[str]]:
        """The components that a picture on this machine is made with, by the dtype that suits them."""
        return self.studio.needs(REQUESTS[entry.family](checkpoint=entry.name))

    def _measured(self, entry: CatalogueEntry) -> Amount:
        return _amount(resolve(entry.name, entry.family, self.studio.settings), self._needs(entry))


def _fetched(source: Source, needs: dict[str, list[str]], *, weights: bool) -> Generator[Loading]:
    for dtype, names in needs.items():
        yield from source.fetch(names, dtype, weights=weights)


def _amount(source: Source, needs: dict[str, list[str]]) -> Amount:
    """How much is here of what the checkpoint needs."""
    parts = [source.amount(names, dtype) for dtype, names in needs.items()]
    total = sum(part.total for part in parts) if all(part.total for part in parts) else 0
    return Amount(sum(part.here for part in parts), total)
