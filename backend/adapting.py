"""Which adapters a request asks for, in its prompt and in its `loras`. No torch at import."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

from backend.errors import InvalidRequest
from backend.requests import Request
from backend.settings import Settings
from backend.text import inversion, tags
from backend.text.inversion import UsedEmbedding
from backend.weights.adapters import EMBEDDING, LORA, Adapter, adapter, adapters
from backend.weights.lora import Lora, UsedLora

R = TypeVar("R", bound=Request)


@dataclass(frozen=True)
class Found:
    """What a request's adapters are."""

    loras: tuple[UsedLora, ...] = ()
    embeddings: tuple[UsedEmbedding, ...] = ()


def plain(request: R, settings: Settings) -> tuple[R, Found]:
    """The request with a prompt that names no LoRAs, and all that it names, found.

    Raises InvalidRequest for one that is not there, or is named twice, CheckpointError for one that is
    damaged or for another family.
    """
    prompt, named = (request.prompt, ()) if request.raw_prompt else tags.extract(request.prompt)
    loras = _loras((*map(tags.read, request.loras), *named), request.family, settings)
    read = () if request.raw_prompt else (prompt, request.negative_prompt)
    found = Found(loras, _embeddings(read, request.family, settings))
    return replace(request, prompt=prompt, loras=()), found


def _loras(named: tuple[tags.Named, ...], family: str, settings: Settings) -> tuple[UsedLora, ...]:
    found: dict[Path, UsedLora] = {}
    for each in named:
        told = adapter(each.name, family, settings, LORA)
        if told.path in found:
            raise InvalidRequest(
                f"the LoRA {told.name!r} is named twice, with the weights {found[told.path].network:g} and "
                f"{each.network:g}; name it once"
            )
        found[told.path] = UsedLora(Lora(told.path), told.name, each.network, each.text)
    return tuple(found.values())


def _embeddings(prompts: tuple[str, ...], family: str, settings: Settings) -> tuple[UsedEmbedding, ...]:
    """Those that the prompts have, by the words that they have for them."""
    known: dict[str, Adapter] = {}
    for each in adapters(settings, family, EMBEDDING):
        known |= dict.fromkeys((each.name, *each.words), each)
    words = dict.fromkeys(word for prompt in prompts for word in inversion.names_in(prompt, tuple(known)))
    return tuple(UsedEmbedding(word, known[word].path, inversion.look(known[word].path)) for word in words)
