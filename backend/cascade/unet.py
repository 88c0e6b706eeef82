"""The UNet of Stable Cascade's Stages B and C.

Source: Pernias et al., Würstchen: An Efficient Architecture for Large-Scale Text-to-Image Diffusion Models
(arXiv:2306.00637); blocks after ConvNeXt V2 (arXiv:2301.00808). Settings and module names as in the published
`config.json` files and the weights beside them.

Letters: B batch, P prompts (B is a multiple), C channels, h w latent pixels, S conditioning tokens,
D their features, R timestep features.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from backend.errors import CheckpointError
from backend.nn.configs import read_config
from backend.nn.layers import attend, sinusoidal_embedding

RESIDUAL, TIMESTEP, ATTENTION = "SDCascadeResBlock", "SDCascadeTimestepBlock", "SDCascadeAttnBlock"
# On a CPU what a block widens to is made so many pixels at a time, to be still in the cache when it is used:
# together with the sums below, that takes half the time at Stage B's outermost level.
SLICE_PIXELS, SUMMED_PIXELS = 2048, 128
RATIO_SCALE = 10_000  # timestep ratios lie in [0, 1]; the embedding's frequencies are made for this range


@dataclass(frozen=True, kw_only=True)
class UNetConfig:
    """Tuples run from the outermost level to the innermost, those named `up_` the other way.

    `clip_text_in_channels` and `clip_image_in_channels` are None for Stage B, which reads the pooled text
    alone; `effnet_in_channels` and `pixel_mapper_in_channels` are None for Stage C. `switch_level` says
    between which levels Stage C changes its resolution; None means strided convolutions, between all.
    """

    in_channels: int
    out_channels: int
    timestep_ratio_embedding_dim: int
    patch_size: int
    conditioning_dim: int
    block_out_channels: tuple[int, ...]
    num_attention_heads: tuple[int, ...]
    down_num_layers_per_block: tuple[int, ...]
    up_num_layers_per_block: tuple[int, ...]
    down_blocks_repeat_mappers: tuple[int, ...]
    up_blocks_repeat_mappers: tuple[int, ...]
    block_types_per_layer: tuple[tuple[str, ...], ...]
    clip_text_in_channels: int | None
    clip_text_pooled_in_channels: int
    clip_image_in_channels: int | None
    clip_seq: int
    effnet_in_channels: int | None
    pixel_mapper_in_channels: int | None
    kernel_size: int
    self_attn: tuple[bool, ...]
    timestep_conditioning_type: tuple[str, ...]
    switch_level: tuple[bool, ...] | None

    @classmethod
    def from_dict(cls, published: Mapping[str, Any]) -> UNetConfig:
        """Read a published `config.json` of a prior or a decoder, whose defaults are those of Stage C.

        Raises CheckpointError for settings that this class does not build, naming them.
        """
        config: dict[str, Any] = {
            "in_channels": 16,
            "out_channels": 16,
            "timestep_ratio_embedding_dim": 64,
            "patch_size": 1,
            "conditioning_dim": 2048,
            "block_out_channels": (2048, 2048),
            "num_attention_heads": (32, 32),
            "down_num_layers_per_block": (8, 24),
            "up_num_layers_per_block": (24, 8),
            "down_blocks_repeat_mappers": (1, 1),
            "up_blocks_repeat_mappers": (1, 1),
            "block_types_per_layer": ((RESIDUAL, TIMESTEP, ATTENTION),) * 2,
            "clip_text_in_channels": None,
            "clip_text_pooled_in_channels": 1280,
            "clip_image_in_channels": None,
            "clip_seq": 4,
            "effnet_in_channels": None,
            "pixel_mapper_in_channels": None,
            "kernel_size": 3,
            "self_attn": True,
            "timestep_conditioning_type": ("sca", "crp"),
            "switch_level": None,
            **published,
        }
        types = config["block_types_per_layer"]
        if isinstance(types, list | tuple):
            config["block_types_per_layer"] = tuple(
                tuple(level) if isinstance(level, list) else level for level in types
            )
        levels = (
            len(config["block_out_channels"]) if isinstance(config["block_out_channels"], Sequence) else 0
        )
        if isinstance(config["self_attn"], bool):
            config["self_attn"] = (config["self_attn"],) * levels
        if not config["timestep_conditioning_type"]:  # read_config takes no empty tuples
            raise CheckpointError("Cascade UNet config: timestep_conditioning_type is empty")
        read = read_config(cls, "Cascade UNet", config)
        _check(read)
        return read

    @property
    def levels(self) -> int:
        return len(self.block_out_channels)


def _check(config: UNetConfig) -> None:
    per_level = (
        "num_attention_heads", "down_num_layers_per_block", "up_num_layers_per_block", "self_attn",
        "down_blocks_repeat_mappers", "up_blocks_repeat_mappers", "block_types_per_layer",
    )  # fmt: skip
    for name in per_level:
        if len(getattr(config, name)) != config.levels:
            raise CheckpointError(
                f"Cascade UNet config: {name} has {len(getattr(config, name))} entries; "
                f"block_out_channels has {config.levels}"
            )
    if config.switch_level is not None and len(config.switch_level) < config.levels - 1:
        raise CheckpointError(
            f"Cascade UNet config: switch_level has {len(config.switch_level)} entries; "
            f"it must have {config.levels - 1}"
        )
    for kind in {kind for level in config.block_types_per_layer for kind in level}:
        if kind not in (RESIDUAL, TIMESTEP, ATTENTION):
            raise CheckpointError(
                f"Cascade UNet config: block_types_per_layer names {kind!r}; "
                f"it can be {RESIDUAL}, {TIMESTEP} or {ATTENTION}"
            )
    for width, heads, kinds in zip(
        config.block_out_channels, config.num_attention_heads, config.block_types_per_layer, strict=True
    ):
        if ATTENTION in kinds and (heads < 1 or width % heads):
            raise CheckpointError(
                f"Cascade UNet config: num_attention_heads is {heads} for {width} channels; "
                "it must divide them"
            )


class ChannelNorm(nn.LayerNorm):
    """LayerNorm without weights over the channels of (B, C, h, w)."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels, eps=1e-6, elementwise_affine=False)

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 (named so by the base class)
        return super().forward(input.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class GlobalResponseNorm(nn.Module):
    """Lets channels compete: each is scaled by its norm over the picture, relative to the mean of all.

    Takes the picture in slices (B, L, C). Source: ConvNeXt V2 (arXiv:2301.00808).
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.zeros(1, 1, 1, channels))
        self.beta = nn.Parameter(torch.zeros(1, 1, 1, channels))

    def forward(self, slices: Sequence[Tensor]) -> Iterator[Tensor]:
        squares = torch.stack([_squares(each) for each in slices]).sum(0)  # (B, 1, C)
        norms = squares.clamp(min=1e-20).sqrt()  # of a channel of zeros, the root has no gradient
        relative = norms / (norms.mean(-1, keepdim=True) + 1e-6)
        scale = (1 + self.gamma[0] * relative).to(slices[0].dtype)
        for each in slices:  # x + gamma · x · relative + beta in one pass
            yield torch.addcmul(self.beta[0], each, scale)


def _squares(x: Tensor) -> Tensor:
    """The sums of squares over L of (B, L, C): (B, 1, C), float32."""
    if x.device.type == "cpu":  # torch's norm takes 20 times as long there, copies beyond the cache 5 times
        sums = [each.float().square().sum(1, keepdim=True) for each in x.split(SUMMED_PIXELS, dim=1)]
        return torch.stack(sums).sum(0)
    return torch.linalg.vector_norm(x, dim=1, keepdim=True, dtype=torch.float32).square()


class ResidualBlock(nn.Module):
    """A depthwise convolution, then two linear layers over the channels and those of a skip connection."""

    def __init__(self, channels: int, skip_channels: int, kernel_size: int) -> None:
        super().__init__()
        self.depthwise = nn.Conv2d(channels, channels, kernel_size, padding=kernel_size // 2, groups=channels)
        self.norm = ChannelNorm(channels)
        self.channelwise = nn.ModuleList(
            [
                nn.Linear(channels + skip_channels, 4 * channels),
                nn.GELU(),
                GlobalResponseNorm(4 * channels),
                nn.Identity(),  # dropout in training, so that the next is number 4
                nn.Linear(4 * channels, channels),
            ]
        )

    def forward(self, x: Tensor, skip: Tensor | None = None) -> Tensor:
        widen, activate, compete, _, narrow = self.channelwise
        h = self.norm(self.depthwise(x))
        if skip is not None:
            h = torch.cat([h, skip], dim=1)
        pixels = h.permute(0, 2, 3, 1).flatten(1, 2)  # (B, C, h, w) → (B, L, C)
        length = SLICE_PIXELS // len(x) if x.device.type == "cpu" else pixels.shape[1]
        wide = [activate(widen(each)) for each in pixels.split(max(length, 1), dim=1)]  # (B, …, 4·C) each
        mixed = torch.cat([narrow(each) for each in compete(wide)], dim=1)
        return x + mixed.unflatten(1, x.shape[2:]).permute(0, 3, 1, 2)


class TimestepBlock(nn.Module):
    """Scales and shifts channels by the timestep's features, and by those of the other conditions on it."""

    def __init__(self, channels: int, time_dim: int, conditions: Sequence[str]) -> None:
        super().__init__()
        self.mapper = nn.Linear(time_dim, 2 * channels)
        self.names = [f"mapper_{name}" for name in conditions]
        for name in self.names:
            self.add_module(name, nn.Linear(time_dim, 2 * channels))

    def forward(self, x: Tensor, time: Sequence[Tensor]) -> Tensor:
        mappers = [self.mapper, *(self.get_submodule(name) for name in self.names)]
        shifts = torch.stack([mapper(each) for mapper, each in zip(mappers, time, strict=True)]).sum(0)
        scale, shift = shifts[:, :, None, None].chunk(2, dim=1)  # (B, C, 1, 1)
        return torch.addcmul(shift, x, 1 + scale)


class Attention(nn.Module):
    """The projections of multi-head attention."""

    def __init__(self, channels: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.to_q = nn.Linear(channels, channels)
        self.to_k = nn.Linear(channels, channels)
        self.to_v = nn.Linear(channels, channels)
        self.to_out = nn.ModuleList([nn.Linear(channels, channels)])


class AttentionBlock(nn.Module):
    """Attention of the picture to itself and to the conditioning at once."""

    def __init__(self, channels: int, conditioning_dim: int, heads: int, self_attention: bool) -> None:
        super().__init__()
        self.self_attention = self_attention
        self.norm = ChannelNorm(channels)
        self.attention = Attention(channels, heads)
        self.kv_mapper = nn.Sequential(nn.SiLU(), nn.Linear(conditioning_dim, channels))

    def keys_and_values(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Conditioning tokens (P, S, D) → the keys and the values made of them, (P, S, C) each."""
        mapped = self.kv_mapper(tokens)
        return self.attention.to_k(mapped), self.attention.to_v(mapped)

    def forward(self, x: Tensor, conditioning: tuple[Tensor, Tensor]) -> Tensor:
        batch, channels, height, width = x.shape
        h = self.norm(x).permute(0, 2, 3, 1).reshape(batch, -1, channels)  # (B, C, h, w) → (B, h·w, C)
        key, value = (each.repeat_interleave(batch // len(each), dim=0) for each in conditioning)
        if self.self_attention:
            key = torch.cat([self.attention.to_k(h), key], dim=1)
            value = torch.cat([self.attention.to_v(h), value], dim=1)
        h = self.attention.to_out[0](attend(self.attention.to_q(h), key, value, self.attention.heads))
        return x + h.view(batch, height, width, channels).permute(0, 3, 1, 2)


class Switch(nn.Module):
    """A change of width between levels of Stage C, and of resolution where `enabled`."""

    def __init__(self, in_channels: int, out_channels: int, factor: float, enabled: bool) -> None:
        super().__init__()
        scaling = (
            nn.Upsample(scale_factor=factor, mode="bilinear", align_corners=True)
            if enabled
            else nn.Identity()
        )
        mapping = nn.Conv2d(in_channels, out_channels, 1)
        # convolve at the lower resolution
        self.blocks = nn.Sequential(*([scaling, mapping] if factor > 1 else [mapping, scaling]))

    def forward(self, x: Tensor) -> Tensor:
        return self.blocks(x)


@dataclass(frozen=True)
class Conditioning:
    """What a UNet makes of the prompt and the pictures once: it does not change from step to step.

    `tokens` holds the keys and values of every attention block, (P, S, C) each; `local`, (B, C, h, w), is
    added to the embedded latents (Stage B).
    """

    tokens: Mapping[nn.Module, tuple[Tensor, Tensor]]
    local: Tensor | None

    def of(self, prompts: slice, some: slice, images: int) -> Conditioning:
        """That of these prompts and these of the pictures; as it is where that is all of them."""
        if prompts.start is None and some == slice(0, images):
            return self
        local = self.local
        if local is not None and len(local) > 1:  # one stands for all
            local = local.unflatten(0, (-1, images))[prompts, some].flatten(0, 1)
        tokens = {block: (key[prompts], value[prompts]) for block, (key, value) in self.tokens.items()}
        return Conditioning(tokens=tokens, local=local)


class UNet(nn.Module):
    """Predicts the noise in latents. Build it from a config, load weights, call `condition`, then it."""

    def __init__(self, config: UNetConfig) -> None:
        super().__init__()
        self.config = config
        widths, width, patch = config.block_out_channels, config.block_out_channels[0], config.patch_size
        dim = config.conditioning_dim
        if config.effnet_in_channels is not None:
            self.effnet_mapper = _pixel_mapper(config.effnet_in_channels, width)
        if config.pixel_mapper_in_channels is not None:
            self.pixels_mapper = _pixel_mapper(config.pixel_mapper_in_channels, width)
        self.clip_txt_pooled_mapper = nn.Linear(config.clip_text_pooled_in_channels, dim * config.clip_seq)
        if config.clip_text_in_channels is not None:
            self.clip_txt_mapper = nn.Linear(config.clip_text_in_channels, dim)
        if config.clip_image_in_channels is not None:
            self.clip_img_mapper = nn.Linear(config.clip_image_in_channels, dim * config.clip_seq)
        self.clip_norm = nn.LayerNorm(dim, eps=1e-6, elementwise_affine=False)
        self.embedding = nn.Sequential(
            nn.PixelUnshuffle(patch), nn.Conv2d(config.in_channels * patch**2, width, 1), ChannelNorm(width)
        )

        self.down_blocks, self.up_blocks = nn.ModuleList(), nn.ModuleList()
        self.down_downscalers, self.up_upscalers = nn.ModuleList(), nn.ModuleList()
        self.down_repeat_mappers, self.up_repeat_mappers = nn.ModuleList(), nn.ModuleList()
        for level, channels in enumerate(widths):
            layers = config.down_num_layers_per_block[level]
            self.down_downscalers.append(_downscaler(config, level) if level else nn.Identity())
            self.down_blocks.append(_blocks(config, level, layers, skip=False))
            self.down_repeat_mappers.append(_mappers(channels, config.down_blocks_repeat_mappers[level]))
        for index, level in enumerate(reversed(range(config.levels))):
            layers, repeats = config.up_num_layers_per_block[index], config.up_blocks_repeat_mappers[index]
            self.up_blocks.append(_blocks(config, level, layers, skip=index > 0))
            self.up_repeat_mappers.append(_mappers(widths[level], repeats))
            self.up_upscalers.append(_upscaler(config, level) if level else nn.Identity())
        self.clf = nn.Sequential(
            ChannelNorm(width),
            nn.Conv2d(width, config.out_channels * patch**2, 1),
            nn.PixelShuffle(patch),
        )

    def condition(
        self,
        pooled: Tensor,
        text: Tensor | None = None,
        images: Tensor | None = None,
        *,
        effnet: Tensor | None = None,
        size: tuple[int, int] | None = None,
    ) -> Conditioning:
        """What stays the same through all the steps, computed once.

        pooled: (P, D_pooled). Stage C also takes text (P, L, D_text) and images (P, N, D_image), the pooled
        features of N image prompts (zeros for none). Stage B takes effnet, Stage C's latents (B, 16, H, W),
        and the size (h, w) of its own latents.
        """
        config = self.config
        tokens = [self.clip_txt_pooled_mapper(pooled).unflatten(1, (config.clip_seq, -1))]  # (P, 4, D)
        if text is not None and images is not None:
            mapped = self.clip_img_mapper(images)  # (P, N, 4·D)
            tokens = [
                self.clip_txt_mapper(text),
                *tokens,
                mapped.reshape(len(mapped), -1, tokens[0].shape[-1]),
            ]
        clip = self.clip_norm(torch.cat(tokens, dim=1))  # (P, S, D)
        blocks = [block for level in (*self.down_blocks, *self.up_blocks) for block in _children(level)]
        return Conditioning(
            tokens={b: b.keys_and_values(clip) for b in blocks if isinstance(b, AttentionBlock)},
            local=None if size is None else self._local(pooled, effnet, size),
        )

    def _local(self, pooled: Tensor, effnet: Tensor | None, size: tuple[int, int]) -> Tensor | None:
        """(B, C, h, w) of Stage C's latents, and of pixels, which text to image leaves black."""
        inner = (size[0] // self.config.patch_size, size[1] // self.config.patch_size)
        local = None
        if effnet is not None and self.config.effnet_in_channels is not None:
            local = self.effnet_mapper(_resized(effnet, inner))
        if self.config.pixel_mapper_in_channels is not None:
            pixels = self.pixels_mapper(pooled.new_zeros(1, self.config.pixel_mapper_in_channels, 1, 1))
            local = pixels.expand(-1, -1, *inner) if local is None else local + pixels
        return local

    def forward(self, latents: Tensor, ratio: Tensor, conditioning: Conditioning) -> Tensor:
        """The noise (B, C_out, h, w) in latents (B, C_in, h, w) at timestep ratios (B,), 1 all noise."""
        time = self._time(ratio, latents.dtype)
        x = self.embedding(latents)  # (B, C_in, h, w) → (B, C, h / patch, w / patch)
        if conditioning.local is not None:
            x = x + conditioning.local
        x = x.contiguous(memory_format=torch.channels_last)  # the norms and linear layers go over channels

        def run(x: Tensor, blocks: nn.Module, mappers: nn.Module, skip: Tensor | None) -> Tensor:
            for mapper in (*_children(mappers), None):  # the same blocks again after each mapper
                for index, block in enumerate(_children(blocks)):
                    if isinstance(block, ResidualBlock):
                        x = block(x, skip if index == 0 else None)
                    elif isinstance(block, TimestepBlock):
                        x = block(x, time)
                    else:
                        x = block(x, conditioning.tokens[block])
                if mapper is not None:
                    x = mapper(x)
            return x

        skips: list[Tensor] = []
        for scale, blocks, mappers in zip(
            self.down_downscalers, self.down_blocks, self.down_repeat_mappers, strict=True
        ):
            x = run(scale(x), blocks, mappers, None)
            skips.append(x)
        up = zip(self.up_upscalers, self.up_blocks, self.up_repeat_mappers, strict=True)
        for index, (scale, blocks, mappers) in enumerate(up):
            skip = skips.pop()  # the innermost level goes on from its own
            if index:
                x = _resized(x, (skip.shape[-2], skip.shape[-1]))
            x = scale(run(x, blocks, mappers, skip if index else None))
        return self.clf(x)

    def _time(self, ratio: Tensor, dtype: torch.dtype) -> list[Tensor]:
        """The features of the timestep, and of each condition on it (sca and crp are 0 in text to image)."""

        def features(values: Tensor) -> Tensor:
            dim = self.config.timestep_ratio_embedding_dim
            return sinusoidal_embedding(values * RATIO_SCALE, dim, flip_sin_to_cos=False, freq_shift=1.0).to(
                dtype
            )

        rest = features(torch.zeros_like(ratio))
        return [features(ratio), *[rest] * len(self.config.timestep_conditioning_type)]  # (B, R) each


def _pixel_mapper(in_channels: int, channels: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(in_channels, 4 * channels, 1),
        nn.GELU(),
        nn.Conv2d(4 * channels, channels, 1),
        ChannelNorm(channels),
    )


def _blocks(config: UNetConfig, level: int, layers: int, *, skip: bool) -> nn.ModuleList:
    channels = config.block_out_channels[level]
    made: list[nn.Module] = []
    for _ in range(layers):
        for kind in config.block_types_per_layer[level]:
            if kind == RESIDUAL:
                skip_channels = (
                    channels if skip and not made else 0
                )  # the first block of an up level takes it
                made.append(ResidualBlock(channels, skip_channels, config.kernel_size))
            elif kind == TIMESTEP:
                time_dim = config.timestep_ratio_embedding_dim
                made.append(TimestepBlock(channels, time_dim, config.timestep_conditioning_type))
            else:
                heads = config.num_attention_heads[level]
                made.append(AttentionBlock(channels, config.conditioning_dim, heads, config.self_attn[level]))
    return nn.ModuleList(made)


def _mappers(channels: int, repeats: int) -> nn.ModuleList:
    return nn.ModuleList(nn.Conv2d(channels, channels, 1) for _ in range(repeats - 1))


def _downscaler(config: UNetConfig, level: int) -> nn.Sequential:
    before, after = config.block_out_channels[level - 1 : level + 1]
    if config.switch_level is None:
        return nn.Sequential(ChannelNorm(before), nn.Conv2d(before, after, 2, stride=2))
    return nn.Sequential(ChannelNorm(before), Switch(before, after, 0.5, config.switch_level[level - 1]))


def _upscaler(config: UNetConfig, level: int) -> nn.Sequential:
    after, before = config.block_out_channels[level - 1 : level + 1]
    if config.switch_level is None:
        return nn.Sequential(ChannelNorm(before), nn.ConvTranspose2d(before, after, 2, stride=2))
    return nn.Sequential(ChannelNorm(before), Switch(before, after, 2, config.switch_level[level - 1]))


def _children(module: nn.Module) -> list[nn.Module]:
    return list(module.children())


def _resized(x: Tensor, size: tuple[int, int]) -> Tensor:
    """Bilinear, corners on corners; as it is where the size is right already."""
    if (x.shape[-2], x.shape[-1]) == size:
        return x
    return F.interpolate(x.float(), size=size, mode="bilinear", align_corners=True).to(x.dtype)
