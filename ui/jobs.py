"""The queue: every picture, of the page or of the API, is a job; one thread does them, one after the other.

Gradio moves a synchronous generator between threads and closes it late; a thread of our own keeps torch's
thread-local state whole and lets go of the device as soon as the stop event is seen, within a step. A job
belongs to a topic, whose followers hear what comes of it: a page's tab, which may be left and found again, or
one call of the API.
"""

from __future__ import annotations

import asyncio
import logging
import os
import secrets
import threading
import time
from collections import deque
from collections.abc import AsyncGenerator, Callable, Generator, Hashable, Iterable, Iterator
from contextlib import contextmanager, suppress
from contextvars import Context, copy_context
from dataclasses import dataclass, field, replace

from backend import Studio
from backend.errors import Cancelled, TriptychError
from backend.events import Event, Finished, GridProgress, Loading, Planned, Step, Waiting
from backend.memory.plan import Plan
from backend.requests import Request
from backend.zerogpu import painting

Work = Callable[[threading.Event], Iterator[Event]]

TICK = 0.5  # seconds: Gradio notices a closed tab only when the handler yields
MOST_WAITING = 128  # jobs in all
MOST_OF_A_STRANGER = 4  # jobs of one client, waiting and running, on a public server
ABANDONED = 60.0  # seconds after which a stranger's job that nobody follows is given up
KEPT = 12  # finished jobs of a topic, for a page that comes back
KEPT_SECONDS = 3600.0
KEPT_TOPICS = 500
UNEXPECTED = (
    "Something went wrong inside Triptych; the server's log has the details. The next request can go on."
)

log = logging.getLogger("triptych")


class Busy(TriptychError):
    """The queue takes no more now."""


class Unforeseen(TriptychError):
    """What nobody foresaw: the log has it."""


@dataclass(eq=False, kw_only=True)
class Job:
    """One request on its way; `state` is waiting, running, done, failed or stopped.

    `client` is who it is counted by, `topic` who hears of it. An `attached` one ends with its followers.
    `plan`, `now` (the newest Step or Loading), `finished` and `error` are what it has come to.
    """

    work: Work
    topic: Hashable
    client: Hashable
    title: str
    request: Request
    attached: bool
    id: str = field(default_factory=lambda: secrets.token_hex(8))
    state: str = "waiting"
    stop: threading.Event = field(default_factory=threading.Event)
    plan: Plan | None = None
    now: Event | None = None
    previews: Step | None = None  # the newest with previews
    grid: GridProgress | None = None  # the newest with a preview of the sheet, if it paints a grid
    finished: Finished | None = None
    error: Exception | None = None
    ended: float = 0.0  # when, by the monotonic clock
    left: float | None = None  # since when nobody follows it
    context: Context = field(default_factory=copy_context)  # it says who asks: what a lent GPU counts by

    @property
    def active(self) -> bool:
        return self.state in ("waiting", "running")

    def note(self, event: Event) -> None:
        """Keep what whoever comes later needs to know."""
        match event:
            case Planned(plan=plan):
                self.plan = plan
            case Finished(result=result):  # the files are what counts: the pictures would stay in memory
                self.finished = Finished(result=replace(result, images=[]))
            case Step() | Loading() | Waiting():
                self.now = event
                if isinstance(event, Step) and event.previews:
                    self.previews = event
            case GridProgress():
                last = self.grid.preview if self.grid else None
                self.grid = event if event.preview else replace(event, preview=last)
            case _:
                pass


@dataclass(frozen=True)
class News:
    """What happened to a job: an event, or None when its state changed, or its place in the queue."""

    job: Job
    event: Event | None = None


