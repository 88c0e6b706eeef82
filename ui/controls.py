"""The controls of a tab: components by the name of the request field that they fill."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import gradio as gr

from backend.requests import LEAST_TOKENS, MOST_IMAGES, MOST_TOKENS, SD3Request, SD15Request
from backend.sampling.catalog import FLOW_SAMPLER_INFO, SAMPLER_INFO, SamplerInfo
from ui import prices
from ui.words import STAGE_TITLES

SHAPES = {"1:1": 1.0, "3:2": 3 / 2, "2:3": 2 / 3, "16:9": 16 / 9, "9:16": 9 / 16}
CUSTOM = "custom"
STAGES = (("prior_", "stage_c", "composition"), ("decoder_", "stage_b", "detail"))
SAMPLERS: dict[str, dict[str, SamplerInfo]] = {
    SD15Request.family: SAMPLER_INFO,
    SD3Request.family: FLOW_SAMPLER_INFO,
}
LEAST_SIDE, MOST_SIDE = 64, 2048  # of a picture, as a request takes it
SIZES = [("automatic", "auto"), ("full", "full"), ("lite", "lite")]
PREFERENCES = [("balanced", "auto"), ("quality", "quality"), ("speed", "speed")]
PRECISIONS = [
    ("automatic", "auto"),
    ("32 bit", "float32"),
    ("16 bit (bfloat16)", "bfloat16"),
    ("16 bit (float16)", "float16"),
]


@dataclass(frozen=True)
class Controls:
    """Components by request field, in a fixed order; `fields` of a handler's values and back."""

    by_field: Mapping[str, gr.components.Component]

    @property
    def inputs(self) -> list[gr.components.Component]:
        return list(self.by_field.values())

    def fields(self, values: Sequence[Any]) -> dict[str, Any]:
        """The request's fields from the components' values."""
        return asked(dict(zip(self.by_field, values, strict=True)))

    def filled(self, settings: dict[str, Any]) -> list[Any]:
        """Values for `inputs` that ask for the same pictures again; what settings do not tell stays."""
        same: Callable[[Any], Any] = lambda value: value  # noqa: E731
        settings = settings | _sizes_shown(settings)
        return [
            SHOWN.get(field, same)(settings[field]) if field in settings else gr.skip()
            for field in self.by_field
        ]


def asked(values: Mapping[str, Any]) -> dict[str, Any]:
    """Request fields from the values of their components."""
    given = {field: ASKED[field](value) if field in ASKED else value for field, value in values.items()}
    return given | _sizes_wished(given)


def _sizes_wished(given: Mapping[str, Any]) -> dict[str, Any]:
    """The chosen sizes of the stages as the wish `stages`, which a checkpoint without one need not fulfil.

    It is one for both: of two sizes the one that any checkpoint is likelier to have becomes an order.
    """
    chosen = {field: given[field] for field in ("stage_c", "stage_b") if field in given}
    if not chosen:
        return {}
    wish = next((size for size in ("lite", "full") if size in chosen.values()), "auto")
    return {"stages": wish, **{field: None if size == wish else size for field, size in chosen.items()}}


