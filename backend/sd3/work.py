"""Bytes of activations that the phases of Stable Diffusion 3 take at their widest, above the weights."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from backend.nn.work import CLIP_TOKENS, attention, clip, on_cpu

if TYPE_CHECKING:
    from backend.sd3.mmdit import MMDiTConfig

HISTORY = 4  # float32 copies of the latents, for each row: the sampler's, and what the network is given


def encode_clip(config: Mapping[str, Any], prompts: int, item: int) -> int:
    """One of the two CLIPs over so many prompts (or chunks of them); they run one after the other."""
    return clip(config, prompts, item, states=True)


def denoise(
    config: MMDiTConfig,
    batch: int,
    size: tuple[int, int],
    tokens: int,
    item: int,
    *,
    device: str,
    rows: int | None = None,
) -> int:
    """One forward of `batch` rows, guidance's halves included; `size` is height and width of the latents,
    `tokens` how many T5 reads.

    What one block holds, all being alike: the most in the picture's feed-forward, of 11 copies of its tokens,
    or, where there is much text to little picture, in the attention or in the text's own feed-forward. 1.5%
    off what a card allocates.
    """
    picture, text = size[0] * size[1] // config.patch_size**2, CLIP_TOKENS + tokens
    heads, both = config.num_attention_heads, picture + text
    apart = batch > 1  # the shares of both in a result of several rows are copied before they are projected
    copies = {  # of the picture's tokens, and of the text's
        # before and after their norm; queries, keys, values and result of both
        "attention": (6, 6),
        "projection": (7 + apart, 6),
        "text's projection": (7, 7 + apart),
        # before, after attention, and normalised; four times as wide before and after the activation
        "feed-forward": (3 + 8, 2),
        "text's feed-forward": (2, 4 + 8),
    }
    if device == "cpu" and config.qk_norm is not None:
        floats = 3 * 4 // item  # its norm is several operations in float32
        copies["norm of queries"] = (5 + floats, 3)
    held = {what: (i * picture + t * text) * config.width * item for what, (i, t) in copies.items()}
    held["attention"] += attention(1, heads, both, both, item, rows) + 4 * heads * both
    features = (batch + min(batch, 2)) * text * config.joint_attention_dim * item  # for each row, and as read
    latents = HISTORY * batch * config.in_channels * size[0] * size[1] * 4
    work = batch * max(held.values()) + features + latents
    return on_cpu(work, batch * picture * config.width * item, item) if device == "cpu" else work
