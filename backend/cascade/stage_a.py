"""Stage A of Stable Cascade: the autoencoder between pixels and Stage B's latents, a quarter of their side.

Source: Rampas et al., A Novel Sampling Scheme for Text- and Image-Conditional Image Synthesis in Quantized
Latent Spaces ("Paella", arXiv:2211.07292); settings and module names as in the published `vqgan/config.json`
and the weights beside it.

Letters: B batch, C channels, H W pixels, h w latent pixels.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from backend.nn.configs import read_config

# On a CPU a block takes the picture in bands of about that many pixels, whose features stay in the cache: at
# the published 1536 a pixel 6 MB in bf16. Decoding 1024² takes less than half the time of doing it whole.
BAND_PIXELS = 2048


@dataclass(frozen=True, kw_only=True)
class StageAConfig:
    """`scale_factor` takes Stage B's latents to those that this network speaks."""

    in_channels: int
    out_channels: int
    up_down_scale_factor: int
    levels: int
    bottleneck_blocks: int
    embed_dim: int
    latent_channels: int
    num_vq_embeddings: int
    scale_factor: float

    @classmethod
    def from_dict(cls, published: Mapping[str, Any]) -> StageAConfig:
        """Read a published `vqgan/config.json`. Raises CheckpointError for values of a wrong type."""
        config: dict[str, Any] = {
            "in_channels": 3,
            "out_channels": 3,
            "up_down_scale_factor": 2,
            "levels": 2,
            "bottleneck_blocks": 12,
            "embed_dim": 384,
            "latent_channels": 4,
            "num_vq_embeddings": 8192,
            "scale_factor": 0.3764,
            **published,
        }
        return read_config(cls, "Stage A", config)

    @property
    def scale(self) -> int:
        """Pixels to a latent pixel, along a side."""
        return self.up_down_scale_factor * 2 ** (self.levels - 1)


class MixingBlock(nn.Module):
    """A depthwise convolution, edges continued outwards, and two linear layers, each with a learned share.

    (B, C, H, W) → the same.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        # number 1: the original pads in a module of its own
        self.depthwise = nn.Sequential(nn.Identity(), nn.Conv2d(channels, channels, 3, groups=channels))
        self.channelwise = nn.Sequential(
            nn.Linear(channels, 4 * channels), nn.GELU(), nn.Linear(4 * channels, channels)
        )
        self.gammas = nn.Parameter(torch.zeros(6))

    def forward(self, x: Tensor) -> Tensor:
        height, width = x.shape[2:]
        rows = max(BAND_PIXELS // width, 1) if x.device.type == "cpu" else height
        bands = [self._band(x, top, min(top + rows, height)) for top in range(0, height, rows)]
        return torch.cat(bands, dim=2)

    def _band(self, x: Tensor, top: int, bottom: int) -> Tensor:
        """The result for the rows from `top` to `bottom`, which also depends on the row above and below."""
        scale_1, shift_1, share_1, scale_2, shift_2, share_2 = self.gammas
        height = x.shape[2]
        around = x[:, :, max(top - 1, 0) : bottom + 1].permute(0, 2, 3, 1)  # (B, h, W, C)
        h = _normalised(around, scale_1, shift_1).permute(0, 3, 1, 2)
        h = F.pad(h, (1, 1, int(top == 0), int(bottom == height)), mode="replicate")
        h = torch.addcmul(x[:, :, top:bottom], self.depthwise[1](h), share_1).permute(0, 2, 3, 1)
        h = torch.addcmul(h, self.channelwise(_normalised(h, scale_2, shift_2)), share_2)
        return h.permute(0, 3, 1, 2)


class Codebook(nn.Module):
    """The vectors that a picture's tokens stand for. Latents are decoded as they are, so nothing reads them;
    they are part of the published weights."""

    def __init__(self, entries: int, channels: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(entries, channels)


class StageA(nn.Module):
    def __init__(self, config: StageAConfig) -> None:
        super().__init__()
        self.config = config
        widths = [config.embed_dim // 2**level for level in reversed(range(config.levels))]  # outermost first
        pixels = config.up_down_scale_factor**2
        self.in_block = nn.Sequential(
            nn.PixelUnshuffle(config.up_down_scale_factor),
            nn.Conv2d(config.in_channels * pixels, widths[0], 1),
        )
        down: list[nn.Module] = [MixingBlock(widths[0])]
        for before, after in pairwise(widths):
            down += [nn.Conv2d(before, after, 4, stride=2, padding=1), MixingBlock(after)]
        self.down_blocks = nn.Sequential(
            *down,
            nn.Sequential(
                nn.Conv2d(widths[-1], config.latent_channels, 1, bias=False),
                nn.BatchNorm2d(config.latent_channels),
            ),
        )
        self.vquantizer = Codebook(config.num_vq_embeddings, config.latent_channels)
        up: list[nn.Module] = [nn.Sequential(nn.Conv2d(config.latent_channels, widths[-1], 1))]
        up += [MixingBlock(widths[-1]) for _ in range(config.bottleneck_blocks)]
        for after, before in reversed(list(pairwise(widths))):
            up += [nn.ConvTranspose2d(before, after, 4, stride=2, padding=1), MixingBlock(after)]
        self.up_blocks = nn.Sequential(*up)
        self.out_block = nn.Sequential(
            nn.Conv2d(widths[0], config.out_channels * pixels, 1),
            nn.PixelShuffle(config.up_down_scale_factor),
        )

    def encode(self, pixels: Tensor) -> Tensor:
        """Pixels (B, 3, H, W) in [0, 1] → latents (B, 4, H / 4, W / 4) as this network speaks them."""
        return self.down_blocks(self.in_block(pixels))

    def decode(self, latents: Tensor) -> Tensor:
        """Latents (B, 4, h, w) as this network speaks them → pixels (B, 3, 4·h, 4·w) around [0, 1]."""
        return self.out_block(self.up_blocks(latents))


def _normalised(x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """Each pixel's channels (..., C) to mean 0 and variance 1, then scaled and shifted by a number each."""
    channels = x.shape[-1]
    return F.layer_norm(x, (channels,), (1 + scale).expand(channels), shift.expand(channels), eps=1e-6)
