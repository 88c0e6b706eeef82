"""The conditional 2D UNet of Stable Diffusion 1.x and 2.x.

Source: Rombach et al., High-Resolution Image Synthesis with Latent Diffusion Models (arXiv:2112.10752);
settings and module names as in the published `unet/config.json` files and the weights beside them.

Letters: B batch, C channels, h w latent pixels, L text tokens, D features, T timestep features.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from backend.errors import CheckpointError
from backend.nn.configs import read_config, require, require_each
from backend.nn.layers import ResnetBlock, TimestepEmbedding, Upsample, attend, sinusoidal_embedding
from backend.nn.lowrank import product

DOWN_BLOCKS = ("DownBlock2D", "CrossAttnDownBlock2D")
UP_BLOCKS = ("UpBlock2D", "CrossAttnUpBlock2D")

# Settings of the class that change the network and that no checkpoint of this family uses.
FIXED: dict[str, tuple[Any, ...]] = {
    "act_fn": ("silu", "swish"),
    "addition_embed_type": (None,),
    "class_embed_type": (None,),
    "num_class_embeds": (None,),
    "encoder_hid_dim": (None,),
    "encoder_hid_dim_type": (None,),
    "center_input_sample": (False,),
    "conv_in_kernel": (3,),
    "conv_out_kernel": (3,),
    "downsample_padding": (1,),
    "dual_cross_attention": (False,),
    "mid_block_only_cross_attention": (None, False),
    "mid_block_scale_factor": (1, 1.0),
    "mid_block_type": ("UNetMidBlock2DCrossAttn",),
    "resnet_out_scale_factor": (1, 1.0),
    "resnet_skip_time_act": (False,),
    "resnet_time_scale_shift": ("default",),
    "time_embedding_act_fn": (None,),
    "time_embedding_dim": (None,),
    "time_embedding_type": ("positional",),
    "timestep_post_act": (None,),
    "attention_type": ("default",),
    "cross_attention_norm": (None,),
}


@dataclass(frozen=True, kw_only=True)
class UNetConfig:
    """`heads` and `transformer_layers` are per level, from the outermost to the innermost.

    `time_cond_proj_dim` is the width of the guidance embedding of networks distilled to need no unguided
    half (LCM, arXiv:2310.04378); None for all others.
    """

    in_channels: int
    out_channels: int
    block_out_channels: tuple[int, ...]
    down_block_types: tuple[str, ...]
    up_block_types: tuple[str, ...]
    layers_per_block: tuple[int, ...]
    heads: tuple[int, ...]
    transformer_layers: tuple[int, ...]
    only_cross_attention: tuple[bool, ...]
    cross_attention_dim: int
    use_linear_projection: bool
    upcast_attention: bool
    norm_num_groups: int
    norm_eps: float
    flip_sin_to_cos: bool
    freq_shift: float
    time_cond_proj_dim: int | None

    @classmethod
    def from_dict(cls, published: Mapping[str, Any]) -> UNetConfig:
        """Read a published `unet/config.json`, whose defaults are those of SD1.x.

        Raises CheckpointError for settings that this class does not build, naming them.
        """
        config: dict[str, Any] = {
            "in_channels": 4,
            "out_channels": 4,
            "block_out_channels": (320, 640, 1280, 1280),
            "down_block_types": (*["CrossAttnDownBlock2D"] * 3, "DownBlock2D"),
            "up_block_types": ("UpBlock2D", *["CrossAttnUpBlock2D"] * 3),
            "cross_attention_dim": 1280,
            "use_linear_projection": False,
            "upcast_attention": False,
            "norm_num_groups": 32,
            "norm_eps": 1e-5,
            "flip_sin_to_cos": True,
            "freq_shift": 0,
            "time_cond_proj_dim": None,
            **published,
        }
        require("UNet", config, FIXED)
        require_each("UNet", config, "down_block_types", DOWN_BLOCKS)
        require_each("UNet", config, "up_block_types", UP_BLOCKS)
        levels = len(config["down_block_types"])

        def per_level(value: Any) -> tuple[Any, ...]:
            return tuple(value) if isinstance(value, list | tuple) else (value,) * levels

        derived: dict[str, Any] = {
            "layers_per_block": per_level(config.get("layers_per_block", 2)),
            # published configs say `attention_head_dim` and mean the number of heads
            "heads": per_level(config.get("num_attention_heads") or config.get("attention_head_dim", 8)),
            "transformer_layers": per_level(config.get("transformer_layers_per_block", 1)),
            "only_cross_attention": per_level(config.get("only_cross_attention", False)),
        }
        for key in ("block_out_channels", "up_block_types"):
            derived[key] = per_level(config[key])
        for key, values in derived.items():
            if len(values) != levels:
                raise CheckpointError(f"UNet config: {key} has {len(values)} entries for {levels} levels")
        made = read_config(cls, "UNet", config | derived)
        attentive = [
            *(kind == "CrossAttnDownBlock2D" for kind in made.down_block_types[:-1]),
            True,  # the middle block has the last level's width and heads
        ]
        for width, heads, attends in zip(made.block_out_channels, made.heads, attentive, strict=True):
            if attends and (heads == 0 or width % heads):
                raise CheckpointError(f"UNet config: a width of {width} cannot be split into {heads} heads")
        return made


class Attention(nn.Module):
    """Multi-head attention of x (B, N, C) over the text (B, L, D), without one over itself → (B, N, C)."""

    def __init__(self, channels: int, context_dim: int, heads: int, upcast: bool) -> None:
        super().__init__()
        self.heads = heads
        self.upcast = upcast
        self.to_q = nn.Linear(channels, channels, bias=False)
        self.to_k = nn.Linear(context_dim, channels, bias=False)
        self.to_v = nn.Linear(context_dim, channels, bias=False)
        self.to_out = nn.ModuleList([nn.Linear(channels, channels)])

    def forward(self, x: Tensor, context: Tensor | None) -> Tensor:
        context = x if context is None else context
        q, k, v = self.to_q(x), self.to_k(context), self.to_v(context)
        if self.upcast:  # SD2.1: the products overflow fp16
            q, k, v = q.float(), k.float(), v.float()
        return self.to_out[0](attend(q, k, v, self.heads).to(x.dtype))


class GatedGelu(nn.Module):
    """(B, N, C) → (B, N, D): one half of a projection times the GELU of the other (arXiv:2002.05202)."""

    def __init__(self, in_dim: int, out_dim: int) -> None:
        super().__init__()
        self.proj = nn.Linear(in_dim, 2 * out_dim)

    def forward(self, x: Tensor) -> Tensor:
        # two products: the halves of one would be strided, and slower to read than to compute; the gate's
        # first, so that no more than two of them are in memory at once
        half = self.proj.out_features // 2
        return F.gelu(product(self.proj, x, slice(half, None))).mul_(product(self.proj, x, slice(half)))


class FeedForward(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        # slot 1 held a dropout when these networks were trained
        self.net = nn.Sequential(
            GatedGelu(channels, 4 * channels), nn.Identity(), nn.Linear(4 * channels, channels)
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


class TransformerBlock(nn.Module):
    """Self-attention, attention over the text, feed-forward, each with its LayerNorm and its input added."""

    def __init__(self, channels: int, config: UNetConfig, heads: int, only_cross: bool) -> None:
        super().__init__()
        context, upcast = config.cross_attention_dim, config.upcast_attention
        self.only_cross = only_cross
        self.norm1 = nn.LayerNorm(channels)
        self.attn1 = Attention(channels, context if only_cross else channels, heads, upcast)
        self.norm2 = nn.LayerNorm(channels)
        self.attn2 = Attention(channels, context, heads, upcast)
        self.norm3 = nn.LayerNorm(channels)
        self.ff = FeedForward(channels)

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        x = x + self.attn1(self.norm1(x), context if self.only_cross else None)
        x = x + self.attn2(self.norm2(x), context)
        return x + self.ff(self.norm3(x))


class SpatialTransformer(nn.Module):
    """Transformer blocks over the pixels as tokens, plus the input: (B, C, h, w) → the same."""

    def __init__(self, channels: int, config: UNetConfig, heads: int, layers: int, only_cross: bool) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(config.norm_num_groups, channels, eps=1e-6)
        linear = config.use_linear_projection  # or the 1×1 convolutions that older checkpoints hold
        self.proj_in = nn.Linear(channels, channels) if linear else nn.Conv2d(channels, channels, 1)
        self.transformer_blocks = nn.ModuleList(
            TransformerBlock(channels, config, heads, only_cross) for _ in range(layers)
        )
        self.proj_out = nn.Linear(channels, channels) if linear else nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        batch, channels, height, width = x.shape
        tokens = self.norm(x).permute(0, 2, 3, 1).reshape(batch, height * width, channels)
        tokens = product(self.proj_in, tokens)  # (B, h·w, C)
        for block in self.transformer_blocks:
            tokens = block(tokens, context)
        tokens = product(self.proj_out, tokens)
        return x + tokens.view(batch, height, width, channels).permute(0, 3, 1, 2)


class Downsample(nn.Module):
    """Halve by a strided 3×3 convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x)


