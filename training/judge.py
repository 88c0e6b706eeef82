"""The judge: a small classifier, trained on renders, that says what a postcard shows.

`python -m training.judge train` trains it and writes `assets/demo/judge.safetensors`;
`python -m training.judge score` paints 400 held-out prompts with the demo checkpoint of a family and writes how
many the judge finds right, and a sample sheet, to `assets/demo/README.md`.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional

from training.data import CACHE, postcards
from training.loop import Losses, Recipe, fit, log
from training.postcards import ATTRIBUTES, SIZE, Scene

WEIGHTS = Path(__file__).parents[1] / "assets" / "demo" / "judge.safetensors"
RECIPE = Recipe(steps=1800, learning_rate=2e-3, weight_decay=0.05, average=0.99, save_every=300)
COUNTS = [len(values) for values in ATTRIBUTES.values()]


class Judge(nn.Module):
    """Pixels (B, 3, 128, 128) in [-1, 1] → one row of scores per attribute, concatenated (B, 29)."""

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
        named = {name: values[index] for index, (name, values) in zip(best, ATTRIBUTES.items(), strict=True)}
        verdicts.append(Verdict(**named))
    return verdicts


def train() -> None:
    shown = postcards(16_000, seed=1)
    labels = shown.labels()
    judge = Judge()

    def losses_at(_: int, generator: torch.Generator) -> Losses:
        indices = torch.randint(len(shown), (64,), generator=generator)
        scores = judge(roughen(shown.batch(indices), generator)).split(COUNTS, 1)
        wrong = [
            functional.cross_entropy(part, labels[indices, index], label_smoothing=0.02)
            for index, part in enumerate(scores)
        ]
        return {"loss": torch.stack(wrong).sum()}

    fit(judge, losses_at, RECIPE, CACHE / "judge.pt")
    unseen = postcards(2_000, seed=2, held_out=True)
    with torch.no_grad():
        batches = [judge(unseen.batch(indices)) for indices in torch.arange(len(unseen)).split(250)]
    guesses = torch.stack([part.argmax(1) for part in torch.cat(batches).split(COUNTS, 1)], 1)
    right = guesses == unseen.labels()
    each = " ".join(
        f"{name} {share:.4f}" for name, share in zip(ATTRIBUTES, right.float().mean(0), strict=True)
    )
    log(f"judge on {len(unseen)} held-out renders: {each} all {right.all(1).float().mean():.4f}")
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


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("task", choices=("train",))
    if parser.parse_args().task == "train":
        train()
