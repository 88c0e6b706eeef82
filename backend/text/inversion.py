"""Textual inversion (Gal et al., arXiv:2208.01618): words whose vectors lie in a small file beside the model.

Layouts, all of them with n vectors of D numbers a word:

    {"<word>": (D,) or (n, D)}                                  the hub's
    {"string_to_param": {"*": (n, D)}, "name": ..., ...}        the popular trainers', pickled
    {"emb_params": (n, D)}                                      the same as safetensors
    {"clip_l": (n, 768), "clip_g": (n, 1280)}                   of models with two CLIPs; one of them will do

A prompt has such a word by itself, in any case, or as `embedding:word`; a weight in brackets is that of all
its vectors. Telling what lies in a file takes no torch.
"""

from __future__ import annotations

import re
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from difflib import get_close_matches
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from backend.errors import CheckpointError, InvalidRequest
from backend.weights import files, pickles

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

CLIP_L, CLIP_G = "clip_l", "clip_g"
KINDS = {768: CLIP_L, 1280: CLIP_G}  # the encoder that vectors of a width are for
TITLES: dict[tuple[str, ...], str] = {
    (CLIP_L,): "Stable Diffusion 1.x (CLIP-L)",
    (CLIP_G,): "Stable Cascade, SDXL or Stable Diffusion 3 (bigG)",
    (CLIP_G, CLIP_L): "Stable Diffusion 3 or SDXL (CLIP-L and bigG)",
    ("1024",): "Stable Diffusion 2.x",
}
FAMILIES: dict[tuple[str, ...], tuple[str, ...]] = {
    (CLIP_L,): ("sd15", "sd3"),
    (CLIP_G,): ("sd3", "stable_cascade"),
    (CLIP_G, CLIP_L): ("sd3",),
    ("1024",): (),
}
ANY_FAMILY = ("sd15", "sd3", "stable_cascade")
PLAIN = "emb_params"  # the name of vectors whose word is the file's
UNNAMED = "learned_embeds"  # what the hub's files are called, whatever is in them
MOST, WIDEST = 75 * 32, 2**13  # vectors, of which no prompt takes more, and numbers in one
LAYERS = (".weight", ".bias", ".alpha")  # tensors of a network, and no words

WEIGHT = r":\s*[+-]?(?:\d+\.?\d*|\.\d+)\s*\)"  # it holds no name, even of an embedding called 1
UNKNOWN = r"(?P<unknown>[^\s,:()\[\]\\]+?)"
SUFFIX = r"(?:\.(?:safetensors|pt|bin))?"
END = r"(?=[.;!?|]*(?:[\s,:()\[\]\\]|$))"  # of a name behind `embedding:`


@dataclass(frozen=True, kw_only=True)
class Look:
    """What a file's header says. `sizes` are (n, D) by the encoder that they are for: "clip_l", "clip_g", or
    the width of another; `token` is the word that the file itself has for it, "" where it has none."""

    name: str
    token: str
    sizes: Mapping[str, tuple[int, int]]

    @property
    def count(self) -> int:
        """How many places of a prompt it takes."""
        return max(count for count, _ in self.sizes.values())

    @property
    def families(self) -> tuple[str, ...]:
        """Those that may have an encoder for it; any, if its width tells of none."""
        return FAMILIES.get(tuple(sorted(self.sizes)), ANY_FAMILY)

    @property
    def words(self) -> tuple[str, ...]:
        """What prompts may call it."""
        return tuple(dict.fromkeys(word for word in (self.name, self.token) if word))


@dataclass(frozen=True, kw_only=True)
class Embedding(Look):
    """With its vectors: (n, D) in float32, by the encoder that they are for."""

    vectors: Mapping[str, Tensor]


def look(path: Path) -> Look:
    """What lies in a file, whose vectors are not read. Raises CheckpointError for one that holds none, or is
    damaged."""
    if path.suffix == ".safetensors":
        content: Any = {name: pickles.Stored(shape) for name, shape in files.shapes(path).items()}
    else:
        content = pickles.skeleton(path)
    word, stored = _parts(path, content, pickles.Stored)
    name = path.stem if not path.stem.startswith(UNNAMED) else word or path.absolute().parent.name
    return Look(name=name, token=word, sizes={kind: _size(path, each.shape) for kind, each in stored.items()})


def read_embedding(path: Path) -> Embedding:
    """Raises CheckpointError for a file that is damaged, could run code, or holds no word, or several."""
    import torch

    header = look(path)  # says what is wrong with it, the code in a pickle too
    if path.suffix == ".safetensors":
        content: Any = dict(files.open_tensors([path]))
    else:
        with torch.serialization.safe_globals([torch.nn.ParameterDict]):  # it keeps what it is given
            content = files.unpickled(path)
    vectors: dict[str, Tensor] = {}
    for kind, tensor in _parts(path, content, torch.Tensor)[1].items():
        if not tensor.is_floating_point() or not tensor.isfinite().all():
            raise CheckpointError(f"{path} is damaged: its vectors are not all of finite numbers")
        vectors[kind] = tensor.detach().to(torch.float32, copy=True).reshape(_size(path, tensor.shape))
    return Embedding(name=header.name, token=header.token, sizes=header.sizes, vectors=vectors)


