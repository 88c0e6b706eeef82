"""What a user can ask for: one frozen dataclass a family, checked when it is made.

`None` means the checkpoint's own default. Every error names the value and what is allowed.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from backend.errors import InvalidRequest
from backend.image_prompts import ImagePrompt
from backend.sampling.catalog import FLOW_SAMPLER_INFO, SAMPLER_INFO
from backend.text import tags

MAX_SEED = 2**32 - 1
DTYPES = ("auto", "float32", "bfloat16", "float16")
MOST_LORAS = 32
PREFERENCES = ("auto", "quality", "speed")


@dataclass(frozen=True, kw_only=True)
class Request:
    """The fields that all families share.

    `seed` -1 draws one at random; image i of the batch uses seed + i, wrapping at 2³².
    `raw_prompt` switches prompt weighting and chunking off. `clip_skip` leaves out that many of the text
    encoder's last layers. `config_from` is a folder or repository that completes a single-file checkpoint.
    `loras` are pairs of a LoRA's name or file and its weight, -10 to 10, or triples of a name and the weights
    for the network and for the text encoders; a prompt may name further ones (`backend/text/tags.py`).
    """

    family: ClassVar[str]
    size_multiple: ClassVar[int]

    prompt: str = ""
    negative_prompt: str = ""
    checkpoint: str = "demo"
    seed: int = -1
    num_images: int = 1
    width: int | None = None
    height: int | None = None
    dtype: str = "auto"
    prefer: str = "auto"
    loras: tuple[tuple[str, float] | tuple[str, float, float], ...] = ()
    raw_prompt: bool = False
    clip_skip: int = 0
    config_from: str | None = None

    def __post_init__(self) -> None:
        for name in ("prompt", "negative_prompt", "checkpoint"):
            _text(name, getattr(self, name))
        if not self.checkpoint.strip():
            raise InvalidRequest(
                "checkpoint is empty; it can be 'demo', a catalogue name, a hub repository, folder or file"
            )
        if self.config_from is not None:
            _text("config_from", self.config_from)
        whole(self, "seed", -1, MAX_SEED, extra=" (-1 draws one at random)")
        whole(self, "num_images", 1, 8)
        whole(self, "clip_skip", 0, 11)
        for name in ("width", "height"):
            if getattr(self, name) is not None:
                whole(self, name, 64, 2048, multiple=self.size_multiple)
        choice(self, "dtype", DTYPES)
        choice(self, "prefer", PREFERENCES)
        if not isinstance(self.raw_prompt, bool):
            raise InvalidRequest(f"raw_prompt is {self.raw_prompt!r}; it can be True or False")
        given: Any = self.loras
        if not isinstance(given, list | tuple) or len(given) > MOST_LORAS:
            raise InvalidRequest(
                f"loras is {_shown(given)}; it can be a list of 0 to {MOST_LORAS} pairs of a name or file "
                "and a weight"
            )
        read = (tags.read(each) for each in given)
        loras = tuple(each[:2] if each.network == each.text else tuple(each) for each in read)
        object.__setattr__(self, "loras", loras)
        if not self.raw_prompt:
            tags.extract(self.prompt)
            if tags.extract(self.negative_prompt)[1]:
                raise InvalidRequest(
                    "negative_prompt names a LoRA; they work on the whole picture: name them in the prompt"
                )


@dataclass(frozen=True, kw_only=True)
class SD15Request(Request):
    """Stable Diffusion 1.5: `steps` 1 to 150, `guidance_scale` 0 to 30, `sampler` of `SAMPLER_INFO`."""

    family: ClassVar[str] = "sd15"
    size_multiple: ClassVar[int] = 8

    steps: int | None = None
    guidance_scale: float | None = None
    sampler: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        single_stage(self, tuple(SAMPLER_INFO))


T5 = ("auto", "full", "int8", "nf4", "off")
LEAST_TOKENS, MOST_TOKENS = 77, 512


@dataclass(frozen=True, kw_only=True)
class SD3Request(Request):
    """Stable Diffusion 3 and 3.5: `steps` 1 to 150, `guidance_scale` 0 to 30, `sampler` of
    `FLOW_SAMPLER_INFO`, `shift` 0.1 to 20 (higher: more of the steps where the picture is composed).

    `t5` is how the largest text encoder runs: whole, with 8 or 4 bits a weight, not at all, or as memory
    allows ("auto"). It reads up to `max_sequence_length` tokens, 77 to 512.

    Skip-layer guidance leads away from what the network makes without some of its blocks, in a part of the
    steps: `skip_layer_guidance_scale` 0 (off) to 10, `skip_layer_guidance_start` and `_stop` as shares of
    the steps, `skip_guidance_layers` by their numbers (None: those of 3.5-medium, 7 to 9 of 24).
    """

    family: ClassVar[str] = "sd3"
    size_multiple: ClassVar[int] = 16

    steps: int | None = None
    guidance_scale: float | None = None
    sampler: str | None = None
    shift: float | None = None
    t5: str = "auto"
    max_sequence_length: int = 256
    skip_layer_guidance_scale: float = 0.0
    skip_layer_guidance_start: float = 0.01
    skip_layer_guidance_stop: float = 0.2
    skip_guidance_layers: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        single_stage(self, tuple(FLOW_SAMPLER_INFO))
        if self.shift is not None:
            number(self, "shift", 0.1, 20.0)
        choice(self, "t5", T5)
        whole(self, "max_sequence_length", LEAST_TOKENS, MOST_TOKENS)
        number(self, "skip_layer_guidance_scale", 0.0, 10.0)
        for name in ("skip_layer_guidance_start", "skip_layer_guidance_stop"):
            number(self, name, 0.0, 1.0)
        start, stop = self.skip_layer_guidance_start, self.skip_layer_guidance_stop
        if start > stop:
            raise InvalidRequest(
                f"skip_layer_guidance_start is {start:g}; it can be up to skip_layer_guidance_stop, {stop:g}"
            )
        layers: Any = self.skip_guidance_layers
        if layers is not None:
            if not isinstance(layers, list | tuple) or not all(map(_is_layer, layers)):
                raise InvalidRequest(
                    f"skip_guidance_layers is {_shown(layers)}; it can be a list of whole numbers from 0"
                )
            object.__setattr__(self, "skip_guidance_layers", tuple(sorted({int(layer) for layer in layers})))


def _is_layer(value: Any) -> bool:
    whole_number = isinstance(value, int) or (isinstance(value, float) and value.is_integer())
    return whole_number and not isinstance(value, bool) and value >= 0


STAGES = ("auto", "full", "lite")
MOST_IMAGES = 4


@dataclass(frozen=True, kw_only=True)
class StableCascadeRequest(Request):
    """Stable Cascade: Stage C (the prior) composes, Stage B (the decoder) draws; each has `steps` 1 to 150
    and a `guidance_scale` 0 to 30, and is "full" or "lite".

    `stages` chooses for both, `stage_c` and `stage_b` for one of them; "auto" goes by memory. `images` are 0
    to 4 pictures, files or data URLs to make variations of, beside the prompt or without one.
    """

    family: ClassVar[str] = "stable_cascade"
    size_multiple: ClassVar[int] = 64

    prior_steps: int | None = None
    prior_guidance_scale: float | None = None
    decoder_steps: int | None = None
    decoder_guidance_scale: float | None = None
    stages: str = "auto"
    stage_c: str | None = None
    stage_b: str | None = None
    images: tuple[Any, ...] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        for stage in ("prior", "decoder"):
            if getattr(self, f"{stage}_steps") is not None:
                whole(self, f"{stage}_steps", 1, 150)
            if getattr(self, f"{stage}_guidance_scale") is not None:
                number(self, f"{stage}_guidance_scale", 0.0, 30.0)
        choice(self, "stages", STAGES)
        for stage in ("stage_c", "stage_b"):
            if getattr(self, stage) is not None:
                choice(self, stage, STAGES)
        given: Any = self.images
        many = isinstance(given, list | tuple)
        if not many or len(given) > MOST_IMAGES:
            what = f"holds {len(given)}" if many else f"is {_shown(given)}"
            raise InvalidRequest(f"images {what}; it can be a list of 0 to {MOST_IMAGES} pictures or files")
        read = tuple(ImagePrompt.read(f"images[{index}]", value) for index, value in enumerate(given))
        object.__setattr__(self, "images", read)

    def wish(self, stage: str) -> str:
        """The choice for `stage_c` or `stage_b`: "auto", "full" or "lite"."""
        return getattr(self, stage) or self.stages


REQUESTS: dict[str, type[Request]] = {
    request.family: request for request in (SD15Request, SD3Request, StableCascadeRequest)
}


def single_stage(request: SD15Request | SD3Request, samplers: tuple[str, ...]) -> None:
    """Check steps, guidance scale and sampler, where they are given."""
    if request.steps is not None:
        whole(request, "steps", 1, 150)
    if request.guidance_scale is not None:
        number(request, "guidance_scale", 0.0, 30.0)
    if request.sampler is not None:
        choice(request, "sampler", samplers)


def whole(request: Request, name: str, low: int, high: int, *, multiple: int = 1, extra: str = "") -> None:
    """Check that the field is a whole number in range; keep it as an int (JSON clients send 7.0 for 7)."""
    value: Any = getattr(request, name)
    whole_number = isinstance(value, int) or (isinstance(value, float) and value.is_integer())
    fits = whole_number and not isinstance(value, bool) and low <= value <= high
    if not (fits and int(value) % multiple == 0):
        step = f" in multiples of {multiple}" if multiple > 1 else ""
        raise InvalidRequest(
            f"{name} is {_shown(value)}; it can be a whole number from {low} to {high}{step}{extra}"
        )
    object.__setattr__(request, name, int(value))


def number(request: Request, name: str, low: float, high: float) -> None:
    """Check that the field is a finite number in range, and keep it as a float."""
    value: Any = getattr(request, name)
    if isinstance(value, bool) or not (isinstance(value, int | float) and low <= value <= high):
        raise InvalidRequest(f"{name} is {_shown(value)}; it can be a number from {low:g} to {high:g}")
    object.__setattr__(request, name, float(value))


def choice(request: Request, name: str, allowed: tuple[str, ...]) -> None:
    """Check that the field is one of the allowed names."""
    value: Any = getattr(request, name)
    if value not in allowed:
        raise InvalidRequest(f"{name} is {_shown(value)}; it can be {', '.join(allowed)}")


def _text(name: str, value: Any) -> None:
    if not isinstance(value, str):
        raise InvalidRequest(f"{name} is {_shown(value)}; it must be text")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise InvalidRequest(
            f"{name} holds half of a character at place {error.start + 1}: {value!r:.80}"
        ) from None


def _shown(value: Any) -> str:
    try:
        return f"{value!r:.80}"
    except ValueError:  # Python does not print numbers of thousands of digits
        return "a number of thousands of digits"
