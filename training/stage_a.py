"""Training the demo Stage A: crops of postcards in, the same out, through latents that bear some noise."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from backend.cascade.stage_a import MixingBlock, StageA
from training.data import Postcards
from training.loop import Losses, Recipe, fit
from training.vae import CROPS, Painted, crops, likeness, reconstruction_loss, roughened, subject_loss

LATENT_NOISE = 0.15  # of the latents' spread, at most: Stage B's latents will never be exact
SHARES = 0.4
POLISHED = 8  # pictures at once


def start(model: StageA) -> StageA:
    """Published blocks begin with shares of nothing, which would keep their layers from learning at all."""
    for block in model.modules():
        if isinstance(block, MixingBlock):
            with torch.no_grad():
                block.gammas[2::3] = SHARES
    return model


def train_stage_a(model: StageA, shown: Postcards, recipe: Recipe, checkpoint: Path) -> StageA:
    """Once the latents' statistics have settled (at half of the steps), the running ones take over."""
    norm = next(module for module in model.modules() if isinstance(module, nn.BatchNorm2d))

    def losses_at(step: int, generator: torch.Generator) -> Losses:
        norm.train(step < recipe.steps // 2)
        indices = torch.randint(len(shown), (CROPS,), generator=generator)
        pixels = crops(shown.batch(indices), torch.from_numpy(shown.boxes)[indices], 0.65, generator)
        with torch.autocast("cpu", torch.bfloat16):
            latents = model.encode((pixels + 1) / 2).float()
            rough = roughened(latents, latents.detach().std(), LATENT_NOISE, generator)
            drawn = model.decode(rough).float() * 2 - 1
        return {"loss": reconstruction_loss(drawn, pixels), **likeness(drawn, pixels)}

    return fit(start(model), losses_at, recipe, checkpoint)  # pyright: ignore[reportReturnType]


def polish_decoder(
    model: StageA,
    painted: Painted,
    shown: Postcards,
    recipe: Recipe,
    checkpoint: Path,
) -> StageA:
    """Teaches the decoder to make the best of what Stage B makes of pictures: `painted(indices, generator)`,
    latents (B, 4, 32, 32). The encoder stays as it is."""

    def losses_at(_: int, generator: torch.Generator) -> Losses:
        model.eval()
        indices = torch.randint(len(shown), (POLISHED,), generator=generator)
        pixels, boxes = shown.batch(indices), torch.from_numpy(shown.boxes)[indices]
        latents = painted(indices, generator)
        with torch.autocast("cpu", torch.bfloat16):
            drawn = model.decode(latents).float() * 2 - 1
        return {"loss": subject_loss(drawn, pixels, boxes), **likeness(drawn, pixels)}

    for part in (model.in_block, model.down_blocks, model.vquantizer):
        part.requires_grad_(False)
    return fit(model, losses_at, recipe, checkpoint)  # pyright: ignore[reportReturnType]
