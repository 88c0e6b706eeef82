"""Networks in the original files of several families: their names there, and what their shapes tell."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from backend.weights.files import Shapes
from backend.weights.keymap import Origin, Place, Table, inside, numbers, place

VAE_PREFIX = "first_stage_model."
VAE = {
    ".mid.block_1.": ".mid_block.resnets.0.",
    ".mid.attn_1.": ".mid_block.attentions.0.",
    ".mid.block_2.": ".mid_block.resnets.1.",
    ".block.": ".resnets.",
    ".downsample.": ".downsamplers.0.",
    ".upsample.": ".upsamplers.0.",
    ".nin_shortcut.": ".conv_shortcut.",
    ".norm_out.": ".conv_norm_out.",
    ".attentions.0.norm.": ".attentions.0.group_norm.",
    ".attentions.0.q.": ".attentions.0.to_q.",
    ".attentions.0.k.": ".attentions.0.to_k.",
    ".attentions.0.v.": ".attentions.0.to_v.",
    ".attentions.0.proj_out.": ".attentions.0.to_out.0.",
}

# Linear layers of the hub layout that the original VAE holds as 1×1 convolutions.
POINTWISE = re.compile(r"\.attentions\.0\.to_(q|k|v|out\.0)\.weight$")

# What the first LoRAs call a text encoder's layers: here → there.
CLIP_LORA_EARLY = {
    ".self_attn.q_proj": ".self_attn.to_q", ".self_attn.k_proj": ".self_attn.to_k",
    ".self_attn.v_proj": ".self_attn.to_v", ".self_attn.out_proj": ".self_attn.to_out",
}  # fmt: skip


def clip_lora_names(paths: Iterable[str]) -> dict[str, list[Place]]:
    """What LoRA files call a CLIP text model's layers: name → the layer at one of these `paths`, which begin
    with "text_model." there and perhaps not here."""
    found: dict[str, list[Place]] = {}
    for path in paths:
        bare = path.removeprefix("text_model.")
        for name in (bare, f"text_model.{bare}"):
            found[name] = found[inside(name, CLIP_LORA_EARLY)] = [Place(path)]
    return found


def vae_parts(shapes: Shapes) -> dict[str, Origin]:
    """The tensors of an original KL-VAE, all with its prefix, by our names."""
    # the original numbers the decoder's blocks from the outermost, so the last runs first
    levels = len(numbers(r"first_stage_model\.decoder\.up\.(\d+)\.", shapes))
    table: Table = {
        "": "",
        **{f"encoder.down.{level}.": f"encoder.down_blocks.{level}." for level in range(levels)},
        **{f"decoder.up.{level}.": f"decoder.up_blocks.{levels - 1 - level}." for level in range(levels)},
    }
    out: dict[str, Origin] = {}
    for name, shape in shapes.items():
        ours = inside(place(name.removeprefix(VAE_PREFIX), table) or "", VAE)
        pointwise = POINTWISE.search(ours) and shape[2:] == (1, 1)
        out[ours] = Origin(name, shape[:2] if pointwise else shape)
    return out


def vae_config(shapes: Shapes) -> dict[str, Any]:
    """What the shapes of a KL-VAE's tensors, by our names, tell of its config. Raises KeyError for one that
    is missing."""
    levels = len(numbers(r"encoder\.down_blocks\.(\d+)\.", shapes))
    return {
        "in_channels": shapes["encoder.conv_in.weight"][1],
        "out_channels": shapes["decoder.conv_out.weight"][0],
        "latent_channels": shapes["decoder.conv_in.weight"][1],
        "block_out_channels": [
            shapes[f"encoder.down_blocks.{n}.resnets.0.conv1.weight"][0] for n in range(levels)
        ],
        "layers_per_block": len(numbers(r"encoder\.down_blocks\.0\.resnets\.(\d+)\.", shapes)),
        "down_block_types": ["DownEncoderBlock2D"] * levels,
        "up_block_types": ["UpDecoderBlock2D"] * levels,
        "use_quant_conv": "quant_conv.weight" in shapes,
        "use_post_quant_conv": "post_quant_conv.weight" in shapes,
    }


def projected_text_config(shapes: Shapes, known: Mapping[str, Any]) -> dict[str, Any]:
    """The same of a CLIP text model with a projection; `known` are settings that may be another model's."""
    vocabulary, width = shapes["text_model.embeddings.token_embedding.weight"]
    return {
        "vocab_size": vocabulary,
        "max_position_embeddings": shapes["text_model.embeddings.position_embedding.weight"][0],
        "projection_dim": shapes["text_projection.weight"][0],
        **clip_layers("text_model.", width, shapes, known),
    }


def clip_layers(prefix: str, width: int, shapes: Shapes, known: Mapping[str, Any]) -> dict[str, Any]:
    """The same of a CLIP model's transformer, whose names begin with `prefix`."""
    told: dict[str, Any] = {
        "hidden_size": width,
        "intermediate_size": shapes[f"{prefix}encoder.layers.0.mlp.fc1.weight"][0],
        "num_hidden_layers": len(numbers(rf"{re.escape(prefix)}encoder\.layers\.(\d+)\.", shapes)),
    }
    if known.get("hidden_size") != width:  # every published CLIP model has heads of 64 channels
        told["num_attention_heads"] = max(width // 64, 1)
    return told
