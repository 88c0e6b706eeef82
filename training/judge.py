"""The judge: a small classifier, trained on renders, that says what a postcard shows.

`python -m training.judge train` trains it and writes `assets/demo/judge.safetensors`;
`python -m training.judge score` paints 400 held-out prompts with the demo checkpoint of a family and writes
how many the judge finds right, and a sample sheet, to `assets/demo/README.md`.
"""

from __future__ import annotations

import argparse
import random
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional

from training.data import CACHE, postcards
from training.hub import DEMO, write_json
from training.loop import Losses, Recipe, fit, log
from training.postcards import (
    ATTRIBUTES,
    COLOURS,
    JUDGED,
    NINTH,
    SIZE,
    SUBJECTS,
    TIMES,
    Scene,
    caption,
    random_scene,
)

WEIGHTS = DEMO / "judge.safetensors"
RECIPE = Recipe(steps=900, learning_rate=2e-3, weight_decay=0.05, average=0.99, save_every=100)
FAMILIES = {"sd15": "Stable Diffusion 1.5", "sd3": "Stable Diffusion 3", "stable_cascade": "Stable Cascade"}
TRIALS: dict[str, dict[str, dict[str, Any]]] = {
    "sd15": {"right": {}},
    "sd3": {"right": {"t5": "full"}, "off": {"t5": "off"}},
    "stable_cascade": {"right": {"stages": "full"}, "lite": {"stages": "lite"}},
}
VARIATIONS = 200
PROMPTS = 400
SCORE_SEED = 20_000
SAMPLES = [
    *(f"a red {subject} on green hills at noon, sun" for subject in SUBJECTS),
    *(f"a {colour} house in snowy mountains at dawn" for colour in COLOURS),
    "a white hot-air balloon in front of sand dunes at sunset",
    *(
        f"a yellow sailboat on a calm sea at {time} on the {place}"
        for time in TIMES
        for place in ("left", "right")
    ),
    "a red lighthouse on green hills at sunset",
    "a blue house in snowy mountains at night, full moon",
    "a purple castle by the sea at night, starry sky",
    "an orange tent on sand dunes at dawn, a few clouds",
    "a white windmill on green hills at noon, clear sky",
    "a green pine tree in snowy mountains at sunset, sun",
    "a red house at night",
    "a purple hot-air balloon, full moon",
]
COUNTS = [len(values) for values in JUDGED.values()]


class Judge(nn.Module):
    """Pixels (B, 3, 128, 128) in [-1, 1] → one row of scores per attribute, concatenated (B, 30)."""

    def __init__(self) -> None:
        super().__init__()
        widths = (3, 16, 32, 48, 64, 96)
        self.convs = nn.ModuleList(
            nn.Conv2d(width, wider, 5 if width == 3 else 3, stride=2, padding=2 if width == 3 else 1)
            for width, wider in pairwise(widths)
        )
        self.norms = nn.ModuleList(nn.GroupNorm(8, wider) for wider in widths[1:])
        self.mixes = nn.ModuleList(nn.Conv2d(wider, wider, 3, padding=1) for wider in widths[3:])
        self.head = nn.Linear(widths[-1] * 16, sum(COUNTS))

    def forward(self, x: Tensor) -> Tensor:
        for index, (conv, norm) in enumerate(zip(self.convs, self.norms, strict=True)):
            x = functional.silu(norm(conv(x)))  # each halves the side: 128 → 4
            if index >= 2:
                x = x + functional.silu(self.mixes[index - 2](x))
        return self.head(x.flatten(1))


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """What the judge sees in one picture."""

    time: str
    land: str
    subject: str
    colour: str
    place: str
    sky: str

    def agrees(self, scene: Scene) -> dict[str, bool]:
        """Attribute by attribute, whether the picture shows the scene."""
        return {name: getattr(self, name) == getattr(scene, name) for name in ATTRIBUTES}


def load(path: Path = WEIGHTS) -> Judge:
    judge = Judge()
    judge.load_state_dict({name: value.float() for name, value in load_file(path).items()})
    return judge.eval()


