"""The endpoints for other programs: one a family, with the fields of its request as parameters."""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import AsyncIterator, Callable
from contextlib import aclosing
from dataclasses import fields
from pathlib import Path
from typing import Any, get_type_hints

import gradio as gr
from gradio.data_classes import FileData

from backend import Studio
from backend.events import Event, Finished, Loading, Result, Step, Waiting
from backend.requests import Request
from ui import forms
from ui.handlers import client_of, explain
from ui.jobs import Jobs
from ui.manual import describe
from ui.visitors import visitor

Json = dict[str, Any]


def endpoint(jobs: Jobs, family: type[Request]) -> Callable[..., Any]:
    """The `gr.api` function of a family: its parameters are the fields of the request, with their defaults.

    Streams `([], {phase, step, steps, eta_s})`, ends with `(PNG files, {seeds, plan, timings, …})`.
    """

    settings = jobs.studio.settings

    async def serve(page: gr.Request, *values: Any) -> AsyncIterator[tuple[list[Json], Json]]:
        progress = _progress("starting")
        try:
            given = dict(zip(parameters, values, strict=True))
            request = await asyncio.to_thread(forms.build, family, given, public=settings.public)
            who = visitor(page, settings)
            work, client = jobs.paint(request, who.owner(settings)), client_of(who, page, settings)
            async with aclosing(jobs.events(work, request, client=client)) as events:
                async for news in events:
                    if isinstance(news.event, Finished):
                        yield _files(news.event.result), _facts(news.event.result)
                        return  # what is yielded last is the answer, and the job's end is news, too
                    if news.job.state == "waiting" and (place := jobs.place(news.job)):
                        progress = _progress("waiting", 0, place)
                    else:
                        progress = _told(news.event) or progress
                    yield [], progress
        except Exception as error:
            raise gr.Error(explain(error, settings), print_exception=False) from error

    parameters, asker = _parameters(family), inspect.Parameter("page", _EITHER, annotation=gr.Request)
    returns = tuple[list[Json], Json]
    serve.__signature__ = inspect.Signature([asker, *parameters.values()], return_annotation=returns)
    annotations = {name: each.annotation for name, each in parameters.items()}
    serve.__annotations__ = {"page": gr.Request, **annotations, "return": returns}
    serve.__name__ = family.family
    serve.__doc__ = describe(family)
    return serve


_EITHER = inspect.Parameter.POSITIONAL_OR_KEYWORD


def _parameters(family: type[Request]) -> dict[str, inspect.Parameter]:
    types = get_type_hints(family)
    return {
        each.name: inspect.Parameter(each.name, _EITHER, default=each.default, annotation=types[each.name])
        for each in fields(family)
    }


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
        """The memory plan of a request, loading and downloading nothing.

        Parameters:
            family: sd15, sd3 or stable_cascade.
            request: Parameters of the endpoint of that name.
        """
        try:
            return studio.plan(forms.named(family, request, studio.settings.public)).to_dict()
        except Exception as error:
            raise gr.Error(explain(error, studio.settings), print_exception=False) from error

    return plan