class Level(nn.Module):
    """What down, middle and up blocks share: residual blocks, with or without transformers behind them."""

    def __init__(
        self, widths: list[tuple[int, int]], config: UNetConfig, level: int, *, attentions: int
    ) -> None:
        super().__init__()
        time_dim = 4 * config.block_out_channels[0]
        groups, eps = config.norm_num_groups, config.norm_eps
        self.resnets = nn.ModuleList(
            ResnetBlock(a, b, groups=groups, eps=eps, time_dim=time_dim) for a, b in widths
        )
        self.attentions = nn.ModuleList(
            SpatialTransformer(
                widths[0][1], config, config.heads[level], config.transformer_layers[level],
                config.only_cross_attention[level],
            )
            for _ in range(attentions)
        )  # fmt: skip


class DownBlock(Level):
    """→ the output and every intermediate result, for the skip connections."""

    def __init__(self, config: UNetConfig, level: int) -> None:
        out = config.block_out_channels[level]
        layers = config.layers_per_block[level]
        inputs = [config.block_out_channels[max(level - 1, 0)], *[out] * (layers - 1)]
        attentive = config.down_block_types[level] == "CrossAttnDownBlock2D"
        super().__init__([(a, out) for a in inputs], config, level, attentions=layers if attentive else 0)
        last = level == len(config.block_out_channels) - 1
        self.downsamplers = nn.ModuleList([] if last else [Downsample(out)])

    def forward(self, x: Tensor, time: Tensor, context: Tensor) -> tuple[Tensor, list[Tensor]]:
        skips = []
        for index, resnet in enumerate(self.resnets):
            x = resnet(x, time)
            if self.attentions:
                x = self.attentions[index](x, context)
            skips.append(x)
        for downsample in self.downsamplers:
            x = downsample(x)
            skips.append(x)
        return x, skips


