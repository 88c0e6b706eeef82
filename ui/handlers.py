"""What happens on a click and on a call: values become a request, events what is shown or returned."""

from __future__ import annotations

import asyncio
import inspect
import logging
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass, fields
from html import escape
from pathlib import Path
from typing import Any, get_type_hints

import gradio as gr
from gradio.data_classes import FileData
from gradio.utils import get_upload_folder

from backend import Studio
from backend.errors import Cancelled, InvalidRequest, StorageError, TriptychError
from backend.events import Event, Finished, Loading, Notice, Planned, Result, Step, Waiting
from backend.memory.plan import Plan
from backend.requests import REQUESTS, Request
from ui import memory, render
from ui.jobs import Jobs

log = logging.getLogger("triptych")

UNEXPECTED = (
    "Something went wrong inside Triptych; the server's log has the details. The next request can go on."
)
Update = dict[Any, Any]
Json = dict[str, Any]


@dataclass(frozen=True)
class Easel:
    """The components that a running request writes to; `last` keeps the settings of the last picture."""

    canvas: gr.HTML
    status: gr.HTML
    files: gr.HTML
    plan: gr.HTML
    last: gr.State

    @property
    def outputs(self) -> list[gr.components.Component]:
        return [self.canvas, self.status, self.files, self.plan, self.last]


def painter(jobs: Jobs, easel: Easel, request_of: Callable[[Sequence[Any]], Request]) -> Callable[..., Any]:
    """The handler of the Generate button: values of the controls in, updates of the easel out."""
    outputs = jobs.studio.settings.home / "outputs"

    async def paint(page: gr.Request, *values: Any) -> AsyncIterator[Update]:
        try:
            yield {easel.status: render.starting("Starting…")}
            plan: Plan | None = None  # the last: it may be made anew when memory runs out
            request = await asyncio.to_thread(request_of, values)  # it may hold pictures to read
            async with aclosing(jobs.events(request, page.session_hash)) as events:
                async for event in events:
                    plan = event.plan if isinstance(event, Planned) else plan
                    yield _shown(event, request, easel, outputs, plan)
        except Cancelled:
            yield {easel.status: render.stopped()}
        except Exception as error:
            text = explain(error)
            yield _failed(error, text, easel)
            raise gr.Error(escape(text), title="Not painted", print_exception=False) from error

    return paint


def stopper(jobs: Jobs, family: type[Request]) -> Callable[..., Any]:
    """The last of the Stop button: ends what Gradio's cancel missed, waits until no job of the tab runs."""

    async def stop(page: gr.Request) -> None:
        await jobs.stop(page.session_hash or "", family)

    return stop


def _shown(event: Event | None, request: Request, easel: Easel, outputs: Path, plan: Plan | None) -> Update:
    match event:
        case Waiting():
            return {easel.status: render.starting("Waiting for the device…")}
        case Planned(plan=new):
            return {easel.plan: memory.picture(new)}
        case Loading():
            return {easel.status: render.loading(event)}
        case Step(previews=images) if images:
            status = render.step(event, plan)
            return {easel.status: status, easel.canvas: render.previews(images, _ratio(request))}
        case Step():
            return {easel.status: render.step(event, plan)}
        case Notice(text=text):
            gr.Info(escape(text), title="Note")
            return {easel.status: gr.skip()}
        case Finished(result=result):
            return {
                easel.canvas: render.pictures(result, outputs),
                easel.status: render.done(result),
                easel.files: render.files(result, outputs),
                easel.last: result.settings,
            }
        case None:
            return {easel.status: gr.skip()}


def _ratio(request: Request) -> float:
    """Of the picture: the latents of a stage may be rounded to another, and previews would change shape."""
    return (request.width or 1) / (request.height or 1)


def _failed(error: Exception, text: str, easel: Easel) -> Update:
    """The text on the progress line; the canvas stays, unless there are pictures that nothing else holds."""
    update: Update = {easel.status: render.failed(text)}
    if isinstance(error, StorageError) and error.images:
        update[easel.canvas] = render.unsaved(error.images)
    return update


def explain(error: Exception) -> str:
    """The user's text of an error; one that nobody foresaw goes to the log and is not shown."""
    if isinstance(error, TriptychError):
        return str(error)
    log.error("unexpected error", exc_info=error)
    return UNEXPECTED


# ---- endpoints


def endpoint(jobs: Jobs, family: type[Request]) -> Callable[..., Any]:
    """The `gr.api` function of a family: its parameters are the fields of the request, with their defaults.

    Streams `([], {phase, step, steps, eta_s})`, ends with `(PNG files, {seeds, plan, timings, …})`.
    """

    async def serve(*values: Any) -> AsyncIterator[tuple[list[Json], Json]]:
        progress = _progress("starting")
        try:
            given = dict(zip(parameters, values, strict=True))
            request = await asyncio.to_thread(build, family, given, public=jobs.studio.settings.public)
            async with aclosing(jobs.events(request)) as events:
                async for event in events:
                    if isinstance(event, Finished):
                        yield _files(event.result), _facts(event.result)
                    else:
                        progress = _told(event) or progress
                        yield [], progress
        except Exception as error:
            raise gr.Error(explain(error), print_exception=False) from error

    parameters = _parameters(family)
    returns = tuple[list[Json], Json]
    serve.__signature__ = inspect.Signature(list(parameters.values()), return_annotation=returns)
    serve.__annotations__ = {name: p.annotation for name, p in parameters.items()} | {"return": returns}
    serve.__name__ = family.family
    serve.__doc__ = f"Paint pictures. {inspect.getdoc(family)}"
    return serve


