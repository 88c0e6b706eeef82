"""The fold for grids in a family's tab: what varies along its sides, what would be made, what was begun."""

from __future__ import annotations

import threading
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from dataclasses import dataclass, field
from html import escape
from statistics import median
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import gradio as gr

from backend import Settings, Studio
from backend.errors import InvalidRequest, StorageError, TriptychError
from backend.events import Event
from backend.grid import Axis, Field, Grid, Unfinished, fields, forget, paint, unfinished
from backend.grid.cells import effort
from backend.grid.kept import key_of
from backend.requests import Request
from ui import forms, i18n
from ui.controls import Controls
from ui.i18n import ENGLISH, Tongue, label
from ui.jobs import Jobs, Work
from ui.visitors import NOBODY, visitor

if TYPE_CHECKING:
    from ui.handlers import Desk

NOTHING = ""  # along the second side
MOST_TYPED = 4000  # characters of values
LOOKED_AT = 40  # pictures, to tell how long others will take
NOT_LOOKED_AT = frozenset(("images",))  # to read pictures at each key takes too long
NOT_THERE = "there is no grid to resume; it is finished, or was forgotten"
QUIET: dict[str, Any] = {"queue": False, "show_progress": "hidden", "api_visibility": "private"}
QUEUED: dict[str, Any] = {**QUIET, "queue": True}  # where the last of several triggers must not be missed

Update = dict[Any, Any]


def titles(t: Tongue = ENGLISH) -> dict[str, str]:
    """What can vary, in words."""
    return {
        "seed": t("Seed"),
        "prompt_words": t("Prompt words"),
        "negative_prompt": t("Negative prompt"),
        "steps": t("Steps"),
        "guidance_scale": t("Guidance"),
        "sampler": t("Sampler"),
        "shift": t("Shift"),
        "skip_layer_guidance_scale": t("Skip-layer guidance"),
        "prior_steps": t("Composition steps"),
        "prior_guidance_scale": t("Composition guidance"),
        "decoder_steps": t("Detail steps"),
        "decoder_guidance_scale": t("Detail guidance"),
        "size": t("Size"),
        "checkpoint": t("Checkpoint"),
        "t5": t("T5"),
        "max_sequence_length": t("Prompt length for T5"),
        "stages": t("Size of both stages"),
        "stage_c": t("Size of Stage C"),
        "stage_b": t("Size of Stage B"),
        "clip_skip": t("CLIP skip"),
        "prefer": t("Memory"),
        "dtype": t("Precision"),
    }


def fold(studio: Studio, family: type[Request]) -> GridFold:
    """The components, where it is called; `connect` brings them to life."""
    known = fields(family.family)
    first = next(name for name in ("steps", "prior_steps") if name in known)
    choices = [(name, value) for value, name in titles().items() if value in known]
    with gr.Accordion(label("Grid"), open=False, elem_classes="grid-fold") as whole:
        with gr.Row(elem_classes="pair"):
            x = gr.Dropdown(choices, value=first, label=label("Across (X)"), filterable=False, min_width=100)
            x_values = _values(known[first].example)
        with gr.Row(elem_classes="pair"):
            rows = [("nothing", NOTHING), *choices]
            y = gr.Dropdown(rows, value=NOTHING, label=label("Down (Y)"), filterable=False, min_width=100)
            y_values = _values("")
        said = gr.HTML(elem_classes="grid-said")
        titled = gr.Checkbox(value=True, label=label("Write the prompt above the pictures"))
        go = gr.Button(label("Paint grid"), elem_classes="grid-go")
        with gr.Column(visible=False, elem_classes="grid-rest") as rest:
            left = gr.HTML()
            with gr.Row(elem_classes="pair"):
                resume = gr.Button(label("Resume"), min_width=100, scale=3)
                drop = gr.Button(label("Forget"), min_width=80, scale=1)
    return GridFold(
        studio, family, whole, x, x_values, y, y_values, titled, said, go, rest, left, resume, drop
    )


def _values(example: str) -> gr.Textbox:
    return gr.Textbox(label=label("Values"), placeholder=example, max_lines=3, min_width=120)


