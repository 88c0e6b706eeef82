"""One worker thread a job, its events handed to the event loop.

Gradio moves a synchronous generator between threads and closes it late; a thread of our own keeps torch's
thread-local state whole and lets go of the device as soon as the stop event is seen, within a step.
"""

from __future__ import annotations

import asyncio
import os
import threading
from collections import deque
from collections.abc import AsyncGenerator, Iterable
from contextlib import suppress
from contextvars import copy_context
from dataclasses import replace
from weakref import WeakKeyDictionary

from backend import Studio
from backend.events import Event, Step, Waiting
from backend.requests import Request
from backend.zerogpu import painting

Whose = tuple[str | None, type[Request]]  # the page, None for a client of the API, and its tab

TICK = 0.5  # seconds: Gradio notices a closed tab only when the handler yields


class Jobs:
    """Runs requests on the studio and remembers the running ones, so that they can be stopped at exit."""

    def __init__(self, studio: Studio) -> None:
        self.studio = studio
        self._paint = painting(studio, os.environ)
        self._running: WeakKeyDictionary[threading.Thread, tuple[threading.Event, Whose]]
        self._running = WeakKeyDictionary()

    async def events(self, request: Request, session: str | None = None) -> AsyncGenerator[Event | None]:
        """Yield the request's events, and None when nothing came for a tick; closing it stops the job.

        So does `stop` with the session, the page that asked, and the request's class.

        Of several steps that came since the last look, only the newest is passed on: a slow client sees fewer
        previews and never holds the device up. Raises what `Studio.generate` raises.
        """
        box = _Box(asyncio.get_running_loop())
        stop = threading.Event()
        context = copy_context()  # it says who asks: what a lent GPU counts by
        work = (self._work, request, stop, box)
        thread = threading.Thread(target=context.run, args=work, daemon=True, name="job")
        self._running[thread] = stop, (session, type(request))
        thread.start()
        try:
            while not box.closed:
                for event in await box.take(TICK):
                    yield event
            if box.error is not None:
                raise box.error
        finally:
            stop.set()

    def _work(self, request: Request, stop: threading.Event, box: _Box) -> None:
        error: BaseException | None = None
        try:
            for event in self._paint(request, stop):
                box.put(event)
        except BaseException as caught:  # noqa: BLE001 (handed to the handler, whatever it is)
            error = caught
        box.close(error)

    async def stop(self, session: str, family: type[Request]) -> None:
        """Stop the jobs of a page's tab and wait until they have ended."""
        tab = session, family
        threads = [thread for thread, (_, whose) in self._running.items() if whose == tab]
        for thread in threads:
            self._running[thread][0].set()
        while any(thread.is_alive() for thread in threads):
            await asyncio.sleep(0.05)

    def close(self, timeout: float = 5.0) -> None:
        """Stop every running job and wait for its thread."""
        running = list(self._running.items())
        for _, (stop, _) in running:
            stop.set()
        for thread, _ in running:
            thread.join(timeout / len(running))


class _Box:
    """Events from a thread to a coroutine: nothing is lost when a wait times out."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._arrived = asyncio.Event()
        self._events: deque[Event] = deque()
        self._finished = False
        self.error: BaseException | None = None

    @property
    def closed(self) -> bool:
        return self._finished and not self._events

    def put(self, event: Event) -> None:
        self._events.append(event)
        self._wake()

    def close(self, error: BaseException | None) -> None:
        self.error = error
        self._finished = True
        self._wake()

    def _wake(self) -> None:
        with suppress(RuntimeError):  # the loop is closed: the server is gone, nobody waits
            self._loop.call_soon_threadsafe(self._arrived.set)

    async def take(self, timeout: float) -> list[Event | None]:
        # Not wait_for: before Python 3.12 it loses a cancellation that comes together with an event, and the
        # job that nobody waits for any more would keep the device to its end.
        try:
            async with asyncio.timeout(timeout):
                await self._arrived.wait()
        except TimeoutError:
            return [None]
        self._arrived.clear()
        return list(newest([self._events.popleft() for _ in range(len(self._events))]))


def newest(events: Iterable[Event]) -> list[Event]:
    """Merge runs of steps of one phase, and of waiting, into their last; the last previews are kept."""
    kept: list[Event] = []
    for event in events:
        last = kept[-1] if kept else None
        if isinstance(event, Waiting) and isinstance(last, Waiting):
            continue
        if isinstance(event, Step) and isinstance(last, Step) and event.phase == last.phase:
            kept[-1] = event if event.previews else replace(event, previews=last.previews)
        else:
            kept.append(event)
    return kept
