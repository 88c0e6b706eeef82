"""What happens on a click and on a call: values become a request, events what is shown or returned."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Hashable, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from typing import Any

import gradio as gr

from backend import Settings, Studio
from backend.errors import (
    AccessError,
    CheckpointError,
    StorageError,
    TriptychError,
)
from backend.events import Event, Finished, GridProgress, Loading, Notice, Planned, Step, Waiting
from backend.requests import Request
from ui import i18n, memory, render
from ui.i18n import Tongue
from ui.jobs import TICK, UNEXPECTED, Job, Jobs, News, Work
from ui.visitors import Visitor, visitor

log = logging.getLogger("triptych")

Update = dict[Any, Any]
Json = dict[str, Any]
WORD = 1.0  # seconds that a stop waits for the request that it overtook


@dataclass(frozen=True)
class Easel:
    """The components that a running request writes to; `last` keeps the settings of the last picture."""

    canvas: gr.HTML
    status: gr.HTML
    files: gr.HTML
    plan: gr.HTML
    jobs: gr.HTML
    last: gr.State

    @property
    def outputs(self) -> list[gr.components.Component]:
        return [self.canvas, self.status, self.files, self.plan, self.jobs, self.last]


@dataclass(frozen=True)
class Desk:
    """What the handlers of a family's tab have in common. `watching` is the newest handler of each page that
    follows the tab's jobs: an older one gives way."""

    jobs: Jobs
    family: type[Request]
    easel: Easel
    watching: dict[str, object] = field(default_factory=dict)

    @property
    def settings(self) -> Settings:
        return self.jobs.studio.settings

    @property
    def outputs(self) -> Path:
        return self.settings.home / "outputs"

    def topic(self, page: gr.Request) -> Hashable:
        """The tab's jobs of this browser; without a cookie, of this page."""
        return (visitor(page, self.settings).session or page.session_hash, self.family.family)

    # ---- painting

    async def paint(
        self, page: gr.Request, work_of: Callable[[str], tuple[Work, Request]]
    ) -> AsyncIterator[Update]:
        """Queue what `work_of` makes for an owner; show what comes of the tab's jobs until none is left."""
        t = i18n.of(page)
        try:
            who = visitor(page, self.settings)
            work, request = await asyncio.to_thread(work_of, who.owner(self.settings))
            topic, client = self.topic(page), client_of(who, page, self.settings)
            job = self.jobs.submit(work, request, topic=topic, client=client)
        except Exception as error:
            text = t.told(explain(error, self.settings))
            yield {self.easel.status: render.failed(text)}
            raise gr.Error(escape(text), title=t("Not painted"), print_exception=False) from error
        async with aclosing(self._watch(page, job)) as updates:
            async for update in updates:
                yield update

    async def watch(self, page: gr.Request) -> AsyncIterator[Update]:
        """Show the tab's jobs as they are, and what comes of them until none is left."""
        async with aclosing(self._watch(page, None)) as updates:
            async for update in updates:
                yield update

    async def _watch(self, page: gr.Request, last: Job | None) -> AsyncGenerator[Update]:
        """`last` is the job whose failure is told with a note, besides the progress line; those that come
        meanwhile take its place."""
        t, topic, me, key = i18n.of(page), self.topic(page), object(), page.session_hash or ""
        self.watching[key] = me
        try:
            with self.jobs.following(topic) as feed:
                yield self._found(topic, t)
                while self.watching.get(key) is me:
                    over = not any(job.active for job in self.jobs.of(topic))
                    for news in await feed.take(0 if over else TICK):
                        if news is None:
                            yield {self.easel.status: gr.skip()}
                            continue
                        last = news.job
                        yield self._shown(news, topic, t)
                    if over:
                        break
        finally:
            if self.watching.get(key) is me:
                del self.watching[key]
        if last is not None and last.state == "failed" and self.watching.get(key, me) is me:
            text = t.told(explain(last.error, self.settings))
            raise gr.Error(escape(text), title=t("Not painted"), print_exception=False)

    async def stop(self, page: gr.Request) -> None:
        """End the tab's job that runs, or else the first that waits; one that is on its way is waited for."""
        topic = self.topic(page)
        for _ in range(round(WORD / 0.05)):
            active = [job for job in self.jobs.of(topic) if job.active and not job.stop.is_set()]
            if active:
                return self.jobs.stop(active[0])
            await asyncio.sleep(0.05)
        return None

    def clicked(self, event: gr.EventData, page: gr.Request) -> Update:
        """On a row of the tab's jobs: end one, or show again what another made."""
        data = event._data if isinstance(event._data, dict) else {}
        topic, t = self.topic(page), i18n.of(page)
        if job := self.jobs.find(topic, data.get("cancel")):
            self.jobs.stop(job)
        elif job := self.jobs.find(topic, data.get("show")):
            return self._ended(job, t)
        return {self.easel.jobs: self._list(topic, t)}

    # ---- what is shown

    def _list(self, topic: Hashable, t: Tongue) -> str:
        mine = [(job, self.jobs.place(job)) for job in self.jobs.of(topic)]
        return render.jobs(mine, self.outputs, t)

    def _found(self, topic: Hashable, t: Tongue) -> Update:
        """All that there is to see when a page comes, or comes back."""
        jobs = self.jobs.of(topic)
        if not jobs:
            return {self.easel.status: gr.skip()}
        ended = [job for job in jobs if not job.active]
        update: Update = self._ended(ended[-1], t) if ended else {}
        if ended and not ended[-1].finished:  # what was made before is still worth seeing
            made = [job for job in ended if job.finished]
            update = (self._ended(made[-1], t) if made else {}) | update
        for job in jobs:
            if job.state == "running":
                update |= self._plan(job, t)
                for event in (job.previews, job.grid, job.now):
                    update |= self._event(job, event, t) if event else {}
        return update | self._line(jobs, t) | {self.easel.jobs: self._list(topic, t)}

    def _line(self, jobs: Sequence[Job], t: Tongue) -> Update:
        """The progress line, where what waits or has just begun is all that there is to tell."""
        active = [job for job in jobs if job.active]
        if active and active[0].state == "waiting":
            place = self.jobs.place(active[0])
            return {self.easel.status: render.waiting(place, t) if place else render.starting(t("Starting…"))}
        if active and active[0].now is None:
            return {self.easel.status: render.starting(t("Starting…"))}
        return {}

    def _shown(self, news: News, topic: Hashable, t: Tongue) -> Update:
        job, event = news.job, news.event
        if event is not None:
            return self._event(job, event, t)
        update: Update = {self.easel.jobs: self._list(topic, t)}
        jobs = self.jobs.of(topic)
        if job.active:
            return update | self._line(jobs, t)
        others = [other for other in jobs if other.active]
        if job.state == "failed" or (job.state == "stopped" and not others):
            update |= self._ended(job, t)
        if others and job.state == "failed":
            text = t.told(explain(job.error, self.settings))
            gr.Warning(escape(text), title=t("Not painted"))
        return update | self._line(others, t)

    def _ended(self, job: Job, t: Tongue) -> Update:
        """What has come of a job, and its plan."""
        easel = self.easel
        if job.finished is not None:
            return self._plan(job, t) | self._event(job, job.finished, t)
        update: Update = {}
        if job.grid and job.grid.preview:
            sheet = job.grid.preview
            update[easel.canvas] = render.previews([sheet], sheet.width / sheet.height, t, over=True)
        elif job.previews is not None:
            update[easel.canvas] = render.previews(job.previews.previews, _ratio(job.request), t, over=True)
        if job.state == "stopped":
            return update | {easel.status: render.stopped(t)}
        if job.error is None:
            return update
        update[easel.status] = render.failed(t.told(explain(job.error, self.settings)))
        if isinstance(job.error, StorageError) and job.error.images:
            update[easel.canvas] = render.unsaved(job.error.images, t)
        return update

    def _plan(self, job: Job, t: Tongue) -> Update:
        return {self.easel.plan: memory.picture(job.plan, t)} if job.plan else {}

    def _event(self, job: Job, event: Event, t: Tongue) -> Update:
        easel = self.easel
        match event:
            case Waiting():
                return {easel.status: render.starting(t("Waiting for the device…"))}
            case Planned():
                return self._plan(job, t)
            case Loading():
                return {easel.status: render.loading(event, t)}
            case Step(previews=images):
                part = render.grid_progress(job.grid, t) if job.grid else ""
                update = {easel.status: render.step(event, job.plan, t, part)}
                if images and not (job.grid and job.grid.preview):
                    update[easel.canvas] = render.previews(images, _ratio(job.request), t)
                return update
            case GridProgress():
                sheet = job.grid.preview if job.grid else None
                shown = render.previews([sheet], sheet.width / sheet.height, t) if sheet else gr.skip()
                return {easel.canvas: shown}
            case Notice(text=text):
                gr.Info(escape(t.told(text)), title=t("Note"))
                return {easel.status: gr.skip()}
            case Finished(result=result):
                return {
                    easel.canvas: render.pictures(result, self.outputs, t),
                    easel.status: render.done(result, t),
                    easel.files: render.files(result, self.outputs, t),
                    easel.last: result.settings,
                }


