"""What can vary along a side of a grid, and its values as people type them:

10, 20, 30        one after the other; quotes hold a comma: "a red house, at night", blue
10-30 (+5)        from 10 to 30 in steps of 5; 10-14 alone counts every whole number
1-10 [4]          four values from 1 to 10, evenly apart
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from decimal import Decimal
from typing import Any

from backend import catalog
from backend.errors import InvalidRequest
from backend.requests import DTYPES, MAX_SEED, PREFERENCES, REQUESTS, STAGES, T5
from backend.sampling.catalog import FLOW_SAMPLER_INFO, SAMPLER_INFO, SamplerInfo

MOST_VALUES = 20
SIZE, WORDS = "size", "prompt_words"  # the fields that are none of a request's own

Value = int | float | str | tuple[int, int]  # a size is (width, height)

COMMAS = ",،，\n"  # Arabic and Chinese keyboards have their own
QUOTED = re.compile(r'"((?:[^"]|"")*)"|“([^”]*)”')
NUMBER = r"[+-]?(?:\d{1,12}(?:\.\d{0,9})?|\.\d{1,9})"
STEP, COUNT = rf"\(\s*({NUMBER})\s*\)", r"\[\s*(\d{1,6})\s*\]"
RANGE = re.compile(rf"({NUMBER})\s*[-–]\s*({NUMBER})\s*(?:{STEP}|{COUNT})?")
SIDES = re.compile(r"(\d{1,9})(?:\s*[x×*]\s*(\d{1,9}))?", re.IGNORECASE)


@dataclass(frozen=True, kw_only=True)
class Field:
    """Something that may vary. `kind` is whole, number, choice, size or text; `example` is what can be typed;
    `choices` are the names of a choice with their labels. Changing what has a lower `rank` costs more."""

    name: str
    title: str
    kind: str
    example: str
    rank: int
    choices: Mapping[str, str] = field(default_factory=dict)


def _choice(name: str, title: str, rank: int, names: Sequence[str]) -> Field:
    choices = {name: name for name in names}
    return Field(name=name, title=title, kind="choice", example=", ".join(names), rank=rank, choices=choices)


def _whole(name: str, title: str, rank: int, example: str) -> Field:
    return Field(name=name, title=title, kind="whole", example=example, rank=rank)


def _number(name: str, title: str, rank: int, example: str) -> Field:
    return Field(name=name, title=title, kind="number", example=example, rank=rank)


def _text(name: str, title: str, rank: int, example: str) -> Field:
    return Field(name=name, title=title, kind="text", example=example, rank=rank)


# What must be done anew when it changes: another checkpoint, other networks, the reading of the prompt, the
# painting, its last stage alone.
CHECKPOINT, NETWORKS, READING, PAINTING, LAST = range(5)

# In the order in which the page offers them.
FIELDS = {
    field.name: field
    for field in (
        _whole("seed", "Seed", PAINTING, "1-4"),
        _text(WORDS, "Prompt words", READING, "red, blue, green"),
        _text("negative_prompt", "Negative prompt", READING, '"", blurry, "dark, grey"'),
        _whole("steps", "Steps", PAINTING, "10-30 (+5)"),
        _number("guidance_scale", "Guidance", PAINTING, "3, 5, 7.5"),
        _choice("sampler", "Sampler", PAINTING, ()),
        _number("shift", "Shift", PAINTING, "1, 3, 5"),
        _number("skip_layer_guidance_scale", "Skip-layer guidance", PAINTING, "0, 2.8"),
        _whole("prior_steps", "Composition steps", PAINTING, "10-30 (+5)"),
        _number("prior_guidance_scale", "Composition guidance", PAINTING, "2, 4, 6"),
        _whole("decoder_steps", "Detail steps", LAST, "4, 8, 12"),
        _number("decoder_guidance_scale", "Detail guidance", LAST, "0, 1.1"),
        Field(name=SIZE, title="Size", kind="size", example="512x512, 768x512", rank=PAINTING),
        _text("checkpoint", "Checkpoint", CHECKPOINT, ""),
        _choice("t5", "T5", NETWORKS, T5),
        _whole("max_sequence_length", "Prompt length for T5", READING, "77, 256, 512"),
        _choice("stages", "Size of both stages", NETWORKS, STAGES),
        _choice("stage_c", "Size of Stage C", NETWORKS, STAGES),
        _choice("stage_b", "Size of Stage B", NETWORKS, STAGES),
        _whole("clip_skip", "CLIP skip", READING, "0, 1, 2"),
        _choice("prefer", "Memory", NETWORKS, PREFERENCES),
        _choice("dtype", "Precision", NETWORKS, DTYPES),
    )
}
SAMPLERS: dict[str, dict[str, SamplerInfo]] = {"sd15": SAMPLER_INFO, "sd3": FLOW_SAMPLER_INFO}
SAMPLER_LABELS = {name: info.label for infos in SAMPLERS.values() for name, info in infos.items()}


def fields(family: str) -> dict[str, Field]:
    """What can vary in a family's requests, by name."""
    if family not in REQUESTS:
        raise InvalidRequest(f"family is {family!r}; it can be {', '.join(REQUESTS)}")
    own = {each.name for each in dataclasses.fields(REQUESTS[family])} | {SIZE, WORDS}
    known = {name: each for name, each in FIELDS.items() if name in own}
    names = ", ".join(catalog.names(family)[:3])
    known["checkpoint"] = dataclasses.replace(known["checkpoint"], example=names)
    if family in SAMPLERS:
        labels = {name: info.label for name, info in SAMPLERS[family].items()}
        example = ", ".join(list(labels.values())[:3])
        known["sampler"] = dataclasses.replace(known["sampler"], choices=labels, example=example)
    return known


