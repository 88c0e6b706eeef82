"""Training a demo KL autoencoder: crops of postcards in, the same crops out. SD1.5 and SD3 share it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional

from backend.nn.autoencoder import Autoencoder
from training.data import Postcards
from training.loop import Losses, Recipe, fit
from training.postcards import SIZE

CROP = 64
CROPS = 8
KL_WEIGHT = 2e-4
LATENT_NOISE = 0.1  # of the latents' spread, at most
Painted = Callable[[Tensor, torch.Generator], Tensor]  # indices (B,) → raw latents (B, Z, 16, 16)


def train_autoencoder(vae: Autoencoder, shown: Postcards, recipe: Recipe, checkpoint: Path) -> Autoencoder:
    """At first crops from anywhere; after a quarter of the steps mostly crops around the subject, where the
    detail is, and every fourth step whole pictures, since the middle attention must learn their size too."""

    def losses_at(step: int, generator: torch.Generator) -> Losses:
        whole = step % 4 == 3
        indices = torch.randint(len(shown), (CROPS // 4 if whole else CROPS,), generator=generator)
        pixels = shown.batch(indices)
        if not whole:
            around = 0.7 if step > recipe.steps // 4 else 0.3
            pixels = crops(pixels, torch.from_numpy(shown.boxes)[indices], around, generator)
        with torch.autocast("cpu", torch.bfloat16):
            mean, log_variance = (part.float() for part in vae.encode(pixels))
            noise = torch.randn(mean.shape, generator=generator)
            drawn = vae.decode(mean + torch.exp(0.5 * log_variance) * noise).float()
        unlike = reconstruction_loss(drawn, pixels)
        kl = 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).mean()
        return {"loss": unlike + KL_WEIGHT * kl, **likeness(drawn, pixels), "kl": kl}

    return fit(vae, losses_at, recipe, checkpoint)  # pyright: ignore[reportReturnType]


def train_decoder(
    vae: Autoencoder, painted: Painted, shown: Postcards, recipe: Recipe, checkpoint: Path
) -> Autoencoder:
    """Polishes the decoder on raw latents as a denoiser leaves them; the encoder stays as it is."""

    def losses_at(_: int, generator: torch.Generator) -> Losses:
        indices = torch.randint(len(shown), (CROPS // 4,), generator=generator)
        pixels, boxes = shown.batch(indices), torch.from_numpy(shown.boxes)[indices]
        latents = painted(indices, generator)
        with torch.autocast("cpu", torch.bfloat16):
            drawn = vae.decode(latents).float()
        return {"loss": subject_loss(drawn, pixels, boxes), **likeness(drawn, pixels)}

    for part in (vae.encoder, vae.quant_conv):
        part.requires_grad_(False)
    return fit(vae, losses_at, recipe, checkpoint)  # pyright: ignore[reportReturnType]


def from_encoder(latents: Tensor) -> Painted:
    """The encoder's raw latents (N, Z, 16, 16), a little rough: a decoder shall forgive a denoiser's small
    errors while there is no denoiser yet."""
    spread = latents.std()
    return lambda indices, generator: roughened(latents[indices], spread, LATENT_NOISE, generator)


def roughened(latents: Tensor, spread: Tensor, most: float, generator: torch.Generator) -> Tensor:
    """Latents (B, Z, h, w) with up to `most` of their spread of noise, another strength for each picture."""
    strength = most * torch.rand((len(latents), 1, 1, 1), generator=generator)
    return latents + spread * strength * torch.randn(latents.shape, generator=generator)


@torch.no_grad()
def encoded(vae: Autoencoder, shown: Postcards) -> tuple[Tensor, Tensor]:
    """Every picture's raw latents (N, Z, 16, 16), and its colours (N, 3, 16, 16) at their size."""
    latents, colours = [], []
    for indices in torch.arange(len(shown)).split(100):
        pixels = shown.batch(indices)
        with torch.autocast("cpu", torch.bfloat16):
            latents.append(vae.encode(pixels)[0].float())
        colours.append(functional.avg_pool2d(pixels, 8))
    return torch.cat(latents), torch.cat(colours)


def crops(pixels: Tensor, boxes: Tensor, around: float, generator: torch.Generator) -> Tensor:
    """(B, 3, 128, 128) → (B, 3, 64, 64): a share `around` of them near the middle of the subject's box."""
    pieces = []
    for picture, (left, top, right, bottom) in zip(pixels, boxes.tolist(), strict=True):
        x, y = (int(value) for value in torch.randint(SIZE - CROP + 1, (2,), generator=generator))
        if torch.rand((), generator=generator) < around:
            shift = torch.randint(-16, 17, (2,), generator=generator).tolist()
            x = min(max(int((left + right - CROP) / 2) + shift[0], 0), SIZE - CROP)
            y = min(max(int((top + bottom - CROP) / 2) + shift[1], 0), SIZE - CROP)
        pieces.append(picture[:, y : y + CROP, x : x + CROP])
    return torch.stack(pieces)


def subject_loss(drawn: Tensor, pixels: Tensor, boxes: Tensor) -> Tensor:
    """The loss of whole pictures (B, 3, 128, 128), and once more of what is in the subjects' boxes (B, 4)."""
    parts = [
        reconstruction_loss(one[None, :, top:bottom, left:right], other[None, :, top:bottom, left:right])
        for one, other, (left, top, right, bottom) in zip(
            drawn, pixels, boxes.clamp(0, SIZE).int().tolist(), strict=True
        )
    ]
    return reconstruction_loss(drawn, pixels) + 0.3 * torch.stack(parts).mean()


def reconstruction_loss(drawn: Tensor, pixels: Tensor) -> Tensor:
    """L1 at three sizes, L1 of the gradients for crisp edges, squares; more where there is detail.

    Without that emphasis a star, two pixels wide, is cheaper left out than drawn a pixel off.
    """
    detail = 1 + 6 * (pixels - functional.avg_pool2d(pixels, 5, 1, 2)).abs().amax(1, keepdim=True)
    loss = (detail * ((drawn - pixels).abs() + 2 * (drawn - pixels).square())).mean()
    for axis in (2, 3):
        loss = loss + functional.l1_loss(drawn.diff(dim=axis), pixels.diff(dim=axis))
    for weight in (0.5, 0.25):
        drawn, pixels = functional.avg_pool2d(drawn, 2), functional.avg_pool2d(pixels, 2)
        loss = loss + weight * functional.l1_loss(drawn, pixels)
    return loss


def likeness(drawn: Tensor, pixels: Tensor) -> Losses:
    """Peak signal-to-noise ratio in dB of what is shown of `drawn`; both in [-1, 1]."""
    squared = functional.mse_loss(drawn.detach().clamp(-1, 1), pixels)
    return {"psnr": 10 * torch.log10(4 / squared)}
