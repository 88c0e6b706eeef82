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

from backend import public
from backend.requests import LEAST_TOKENS, MOST_IMAGES, MOST_TOKENS, SD3Request, SD15Request
from backend.sampling.catalog import FLOW_SAMPLER_INFO, SAMPLER_INFO, SamplerInfo
from backend.text import tags
from ui import prices
from ui.i18n import ENGLISH, Tongue, label

SHAPES = {"1:1": 1.0, "3:2": 3 / 2, "2:3": 2 / 3, "16:9": 16 / 9, "9:16": 9 / 16}
CUSTOM = "custom"
SAMPLERS: dict[str, dict[str, SamplerInfo]] = {
    SD15Request.family: SAMPLER_INFO,
    SD3Request.family: FLOW_SAMPLER_INFO,
}
MOST_KEPT = 20_000  # characters of a text that a browser kept
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
        settings = settings | _sizes_shown(settings) | _tagged(settings)
        return [
            SHOWN.get(field, same)(settings[field]) if field in settings else gr.skip()
            for field in self.by_field
        ]

    def sound(self, kept: Any) -> dict[str, Any]:
        """Of what a browser kept, the values that their components can show: it may be of another version, or
        of another hand."""
        given = kept if isinstance(kept, dict) else {}
        return {
            name: given[name]
            for name, each in self.by_field.items()
            if name in given and _fits(each, given[name])
        }


def _fits(component: gr.components.Component, value: Any) -> bool:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    match component:
        case gr.Slider():
            return number and component.minimum <= value <= component.maximum
        case gr.Number():
            return number and LEAST_SIDE <= value <= MOST_SIDE
        case gr.Dropdown(allow_custom_value=True) | gr.Textbox():
            return isinstance(value, str) and len(value) <= MOST_KEPT
        case gr.Dropdown() | gr.Radio():
            return value in [choice for _, choice in component.choices]
        case gr.Checkbox():
            return isinstance(value, bool)
        case _:
            return False


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