@dataclass(frozen=True)
class GridFold:
    """What is typed into it says which grid; the tab's other controls say of which pictures."""

    studio: Studio
    family: type[Request]
    whole: gr.Accordion
    x: gr.Dropdown
    x_values: gr.Textbox
    y: gr.Dropdown
    y_values: gr.Textbox
    titled: gr.Checkbox
    said: gr.HTML
    paint: gr.Button
    rest: gr.Column
    left: gr.HTML
    resume: gr.Button
    drop: gr.Button
    running: set[str] = field(default_factory=set)  # keys of grids: there is nothing to resume yet

    @property
    def inputs(self) -> list[gr.components.Component]:
        return [self.x, self.x_values, self.y, self.y_values, self.titled]

    @property
    def rests(self) -> list[Any]:
        """What `refresh` fills."""
        return [self.rest, self.left, self.resume]

    @property
    def settings(self) -> Settings:
        return self.studio.settings

    def connect(self, controls: Controls) -> None:
        """What the fold does by itself: tell what would be made, and forget what was begun."""
        looked_at = Controls(
            {name: each for name, each in controls.by_field.items() if name not in NOT_LOOKED_AT}
        )

        def tell(page: gr.Request, *values: Any) -> str:
            count = len(self.inputs)
            request = self._request_of(looked_at, values[count:])
            return self.told(request, values[:count], self._owner(page), i18n.of(page))

        sides: list[Any] = [self.x, self.x_values, self.y, self.y_values]
        asked = [
            *(each.change for each in sides),
            self.x_values.focus,
            self.y_values.focus,
            self.whole.expand,
        ]
        inputs = [*self.inputs, *looked_at.inputs]
        gr.on(asked, tell, inputs, self.said, trigger_mode="always_last", **QUEUED)
        for axis, values in ((self.x, self.x_values), (self.y, self.y_values)):
            axis.input(self.example, axis, values, **QUIET)
        self.whole.expand(self.spoken, None, [self.x, self.y], **QUIET)
        self.whole.expand(self.refresh, None, self.rests, **QUIET)
        self.drop.click(self.forget, None, self.rests, **QUIET)

    # ---- handlers of the buttons, to be queued with the tab's other jobs

    def painter(self, desk: Desk, request_of: Callable[[Sequence[Any]], Request]) -> Callable[..., Any]:
        """Of "Paint grid": values of `inputs`, then of the tab's controls in; updates of the easel out."""

        async def handler(page: gr.Request, *values: Any) -> AsyncIterator[Update]:
            count = len(self.inputs)

            def work_of(owner: str) -> tuple[Work, Request]:
                grid = self.grid_of(request_of(values[count:]), values[:count])
                return self.work(desk.jobs, grid, owner), grid.base

            async for update in desk.paint(page, work_of):
                yield update

        return handler

    def resumer(self, desk: Desk) -> Callable[..., Any]:
        """Of "Resume": nothing in, updates of the easel out."""

        async def handler(page: gr.Request) -> AsyncIterator[Update]:
            def work_of(owner: str) -> tuple[Work, Request]:
                begun = self.begun(owner)
                if begun is None:
                    raise InvalidRequest(NOT_THERE)
                grid = begun.grid()
                return self.work(desk.jobs, grid, owner, begun.key), grid.base

            async for update in desk.paint(page, work_of):
                yield update

        return handler

    def work(self, jobs: Jobs, grid: Grid, owner: str, begun: str = "") -> Work:
        """The job of a grid: its cells are painted as single pictures are. One that was `begun`, by its key,
        is not begun again if it was finished while this job waited."""

        def generate(request: Request, stop: threading.Event, owner: str) -> Iterator[Event]:
            return jobs.paint(request, owner)(stop)

        def run(stop: threading.Event) -> Iterator[Event]:
            if begun and begun not in [each.key for each in self._unfinished(owner)]:
                raise InvalidRequest(NOT_THERE)
            key = key_of(grid, owner)
            self.running.add(key)
            try:
                yield from paint(self.studio, grid, stop, owner, generate)
            finally:
                self.running.discard(key)

        return run

    # ---- what was typed

    def grid_of(self, request: Request, values: Sequence[Any]) -> Grid:
        """The grid that the values of `inputs` ask for. Raises InvalidRequest, or CheckpointError for a name
        that is no checkpoint: after hours it would be too late."""
        x, x_values, y, y_values, titled = values
        axes = [self._axis(x, x_values)]
        if y != NOTHING:
            axes.append(self._axis(y, y_values))
        grid = Grid(request, *axes, titled=titled is not False)
        if self.settings.public:
            grid.check_public()
        for name in dict.fromkeys(cell.request.checkpoint for cell in grid.cells()):
            self.studio.describe(self.family.family, name)
        return grid

    def _axis(self, name: Any, typed: Any) -> Axis:
        typed = typed or ""  # Gradio has null for a field that was never touched
        if not isinstance(typed, str) or len(typed) > MOST_TYPED:
            raise InvalidRequest(
                f"the values are {typed!r:.80}; they can be text of up to {MOST_TYPED} characters"
            )
        return Axis.parse(self.family.family, str(name), typed)

    def told(self, request: Request | TriptychError, values: Sequence[Any], owner: str, t: Tongue) -> str:
        """What would be made, or how to go on, or what is wrong."""
        known = fields(self.family.family)
        for name, typed in (values[0:2], values[2:4]):
            if isinstance(name, str) and name in known and not str(typed or "").strip():
                return _said(hint(known[name], t))
        try:
            if isinstance(request, TriptychError):
                raise request
            grid = self.grid_of(request, values)
        except TriptychError as error:
            return _said(t.told(str(error)), wrong=True)
        count = t("1 picture") if grid.count == 1 else t("{n} pictures", n=grid.count)
        if grid.y is not None:
            count = t("{pictures}, {columns} × {rows}", pictures=count, columns=grid.columns, rows=grid.rows)
        if (left := self.duration(grid, owner)) is not None:
            count = t("{pictures}, in about {time}", pictures=count, time=roughly(left, t))
        return _said(count)

    def duration(self, grid: Grid, owner: str) -> float | None:
        """Seconds that it will take, going by the newest pictures of its checkpoint; None without any."""
        try:
            entries = self.studio.gallery.entries(limit=LOOKED_AT, owner=owner or None)
        except StorageError:
            return None
        facts = [entry.facts for entry in entries]
        pace = [
            each["timings"]["total"] / each.get("num_images", 1) / effort(SimpleNamespace(**each))
            for each in facts
            if (each.get("family"), each.get("checkpoint")) == (self.family.family, grid.base.checkpoint)
            and "total" in each.get("timings", {})
            and "grid" not in each
        ]
        return median(pace) * sum(effort(cell.request) for cell in grid.cells()) if pace else None

    # ---- what was begun

    def begun(self, owner: str) -> Unfinished | None:
        """The newest grid of this family that its owner has not finished."""
        return next(iter(self._unfinished(owner)), None)

    def refresh(self, page: gr.Request) -> list[Any]:
        """Updates of `rests`: the offer to go on with what was begun."""
        t, begun = i18n.of(page), self.begun(self._owner(page))
        if begun is None:
            return [gr.update(visible=False), "", gr.skip()]
        button = t("Resume ({done} of {all})", done=begun.done, all=begun.cells)
        return [gr.update(visible=True), unfinished_line(begun, t), gr.update(value=button)]

    def forget(self, page: gr.Request) -> list[Any]:
        """Let go of what `refresh` has shown; its pictures stay."""
        owner = self._owner(page)
        if begun := self.begun(owner):
            forget(self.settings.home, begun.key, owner)
        return self.refresh(page)

    # ---- small things

    def example(self, name: Any) -> Any:
        """What can be typed for a field."""
        known = fields(self.family.family).get(name) if isinstance(name, str) else None
        return gr.update(placeholder=known.example if known else "")

    def spoken(self, page: gr.Request) -> list[Any]:
        """The choices in the visitor's language."""
        t, known = i18n.of(page), fields(self.family.family)
        choices = [(name, value) for value, name in titles(t).items() if value in known]
        return [gr.update(choices=choices), gr.update(choices=[(t("nothing"), NOTHING), *choices])]

    def _unfinished(self, owner: str) -> list[Unfinished]:
        if self.settings.public and owner in ("", NOBODY):
            return []
        found = unfinished(self.settings.home, self.family.family, owner)
        return [each for each in found if each.key not in self.running]

    def _owner(self, page: gr.Request) -> str:
        return visitor(page, self.settings).owner(self.settings)

    def _request_of(self, controls: Controls, values: Sequence[Any]) -> Request | TriptychError:
        try:
            return forms.build_shown(self.family, controls.fields(values), public=self.settings.public)
        except TriptychError as error:
            return error


