"""Bytes of activations that networks take at their widest, above their weights: what all families share.

Each formula walks through a forward and takes the most that is held at once anywhere. Pixels and tokens are
counted over the whole batch; `item` is the size of a number. Imports no torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from backend.nn.autoencoder import AutoencoderConfig

CLIP_TOKENS = 77  # of one chunk of a prompt
FUSED_WIDTH = 256  # features of a head up to which a card's attention keeps its sums inside, in 16 bits


def attention(batch: int, heads: int, queries: int, keys: int, item: int, rows: int | None) -> int:
    """What attention holds besides its input and result: nothing as one kernel (`rows` None); else scores of
    up to `rows` queries at once, and as much again for the softmax of them."""
    if rows is None:
        return 0
    return 2 * batch * heads * min(rows, queries) * keys * item


def resnet(inner: int, outer: int, pixels: int, item: int, device: str) -> int:
    """A residual block from `inner` to `outer` channels, its input counted.

    Widest either as the first convolution runs (input, its norm, result), or the second (input, the first's
    result, its norm, result). In 16 bits a card's convolutions run channels last and its group norms do not,
    so each copies what it is given by the other.
    """
    again = item == 2 and device != "cpu"
    first, second = (2 + again) * inner + outer, inner + (3 + again) * outer
    return max(first, second) * pixels * item


def decode(
    config: AutoencoderConfig, size: tuple[int, int], item: int, *, device: str, rows: int | None = None
) -> int:
    """The KL autoencoder's decoder over one picture, or tile, of latents of this `size`.

    Mostly the last level's first block, which goes from the width before to its own, all in the picture's
    full size. 0.1% off what a card allocates.
    """
    widths = config.block_out_channels[::-1]
    pixels = size[0] * size[1]
    peak = resnet(widths[0], widths[0], pixels, item, device)
    if config.mid_block_add_attention:
        kept = widths[0] * pixels * item
        outside = 4 * widths[0] * pixels if item == 2 and widths[0] > FUSED_WIDTH and rows is None else 0
        # input, norm, queries, keys, values and result
        peak = max(peak, 6 * kept + outside + attention(1, 1, pixels, pixels, item, rows))
    before = widths[0]
    for level, width in enumerate(widths):
        peak = max(peak, resnet(before, width, pixels, item, device))
        if level < len(widths) - 1:
            peak = max(peak, (1 + 4 + 4) * width * pixels * item)  # input, enlarged, convolved
            pixels *= 4
        before = width
    return peak


def clip(config: Mapping[str, Any], prompts: int, item: int, *, states: bool) -> int:
    """A CLIP text encoder over so many prompts of one chunk each, or chunks; with the `states` after every
    layer, which all stay."""
    width, layers = config.get("hidden_size", 512), config.get("num_hidden_layers", 12)
    hidden = config.get("intermediate_size", 2048)
    activation = 3 if config.get("hidden_act", "quick_gelu") == "quick_gelu" else 2  # is three operations
    kept = (layers if states else 1) * width  # results of layers; then residual, norm and result
    return prompts * CLIP_TOKENS * (kept + 3 * width + activation * hidden) * item
