"""The KL autoencoder of SD1.5 and SD3: pixels ↔ latents at an eighth of the size.

Source: Rombach et al., High-Resolution Image Synthesis with Latent Diffusion Models (arXiv:2112.10752);
settings and module names as in the published `vae/config.json` files and the weights beside them.

Letters: B batch, C channels, H W pixels, h w latent pixels, Z latent channels.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from backend.errors import CheckpointError
from backend.nn.configs import read_config, require, require_each
from backend.nn.layers import ResnetBlock, Upsample, attend
from backend.nn.tiles import tiled

EPS = 1e-6


@dataclass(frozen=True, kw_only=True)
class AutoencoderConfig:
    in_channels: int = 3
    out_channels: int = 3
    latent_channels: int = 4
    block_out_channels: tuple[int, ...] = (64,)
    layers_per_block: int = 1
    norm_num_groups: int = 32
    scaling_factor: float = 0.18215
    shift_factor: float | None = None
    use_quant_conv: bool = True
    use_post_quant_conv: bool = True
    mid_block_add_attention: bool = True

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> AutoencoderConfig:
        """Read a published `vae/config.json`; CheckpointError for a kind of block that this class lacks."""
        require("VAE", config, {"act_fn": ("silu", "swish")})
        require_each("VAE", config, "down_block_types", ("DownEncoderBlock2D",))
        require_each("VAE", config, "up_block_types", ("UpDecoderBlock2D",))
        made = read_config(cls, "VAE", config)
        if made.scaling_factor <= 0:
            raise CheckpointError(f"VAE config: scaling_factor is {made.scaling_factor}; it must be above 0")
        return made

    @property
    def scale(self) -> int:
        """Pixels per latent pixel along a side."""
        return 2 ** (len(self.block_out_channels) - 1)


class SelfAttention(nn.Module):
    """One head over all pixels, plus the input: (B, C, h, w) → the same."""

    def __init__(self, channels: int, groups: int) -> None:
        super().__init__()
        self.group_norm = nn.GroupNorm(groups, channels, EPS)
        self.to_q = nn.Linear(channels, channels)
        self.to_k = nn.Linear(channels, channels)
        self.to_v = nn.Linear(channels, channels)
        self.to_out = nn.ModuleList([nn.Linear(channels, channels)])

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.group_norm(x).flatten(2).transpose(1, 2)  # (B, C, h, w) → (B, h·w, C)
        out = attend(self.to_q(tokens), self.to_k(tokens), self.to_v(tokens), heads=1)
        return x + self.to_out[0](out).transpose(1, 2).reshape(x.shape)


class MidBlock(nn.Module):
    def __init__(self, channels: int, groups: int, attention: bool) -> None:
        super().__init__()
        self.resnets = nn.ModuleList(
            ResnetBlock(channels, channels, groups=groups, eps=EPS) for _ in range(2)
        )
        self.attentions = nn.ModuleList([SelfAttention(channels, groups)] if attention else [])

    def forward(self, x: Tensor) -> Tensor:
        x = self.resnets[0](x)
        for attention in self.attentions:
            x = attention(x)
        return self.resnets[1](x)


class Downsample(nn.Module):
    """Halve by a strided 3×3 convolution, padded on the right and below only, as it was trained."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.pad(x, (0, 1, 0, 1)))


class DownBlock(nn.Module):
    def __init__(self, in_channels: int, out_channels: int, *, layers: int, groups: int, last: bool) -> None:
        super().__init__()
        widths = [in_channels, *[out_channels] * layers]
        self.resnets = nn.ModuleList(ResnetBlock(a, b, groups=groups, eps=EPS) for a, b in pairwise(widths))
        self.downsamplers = nn.ModuleList([] if last else [Downsample(out_channels)])

    def forward(self, x: Tensor) -> Tensor:
        for layer in (*self.resnets, *self.downsamplers):
            x = layer(x)
        return x


class UpBlock(nn.Module):
    """The decoder runs its layers one by one: called at once, their first input would be held to the last, a
    sixth of what the decoder takes in float32."""

    def __init__(self, in_channels: int, out_channels: int, *, layers: int, groups: int, last: bool) -> None:
        super().__init__()
        widths = [in_channels, *[out_channels] * layers]
        self.resnets = nn.ModuleList(ResnetBlock(a, b, groups=groups, eps=EPS) for a, b in pairwise(widths))
        self.upsamplers = nn.ModuleList([] if last else [Upsample(out_channels)])


