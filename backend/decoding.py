"""The last phase of SD1.5 and SD3, which share the KL autoencoder: latents in model space → pictures."""

from __future__ import annotations

import copy
from collections.abc import Generator

import torch
from PIL.Image import Image
from torch import Tensor

from backend.events import Notice
from backend.nn.autoencoder import Autoencoder, AutoencoderConfig
from backend.nn.pictures import to_pictures
from backend.phases import Phase, Progress
from backend.weights.parts import finite, layout_of

TILE = 96  # latent pixels along a side; with a quarter of it overlapping, group norms see enough to agree


def decode_phase(
    config: AutoencoderConfig,
    size: tuple[int, int],
    *,
    dtype: torch.dtype,
    device: torch.device,
    room_bytes: int,
) -> tuple[Phase, tuple[str, ...]]:
    """The phase "decode" of "vae", from the result of "denoise"; `size` is height and width in pixels.

    Where its work would take more than `room_bytes`, it goes tile by tile, and the decision is told.
    """
    pixels, side = size[0] * size[1], TILE * config.scale
    tile, work, decisions = None, decode_work(config, pixels, dtype.itemsize), ()
    # tiles change the picture a little (each has its own group norms), so only where the whole does not fit
    if max(size) > side and work > room_bytes:
        tile, work = TILE, decode_work(config, min(side * side, pixels), dtype.itemsize)
        decisions = (f"The picture is decoded in tiles of {side} pixels: the whole would not fit.",)
    phase = Phase(
        name="decode", components=("vae",), key=None, work_bytes=work,
        run=lambda parts, results: decode(parts["vae"], results["denoise"], dtype, device, tile),
    )  # fmt: skip
    return phase, decisions


@torch.no_grad()
def decode(
    vae: Autoencoder, latents: Tensor, dtype: torch.dtype, device: torch.device, tile: int | None
) -> Generator[Progress | Notice, None, list[Image]]:
    """→ one picture per image, decoded one at a time: the decoder's work is the largest of all."""
    pictures: list[Image] = []
    for index, one in enumerate(vae.from_model(finite(latents, "denoising", dtype)).split(1)):
        pixels = vae.decode(one.to(device, dtype).to(memory_format=layout_of(dtype)), tile=tile)
        if not pixels.isfinite().all() and dtype == torch.float16:
            yield Notice(
                text="The picture's decoder overflowed in float16; that picture was decoded in float32."
            )
            pixels = copy.deepcopy(vae).float().decode(one.to(device), tile=tile)
        pictures += to_pictures(pixels.float() / 2 + 0.5)
        yield Progress(step=index + 1, steps=len(latents))
    return pictures


def decode_work(config: AutoencoderConfig, pixels: int, item: int) -> int:
    """Bytes of activations of the decoder's last level, one picture at a time."""
    outer, next_width = (
        config.block_out_channels[0],
        config.block_out_channels[min(1, len(config.block_out_channels) - 1)],
    )
    return (3 * next_width + 2 * outer) * pixels * item
