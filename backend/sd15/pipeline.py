"""Stable Diffusion 1.5 (and others of its class) as phases: encode → denoise → decode.

Letters: B images, L text tokens, D text features, h w latent pixels.
"""

from __future__ import annotations

from collections.abc import Generator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from backend.decoding import decode_phase
from backend.errors import CheckpointError
from backend.nn.autoencoder import Autoencoder, AutoencoderConfig
from backend.nn.pictures import linear_previews
from backend.phases import Manner, Phase, Pipeline, Progress, Way, split
from backend.requests import SD15Request
from backend.sampling.forwards import predictions
from backend.sampling.noise import Noise
from backend.sampling.samplers import sample
from backend.sampling.schedules import ScheduleConfig
from backend.sd15 import work
from backend.sd15.defaults import defaults
from backend.sd15.unet import UNet, UNetConfig
from backend.text.encoders import CLIP_WIDTH, load_clip_text, load_tokenizer
from backend.text.prompts import NO_EMBEDDINGS, encode_prompts
from backend.weights.parts import Parts, completed, device_of, layout_of
from backend.weights.source import Source

# What "auto" means on a device that computes in it: fp16 keeps three more bits than bf16, and no network of
# this family overflows but the VAE, whose decode is repeated in fp32.
AUTO_DTYPES = ("float16",)

# Published linear approximation of the decoder: model-space latents → RGB in [-1, 1]. For previews only.
LATENT_RGB = {
    "factors": [
        [0.3512, 0.2297, 0.3227],
        [0.3250, 0.4974, 0.2350],
        [-0.2829, 0.1762, 0.2721],
        [-0.2120, -0.2616, -0.7177],
    ],
    "bias": [0.0, 0.0, 0.0],
}


@dataclass(frozen=True, kw_only=True)
class Job:
    """A request with every default filled in."""

    request: SD15Request
    seeds: tuple[int, ...]
    steps: int
    guidance_scale: float
    sampler: str
    width: int
    height: int
    distilled: bool  # the network takes the guidance scale as an input and needs no unguided half

    @property
    def guided(self) -> bool:
        return self.guidance_scale > 1.0 and not self.distilled

    def settings(self) -> dict[str, Any]:
        """The request's fields with every default filled in, and the seed that was used."""
        filled = ("steps", "guidance_scale", "sampler", "width", "height")
        return {
            **asdict(self.request),
            **{name: getattr(self, name) for name in filled},
            "seed": self.seeds[0],
        }


def complete(request: SD15Request, source: Source, seeds: tuple[int, ...]) -> Job:
    """Fill in the checkpoint's defaults. Raises CheckpointError for one that cannot be served."""
    values = completed(request, source, defaults(source))
    distilled = source.config("unet").get("time_cond_proj_dim") is not None
    return Job(request=request, seeds=seeds, distilled=distilled, **values)


def ways(
    request: SD15Request, parts: Parts, *, seeds: tuple[int, ...], dtype: torch.dtype
) -> tuple[Way, ...]:
    """The one way to make the pictures of a request; see `pipeline`."""
    return (Way(make=lambda: pipeline(request, parts, seeds=seeds, dtype=dtype)),)


