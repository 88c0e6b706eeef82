"""The small files that go with a checkpoint: LoRAs and embeddings, those that lie in the models' folder and
those that come with the demos. What they are is told by their headers: nothing is loaded, without torch.
"""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

from backend.catalog import FAMILIES
from backend.errors import CheckpointError, InvalidRequest, TriptychError
from backend.settings import Settings
from backend.text import inversion
from backend.text.tags import UNSAYABLE
from backend.weights import pickles
from backend.weights.files import WEIGHTS
from backend.weights.local import MOST, weight_files
from backend.weights.lora import ROLES, Elsewhere, Lora, family_of, other_kind
from backend.weights.source import DEMO, on_disk

LORA, EMBEDDING = "lora", "embedding"
BUNDLED = DEMO / "adapters"
NEAR = 4  # names that an error lists
MOST_WORDS = 12
LONGEST_WORD = 120  # characters
LARGEST_EMBEDDING = 64 * 2**20  # bytes; the largest known are of some hundred vectors
SIDECAR = 2**20  # bytes of a text beside a file that are read

# Adapters that make a checkpoint paint in a few steps, by the names that they are published under: the first
# row that fits tells the settings that they are made for. "steps" may stand in the name.
FEW_STEPS: tuple[tuple[str, str, dict[str, Any]], ...] = (
    ("sd15", r"lcm", {"sampler": "lcm", "steps": 4, "guidance_scale": 1.0}),
    ("sd15", r"hyper|tcd|turbo|lightning", {"sampler": "lcm", "steps": 8, "guidance_scale": 1.0}),
    ("sd3", r"hyper.*cfg|cfg.*hyper", {"sampler": "euler", "steps": 8, "guidance_scale": 3.0}),
    ("sd3", r"hyper|turbo|flash|lightning", {"sampler": "euler", "steps": 4, "guidance_scale": 1.0}),
)
STEPS = re.compile(r"(\d{1,2})[ _-]?steps?(?![a-z])")


@dataclass(frozen=True, kw_only=True)
class Adapter:
    """A LoRA or an embedding: `name` is how a prompt calls it, `families` are those that it is for.

    `words` make a LoRA's subject or style appear; `offers` are settings of a request that it is made for.
    `rank` and `base` (what it was trained on) are told where the file tells them. One with a `problem` cannot
    be used.
    """

    name: str
    path: Path
    kind: str
    bytes: int
    families: tuple[str, ...] = ()
    title: str = ""
    words: tuple[str, ...] = ()
    licence: str = ""
    base: str = ""
    rank: str = ""
    offers: Mapping[str, Any] = field(default_factory=dict)
    problem: str = ""


def adapters(settings: Settings, family: str | None = None, kind: str | None = None) -> list[Adapter]:
    """What lies there for a family, of one kind, by name; what cannot be used is in the list of no family."""
    found = [each for each in _all(settings) if kind in (None, each.kind)]
    if family is not None:
        found = [each for each in found if family in each.families and not each.problem]
    return found


def adapter(name: str, family: str, settings: Settings) -> Adapter:
    """The LoRA that a prompt or a request calls so: by its name, or, but on a public server, by its file.

    Raises InvalidRequest for one that is not there, naming those near it, of which there are two, or that is
    for another family; CheckpointError for one that is damaged.
    """
    there = [each for each in _all(settings) if each.kind == LORA]
    called = [each for each in there if _called(each, name, settings)]
    if len(called) > 1:  # of one name, for several families
        called = [each for each in called if family in each.families] or called
    if len(called) > 1:
        names = " and ".join(_below(each.path, settings) for each in called)
        raise InvalidRequest(f"{name!r:.80} is the name of two files ({names}); write which, with its folder")
    if called:
        return _usable(called[0], family)
    if path := _file(name, settings):
        told = _look(path)
        if told is None or told.kind != LORA:
            raise CheckpointError(f"{path.name} is no LoRA")
        return _usable(told, family)
    sayable = (each for each in there if not UNSAYABLE.search(each.name))
    own = [each.name for each in sayable if family in each.families and not each.problem]
    near = difflib.get_close_matches(name.lower(), {each.lower(): each for each in own}, NEAR, 0.5)
    by_case = {each.lower(): each for each in own}
    shown = [by_case[each] for each in near] or sorted(own)[:NEAR]
    if not shown:
        raise InvalidRequest(f"there is no LoRA called {name!r:.80}; none is here for this family")
    raise InvalidRequest(f"there is no LoRA called {name!r:.80}; it can be {', '.join(shown)}")


