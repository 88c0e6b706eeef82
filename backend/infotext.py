"""The `parameters` text of a picture, as the widely used tools write and read it:

    a red house, (hills:1.2)
    Negative prompt: blurry
    Steps: 20, Sampler: DPM++ 2M, CFG scale: 7.5, Seed: 7, Size: 512x512, Model: demo, Version: Triptych 0.1.0

Prompts that this form cannot hold (a line that begins with "Negative prompt:", blanks at an end, ...) are
added once more as quoted fields, so that what is written is always read back as it was.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Collection, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from backend import catalog, png
from backend.errors import InvalidRequest
from backend.image_prompts import MOST_PIXELS
from backend.requests import REQUESTS
from backend.sampling.catalog import FLOW_SAMPLER_INFO, SAMPLER_INFO, SamplerInfo
from backend.text import tags
from backend.version import VERSION

NEGATIVE = "Negative prompt:"
EXACT_PROMPT, EXACT_NEGATIVE = "Exact prompt", "Exact negative prompt"
WUERSTCHEN = "DDPM Wuerstchen"  # Stable Cascade's only sampler
KEY = re.compile(r"\s*(\w[\w \-/]+):\s*")
TOKENS = 256  # that T5 reads unless told otherwise
SKIP_LAYERS = {  # a field of the text → of the request
    "Skip layer guidance": "skip_layer_guidance_scale",
    "Skip layer start": "skip_layer_guidance_start",
    "Skip layer stop": "skip_layer_guidance_stop",
}
FEWEST_FIELDS = 3  # a last line with fewer belongs to the prompt
MOST_FIELDS = 1000  # read of one; what comes from strangers may go on for long
SOURCES = {  # a field of the request → of the text, where it is told
    "seed": "Seed",
    "width": "Size",
    "height": "Size",
    "raw_prompt": "Raw prompt",
    "clip_skip": "Clip skip",
    "checkpoint": "Model",
    "loras": "LoRAs",
}
SINGLE_STAGE_SOURCES = {"steps": "Steps", "guidance_scale": "CFG scale", "sampler": "Sampler"}
FAMILY_SOURCES: dict[str, dict[str, str]] = {
    "sd15": SINGLE_STAGE_SOURCES,
    "sd3": {
        **SINGLE_STAGE_SOURCES,
        "shift": "Shift",
        "t5": "T5",
        "max_sequence_length": "Max sequence length",
        **{name: key for key, name in SKIP_LAYERS.items()},
        "skip_guidance_layers": "Skip layers",
    },
    "stable_cascade": {
        "prior_steps": "Steps",
        "prior_guidance_scale": "CFG scale",
        "decoder_steps": "Decoder steps",
        "decoder_guidance_scale": "Decoder CFG scale",
        "stage_c": "Stage C",
        "stage_b": "Stage B",
    },
}
# What a text means by saying nothing of it.
UNSAID = {"clip_skip": 0, "raw_prompt": False}
HASHES = "Lora hashes"  # by which other programs know the files that the prompt names
FAMILY_UNSAID = {"sd3": {"max_sequence_length": TOKENS, "skip_layer_guidance_scale": 0.0}}
TOGETHER = (("width", "height"), ("skip_layer_guidance_start", "skip_layer_guidance_stop"))


@dataclass(frozen=True, kw_only=True)
class Infotext:
    """`fields` keeps every key of the last line, known or not, in its order."""

    prompt: str = ""
    negative_prompt: str = ""
    fields: Mapping[str, str] = field(default_factory=dict)


def write(prompt: str, negative_prompt: str, fields: Mapping[str, Any]) -> str:
    """The text; `fields` of the value None are left out."""
    given = {key: _shown(value) for key, value in fields.items() if value is not None}
    text = _text(prompt, negative_prompt, given)
    read = parse(text)
    if read.prompt != prompt:
        given[EXACT_PROMPT] = json.dumps(prompt)
    if read.negative_prompt != negative_prompt:
        given[EXACT_NEGATIVE] = json.dumps(negative_prompt)
    return _text(prompt, negative_prompt, given)


def parse(text: str) -> Infotext:
    """Read any tool's text; whatever is not understood stays in the prompt or among the fields."""
    *lines, last = text.replace("\r\n", "\n").strip().split("\n")
    fields = _fields(last)
    if len(fields) < FEWEST_FIELDS:
        fields = {}
        lines.append(last)
    prompt, negative = "\n".join(lines), ""
    for index, line in enumerate(lines):
        if line.startswith(NEGATIVE):
            prompt = "\n".join(lines[:index])
            negative = "\n".join(lines[index:]).removeprefix(NEGATIVE)
            break
    return Infotext(
        prompt=fields.pop(EXACT_PROMPT, prompt.strip()),
        negative_prompt=fields.pop(EXACT_NEGATIVE, negative.strip()),
        fields=fields,
    )