def pipeline(request: SD15Request, parts: Parts, *, seeds: tuple[int, ...], dtype: torch.dtype) -> Pipeline:
    """The phases of a request, ready to plan and to run; reads configs, loads nothing.

    Raises CheckpointError for a checkpoint of this class that needs a picture to start from.
    """
    source, device = parts.source, parts.device.type
    job = complete(request, source, seeds)
    unet_config = UNetConfig.from_dict(source.config("unet"))
    vae_config = AutoencoderConfig.from_dict(source.config("vae"))
    schedule = ScheduleConfig.from_dict(source.config("scheduler"))
    if unet_config.in_channels != vae_config.latent_channels:
        # the kinds that are known by their channels were refused by name when the config was read
        raise CheckpointError(
            f"{source.name} has a UNet with {unet_config.in_channels} input channels; "
            f"text to image takes {vae_config.latent_channels}"
        )
    painting, decoding = parts.dtype("unet", dtype), parts.dtype("vae", dtype)

    def text(device: torch.device) -> tuple[Any, Any]:
        return load_tokenizer(source), load_clip_text(source, "text_encoder", dtype, device)

    components = {
        "text_encoder": parts.component("text_encoder", dtype, text),
        "unet": parts.network("unet", painting, lambda: UNet(unet_config), forwards=job.steps),
        "vae": parts.network("vae", decoding, lambda: Autoencoder(vae_config)),
    }
    words = parts.words({"clip_l": source.config("text_encoder").get("hidden_size", CLIP_WIDTH)})
    encode_key = (
        components["text_encoder"].state, request.prompt,
        request.negative_prompt if job.guided else None, request.raw_prompt, request.clip_skip,
        parts.words_key,
    )  # fmt: skip
    denoise_key = (
        encode_key, components["unet"].state, seeds, job.steps, job.guidance_scale, job.sampler,
        job.width, job.height, schedule,
    )  # fmt: skip
    size = (job.height // vae_config.scale, job.width // vae_config.scale)
    rgb = source.extras().get("latent_rgb", LATENT_RGB if vae_config.latent_channels == 4 else None)

    def denoise_work(manner: Manner) -> int:
        batch = manner.images * (2 if job.guided and not manner.apart else 1)
        return work.denoise(unet_config, batch, size, painting.itemsize, device=device, rows=manner.rows)

    return Pipeline(
        components=components,
        phases=(
            Phase(
                name="encode", components=("text_encoder",), key=("encode", *encode_key),
                work=lambda _: work.encode(
                    source.config("text_encoder"), 1 + job.guided, dtype.itemsize, clip_skip=request.clip_skip
                ),
                run=lambda parts, *_: encode(parts["text_encoder"], job, words()["clip_l"]),
            ),
            Phase(
                name="denoise", components=("unet",), key=("denoise", *denoise_key),
                manners=split(len(seeds), guided=job.guided), pictures=len(seeds), work=denoise_work,
                run=lambda parts, results, manner: denoise(
                    parts["unet"], results["encode"], job, schedule, size, painting, rgb, manner
                ),
            ),
            decode_phase(
                vae_config, size, len(seeds), painter="unet", dtypes=(painting, decoding), device=device
            ),
        ),
        settings=job.settings(),
    )  # fmt: skip


def encode(
    parts: Any, job: Job, embeddings: Mapping[str, Tensor] = NO_EMBEDDINGS
) -> Generator[Progress, None, Tensor]:
    """→ text features (1, L, D), or (2, L, D) with the negative prompt's first when guidance asks for it."""
    tokenizer, encoder = parts
    request = job.request
    prompts = [request.negative_prompt, request.prompt] if job.guided else [request.prompt]
    features = encode_prompts(
        encoder, tokenizer, prompts,
        raw=request.raw_prompt, clip_skip=request.clip_skip, embeddings=embeddings,
    )  # fmt: skip
    yield Progress(step=1, steps=1)
    return features


@torch.no_grad()
def denoise(
    unet: UNet,
    features: Tensor,
    job: Job,
    schedule: ScheduleConfig,
    size: tuple[int, int],
    dtype: torch.dtype,
    rgb: Mapping[str, Any] | None,
    manner: Manner,
) -> Generator[Progress, None, Tensor]:
    """→ latents (B, 4, h, w), float32, in model space."""
    device = device_of(unet)
    context = features.to(device, dtype)  # (P, L, D)

    def predict(latents: Tensor, timestep: Tensor) -> Tensor:
        def forward(prompts: slice, some: slice) -> Tensor:
            x, words = latents[some].to(dtype), context[prompts]
            batch = len(words) * len(x)
            guidance = torch.full((batch,), job.guidance_scale, device=device)
            return unet(
                x.repeat(len(words), 1, 1, 1).to(memory_format=layout_of(dtype)),
                timestep.expand(batch),
                words.repeat_interleave(len(x), dim=0),  # (P, L, D) → (P · B, L, D)
                guidance,
            ).float()

        out = predictions(forward, len(latents), len(context), manner)
        return torch.lerp(out[0], out[1], job.guidance_scale) if job.guided else out[0]

    noise = Noise(job.seeds, (unet.config.in_channels, *size))
    latents: Tensor | None = None
    for state in sample(job.sampler, predict, noise, schedule, job.steps, device):
        latents = state.latents
        denoised = state.denoised
        yield Progress(
            step=state.step,
            steps=state.steps,
            preview=(lambda x=denoised: linear_previews(x, rgb)) if rgb else None,
        )
    assert latents is not None
    return latents
