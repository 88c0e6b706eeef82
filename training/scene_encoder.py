"""The encoder that makes Stage C's latents from pictures. Only training needs it: Stage B learns to paint
what it says, Stage C to say it.

It learns by itself, with a small decoder and readers that are thrown away: its nine vectors must suffice to
paint a thumbnail and to name the scene, through noise, so that what Stage C gets slightly wrong does no harm.
"""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional

from training.data import Postcards, box_weights
from training.judge import roughen
from training.loop import Losses, Recipe, fit
from training.postcards import SIZE
from training.text import COUNTS, attribute_loss

CHANNELS = 16
SIDE = 3
SEEN = 96  # the side at which the encoder looks: five halvings of it are 3
THUMBNAIL = 32
NOISE = 0.5  # of the latents' spread, at most
BATCH = 32
SUBJECT_WEIGHT = 5.0


class SceneEncoder(nn.Module):
    """Pixels (B, 3, 128, 128) in [-1, 1] → latents (B, 16, 3, 3), each channel of mean 0 and variance 1."""

    def __init__(self) -> None:
        super().__init__()
        widths = (3, 32, 64, 96, 144, 192)
        self.convs = nn.ModuleList(
            nn.Conv2d(width, wider, 5 if width == 3 else 3, stride=2, padding=2 if width == 3 else 1)
            for width, wider in pairwise(widths)
        )
        self.mixes = nn.ModuleList(nn.Conv2d(wider, wider, 3, padding=1) for wider in widths[3:])
        self.norms = nn.ModuleList(nn.GroupNorm(8, wider) for wider in widths[1:])
        self.out = nn.Conv2d(widths[-1], CHANNELS, 1)
        self.standard = nn.BatchNorm2d(CHANNELS, affine=False)

    def forward(self, pixels: Tensor) -> Tensor:
        x = functional.interpolate(pixels, size=(SEEN, SEEN), mode="bilinear", antialias=True)
        for index, (conv, norm) in enumerate(zip(self.convs, self.norms, strict=True)):
            x = functional.silu(norm(conv(x)))  # each halves the side: 96 → 3
            if index >= 2:
                x = x + functional.silu(self.mixes[index - 2](x))
        return self.standard(self.out(x).float())


class SceneAutoencoder(nn.Module):
    """The encoder and what it learns with: from latents to a thumbnail, and to the scene's attributes,
    whether there are clouds, and the subject's box."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = SceneEncoder()
        widths = (CHANNELS, 160, 96, 64, 40)
        self.paint = nn.ModuleList(nn.Conv2d(wide, narrow, 3, padding=1) for wide, narrow in pairwise(widths))
        self.colours = nn.Conv2d(widths[-1], 3, 3, padding=1)
        self.head = nn.Linear(CHANNELS * SIDE**2, sum(COUNTS) + 5)

    def painted(self, latents: Tensor) -> Tensor:
        """Latents (B, 16, 3, 3) → a thumbnail (B, 3, 32, 32) in [-1, 1]."""
        x = latents
        for conv, side in zip(self.paint, (4, 8, 16, 32), strict=True):
            x = functional.interpolate(x, size=(side, side), mode="bilinear", align_corners=True)
            x = functional.silu(conv(x))
        return self.colours(x)


def train_scene_encoder(shown: Postcards, recipe: Recipe, checkpoint: Path) -> SceneEncoder:
    torch.manual_seed(recipe.seed)
    model = SceneAutoencoder()
    labels, boxes = shown.labels(), torch.from_numpy(shown.boxes)
    clouds = torch.tensor([float(scene.clouds) for scene in shown.scenes])
    weights = box_weights(boxes, THUMBNAIL, SUBJECT_WEIGHT)

    def losses_at(_: int, generator: torch.Generator) -> Losses:
        indices = torch.randint(len(shown), (BATCH,), generator=generator)
        pixels = shown.batch(indices)
        with torch.autocast("cpu", torch.bfloat16):
            latents = model.encoder(roughen(pixels, generator))
            noisy = with_noise(latents, NOISE, generator)
            thumbnail = model.painted(noisy).float()
        read = model.head(noisy.flatten(1))
        scores, cloudy, box = read.split([sum(COUNTS), 1, 4], 1)
        target = functional.avg_pool2d(pixels, SIZE // THUMBNAIL)
        painting = ((thumbnail - target).abs() * weights[indices]).mean()
        naming = attribute_loss(scores, labels[indices])
        cloud = functional.binary_cross_entropy_with_logits(cloudy[:, 0], clouds[indices])
        placing = functional.l1_loss(box, boxes[indices] / SIZE)
        return {
            "loss": 4 * painting + 0.15 * (naming + cloud) + placing,
            "painting": painting,
            "naming": naming,
            "cloud": cloud,
            "placing": placing,
        }

    fit(model, losses_at, recipe, checkpoint)
    return model.encoder.eval()


def with_noise(latents: Tensor, most: float, generator: torch.Generator) -> Tensor:
    """(B, C, h, w) with noise of another strength, up to `most`, for each of the batch."""
    strength = most * torch.rand((len(latents), 1, 1, 1), generator=generator)
    return latents + strength * torch.randn(latents.shape, generator=generator)