def describe(settings: Mapping[str, Any], seed: int) -> str:
    """The text of one picture, from a result's settings and the picture's own seed."""
    family = _cascade if "prior_steps" in settings else _flow if "t5" in settings else _single_stage
    steps, further = family(settings)
    loras = [(_model_name(str(name)), *weights) for name, *weights in settings.get("loras", ())]
    raw = settings.get("raw_prompt", False)
    return write(
        settings["prompt"] if raw else tags.with_tags(settings["prompt"], loras),
        settings["negative_prompt"],
        {
            **steps,
            "Seed": seed,
            "Size": f"{settings['width']}x{settings['height']}",
            "Model": _model_name(settings["checkpoint"]),
            **further,
            "Clip skip": settings["clip_skip"] + 1 if settings.get("clip_skip") else None,
            "Raw prompt": True if settings.get("raw_prompt") else None,
            "LoRAs": json.dumps(loras) if raw and loras else None,  # where the prompt is all text
            HASHES: ", ".join(f"{name}: {each}" for name, each in settings.get("lora_hashes", {}).items())
            or None,
            "Version": f"Triptych {VERSION}",
        },
    )


Fields = dict[str, Any]


def _single_stage(
    settings: Mapping[str, Any], samplers: Mapping[str, SamplerInfo] = SAMPLER_INFO
) -> tuple[Fields, Fields]:
    sampler = samplers.get(settings["sampler"])
    return {
        "Steps": settings["steps"],
        "Sampler": sampler.label if sampler else settings["sampler"],
        "CFG scale": settings["guidance_scale"],
    }, {}


def _flow(settings: Mapping[str, Any]) -> tuple[Fields, Fields]:
    """Stable Diffusion 3. Of T5 is told how it ran: "auto" would run otherwise on another machine."""
    steps, _ = _single_stage(settings, FLOW_SAMPLER_INFO)
    tokens, layers = settings["max_sequence_length"], settings["skip_guidance_layers"]
    further = {
        "Shift": settings["shift"],
        "T5": settings["ran"]["t5"],
        "Max sequence length": tokens if tokens != TOKENS else None,
    }
    if settings["skip_layer_guidance_scale"]:
        further |= {key: settings[name] for key, name in SKIP_LAYERS.items()}
        further["Skip layers"] = ", ".join(map(str, layers)) if layers is not None else None
    return steps, further


def _cascade(settings: Mapping[str, Any]) -> tuple[Fields, Fields]:
    """The fields that every tool reads tell of Stage C, which composes; further ones of Stage B."""
    return {
        "Steps": settings["prior_steps"],
        "Sampler": WUERSTCHEN,
        "CFG scale": settings["prior_guidance_scale"],
    }, {
        "Decoder steps": settings["decoder_steps"],
        "Decoder CFG scale": settings["decoder_guidance_scale"],
        "Stage C": settings["ran"]["stage_c"],
        "Stage B": settings["ran"]["stage_b"],
        "Image prompts": len(settings["images"]) or None,
    }


