"""Trains the Stable Cascade demo checkpoint and writes it to `assets/demo/stable-cascade/` in hub layout.

`python -m training.train_cascade` runs every stage that is not done yet, `python -m training.train_cascade
b` one of them; what was interrupted resumes. Stages: a and scene, then latents; text; image, then views; b,
c and lite; then polish and export. Those between two semicolons can run side by side, each on one core
(`OMP_NUM_THREADS=1`); b takes the most time by far. Under glibc,
`MALLOC_MMAP_THRESHOLD_=4294967296 MALLOC_TRIM_THRESHOLD_=8589934592` saves a third of it: without it every
large tensor is given back to the kernel and faulted in anew.
"""

from __future__ import annotations

import random
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from transformers import CLIPTextModelWithProjection, CLIPTokenizer, CLIPVisionModelWithProjection

from backend.cascade.stage_a import StageA, StageAConfig
from backend.cascade.unet import ATTENTION, RESIDUAL, TIMESTEP, UNet, UNetConfig
from training.data import CACHE, Postcards, box_weights, postcards
from training.hub import DEMO, colour_fit, rounded, write_component, write_json, write_settings
from training.image_encoder import PROCESSOR_CONFIG, features, teach_seeing, vision_config
from training.loop import Losses, Recipe, Weights, averaged_weights, fit, log, run_stages
from training.postcards import SIZE, caption
from training.scene_encoder import SIDE, SceneEncoder, train_scene_encoder, with_noise
from training.stage_a import polish_decoder, train_stage_a
from training.text import (
    caption_tokenizer,
    pooled_and_tokens,
    teach_reading,
    text_config,
    token_ids,
    words_for,
)
from training.wuerstchen import (
    SCHEDULER_CONFIG,
    compile_blocks,
    draw_ratios,
    error_weight,
    new_unet,
    signal_at,
)

SEED = 40
PICTURES = 16_000
FOLDER = DEMO / "stable-cascade"
PRIOR, DECODER = FOLDER / "stable-cascade-prior", FOLDER / "stable-cascade"

