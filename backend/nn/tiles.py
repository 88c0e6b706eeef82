"""Pictures too large to go through a network at once go in overlapping tiles.

Letters: B batch, C channels, H W height and width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor


def in_tiles(network: Callable[[Tensor], Tensor], x: Tensor, tile: int | None, scale: int) -> Tensor:
    """(B, C, H, W) → (B, C', scale · H, scale · W), in tiles of that side if x is larger; None: whole."""
    if tile is None or max(x.shape[-2:]) <= tile:
        return network(x)
    return tiled(network, x, tile, tile // 4, scale, 1)


def tiled(
    network: Callable[[Tensor], Tensor], x: Tensor, tile: int, overlap: int, numer: int, denom: int
) -> Tensor:
    """What `network` makes of x, tile by tile, where it scales sizes by numer / denom: each tile is weighted
    by a ramp that falls off towards its own edges."""
    height, width = x.shape[-2:]
    out: Tensor | None = None
    weight = torch.zeros(height * numer // denom, width * numer // denom, device=x.device)
    ramp = overlap * numer // denom
    for top, bottom in _spans(height, tile, overlap):
        for left, right in _spans(width, tile, overlap):
            piece = network(x[..., top:bottom, left:right]).float()
            window = _ramp(piece.shape[-2], ramp, x.device)[:, None] * _ramp(piece.shape[-1], ramp, x.device)
            if out is None:
                out = torch.zeros(*piece.shape[:2], *weight.shape, device=x.device)
            y, x_ = top * numer // denom, left * numer // denom
            place = (..., slice(y, y + piece.shape[-2]), slice(x_, x_ + piece.shape[-1]))
            out[place] += piece * window
            weight[place] += window
    assert out is not None
    return (out / weight).to(x.dtype)


def _spans(length: int, tile: int, overlap: int) -> Iterator[tuple[int, int]]:
    """Starts and ends of tiles that cover `length`, the last one moved back to end on the edge."""
    start = 0
    while start + tile < length:
        yield start, start + tile
        start += tile - overlap
    yield max(length - tile, 0), length


def _ramp(length: int, ramp: int, device: torch.device) -> Tensor:
    """1 in the middle, falling linearly to near 0 over `ramp` pixels at both ends: (length,)."""
    distance = torch.arange(length, device=device) + 0.5
    return (torch.minimum(distance, length - distance) / ramp).clamp(max=1.0)
