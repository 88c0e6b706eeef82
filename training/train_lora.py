"""Trains a LoRA on a folder of captioned pictures: `picture.png` beside `picture.txt`.

`python -m training.train_lora FOLDER --base CHECKPOINT --family sd15 --name NAME` writes NAME.safetensors,
which goes into the models folder. The base is whatever the studio takes for a checkpoint; `demo` is the
built-in one. What was interrupted resumes where it was last saved, if it is called alike and the pictures are
the same. Learnt are low-rank terms on the attention layers of the network, with `--layers all` on all linear
and convolutional layers of its blocks, with `--text` also on the attentions of the CLIP text encoders.

What a LoRA is taught spills over to what it was not. `--keep FOLDER`, captioned pictures of what shall stay
as it is, holds it: of those the network is to find with the terms what it finds without.

Source: Hu et al., LoRA (arXiv:2106.09685).
"""

from __future__ import annotations

import argparse
import hashlib
import math
import re
import sys
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor, nn

from backend.catalog import FAMILIES
from backend.errors import InvalidRequest, TriptychError
from backend.image_prompts import ImagePrompt
from backend.nn.lowrank import Term, attached
from backend.settings import Settings
from backend.weights.lora import save_lora
from backend.weights.parts import dtype_name
from backend.weights.source import resolve
from training.data import CACHE
from training.loop import Losses, Recipe, fit, log
from training.lora_bases import BASES, TEXT_ATTENTION, Base, Noised, Reader, Words, layers_of

PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
SAVE_EVERY = 100  # steps
CAPTION_DROPOUT = (
    0.1  # of the captions are empty: what guidance leads away from, which is kept, if anything is
)
LAYERS = ("attention", "all")
NAME = re.compile(r"[\w.+ -]+")


@dataclass(frozen=True, kw_only=True)
class Lesson:
    """What to teach and how. `keep` is a folder of what shall stay as it is; `alpha` over `rank` scales the
    terms; `side` is that of the pictures in pixels, None the base's own."""

    folder: Path
    base: str
    family: str
    name: str
    config_from: str | None = None
    keep: Path | None = None
    rank: int = 8
    alpha: float | None = None
    layers: str = "attention"
    text: bool = False
    steps: int = 1000
    batch: int = 4
    learning_rate: float = 1e-4
    side: int | None = None
    trigger: str = ""
    licence: str = ""
    seed: int = 0

    def __post_init__(self) -> None:
        if self.family not in FAMILIES:
            raise InvalidRequest(f"family is {self.family!r}; it can be {', '.join(FAMILIES)}")
        if not NAME.fullmatch(self.name) or self.name.startswith("."):
            raise InvalidRequest(
                f"name is {self.name!r}; it can be letters, digits, spaces and any of _ . + -, as a file's"
            )
        if self.layers not in LAYERS:
            raise InvalidRequest(f"layers is {self.layers!r}; it can be {' or '.join(LAYERS)}")
        limits = {
            "rank": (1, 256),
            "steps": (1, 1_000_000),
            "batch": (1, 256),
            "side": (64, 2048),
            "seed": (0, 2**32 - 1),
        }
        for field, (low, high) in limits.items():
            value = getattr(self, field)
            if value is not None and not low <= value <= high:
                raise InvalidRequest(f"{field} is {value}; it can be {low} to {high}")
        for field in ("alpha", "learning_rate"):
            value = getattr(self, field)
            if value is not None and not (math.isfinite(value) and value > 0):
                raise InvalidRequest(f"{field} is {value}; it can be any number above 0")

    @property
    def scale(self) -> float:
        return (self.rank if self.alpha is None else self.alpha) / self.rank


@dataclass(frozen=True)
class Example:
    """A picture's file and its caption."""

    file: Path
    caption: str


def examples(folder: Path) -> list[Example]:
    """The captioned pictures of a folder, by name. Raises InvalidRequest where there are none, and for one
    without a caption."""
    if not folder.is_dir():
        raise InvalidRequest(f"the folder is {folder}, and there is none")
    found: list[Example] = []
    for file in sorted(folder.iterdir()):
        if file.suffix.lower() not in PICTURES:
            continue
        words = file.with_suffix(".txt")
        try:
            caption = words.read_text(encoding="utf-8").strip()
        except FileNotFoundError:
            raise InvalidRequest(f"{file.name} has no caption: there is no {words.name} beside it") from None
        except (OSError, UnicodeDecodeError) as error:
            raise InvalidRequest(f"{words.name} cannot be read: it must be a text in UTF-8") from error
        if not caption:
            raise InvalidRequest(f"{words.name} is empty; it can be any words about {file.name}")
        found.append(Example(file, caption))
    if not found:
        raise InvalidRequest(f"there is no picture in {folder}; it can hold {', '.join(PICTURES)}")
    return found


