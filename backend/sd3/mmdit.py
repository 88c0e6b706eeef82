"""The network of Stable Diffusion 3 and 3.5: a transformer over the tokens of picture and text together.

Source: Esser et al., Scaling Rectified Flow Transformers (MMDiT, arXiv:2403.03206); settings and module names
as in the published `transformer/config.json` files and the weights beside them.

Letters: B batch, C latent channels, h w latent pixels, I picture tokens, T text tokens, D features.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from backend.errors import CheckpointError
from backend.nn.configs import read_config, require
from backend.nn.layers import TimestepEmbedding, attend, sinusoidal_embedding

EPS = 1e-6
TIME_FEATURES = 256
Shift = tuple[Tensor, Tensor]  # shift and scale of a normalised stream, each (B, 1, D)


@dataclass(frozen=True, kw_only=True)
class MMDiTConfig:
    sample_size: int = 128
    patch_size: int = 2
    in_channels: int = 16
    out_channels: int = 16
    num_layers: int = 18
    attention_head_dim: int = 64
    num_attention_heads: int = 18
    joint_attention_dim: int = 4096
    caption_projection_dim: int = 1152
    pooled_projection_dim: int = 2048
    pos_embed_max_size: int = 96
    dual_attention_layers: tuple[int, ...] | None = None
    qk_norm: str | None = None

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> MMDiTConfig:
        """Read a published `transformer/config.json`. Raises CheckpointError for a kind of network of this
        class that is not built here."""
        require("transformer", config, {"qk_norm": (None, "rms_norm")})
        dual = config.get("dual_attention_layers") or None
        made = read_config(cls, "transformer", {**config, "dual_attention_layers": dual})
        if made.caption_projection_dim != made.width:
            raise CheckpointError(
                f"transformer config: caption_projection_dim is {made.caption_projection_dim}; it can be "
                f"{made.width}, num_attention_heads × attention_head_dim"
            )
        return made

    @property
    def width(self) -> int:
        return self.num_attention_heads * self.attention_head_dim


class PatchEmbed(nn.Module):
    """Latents (B, C, h, w) → tokens (B, I, D) that know where they are.

    The table of positions is cropped around its centre, so that any size up to the table's can be had.
    """

    def __init__(self, config: MMDiTConfig) -> None:
        super().__init__()
        patch, self.most = config.patch_size, config.pos_embed_max_size
        self.proj = nn.Conv2d(config.in_channels, config.width, patch, stride=patch)
        native = config.sample_size // config.patch_size
        self.register_buffer("pos_embed", positions(config.width, self.most, native)[None])

    def forward(self, latents: Tensor) -> Tensor:
        x = self.proj(latents)  # (B, C, h, w) → (B, D, h / p, w / p)
        height, width = x.shape[-2:]
        top, left = (self.most - height) // 2, (self.most - width) // 2
        table = self.get_buffer("pos_embed").view(self.most, self.most, -1)
        place = table[top : top + height, left : left + width].flatten(0, 1)  # (I, D)
        return x.flatten(2).transpose(1, 2) + place.to(x.dtype)


def positions(width: int, size: int, native: int) -> Tensor:
    """(size², width): sines and cosines of the column, then of the row, in units of the native grid.

    Source: arXiv:1706.03762 in two dimensions, as ViTs have it (arXiv:2104.02057).
    """
    quarter = width // 4
    frequencies = 10_000 ** -(torch.arange(quarter, dtype=torch.float64) / quarter)
    angles = torch.arange(size, dtype=torch.float64)[:, None] * (native / size) * frequencies
    line = torch.cat([angles.sin(), angles.cos()], dim=1).float()  # (size, width / 2)
    columns, rows = line.expand(size, -1, -1), line[:, None].expand(-1, size, -1)
    return torch.cat([columns, rows], dim=2).flatten(0, 1)


class TimeTextEmbed(nn.Module):
    """Timesteps (B,), in 0 to 1000, and pooled text (B, P) → (B, D)."""

    def __init__(self, config: MMDiTConfig) -> None:
        super().__init__()
        self.timestep_embedder = TimestepEmbedding(TIME_FEATURES, config.width)
        self.text_embedder = TimestepEmbedding(config.pooled_projection_dim, config.width)

    def forward(self, timesteps: Tensor, pooled: Tensor) -> Tensor:
        features = sinusoidal_embedding(timesteps, TIME_FEATURES).to(pooled.dtype)
        return self.timestep_embedder(features) + self.text_embedder(pooled)


class Modulation(nn.Module):
    """Shifts, scales and gates from the time and the pooled text: (B, D) → `count` times (B, 1, D)."""

    def __init__(self, width: int, count: int) -> None:
        super().__init__()
        self.count = count
        self.linear = nn.Linear(width, count * width)

    def forward(self, time: Tensor) -> tuple[Tensor, ...]:
        return self.linear(F.silu(time))[:, None].chunk(self.count, dim=-1)


def normalised(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """Layer norm without weights of its own: those come from the time and the text."""
    return torch.addcmul(shift, F.layer_norm(x, x.shape[-1:], eps=EPS), 1 + scale)


class FeedForward(nn.Module):
    """(B, L, D) → the same, by way of four times the width."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.net = nn.ModuleList([Gelu(width, 4 * width), nn.Identity(), nn.Linear(4 * width, width)])

    def forward(self, x: Tensor) -> Tensor:
        return self.net[2](self.net[0](x))


