"""Stable Cascade as phases: encode → stage_c → stage_b → stage_a.

Stage C (the prior) paints 16 channels at a 42nd of the picture's side, Stage B (the decoder) makes of them 4
channels at a quarter of it, Stage A the picture. Source: Würstchen (arXiv:2306.00637) and the published
pipelines' settings.

Letters: B images, P prompts (the prompt, then the negative one where there is guidance), L text tokens,
N image prompts, D features, h w latent pixels.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Iterable, Mapping
from dataclasses import dataclass, fields
from typing import Any

import torch
from PIL.Image import Image
from torch import Tensor

from backend.cascade import work
from backend.cascade.defaults import defaults
from backend.cascade.optional import Previewer
from backend.cascade.stage_a import StageA, StageAConfig
from backend.cascade.unet import Conditioning, UNet, UNetConfig
from backend.errors import CheckpointError
from backend.nn.pictures import enlarged, linear_previews, to_pictures
from backend.nn.tiles import in_tiles
from backend.phases import Component, Manner, Phase, Pipeline, Progress, Way, split
from backend.requests import StableCascadeRequest
from backend.sampling.forwards import predictions
from backend.sampling.noise import Noise
from backend.sampling.wuerstchen import CosineSchedule, sample_wuerstchen
from backend.text.encoders import (
    CLIP_WIDTH,
    load_clip_vision,
    load_image_processor,
    load_projected_clip_text,
    load_tokenizer,
)
from backend.text.prompts import NO_EMBEDDINGS, encode_pooled_prompts
from backend.weights.parts import Parts, completed, device_of, dtype_name, finite, layout_of
from backend.weights.source import Source

AUTO_DTYPES = ("bfloat16",)  # what "auto" means off the CPU: Stage C must not run in float16
C_COMPRESSION = 42.67  # pixels to a latent pixel of Stage C, along a side; 1024 → 24
TILES = (128, 64)  # Stage A's, along a side of its latents; with a quarter of it overlapping
TITLES = {"stage_c": "Stage C", "stage_b": "Stage B"}
NETWORKS = {"stage_c": "prior", "stage_b": "decoder"}  # the lite ones' names end in _lite
PAIRS = (("full", "full"), ("full", "lite"), ("lite", "full"), ("lite", "lite"))  # C and B, the best first

# Published linear approximations: latents → RGB in [-1, 1]. For previews only.
LATENT_RGB: dict[str, Mapping[str, Any]] = {
    "stage_c": {
        "factors": [
            [-0.0326, -0.0204, -0.0127], [-0.1592, -0.0427, 0.0216], [0.0873, 0.0638, -0.0020],
            [-0.0602, 0.0442, 0.1304], [0.0800, -0.0313, -0.1796], [-0.0810, -0.0638, -0.1581],
            [0.1791, 0.1180, 0.0967], [0.0740, 0.1416, 0.0432], [-0.1745, -0.1888, -0.1373],
            [0.2412, 0.1577, 0.0928], [0.1908, 0.0998, 0.0682], [0.0209, 0.0365, -0.0092],
            [0.0448, -0.0650, -0.1728], [-0.1658, -0.1045, -0.1308], [0.0542, 0.1545, 0.1325],
            [-0.0352, -0.1672, -0.2541],
        ],
        "bias": [0.0, 0.0, 0.0],
    },
    "stage_b": {
        "factors": [
            [0.1121, 0.2006, 0.1023], [-0.2093, -0.0222, -0.0195], [-0.3087, -0.1535, 0.0366],
            [0.0290, -0.1574, -0.4078],
        ],
        "bias": [0.0, 0.0, 0.0],
    },
}  # fmt: skip

Draw = Callable[[Tensor], tuple[Image, ...]]  # latents → small pictures


@dataclass(frozen=True, kw_only=True)
class Job:
    """A request with every default filled in; `stages` says which variant of each stage runs."""

    request: StableCascadeRequest
    seeds: tuple[int, ...]
    prior_steps: int
    prior_guidance_scale: float
    decoder_steps: int
    decoder_guidance_scale: float
    width: int
    height: int
    stages: Mapping[str, str]

    @property
    def guided(self) -> dict[str, bool]:
        return {"stage_c": self.prior_guidance_scale > 1.0, "stage_b": self.decoder_guidance_scale > 1.0}

    def network(self, stage: str) -> str:
        """The component that runs a stage."""
        return network_name(stage, self.stages[stage])

    def settings(self) -> dict[str, Any]:
        """The request's fields with every default filled in, the seed that was used, and as `ran` the sizes
        of the stages: the fields keep the choice, which is no order where it was "auto"."""
        asked = {field.name: getattr(self.request, field.name) for field in fields(self.request)}
        filled = ("prior_steps", "prior_guidance_scale", "decoder_steps", "decoder_guidance_scale")
        return {
            **asked,
            **{name: getattr(self, name) for name in (*filled, "width", "height")},
            "ran": dict(self.stages),
            "images": [str(image) for image in self.request.images],
            "seed": self.seeds[0],
        }


@dataclass(frozen=True)
class Text:
    """Features of the prompt, then of the negative one if Stage C is guided: (P, L, D); pooled ones, of the
    negative one if anything is guided: (P, D); of the image prompts: (1, N, D), or one of zeros."""

    features: Tensor
    pooled: Tensor
    images: Tensor


@dataclass(frozen=True)
class Composition:
    """Stage C's latents (B, 16, h, w), float32, and the generators' states behind them."""

    latents: Tensor
    noise: list[Tensor]


def network_name(stage: str, variant: str) -> str:
    return NETWORKS[stage] + ("_lite" if variant == "lite" else "")


def complete(
    request: StableCascadeRequest, source: Source, seeds: tuple[int, ...], stages: Mapping[str, str]
) -> Job:
    """Fill in the checkpoint's defaults. Raises CheckpointError for one that cannot be served."""
    values = completed(request, source, defaults(source))
    return Job(request=request, seeds=seeds, stages=stages, **values)