def pixels_of(file: Path, side: int) -> Tensor:
    """A picture as (3, side, side) in [-1, 1], its middle where it is no square. Raises InvalidRequest for a
    file that is no picture."""
    picture = ImagePrompt.read("the picture", file).picture
    square = ImageOps.fit(picture, (side, side), Image.Resampling.LANCZOS)
    return torch.from_numpy(np.array(square)).permute(2, 0, 1).float() / 127.5 - 1


class Terms(nn.Module):
    """What is learnt for each component's layers: `down` (R, K), or (R, K, k, k), random at first, and `up`
    (N, R), nil at first, so that nothing is changed."""

    def __init__(self, layers: Mapping[str, Mapping[str, nn.Linear | nn.Conv2d]], lesson: Lesson) -> None:
        super().__init__()
        self.scale = lesson.scale
        self.paths = [(component, path) for component, found in layers.items() for path in found]
        weights = [layer.weight for found in layers.values() for layer in found.values()]
        generator = torch.Generator().manual_seed(lesson.seed)
        self.downs = nn.ParameterList(
            torch.randn((lesson.rank, *weight.shape[1:]), generator=generator) / weight[0].numel() ** 0.5
            for weight in weights
        )
        self.ups = nn.ParameterList(torch.zeros(len(weight), lesson.rank) for weight in weights)

    def of(self, component: str) -> dict[str, Term]:
        """By the paths of a component's layers, as they take part in the computation."""
        return {
            path: Term(down, self.scale * up)
            for (owner, path), down, up in zip(self.paths, self.downs, self.ups, strict=True)
            if owner == component
        }


@dataclass(frozen=True)
class Shown:
    """Pictures as a step takes them: latents (N, C, h, w), and which of all captions is that of each."""

    latents: Tensor
    said: Tensor


class Lecture:
    """A base with all that a lesson's steps need, and the terms that they change."""

    def __init__(self, lesson: Lesson, base: Base, found: Sequence[Example], kept: Sequence[Example]) -> None:
        self.lesson, self.base = lesson, base
        side = lesson.side or base.side
        if side % base.side_step:
            raise InvalidRequest(f"side is {side}; with this base it can be any multiple of {base.side_step}")
        self.captions = sorted({"", *(example.caption for example in (*found, *kept))})  # "" is the first
        self.taught, self.kept = self._shown(found, side), self._shown(kept, side) if kept else None
        self.also = base.also(self.captions)
        self.readers: dict[str, Reader] = {name: base.reader(name) for name in base.encoder_names}
        with torch.no_grad():
            self.read = base.words(self.readers, self.captions)  # untaught
        if not lesson.text:
            self.readers = {}  # they are not needed any more
        self.network = base.network()
        layers = {base.network_name: layers_of(self.network, base.layers[lesson.layers])}
        for name, reader in self.readers.items():
            layers[name] = layers_of(reader.model, TEXT_ATTENTION)
        self.terms = Terms(layers, lesson).to(base.device)

    def _shown(self, part: Sequence[Example], side: int) -> Shown:
        said = torch.tensor([self.captions.index(example.caption) for example in part])
        return Shown(self.base.latents([pixels_of(example.file, side) for example in part]), said)

    def losses_at(self, _: int, generator: torch.Generator) -> Losses:
        """The error in what is taught, and the change in what is kept."""
        base = self.base
        parts = {"taught": self._drawn(self.taught, generator, 0.0 if self.kept else CAPTION_DROPOUT)}
        if self.kept:
            said, given = self._drawn(self.kept, generator, CAPTION_DROPOUT)
            with torch.no_grad():
                found = base.find(self.network, given, self._words(said, {}))
            parts["kept"] = (said, given._replace(wanted=found))
        losses: Losses = {}
        with ExitStack() as stack:
            for name, module in self.components().items():
                stack.enter_context(attached(module, self.terms.of(name), base.device, base.dtype))
            for name, (said, given) in parts.items():
                found = base.find(self.network, given, self._words(said, self.readers))
                losses[name] = ((found - given.wanted).square() * given.weight).mean()
        return {"loss": torch.stack([*losses.values()]).sum(), **losses}

    def _drawn(self, shown: Shown, generator: torch.Generator, dropout: float) -> tuple[Tensor, Noised]:
        """Which captions some of the pictures have, now and then none, and their latents in noise."""
        batch = self.lesson.batch
        indices = torch.randint(len(shown.said), (batch,), generator=generator)
        said = shown.said[indices] * (torch.rand(batch, generator=generator) >= dropout)
        return said, self.base.noised(shown.latents[indices.to(shown.latents.device)], generator)

    def _words(self, said: Tensor, readers: Mapping[str, Reader]) -> Words:
        """What the network is told, by these readers, or without any as it was before they were taught."""
        if readers:
            read = self.base.words(readers, [self.captions[index] for index in said.tolist()])
        else:
            read = tuple(each[said.to(each.device)] for each in self.read)
        return (*read, *(each[said.to(each.device)] for each in self.also))

    def components(self) -> dict[str, nn.Module]:
        """What terms are learnt for."""
        encoders = {name: reader.model for name, reader in self.readers.items()}
        return {self.base.network_name: self.network, **encoders}

    def write(self, file: Path) -> None:
        """What was learnt so far; a layer that the network never calls has learnt nothing: it is left out."""
        lesson, base = self.lesson, self.base
        learnt = {}
        for name in self.components():
            terms = {path: term for path, term in self.terms.of(name).items() if term.up.any()}
            network = name == base.network_name
            prefix = "" if network else base.text_prefix
            if terms:
                learnt[base.saved_as if network else name] = {
                    prefix + path: each for path, each in terms.items()
                }
        save_lora(
            file,
            learnt,
            family=lesson.family,
            base=base.source.name,
            alpha=lesson.scale * lesson.rank,
            words=[lesson.trigger] if lesson.trigger else [],
            licence=lesson.licence,
            title=lesson.name,
        )