@dataclass(frozen=True)
class Axis:
    """A field and the values that it takes in turn. Of "prompt_words" the first is what stands in the prompt,
    and the others replace it."""

    field: str
    values: tuple[Value, ...]

    @staticmethod
    def parse(family: str, name: str, text: str) -> Axis:
        """From what was typed. Raises InvalidRequest, which names every value that cannot be."""
        known = fields(family)
        if name not in known:
            raise InvalidRequest(f"an axis is {name!r:.80}; it can be {', '.join(known)}")
        values = list(dict.fromkeys(_values(known[name], text)))  # ranges may overlap
        if not values:
            raise InvalidRequest(f"{name} has no values yet; they can be {known[name].example}")
        if len(values) > MOST_VALUES:
            raise InvalidRequest(too_many(name, len(values)))
        _check(family, name, values)
        return Axis(name, tuple(values))

    @property
    def title(self) -> str:
        return FIELDS[self.field].title

    @property
    def rank(self) -> int:
        return FIELDS[self.field].rank

    @property
    def labels(self) -> list[str]:
        """The values as they stand beside the pictures."""
        return [label(self.field, value) for value in self.values]

    @property
    def text(self) -> str:
        """The values as they could be typed."""
        verbatim = self.field in (WORDS, "negative_prompt")
        return ", ".join(map(_typed, map(str, self.values) if verbatim else self.labels))


def label(name: str, value: Value) -> str:
    if isinstance(value, tuple):
        return f"{value[0]}x{value[1]}"
    if name == "sampler":
        return SAMPLER_LABELS.get(str(value), str(value))
    if name == "checkpoint" and re.search(r"^[/~.\\]|^\w:\\|://", str(value)):
        return re.split(r"[/\\]", str(value).rstrip("/\\"))[-1]  # where it lies is nobody's business
    if isinstance(value, float):
        return f"{value:g}"
    return str(value) or "(none)"


def _typed(text: str) -> str:
    plain = text and text == text.strip() and text[0] not in '"“' and not any(each in text for each in COMMAS)
    return text if plain else '"' + text.replace('"', '""') + '"'


# ---- reading