@torch.no_grad()
def look(judge: Judge, pictures: list[Image.Image]) -> list[Verdict]:
    """The judge's verdict on each picture, which is resized to 128 × 128 if need be."""
    verdicts = []
    for picture in pictures:
        pixels = np.array(picture.convert("RGB").resize((SIZE, SIZE), Image.Resampling.LANCZOS))
        scores = judge(torch.from_numpy(pixels).permute(2, 0, 1)[None].float() / 127.5 - 1)
        best = [int(part.argmax()) for part in scores[0].split(COUNTS)]
        named = {name: values[index] for index, (name, values) in zip(best, JUDGED.items(), strict=True)}
        verdicts.append(Verdict(**named))
    return verdicts


def train() -> None:
    kinds = [  # pictures, and how many of a batch are of them: a ninth of it, the ninth subject
        (each, each.labels(), count)
        for each, count in ((postcards(16_000, seed=1), 57), (postcards(2_000, seed=1, subject=NINTH), 7))
    ]
    torch.manual_seed(RECIPE.seed)
    judge = Judge()

    def losses_at(_: int, generator: torch.Generator) -> Losses:
        drawn = [torch.randint(len(shown), (count,), generator=generator) for shown, _, count in kinds]
        pixels = torch.cat([kind[0].batch(indices) for kind, indices in zip(kinds, drawn, strict=True)])
        labels = torch.cat([kind[1][indices] for kind, indices in zip(kinds, drawn, strict=True)])
        scores = judge(roughen(pixels, generator)).split(COUNTS, 1)
        wrong = [
            functional.cross_entropy(part, labels[:, index], label_smoothing=0.02)
            for index, part in enumerate(scores)
        ]
        return {"loss": torch.stack(wrong).sum()}

    fit(judge, losses_at, RECIPE, CACHE / "judge.pt")
    for subject, count in ((None, 2_000), (NINTH, 500)):
        unseen = postcards(count, seed=2, held_out=True, subject=subject)
        with torch.no_grad():
            batches = [judge(unseen.batch(indices)) for indices in torch.arange(len(unseen)).split(250)]
        guesses = torch.stack([part.argmax(1) for part in torch.cat(batches).split(COUNTS, 1)], 1)
        right = guesses == unseen.labels()
        each = " ".join(
            f"{name} {share:.4f}" for name, share in zip(ATTRIBUTES, right.float().mean(0), strict=True)
        )
        of = f" of a {subject}" if subject else ""
        log(f"judge on {len(unseen)} held-out renders{of}: {each} all {right.all(1).float().mean():.4f}")
    WEIGHTS.parent.mkdir(parents=True, exist_ok=True)
    save_file({name: value.half().contiguous() for name, value in judge.state_dict().items()}, WEIGHTS)


def roughen(pixels: Tensor, generator: torch.Generator) -> Tensor:
    """Blur and noise as painted pictures have them, or the judge would only know clean renders."""
    if torch.rand((), generator=generator) < 0.5:
        side = int(torch.randint(48, 112, (), generator=generator))
        small = functional.interpolate(pixels, size=(side, side), mode="bilinear", antialias=True)
        pixels = functional.interpolate(small, size=pixels.shape[-2:], mode="bilinear")
    noise = torch.randn(pixels.shape, generator=generator)
    shift = torch.randn((len(pixels), 3, 1, 1), generator=generator)
    return pixels + 0.05 * torch.rand((), generator=generator) * noise + 0.03 * shift