def restore(text: str) -> dict[str, Any]:
    """The request fields that a text tells, under their names; what is missing or makes no sense is left out.

    The checkpoint is told only by Triptych's own pictures, and only where its name says where it is. Image
    prompts cannot be told.
    """
    info = parse(text)
    fields = info.fields
    width, _, height = fields.get("Size", "").partition("x")
    family = family_of(fields)
    cascade, flow = family == "stable_cascade", family == "sd3"
    steps, guidance = ("prior_steps", "prior_guidance_scale") if cascade else ("steps", "guidance_scale")
    told: dict[str, Any] = {
        "prompt": info.prompt,
        "negative_prompt": info.negative_prompt,
        steps: _number(int, fields.get("Steps")),
        guidance: _number(float, fields.get("CFG scale")),
        "seed": _number(int, fields.get("Seed")),
        "width": _number(int, width),
        "height": _number(int, height),
        "raw_prompt": True if fields.get("Raw prompt") == "True" else None,
    }
    if cascade:
        told |= {
            "decoder_steps": _number(int, fields.get("Decoder steps")),
            "decoder_guidance_scale": _number(float, fields.get("Decoder CFG scale")),
            "stage_c": _one_of(("full", "lite"), fields.get("Stage C")),
            "stage_b": _one_of(("full", "lite"), fields.get("Stage B")),
        }
    else:
        samplers = FLOW_SAMPLER_INFO if flow else SAMPLER_INFO
        told["sampler"] = _sampler(samplers, fields.get("Sampler", ""), fields.get("Schedule type", ""))
    if flow:
        told |= {
            "shift": _number(float, fields.get("Shift")),
            "t5": _one_of(("full", "int8", "nf4", "off"), fields.get("T5")),
            "max_sequence_length": _number(int, fields.get("Max sequence length")),
            **{name: _number(float, fields.get(key)) for key, name in SKIP_LAYERS.items()},
            "skip_guidance_layers": _layers(fields.get("Skip layers")),
        }
    if "LoRAs" in fields:
        with suppress(ValueError, TypeError, RecursionError):
            told["loras"] = tuple(tuple(each) for each in json.loads(fields["LoRAs"]))
    if clip_skip := _number(int, fields.get("Clip skip")):
        told["clip_skip"] = clip_skip - 1
    model = fields.get("Model", "")
    if _is_ours(fields) and (model == "demo" or "/" in model):
        told["checkpoint"] = model
    return {name: value for name, value in told.items() if value is not None}


# ---- what a text means here


@dataclass(frozen=True, kw_only=True)
class Restored:
    """What a text asks for: `settings` are fields of a request of the `family`, all of which it takes.

    `unknown` are the fields of the text that mean nothing here, `refused` those whose value cannot be served;
    both by their names in the text.
    """

    family: str
    settings: dict[str, Any]
    unknown: tuple[str, ...] = ()
    refused: tuple[str, ...] = ()


def of_file(file: Path) -> Restored:
    """What a PNG file tells. Raises InvalidRequest, in words, for what is none, or tells nothing."""
    read = png.read(file)
    if read.width * read.height > MOST_PIXELS:
        most = MOST_PIXELS // 1_000_000
        raise InvalidRequest(
            f"{file.name} has {read.width} × {read.height} pixels; it can have up to {most} million"
        )
    if not (read.parameters or "").strip():
        raise InvalidRequest(
            f"{file.name} has no settings in it: Triptych and the popular web UIs keep them as a text named"
            " 'parameters', which is lost when a picture is edited or sent by a messenger"
        )
    return understand(read.parameters or "")


def understand(text: str) -> Restored:
    """The settings that a text tells, and what of it cannot be used."""
    fields = parse(text).fields
    family = family_of(fields)
    told = restore(text)
    model = fields.get("Model", "")
    if _is_ours(fields) and catalog.entry(family, model):
        told["checkpoint"] = model
    settings = _servable(family, told)
    unsaid = UNSAID | FAMILY_UNSAID.get(family, {})
    sources = SOURCES | FAMILY_SOURCES[family]
    used = {sources[name] for name in settings if name in sources} | {"Version", HASHES}
    known = {*sources.values(), *used}
    if "sampler" in sources:
        known.add("Schedule type")
        if _schedule_is_told(family, settings.get("sampler"), fields.get("Schedule type", "")):
            used.add("Schedule type")
    else:
        known |= {"Sampler", "Image prompts"}
        if fields.get("Sampler") == WUERSTCHEN:
            used.add("Sampler")
    if fields:
        settings |= {name: value for name, value in unsaid.items() if sources[name] not in fields}
    return Restored(
        family=family,
        settings=settings,
        unknown=tuple(key for key in fields if key not in known),
        refused=tuple(key for key in fields if key in known and key not in used),
    )


def family_of(fields: Mapping[str, str]) -> str:
    """Each family writes a field that no other has; what other tools write is of Stable Diffusion 1.5."""
    return "stable_cascade" if "Decoder steps" in fields else "sd3" if "T5" in fields else "sd15"