TEXT_WIDTH = 96  # of the text model, of the projected text and of the image features
STAGE_A_CONFIG: dict[str, Any] = {
    "_class_name": "PaellaVQModel",
    "bottleneck_blocks": 4,
    "embed_dim": 64,
    "in_channels": 3,
    "latent_channels": 4,
    "levels": 2,
    "num_vq_embeddings": 256,
    "out_channels": 3,
    "scale_factor": 1.0,
    "up_down_scale_factor": 2,
}
STAGE_B_CONFIG: dict[str, Any] = {
    "_class_name": "StableCascadeUNet",
    "block_out_channels": [64, 128, 176],
    "block_types_per_layer": [[RESIDUAL, TIMESTEP], [RESIDUAL, TIMESTEP], [RESIDUAL, TIMESTEP, ATTENTION]],
    "clip_image_in_channels": None,
    "clip_seq": 4,
    "clip_text_in_channels": None,
    "clip_text_pooled_in_channels": TEXT_WIDTH,
    "conditioning_dim": 96,
    "down_blocks_repeat_mappers": [1, 1, 1],
    "down_num_layers_per_block": [1, 2, 3],
    "dropout": [0.0, 0.0, 0.0],
    "effnet_in_channels": 16,
    "in_channels": 4,
    "kernel_size": 3,
    "num_attention_heads": [0, 0, 4],
    "out_channels": 4,
    "patch_size": 2,
    "pixel_mapper_in_channels": 3,
    "self_attn": True,
    "switch_level": None,
    "timestep_conditioning_type": ["sca"],
    "timestep_ratio_embedding_dim": 32,
    "up_blocks_repeat_mappers": [1, 1, 1],
    "up_num_layers_per_block": [3, 2, 2],
}
STAGE_C_CONFIG: dict[str, Any] = {
    "_class_name": "StableCascadeUNet",
    "block_out_channels": [96, 96],
    "block_types_per_layer": [[RESIDUAL, TIMESTEP, ATTENTION]] * 2,
    "clip_image_in_channels": TEXT_WIDTH,
    "clip_seq": 4,
    "clip_text_in_channels": TEXT_WIDTH,
    "clip_text_pooled_in_channels": TEXT_WIDTH,
    "conditioning_dim": 96,
    "down_blocks_repeat_mappers": [1, 1],
    "down_num_layers_per_block": [2, 2],
    "dropout": [0.0, 0.0],
    "effnet_in_channels": None,
    "in_channels": 16,
    "kernel_size": 3,
    "num_attention_heads": [4, 4],
    "out_channels": 16,
    "patch_size": 1,
    "pixel_mapper_in_channels": None,
    "self_attn": True,
    "switch_level": [False],
    "timestep_conditioning_type": ["sca", "crp"],
    "timestep_ratio_embedding_dim": 32,
    "up_blocks_repeat_mappers": [1, 1],
    "up_num_layers_per_block": [2, 2],
}
LITE_CONFIG = STAGE_C_CONFIG | {
    "block_out_channels": [64, 64],
    "down_num_layers_per_block": [1, 2],
    "up_num_layers_per_block": [2, 1],
}
PRIORS = {"c": ("prior", STAGE_C_CONFIG), "lite": ("prior_lite", LITE_CONFIG)}
PRIOR_INDEX: dict[str, Any] = {
    "_class_name": "StableCascadePriorPipeline",
    "feature_extractor": ["transformers", "CLIPImageProcessor"],
    "image_encoder": ["transformers", "CLIPVisionModelWithProjection"],
    "prior": ["diffusers", "StableCascadeUNet"],
    "resolution_multiple": 42.67,
    "scheduler": ["diffusers", "DDPMWuerstchenScheduler"],
    "text_encoder": ["transformers", "CLIPTextModelWithProjection"],
    "tokenizer": ["transformers", "CLIPTokenizerFast"],
}
DECODER_INDEX: dict[str, Any] = {
    "_class_name": "StableCascadeDecoderPipeline",
    "decoder": ["diffusers", "StableCascadeUNet"],
    "latent_dim_scale": 10.67,
    "scheduler": ["diffusers", "DDPMWuerstchenScheduler"],
    "text_encoder": ["transformers", "CLIPTextModelWithProjection"],
    "tokenizer": ["transformers", "CLIPTokenizerFast"],
    "vqgan": ["wuerstchen", "PaellaVQModel"],
}
DEFAULTS = {
    "prior_steps": 16,
    "prior_guidance_scale": 2.0,
    "decoder_steps": 20,
    "decoder_guidance_scale": 0.0,
    "width": 128,
    "height": 128,
}

STAGE_A_RECIPE = Recipe(steps=4000, learning_rate=3e-3, average=0.995, seed=SEED)
TEXT_RECIPE = Recipe(steps=2000, learning_rate=1.5e-3, average=0.99, seed=SEED)
IMAGE_RECIPE = Recipe(steps=2500, learning_rate=1e-3, warmup=200, average=0.995, seed=SEED)
SCENE_RECIPE = Recipe(steps=1700, learning_rate=2e-3, average=0.997, seed=SEED)
STAGE_B_RECIPE = Recipe(steps=13_500, learning_rate=1.5e-3, warmup=200, average=0.998, seed=SEED)
PRIOR_RECIPE = Recipe(steps=4000, learning_rate=2e-3, warmup=200, average=0.998, seed=SEED)
POLISH_RECIPE = Recipe(steps=1000, learning_rate=1e-3, average=0.995, seed=SEED)
B_BATCH, C_BATCH = 32, 96
SCENE_NOISE = 0.3  # on the scene that Stage B is told, at most: what Stage C says is not exact
SCENE_DROPOUT, CAPTION_DROPOUT = 0.05, 0.1
SHOWN = 0.15  # of Stage C's batch is told by a picture instead of words
POLISHED_FROM = 0.5  # the noisiest timestep ratio that the decoder sees the network undo
BOX_WEIGHT = 3.0  # how much more than the rest of the picture the subject counts


# ------------------------------------------------------------------------------------------------------------
# The encoders and the latents


@cache
def shown() -> Postcards:
    return postcards(PICTURES, seed=1)


@cache
def tokenizer() -> CLIPTokenizer:
    return caption_tokenizer(PRIOR / "tokenizer")