def score(family: str) -> None:
    """Paints held-out prompts with the family's demo through the engine, and writes the figures."""
    from backend import Settings, Studio  # only scoring needs the engine
    from backend.requests import REQUESTS
    from training.demo_readme import write_readme

    with tempfile.TemporaryDirectory() as home:
        studio = Studio(Settings(device="cpu", home=Path(home)))

        def paint(**settings: Any) -> Image.Image:
            return studio.run(REQUESTS[family](**settings)).images[0]

        scored: dict[str, Any] = {"prompts": PROMPTS, "seed": SCORE_SEED}
        for name, settings in TRIALS[family].items():
            scored[name] = told_in_words(f"{family}-{name}", partial(paint, **settings))
        if family == "stable_cascade":
            scored["variations"] = told_by_pictures(paint)
        samples = [paint(prompt=prompt, seed=7) for prompt in SAMPLES]
    save_samples(sheet(samples, columns=8), DEMO / f"{file_name(family)}-samples.png")
    write_json(DEMO / f"{file_name(family)}-score.json", scored)
    write_readme()


def told_in_words(name: str, paint: Callable[..., Image.Image]) -> dict[str, float]:
    """How often what prompts name is in the picture, attribute by attribute."""
    rng = random.Random(SCORE_SEED)
    scenes = [random_scene(rng, held_out=True) for _ in range(PROMPTS)]
    prompts = [caption(scene, rng, left_out=0) for scene in scenes]
    pictures = [paint(prompt=prompt, seed=SCORE_SEED + index) for index, prompt in enumerate(prompts)]
    sheet(pictures[:100], columns=10).save(CACHE / f"{name}-looked-at.png")
    return found(name, pictures, scenes, prompts)


def told_by_pictures(paint: Callable[..., Image.Image]) -> dict[str, float]:
    """How often what a render shows is in the variation that is made of it, without a word."""
    shown = postcards(2_000, seed=2, held_out=True)
    renders = [Image.fromarray(pixels) for pixels in shown.pixels[:VARIATIONS]]
    pictures = [
        paint(images=(render,), prompt="", seed=SCORE_SEED + index) for index, render in enumerate(renders)
    ]
    pairs = [picture for pair in zip(renders[:40], pictures[:40], strict=True) for picture in pair]
    sheet(pairs, columns=10).save(CACHE / "variations-looked-at.png")
    scenes = shown.scenes[:VARIATIONS]
    return found("variations", pictures, scenes, [f"render {index}" for index in range(VARIATIONS)])


def found(
    name: str, pictures: list[Image.Image], scenes: list[Scene], prompts: list[str]
) -> dict[str, float]:
    """The shares of pictures that show each attribute of their scenes, and all six; logs what is missing."""
    verdicts = look(load(), pictures)
    agreed = [verdict.agrees(scene) for verdict, scene in zip(verdicts, scenes, strict=True)]
    shares = {attribute: sum(one[attribute] for one in agreed) / len(agreed) for attribute in ATTRIBUTES}
    shares["all six"] = sum(all(one.values()) for one in agreed) / len(agreed)
    for prompt, one, verdict in zip(prompts, agreed, verdicts, strict=True):
        for attribute in (attribute for attribute, right in one.items() if not right):
            log(f"{attribute} {getattr(verdict, attribute)}: {prompt}")
    log(f"{name}: " + " ".join(f"{attribute} {share:.4f}" for attribute, share in shares.items()))
    return shares


def file_name(family: str) -> str:
    return family.replace("_", "-")


def sheet(pictures: list[Image.Image], *, columns: int) -> Image.Image:
    """The pictures side by side, row by row, two pixels apart."""
    cell = SIZE + 2
    paper = Image.new("RGB", (cell * columns - 2, cell * -(-len(pictures) // columns) - 2), (255, 255, 255))
    for index, picture in enumerate(pictures):
        paper.paste(picture.resize((SIZE, SIZE)), (index % columns * cell, index // columns * cell))
    return paper


def save_samples(picture: Image.Image, file: Path) -> None:
    """In 256 colours, dithered lest skies have bands: half of the bytes of them all."""
    palette = picture.quantize(256, kmeans=1)
    picture.quantize(palette=palette, dither=Image.Dither.FLOYDSTEINBERG).save(file, optimize=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("task", choices=("train", "score"))
    parser.add_argument("family", nargs="?", choices=tuple(FAMILIES), default="sd15")
    arguments = parser.parse_args()
    if arguments.task == "train":
        train()
    else:
        score(arguments.family)
