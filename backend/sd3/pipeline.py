"""Stable Diffusion 3 and 3.5 as phases: encode_clip → encode_t5 → denoise → decode.

Letters: B images, P prompts (one, or two with the negative one first), L text tokens, D text features, h w
latent pixels.
"""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from backend.decoding import decode_phase
from backend.errors import CheckpointError, InvalidRequest
from backend.events import Notice
from backend.memory.blocks import blocks_of
from backend.nn.autoencoder import Autoencoder, AutoencoderConfig
from backend.nn.pictures import linear_previews
from backend.phases import Component, Manner, Phase, Pipeline, Progress, Way, split
from backend.requests import SD3Request
from backend.sampling.flow import FlowConfig, sample_flow
from backend.sampling.forwards import predictions
from backend.sampling.noise import Noise
from backend.sd3 import work
from backend.sd3.defaults import defaults
from backend.sd3.mmdit import MMDiT, MMDiTConfig
from backend.text.encoders import CLIP_WIDTH, load_projected_clip_text, load_tokenizer
from backend.text.inversion import without_names
from backend.text.prompts import check_clip_skip, count_chunks, encode_pooled_prompts
from backend.text.t5 import (
    count_t5,
    encode_t5,
    load_t5,
    load_t5_tokenizer,
    t5_available,
    t5_is_float8,
    t5_length,
    t5_mapped,
    t5_shapes,
    t5_sizes,
    t5_work,
)
from backend.weights.parts import Parts, completed, device_of
from backend.weights.source import Source

# What "auto" means off the CPU, the first that the device computes in. In float16 a fifth of T5 stays in
# float32, 1.9 GiB more, which on many cards is all that there is between 8 bits a weight and none of it.
AUTO_DTYPES = ("bfloat16", "float16")

CLIPS = {"text_encoder": "tokenizer", "text_encoder_2": "tokenizer_2"}
EMBEDDED = {"text_encoder": "clip_l", "text_encoder_2": "clip_g"}  # as embeddings' files call them
T5 = "text_encoder_3"
EARLY = 1  # of the CLIPs' last layers that are always left out
RUNS = {  # T5 at its prices, the best first
    "full": "T5 runs whole",
    "int8": "T5 runs with 8 bits a weight",
    "nf4": "T5 runs with 4 bits a weight",
    "off": "T5 does not run",
}
SKIPPED = (7 / 24, 8 / 24, 9 / 24)  # the blocks that 3.5-medium's skip-layer guidance leaves out

# Published linear approximation of the decoder: model-space latents → RGB in [-1, 1]. For previews only.
LATENT_RGB = {
    "factors": [
        [-0.0645, 0.0177, 0.1052],
        [0.0028, 0.0312, 0.0650],
        [0.1848, 0.0762, 0.0360],
        [0.0944, 0.0360, 0.0889],
        [0.0897, 0.0506, -0.0364],
        [-0.0020, 0.1203, 0.0284],
        [0.0855, 0.0118, 0.0283],
        [-0.0539, 0.0658, 0.1047],
        [-0.0057, 0.0116, 0.0700],
        [-0.0412, 0.0281, -0.0039],
        [0.1106, 0.1171, 0.1220],
        [-0.0248, 0.0682, -0.0481],
        [0.0815, 0.0846, 0.1207],
        [-0.0120, -0.0055, -0.0867],
        [-0.0749, -0.0634, -0.0456],
        [-0.1418, -0.1457, -0.1259],
    ],
    "bias": [0.0, 0.0, 0.0],
}


@dataclass(frozen=True, kw_only=True)
class Job:
    """A request with every default filled in; `tokens` is how many T5 reads."""

    request: SD3Request
    seeds: tuple[int, ...]
    steps: int
    guidance_scale: float
    sampler: str
    shift: float
    width: int
    height: int
    tokens: int
    skipped: tuple[int, ...]

    @property
    def guided(self) -> bool:
        return self.guidance_scale > 1.0

    @property
    def prompts(self) -> list[str]:
        request = self.request
        return [request.negative_prompt, request.prompt] if self.guided else [request.prompt]

    def skips(self, step: int) -> bool:
        """Whether skip-layer guidance works on this step, counted from 0."""
        request = self.request
        start, stop = request.skip_layer_guidance_start, request.skip_layer_guidance_stop
        on = self.guided and bool(self.skipped) and request.skip_layer_guidance_scale > 0
        return on and start * self.steps < step < stop * self.steps

    def settings(self, t5: str) -> dict[str, Any]:
        """The request's fields with every default filled in, the seed that was used, and how T5 `ran`."""
        filled = ("steps", "guidance_scale", "sampler", "shift", "width", "height")
        return {
            **asdict(self.request),
            **{name: getattr(self, name) for name in filled},
            "seed": self.seeds[0],
            "ran": {"t5": t5},
        }