class Gelu(nn.Module):
    def __init__(self, in_width: int, out_width: int) -> None:
        super().__init__()
        self.proj = nn.Linear(in_width, out_width)

    def forward(self, x: Tensor) -> Tensor:
        return F.gelu(self.proj(x), approximate="tanh")


class Projections(nn.Module):
    """What both kinds of attention make of the picture's tokens (B, I, D)."""

    def __init__(self, config: MMDiTConfig) -> None:
        super().__init__()
        width, norm = config.width, config.qk_norm is not None
        self.heads = config.num_attention_heads
        # not fused: one product of all three takes as long (0.32 s for 0.30, 8192 tokens on one CPU core)
        self.to_q = nn.Linear(width, width)
        self.to_k = nn.Linear(width, width)
        self.to_v = nn.Linear(width, width)
        self.to_out = nn.ModuleList([nn.Linear(width, width)])
        self.norm_q = head_norm(config) if norm else None
        self.norm_k = head_norm(config) if norm else None

    def picture(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values."""
        return self.by_head(self.norm_q, self.to_q(x)), self.by_head(self.norm_k, self.to_k(x)), self.to_v(x)

    def by_head(self, norm: nn.RMSNorm | None, x: Tensor) -> Tensor:
        return x if norm is None else norm(x.unflatten(-1, (self.heads, -1))).flatten(-2)


class Attention(Projections):
    """The picture's tokens (B, I, D) attend to each other → the same."""

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.picture(x)
        return self.to_out[0](attend(q, k, v, self.heads))


class JointAttention(Projections):
    """Picture (B, I, D) and text (B, T, D) attend to both → the same; `last` needs no new text."""

    def __init__(self, config: MMDiTConfig, *, last: bool) -> None:
        super().__init__(config)
        width, norm = config.width, config.qk_norm is not None
        self.add_q_proj = nn.Linear(width, width)  # published for the last block, too, and without use there
        self.add_k_proj = nn.Linear(width, width)
        self.add_v_proj = nn.Linear(width, width)
        self.to_add_out = None if last else nn.Linear(width, width)
        self.norm_added_q = head_norm(config) if norm else None
        self.norm_added_k = head_norm(config) if norm else None

    def forward(self, x: Tensor, text: Tensor) -> tuple[Tensor, Tensor | None]:
        q, k, v = self.picture(x)
        k = torch.cat([k, self.by_head(self.norm_added_k, self.add_k_proj(text))], dim=1)
        v = torch.cat([v, self.add_v_proj(text)], dim=1)
        if self.to_add_out is None:
            return self.to_out[0](attend(q, k, v, self.heads)), None
        q = torch.cat([q, self.by_head(self.norm_added_q, self.add_q_proj(text))], dim=1)
        out = attend(q, k, v, self.heads)
        return self.to_out[0](out[:, : x.shape[1]]), self.to_add_out(out[:, x.shape[1] :])


def head_norm(config: MMDiTConfig) -> nn.RMSNorm:
    return nn.RMSNorm(config.attention_head_dim, EPS)


class Block(nn.Module):
    """Picture (B, I, D), text (B, T, D) and time (B, D) → picture and text; after the last one no text.

    `dual` blocks have a second attention, of the picture alone, beside the joint one (3.5-medium).
    """

    def __init__(self, config: MMDiTConfig, *, dual: bool, last: bool) -> None:
        super().__init__()
        width = config.width
        self.norm1 = Modulation(width, 9 if dual else 6)
        self.norm1_context = Modulation(width, 2 if last else 6)
        self.attn = JointAttention(config, last=last)
        self.attn2 = Attention(config) if dual else None
        self.ff = FeedForward(width)
        self.ff_context = None if last else FeedForward(width)

    def forward(self, x: Tensor, text: Tensor, time: Tensor) -> tuple[Tensor, Tensor | None]:
        shift, scale, gate, ff_shift, ff_scale, ff_gate, *dual = self.norm1(time)
        if self.ff_context is None:
            text_scale, text_shift, *text_rest = self.norm1_context(time)
        else:
            text_shift, text_scale, *text_rest = self.norm1_context(time)
        attended, text_attended = self.attn(
            normalised(x, shift, scale), normalised(text, text_shift, text_scale)
        )
        second = None
        if self.attn2 is not None:
            dual_shift, dual_scale, dual_gate = dual
            second = dual_gate * self.attn2(normalised(x, dual_shift, dual_scale))
        x = x + gate * attended
        if second is not None:
            x = x + second
        del attended, second  # two of 13 parts of what a dual block would hold at its widest, next
        x = x + ff_gate * self.ff(normalised(x, ff_shift, ff_scale))
        if self.ff_context is None or text_attended is None:
            return x, None
        text_gate, ff_shift, ff_scale, ff_gate = text_rest
        text = text + text_gate * text_attended
        return x, text + ff_gate * self.ff_context(normalised(text, ff_shift, ff_scale))


class MMDiT(nn.Module):
    """The whole: noisy latents, timesteps and text → the velocity, noise less picture."""

    COMPILED = (Block,)

    def __init__(self, config: MMDiTConfig) -> None:
        super().__init__()
        self.config = config
        dual = config.dual_attention_layers or ()
        self.pos_embed = PatchEmbed(config)
        self.time_text_embed = TimeTextEmbed(config)
        self.context_embedder = nn.Linear(config.joint_attention_dim, config.width)
        self.transformer_blocks = nn.ModuleList(
            Block(config, dual=index in dual, last=index == config.num_layers - 1)
            for index in range(config.num_layers)
        )
        self.norm_out = Modulation(config.width, 2)
        self.proj_out = nn.Linear(config.width, config.patch_size**2 * config.out_channels)

    def forward(
        self,
        latents: Tensor,
        timesteps: Tensor,
        context: Tensor,
        pooled: Tensor,
        skip: Collection[int] = (),
    ) -> Tensor:
        """Latents (B, C, h, w), timesteps (B,) in 0 to 1000, text features (B, T, J) and pooled ones (B, P)
        → velocity (B, C, h, w). The blocks whose indices are in `skip` are left out."""
        time = self.time_text_embed(timesteps, pooled)
        x, text = self.pos_embed(latents), self.context_embedder(context)
        for index, block in enumerate(self.transformer_blocks):
            if index not in skip:
                x, text = block(x, text, time)
        scale, shift = self.norm_out(time)
        x = self.proj_out(normalised(x, shift, scale))  # (B, I, D) → (B, I, p² · C)
        patch, (height, width) = self.config.patch_size, latents.shape[-2:]
        x = x.view(len(x), height // patch, width // patch, patch, patch, -1)
        return x.permute(0, 5, 1, 3, 2, 4).reshape(len(x), -1, height, width)