def _parts(path: Path, content: Any, tensor: type[Any]) -> tuple[str, dict[str, Any]]:
    """The word that a file itself has for its vectors, and these, by the encoder that they are for."""
    if isinstance(content, tensor):
        content = {PLAIN: content}
    elif isinstance(content, Mapping) and "string_to_param" in content:
        content = content["string_to_param"]
        content = getattr(content, "_parameters", content)  # of a module, as the first of these files have it
    named = content.items() if isinstance(content, Mapping) else ()
    tensors = {str(name): each for name, each in named if isinstance(each, tensor)}
    if not tensors or any(name.endswith(LAYERS) for name in tensors):
        raise CheckpointError(f"{path} is no embedding of textual inversion")
    clips = {name: each for name, each in tensors.items() if name in (CLIP_L, CLIP_G)}
    if clips and tensors.keys() <= {*clips, "t5"}:  # T5 reads plain text alone
        return "", clips
    if len(tensors) > 1:
        words = ", ".join(list(tensors)[:3])
        raise CheckpointError(f"{path} holds {len(tensors)} words ({words:.80}); an embedding has one")
    ((word, vectors),) = tensors.items()
    width = vectors.shape[-1] if vectors.shape else 0
    return "" if word in (PLAIN, "*") else word, {KINDS.get(width, str(width)): vectors}


def _size(path: Path, shape: Sequence[int]) -> tuple[int, int]:
    count, width = (1, *shape)[-2:] if 1 <= len(shape) <= 2 else (0, 0)
    if not (1 <= count <= MOST and 1 <= width <= WIDEST):
        raise CheckpointError(
            f"{path} is no embedding of textual inversion: its numbers have the shape {tuple(shape)}"
        )
    return count, width


class UsedEmbedding(NamedTuple):
    """One that a request's prompts have: as what, from where, and what its header says."""

    name: str
    path: Path
    look: Look


# ---- for an encoder


def check_fits(name: str, sizes: Mapping[str, tuple[int, int]], widths: Mapping[str, int]) -> None:
    """`sizes` are those of a `Look`, `widths` of the tokens that encoders ("clip_l", "clip_g") read.

    Raises InvalidRequest for vectors that none of them takes, saying what they are for. Vectors for one of
    two encoders are taken.
    """
    if all(any(_takes(kind, size, each) for each in widths.items()) for kind, size in sizes.items()):
        return
    theirs, ours = (
        " + ".join(str(width) for _, width in sizes.values()),
        " + ".join(map(str, widths.values())),
    )
    raise InvalidRequest(
        f"the embedding {name!r} is for {_title(sizes)}: its vectors have {theirs} numbers, and those of "
        f"this checkpoint {ours}"
    )


def check_width(name: str, shape: Sequence[int], width: int) -> None:
    """Raises InvalidRequest for vectors (n, D) that an encoder of this width cannot read."""
    count, theirs = shape
    if theirs != width:
        check_fits(name, {KINDS.get(theirs, str(theirs)): (count, theirs)}, {"": width})


def fitting(embeddings: Mapping[str, Embedding], widths: Mapping[str, int]) -> dict[str, dict[str, Tensor]]:
    """By encoder, in the order of `widths`: what each name stands for there, (n, D), or (0, D) where it has
    no vectors for that encoder. Raises InvalidRequest as `check_fits` does."""
    out: dict[str, dict[str, Tensor]] = {encoder: {} for encoder in widths}
    for name, embedding in embeddings.items():
        check_fits(name, embedding.sizes, widths)
        for encoder, width in widths.items():
            for kind, vectors in embedding.vectors.items():
                out[encoder].setdefault(name, vectors.new_empty(0, width))
                if _takes(kind, embedding.sizes[kind], (encoder, width)):
                    out[encoder][name] = vectors
    return out


def _title(sizes: Mapping[str, tuple[int, int]]) -> str:
    return TITLES.get(tuple(sorted(sizes)), "another text encoder")


def _takes(kind: str, size: tuple[int, int], encoder: tuple[str, int]) -> bool:
    name, width = encoder
    return kind in (name, str(width)) and size[1] == width