class Encoder(nn.Module):
    """(B, 3, H, W) pixels → (B, 2·Z, h, w): mean and log-variance."""

    def __init__(self, config: AutoencoderConfig) -> None:
        super().__init__()
        widths, groups = config.block_out_channels, config.norm_num_groups
        self.conv_in = nn.Conv2d(config.in_channels, widths[0], 3, padding=1)
        self.down_blocks = nn.ModuleList(
            DownBlock(a, b, layers=config.layers_per_block, groups=groups, last=i == len(widths) - 1)
            for i, (a, b) in enumerate(pairwise([widths[0], *widths]))
        )
        self.mid_block = MidBlock(widths[-1], groups, config.mid_block_add_attention)
        self.conv_norm_out = nn.GroupNorm(groups, widths[-1], EPS)
        self.conv_out = nn.Conv2d(widths[-1], 2 * config.latent_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv_in(x)
        for block in self.down_blocks:
            x = block(x)
        x = self.mid_block(x)
        return self.conv_out(F.silu(self.conv_norm_out(x), inplace=True))


class Decoder(nn.Module):
    """(B, Z, h, w) raw latents → (B, 3, H, W) pixels."""

    def __init__(self, config: AutoencoderConfig) -> None:
        super().__init__()
        widths, groups = config.block_out_channels[::-1], config.norm_num_groups
        self.conv_in = nn.Conv2d(config.latent_channels, widths[0], 3, padding=1)
        self.mid_block = MidBlock(widths[0], groups, config.mid_block_add_attention)
        self.up_blocks = nn.ModuleList(
            UpBlock(a, b, layers=config.layers_per_block + 1, groups=groups, last=i == len(widths) - 1)
            for i, (a, b) in enumerate(pairwise([widths[0], *widths]))
        )
        self.conv_norm_out = nn.GroupNorm(groups, widths[-1], EPS)
        self.conv_out = nn.Conv2d(widths[-1], config.out_channels, 3, padding=1)

    def forward(self, z: Tensor) -> Tensor:
        z = self.mid_block(self.conv_in(z))
        parts = [part for block in self.up_blocks for part in block.children()]
        for layer in [layer for part in parts for layer in part.children()]:
            z = layer(z)
        return self.conv_out(F.silu(self.conv_norm_out(z), inplace=True))


class Autoencoder(nn.Module):
    """The whole KL-VAE. Pixels are in [-1, 1]; latents here are raw, as the decoder reads them.

    The networks that denoise work in model space: `to_model` and `from_model` convert.
    """

    COMPILED = (ResnetBlock,)

    def __init__(self, config: AutoencoderConfig) -> None:
        super().__init__()
        self.config = config
        latent = config.latent_channels
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)
        self.quant_conv = nn.Conv2d(2 * latent, 2 * latent, 1) if config.use_quant_conv else nn.Identity()
        self.post_quant_conv = nn.Conv2d(latent, latent, 1) if config.use_post_quant_conv else nn.Identity()

    def to_model(self, latents: Tensor) -> Tensor:
        return (latents - (self.config.shift_factor or 0.0)) * self.config.scaling_factor

    def from_model(self, latents: Tensor) -> Tensor:
        return latents / self.config.scaling_factor + (self.config.shift_factor or 0.0)

    def encode(
        self, pixels: Tensor, *, tile: int | None = None, sliced: bool = False
    ) -> tuple[Tensor, Tensor]:
        """(B, 3, H, W) pixels in [-1, 1] → mean and log-variance, each (B, Z, h, w).

        `tile` is the side in pixels of the overlapping tiles to work in, a multiple of 8 · `scale`, or None
        for the whole picture at once; `sliced` takes the pictures of the batch one after the other.
        """
        scale = self.config.scale
        moments = _piecewise(
            lambda x: self.quant_conv(self.encoder(x)), pixels, tile, sliced, step=scale, numer=1, denom=scale
        )
        mean, logvar = moments.chunk(2, dim=1)
        return mean, logvar.clamp(-30.0, 20.0)

    def decode(self, latents: Tensor, *, tile: int | None = None, sliced: bool = False) -> Tensor:
        """(B, Z, h, w) raw latents → (B, 3, H, W) pixels, near [-1, 1] but not clamped.

        `tile` is the side in latent pixels of the overlapping tiles to work in, or None for the whole picture
        at once; `sliced` takes the pictures of the batch one after the other.
        """
        return _piecewise(
            lambda z: self.decoder(self.post_quant_conv(z)),
            latents, tile, sliced, step=1, numer=self.config.scale, denom=1,
        )  # fmt: skip


def _piecewise(
    network: Callable[[Tensor], Tensor],
    x: Tensor,
    tile: int | None,
    sliced: bool,
    *,
    step: int,
    numer: int,
    denom: int,
) -> Tensor:
    """Run `network` over all of `x`, image by image or tile by tile; it scales sizes by numer / denom."""
    if sliced and len(x) > 1:
        return torch.cat(
            [_piecewise(network, one, tile, False, step=step, numer=numer, denom=denom) for one in x.split(1)]
        )
    if tile is None or max(x.shape[-2:]) <= tile:
        return network(x)
    return tiled(network, x, tile // step * step, max(tile // 4 // step * step, step), numer, denom)