class MidBlock(Level):
    def __init__(self, config: UNetConfig) -> None:
        width = config.block_out_channels[-1]
        super().__init__([(width, width)] * 2, config, -1, attentions=1)

    def forward(self, x: Tensor, time: Tensor, context: Tensor) -> Tensor:
        x = self.resnets[0](x, time)
        return self.resnets[1](self.attentions[0](x, context), time)


class UpBlock(Level):
    """Takes its input and its skip connections from the end of `skips`: nobody else then holds on to them."""

    def __init__(self, config: UNetConfig, index: int) -> None:
        widths = config.block_out_channels
        level = len(widths) - 1 - index
        out, before, after = widths[level], widths[min(level + 1, len(widths) - 1)], widths[max(level - 1, 0)]
        layers = config.layers_per_block[level] + 1
        inputs = [before, *[out] * (layers - 1)]
        skips = [*[out] * (layers - 1), after]
        attentive = config.up_block_types[index] == "CrossAttnUpBlock2D"
        pairs = [(a + skip, out) for a, skip in zip(inputs, skips, strict=True)]
        super().__init__(pairs, config, level, attentions=layers if attentive else 0)
        self.upsamplers = nn.ModuleList([Upsample(out)] if level else [])

    def forward(self, skips: list[Tensor], time: Tensor, context: Tensor) -> Tensor:
        x = skips.pop()
        for index, resnet in enumerate(self.resnets):
            x = torch.cat([x, skips.pop()], dim=1)
            x = resnet(x, time)
            if self.attentions:
                x = self.attentions[index](x, context)
        for upsample in self.upsamplers:
            height, width = skips[-1].shape[-2:]  # odd sizes: meet the next skip connection
            x = upsample(x, (height, width))
        return x


class UNet(nn.Module):
    """Predicts noise (or velocity) from noisy latents, their timesteps and the text."""

    def __init__(self, config: UNetConfig) -> None:
        super().__init__()
        self.config = config
        widths = config.block_out_channels
        self.conv_in = nn.Conv2d(config.in_channels, widths[0], 3, padding=1)
        self.time_embedding = TimestepEmbedding(widths[0], 4 * widths[0], config.time_cond_proj_dim)
        self.down_blocks = nn.ModuleList(DownBlock(config, level) for level in range(len(widths)))
        self.mid_block = MidBlock(config)
        self.up_blocks = nn.ModuleList(UpBlock(config, index) for index in range(len(widths)))
        self.conv_norm_out = nn.GroupNorm(config.norm_num_groups, widths[0], config.norm_eps)
        self.conv_out = nn.Conv2d(widths[0], config.out_channels, 3, padding=1)

    def forward(
        self, latents: Tensor, timesteps: Tensor, context: Tensor, guidance: Tensor | None = None
    ) -> Tensor:
        """Latents (B, 4, h, w), timesteps (B,), text (B, L, D) → prediction (B, 4, h, w).

        `guidance` (B,) is the guidance scale, for networks with a `time_cond_proj_dim` alone.
        """
        config = self.config
        time = sinusoidal_embedding(
            timesteps, config.block_out_channels[0],
            flip_sin_to_cos=config.flip_sin_to_cos, freq_shift=config.freq_shift,
        )  # fmt: skip
        condition = None
        if config.time_cond_proj_dim is not None and guidance is not None:
            condition = sinusoidal_embedding(
                1000 * (guidance - 1), config.time_cond_proj_dim, flip_sin_to_cos=False, freq_shift=1
            ).to(latents.dtype)
        time = self.time_embedding(time.to(latents.dtype), condition)  # (B,) → (B, T)
        x = self.conv_in(latents)  # (B, 4, h, w) → (B, C, h, w)
        skips = [x]
        for block in self.down_blocks:
            x, more = block(x, time, context)
            skips += more
        skips.append(self.mid_block(x, time, context))
        for block in self.up_blocks:
            skips.append(block(skips, time, context))
        return self.conv_out(F.silu(self.conv_norm_out(skips.pop()), inplace=True))
