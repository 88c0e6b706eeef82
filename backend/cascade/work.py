"""Bytes of activations that the phases of Stable Cascade take at their widest, above the weights."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from backend.nn.work import CLIP_TOKENS, CODE, attention, clip, on_cpu

if TYPE_CHECKING:
    from backend.cascade.stage_a import StageAConfig
    from backend.cascade.unet import UNetConfig

HISTORY = 4  # float32 copies of the latents, for each row: the sampler's, and what the network is given
ATTENTION = "SDCascadeAttnBlock"
SLICE_PIXELS = 2048  # that a CPU takes at once, in the UNet's blocks and in Stage A's


def encode(config: Mapping[str, Any], prompts: int, item: int) -> int:
    """CLIP over so many prompts (or chunks of them), the result of every layer kept."""
    return clip(config, prompts, item, states=True)


def unet(
    config: UNetConfig,
    batch: int,
    size: tuple[int, int],
    item: int,
    *,
    device: str,
    rows: int | None = None,
) -> int:
    """One forward of `batch` rows of Stage C or B, guidance's halves included; `size` is height and width of
    its latents.

    The widest block, on the way down or up, on top of the skip connections that wait, of what Stage B adds to
    its latents, and of the keys and values that every attention block has of the conditioning. 1.1% off what
    a card allocates.
    """

    def residual(level: int, *, skip: bool) -> int:
        return _residual(config.block_out_channels[level], pixels[level], item, device, skip=skip)

    pixels, height, width = [], *(side // config.patch_size for side in size)
    switched = config.switch_level
    for level in range(config.levels):
        pixels.append(batch * height * width)
        if switched is None:
            height, width = height // 2, width // 2
        elif level < config.levels - 1 and switched[level]:
            height, width = -(-height // 2), -(-width // 2)
    features = [c * n * item for c, n in zip(config.block_out_channels, pixels, strict=True)]
    tokens = _tokens(config)
    peak = 0
    for level, here in enumerate(features):
        waiting = sum(features[:level])
        inner = level == config.levels - 1
        repeated = config.up_blocks_repeat_mappers[config.levels - 1 - level] > 1
        down = residual(level, skip=False)
        # the level's own input stays besides; joined to it, the skip connection is counted twice
        up = here + (down if inner else here + residual(level, skip=repeated))
        widest = max(down, up)
        if ATTENTION in config.block_types_per_layer[level]:
            heads = config.num_attention_heads[level]
            queries = pixels[level] // batch
            keys = tokens + (queries if config.self_attn[level] else 0)
            text = 2 * batch * tokens * config.block_out_channels[level] * item
            scores = attention(batch, heads, queries, keys, item, rows) + 4 * batch * heads * queries
            widest = max(widest, (1 + (not inner)) * here + 6 * here + text + max(here, scores))
        peak = max(peak, waiting + widest)
    local = features[0] if config.effnet_in_channels is not None else 0
    latents = HISTORY * batch * config.in_channels * size[0] * size[1] * 4
    work = peak + local + _conditioning(config, min(batch, 2), item) + latents
    return on_cpu(work, 2 * max(features), item) if device == "cpu" else work


def _residual(width: int, pixels: int, item: int, device: str, *, skip: bool) -> int:
    """A residual block, its input counted: that, its norm (and the skip connection beside it), four times as
    wide before and after the norm of responses, and the result.

    On a CPU what is behind that norm is made in slices, and of results there are those of the slices, then
    all of them joined; in 16 bits oneDNN copies a weight besides.
    """
    features = width * pixels * item
    before = (1 + 1 + skip + 4) * features
    if device != "cpu":
        return before + (4 + 1) * features
    slices = -(-pixels // SLICE_PIXELS)
    behind = 4 * features // slices * min(slices, 2)
    weight = 4 * width**2 * item if item == 2 else 0
    return before + max(2 * features, features + behind - features // slices * (slices > 1)) + weight


def _tokens(config: UNetConfig) -> int:
    """Of the conditioning: the text's, the pooled text's, and those of one image prompt."""
    return config.clip_seq if config.clip_text_in_channels is None else CLIP_TOKENS + 2 * config.clip_seq


def _conditioning(config: UNetConfig, prompts: int, item: int) -> int:
    """The keys and values of all attention blocks: 85 MiB in Stage C full, guided, in 16 bits."""
    widths = 0
    for level, kinds in enumerate(config.block_types_per_layer):
        layers = config.down_num_layers_per_block[level] + config.up_num_layers_per_block[::-1][level]
        widths += layers * kinds.count(ATTENTION) * config.block_out_channels[level]
    return 2 * prompts * _tokens(config) * widths * item


def stage_a(config: StageAConfig, size: tuple[int, int], item: int, *, device: str) -> int:
    """The decoder of Stage A over one picture; `size` is height and width of Stage B's latents.

    11 copies of a level's features: a block's input, its middle and the norm of that, and four times as wide
    before and after the activation. The outermost level has four times the pixels of the next at half the
    width: it takes the most. 0.8% off what a card allocates.

    On a CPU, in bands, it is 3: the input, the bands' results, and those joined; or, in float32, what oneDNN
    makes of a convolution that enlarges: its input, and three times the result. At 1024² 2% off as measured.
    """
    widest, pixels = 0, size[0] * size[1]
    for level in range(config.levels):
        width = config.embed_dim // 2**level
        features = width * pixels * 4**level
        if device != "cpu":
            widest = max(widest, 11 * features)
        else:
            band = 10 * width * min(SLICE_PIXELS, pixels * 4**level)
            enlarging = 7 * features // 2 if level and item == 4 else 0
            widest = max(widest, 3 * features, 2 * features + band, enlarging)
    return widest * item + (CODE if device == "cpu" else 0)
