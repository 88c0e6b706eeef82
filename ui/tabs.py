"""The tabs, one a family: the same three areas (ask, stage, tune), wired to the same handlers."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import gradio as gr

from backend.errors import TriptychError
from backend.requests import Request, SD15Request
from backend.studio import CheckpointInfo
from ui import controls, handlers, render
from ui.controls import CUSTOM, Controls
from ui.handlers import Easel
from ui.jobs import Jobs

# One request at a time, whichever way it came.
DEVICE: dict[str, Any] = {"concurrency_id": "device", "concurrency_limit": 1}
QUIET: dict[str, Any] = {"queue": False, "show_progress": "hidden", "api_visibility": "private"}
DEFAULTS = ("steps", "guidance_scale", "sampler", "width", "height")  # what a checkpoint has its own of
EXAMPLES = 4  # shown at once
STARTING = f"() => {json.dumps(render.starting())}"


@dataclass(frozen=True)
class Buttons:
    generate: gr.Button
    stop: gr.Button
    random: gr.Button
    reuse: gr.Button
    again: gr.Button


def sd15(jobs: Jobs) -> None:
    """Stable Diffusion 1.5."""
    info = jobs.studio.describe("sd15", "demo")
    with gr.Tab("Stable Diffusion 1.5", id="sd15"), gr.Row(elem_classes="studio"):
        with gr.Column(elem_classes="ask"):
            fields = controls.prompts()
            with gr.Row(elem_classes="actions"):
                generate = gr.Button("Generate", variant="primary", elem_classes="generate", scale=3)
                stop = gr.Button("Stop", elem_classes="stop", scale=1, min_width=80)
        with gr.Column(elem_classes="stage"):
            canvas = gr.HTML(render.idle(), js_on_load=ENLARGE)
            status = gr.HTML(render.ready(), elem_classes="status-line")
            again = gr.Button("Reuse these settings", size="sm", elem_classes="again")
        with gr.Column(elem_classes="about"):
            examples = gr.HTML(render.examples(info.examples[:EXAMPLES]), js_on_load=PICK)
            note = gr.HTML(describe_note(info))
        with gr.Column(elem_classes="tune"):
            shape, numbers = controls.size_and_shape(info.defaults, SD15Request.size_multiple)
            fields |= numbers | controls.sampling(info.defaults)
            random, reuse, seeds = controls.seed_and_count()
            fields |= seeds
            with gr.Accordion("Advanced", open=False, elem_classes="advanced"):
                fields["checkpoint"] = controls.checkpoint(jobs.studio.catalogue("sd15"))
                fields["sampler"] = controls.sampler(info.defaults["sampler"])
                fields |= controls.advanced()
        with gr.Column(elem_classes="below"):
            plan = gr.HTML()
    easel = Easel(canvas, status, plan, gr.State(None))
    sheet = Sheet(jobs, SD15Request, Controls(fields), easel, shape, note, examples)
    sheet.connect(Buttons(generate, stop, random, reuse, again))


def describe_note(info: CheckpointInfo) -> str:
    return render.vocabulary(info.vocabulary) if info.vocabulary else render.licence(info.title, info.licence)


@dataclass(frozen=True)
class Sheet:
    """A tab's components and what connects them; nothing here knows which family it is."""

    jobs: Jobs
    family: type[Request]
    controls: Controls
    easel: Easel
    shape: gr.Radio
    note: gr.HTML
    examples: gr.HTML

    def connect(self, buttons: Buttons) -> None:
        self._paint(buttons)
        self._reuse(buttons)
        self._shape()
        self._checkpoint()
        self._plan()
        self.examples.pick(_picked, None, self._field("prompt"), **QUIET)

    def request(self, values: Sequence[Any]) -> Request:
        return handlers.build(self.family, self.controls.fields(values))

    def _field(self, name: str) -> Any:
        return self.controls.by_field[name]

    def _paint(self, buttons: Buttons) -> None:
        status = self.easel.status
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
        buttons.stop.click(render.stopped, None, status, cancels=[run], **QUIET)

    def _reuse(self, buttons: Buttons) -> None:
        seed = self._field("seed")
        buttons.random.click(None, None, seed, js="() => ''", **QUIET)
        buttons.reuse.click(_last_seed, [self.easel.last, seed], seed, **QUIET)
        outputs = [self.note, self.examples, self.shape, *self.controls.inputs]
        buttons.again.click(self._last_settings, self.easel.last, outputs, **QUIET)

    def _last_settings(self, last: dict[str, Any] | None) -> list[Any]:
        if last is None:
            return [gr.skip()] * (3 + len(self.controls.inputs))
        note, examples, _, *defaults = self._defaults(last["checkpoint"])
        native = (defaults[-2], defaults[-1])
        shape = controls.shape_of(last["width"], last["height"], native, self.family.size_multiple)
        return [note, examples, shape, *self.controls.filled(last)]

    def _shape(self) -> None:
        sides = [self._field("width"), self._field("height")]
        self.shape.input(self._fit, [self.shape, self._field("checkpoint"), *sides], sides, **QUIET)
        for side in sides:
            side.input(None, None, self.shape, js=f"() => {CUSTOM!r}", **QUIET)

    def _fit(self, shape: str, checkpoint: str, width: int, height: int) -> tuple[int, int]:
        if shape == CUSTOM:
            return width, height
        native = self._native(checkpoint)
        return controls.fit(shape, native, self.family.size_multiple) if native else (width, height)

    def _native(self, checkpoint: str) -> tuple[int, int] | None:
        """The checkpoint's own size; None where it has a fault, which the note beside it already says."""
        try:
            defaults = self.jobs.studio.describe(self.family.family, checkpoint).defaults
        except TriptychError:
            return None
        return defaults["width"], defaults["height"]

    def _checkpoint(self) -> None:
        outputs = [self.note, self.examples, self.shape, *(self._field(name) for name in DEFAULTS)]
        choice = self._field("checkpoint")
        choice.input(self._defaults, choice, outputs, **QUIET)
        sampler = self._field("sampler")
        sampler.change(_sampler_info, sampler, sampler, **QUIET)

    def _defaults(self, checkpoint: str) -> list[Any]:
        """The checkpoint's note, examples, square shape and own settings; on error only a note of it."""
        try:
            info = self.jobs.studio.describe(self.family.family, checkpoint)
        except Exception as error:  # noqa: BLE001 (explained on the page, or logged)
            return [render.problem(handlers.explain(error)), *[gr.skip()] * (2 + len(DEFAULTS))]
        values = [info.defaults.get(name, gr.skip()) for name in DEFAULTS]
        return [describe_note(info), render.examples(info.examples[:EXAMPLES]), "1:1", *values]

    def _plan(self) -> None:
        names = ("checkpoint", "config_from", "width", "height", "num_images", "dtype")
        gr.on(
            None,  # when the page loads, and on every change of these
            handlers.plan_in_words(self.jobs.studio, self.family, names),
            [self._field(name) for name in names],
            self.easel.plan,
            trigger_mode="always_last",
            show_progress="hidden",
            api_visibility="private",
        )