def _is_ours(fields: Mapping[str, str]) -> bool:
    return fields.get("Version", "").startswith("Triptych")


def _servable(family: str, told: Mapping[str, Any]) -> dict[str, Any]:
    """Those of the settings that a request of the family takes, each by itself and together."""

    def serves(values: dict[str, Any]) -> bool:
        try:
            REQUESTS[family](**values)
        except InvalidRequest:
            return False
        return True

    kept = {name: value for name, value in told.items() if serves({name: value})}
    for group in TOGETHER:
        asked = {name: told[name] for name in group if name in told}
        if not serves(asked):
            kept = {name: value for name, value in kept.items() if name not in group}
    return kept


def _schedule_is_told(family: str, sampler: str | None, schedule: str) -> bool:
    """Whether the sampler has the schedule that newer tools write apart from it."""
    samplers = FLOW_SAMPLER_INFO if family == "sd3" else SAMPLER_INFO
    if schedule.lower() == "automatic":
        return True
    return sampler is not None and samplers[sampler].label.lower().endswith(schedule.lower())


def _text(prompt: str, negative_prompt: str, fields: Mapping[str, str]) -> str:
    lines = [prompt]
    if negative_prompt:
        lines.append(f"{NEGATIVE} {negative_prompt}")
    lines.append(", ".join(f"{key}: {value}" for key, value in fields.items()))
    return "\n".join(lines).encode("utf-8", "replace").decode()  # half of a surrogate pair cannot be stored


def _shown(value: Any) -> str:
    text = f"{value:g}" if isinstance(value, float) and float(f"{value:g}") == value else str(value)
    plain = text and text == text.strip() and text[0] not in '"[{' and not re.search(r"[,:\n\r]", text)
    return text if plain else json.dumps(text, ensure_ascii=False)


def _fields(line: str) -> dict[str, str]:
    """`Key: value, Key: "quoted, value", Key: [{"json": 1}]` → a dict of texts."""
    fields: dict[str, str] = {}
    position = 0
    for _ in range(MOST_FIELDS):
        if position >= len(line):
            break
        key = KEY.match(line, position)
        if key:
            position = key.end()
            value, position = _value(line, position)
            fields[key[1]] = value
        comma = line.find(",", position)
        position = comma + 1 if comma >= 0 else len(line)
    return fields


def _value(line: str, start: int) -> tuple[str, int]:
    """The value that begins at `start`, and where it ends: at a comma that is not inside quotes or JSON."""
    if line[start : start + 1] in ('"', "[", "{"):
        try:
            value, end = json.JSONDecoder().raw_decode(line, start)
        except (ValueError, RecursionError):
            end = start
        else:
            if not line[end:].strip() or line[end:].lstrip().startswith(","):
                return (value if isinstance(value, str) else line[start:end]), end
    end = line.find(",", start)
    end = len(line) if end < 0 else end
    return line[start:end].strip(), end


def _model_name(checkpoint: str) -> str:
    """A hub repository or catalogue name as it is, a path only by its last part: it is nobody's business."""
    is_path = re.search(r"^[/~.\\]|^\w:\\|://|\.(safetensors|ckpt)$", checkpoint)
    name = re.split(r"[/\\]", checkpoint.rstrip("/\\"))[-1] if is_path else checkpoint
    return name.removesuffix(".safetensors").removesuffix(".ckpt")


def _sampler(samplers: Mapping[str, SamplerInfo], label: str, schedule: str) -> str | None:
    """Newer tools write the schedule apart from the sampler's label."""
    names = {info.label.lower(): name for name, info in samplers.items()} | {name: name for name in samplers}
    return names.get(f"{label} {schedule}".strip().lower()) or names.get(label.lower())


def _one_of(allowed: Collection[str], told: str | None) -> str | None:
    return told if told in allowed else None


def _layers(told: str | None) -> tuple[int, ...] | None:
    """The numbers of layers, "" for none of them."""
    if told is None or not re.fullmatch(r"(\d{1,4}(, ?\d{1,4})*)?", told, re.ASCII):
        return None
    return tuple(int(number) for number in re.findall(r"\d+", told))


def _number(kind: type[int] | type[float], text: str | None) -> float | None:
    try:
        number = kind(text or "")
    except ValueError:
        return None
    return number if math.isfinite(number) else None
