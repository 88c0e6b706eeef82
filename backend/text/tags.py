"""LoRAs named in a prompt, as the popular web UIs write them:

    <lora:name>            with the weight 1
    <lora:name:0.8>        0.8
    <lora:name:0.5:0.8>    0.5 for the text encoders, 0.8 for the network
    <lora:name:te=0.5:unet=0.8>

They stand anywhere in the prompt, and the encoders do not read them. No torch here.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from contextlib import suppress
from typing import Any, NamedTuple

from backend.errors import InvalidRequest

TAG = re.compile(r"<(?P<kind>lora|lyco|hypernet):(?P<rest>[^<>]*)>", re.IGNORECASE)
UNSAYABLE = re.compile(r"[<>:]|^\s|\s$")  # in a LoRA's name: what would end its tag, or a part of it
MOST_WEIGHT = 10.0


class Named(NamedTuple):
    """A LoRA by name or file, and its weights for the network and for the text encoders."""

    name: str
    network: float
    text: float


def extract(prompt: str) -> tuple[str, tuple[Named, ...]]:
    """The prompt without its tags, and what they name. Raises InvalidRequest for a tag that means nothing."""
    named = tuple(_named(match) for match in TAG.finditer(prompt))
    if not named:
        return prompt, ()
    return re.sub(rf"\s*{TAG.pattern}", "", prompt, flags=re.IGNORECASE).strip(), named


def with_tags(prompt: str, loras: Iterable[Sequence[str | float]]) -> str:
    """The prompt with a tag for each of a request's `loras`."""
    return " ".join(filter(None, [prompt, *map(_tag, loras)]))


def read(value: object) -> Named:
    """One of a request's `loras`. Raises InvalidRequest for what is none."""
    given: list[Any] = list(value) if isinstance(value, list | tuple) else []
    if not (2 <= len(given) <= 3 and isinstance(given[0], str) and given[0].strip()):
        raise InvalidRequest(
            f"loras holds {value!r:.80}; it can hold pairs of a name or file and a weight, or a name, the "
            "network's weight and the text encoders' one"
        )
    name, network, text = given[0].strip(), given[1], given[-1]
    return Named(name, _weight("loras", name, network), _weight("loras", name, text))


def _named(match: re.Match[str]) -> Named:
    tag, (name, *values) = match[0], match["rest"].split(":")
    if match["kind"].lower() == "hypernet":
        raise InvalidRequest(f"prompt holds {tag!r:.80}; hypernetworks cannot be used, LoRAs can be")
    if not name.strip():
        raise InvalidRequest(f"prompt holds {tag!r:.80}, which names nothing; a name comes after the colon")
    plain = [value for value in values if "=" not in value]
    told = dict(value.split("=", 1) for value in values if "=" in value)
    text = told.get("te", plain[0] if plain else "1")
    network = told.get("unet", plain[1] if len(plain) > 1 else text)
    name = name.strip()
    return Named(name, _weight("prompt", name, network), _weight("prompt", name, text))


def _weight(told_by: str, name: str, value: object) -> float:
    number = math.nan
    with suppress(ValueError, OverflowError):
        if isinstance(value, int | float | str) and not isinstance(value, bool):
            number = float(value)
    if not abs(number) <= MOST_WEIGHT:
        raise InvalidRequest(
            f"{told_by} has {value!r:.80} for the weight of {name[:80]!r}; it can be a number from "
            f"{-MOST_WEIGHT:g} to {MOST_WEIGHT:g}"
        )
    return number


def _tag(lora: Sequence[str | float]) -> str:
    name, network, text = read(lora)
    if network == text:
        return f"<lora:{name}:{network:g}>"
    return f"<lora:{name}:{text:g}:{network:g}>"