@contextmanager
def put_in(encoder: PreTrainedModel, vectors: Mapping[tuple[int, int], Tensor]) -> Generator[None]:
    """While this lasts, what the encoder reads at each (row, place) of its tokens is a vector (D,).

    The ids there stay ordinary ones: CLIP takes its pooled features where the id is highest, at the text's
    end, so that ids beyond the vocabulary would move them.
    """
    if not vectors:
        yield
        return
    rows, places = zip(*vectors, strict=True)

    def overwrite(_module: Any, _inputs: Any, features: Tensor) -> None:
        for row, place, vector in zip(rows, places, vectors.values(), strict=True):
            features[row, place] = vector.to(features.device, features.dtype)

    handle = encoder.get_input_embeddings().register_forward_hook(overwrite)
    try:
        yield
    finally:
        handle.remove()


# ---- in a prompt


class Name(str):
    """Of an embedding, as it is known: no text to read, but a place for its vectors."""

    __slots__ = ()


def names_in(prompt: str, known: Sequence[str], elsewhere: Mapping[str, Path] | None = None) -> list[str]:
    """Those of the known names that a prompt has, as they are known, in its order, each once.

    Raises InvalidRequest for `embedding:name` where none is called so; it lists near ones. `elsewhere` are
    those for other families, and their files: by themselves they are text, and `embedding:name` says what
    they are for.
    """
    found = pieces(prompt, known, elsewhere)
    return list(dict.fromkeys(str(piece) for piece in found if isinstance(piece, Name)))


def without_names(prompt: str, known: Sequence[str]) -> str:
    """What is left of a prompt for an encoder that has no vectors. Raises what `names_in` does."""
    return "".join(piece for piece in pieces(prompt, known) if not isinstance(piece, Name))


def pieces(
    prompt: str, known: Sequence[str], elsewhere: Mapping[str, Path] | None = None
) -> list[str | Name]:
    """A prompt cut at the names in it, which are `Name`s. Raises what `names_in` does.

    Of several that begin at one place the longest counts. A bracket in a name may have its backslash or not.
    """
    out, at = [], 0
    flat = _flat(prompt)  # of a thousand names it has few: these alone are looked for with care
    here, away = (
        tuple(name for name in names or () if name.strip() and _flat(name) in flat)
        for names in (known, elsewhere)
    )
    for match in _pattern(here, away).finditer(prompt):
        group = match.lastgroup
        if group == "unknown":
            raise _unknown(match["unknown"], known)
        if elsewhere and group and group.startswith("away"):
            name = away[int(group[4:])]
            title = _title(look(elsewhere[name]).sizes)
            raise InvalidRequest(f"the embedding {name!r} is for {title}, and not for this family")
        if group is not None:  # else it is a weight, in which a name of digits would be found
            out += [prompt[at : match.start()], Name(here[int(group[4:])])]
            at = match.end()
    return [piece for piece in [*out, prompt[at:]] if piece]


def _flat(text: str) -> str:
    return " ".join(text.replace("\\", "").lower().split())


@lru_cache(maxsize=16)
def _pattern(here: tuple[str, ...], away: tuple[str, ...]) -> re.Pattern[str]:
    """What stands for the names in a prompt; its group's name ends in the number of the name."""
    named = [(name, f"here{number}") for number, name in enumerate(here)]
    named += [(name, f"away{number}") for number, name in enumerate(away)]
    named.sort(key=lambda each: -len(each[0]))  # of two alike, that which is here
    called = [f"(?P<{group}>{_written(name)})" for name, group in named]
    explicit = rf"(?<!\w)embedding:(?:{'|'.join([*called, UNKNOWN])}){SUFFIX}{END}"
    bare = [f"(?P<bare{group[4:]}>{_alone(name)})" for name, group in named if group.startswith("here")]
    return re.compile("|".join([WEIGHT, explicit, *bare]), re.IGNORECASE)


def _written(name: str) -> str:
    """With any space between words, and a backslash or not before what could be a bracket of a weight."""
    words = (
        "".join(r"\\?" * (each in r"()[]\\") + re.escape(each) for each in word) for word in name.split()
    )
    return r"\s+".join(words)


def _alone(name: str) -> str:
    """As a word: no letter or digit goes on from it. That matters not where it is in <> of its own."""
    before, after = (rf"(?{side}\w)" for side in ("<!", "!"))
    first, last = (bool(re.match(r"\w", name.strip()[at])) for at in (0, -1))
    return before * first + _written(name) + after * last


def _unknown(name: str, known: Sequence[str]) -> InvalidRequest:
    if not known:
        return InvalidRequest(f"no embedding is called {name!r}: there is none for this family")
    lower = {each.lower(): each for each in known}
    near = [lower[each] for each in get_close_matches(name.lower(), lower, n=3, cutoff=0.5)]
    names = ", ".join(repr(each) for each in near or known[:3])
    if near:
        return InvalidRequest(f"no embedding is called {name!r}; near are {names}")
    return InvalidRequest(f"no embedding is called {name!r}; some that are there: {names}")
