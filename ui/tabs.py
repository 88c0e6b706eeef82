"""The tabs, one a family: the same areas (ask; stage and below; about; tune), wired to the same handlers."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import gradio as gr

from backend import catalog
from backend.errors import TriptychError
from backend.requests import Request, SD3Request, SD15Request, StableCascadeRequest
from backend.studio import CheckpointInfo
from ui import controls, handlers, prices, render
from ui.controls import CUSTOM, Controls
from ui.handlers import Easel
from ui.jobs import Jobs

# One request at a time, whichever way it came.
DEVICE: dict[str, Any] = {"concurrency_id": "device", "concurrency_limit": 1}
QUIET: dict[str, Any] = {"queue": False, "show_progress": "hidden", "api_visibility": "private"}
EXAMPLES = 4  # shown at once
PLACED = json.dumps(render.starting())
STARTING = f"() => {PLACED}"
WAIT = "() => new Promise((done) => setTimeout(done, 500))"
LAST = json.dumps(render.starting("Stopping…"))
STOPPING = f"(shown) => shown.includes({json.dumps(render.BUSY)}) ? {LAST} : shown"
STOPPED = f"(shown) => shown === {LAST} ? {json.dumps(render.stopped())} : shown"
REFUSED = json.dumps(render.failed("Not begun: the note in the corner of the page says why."))
UNHEARD = f"(shown) => shown === {PLACED} ? {REFUSED} : shown"  # a stopped run has failed, too
AT_REST = f"(shown) => shown.replace({json.dumps(render.BUSY)}, {json.dumps(render.IDLE)})"  # preview stays
PLANNED_BY = frozenset(
    (
        *("checkpoint", "config_from", "width", "height", "num_images", "dtype", "prefer"),
        *("guidance_scale", "prior_guidance_scale", "decoder_guidance_scale", "skip_layer_guidance_scale"),
        *("t5", "max_sequence_length"),
        *("stage_c", "stage_b", "images"),
    )
)


Fields = dict[str, gr.components.Component]


def sd15(jobs: Jobs) -> None:
    """Stable Diffusion 1.5."""
    _tab(jobs, SD15Request, controls.sampling, lambda own: controls.sampler("sd15", own["sampler"]))


def sd3(jobs: Jobs) -> None:
    """Stable Diffusion 3 and 3.5."""

    def choices(own: Mapping[str, Any]) -> Fields:
        return controls.t5() | controls.sampler("sd3", own["sampler"]) | controls.flow(own)

    _tab(jobs, SD3Request, controls.sampling, choices)


def stable_cascade(jobs: Jobs) -> None:
    """Stable Cascade."""

    def images() -> Fields:
        return {"images": controls.image_prompts()}

    _tab(jobs, StableCascadeRequest, controls.stage_sampling, lambda _: controls.stage_sizes(), images)


# The page opens on the first: the one that is loaded beforehand and paints fastest.
TABS: tuple[Callable[[Jobs], None], ...] = (sd15, sd3, stable_cascade)


def _tab(
    jobs: Jobs,
    family: type[Request],
    sampling: Callable[[Mapping[str, Any]], Fields],
    choices: Callable[[Mapping[str, Any]], Fields],
    further: Callable[[], Fields] = dict,
) -> None:
    """A family's tab. Of its own are the controls that these make of the demo's defaults: `sampling`, the
    `choices` in the Advanced fold, and what it asks `further` beside the prompts."""
    info = jobs.studio.describe(family.family, "demo")
    with gr.Tab(catalog.FAMILIES[family.family].title, id=family.family), gr.Row(elem_classes="studio"):
        fields, generate, stop = _ask(further)
        easel, again = _side()
        about = _about(family, info)
        with gr.Column(elem_classes="tune"):
            shape, size = controls.size_and_shape(info.defaults, family.size_multiple)
            fields |= size | sampling(info.defaults)
            random, reuse, seeds = controls.seed_and_count()
            fields |= seeds
            with gr.Accordion("Advanced", open=False):
                fields["checkpoint"] = controls.checkpoint(jobs.studio.catalogue(family.family))
                fields |= choices(info.defaults) | controls.advanced()
    sheet = Sheet(jobs, family, Controls(fields), easel, shape, about, tuple(info.defaults))
    sheet.connect(Buttons(generate, stop, random, reuse, again))


# ---- areas


@dataclass(frozen=True)
class Buttons:
    generate: gr.Button
    stop: gr.Button
    random: gr.Button
    reuse: gr.Button
    again: gr.Button


@dataclass(frozen=True)
class About:
    """What is said of the checkpoint: prompts to try, and what it is."""

    examples: gr.HTML
    note: gr.HTML

    @staticmethod
    def of(family: type[Request], info: CheckpointInfo) -> tuple[str, str]:
        known, full = info.vocabulary, catalog.published(family.family)
        entry = catalog.entry(family.family, info.name)
        page = entry.url if entry else None
        note = render.vocabulary(known, full) if known else render.licence(info.title, info.licence, page)
        return render.examples(info.examples[:EXAMPLES]), note


def _ask(further: Callable[[], Fields]) -> tuple[Fields, gr.Button, gr.Button]:
    """The prompts, what else `further` makes to ask with, and the buttons."""
    with gr.Column(elem_classes="ask"):
        fields = controls.prompts() | further()
        with gr.Row(elem_classes="actions"):
            generate = gr.Button("Generate", variant="primary", elem_classes="generate", scale=3)
            stop = gr.Button("Stop", elem_classes="stop", scale=1, min_width=80)
    return fields, generate, stop


def _side() -> tuple[Easel, gr.Button]:
    """The stage, and the plan below it."""
    with gr.Column(elem_classes="side"):
        with gr.Column(elem_classes="stage"):
            canvas = gr.HTML(render.idle())
            status = gr.HTML(render.ready(), elem_classes="status-line")
            with gr.Row(elem_classes="kept"):
                files = gr.HTML(elem_classes="files-line")
                again = gr.Button("Reuse these settings", size="sm", scale=0, elem_classes="again")
        with gr.Column(elem_classes="below"):
            plan, last = gr.HTML(), gr.State(None)  # not beside the tabs: Gradio would count it as one
    return Easel(canvas, status, files, plan, last), again


def _about(family: type[Request], info: CheckpointInfo) -> About:
    examples, note = About.of(family, info)
    with gr.Column(elem_classes="about"):
        return About(gr.HTML(examples), gr.HTML(note))


# ---- wiring


@dataclass(frozen=True)
class Sheet:
    """A tab's components and what connects them; nothing here knows which family it is.

    `defaults` are the fields that a checkpoint has its own values of.
    """

    jobs: Jobs
    family: type[Request]
    controls: Controls
    easel: Easel
    shape: gr.Radio
    about: About
    defaults: tuple[str, ...]

    def connect(self, buttons: Buttons) -> None:
        self._connect_painting(buttons)
        self._connect_reuse(buttons)
        self._connect_shape()
        self._connect_checkpoint()
        self._connect_plan()

    def _connect_painting(self, buttons: Buttons) -> None:
        status, canvas = self.easel.status, self.easel.canvas
        buttons.generate.click(None, None, status, js=STARTING, **QUIET)
        run = buttons.generate.click(
            handlers.painter(self.jobs, self.easel, self.request),
            self.controls.inputs,
            self.easel.outputs,
            show_progress="minimal",
            show_progress_on=status,
            api_visibility="private",
            **DEVICE,
        )
        # A full queue, or an upload that is gone: nothing of ours ran that could end the progress line.
        run.failure(None, status, status, js=UNHEARD, **QUIET)
        stopping = buttons.stop.click(None, status, status, js=STOPPING, cancels=[run], **QUIET)
        # Once more when whatever was on its way has arrived: it would stand there for good.
        arrived = stopping.then(None, js=WAIT, **QUIET)
        again = arrived.then(None, status, status, js=STOPPING, cancels=[run], **QUIET)
        # Gradio forgets a run that it cancels before the server named it, and that one goes on: ours ends it.
        ended = again.then(handlers.stopper(self.jobs, self.family), **QUIET)
        ended.then(None, status, status, js=STOPPED, **QUIET)
        ended.then(None, canvas, canvas, js=AT_REST, **QUIET)

    def _connect_reuse(self, buttons: Buttons) -> None:
        last, seed = self.easel.last, self._field("seed")
        outputs = [self.about.examples, self.about.note, self.shape, *self.controls.inputs]
        buttons.random.click(None, None, seed, js="() => ''", **QUIET)
        buttons.reuse.click(_last_seed, [last, seed], seed, **QUIET)
        buttons.again.click(self.reuse, last, outputs, **QUIET)

    def _connect_shape(self) -> None:
        sides = [self._field("width"), self._field("height")]
        self.shape.input(self.fit, [self.shape, self._field("checkpoint"), *sides], sides, **QUIET)
        for side in sides:
            side.input(None, None, self.shape, js=f"() => {json.dumps(CUSTOM)}", **QUIET)

    def _connect_checkpoint(self) -> None:
        choice = self._field("checkpoint")
        own = [self._field(name) for name in self.defaults]
        outputs = [self.about.examples, self.about.note, self.shape, *own]
        choice.input(self.choose, choice, outputs, **QUIET)  # not on change: reused settings are not defaults
        if sampler := self.controls.by_field.get("sampler"):
            gr.on(sampler.change, self.sampler_info, sampler, sampler, **QUIET)  # pyright: ignore

    def _connect_plan(self) -> None:
        self._plan(handlers.plan_in_words, PLANNED_BY, self.easel.plan)
        if t5 := self.controls.by_field.get("t5"):
            self._plan(prices.teller, PLANNED_BY - {"t5"}, t5)

    def _plan(self, of: Callable[..., Callable[..., Any]], by: Collection[str], output: Any) -> None:
        """Tell in `output` what `of` makes of the studio and of a request."""
        chosen = Controls({name: each for name, each in self.controls.by_field.items() if name in by})

        def request(values: Sequence[Any]) -> Request:
            return handlers.build_shown(self.family, chosen.fields(values))

        gr.on(
            None,  # when the page loads, and on every change of these
            of(self.jobs.studio, request),
            chosen.inputs,
            output,
            trigger_mode="always_last",
            show_progress="hidden",
            api_visibility="private",
        )

    def _field(self, name: str) -> Any:
        return self.controls.by_field[name]

    def request(self, values: Sequence[Any]) -> Request:
        """The request that the controls' values ask for."""
        return handlers.build_shown(self.family, self.controls.fields(values))

    def sampler_info(self, name: str) -> Any:
        return gr.update(info=controls.sampler_note(self.family.family, name))

    def fit(self, shape: str, checkpoint: str, width: int, height: int) -> tuple[int, int]:
        """The size of a shape; the size as it is for a custom one, or a checkpoint that is not known."""
        native = self._native(checkpoint)
        return (width, height) if shape == CUSTOM or native is None else self._fitted(shape, native)

    def choose(self, checkpoint: str) -> list[Any]:
        """What a checkpoint brings along: examples, note, square shape and its own settings."""
        info, about = self._describe(checkpoint)
        if info is None:
            return [*about, *[gr.skip()] * (1 + len(self.defaults))]
        return [*about, "1:1", *(info.defaults.get(name, gr.skip()) for name in self.defaults)]

    def reuse(self, last: dict[str, Any] | None) -> list[Any]:
        """Everything as it was for the last picture."""
        if last is None:
            return [gr.skip()] * (3 + len(self.controls.inputs))
        _, about = self._describe(last["checkpoint"])
        native = self._native(last["checkpoint"])
        size = last["width"], last["height"]
        shapes = [shape for shape in controls.SHAPES if native and self._fitted(shape, native) == size]
        shape = shapes[0] if shapes else CUSTOM  # the first is the square
        return [*about, shape, *self.controls.filled(last)]

    def _fitted(self, shape: str, native: tuple[int, int]) -> tuple[int, int]:
        return controls.fit(shape, native, self.family.size_multiple)

    def _native(self, checkpoint: str) -> tuple[int, int] | None:
        info, _ = self._describe(checkpoint)
        width, height = (info.defaults.get(side) if info else None for side in ("width", "height"))
        return (width, height) if width and height else None

    def _describe(self, checkpoint: str) -> tuple[CheckpointInfo | None, tuple[str, str]]:
        """What is known of a checkpoint, and the examples and the note of it; a note of what is wrong."""
        try:
            info = self.jobs.studio.describe(self.family.family, checkpoint)
        except TriptychError as error:
            return None, ("", render.problem(str(error)))
        return info, About.of(self.family, info)


def _last_seed(last: dict[str, Any] | None, current: str) -> str:
    return str(last["seed"]) if last else current