def _called(each: Adapter, name: str, settings: Settings) -> bool:
    """Whether that is its name, alone or with its folder, also while no other file has the same."""
    plain = re.sub(r"\.(safetensors|ckpt|bin|pt|pth)$", "", name.lower())
    known = (each.name, each.path.stem, _below(each.path, settings))
    return not {name.lower(), plain}.isdisjoint(map(str.lower, known))


def _usable(each: Adapter, family: str) -> Adapter:
    if each.problem:
        raise InvalidRequest(each.problem)
    if family not in each.families:
        own = " and ".join(FAMILIES[name].title for name in each.families)
        raise InvalidRequest(f"{each.name} is a LoRA for {own}, and {FAMILIES[family].title} paints here")
    return each


def _file(name: str, settings: Settings) -> Path | None:
    """The file of a name that no sound adapter has: one that is damaged, or lies elsewhere."""
    for path in _paths(settings):
        if name in (path.stem, path.name):
            return path
    with suppress(CheckpointError):  # what is no path is an unknown name
        path = None if settings.public else on_disk(name, settings.models_dir)
        if path is not None and path.is_file() and path.suffix in WEIGHTS:
            return path
    return None


def _paths(settings: Settings) -> list[Path]:
    roots = [root for root in (settings.models_dir, BUNDLED) if root is not None]
    return [path for root in roots for path in weight_files(root)]


def _below(path: Path, settings: Settings) -> str:
    """A file's place below the models' folder, without the end of its name; one in it is "./name"."""
    short = path.with_suffix("")
    for root in (settings.models_dir, BUNDLED):
        if root is not None and short.is_relative_to(root):
            below = short.relative_to(root).as_posix()
            return below if "/" in below else f"./{below}"
    return short.name


def _all(settings: Settings) -> list[Adapter]:
    """One's own and those that come with the demos, by name; two of one name are called by their folders."""
    found = {path: told for path in _paths(settings) if (told := _told_of(path))}
    counts: dict[tuple[str, str], int] = {}
    for each in found.values():
        key = (each.kind, each.name.lower())
        counts[key] = counts.get(key, 0) + 1
    named = (
        replace(each, name=_below(path, settings)) if counts[each.kind, each.name.lower()] > 1 else each
        for path, each in found.items()
    )
    return sorted(named, key=lambda each: (each.name.lower(), str(each.path)))


# ---- what a file is


def _told_of(path: Path) -> Adapter | None:
    """What a file is; None for one that is no adapter, or is gone."""
    try:
        stat = path.stat()
        beside = [(each, each.stat().st_mtime_ns) for each in _sidecars(path) if each.is_file()]
        return _told(path, stat.st_size, stat.st_mtime_ns, tuple(beside))
    except OSError:
        return None


@lru_cache(maxsize=MOST)
def _told(path: Path, size: int, changed_ns: int, beside: tuple[tuple[Path, int], ...]) -> Adapter | None:
    try:
        return _look(path)
    except TriptychError:  # damaged, or a pickle that is more than weights: the list of models says so
        return None


def _look(path: Path) -> Adapter | None:
    """Raises CheckpointError for a file that is damaged or could run code."""
    size, notes = path.stat().st_size, _notes(each for each in _sidecars(path) if each.is_file())
    return _lora(path, size, notes) or (_embedding(path, size) if size <= LARGEST_EMBEDDING else None)