def new_stage_a() -> StageA:
    torch.manual_seed(SEED)
    return StageA(StageAConfig.from_dict(STAGE_A_CONFIG))


def new_text_encoder() -> CLIPTextModelWithProjection:
    torch.manual_seed(SEED)
    return CLIPTextModelWithProjection(text_config(tokenizer(), width=TEXT_WIDTH))


def new_image_encoder() -> CLIPVisionModelWithProjection:
    torch.manual_seed(SEED)
    return CLIPVisionModelWithProjection(vision_config(TEXT_WIDTH))


def train_a() -> None:
    train_stage_a(new_stage_a(), shown(), STAGE_A_RECIPE, CACHE / "cascade-a.pt")


def train_scene() -> None:
    train_scene_encoder(shown(), SCENE_RECIPE, CACHE / "cascade-scene.pt")


def train_text() -> None:
    teach_reading(new_text_encoder(), tokenizer(), TEXT_RECIPE, CACHE / "cascade-text.pt")


def train_image() -> None:
    teach_seeing(new_image_encoder(), shown(), IMAGE_RECIPE, CACHE / "cascade-image.pt")


def averaged(stage: str, prefix: str = "") -> Weights | None:
    """The averaged weights of a stage, those under `prefix`; None where it has not begun."""
    return averaged_weights(CACHE / f"cascade-{stage}.pt", prefix)