def train(lesson: Lesson, to: Path, settings: Settings, device: torch.device) -> Path:
    """Trains a LoRA and writes it to the folder `to`; returns its file.

    Raises InvalidRequest for pictures or values that cannot be served, CheckpointError and AccessError for a
    base that cannot be had.
    """
    found = examples(lesson.folder)
    kept = examples(lesson.keep) if lesson.keep else []
    if lesson.trigger and not any(lesson.trigger in example.caption for example in found):
        raise InvalidRequest(
            f"trigger is {lesson.trigger!r}; it can be words of the captions, and none has it"
        )
    source = resolve(lesson.base, lesson.family, settings, lesson.config_from)
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    base = BASES[lesson.family](source, device, dtype)
    lecture = Lecture(lesson, base, found, kept)
    terms, file = lecture.terms, to / f"{lesson.name}.safetensors"
    numbers = sum(parameter.numel() for parameter in terms.parameters())
    log(f"{len(found)} pictures; terms for {len(terms.paths)} layers, {numbers:,} numbers")
    recipe = Recipe(
        steps=lesson.steps,
        learning_rate=lesson.learning_rate,
        warmup=min(100, lesson.steps // 10),
        seed=lesson.seed,
        save_every=SAVE_EVERY,
    )
    made_of = source.fingerprint(base.network_name, dtype_name(dtype))
    checkpoint = CACHE / f"lora-{lesson.name}-{digest(lesson, [*found, *kept], made_of)}.pt"
    fit(terms, lecture.losses_at, recipe, checkpoint, on_save=lambda *_: lecture.write(file))
    lecture.write(file)  # if all its steps were done before, nothing was saved
    log(f"{file}: {file.stat().st_size / 1e6:.2f} MB")
    return file


def digest(lesson: Lesson, found: Sequence[Example], base: str) -> str:
    """Of all that makes a training what it is: another one begins anew."""
    told = asdict(lesson) | dict.fromkeys(("folder", "keep", "trigger", "licence"))
    hashed = hashlib.sha256(repr(sorted({**told, "base": base}.items())).encode())
    for example in found:
        hashed.update(example.caption.encode() + example.file.read_bytes())
    return hashed.hexdigest()[:12]


def main(arguments: Sequence[str] | None = None) -> int:
    defaults = {field.name: field.default for field in fields(Lesson)}
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("folder", type=Path, help="of pictures, each with its caption beside it")
    add("--base", required=True, help="demo, a catalogue name, a hub repository, a folder or a file")
    add("--config-from", help="a folder or hub repository with what the base lacks")
    add("--family", required=True, choices=tuple(FAMILIES))
    add("--name", required=True, help="of the LoRA")
    add("--to", type=Path, default=Path(), help="the folder that it is written to (default: this one)")
    add("--trigger", default="", help="the words of the captions that call it")
    add("--licence", default="", help="under which it is given away")
    add("--keep", type=Path, help="a folder of captioned pictures of what shall stay as it is")
    add("--layers", choices=LAYERS, default="attention", help="of the network (default: %(default)s)")
    add("--text", action="store_true", help="teach the CLIP text encoders, too")
    for name, kind, about in (
        ("rank", int, "of the terms"),
        ("alpha", float, "over the rank, what the terms are multiplied by (default: the rank)"),
        ("steps", int, "how many"),
        ("batch", int, "pictures a step"),
        ("learning-rate", float, "at its highest"),
        ("side", int, "of the pictures in pixels (default: the base's)"),
        ("seed", int, "of all that is drawn at random"),
    ):
        default = defaults[name.replace("-", "_")]
        add(
            f"--{name}",
            type=kind,
            default=default,
            help=about + f" (default: {default})" * (default is not None),
        )
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="(default: %(default)s)")
    add("--models-dir", type=Path, help="where checkpoints lie")
    add("--offline", action="store_true", help="ask no hub")
    given = vars(parser.parse_args(arguments))
    to, device = given.pop("to"), torch.device(given.pop("device"))
    try:
        settings = Settings(models_dir=given.pop("models_dir"), offline=given.pop("offline"))
        train(Lesson(**given), to, settings, device)
    except TriptychError as error:
        print(f"train_lora: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
