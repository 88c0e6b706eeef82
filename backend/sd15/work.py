"""Bytes of activations that the phases of Stable Diffusion 1.5 take at their widest, above the weights."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from backend.nn.work import CLIP_TOKENS, attention, clip, on_cpu, resnet

if TYPE_CHECKING:
    from backend.sd15.unet import UNetConfig

HISTORY = 4  # float32 copies of the latents, for each row: the sampler's, and what the network is given
HOLES = (140, 30)  # the skip connections, and weights that oneDNN copies, stand between what is freed


def encode(config: Mapping[str, Any], prompts: int, item: int, *, clip_skip: int = 0) -> int:
    """CLIP over so many prompts (or chunks of them); where layers are skipped, the results of all stay."""
    return clip(config, prompts, item, states=clip_skip > 0)


def denoise(
    config: UNetConfig,
    batch: int,
    size: tuple[int, int],
    item: int,
    *,
    device: str,
    rows: int | None = None,
) -> int:
    """One forward of `batch` rows, guidance's halves included; `size` is height and width of the latents.

    Walks down and up as the UNet does: what a block holds at its widest, on top of the skip connections that
    wait. With 16-bit or float32 numbers and pictures of 512² to 1536² that is the outermost level's
    feed-forward on the way up: 12 copies of its features, and two skips. 0.5% off what a card allocates. On a
    CPU small pictures take the most in the middle, where all skips wait and a weight of 59 MiB is copied.
    """
    widths, deepest = config.block_out_channels, len(config.block_out_channels) - 1
    pixels = [batch * size[0] * size[1]]
    height, breadth = size
    for _ in range(deepest):
        height, breadth = (height + 1) // 2, (breadth + 1) // 2
        pixels.append(batch * height * breadth)

    def residual(inner: int, level: int) -> int:
        return resnet(inner, widths[level], pixels[level], item, device)

    def attends(level: int) -> int:
        return _transformer(config, level, batch, pixels[level] // batch, item, rows)

    skips = [widths[0] * pixels[0] * item]
    peak = 0
    for level, width in enumerate(widths):
        for layer in range(config.layers_per_block[level]):
            inner = width if layer else widths[max(level - 1, 0)]
            # its input is the last of the skips
            peak = max(peak, sum(skips) + residual(inner, level) - inner * pixels[level] * item)
            if config.down_block_types[level] == "CrossAttnDownBlock2D":
                peak = max(peak, sum(skips) + attends(level))
            skips.append(width * pixels[level] * item)
        if level < deepest:
            skips.append(width * pixels[level + 1] * item)
    peak = max(peak, sum(skips) + attends(deepest))
    before = widths[-1]
    for level in reversed(range(deepest + 1)):
        width, count = widths[level], pixels[level]
        for _ in range(config.layers_per_block[level] + 1):
            skip = skips.pop()
            joined = before + skip // (count * item)
            peak = max(peak, sum(skips) + 2 * joined * count * item, sum(skips) + residual(joined, level))
            if config.up_block_types[deepest - level] == "CrossAttnUpBlock2D":
                peak = max(peak, sum(skips) + attends(level))
            before = width
        if level:
            enlarged = 2 * pixels[level - 1]  # and convolved
            peak = max(peak, sum(skips) + width * (count + enlarged) * item)
    text = batch * CLIP_TOKENS * config.cross_attention_dim * item
    held = peak + text + HISTORY * batch * config.in_channels * size[0] * size[1] * 4
    return on_cpu(held, widths[0] * pixels[0] * item, item, holes=HOLES) if device == "cpu" else held


def _transformer(config: UNetConfig, level: int, batch: int, tokens: int, item: int, rows: int | None) -> int:
    """Transformer blocks over the pixels of one level, their input counted."""
    width, heads = config.block_out_channels[level], config.heads[level]
    features = batch * tokens * width * item
    wide = 4 // item if config.upcast_attention else 1
    keys = CLIP_TOKENS if config.only_cross_attention[level] else tokens
    # picture, tokens and their norm; queries, keys, values and result; a float32 for each query
    attending = (3 + 4 * wide) * features + max(
        features, attention(batch, heads, tokens, keys, item * wide, rows) + 4 * batch * heads * tokens
    )
    feeding = (1 + 2 + 1 + 4 + 4) * features  # picture, tokens before and now, norm, both halves
    return max(attending, feeding)