def ways(
    request: StableCascadeRequest, parts: Parts, *, seeds: tuple[int, ...], dtype: torch.dtype
) -> tuple[Way, ...]:
    """The ways to make the pictures of a request: its stages full, or lite; LoRAs are for one size.

    Raises CheckpointError for a checkpoint without a stage that the request names.
    """
    source = parts.source

    def way(variants: Mapping[str, str]) -> Way:
        networks = [network_name(stage, variant) for stage, variant in variants.items()]
        return Way(
            make=lambda: pipeline(request, parts, seeds=seeds, dtype=dtype, stages=variants),
            label=" and ".join(f"{TITLES[stage]} {variant}" for stage, variant in variants.items()),
            pace=sum(source.parameter_bytes(name, dtype_name(dtype)) for name in networks),
        )

    found = list(candidates(request, source))
    fitting = [each for each in found if parts.fits(network_name("stage_c", each["stage_c"]), dtype)]
    return tuple(map(way, fitting or found))


def pipeline(
    request: StableCascadeRequest,
    parts: Parts,
    *,
    seeds: tuple[int, ...],
    dtype: torch.dtype,
    stages: Mapping[str, str],
) -> Pipeline:
    """The phases of a request with these variants of the stages, ready to plan and to run; reads configs,
    loads nothing. Raises CheckpointError for a checkpoint whose stages do not belong together."""
    source = parts.source
    job = complete(request, source, seeds, stages)
    prior_dtype = torch.bfloat16 if dtype == torch.float16 else dtype
    dtypes = {
        "stage_c": parts.dtype(job.network("stage_c"), prior_dtype),
        "stage_b": parts.dtype(job.network("stage_b"), dtype),
        "stage_a": parts.dtype("vqgan", dtype),
    }

    steps = {"stage_c": job.prior_steps, "stage_b": job.decoder_steps}

    def stage(name: str) -> Component:
        network = job.network(name)

        def build() -> UNet:
            return UNet(UNetConfig.from_dict(source.config(network)))

        return parts.network(network, dtypes[name], build, forwards=steps[name])

    def text(device: torch.device) -> Any:
        return load_tokenizer(source), load_projected_clip_text(source, "text_encoder", dtype, device)

    def vision(device: torch.device) -> Any:
        encoder = load_clip_vision(source, "image_encoder", dtype, device)
        size: Any = encoder.config.image_size
        return load_image_processor(source, size), encoder

    stage_a_config = StageAConfig.from_dict(source.config("vqgan"))
    components = {
        "text_encoder": parts.component("text_encoder", dtype, text),
        "vqgan": parts.network("vqgan", dtypes["stage_a"], lambda: StageA(stage_a_config)),
    }
    if request.images:
        if not source.has("image_encoder"):
            raise CheckpointError(f"{source.name} has no image_encoder, which image prompts need")
        components["image_encoder"] = parts.component("image_encoder", dtype, vision)
    if source.has("previewer"):

        def small() -> Previewer:
            name = dtype_name(dtypes["stage_c"])
            return Previewer(source.shapes("previewer", name)["blocks.0.weight"][0])

        components["previewer"] = parts.network("previewer", dtypes["stage_c"], small)
    components |= {job.network(name): stage(name) for name in NETWORKS}
    notices = (NOT_IN_FLOAT16,) if prior_dtype != dtype else ()
    return Pipeline(
        components=components,
        phases=_phases(job, parts, stage_a_config, components, dtypes, dtype),
        settings=job.settings(),
        decisions=(*unfulfilled(request, job, source), *unread(parts), *notices),
        notices=notices,
    )