class Jobs:
    """The queue and its thread. All of it may be called from any thread."""

    def __init__(self, studio: Studio) -> None:
        self.studio = studio
        self.public = bool(getattr(studio.settings, "public", False))
        self._paint = painting(studio, os.environ)
        self._lock = threading.Condition()
        self._lines: dict[Hashable, deque[Job]] = {}  # by client, the one that is served next first
        self._running: Job | None = None
        self._kept: dict[Hashable, deque[Job]] = {}  # ended jobs by topic
        self._followers: dict[Hashable, list[Feed]] = {}
        self._thread: threading.Thread | None = None
        self._closed = False

    # ---- asking

    def paint(self, request: Request, owner: str = "") -> Work:
        """The work of one request."""
        return lambda stop: self._paint(request, stop, owner)

    def submit(
        self,
        work: Work,
        request: Request,
        *,
        topic: Hashable,
        client: Hashable,
        title: str | None = None,
        attached: bool = False,
    ) -> Job:
        """Put a job at the end of its client's line. Raises Busy."""
        job = Job(
            work=work,
            topic=topic,
            client=client,
            title=request.prompt if title is None else title,
            request=request,
            attached=attached,
        )
        with self._lock:
            self._give_up_abandoned()
            waiting = self._order()
            theirs = sum(each.client == client for each in [*waiting, self._running] if each)
            if self._closed:
                raise Busy("Triptych is being closed.")
            if self.public and theirs >= MOST_OF_A_STRANGER:
                raise Busy(
                    f"{theirs} of your requests wait or run; on this public server it can be "
                    f"{MOST_OF_A_STRANGER} at a time."
                )
            if len(waiting) >= MOST_WAITING:
                raise Busy(f"The queue is full: {len(waiting)} requests wait. Try again in a while.")
            if job.topic not in self._followers:
                job.left = time.monotonic()
            self._lines.setdefault(client, deque()).append(job)
            if self._thread is None:
                self._thread = threading.Thread(target=self._serve, daemon=True, name="jobs")
                self._thread.start()
            self._tell(News(job))
            self._lock.notify_all()
        return job

    def stop(self, job: Job) -> None:
        """End a job: at once while it waits, within a step while it runs."""
        with self._lock:
            self._stop(job)
            self._tell_places()

    def of(self, topic: Hashable) -> list[Job]:
        """The topic's jobs: those that ended lately, the one that runs, those that wait in their order."""
        with self._lock:
            self._forget()
            running = [self._running] if self._running and self._running.topic == topic else []
            waiting = [job for job in self._order() if job.topic == topic]
            return [*self._kept.get(topic, ()), *running, *waiting]

    def find(self, topic: Hashable, name: object) -> Job | None:
        """The topic's job of that id; nobody finds another's."""
        return next((job for job in self.of(topic) if job.id == name), None)

    def place(self, job: Job) -> int:
        """How many jobs come before it, the running one included."""
        with self._lock:
            order = self._order()
            return order.index(job) + (self._running is not None) if job in order else 0

    def waiting(self) -> int:
        """How many jobs there are that have not ended."""
        with self._lock:
            return len(self._order()) + (self._running is not None)

    # ---- following

    @contextmanager
    def following(self, topic: Hashable) -> Generator[Feed]:
        """Hear the news of a topic; when the last follower goes, its attached jobs are stopped."""
        feed = Feed(asyncio.get_running_loop())
        with self._lock:
            self._followers.setdefault(topic, []).append(feed)
            for job in self._active(topic):
                job.left = None
        try:
            yield feed
        finally:
            with self._lock:
                self._followers[topic].remove(feed)
                if not self._followers[topic]:
                    del self._followers[topic]
                    for job in self._active(topic):
                        job.left = time.monotonic()
                        if job.attached:
                            self._stop(job)
                    self._tell_places()

    async def events(self, work: Work, request: Request, *, client: Hashable) -> AsyncGenerator[News]:
        """Queue an attached job and yield what comes of it; News without an event when its state or place
        changed, and when nothing came for a tick. Closing it stops the job.

        Raises Busy, and what the work raises. Of several steps that came since the last look, only the newest
        is passed on: a slow client sees fewer and never holds the device up.
        """
        topic = object()
        with self.following(topic) as feed:
            job = self.submit(work, request, topic=topic, client=client, attached=True)
            over = False
            while not over:
                over = not job.active  # before the look: nothing comes after the end
                for news in await feed.take(0 if over else TICK):
                    yield news or News(job)
        if job.error is not None:
            raise job.error

    def close(self, timeout: float = 5.0) -> None:
        """Stop all jobs, and wait for the one that runs."""
        with self._lock:
            self._closed = True
            waiting, running, thread = self._order(), self._running, self._thread
            for job in [*waiting, *([running] if running else [])]:
                job.stop.set()
            self._lock.notify_all()
        if thread is not None:
            thread.join(timeout)

    # ---- the thread

    def _serve(self) -> None:
        while (job := self._next()) is not None:
            job.context.run(self._do, job)

    def _next(self) -> Job | None:
        """Wait for the next job; None when the queue is closed."""
        with self._lock:
            while True:
                self._give_up_abandoned()
                order = self._order()
                if order and not self._closed:
                    job = order[0]
                    line = self._lines.pop(job.client)
                    line.popleft()
                    if line:
                        self._lines[job.client] = line  # behind all other clients
                    job.state, self._running = "running", job
                    self._tell(News(job))
                    self._tell_places()
                    return job
                if self._closed:
                    for job in order:
                        self._stop(job)
                    return None
                self._lock.wait()

    def _do(self, job: Job) -> None:
        state = "done"
        try:
            for event in job.work(job.stop):
                with self._lock:
                    job.note(event)
                    self._tell(News(job, event))
                    if self._is_abandoned(job):
                        job.stop.set()
        except Cancelled as error:
            state, job.error = "stopped", _bare(error)
        except TriptychError as error:
            state, job.error = "failed", _bare(error)
        except Exception:
            log.exception("unexpected error")
            state, job.error = "failed", Unforeseen(UNEXPECTED)
        with self._lock:
            self._running = None
            self._end(job, state)

    # ---- within the lock

    def _order(self) -> list[Job]:
        """The waiting jobs as they will be served: each client in turn."""
        lines = [list(line) for line in self._lines.values()]
        longest = max(map(len, lines), default=0)
        return [line[turn] for turn in range(longest) for line in lines if turn < len(line)]

    def _active(self, topic: Hashable) -> list[Job]:
        jobs = [*self._order(), *([self._running] if self._running else [])]
        return [job for job in jobs if job.topic == topic]

    def _stop(self, job: Job) -> None:
        job.stop.set()
        if job.state == "waiting":
            self._lines[job.client].remove(job)
            self._end(job, "stopped")

    def _end(self, job: Job, state: str) -> None:
        job.state, job.ended = state, time.monotonic()
        if state == "stopped" and job.error is None:
            job.error = Cancelled("Stopped.")
        if state == "done":
            job.previews = job.grid = None
        if not job.attached:
            self._kept.setdefault(job.topic, deque(maxlen=KEPT)).append(job)
            while len(self._kept) > KEPT_TOPICS:
                self._kept.pop(next(iter(self._kept)))
        if not self._lines.get(job.client, True):
            del self._lines[job.client]
        self._tell(News(job))

    def _forget(self) -> None:
        """Let go of what ended long ago."""
        before = time.monotonic() - KEPT_SECONDS
        for topic, jobs in list(self._kept.items()):
            while jobs and jobs[0].ended < before:
                jobs.popleft()
            if not jobs:
                del self._kept[topic]

    def _give_up_abandoned(self) -> None:
        for job in self._order():
            if self._is_abandoned(job):
                self._stop(job)

    def _is_abandoned(self, job: Job) -> bool:
        waited = job.left is not None and time.monotonic() - job.left > ABANDONED
        return waited and self.public

    def _tell(self, news: News) -> None:
        for feed in self._followers.get(news.job.topic, ()):
            feed.put(news)

    def _tell_places(self) -> None:
        for job in self._order():
            self._tell(News(job))


