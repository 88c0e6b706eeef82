"""The tabs, one a family: the same areas (ask; stage and below; about; tune), wired to the same handlers."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import gradio as gr
from gradio.events import Dependency

from backend import catalog
from backend.errors import TriptychError
from backend.requests import Request, SD3Request, SD15Request, StableCascadeRequest
from backend.studio import CheckpointInfo
from backend.weights import local
from ui import adapters, checkpoints, controls, forms, handlers, i18n, prices, render
from ui.adapters import AdapterFold
from ui.controls import CUSTOM, Controls
from ui.grid import GridFold, fold
from ui.handlers import Desk, Easel, Update
from ui.i18n import ENGLISH, Tongue, label
from ui.jobs import Jobs, Work

# A page listens for as long as its jobs last: the queue is ours, and Gradio's is not to hold it up.
LISTENING: dict[str, Any] = {
    "concurrency_limit": None,
    "api_visibility": "private",
    "show_progress": "hidden",
}
QUIET: dict[str, Any] = {"queue": False, "show_progress": "hidden", "api_visibility": "private"}
PLANNING: dict[str, Any] = {
    "trigger_mode": "always_last",
    "show_progress": "hidden",
    "api_visibility": "private",
}
EXAMPLES = 4  # shown at once
STARTING = f"(shown) => {json.dumps(render.starting())}"


def _refused(t: Tongue) -> str:
    return render.failed(t("Not begun: the note in the corner of the page says why."))


REFUSED = {code: _refused(i18n.tongue(code)) for code in i18n.LANGUAGES}
UNHEARD = f"""(shown) => {{
  const refused = {json.dumps(REFUSED)};
  const spoken = refused[document.documentElement.lang.slice(0, 2)] ?? refused.en;
  return shown === {json.dumps(render.starting())} ? spoken : shown;
}}"""
# A click on one of the buttons in the tab's list of jobs.
CLICKED = """element.addEventListener('click', (event) => {
  const button = event.target.closest('button[data-cancel], button[data-show]');
  if (button) trigger('click', {...button.dataset});
});"""
# Kept in the browser once the page has been filled with what was kept before.
KEEP = """(...values) => {
  const kept = values.pop();
  const names = %s;
  return window.triptychReady?.has(%s) ? Object.fromEntries(names.map((name, n) => [name, values[n]])) : kept;
}"""
READY = "() => { (window.triptychReady ??= new Set()).add(%s); }"
# What was kept, the first time that the tab is seen: before, its components are not there to be filled.
ONCE = "(kept) => window.triptychReady?.has(%s) ? null : kept"
PLANNED_BY = frozenset(
    (
        *("checkpoint", "config_from", "width", "height", "num_images", "dtype", "prefer"),
        *("prompt", "raw_prompt"),  # as far as it names LoRAs
        *("guidance_scale", "prior_guidance_scale", "decoder_guidance_scale", "skip_layer_guidance_scale"),
        *("t5", "max_sequence_length"),
        *("stage_c", "stage_b", "images"),
    )
)
NOT_KEPT = frozenset(("images",))  # uploads do not outlive the server


Fields = dict[str, gr.components.Component]


def sd15(jobs: Jobs) -> Sheet:
    """Stable Diffusion 1.5."""
    return _tab(jobs, SD15Request, controls.sampling, lambda own: controls.sampler("sd15", own["sampler"]))


def sd3(jobs: Jobs) -> Sheet:
    """Stable Diffusion 3 and 3.5."""

    def choices(own: Mapping[str, Any]) -> Fields:
        return controls.t5() | controls.sampler("sd3", own["sampler"]) | controls.flow(own)

    return _tab(jobs, SD3Request, controls.sampling, choices)


def stable_cascade(jobs: Jobs) -> Sheet:
    """Stable Cascade."""

    def images() -> Fields:
        return {"images": controls.image_prompts()}

    return _tab(jobs, StableCascadeRequest, controls.stage_sampling, lambda _: controls.stage_sizes(), images)


# The page opens on the first: the one that is loaded beforehand and paints fastest.
TABS: tuple[Callable[[Jobs], Sheet], ...] = (sd15, sd3, stable_cascade)


def _tab(
    jobs: Jobs,
    family: type[Request],
    sampling: Callable[..., Fields],
    choices: Callable[[Mapping[str, Any]], Fields],
    further: Callable[[], Fields] = dict,
) -> Sheet:
    """A family's tab. Of its own are the controls that these make of the demo's defaults: `sampling`, the
    `choices` in the Advanced fold, and what it asks `further` beside the prompts."""
    info, strangers = jobs.studio.describe(family.family, "demo"), jobs.public
    title = catalog.FAMILIES[family.family].title
    with gr.Tab(title, id=family.family) as opened, gr.Row(elem_classes="studio"):
        fields, generate, stop = _ask(further)
        easel, again = _side()
        about = _about(family, info, strangers=strangers)
        with gr.Column(elem_classes="tune"):
            shape, size = controls.size_and_shape(info.defaults, family.size_multiple)
            fields |= size | sampling(info.defaults, strangers=strangers)
            random, reuse, seeds = controls.seed_and_count(strangers=strangers)
            fields |= seeds
            small = adapters.fold(jobs.studio.settings, family.family)
            with gr.Accordion(label("Advanced"), open=False):
                names = local.choices(jobs.studio.settings, family.family)
                fields["checkpoint"] = controls.checkpoint(names, strangers=strangers)
                fields |= choices(info.defaults) | controls.advanced(strangers=strangers)
            grid = fold(jobs.studio, family)
        kept = gr.BrowserState({}, storage_key=f"triptych-{family.family}", secret="triptych")
    desk = Desk(jobs, family, easel)
    sheet = Sheet(desk, Controls(fields), shape, about, small, grid, kept, opened, tuple(info.defaults))
    sheet.connect(Buttons(generate, stop, random, reuse, again))
    return sheet


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
    def of(
        family: type[Request],
        info: CheckpointInfo,
        t: Tongue = ENGLISH,
        *,
        strangers: bool = False,
        lacking: int = 0,
    ) -> tuple[str, str]:
        known, full = info.vocabulary, catalog.published(family.family)
        entry = catalog.entry(family.family, info.name)
        page = entry.url if entry else None
        told = render.licence(info.title, info.licence, page, t, lacking=lacking)
        note = render.vocabulary(known, full, t, strangers=strangers) if known else told
        return render.examples(info.examples[:EXAMPLES], t), note


def _ask(further: Callable[[], Fields]) -> tuple[Fields, gr.Button, gr.Button]:
    """The prompts, what else `further` makes to ask with, and the buttons."""
    with gr.Column(elem_classes="ask"):
        fields = controls.prompts() | further()
        with gr.Row(elem_classes="actions"):
            generate = gr.Button(label("Generate"), variant="primary", elem_classes="generate", scale=3)
            stop = gr.Button(label("Stop"), elem_classes="stop", scale=1, min_width=80)
    return fields, generate, stop


def _side() -> tuple[Easel, gr.Button]:
    """The stage, and the plan below it."""
    with gr.Column(elem_classes="side"):
        with gr.Column(elem_classes="stage"):
            canvas = gr.HTML(render.idle())
            status = gr.HTML(render.ready(), elem_classes="status-line")
            with gr.Row(elem_classes="kept"):
                files = gr.HTML(elem_classes="files-line")
                again = gr.Button(label("Reuse these settings"), size="sm", scale=0, elem_classes="again")
            jobs = gr.HTML(js_on_load=CLICKED, elem_classes="jobs-line")
        with gr.Column(elem_classes="below"):
            plan, last = gr.HTML(), gr.State(None)  # not beside the tabs: Gradio would count it as one
    return Easel(canvas, status, files, plan, jobs, last), again


def _about(family: type[Request], info: CheckpointInfo, *, strangers: bool) -> About:
    examples, note = About.of(family, info, strangers=strangers)
    with gr.Column(elem_classes="about"):
        return About(gr.HTML(examples), gr.HTML(note))


# ---- wiring


@dataclass(frozen=True)
class Sheet:
    """A tab's components and what connects them; nothing here knows which family it is.

    `kept` are the settings that the browser remembers, `opened` is the tab itself, `defaults` the fields that
    a checkpoint has its own values of.
    """

    desk: Desk
    controls: Controls
    shape: gr.Radio
    about: About
    adapters: AdapterFold
    grid: GridFold
    kept: gr.BrowserState
    opened: gr.Tab
    defaults: tuple[str, ...]

    @property
    def jobs(self) -> Jobs:
        return self.desk.jobs

    @property
    def family(self) -> type[Request]:
        return self.desk.family

    @property
    def easel(self) -> Easel:
        return self.desk.easel

    @property
    def settings_outputs(self) -> list[Any]:
        """What `filled` fills."""
        return [self.about.examples, self.about.note, self.shape, *self.controls.inputs, self.kept]

    def connect(self, buttons: Buttons) -> None:
        self._connect_painting(buttons)
        self.adapters.connect(self.controls)
        self._connect_grid()
        self._connect_reuse(buttons)
        self._connect_shape()
        self._connect_checkpoint()
        self._connect_plan()
        self._connect_kept()

    def _connect_painting(self, buttons: Buttons) -> None:
        self._queue(buttons.generate, self.paint, self.controls.inputs)
        buttons.stop.click(self.desk.stop, **QUIET)
        self.easel.jobs.click(self.desk.clicked, None, self.easel.outputs, **QUIET)

    def _connect_grid(self) -> None:
        grid, inputs = self.grid, [*self.grid.inputs, *self.controls.inputs]
        grid.connect(self.controls)
        for run in (
            self._queue(grid.paint, grid.painter(self.desk, self.request), inputs),
            self._queue(grid.resume, grid.resumer(self.desk), []),
        ):
            run.then(grid.refresh, None, grid.rests, **QUIET)

    def _queue(self, button: gr.Button, handler: Callable[..., Any], inputs: list[Any]) -> Dependency:
        """A button that puts work into the queue, and shows what comes of it."""
        status = self.easel.status
        button.click(None, status, status, js=STARTING, **QUIET)
        run = button.click(handler, inputs, self.easel.outputs, trigger_mode="multiple", **LISTENING)
        # A full queue of Gradio's, or an upload that is gone: nothing of ours ran that could tell.
        run.failure(None, status, status, js=UNHEARD, **QUIET)
        return run

    def _connect_reuse(self, buttons: Buttons) -> None:
        last, seed = self.easel.last, self._field("seed")
        buttons.random.click(None, None, seed, js="() => ''", **QUIET)
        buttons.reuse.click(_last_seed, [last, seed], seed, **QUIET)
        buttons.again.click(self.reuse, last, self.settings_outputs, **QUIET)

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
        choice.focus(self.checkpoints, None, choice, **QUIET)  # what was put into the folder meanwhile
        sampler: Any = self.controls.by_field.get("sampler")
        if sampler is not None:
            gr.on(sampler.change, self.sampler_info, sampler, sampler, **QUIET)

    def _connect_plan(self) -> None:
        """On every change of what the plan depends on; `load` asks for the first."""
        for handler, inputs, output in self._plans:
            gr.on([each.change for each in inputs], handler, inputs, output, **PLANNING)

    @property
    def _plans(self) -> list[tuple[Callable[..., Any], list[Any], Any]]:
        """What is told before anything loads: handler, inputs and output of each."""
        plans = [self._plan(handlers.plan_in_words, PLANNED_BY, self.easel.plan)]
        if t5 := self.controls.by_field.get("t5"):
            plans.append(self._plan(prices.teller, PLANNED_BY - {"t5"}, t5))
        return plans

    def _plan(
        self, of: Callable[..., Callable[..., Any]], by: Collection[str], output: Any
    ) -> tuple[Callable[..., Any], list[Any], Any]:
        """Tells in `output` what `of` makes of the studio and of a request; of the prompt it has the tags."""
        known = {**self.controls.by_field, "prompt": self.adapters.named}
        chosen = Controls({name: each for name, each in known.items() if name in by})

        def request(values: Sequence[Any]) -> Request:
            return forms.build_shown(self.family, chosen.fields(values), public=self.jobs.public)

        return of(self.jobs.studio, request), [*chosen.inputs], output

    def _connect_kept(self) -> None:
        """Remember the settings in the browser, from when they have been filled in."""
        lasting: list[Any] = [*self._lasting.values()]
        changes = [each.change for each in lasting]
        gr.on(changes, None, [*lasting, self.kept], self.kept, js=self._keep, **QUIET)

    @property
    def _lasting(self) -> Fields:
        return {name: each for name, each in self.controls.by_field.items() if name not in NOT_KEPT}

    @property
    def _keep(self) -> str:
        return KEEP % (json.dumps([*self._lasting]), json.dumps(self.family.family))

    def load(self, seen: Callable[..., Dependency]) -> None:
        """When the tab is seen: at first its language and the settings as they were, then always its jobs."""
        easel, name = self.easel, json.dumps(self.family.family)
        outputs = [easel.canvas, easel.status, *self.settings_outputs]
        filled = seen(self.greet, self.kept, outputs, js=ONCE % name, **QUIET)
        ready = filled.then(None, js=READY % name, **QUIET)
        typed = [*self._lasting.values(), self.kept]  # it may have been while the page came
        ready.then(None, typed, self.kept, js=self._keep, **QUIET)
        for handler, inputs, output in self._plans:
            filled.then(handler, inputs, output, **PLANNING)
        filled.then(self.desk.watch, None, easel.outputs, **LISTENING)

    def _field(self, name: str) -> Any:
        return self.controls.by_field[name]

    # ---- handlers

    async def paint(self, page: gr.Request, *values: Any) -> AsyncIterator[Update]:
        """The Generate button: values of the controls in, updates of the easel out."""

        def work(owner: str) -> tuple[Work, Request]:
            request = self.request(values)  # it may hold pictures to read
            return self.jobs.paint(request, owner), request

        async for update in self.desk.paint(page, work):
            yield update

    def request(self, values: Sequence[Any]) -> Request:
        """The request that the controls' values ask for."""
        return forms.build_shown(self.family, self.controls.fields(values), public=self.jobs.public)

    def sampler_info(self, name: str, page: gr.Request) -> Any:
        return gr.update(info=controls.sampler_note(self.family.family, name, i18n.of(page)))

    def checkpoints(self) -> Any:
        return gr.update(choices=local.choices(self.jobs.studio.settings, self.family.family))

    def fit(self, shape: str, checkpoint: str, width: int, height: int) -> tuple[int, int]:
        """The size of a shape; the size as it is for a custom one, or a checkpoint that is not known."""
        native = self._native(checkpoint)
        known = shape in controls.SHAPES and native is not None
        return self._fitted(shape, native) if known and native else (width, height)

    def choose(self, checkpoint: str, page: gr.Request) -> list[Any]:
        """What a checkpoint brings along: examples, note, square shape and its own settings."""
        info, about = self._describe(checkpoint, i18n.of(page))
        if info is None:
            return [*about, *[gr.skip()] * (1 + len(self.defaults))]
        return [*about, "1:1", *(info.defaults.get(name, gr.skip()) for name in self.defaults)]

    def reuse(self, last: dict[str, Any] | None, page: gr.Request) -> list[Any]:
        """Everything as it was for the last picture."""
        if last is None:
            return [gr.skip()] * len(self.settings_outputs)
        return self.filled(last, i18n.of(page))

    def filled(self, settings: Mapping[str, Any], t: Tongue) -> list[Any]:
        """Updates of `settings_outputs` that ask for the same pictures; what settings do not tell stays."""
        checkpoint = settings.get("checkpoint")
        about: tuple[Any, Any] = (gr.skip(), gr.skip())
        shape: Any = gr.skip()
        if "width" in settings and "height" in settings:
            native = self._native(str(checkpoint)) if checkpoint else None
            size = settings["width"], settings["height"]
            fitting = (name for name in controls.SHAPES if native and self._fitted(name, native) == size)
            shape = next(fitting, CUSTOM)  # the first is the square
        if checkpoint:
            _, about = self._describe(str(checkpoint), t)
        values = dict(zip(self.controls.by_field, self.controls.filled(dict(settings)), strict=True))
        kept = {name: value for name, value in values.items() if name in self._lasting and value != gr.skip()}
        return [*about, shape, *values.values(), kept]

    def greet(self, kept: Any, page: gr.Request) -> list[Any]:
        """The canvas, the progress line and the settings as the browser kept them, in its language."""
        if kept is None:
            return [gr.skip()] * (2 + len(self.settings_outputs))
        t = i18n.of(page)
        settings = self.controls.sound(kept)
        _, about = self._describe(settings.get("checkpoint", "demo"), t)
        updates = self.filled(settings, t) if settings else [gr.skip()] * len(self.settings_outputs)
        names = ["examples", "note", "shape", *self.controls.by_field, "kept"]
        filled = dict(zip(names, updates, strict=True))
        filled["examples"], filled["note"] = about
        choices: dict[str, Any] = {"shape": controls.shapes(t), **controls.choices(self.family.family, t)}
        for name, rows in choices.items():
            if name in filled and t is not ENGLISH:
                filled[name] = _with(filled[name], choices=rows)
        if "sampler" in filled and t is not ENGLISH:
            sampler = settings.get("sampler", self._field("sampler").value)
            note = controls.sampler_note(self.family.family, sampler, t)
            filled["sampler"] = _with(filled["sampler"], choices=choices["sampler"], info=note)
        return [render.idle(t), render.ready(t), *filled.values()]

    def _fitted(self, shape: str, native: tuple[int, int]) -> tuple[int, int]:
        return controls.fit(shape, native, self.family.size_multiple)

    def _native(self, checkpoint: str) -> tuple[int, int] | None:
        info, _ = self._describe(checkpoint)
        width, height = (info.defaults.get(side) if info else None for side in ("width", "height"))
        return (width, height) if width and height else None

    def _describe(
        self, checkpoint: str, t: Tongue = ENGLISH
    ) -> tuple[CheckpointInfo | None, tuple[str, str]]:
        """What is known of a checkpoint, and the examples and the note of it; a note of what is wrong."""
        try:
            info = self.jobs.studio.describe(self.family.family, checkpoint)
        except TriptychError as error:
            told = t.told(handlers.explain(error, self.jobs.studio.settings))
            return None, ("", render.problem(told))
        public = self.jobs.public
        return info, About.of(self.family, info, t, strangers=public, lacking=self._lacking(checkpoint))

    def _lacking(self, checkpoint: str) -> int:
        """Bytes of a catalogued checkpoint that are to be downloaded first."""
        entry = catalog.entry(self.family.family, checkpoint)
        if entry is None or entry.bundled or self.jobs.public:
            return 0
        try:
            known = checkpoints.Known.of(self.jobs.studio.settings, entry)
        except TriptychError:
            return 0
        return known.bytes if known.lacking else 0


def _with(update: Any, **properties: Any) -> Any:
    """The update of a value, or none, and of further properties."""
    if isinstance(update, dict) and update.get("__type__") == "update":
        return update | properties
    return gr.update(value=update, **properties)


def _last_seed(last: dict[str, Any] | None, current: str) -> str:
    return str(last["seed"]) if last else current