NOT_IN_FLOAT16 = "Stage C overflows in float16, so it runs in bfloat16; the other stages run in float16."


def candidates(request: StableCascadeRequest, source: Source) -> Iterable[dict[str, str]]:
    """The variants of the stages that may run, the best first; where both are free, both full or lite.

    `stages` is a wish that a checkpoint without a variant cannot fulfil in full; `stage_c` and `stage_b` are
    orders. Raises CheckpointError where an order cannot be followed, or a stage is missing altogether.
    """
    allowed: dict[str, list[str]] = {}
    for stage, title in TITLES.items():
        there = [variant for variant in ("full", "lite") if source.has(network_name(stage, variant))]
        if not there:
            raise CheckpointError(f"{source.name} has no {NETWORKS[stage]} ({title})")
        order, wish = getattr(request, stage), request.wish(stage)
        if order in ("full", "lite") and order not in there:
            raise CheckpointError(
                f"{stage} is {order!r}, and {source.name} has {title} only {' and '.join(there)}"
            )
        allowed[stage] = [wish] if wish in there else there
    free = all(len(variants) > 1 for variants in allowed.values())
    return [
        {"stage_c": c, "stage_b": b}
        for c, b in PAIRS
        if c in allowed["stage_c"] and b in allowed["stage_b"] and (c == b or not free)
    ]


def unfulfilled(request: StableCascadeRequest, job: Job, source: Source) -> Iterable[str]:
    """In words, which wishes for a stage's size the checkpoint cannot fulfil."""
    for stage, title in TITLES.items():
        wish = request.wish(stage)
        if wish not in ("auto", job.stages[stage]):
            yield f"{source.name} has no {wish} {title}: the {job.stages[stage]} one runs."


def unread(parts: Parts) -> Iterable[str]:
    """In words, what LoRAs hold that is not used."""
    for use in parts.loras:
        if use.lora.tokens:
            yield f"{use.name} was trained with words of its own, {use.lora.tokens}, which are left out."