# ---- in words


def hint(known: Field, t: Tongue = ENGLISH) -> str:
    """What can be typed."""
    if known.name == "prompt_words":
        return t("The first is what stands in the prompt; the others take its place.")
    match known.kind:
        case "whole" | "number":
            return t("One after the other, or a range: 10-30 (+5) goes in steps of 5, 1-10 [4] gives four.")
        case "choice":
            return t("Some of these: {names}", names=", ".join(known.choices.values()))
        case "size":
            return t("Width x height in pixels, one after the other.")
        case _:
            return t("One after the other, with commas between; quotes can hold a comma.")


def roughly(value: float, t: Tongue = ENGLISH) -> str:
    """A time that is guessed."""
    if value < 10:
        return t("a few seconds")
    if value < 100:
        return t("{n} s", n=round(value / 5) * 5)
    return t("{n} min", n=round(value / 60)) if value < 6000 else t("{n} h", n=f"{value / 3600:.1f}")


def unfinished_line(begun: Unfinished, t: Tongue = ENGLISH) -> str:
    names = " × ".join(titles(t).get(name, name) for name in begun.axes)
    prompt = begun.prompt if len(begun.prompt) <= 60 else f"{begun.prompt[:59]}…"
    quoted = f" <q>{escape(prompt)}</q>" if prompt else ""
    return f"<p>{escape(t('Not finished: {axes}', axes=names))}{quoted}</p>"


def _said(text: str, *, wrong: bool = False) -> str:
    return f'<p class="{"problem" if wrong else "plain"}">{escape(text)}</p>'