def _tagged(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The LoRAs of a request's own field as tags in the prompt, where the page has them; not in a raw one,
    in which they would be words."""
    if not settings.get("loras") or settings.get("raw_prompt"):
        return {}
    return {"prompt": tags.with_tags(settings.get("prompt", ""), settings["loras"])}


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


def shapes(t: Tongue = ENGLISH) -> list[tuple[str, str]]:
    return [*((shape, shape) for shape in SHAPES), (t("custom"), CUSTOM)]


def choices(family: str, t: Tongue) -> dict[str, list[tuple[str, str]]]:
    """The choices whose names are words, by field, in a language: Gradio translates only labels."""
    said = {"stage_c": SIZES, "stage_b": SIZES, "prefer": PREFERENCES, "dtype": PRECISIONS}
    said |= {"sampler": sampler_choices(family)} if family in SAMPLERS else {}
    return {field: [(t(name), value) for name, value in rows] for field, rows in said.items()}


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
            label=label("Prompt"),
            lines=3,
            max_lines=8,
            placeholder=label("What should the picture show?"),
        ),
        "negative_prompt": gr.Textbox(
            label=label("Negative prompt"),
            lines=1,
            max_lines=4,
            placeholder=label("What should it leave out?"),
        ),
    }


def size_and_shape(
    defaults: Mapping[str, Any], multiple: int
) -> tuple[gr.Radio, dict[str, gr.components.Component]]:
    shape = gr.Radio(shapes(), value="1:1", label=label("Shape"), elem_classes="segmented", interactive=True)
    with gr.Row(elem_classes="pair"):
        numbers: dict[str, gr.components.Component] = {
            side: gr.Number(value=defaults[side], label=name, precision=0, step=multiple, min_width=90)
            for side, name in (("width", label("Width")), ("height", label("Height")))
        }
    return shape, numbers


def seed_and_count(
    *, strangers: bool = False
) -> tuple[gr.Button, gr.Button, dict[str, gr.components.Component]]:
    with gr.Row(elem_classes="seed-row"):
        # Text, as an empty gr.Number sends 0.
        seed = gr.Textbox(label=label("Seed"), placeholder=label("random"), max_lines=1, min_width=120)
        random = gr.Button(label("Random"), size="sm", min_width=76, scale=0, elem_classes="quiet")
        reuse = gr.Button(label("Reuse last"), size="sm", min_width=92, scale=0, elem_classes="quiet")
    most = public.MOST_IMAGES if strangers else 8
    count = gr.Slider(1, most, value=1, step=1, label=label("Number of pictures"), buttons=[])
    return random, reuse, {"seed": seed, "num_images": count}


# What the sliders are called, by the field.
SAMPLING = {
    "steps": label("Steps"),
    "guidance_scale": label("Guidance"),
    "prior_steps": label("Composition steps"),
    "prior_guidance_scale": label("Composition guidance"),
    "decoder_steps": label("Detail steps"),
    "decoder_guidance_scale": label("Detail guidance"),
}


def sampling(
    defaults: Mapping[str, Any], prefix: str = "", *, strangers: bool = False
) -> dict[str, gr.components.Component]:
    """Steps and guidance; `prefix` begins the names of the fields."""
    steps, guidance = f"{prefix}steps", f"{prefix}guidance_scale"
    most = public.MOST_STEPS if strangers else 150
    return {
        steps: gr.Slider(1, most, value=defaults[steps], step=1, label=SAMPLING[steps], buttons=[]),
        guidance: gr.Slider(0, 30, value=defaults[guidance], step=0.1, label=SAMPLING[guidance], buttons=[]),
    }


def stage_sampling(
    defaults: Mapping[str, Any], *, strangers: bool = False
) -> dict[str, gr.components.Component]:
    """Steps and guidance of Stable Cascade's two stages, apart."""
    fields: dict[str, gr.components.Component] = {}
    for prefix, title in (
        ("prior_", label("Stage C: composition")),
        ("decoder_", label("Stage B: detail")),
    ):
        gr.Markdown("### " + title, elem_classes="part")
        fields |= sampling(defaults, prefix, strangers=strangers)
    return fields


def stage_sizes() -> dict[str, gr.components.Component]:
    """Which size of either stage runs."""
    texts = {
        "stage_c": (
            label("Size of Stage C"),
            label(
                "Full paints better, lite takes a third of the memory. Automatic goes by the memory that is"
                " free. What the checkpoint lacks is replaced, and the memory plan says so."
            ),
        ),
        "stage_b": (
            label("Size of Stage B"),
            label(
                "Full paints better, lite takes 45 % of the memory. Automatic goes by the memory that is"
                " free. What the checkpoint lacks is replaced, and the memory plan says so."
            ),
        ),
    }
    return {
        field: gr.Radio(
            SIZES, value="auto", label=title, info=info, elem_classes="segmented", interactive=True
        )
        for field, (title, info) in texts.items()
    }


def image_prompts() -> gr.Gallery:
    return gr.Gallery(
        label=label("Image prompts, up to 4"),
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
    note = sampler_note(family, default)
    return {
        "sampler": gr.Dropdown(
            sampler_choices(family), value=default, label=label("Sampler"), info=note, filterable=False
        ),
    }


def sampler_choices(family: str) -> list[tuple[str, str]]:
    return [(info.label, name) for name, info in SAMPLERS[family].items()]


def sampler_note(family: str, name: str, t: Tongue = ENGLISH) -> str:
    info = SAMPLERS[family][name]
    told = "{n} steps recommended, {passes} passes through the network each."
    if info.cost == 1:
        told = "{n} steps recommended, 1 pass through the network each."
    return f"{t(info.note)} {t(told, n=info.recommended_steps, passes=f'{info.cost:g}')}"


def t5() -> dict[str, gr.components.Component]:
    """How T5 runs, and how much of the prompt it reads."""
    return {
        "t5": gr.Radio(
            prices.CHOICES,
            value="auto",
            label="T5",
            info=label(prices.ABOUT),
            elem_classes="prices",
            interactive=True,
        ),
        "max_sequence_length": gr.Slider(
            LEAST_TOKENS,
            MOST_TOKENS,
            value=SD3Request.max_sequence_length,
            step=1,
            label=label("Prompt length for T5"),
            info=label("In tokens: words, or parts of them. More takes longer."),
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
            label=label("Shift"),
            info=label(
                "Higher spends more of the steps on composition, lower on detail. Large pictures want more."
            ),
            buttons=[],
        ),
        "skip_layer_guidance_scale": gr.Slider(
            0,
            10,
            value=SD3Request.skip_layer_guidance_scale,
            step=0.1,
            label=label("Skip-layer guidance"),
            info=label(
                "Made for Stable Diffusion 3.5 Medium, at about 2.8, for better hands and bodies. 0 is off."
            ),
            buttons=[],
        ),
    }


def checkpoint(names: Sequence[str], *, strangers: bool = False) -> gr.Dropdown:
    own = label("A name from the list, a Hugging Face repository, a folder, or a .safetensors file.")
    return gr.Dropdown(
        list(names),
        value=names[0],
        label=label("Checkpoint"),
        info=label("What this server has.") if strangers else own,
        allow_custom_value=not strangers,
        elem_classes="checkpoint",
    )


def advanced(*, strangers: bool = False) -> dict[str, gr.components.Component]:
    """The fields of the Advanced fold that every family has."""
    return {
        "prefer": gr.Radio(
            PREFERENCES,
            value="auto",
            label=label("Memory"),
            info=label(
                "Where it is short, balanced takes smaller parts (T5 with fewer bits, lite stages) before"
                " slow steps; quality takes slow steps, never smaller parts; speed what stays in memory."
            ),
            elem_classes="segmented",
            interactive=True,
        ),
        "dtype": gr.Dropdown(
            PRECISIONS,
            value="auto",
            label=label("Precision"),
            info=label("16 bit takes half the memory of 32."),
            filterable=False,
        ),
        "clip_skip": gr.Slider(
            0,
            11,
            value=0,
            step=1,
            label=label("CLIP skip"),
            info=label("Leave out the last layers of the text encoder."),
            buttons=[],
        ),
        "raw_prompt": gr.Checkbox(
            value=False,
            label=label("Raw prompt"),
            info=label("Take (brackets:1.2) literally and cut after 77 tokens."),
        ),
        "config_from": gr.Textbox(
            label=label("Configuration from"),
            placeholder=label("only for single files that do not tell"),
            visible=not strangers,
            info=label("A folder or repository that completes a single-file checkpoint."),
        ),
    }