def _sampler_info(name: str) -> Any:
    return gr.update(info=controls.sampler_note(name))


def _last_seed(last: dict[str, Any] | None, current: str) -> str:
    return str(last["seed"]) if last else current


def _picked(event: gr.EventData) -> str:
    return event.prompt


TABS: tuple[Callable[[Jobs], None], ...] = (sd15,)

PICK = """
element.addEventListener('click', (event) => {
  const chip = event.target.closest('[data-prompt]');
  if (chip) trigger('pick', {prompt: chip.dataset.prompt});
});
"""

# A click, or Enter, on a picture shows it alone; again, or with Escape, all of them. Arrows walk.
ENLARGE = """
const canvas = () => element.querySelector('.canvas');
const tiles = () => [...element.querySelectorAll('.tile')];
const show = (tile) => {
  tiles().forEach((other) => other.classList.toggle('alone', other === tile));
  canvas().classList.toggle('one', !!tile);
  tile?.focus();
};
element.addEventListener('click', (event) => {
  const tile = event.target.closest('.tile');
  if (tile && tiles().length > 1) show(tile.classList.contains('alone') ? null : tile);
});
element.addEventListener('keydown', (event) => {
  const all = tiles(), at = all.indexOf(event.target.closest('.tile'));
  const move = {ArrowRight: 1, ArrowLeft: -1}[event.key];
  if (at < 0) return;
  if (move) {
    const next = all[(at + move + all.length) % all.length];
    all[at].classList.contains('alone') ? show(next) : next.focus();
    event.preventDefault();
  } else if (event.key === 'Escape' && all[at].classList.contains('alone')) {
    show(null);
    all[at].focus();
    event.stopPropagation();
  }
});
"""