def _embedding(path: Path, size: int) -> Adapter:
    look = inversion.look(path)
    widths = ", ".join(str(width) for _, width in look.sizes.values())
    return Adapter(
        name=look.name,
        path=path,
        kind=EMBEDDING,
        bytes=size,
        families=look.families,
        title=look.token,
        words=look.words,
        problem=""
        if look.families
        else f"{path.name} is an embedding of {widths} numbers a vector, for "
        "networks that are not painted with here",
    )


def _lora(path: Path, size: int, notes: Mapping[str, Any]) -> Adapter | None:
    problem, family, told, rank = "", None, {}, ""
    if path.suffix == ".safetensors":
        lora = Lora(path)
        if not any(map(ROLES.fullmatch, lora.shapes)) and not other_kind(lora.shapes):
            return None
        told = lora.metadata
        try:
            family, rank = lora.family, _range(lora.ranks)
        except CheckpointError as error:
            problem = str(error)
    else:
        names = [match["layer"] for text in pickles.sound(path).texts if (match := ROLES.fullmatch(text))]
        if not names:
            return None
        family = family_of(names)
        if isinstance(family, Elsewhere):
            problem, family = f"{path.name} is a LoRA for {family}, which is not painted with here", None
    if family is None and not problem:
        problem = f"{path.name} is a LoRA for a network that is not known"
    title = told.get("modelspec.title") or told.get("ss_output_name") or path.stem
    return Adapter(
        name=path.stem,
        path=path,
        kind=LORA,
        bytes=size,
        families=(family,) if family else (),
        title=title[:LONGEST_WORD],
        words=_words(told, notes),
        licence=told.get("modelspec.license", "")[:LONGEST_WORD],
        base=(told.get("ss_base_model_version") or told.get("modelspec.architecture") or "")[:LONGEST_WORD],
        rank=rank,
        offers=_offers(family, f"{path.stem} {title} {told.get('ss_training_comment', '')}"),
        problem=problem,
    )


def _range(ranks: tuple[int, ...]) -> str:
    return str(ranks[0]) if len(ranks) == 1 else f"{ranks[0]} to {ranks[-1]}"


def _offers(family: str | None, called: str) -> dict[str, Any]:
    called = called.lower()
    for made_for, pattern, settings in FEW_STEPS:
        if made_for == family and re.search(rf"(?<![a-z]){pattern}", called):
            steps = STEPS.search(called)
            return {**settings, "steps": int(steps[1])} if steps and int(steps[1]) else dict(settings)
    return {}


def _words(told: Mapping[str, str], notes: Mapping[str, Any]) -> tuple[str, ...]:
    """The words that call what was trained: as a person wrote them down, else the captions' commonest."""
    written = notes.get("activation text") or told.get("modelspec.trigger_phrase") or ""
    words = [word.strip() for word in str(written).split(",")]
    trained = notes.get("trainedWords")  # as the largest collection of such files writes them
    if isinstance(trained, list):
        words += [str(word).strip().rstrip(",") for word in trained]
    if not any(words):
        words = _common(told.get("ss_tag_frequency", "{}"))
    known = dict.fromkeys(word[:LONGEST_WORD] for word in words if word)
    return tuple(known)[:MOST_WORDS]


def _common(frequencies: str) -> list[str]:
    """The tags of the captions that a trainer counted, the most frequent first."""
    counts: dict[str, int] = {}
    with suppress(ValueError, AttributeError, TypeError, RecursionError):
        for tags in json.loads(frequencies).values():
            for tag, count in tags.items():
                counts[tag.strip()] = counts.get(tag.strip(), 0) + int(count)
    return sorted(counts, key=lambda tag: -counts[tag])[:MOST_WORDS]


def _sidecars(path: Path) -> list[Path]:
    """Where the popular web UIs and download helpers write down what a file is for."""
    return [path.with_suffix(".json"), path.with_suffix(".civitai.info")]


def _notes(paths: Iterable[Path]) -> dict[str, Any]:
    notes: dict[str, Any] = {}
    for path in paths:
        with suppress(OSError, ValueError, RecursionError):
            read = json.loads(path.read_bytes()[:SIDECAR])
            notes |= read if isinstance(read, dict) else {}
    return notes