class Feed:
    """News from a thread to a coroutine: nothing is lost when a wait times out."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._arrived = asyncio.Event()
        self._news: deque[News] = deque()

    def put(self, news: News) -> None:
        self._news.append(news)
        with suppress(RuntimeError):  # the loop is closed: the server is gone, nobody waits
            self._loop.call_soon_threadsafe(self._arrived.set)

    async def take(self, timeout: float) -> list[News | None]:
        """What came, or [None] when nothing did."""
        # Not wait_for: before Python 3.12 it loses a cancellation that comes together with an event, and the
        # job that nobody waits for any more would keep the device.
        if timeout and not self._news:
            try:
                async with asyncio.timeout(timeout):
                    await self._arrived.wait()
            except TimeoutError:
                return [None]
        self._arrived.clear()
        return [*newest([self._news.popleft() for _ in range(len(self._news))])]


def newest(news: Iterable[News]) -> list[News]:
    """Merge runs of steps of one phase, and of waiting, into their last; the last previews are kept."""
    kept: list[News] = []
    for each in news:
        last = kept[-1] if kept and kept[-1].job is each.job else None
        before, event = last.event if last else None, each.event
        if isinstance(event, Waiting) and isinstance(before, Waiting):
            continue
        if isinstance(event, Step) and isinstance(before, Step) and event.phase == before.phase:
            kept[-1] = (
                each if event.previews else replace(each, event=replace(event, previews=before.previews))
            )
        else:
            kept.append(each)
    return kept


def _bare(error: TriptychError) -> TriptychError:
    """Without its traceback, which holds tensors: the error is kept for whoever comes back to the page."""
    error.__context__ = error.__cause__ = None
    return error.with_traceback(None)
