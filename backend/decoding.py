"""The last phase of SD1.5 and SD3, which share the KL autoencoder: latents in model space → pictures."""

from __future__ import annotations

from collections.abc import Generator

import torch
from PIL.Image import Image
from torch import Tensor

from backend.nn import work
from backend.nn.autoencoder import Autoencoder, AutoencoderConfig
from backend.nn.pictures import to_pictures
from backend.phases import Manner, Phase, Progress
from backend.weights.parts import device_of, finite, layout_of

# Latent pixels along a tile's side; with a quarter of it overlapping, group norms see enough to agree. Tiles
# change the picture a little (each has its own group norms), so only where the whole does not fit.
TILES = (96, 64)


def decode_phase(
    config: AutoencoderConfig,
    size: tuple[int, int],
    pictures: int,
    *,
    painter: str,
    dtypes: tuple[torch.dtype, torch.dtype],
    device: str,
) -> Phase:
    """The phase "decode" of "vae", from the result of "denoise", which the component `painter` made; `size`
    is height and width of the latents, `dtypes` what the painter and the VAE compute in."""
    whole = Manner(images=1)  # one after the other: the decoder's work is the largest of all
    tiles = tuple(Manner(images=1, tile=tile) for tile in TILES if tile < max(size))
    together = (Manner(images=pictures),) if pictures > 1 else ()
    return Phase(
        name="decode", components=("vae",), key=None, manners=(whole, *tiles, *together), pictures=pictures,
        work=lambda manner: decode_work(config, size, dtypes[1].itemsize, manner, device),
        run=lambda parts, results, manner: decode(
            parts["vae"], results["denoise"], painter, dtypes, manner
        ),
    )  # fmt: skip


@torch.no_grad()
def decode(
    vae: Autoencoder, latents: Tensor, painter: str, dtypes: tuple[torch.dtype, torch.dtype], manner: Manner
) -> Generator[Progress, None, list[Image]]:
    """→ one picture per image. Raises NotFinite for latents, or pixels, that are no numbers."""
    pictures: list[Image] = []
    latents = vae.from_model(finite(latents, painter, "Painting", dtypes[0]))
    for some in latents.split(manner.images):
        z = some.to(device_of(vae), dtypes[1]).to(memory_format=layout_of(dtypes[1]))
        pixels = finite(vae.decode(z, tile=manner.tile), "vae", "Decoding", dtypes[1])
        pictures += to_pictures(pixels.float() / 2 + 0.5)
        yield Progress(step=len(pictures), steps=len(latents))
    return pictures


def decode_work(
    config: AutoencoderConfig, size: tuple[int, int], item: int, manner: Manner, device: str
) -> int:
    """Bytes of activations; of tiles, those of one beside the picture that they are added to."""
    height, width = size
    if manner.tile is None:
        return manner.images * work.decode(config, size, item, device=device, rows=manner.rows)
    tile = min(manner.tile, height), min(manner.tile, width)
    added = height * width * config.scale**2 * 4 * (2 * config.out_channels + 1)  # float32, and their weights
    return work.decode(config, tile, item, device=device, rows=manner.rows) + added