def _phases(
    job: Job,
    made: Parts,
    stage_a_config: StageAConfig,
    components: Mapping[str, Component],
    dtypes: Mapping[str, torch.dtype],
    dtype: torch.dtype,
) -> tuple[Phase, ...]:
    source, device = made.source, made.device.type
    request, prior, decoder = job.request, job.network("stage_c"), job.network("stage_b")
    words = made.words({"clip_g": source.config("text_encoder").get("hidden_size", CLIP_WIDTH)})
    encoders = ("text_encoder", *(["image_encoder"] if request.images else []))
    configs = {name: UNetConfig.from_dict(source.config(name)) for name in (prior, decoder)}
    check_together(source, encoders, configs[prior], configs[decoder], stage_a_config)
    schedules = {
        "stage_c": CosineSchedule.from_dict(source.config("prior_scheduler")),
        "stage_b": CosineSchedule.from_dict(source.config("scheduler")),
    }
    c_size = (math.ceil(job.height / C_COMPRESSION), math.ceil(job.width / C_COMPRESSION))
    b_size = (job.height // stage_a_config.scale, job.width // stage_a_config.scale)
    rgb = LATENT_RGB | source.extras().get("latent_rgb", {})
    previewer = ("previewer",) if "previewer" in components else ()

    # what each phase reads, and no more: new decoder settings leave Stage C's result standing
    def prompts(guided: bool) -> tuple[Any, ...]:
        negative = request.negative_prompt if guided else None
        made_by = [components[name].state for name in encoders]
        settings = request.images, request.raw_prompt, request.clip_skip, made.words_key
        return (*made_by, request.prompt, negative, *settings)

    encode_key = ("encode", job.guided["stage_c"], prompts(any(job.guided.values())))
    c_key = (
        "stage_c", prompts(job.guided["stage_c"]), components[prior].state, job.seeds, job.prior_steps,
        job.prior_guidance_scale, job.width, job.height, schedules["stage_c"],
    )  # fmt: skip
    b_key = (
        "stage_b", c_key, prompts(job.guided["stage_b"]), components[decoder].state, job.decoder_steps,
        job.decoder_guidance_scale, schedules["stage_b"],
    )  # fmt: skip
    images = len(job.seeds)

    def painting(stage: str, size: tuple[int, int]) -> dict[str, Any]:
        guided, item = job.guided[stage], dtypes[stage].itemsize

        def unet_work(manner: Manner) -> int:
            batch = manner.images * (2 if guided and not manner.apart else 1)
            config = configs[job.network(stage)]
            return work.unet(config, batch, size, item, device=device, rows=manner.rows)

        return {"manners": split(images, guided=guided), "pictures": images, "work": unet_work}

    whole, together = Manner(images=1), (Manner(images=images),) if images > 1 else ()
    tiles = tuple(Manner(images=1, tile=tile) for tile in TILES if tile < max(b_size))
    return (
        Phase(
            name="encode", components=encoders, key=encode_key,
            work=lambda _: work.encode(source.config("text_encoder"), 2, dtype.itemsize),
            run=lambda parts, *_: encode(parts, job, configs[prior], words()["clip_g"]),
        ),
        Phase(
            name="stage_c", components=(prior, *previewer), key=c_key, **painting("stage_c", c_size),
            run=lambda parts, results, manner: stage_c(
                parts[prior], parts.get("previewer"), results["encode"], job, schedules["stage_c"], c_size,
                dtypes["stage_c"], rgb["stage_c"], manner,
            ),
        ),
        Phase(
            name="stage_b", components=(decoder,), key=b_key, **painting("stage_b", b_size),
            run=lambda parts, results, manner: stage_b(
                parts[decoder], results["encode"], results["stage_c"], job, schedules["stage_b"], b_size,
                dtypes["stage_b"], rgb["stage_b"], manner,
            ),
        ),
        Phase(
            name="stage_a", components=("vqgan",), key=None,
            manners=(whole, *tiles, *together), pictures=images,
            work=lambda manner: stage_a_work(stage_a_config, b_size, dtypes["stage_a"], manner, device),
            run=lambda parts, results, manner: stage_a(
                parts["vqgan"], results["stage_b"], dtypes["stage_a"], manner
            ),
        ),
    )  # fmt: skip


def check_together(
    source: Source, encoders: Iterable[str], prior: UNetConfig, decoder: UNetConfig, stage_a: StageAConfig
) -> None:
    """Refuse networks that do not speak to each other. Raises CheckpointError."""
    if prior.clip_text_in_channels is None or prior.clip_image_in_channels is None:
        raise CheckpointError(f"{source.name}: the prior is no Stage C: it takes no text or no images")
    text, *vision = (source.config(name) for name in encoders)
    width, pooled = (text.get(name, CLIP_WIDTH) for name in ("hidden_size", "projection_dim"))
    links = [
        ("prior makes latents", prior.out_channels, "decoder takes", decoder.effnet_in_channels),
        ("decoder makes latents", decoder.out_channels, "vqgan takes", stage_a.latent_channels),
        ("text_encoder gives features", width, "prior takes", prior.clip_text_in_channels),
        ("text_encoder gives pooled features", pooled, "prior takes", prior.clip_text_pooled_in_channels),
        ("text_encoder gives pooled features", pooled, "decoder takes", decoder.clip_text_pooled_in_channels),
    ]
    for each in vision:
        seen = each.get("projection_dim", CLIP_WIDTH)
        links.append(("image_encoder gives features", seen, "prior takes", prior.clip_image_in_channels))
    for one, ours, other, theirs in links:
        if ours != theirs:
            raise CheckpointError(
                f"{source.name}: the {one} of {ours} channels, and the {other} {theirs or 'none'}: "
                "they do not belong together"
            )


@torch.no_grad()
def encode(
    parts: Mapping[str, Any],
    job: Job,
    prior: UNetConfig,
    words: Mapping[str, Tensor] = NO_EMBEDDINGS,
) -> Generator[Progress, None, Text]:
    tokenizer, encoder = parts["text_encoder"]
    request = job.request
    steps = 1 + len(request.images)

    def read(*prompts: str) -> tuple[Tensor, Tensor]:
        return encode_pooled_prompts(
            encoder, tokenizer, prompts,
            raw=request.raw_prompt, clip_skip=request.clip_skip, masked=True, embeddings=words,
        )  # fmt: skip

    if job.guided["stage_c"]:
        features, pooled = read(request.prompt, request.negative_prompt)
    else:
        features, pooled = read(request.prompt)
    if job.guided["stage_b"] and not job.guided["stage_c"]:
        # apart: a longer one would fill up the prompt's features, and change Stage C
        pooled = torch.cat([pooled, read(request.negative_prompt)[1]])
    yield Progress(step=1, steps=steps)
    embeddings: list[Tensor] = []
    for index, image in enumerate(request.images):
        processor, vision = parts["image_encoder"]
        pixels = torch.from_numpy(processor(image.picture, return_tensors="np").pixel_values)
        embeddings.append(vision(pixel_values=pixels.to(vision.device, vision.dtype)).image_embeds)
        yield Progress(step=2 + index, steps=steps)
    images = torch.stack(embeddings, dim=1) if embeddings else features.new_zeros(1, 1, _width(prior))
    return Text(features, pooled, images)


def _width(prior: UNetConfig) -> int:
    assert prior.clip_image_in_channels is not None
    return prior.clip_image_in_channels


@torch.no_grad()
def stage_c(
    unet: UNet,
    previewer: Previewer | None,
    text: Text,
    job: Job,
    schedule: CosineSchedule,
    size: tuple[int, int],
    dtype: torch.dtype,
    rgb: Mapping[str, Any],
    manner: Manner,
) -> Generator[Progress, None, Composition]:
    prompts, device = 1 + job.guided["stage_c"], device_of(unet)
    images = torch.cat([text.images, torch.zeros_like(text.images)])[:prompts]  # (P, N, D)
    conditioning = unet.condition(
        *(each.to(device, dtype) for each in (text.pooled[:prompts], text.features[:prompts], images))
    )
    noise = Noise(job.seeds, (unet.config.in_channels, *size))

    def draw(latents: Tensor) -> tuple[Image, ...]:
        if previewer is None:
            return linear_previews(latents, rgb)
        small = previewer(latents.to(device_of(previewer), dtype))
        return tuple(enlarged(picture) for picture in to_pictures(small))

    latents = yield from denoise(
        unet, conditioning, noise, schedule, job.prior_steps, job.prior_guidance_scale, dtype, draw, manner
    )
    return Composition(finite(latents, job.network("stage_c"), "Stage C", dtype), noise.state())


@torch.no_grad()
def stage_b(
    unet: UNet,
    text: Text,
    composition: Composition,
    job: Job,
    schedule: CosineSchedule,
    size: tuple[int, int],
    dtype: torch.dtype,
    rgb: Mapping[str, Any],
    manner: Manner,
) -> Generator[Progress, None, Tensor]:
    """→ latents (B, 4, h, w), float32. The noise goes on where Stage C's ended."""
    prompts, device = 1 + job.guided["stage_b"], device_of(unet)
    effnet = composition.latents.to(device, dtype)
    if job.guided["stage_b"]:
        effnet = torch.cat([effnet, torch.zeros_like(effnet)])
    conditioning = unet.condition(text.pooled[:prompts].to(device, dtype), effnet=effnet, size=size)
    noise = Noise(job.seeds, (unet.config.in_channels, *size))
    noise.restore(composition.noise)
    steps, guidance = job.decoder_steps, job.decoder_guidance_scale
    latents = yield from denoise(
        unet, conditioning, noise, schedule, steps, guidance, dtype, lambda x: linear_previews(x, rgb), manner
    )
    return finite(latents, job.network("stage_b"), "Stage B", dtype)


def denoise(
    unet: UNet,
    conditioning: Conditioning,
    noise: Noise,
    schedule: CosineSchedule,
    steps: int,
    guidance_scale: float,
    dtype: torch.dtype,
    draw: Draw,
    manner: Manner,
) -> Generator[Progress, None, Tensor]:
    """→ latents (B, C, h, w), float32."""
    prompts = 2 if guidance_scale > 1.0 else 1

    def predict(latents: Tensor, ratio: Tensor) -> Tensor:
        def forward(which: slice, some: slice) -> Tensor:
            x = latents[some].to(dtype).repeat(len(range(prompts)[which]), 1, 1, 1)
            part = conditioning.of(which, some, len(latents))
            return unet(x, ratio.expand(len(x)), part).float()

        out = predictions(forward, len(latents), prompts, manner)
        if prompts == 1:
            return out[0]
        with_prompt, without = out
        return torch.lerp(without, with_prompt, guidance_scale)

    latents: Tensor | None = None
    for state in sample_wuerstchen(predict, noise, schedule, steps, device_of(unet)):
        latents, estimate = state.latents, state.denoised
        yield Progress(step=state.step, steps=state.steps, preview=lambda x=estimate: draw(x))
    assert latents is not None
    return latents


@torch.no_grad()
def stage_a(
    network: StageA, latents: Tensor, dtype: torch.dtype, manner: Manner
) -> Generator[Progress, None, list[Image]]:
    """→ one picture per image. Raises NotFinite for pixels that are no numbers."""
    pictures: list[Image] = []
    for some in (latents * network.config.scale_factor).split(manner.images):
        x = some.to(device_of(network), dtype).to(memory_format=layout_of(dtype))
        pixels = in_tiles(network.decode, x, manner.tile, network.config.scale)
        pictures += to_pictures(finite(pixels, "vqgan", "Stage A", dtype))
        yield Progress(step=len(pictures), steps=len(latents))
    return pictures


def stage_a_work(
    config: StageAConfig, size: tuple[int, int], dtype: torch.dtype, manner: Manner, device: str
) -> int:
    """Bytes of activations; of tiles, those of one beside the picture that they are added to."""
    height, width = size
    if manner.tile is None:
        return manner.images * work.stage_a(config, size, dtype.itemsize, device=device)
    tile = min(manner.tile, height), min(manner.tile, width)
    added = height * width * config.scale**2 * 4 * (2 * 3 + 1)  # float32, and their weights
    return work.stage_a(config, tile, dtype.itemsize, device=device) + added
