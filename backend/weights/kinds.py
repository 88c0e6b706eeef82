"""Telling what a checkpoint is, so that one of another kind is refused by its name."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from backend.catalog import FAMILIES
from backend.errors import CheckpointError

# Part of a tensor's name → what is like a LoRA and cannot be used: it may have tensors called so, too.
LIKE_LORAS = {
    "dora_scale": "a DoRA",
    "lora_magnitude_vector": "a DoRA",
    "hada_": "a LoHa adapter",
    "lokr_": "a LoKr adapter",
    "oft_": "an OFT adapter",
    "ia3_": "an IA³ adapter",
    "lora_embedding_": "a LoRA of token tables",
}
# The same for the family, or what else it is. The first row that fits any tensor tells.
TENSORS = {
    **LIKE_LORAS,
    "lora_": "a LoRA",
    ".lora.": "a LoRA",
    "emb_params": "a textual inversion",
    "string_to_param": "a textual inversion",
    "control_model.": "a ControlNet",
    "controlnet_": "a ControlNet",
    "motion_modules.": "an AnimateDiff motion module",
    "conditioner.embedders.": "a Stable Diffusion XL checkpoint",
    "diffusion_model.label_emb.": "a Stable Diffusion XL checkpoint",
    "double_blocks.": "a Flux checkpoint",
    "single_transformer_blocks.": "a Flux checkpoint",
    "joint_blocks.": "sd3",
    ".attn.add_q_proj.": "one component of a hub-layout checkpoint (give its folder or repository)",
    "clip_txt_mapper.": "stable_cascade",
    "effnet_mapper.": "stable_cascade",
    "vquantizer.": "stable_cascade",
    "model.diffusion_model.input_blocks.0.0.": "sd15",
    "input_blocks.0.0.": "a UNet alone, without the prefix of a whole checkpoint",
    "down_blocks.0.resnets.": "one component of a hub-layout checkpoint (give its folder or repository)",
    # Flax's
    "down_blocks_0.resnets_": "one component of a hub-layout checkpoint (give its folder or repository)",
    "first_stage_model.": "a VAE alone",
    "decoder.up.0.": "a VAE alone",
    "text_model.embeddings.": "a text encoder alone",
    "vision_model.embeddings.": "an image encoder alone",
    "encoder.block.0.layer.0.SelfAttention.": "a T5 text encoder alone",
}

# The class in a model_index.json begins with → the family, or what else it is; the longest row tells.
PIPELINES = {
    "StableDiffusionPipeline": "sd15",
    "StableDiffusionImg2Img": "sd15",
    "StableDiffusionInpaint": "a Stable Diffusion inpainting model",
    "StableDiffusionInstructPix2Pix": "a Stable Diffusion editing model",
    "StableDiffusionUpscale": "a Stable Diffusion upscaler",
    "StableDiffusionLatentUpscale": "a Stable Diffusion upscaler",
    "StableDiffusionDepth2Img": "a Stable Diffusion depth model",
    "StableDiffusionXL": "a Stable Diffusion XL checkpoint",
    "StableDiffusion3": "sd3",  # also Img2Img, whose networks are the same
    "StableDiffusion3Inpaint": "a Stable Diffusion 3 inpainting model",
    "StableDiffusion3InstructPix2Pix": "a Stable Diffusion 3 editing model",
    "StableDiffusion3ControlNet": "a Stable Diffusion 3 checkpoint with a ControlNet",
    "StableCascade": "stable_cascade",
    "Wuerstchen": "a Würstchen checkpoint",
    "Flux": "a Flux checkpoint",
    "PixArt": "a PixArt checkpoint",
    "Kandinsky": "a Kandinsky checkpoint",
    "LatentConsistencyModel": "a latent consistency model",
}

TITLES = {name: family.title for name, family in FAMILIES.items()}

# What files have beside weights that somebody quantised with scales of their own.
SCALES = re.compile(
    r"(^|.*\.)(scaled_fp8|(weight|input)_scale(_\d)?|scale_(weight|input)|comfy_quant|absmax|quant_map"
    r"|quant_state\..*|SCB)"
)


def by_tensors(names: Iterable[str], table: Mapping[str, str] = TENSORS) -> str | None:
    """The family of a single file that holds tensors of these names, or what else it is; None if unknown."""
    names = list(names)
    return next((kind for part, kind in table.items() if any(part in name for name in names)), None)


def by_index(index: Mapping[str, Any]) -> str | None:
    """The family of a folder with this model_index.json, or what else it is; None if unknown."""
    pipeline = str(index.get("_class_name")).removeprefix("Flax")
    rows = [row for row in PIPELINES if pipeline.startswith(row)]
    return PIPELINES[max(rows, key=len)] if rows else None


def title(kind: str) -> str:
    return f"a {TITLES[kind]} checkpoint" if kind in TITLES else kind


def refuse_others(name: str, kind: str | None, family: str) -> None:
    """Raises CheckpointError if the checkpoint `name` is of a known kind other than `family`."""
    if kind not in (family, None):
        raise CheckpointError(f"{name} is {title(kind)}, and {title(family)} is due here")


def refuse_scaled(names: Iterable[str]) -> None:
    """Raises CheckpointError for quantised weights that mean nothing without scales beside them."""
    scales = [name for name in names if SCALES.fullmatch(name)]
    if scales:
        raise CheckpointError(
            f"its weights were quantised with scales of their own ({len(scales)} tensors: "
            f"{', '.join(scales[:3])}{', …' if len(scales) > 3 else ''}), which cannot be read; take the "
            "same checkpoint in float32, bfloat16, float16, or float8 without scales"
        )