def _ratio(request: Request) -> float:
    """Of the picture: the latents of a stage may be rounded to another, and previews would change shape."""
    return (request.width or 1) / (request.height or 1)


def client_of(who: Visitor, page: gr.Request | None, settings: Settings) -> Hashable:
    """Whom a job is counted by. A stranger can have a new cookie at any time, but hardly another address."""
    if settings.public and who.address and not who.address.startswith(("127.", "::1")):
        return who.address
    return who.session or (page.session_hash if page else None) or who.address


def explain(error: BaseException | None, settings: Settings | None = None) -> str:
    """The user's text of an error; one that nobody foresaw goes to the log and is not shown.

    Strangers are not told of the server's folders and of what it may read.
    """
    if isinstance(error, TriptychError):
        if settings is not None and settings.public and isinstance(error, _PRIVATE):
            log.warning("not told to a visitor: %s", error)
            return PRIVATE
        return str(error)
    log.error("unexpected error", exc_info=error)
    return UNEXPECTED


_PRIVATE = (StorageError, CheckpointError, AccessError)
PRIVATE = "This server cannot do that now; whoever runs it finds the reason in its log."


def plan_in_words(studio: Studio, request_of: Callable[[Sequence[Any]], Request]) -> Callable[..., str]:
    """The plan of what the controls that it depends on ask for, or why there is none."""

    def words(page: gr.Request, *values: Any) -> str:
        t = i18n.of(page)
        try:
            return memory.picture(studio.plan(request_of(values)), t)
        except Exception as error:  # noqa: BLE001 (explained on the page, or logged)
            return memory.no_plan(t.told(explain(error, studio.settings)), t)

    return words
