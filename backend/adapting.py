"""Which adapters a request asks for, in its prompt and in its `loras`. No torch at import."""

from __future__ import annotations

import hashlib
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import TypeVar

from backend.errors import InvalidRequest, TriptychError
from backend.requests import Request
from backend.settings import Settings
from backend.text import inversion, tags
from backend.text.inversion import UsedEmbedding
from backend.weights.adapters import EMBEDDING, Adapter, adapter, adapters
from backend.weights.lora import Lora, UsedLora

R = TypeVar("R", bound=Request)


@dataclass(frozen=True)
class Found:
    """What a request's adapters are."""

    loras: tuple[UsedLora, ...] = ()
    embeddings: tuple[UsedEmbedding, ...] = ()


def plain(request: R, settings: Settings) -> tuple[R, Found]:
    """The request with a prompt that names no LoRAs, and all that it names, found.

    Raises InvalidRequest for one that is not there, is named twice or is for another family, CheckpointError
    for one that is damaged.
    """
    prompt, named = (request.prompt, ()) if request.raw_prompt else tags.extract(request.prompt)
    loras = _loras((*map(tags.read, request.loras), *named), request.family, settings)
    read = () if request.raw_prompt else (prompt, request.negative_prompt)
    found = Found(loras, _embeddings(read, request.family, settings))
    return replace(request, prompt=prompt, loras=()), found


def hashes(request: Request, settings: Settings) -> dict[str, str]:
    """The LoRAs of a request by name → what other programs know them by: the start of the SHA-256 of their
    tensors, or of the whole file where it is no safetensors one. What is gone meanwhile is left out: the
    picture is made."""
    with suppress(TriptychError, OSError):
        return {use.name: _hash(use.lora.path, use.lora.stamp) for use in plain(request, settings)[1].loras}
    return {}


@lru_cache(maxsize=256)
def _hash(path: Path, stamp: str) -> str:
    with path.open("rb") as file:
        if path.suffix == ".safetensors":
            file.seek(8 + int.from_bytes(file.read(8), "little"))
        return hashlib.file_digest(file, "sha256").hexdigest()[:12]


def _loras(named: tuple[tags.Named, ...], family: str, settings: Settings) -> tuple[UsedLora, ...]:
    found: dict[Path, UsedLora] = {}
    for each in named:
        told = adapter(each.name, family, settings)
        if told.path in found:
            raise InvalidRequest(f"the LoRA {told.name!r} is named twice; name it once")
        found[told.path] = UsedLora(Lora(told.path), told.name, each.network, each.text)
    return tuple(found.values())


def _embeddings(prompts: tuple[str, ...], family: str, settings: Settings) -> tuple[UsedEmbedding, ...]:
    """Those that the prompts have, by the words that they have for them."""
    known: dict[str, list[Adapter]] = {}
    elsewhere: dict[str, Path] = {}
    for each in adapters(settings, kind=EMBEDDING):
        for word in dict.fromkeys(word.lower() for word in (each.name, *each.words)):
            if family in each.families:
                known.setdefault(word, []).append(each)
            else:
                elsewhere[word] = each.path
    used: dict[str, UsedEmbedding] = {}
    for word in (word for prompt in prompts for word in inversion.names_in(prompt, tuple(known), elsewhere)):
        if len(known[word]) > 1:
            names = " and ".join(each.name for each in known[word])
            raise InvalidRequest(
                f"{word!r:.80} is the name of two files ({names}); write which, with its folder"
            )
        path = known[word][0].path
        used[word] = UsedEmbedding(word, path, inversion.look(path))
    return tuple(used.values())