@dataclass(frozen=True)
class ClipText:
    """What both CLIPs make of the prompts: features (P, L, D) side by side, and pooled ones (P, D_pooled)."""

    features: Tensor
    pooled: Tensor


def complete(request: SD3Request, source: Source, seeds: tuple[int, ...], layers: int) -> Job:
    """Fill in the checkpoint's defaults. Raises CheckpointError for one that cannot be served, InvalidRequest
    for blocks to skip that a transformer of so many `layers` lacks."""
    values = completed(request, source, defaults(source))
    skipped = request.skip_guidance_layers
    if skipped is None:
        skipped = tuple(sorted({round(share * layers) for share in SKIPPED}))
    if skipped and skipped[-1] >= layers:
        raise InvalidRequest(
            f"skip_guidance_layers holds {skipped[-1]}; this transformer has the layers 0 to {layers - 1}"
        )
    tokens = t5_length(source, request.max_sequence_length)
    return Job(request=request, seeds=seeds, tokens=tokens, skipped=skipped, **values)


def ways(request: SD3Request, parts: Parts, *, seeds: tuple[int, ...], dtype: torch.dtype) -> tuple[Way, ...]:
    """The ways to make the pictures of a request: T5 at each price that it may have, the best first.

    Raises CheckpointError or InvalidRequest for a T5 that cannot be had.
    """
    prices, reason = choices(request, parts.source, parts.device)

    def way(price: str) -> Way:
        return Way(
            make=lambda: pipeline(request, parts, seeds=seeds, dtype=dtype, t5=price),
            label=f"{RUNS[price]}: {reason}" if reason else RUNS[price],
            lacking=price == "off" and len(prices) > 1,
        )

    return tuple(map(way, prices))