def _values(known: Field, text: str) -> Iterator[Value]:
    for typed, quoted in _pieces(known.name, text):
        match known.kind:
            case "whole" | "number" if not quoted and (found := RANGE.fullmatch(typed)):
                for number in _range(known, typed, *found.groups()):
                    yield _plain(known, number)
            case "whole" | "number" if re.fullmatch(NUMBER, typed):
                yield _plain(known, Decimal(typed))
            case "choice":
                names = {each.casefold(): each for each in known.choices}
                labels = {shown.casefold(): each for each, shown in known.choices.items()}
                yield (names | labels).get(typed.casefold(), typed)
            case "size" if found := SIDES.fullmatch(typed):
                yield int(found[1]), int(found[2] or found[1])
            case _:
                yield typed


def _pieces(name: str, text: str) -> Iterator[tuple[str, bool]]:
    """The values as text, and whether they stood in quotes; what is empty counts in quotes only."""
    position = 0
    while position < len(text):
        if text[position].isspace() or text[position] in COMMAS:
            position += 1
            continue
        end = next((at for at in range(position, len(text)) if text[at] in COMMAS), len(text))
        if text[position] in '"“':
            found = QUOTED.match(text, position)
            rest = text[found.end() :].lstrip(" \t") if found else ""
            if found is None or (rest and rest[0] not in COMMAS):
                shown = text[position:end].strip()
                raise InvalidRequest(f"{name} has {shown!r:.80}; quotes can only be around a whole value")
            yield (found[1].replace('""', '"') if found[1] is not None else found[2]), True
            position = found.end()
        else:
            yield text[position:end].strip(), False
            position = end


def _range(
    known: Field, typed: str, first: str, last: str, step: str | None, count: str | None
) -> Iterator[Decimal]:
    low, high = Decimal(first), Decimal(last)
    if count is not None:
        number = int(count)
        if not 1 <= number <= MOST_VALUES:
            raise InvalidRequest(too_many(f"{known.name} {typed}", number))
        for index in range(number):
            value = low + (high - low) * index / max(number - 1, 1)
            yield Decimal(round(value)) if known.kind == "whole" else round(value, 6)
        return
    by = Decimal(step) if step is not None else Decimal(1 if high >= low else -1)
    if by == 0 or (high - low) / by < 0:
        raise InvalidRequest(
            f"{known.name} is {typed}, which never arrives; it can be {known.name} 10-30 (+5)"
        )
    number = int((high - low) / by) + 1
    if number > MOST_VALUES:
        raise InvalidRequest(too_many(f"{known.name} {typed}", number))
    if number == 1 and low != high:
        raise InvalidRequest(
            f"{known.name} is {typed}; say in which steps, as in {low}-{high} (+{(high - low) / 4:g})"
        )
    yield from (low + by * index for index in range(number))


def _plain(known: Field, number: Decimal) -> int | float:
    """A whole number as one, where whole numbers are meant; the request refuses others by their name."""
    whole = known.kind == "whole" and number == number.to_integral_value()
    return int(number) if whole else float(number)


def too_many(what: str, count: int) -> str:
    return f"{what} has {count} values; a side of a grid can have 1 to {MOST_VALUES}"


def _check(family: str, name: str, values: Sequence[Value]) -> None:
    """Raise InvalidRequest for all that the family's request does not take."""
    refused: dict[str, list[str]] = {}
    for value in values:
        try:
            if name == "seed" and value == -1:
                raise InvalidRequest(f"seed is -1; in a grid it can be a whole number from 0 to {MAX_SEED}")
            changed(REQUESTS[family](), {name: value})
        except InvalidRequest as error:
            what, semicolon, allowed = str(error).partition("; ")
            refused.setdefault(semicolon + allowed, []).append(what)
    if refused:
        raise InvalidRequest(". ".join(", ".join(what) + allowed for allowed, what in refused.items()))


def changed(request: Any, values: Mapping[str, Value]) -> Any:
    """The request with these fields changed, all but the prompt's words."""
    change: dict[str, Any] = {}
    if "stages" in values:
        change |= {"stage_c": None, "stage_b": None}  # they would overrule it
    for name, value in values.items():
        if name != SIZE:
            change |= {} if name == WORDS else {name: value}
        elif isinstance(value, tuple):
            change |= {"width": value[0], "height": value[1]}
        else:
            raise InvalidRequest(f"size is {value!r:.80}; it can be width x height in pixels, as in 512x768")
    return dataclasses.replace(request, **change)