def _parameters(family: type[Request]) -> dict[str, inspect.Parameter]:
    types = get_type_hints(family)
    kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
    return {
        field.name: inspect.Parameter(field.name, kind, default=field.default, annotation=types[field.name])
        for field in fields(family)
    }


def build(family: type[Request], values: Mapping[str, Any], *, public: bool = False) -> Request:
    """A request from a page's or a client's values, where tuples are lists, no `config_from` is empty, and
    uploaded files are dictionaries. On a public server nobody names files of its own."""
    given: dict[str, Any] = {name: _frozen(value) for name, value in values.items()}
    given["config_from"] = given.get("config_from") or None
    if isinstance(given.get("images"), tuple):
        given["images"] = tuple(
            _file(f"images[{index}]", value, public=public) for index, value in enumerate(given["images"])
        )
    return family(**given)


def _file(name: str, value: Any, *, public: bool) -> Any:
    """An uploaded file's path; any other value as it is, if it may be."""
    if isinstance(value, dict):
        path = value.get("path")
        if isinstance(path, str) and "\0" not in path:
            file, uploads = Path(path).resolve(), Path(get_upload_folder()).resolve()
            if file.is_relative_to(uploads):
                return str(file)
        raise InvalidRequest(f"{name} is {value!r:.80}, which is no file that was uploaded here")
    if public and isinstance(value, str) and not value.startswith("data:"):
        raise InvalidRequest(
            f"{name} is {value!r:.80}; on this public server it can be an uploaded file or a data URL"
        )
    return value


def build_shown(family: type[Request], values: Mapping[str, Any]) -> Request:
    """A request from a page's values; an erased size is no wish for a default that is not shown."""
    for name in ("width", "height"):
        if values[name] is None:
            raise InvalidRequest(f"{name} is empty; give it in pixels, or choose a shape")
    return build(family, values)


def _frozen(value: Any) -> Any:
    return tuple(_frozen(item) for item in value) if isinstance(value, list) else value


def _told(event: Event | None) -> Json | None:
    """The progress that an event tells; None where it tells none, and what was told last still holds."""
    match event:
        case Step():
            return _progress(event.phase, event.step, event.steps, event.eta_s)
        case Loading():
            return _progress(f"{event.action} {event.component}", event.done_bytes, event.total_bytes)
        case Waiting():
            return _progress("waiting")
        case _:
            return None


def _progress(phase: str, step: int = 0, steps: int = 0, eta_s: float | None = None) -> Json:
    return {"phase": phase, "step": step, "steps": steps, "eta_s": eta_s}


def _files(result: Result) -> list[Json]:
    # As dictionaries: gr.api refuses to serve a FileData object and leaves a bare path on the server.
    return [FileData(path=str(file), orig_name=file.name).model_dump() for file in result.files]


def _facts(result: Result) -> Json:
    settings = dict(result.settings)
    if "images" in settings:  # uploads lie where only the server knows
        settings["images"] = [Path(image).name for image in settings["images"]]
    return {
        "seeds": result.seeds,
        "plan": result.plan.to_dict(),
        "timings": result.timings,
        "settings": settings,
        "peak_bytes": result.peak_bytes,
        "notices": result.notices,
    }


def planner(studio: Studio) -> Callable[[str, Json], Json]:
    """The `/plan` endpoint: a family's name and the fields of a request in, the plan out."""

    def plan(family: str, request: Json) -> Json:
        """The memory plan of a request, loading and downloading nothing."""
        try:
            return studio.plan(_unbuilt(family, request, studio.settings.public)).to_dict()
        except Exception as error:
            raise gr.Error(explain(error), print_exception=False) from error

    return plan


def _unbuilt(family: Any, values: Any, public: bool) -> Request:
    name = family.replace("-", "_") if isinstance(family, str) else ""
    if name not in REQUESTS:
        raise InvalidRequest(f"family is {family!r}; it can be {', '.join(REQUESTS)}")
    if not isinstance(values, dict):
        raise InvalidRequest(f"request is {values!r}; it must be an object of request fields")
    known = [field.name for field in fields(REQUESTS[name])]
    for field in values:
        if field not in known:
            raise InvalidRequest(f"request has no field {field!r}; it can have {', '.join(known)}")
    return build(REQUESTS[name], values, public=public)


def plan_in_words(studio: Studio, request_of: Callable[[Sequence[Any]], Request]) -> Callable[..., str]:
    """The plan of what the controls that it depends on ask for, or why there is none."""

    def words(*values: Any) -> str:
        try:
            return memory.picture(studio.plan(request_of(values)))
        except Exception as error:  # noqa: BLE001 (explained on the page, or logged)
            return memory.no_plan(explain(error))

    return words
