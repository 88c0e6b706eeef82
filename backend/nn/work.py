"""Bytes of activations that networks take at their widest, above their weights: what all families share.

Each formula walks through a forward and takes the most that is held at once anywhere. Pixels and tokens are
counted over the whole batch; `item` is the size of a number. Imports no torch.

On a card that is what the allocator hands out, but for workspaces of convolutions and matrix products. On a
CPU oneDNN copies weights (and, in float32, features) into layouts of its own as it uses them, which is
counted with them, and two terms come on top: see `on_cpu`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from backend.nn.autoencoder import AutoencoderConfig

CLIP_TOKENS = 77  # of one chunk of a prompt
FUSED_WIDTH = 256  # features of a head up to which a card's attention keeps its sums inside, in 16 bits


MIB = 2**20
CODE = 12 * MIB  # what oneDNN compiles for the shapes of one network, as measured: 8 to 18
DECODED = (15, 5)  # percent that the heap keeps while a picture is decoded, in 16 bits and in float32
HEAP = 32 * MIB  # pieces up to this size glibc takes from its heap, where freed ones leave holes


def on_cpu(work: int, piece: int, item: int, *, holes: tuple[int, int] = (80, 30)) -> int:
    """What a process takes for `work` made mostly of pieces of this size.

    With `MALLOC_MMAP_THRESHOLD_=1048576`, by which all that is freed goes back, `work` and CODE are 8% off
    what was measured at most, 3% on the whole (15 forwards, 512² to 1024²). But that makes a forward take 1.7
    times as long, so glibc is left as it is, and keeps `holes`: in percent of the work, in 16 bits and in
    float32, for pieces from its heap, as measured. Those scatter: 20% between two runs of the same.
    """
    share = 5 if piece > HEAP else holes[item == 4]
    return work + work * share // 100 + CODE


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
    so each copies what it is given by the other. A CPU's copy what they are given in float32, and weights.
    """
    on_a_cpu = device == "cpu"
    again = item == (4 if on_a_cpu else 2)
    first, second = ((2 + again) * inner + outer) * pixels, (inner + (3 + again) * outer) * pixels
    if on_a_cpu:
        first, second = first + 9 * inner * outer, second + 9 * outer**2
    return max(first, second) * item


def decode(
    config: AutoencoderConfig, size: tuple[int, int], item: int, *, device: str, rows: int | None = None
) -> int:
    """The KL autoencoder's decoder over one picture, or tile, of latents of this `size`.

    Mostly the last level's first block, which goes from the width before to its own, all in the picture's
    full size. 0.5% off what a card allocates; on a CPU 10% at 512² and 1024².
    """
    again = item == 4 and device == "cpu"
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
            # input, enlarged (and copied), convolved
            peak = max(peak, (1 + 4 + 4 + 4 * again) * width * pixels * item)
            pixels *= 4
        before = width
    return on_cpu(peak, 0, item, holes=DECODED) if device == "cpu" else peak


def clip(config: Mapping[str, Any], prompts: int, item: int, *, states: bool) -> int:
    """A CLIP text encoder over so many prompts of one chunk each, or chunks; with the `states` after every
    layer, which all stay."""
    width, layers = config.get("hidden_size", 512), config.get("num_hidden_layers", 12)
    hidden = config.get("intermediate_size", 2048)
    activation = 3 if config.get("hidden_act", "quick_gelu") == "quick_gelu" else 2  # is three operations
    kept = (layers if states else 1) * width  # results of layers; then residual, norm and result
    return prompts * CLIP_TOKENS * (kept + 3 * width + activation * hidden) * item