def pipeline(
    request: SD3Request, parts: Parts, *, seeds: tuple[int, ...], dtype: torch.dtype, t5: str
) -> Pipeline:
    """The phases of a request with T5 at a price, ready to plan and to run; reads configs, loads nothing.

    Raises CheckpointError for a checkpoint that lacks a part, or whose parts do not belong together, and
    InvalidRequest for a size that it cannot serve.
    """
    source = parts.source
    config = MMDiTConfig.from_dict(source.config("transformer"))
    vae_config = AutoencoderConfig.from_dict(source.config("vae"))
    job = complete(request, source, seeds, config.num_layers)
    check_together(source, config, vae_config)
    check_size(job, config, vae_config)
    for name in CLIPS:
        check_clip_skip(source.config(name).get("num_hidden_layers", 12), request.clip_skip, EARLY)

    def clip(name: str) -> Component:
        def load(device: torch.device) -> tuple[Any, Any]:
            return load_tokenizer(source, CLIPS[name]), load_projected_clip_text(source, name, dtype, device)

        return parts.component(name, dtype, load)

    painting, decoding = parts.dtype("transformer", dtype), parts.dtype("vae", dtype)
    components = {
        **{name: clip(name) for name in CLIPS},
        **({} if t5 == "off" else {T5: t5_component(parts, t5, dtype)}),
        "transformer": parts.network("transformer", painting, lambda: MMDiT(config), forwards=job.steps),
        "vae": parts.network("vae", decoding, lambda: Autoencoder(vae_config)),
    }
    size = (job.height // vae_config.scale, job.width // vae_config.scale)
    device = parts.device.type
    decode = decode_phase(
        vae_config, size, len(seeds), painter="transformer", dtypes=(painting, decoding), device=device
    )
    return Pipeline(
        components=components,
        phases=(*_phases(job, parts, config, size, components, painting), decode),
        settings=job.settings(t5),
        decisions=(*shortened(job, t5), *idle(job)),
    )


def choices(request: SD3Request, source: Source, device: torch.device) -> tuple[list[str], str]:
    """How T5 may run, the best first, and why not better where that is not for want of memory.

    Raises CheckpointError or InvalidRequest for a wish that cannot be fulfilled.
    """
    if request.t5 == "off":
        return ["off"], "as asked for"
    lacking = None if source.has(T5) else f"{source.name} holds no {T5}"
    if request.t5 == "auto":
        if lacking:
            return ["off"], lacking
        can_run = [price for price in RUNS if price == "off" or not t5_available(price, device.type)]
        return can_run, ""
    if lacking:
        raise CheckpointError(
            f"t5 is {request.t5!r}, and {lacking}; set t5 to 'off', or, for a single file, config_from to a "
            "folder or hub repository with one"
        )
    if refused := t5_available(request.t5, device.type):
        raise InvalidRequest(f"t5 is {request.t5!r}, which cannot run here: {refused}")
    return [request.t5], ""


def shortened(job: Job, price: str) -> tuple[str, ...]:
    if price == "off" or job.tokens == job.request.max_sequence_length:
        return ()
    return (f"T5 reads {job.tokens} tokens of the prompt: this checkpoint's tokenizer gives no more.",)


def idle(job: Job) -> tuple[str, ...]:
    """What is said of skip-layer guidance that never comes to work."""
    if job.request.skip_layer_guidance_scale == 0 or any(map(job.skips, range(job.steps))):
        return ()
    why = "no step of these is in its share" if job.guided and job.skipped else "there is nothing to guide"
    return (f"Skip-layer guidance does nothing: {why}.",)


def t5_narrow(source: Source, dtype: torch.dtype, device: str) -> bool:
    """Whether T5's layers stay in the 8 bits that their file has them in."""
    return device in ("cpu", "cuda") and t5_is_float8(source, T5, dtype)


def t5_component(parts: Parts, price: str, dtype: torch.dtype) -> Component:
    source, device = parts.source, parts.device

    def load(device: torch.device) -> tuple[Any, Any]:
        return load_t5_tokenizer(source), load_t5(source, T5, price, dtype, device)

    whole = parts.component(T5, dtype, load)
    narrow = t5_narrow(source, dtype, device.type)
    sizes = t5_sizes(t5_shapes(source.config(T5)), price, dtype, float8=narrow)
    here = source.present([T5], whole.dtype)
    mapped = t5_mapped(sizes, price, dtype, source.precision(T5, whole.dtype)) if here else 0
    return replace(
        whole,
        identity=(whole.identity, price),
        precision=whole.precision if price == "full" else price,
        bytes=sum(sizes.values()),
        copied=sum(sizes.values()) - mapped,
        passing=True,
        stands_aside=True,
        blocks=lambda: blocks_of(sizes),
        open=None,  # its files hold it in another form than it runs in, or else it is mapped as it is
    )


def check_together(source: Source, transformer: MMDiTConfig, vae: AutoencoderConfig) -> None:
    """Refuse networks that do not speak to each other. Raises CheckpointError."""
    lacking = [name for name in ("transformer", "vae", *CLIPS) if not source.has(name)]
    if lacking:
        raise CheckpointError(
            f"{source.name} holds no {', '.join(lacking)}; set config_from to a folder or hub repository "
            f"with {'it' if len(lacking) == 1 else 'them'}"
        )
    clips = [source.config(name) for name in CLIPS]
    widths, pooled = (sum(clip.get(key, 0) for clip in clips) for key in ("hidden_size", "projection_dim"))
    links: list[tuple[str, Any, str, int]] = [
        ("transformer makes latents", transformer.out_channels, "vae takes", vae.latent_channels),
        ("vae makes latents", vae.latent_channels, "transformer takes", transformer.in_channels),
        (
            "text encoders give pooled features",
            pooled,
            "transformer takes",
            transformer.pooled_projection_dim,
        ),
    ]
    if source.has(T5):
        width = source.config(T5).get("d_model")
        links.append(
            ("text_encoder_3 gives features", width, "transformer takes", transformer.joint_attention_dim)
        )
    for one, ours, other, theirs in links:
        if ours != theirs:
            raise CheckpointError(
                f"{source.name}: the {one} of {ours} channels, and the {other} {theirs}: "
                "they do not belong together"
            )
    if widths > transformer.joint_attention_dim:
        raise CheckpointError(
            f"{source.name}: the CLIP text encoders give features of {widths} channels together, and the "
            f"transformer takes up to {transformer.joint_attention_dim}: they do not belong together"
        )


def check_size(job: Job, config: MMDiTConfig, vae: AutoencoderConfig) -> None:
    """Raises InvalidRequest for a picture larger than the transformer knows positions for."""
    step = config.patch_size * vae.scale
    most = config.pos_embed_max_size * step
    for name in ("width", "height"):
        value = getattr(job, name)
        if value > most or value % step:
            raise InvalidRequest(
                f"{name} is {value}; with this checkpoint it can be up to {most} in multiples of {step}"
            )


def _phases(
    job: Job,
    made: Parts,
    config: MMDiTConfig,
    size: tuple[int, int],
    components: Mapping[str, Component],
    dtype: torch.dtype,
) -> list[Phase]:
    """All but the last; `size` is height and width of the latents."""
    source, device = made.source, made.device.type
    embedded = made.words(
        {kind: source.config(name).get("hidden_size", CLIP_WIDTH) for name, kind in EMBEDDED.items()}
    )
    names = tuple(use.name for use in made.embeddings)
    request, schedule = job.request, FlowConfig.from_dict(source.config("scheduler"))
    rgb = source.extras().get("latent_rgb", LATENT_RGB if config.out_channels == 16 else None)
    words = (tuple(job.prompts), request.raw_prompt, made.words_key)
    clip_key = ("encode_clip", *(components[name].state for name in CLIPS), *words, request.clip_skip)
    t5_key = ("encode_t5", components[T5].state, *words, job.tokens) if T5 in components else None
    guidance = (
        request.skip_layer_guidance_scale, request.skip_layer_guidance_start,
        request.skip_layer_guidance_stop, job.skipped,
    )  # fmt: skip
    denoise_key = (
        "denoise", clip_key, t5_key, job.tokens, components["transformer"].state, job.seeds, job.steps,
        job.guidance_scale, job.sampler, job.shift, job.width, job.height, schedule, guidance,
    )  # fmt: skip
    prompts, item = len(job.prompts), dtype.itemsize

    def denoise_work(manner: Manner) -> int:
        batch = manner.images * (1 if manner.apart else prompts)
        return work.denoise(config, batch, size, job.tokens, item, device=device, rows=manner.rows)

    clip = Phase(
        name="encode_clip", components=tuple(CLIPS), key=clip_key,
        work=lambda _: max(work.encode_clip(source.config(name), prompts, item) for name in CLIPS),
        run=lambda parts, *_: encode_clip(parts, job, embedded()),
    )  # fmt: skip
    painting = Phase(
        name="denoise", components=("transformer",), key=denoise_key,
        manners=split(len(job.seeds), guided=prompts > 1), pictures=len(job.seeds), work=denoise_work,
        run=lambda parts, results, manner: denoise(
            parts["transformer"], results["encode_clip"], results.get("encode_t5"), job, schedule, size,
            dtype, rgb, manner,
        ),
    )  # fmt: skip
    if T5 not in components:
        return [clip, painting]
    kept = components[T5].precision
    t5 = Phase(
        name="encode_t5", components=(T5,), key=t5_key,
        work=lambda _: t5_work(
            source.config(T5), prompts, job.tokens, dtype, device=device,
            precision=kept if kept in ("int8", "nf4") else "full", float8=t5_narrow(source, dtype, device),
        ),
        run=lambda parts, *_: read_t5(parts[T5], job, names),
    )  # fmt: skip
    return [clip, t5, painting]


def encode_clip(
    parts: Mapping[str, Any], job: Job, words: Mapping[str, Mapping[str, Tensor]]
) -> Generator[Progress, None, ClipText]:
    """`words` are the embeddings that the prompts have, by encoder and name."""
    request = job.request
    chunks = 1
    for name, kind in EMBEDDED.items() if any(words.values()) else ():  # one may have more vectors for a name
        tokenizer, encoder = parts[name]
        counted = count_chunks(
            tokenizer, encoder, job.prompts, raw=request.raw_prompt, embeddings=words[kind]
        )
        chunks = max(chunks, counted)
    features, pooled = [], []
    for index, name in enumerate(CLIPS, start=1):
        tokenizer, encoder = parts[name]
        # the features are those before the last layer, the pooled ones those after it
        tokens, summary = encode_pooled_prompts(
            encoder, tokenizer, job.prompts, raw=request.raw_prompt, clip_skip=request.clip_skip, early=EARLY,
            embeddings=words[EMBEDDED[name]], chunks=chunks,
        )  # fmt: skip
        features.append(tokens)
        pooled.append(summary)
        yield Progress(step=index, steps=len(CLIPS))
    lengths = [tokens.shape[1] for tokens in features]
    if len(set(lengths)) > 1:
        raise CheckpointError(
            f"the two CLIP text encoders read the prompt as {lengths[0]} and {lengths[1]} tokens: "
            "they do not belong together"
        )
    return ClipText(torch.cat(features, dim=2), torch.cat(pooled, dim=1))


def read_t5(parts: Any, job: Job, embeddings: Sequence[str]) -> Generator[Progress | Notice, None, Tensor]:
    """→ features (P, L, D). T5 has no vectors for embeddings: it does not read their names."""
    tokenizer, encoder = parts
    prompts = [without_names(prompt, embeddings) if embeddings else prompt for prompt in job.prompts]
    longest = max(count_t5(tokenizer, prompt, raw=job.request.raw_prompt) for prompt in prompts)
    if longest > job.tokens:
        yield Notice(text=f"T5 reads {job.tokens} tokens, and the prompt has {longest}: the rest was cut.")
    features = encode_t5(encoder, tokenizer, prompts, job.tokens, raw=job.request.raw_prompt)
    yield Progress(step=1, steps=1)
    return features


@torch.no_grad()
def denoise(
    network: MMDiT,
    clip: ClipText,
    t5: Tensor | None,
    job: Job,
    schedule: FlowConfig,
    size: tuple[int, int],
    dtype: torch.dtype,
    rgb: Mapping[str, Any] | None,
    manner: Manner,
) -> Generator[Progress, None, Tensor]:
    """→ latents (B, C, h, w), float32, in model space."""
    config, device = network.config, device_of(network)
    context, pooled = (
        each.to(device, dtype)  # (P, …)
        for each in (joined(clip.features, t5, config.joint_attention_dim, job.tokens), clip.pooled)
    )

    def predict(latents: Tensor, timestep: Tensor, step: int) -> Tensor:
        def forward(prompts: slice, some: slice, skipped: tuple[int, ...] = ()) -> Tensor:
            x, words, summary = latents[some].to(dtype), context[prompts], pooled[prompts]
            return network(
                x.repeat(len(words), 1, 1, 1),
                timestep.expand(len(words) * len(x)),
                *(each.repeat_interleave(len(x), dim=0) for each in (words, summary)),
                skipped,
            ).float()

        out = predictions(forward, len(latents), len(context), manner)
        if not job.guided:
            return out[0]
        without, with_prompt = out
        guided = torch.lerp(without, with_prompt, job.guidance_scale)
        if job.skips(step):
            (weaker,) = predictions(
                lambda _, some: forward(slice(1, 2), some, job.skipped), len(latents), 1, manner
            )
            guided = guided + job.request.skip_layer_guidance_scale * (with_prompt - weaker)
        return guided

    noise = Noise(job.seeds, (config.in_channels, *size))
    tokens = size[0] * size[1] // config.patch_size**2
    latents: Tensor | None = None
    for state in sample_flow(
        job.sampler, predict, noise, schedule, job.steps, device, shift=job.shift, tokens=tokens
    ):
        latents, estimate = state.latents, state.denoised
        yield Progress(
            step=state.step,
            steps=state.steps,
            preview=(lambda x=estimate: linear_previews(x, rgb)) if rgb else None,
        )
    assert latents is not None
    return latents


def joined(clip: Tensor, t5: Tensor | None, width: int, tokens: int) -> Tensor:
    """Both CLIPs' features, padded to the transformer's width, then T5's: (P, L, width). Without T5 as many
    zeros stand in its place, as the network was trained."""
    clip = F.pad(clip, (0, width - clip.shape[-1]))
    rest = (
        clip.new_zeros(len(clip), tokens, width) if t5 is None else t5.to(clip)
    )  # perhaps from another card
    return torch.cat([clip, rest], dim=1)