@torch.no_grad()
def make_latents() -> None:
    """Encodes every picture for Stages B and C; finds the scaling that gives Stage A's latents unit variance,
    and how either kind of latents looks in RGB."""
    if (CACHE / "cascade-latents.pt").exists():
        return
    stage_a, scene = new_stage_a(), SceneEncoder()
    stage_a.eval().load_state_dict(averaged("a") or {})
    scene.eval().load_state_dict(averaged("scene", "encoder.") or {})
    count = len(shown())
    raw, said = torch.empty(count, 4, SIZE // 4, SIZE // 4), torch.empty(count, 16, SIDE, SIDE)
    fine, coarse = torch.empty(count, 3, SIZE // 4, SIZE // 4), torch.empty(count, 3, SIDE, SIDE)
    for indices in torch.arange(count).split(50):
        pixels = shown().batch(indices)
        with torch.autocast("cpu", torch.bfloat16):
            raw[indices] = stage_a.encode((pixels + 1) / 2).float()
            said[indices] = scene(pixels)
        fine[indices] = functional.avg_pool2d(pixels, 4)
        coarse[indices] = functional.adaptive_avg_pool2d(pixels, SIDE)
    spread = raw.std().item()
    # the encoder's running statistics lag behind
    said = (said - said.mean((0, 2, 3), keepdim=True)) / said.std((0, 2, 3), keepdim=True)
    b, c = (raw / spread).half(), said.half()
    kept = {
        "b": b,
        "c": c,
        "scale_factor": spread,
        "rgb_b": colour_fit((raw / spread)[:2000], fine[:2000]),
        "rgb_c": colour_fit(said, coarse),
    }
    torch.save(kept, CACHE / "cascade-latents.pt")
    log(f"latents: scale factor {spread:.4f}, channel means {b.float().mean((0, 2, 3)).tolist()}")
    log(f"channels' spreads {b.float().std((0, 2, 3)).tolist()}, {c.float().std((0, 2, 3)).tolist()}")


@torch.no_grad()
def make_views() -> None:
    """What the image encoder sees in every picture."""
    eyes = new_image_encoder()
    eyes.load_state_dict(averaged("image", "eyes.") or {})
    batches = torch.arange(len(shown())).split(100)
    seen = torch.cat([features(eyes.eval(), shown().batch(indices)) for indices in batches])
    torch.save(seen, CACHE / "cascade-views.pt")
    log(f"views: {tuple(seen.shape)}, spread {seen.std():.3f}")


def trained_latents() -> dict[str, Any]:
    return torch.load(CACHE / "cascade-latents.pt", weights_only=True)


def trained_text_encoder() -> CLIPTextModelWithProjection:
    model = new_text_encoder()
    model.load_state_dict(averaged("text", "text_model.") or {})
    return model.eval().requires_grad_(False)


# ------------------------------------------------------------------------------------------------------------
# Stages B and C


def train_b() -> None:
    """The noise in Stage A's latents, told the scene by Stage C's latents and the pooled text."""
    kept, boxes = trained_latents(), torch.from_numpy(shown().boxes)
    pictures, said, scenes = kept["b"], kept["c"], shown().scenes
    weights = box_weights(boxes, pictures.shape[-1], BOX_WEIGHT)
    reader, unet = trained_text_encoder(), new_unet(STAGE_B_CONFIG, SEED)
    compile_blocks(unet)

    def losses_at(_: int, generator: torch.Generator) -> Losses:
        rng = random.Random(int(torch.randint(2**31, (), generator=generator)))
        indices = torch.randint(len(scenes), (B_BATCH,), generator=generator)
        words = [words_for(scenes[index], rng, CAPTION_DROPOUT) for index in indices.tolist()]
        told = with_noise(said[indices].float(), SCENE_NOISE, generator)
        told *= (torch.rand((B_BATCH, 1, 1, 1), generator=generator) >= SCENE_DROPOUT).float()
        ratios, noise, noisy, weight = diffused(pictures[indices].float(), generator)
        with torch.autocast("cpu", torch.bfloat16):
            with torch.no_grad():
                pooled = pooled_and_tokens(reader, token_ids(tokenizer(), words))[0]
            size = (pictures.shape[-2], pictures.shape[-1])
            conditioning = unet.condition(pooled.float(), effnet=told, size=size)
            error = (unet(noisy, ratios, conditioning).float() - noise).square()
        return measured(error * weights[indices], weight)

    fit(unet, losses_at, STAGE_B_RECIPE, CACHE / "cascade-b.pt")


def polish() -> None:
    """Stage A's decoder learns from what Stage B makes of pictures that are a little, or quite, noisy."""
    kept, scenes = trained_latents(), shown().scenes
    stage_a, unet = new_stage_a(), UNet(UNetConfig.from_dict(STAGE_B_CONFIG))
    stage_a.load_state_dict(averaged("a") or {})
    unet.eval().load_state_dict(averaged("b") or {})
    reader = trained_text_encoder()

    @torch.no_grad()
    def painted(indices: Tensor, generator: torch.Generator) -> Tensor:
        rng = random.Random(int(torch.randint(2**31, (), generator=generator)))
        ids = token_ids(tokenizer(), [caption(scenes[index], rng) for index in indices.tolist()])
        clean = kept["b"][indices].float()
        size = (clean.shape[-2], clean.shape[-1])
        ratios = POLISHED_FROM * torch.rand(len(clean), generator=generator)
        signal = signal_at(ratios).view(-1, 1, 1, 1)
        noisy = signal.sqrt() * clean + (1 - signal).sqrt() * torch.randn(clean.shape, generator=generator)
        with torch.autocast("cpu", torch.bfloat16):
            pooled = pooled_and_tokens(reader, ids)[0]
            conditioning = unet.condition(pooled.float(), effnet=kept["c"][indices].float(), size=size)
            noise = unet(noisy, ratios, conditioning).float()
        return (noisy - (1 - signal).sqrt() * noise) / signal.sqrt() * kept["scale_factor"]

    polish_decoder(stage_a, painted, shown(), POLISH_RECIPE, CACHE / "cascade-polish.pt")


def train_prior(stage: str) -> None:
    """The noise in Stage C's latents, told the scene in words, or now and then by a picture."""
    said, scenes = trained_latents()["c"].float(), shown().scenes
    views = torch.load(CACHE / "cascade-views.pt", weights_only=True)
    reader, unet = trained_text_encoder(), new_unet(PRIORS[stage][1], SEED)

    def losses_at(_: int, generator: torch.Generator) -> Losses:
        rng = random.Random(int(torch.randint(2**31, (), generator=generator)))
        indices = torch.randint(len(scenes), (C_BATCH,), generator=generator)
        by_picture = torch.rand(C_BATCH, generator=generator) < SHOWN
        words = [
            "" if pictured else words_for(scenes[index], rng, CAPTION_DROPOUT)
            for index, pictured in zip(indices.tolist(), by_picture.tolist(), strict=True)
        ]
        images = (views[indices] * by_picture[:, None])[:, None]
        ratios, noise, noisy, weight = diffused(said[indices], generator)
        with torch.autocast("cpu", torch.bfloat16):
            with torch.no_grad():
                pooled, tokens = pooled_and_tokens(reader, token_ids(tokenizer(), words))
            conditioning = unet.condition(pooled.float(), tokens.float(), images)
            error = (unet(noisy, ratios, conditioning).float() - noise).square()
        return measured(error, weight)

    fit(unet, losses_at, PRIOR_RECIPE, CACHE / f"cascade-{stage}.pt")


def diffused(clean: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Timestep ratios (B,), noise and noisy latents (B, C, h, w), and what an error counts (B, 1, 1, 1)."""
    ratios = draw_ratios(len(clean), generator)
    signal = signal_at(ratios).view(-1, 1, 1, 1)
    noise = torch.randn(clean.shape, generator=generator)
    return ratios, noise, signal.sqrt() * clean + (1 - signal).sqrt() * noise, error_weight(signal)


def measured(error: Tensor, weight: Tensor) -> Losses:
    """Squared errors (B, C, h, w), every other one of a noisy timestep (see `draw_ratios`)."""
    weighted = error * weight
    return {
        "loss": weighted.mean(),
        "noisy": weighted[::2].mean(),
        "rest": weighted[1::2].mean(),
        "error": error[1::2].mean(),
    }


# ------------------------------------------------------------------------------------------------------------
# The checkpoint


def export() -> None:
    """Everything that was trained so far, and the small files around it. What was not is there untrained."""
    untrained: dict[str, Any] = {"scale_factor": 1.0, "rgb_b": torch.zeros(5, 3), "rgb_c": torch.zeros(17, 3)}
    fitted = trained_latents() if (CACHE / "cascade-latents.pt").exists() else untrained
    stage_a = averaged("polish") or averaged("a") or new_stage_a().state_dict()
    config = STAGE_A_CONFIG | {"scale_factor": round(fitted["scale_factor"], 6)}
    write_component(DECODER / "vqgan", config, stage_a, "diffusion_pytorch_model.safetensors")
    write_unet(DECODER / "decoder", "b", STAGE_B_CONFIG)
    for stage, (name, config) in PRIORS.items():
        write_unet(PRIOR / name, stage, config)
    write_encoders()
    for folder, index in ((PRIOR, PRIOR_INDEX), (DECODER, DECODER_INDEX)):
        write_json(folder / "model_index.json", index)
        write_json(folder / "scheduler" / "scheduler_config.json", SCHEDULER_CONFIG)
    latent_rgb = {"stage_c": rounded(fitted["rgb_c"]), "stage_b": rounded(fitted["rgb_b"])}
    write_settings(FOLDER, DEFAULTS, latent_rgb)


def write_unet(folder: Path, stage: str, config: dict[str, Any]) -> None:
    weights = averaged(stage) or new_unet(config, SEED).state_dict()
    write_component(folder, config, weights, "diffusion_pytorch_model.safetensors")


def write_encoders() -> None:
    """The text model and the image encoder, with what prepares pictures for it."""
    text = averaged("text", "text_model.") or new_text_encoder().state_dict()
    eyes = averaged("image", "eyes.") or new_image_encoder().state_dict()
    text_settings = text_config(tokenizer(), width=TEXT_WIDTH).to_diff_dict()
    eyes_settings = vision_config(TEXT_WIDTH).to_diff_dict()
    for name, kind, settings, weights in (
        ("text_encoder", "CLIPTextModelWithProjection", text_settings, text),
        ("image_encoder", "CLIPVisionModelWithProjection", eyes_settings, eyes),
    ):
        write_component(PRIOR / name, settings | {"architectures": [kind]}, weights, "model.safetensors")
    write_json(PRIOR / "feature_extractor" / "preprocessor_config.json", PROCESSOR_CONFIG)


STAGES = {
    "a": train_a,
    "scene": train_scene,
    "latents": make_latents,
    "text": train_text,
    "image": train_image,
    "views": make_views,
    "b": train_b,
    "c": lambda: train_prior("c"),
    "lite": lambda: train_prior("lite"),
    "polish": polish,
    "export": export,
}

if __name__ == "__main__":
    run_stages(STAGES, __doc__)