def _sizes_shown(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The way back."""
    if "stages" not in settings:
        return {}
    return {field: settings[field] or settings["stages"] for field in ("stage_c", "stage_b")}


def _seed(text: str | None) -> Any:
    """An empty field is a random seed; what is no number goes on as text, and the request names it."""
    text = (text or "").strip()
    if re.fullmatch(r"-?\d{1,20}", text):
        return int(text)
    return (text if len(text) <= 20 else f"{text[:20]}…") or -1


def _dropped(shown: Sequence[tuple[str, str | None]] | None) -> list[dict[str, Any]]:
    """A gallery's pictures as the uploaded files that they are."""
    return [{"path": path} for path, _ in shown or []]


def _still_there(files: Sequence[str]) -> list[str]:
    """Of the pictures that a request brought along, those whose files are kept."""
    return [file for file in files if Path(file).is_file()]


ASKED: dict[str, Callable[[Any], Any]] = {"seed": _seed, "images": _dropped}  # from a component's value
SHOWN: dict[str, Callable[[Any], Any]] = {"seed": str, "images": _still_there}  # and back


def fit(shape: str, native: tuple[int, int], multiple: int) -> tuple[int, int]:
    """The width and height of a shape in the checkpoint's multiple, near its ratio and the native area.

    No two shapes have one size: each is wider than the one before it, though its area may then differ.
    """
    ratio = SHAPES[shape]
    long, short = _wide(max(ratio, 1 / ratio), native[0] * native[1], multiple)
    return (long, short) if ratio >= 1 else (short, long)


@cache
def _wide(ratio: float, area: int, multiple: int) -> tuple[int, int]:
    sides = range(LEAST_SIDE, MOST_SIDE + 1, multiple)
    if ratio == 1:
        side = min(sides, key=lambda side: abs(side - math.sqrt(area)))
        return side, side

    def off(size: tuple[int, int]) -> tuple[float, int]:
        width, height = size
        far = abs(math.log(width / height / ratio)) + abs(math.log(width * height / area)) / 2
        return round(far, 9), -width  # of two as good the larger

    narrower = max(each for each in SHAPES.values() if 1 <= each < ratio)
    width, height = _wide(narrower, area, multiple)
    wider = ((long, short) for short in sides for long in sides if long * height > short * width)
    return min(wider, key=off)


def prompts() -> dict[str, gr.components.Component]:
    return {
        "prompt": gr.Textbox(
            label="Prompt", lines=3, max_lines=8, placeholder="What should the picture show?"
        ),
        "negative_prompt": gr.Textbox(
            label="Negative prompt", lines=1, max_lines=4, placeholder="What should it leave out?"
        ),
    }


def size_and_shape(
    defaults: Mapping[str, Any], multiple: int
) -> tuple[gr.Radio, dict[str, gr.components.Component]]:
    shape = gr.Radio(
        [*SHAPES, CUSTOM], value="1:1", label="Shape", elem_classes="segmented", interactive=True
    )
    with gr.Row(elem_classes="pair"):
        numbers: dict[str, gr.components.Component] = {
            side: gr.Number(
                value=defaults[side], label=side.capitalize(), precision=0, step=multiple, min_width=90
            )
            for side in ("width", "height")
        }
    return shape, numbers


def seed_and_count() -> tuple[gr.Button, gr.Button, dict[str, gr.components.Component]]:
    with gr.Row(elem_classes="seed-row"):
        # Text, as an empty gr.Number sends 0.
        seed = gr.Textbox(label="Seed", placeholder="random", max_lines=1, min_width=120)
        random = gr.Button("Random", size="sm", min_width=76, scale=0, elem_classes="quiet")
        reuse = gr.Button("Reuse last", size="sm", min_width=92, scale=0, elem_classes="quiet")
    count = gr.Slider(1, 8, value=1, step=1, label="Number of pictures", buttons=[])
    return random, reuse, {"seed": seed, "num_images": count}


def sampling(
    defaults: Mapping[str, Any], prefix: str = "", what: str = ""
) -> dict[str, gr.components.Component]:
    """Steps and guidance; `prefix` begins the names of the fields, `what` the labels."""
    steps, guidance = f"{prefix}steps", f"{prefix}guidance_scale"
    labels = [f"{what} {name}".strip().capitalize() for name in ("steps", "guidance")]
    return {
        steps: gr.Slider(1, 150, value=defaults[steps], step=1, label=labels[0], buttons=[]),
        guidance: gr.Slider(0, 30, value=defaults[guidance], step=0.1, label=labels[1], buttons=[]),
    }


def stage_sampling(defaults: Mapping[str, Any]) -> dict[str, gr.components.Component]:
    """Steps and guidance of Stable Cascade's two stages, apart."""
    fields: dict[str, gr.components.Component] = {}
    for prefix, stage, what in STAGES:
        gr.HTML(f"<h3>{STAGE_TITLES[stage]}</h3>", elem_classes="part")
        fields |= sampling(defaults, prefix, what)
    return fields


def stage_sizes() -> dict[str, gr.components.Component]:
    """Which size of either stage runs."""
    info = "Full paints better, lite takes {} of the memory. Automatic goes by the memory that is free. What"
    info += " the checkpoint lacks is replaced, and the memory plan says so."
    return {
        field: gr.Radio(
            SIZES,
            value="auto",
            label=title,
            info=info.format(share),
            elem_classes="segmented",
            interactive=True,
        )
        for field, title, share in (
            ("stage_c", "Size of Stage C", "a third"),
            ("stage_b", "Size of Stage B", "45 %"),
        )
    }


def image_prompts() -> gr.Gallery:
    return gr.Gallery(
        label=f"Image prompts, up to {MOST_IMAGES}",
        file_types=["image"],
        columns=MOST_IMAGES,
        fit_columns=False,
        height=112,
        object_fit="cover",
        allow_preview=False,
        interactive=True,
        buttons=[],
        elem_classes="image-prompts",
    )


def sampler(family: str, default: str) -> dict[str, gr.components.Component]:
    choices = [(info.label, name) for name, info in SAMPLERS[family].items()]
    note = sampler_note(family, default)
    return {
        "sampler": gr.Dropdown(choices, value=default, label="Sampler", info=note, filterable=False),
    }


def sampler_note(family: str, name: str) -> str:
    info = SAMPLERS[family][name]
    cost = "1 pass" if info.cost == 1 else f"{info.cost:g} passes"
    return f"{info.note} {info.recommended_steps} steps recommended, {cost} through the network each."


def t5() -> dict[str, gr.components.Component]:
    """How T5 runs, and how much of the prompt it reads."""
    return {
        "t5": gr.Radio(
            prices.CHOICES,
            value="auto",
            label="T5",
            info=prices.ABOUT,
            elem_classes="prices",
            interactive=True,
        ),
        "max_sequence_length": gr.Slider(
            LEAST_TOKENS,
            MOST_TOKENS,
            value=SD3Request.max_sequence_length,
            step=1,
            label="Prompt length for T5",
            info="In tokens: words, or parts of them. More takes longer.",
            buttons=[],
        ),
    }


def flow(defaults: Mapping[str, Any]) -> dict[str, gr.components.Component]:
    """What Stable Diffusion 3 has beside steps, guidance and sampler."""
    return {
        "shift": gr.Slider(
            0.1,
            20,
            value=defaults["shift"],
            step=0.1,
            label="Shift",
            info="Higher spends more of the steps on composition, lower on detail. Large pictures want more.",
            buttons=[],
        ),
        "skip_layer_guidance_scale": gr.Slider(
            0,
            10,
            value=SD3Request.skip_layer_guidance_scale,
            step=0.1,
            label="Skip-layer guidance",
            info="Made for Stable Diffusion 3.5 Medium, at about 2.8, for better hands and bodies. 0 is off.",
            buttons=[],
        ),
    }


def checkpoint(names: Sequence[str]) -> gr.Dropdown:
    return gr.Dropdown(
        list(names),
        value=names[0],
        label="Checkpoint",
        info="A name from the list, a Hugging Face repository, a folder, or a .safetensors file.",
        allow_custom_value=True,
        elem_classes="checkpoint",
    )


def advanced() -> dict[str, gr.components.Component]:
    """The fields of the Advanced fold that every family has."""
    return {
        "prefer": gr.Radio(
            PREFERENCES,
            value="auto",
            label="Memory",
            info="Where it is short, balanced takes smaller parts (T5 with fewer bits, lite stages) before"
            " slow steps; quality takes slow steps, never smaller parts; speed takes what stays in memory.",
            elem_classes="segmented",
            interactive=True,
        ),
        "dtype": gr.Dropdown(
            PRECISIONS,
            value="auto",
            label="Precision",
            info="16 bit takes half the memory of 32.",
            filterable=False,
        ),
        "clip_skip": gr.Slider(
            0,
            11,
            value=0,
            step=1,
            label="CLIP skip",
            info="Leave out the last layers of the text encoder.",
            buttons=[],
        ),
        "raw_prompt": gr.Checkbox(
            value=False, label="Raw prompt", info="Take (brackets:1.2) literally and cut after 77 tokens."
        ),
        "config_from": gr.Textbox(
            label="Configuration from",
            placeholder="only for single files that do not tell",
            info="A folder or repository that completes a single-file checkpoint.",
        ),
    }
