"""What Stable Diffusion 1.x and 2.x checkpoints are called and hold; no torch here.

The original release keeps all networks in one file, without their settings, under the names of the CompVis
latent-diffusion networks (arXiv:2112.10752).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from backend.errors import CheckpointError
from backend.weights import original
from backend.weights.files import Shapes
from backend.weights.keymap import Origin, Place, Table, inside, numbers, place

COMPONENTS = ("unet", "vae", "text_encoder")
REQUIRED = COMPONENTS  # what no picture can be made without

# The class in model_index.json (None for any other) → component → its folder.
FOLDERS = {None: {name: name for name in (*COMPONENTS, "tokenizer", "scheduler")}}
LITE: dict[str, str] = {}  # component → the smaller one that does its work
LATENT_STAGES: tuple[str, ...] = ()  # whose latents have preview colours of their own
FLAX = True  # whether checkpoints were published in Flax's files, too

# The published configs, as far as a single file's tensors cannot tell.
PUBLISHED: dict[str, dict[str, Any]] = {
    "unet": {
        "in_channels": 4, "out_channels": 4, "layers_per_block": 2,
        "block_out_channels": [320, 640, 1280, 1280],
        "down_block_types": [*["CrossAttnDownBlock2D"] * 3, "DownBlock2D"],
        "up_block_types": ["UpBlock2D", *["CrossAttnUpBlock2D"] * 3],
        "cross_attention_dim": 768, "attention_head_dim": 8, "norm_num_groups": 32, "norm_eps": 1e-5,
        "flip_sin_to_cos": True, "freq_shift": 0, "act_fn": "silu", "sample_size": 64,
    },
    "vae": {
        "in_channels": 3, "out_channels": 3, "layers_per_block": 2,
        "block_out_channels": [128, 256, 512, 512],
        "latent_channels": 4, "norm_num_groups": 32, "scaling_factor": 0.18215, "act_fn": "silu",
        "sample_size": 512,
    },
    "text_encoder": {
        "hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12,
        "max_position_embeddings": 77, "vocab_size": 49408, "hidden_act": "quick_gelu",
        "layer_norm_eps": 1e-5, "projection_dim": 768,
        "bos_token_id": 0, "eos_token_id": 2, "pad_token_id": 1,
    },
    "scheduler": {
        "_class_name": "PNDMScheduler", "num_train_timesteps": 1000, "beta_start": 0.00085, "beta_end": 0.012,
        "beta_schedule": "scaled_linear", "trained_betas": None, "skip_prk_steps": True,
        "set_alpha_to_one": False, "steps_offset": 1, "prediction_type": "epsilon",
        "timestep_spacing": "leading", "clip_sample": False,
    },
}  # fmt: skip

# Older hub-layout files of the VAE name its attention otherwise.
LEGACY_VAE = {".query.": ".to_q.", ".key.": ".to_k.", ".value.": ".to_v.", ".proj_attn.": ".to_out.0."}

# Flax's files: here a number is a place in a list, and the end of a name says what kind of layer it is of.
FLAX_LISTS = {
    "down_blocks_": "down_blocks.", "up_blocks_": "up_blocks.",
    "resnets_": "resnets.", "attentions_": "attentions.", "transformer_blocks_": "transformer_blocks.",
    "downsamplers_": "downsamplers.", "upsamplers_": "upsamplers.",
    ".net_": ".net.", ".to_out_": ".to_out.",
}  # fmt: skip
FLAX_ENDS = {"kernel": "weight", "scale": "weight", "embedding": "weight"}
# Their axes, by ours: a linear layer's are (in, out), a convolution's (height, width, in, out).
FLAX_AXES = {("kernel", 2): (1, 0), ("kernel", 4): (3, 2, 0, 1)}

SAME: Table = {"": ""}  # names that no other row fits stay, and the strict load reports them

PARTS: Table = {
    "model.diffusion_model.": "unet.",
    "first_stage_model.": "vae.",
    "cond_stage_model.transformer.": "text_encoder.",
    # what training left behind
    "model_ema.": None,
    "first_stage_model.loss.": None,
    "cond_stage_model.logit_scale": None,
    "cond_stage_model.text_projection": None,
    "alphas_cumprod": None,
    "betas": None,
    "embedding_manager.": None,
    "log_one_minus_alphas_cumprod": None,
    "logvar": None,
    "lvlb_weights": None,
    "posterior_": None,
    "scale_factor": None,
    "sqrt_": None,
}

UNET: Table = {
    **SAME,
    "time_embed.0.": "time_embedding.linear_1.",
    "time_embed.2.": "time_embedding.linear_2.",
    "input_blocks.0.0.": "conv_in.",
    "middle_block.0.": "mid_block.resnets.0.",
    "middle_block.1.": "mid_block.attentions.0.",
    "middle_block.2.": "mid_block.resnets.1.",
    "out.0.": "conv_norm_out.",
    "out.2.": "conv_out.",
}
UNET_RESNET = {
    ".in_layers.0.": ".norm1.",
    ".in_layers.2.": ".conv1.",
    ".emb_layers.1.": ".time_emb_proj.",
    ".out_layers.0.": ".norm2.",
    ".out_layers.3.": ".conv2.",
    ".skip_connection.": ".conv_shortcut.",
}

# How the names of a LoRA's layers begin → the component that they are of; without any of these the first's.
LORA_PREFIXES = {
    "": "unet",
    **dict.fromkeys(("unet.", "lora_unet_", "lycoris_", "base_model.model.", "diffusion_model."), "unet"),
    **dict.fromkeys(("text_encoder.", "lora_te_", "lora_te1_"), "text_encoder"),
}
# Layers that no other family has, as the hub's and the trainers' layouts call them.
LORA_TELLS = r"blocks?[._](\d+[._])?(attentions|resnets|downsamplers|upsamplers)[._]"
LORA_EARLY = {  # of the first files in the hub's layout: here → there
    ".attn1.to_": ".attn1.processor.to_", ".attn2.to_": ".attn2.processor.to_", ".to_out.0": ".to_out",
}  # fmt: skip


def check(component: str, config: Mapping[str, Any]) -> None:
    """Refuse, by name, UNets that want more than latents. Raises CheckpointError."""
    kinds = {
        9: "an inpainting model (its UNet takes 9 channels: latents, a mask and the masked picture)",
        8: "an editing model (its UNet takes 8 channels: latents and those of the picture to edit)",
    }
    if component == "unet" and config.get("in_channels") in kinds:
        kind = kinds[config["in_channels"]]
        raise CheckpointError(f"this is {kind}; only text-to-image models with 4 channels can be run as yet")


def is_part(shapes: Shapes) -> bool:
    """Whether a file that does not say so itself holds a network of this family: never, here."""
    return False


def pipeline_of(repository: str) -> str | None:
    """The class that a repository's model_index.json most likely names; it makes no difference here."""
    return None


def hub_names(component: str, shapes: Shapes) -> dict[str, Origin]:
    """Our names of the tensors in a hub-layout component's files, whatever its age."""
    legacy = LEGACY_VAE if component == "vae" else {}
    return {inside(name, legacy): Origin(name, shape) for name, shape in shapes.items()}


def flax_names(component: str, shapes: Shapes) -> dict[str, Origin]:
    """Our names of the tensors in a component's file of Flax's, and the order of their axes there."""
    table = {**FLAX_LISTS, **LEGACY_VAE} if component == "vae" else FLAX_LISTS
    out: dict[str, Origin] = {}
    for name, shape in shapes.items():
        layer, _, end = inside(name, table).rpartition(".")
        axes = FLAX_AXES.get((end, len(shape)))
        ours = tuple(shape[axis] for axis in axes) if axes else shape
        out[f"{layer}.{FLAX_ENDS.get(end, end)}"] = Origin(name, ours, axes=axes)
    return out


def parts(shapes: Shapes) -> dict[str, dict[str, Origin]]:
    """The tensors of an original single file by component and by our names.

    Raises CheckpointError for tensors that belong to none of the components.
    """
    tables = {"unet": (_unet_table(shapes), UNET_RESNET), "text_encoder": (SAME, {})}
    out: dict[str, dict[str, Origin]] = {}
    vae: Shapes = {}
    unknown: list[str] = []
    for name, shape in shapes.items():
        try:
            placed = place(name, PARTS)
        except KeyError:
            unknown.append(name)
            continue
        if placed is None:
            continue
        component, _, rest = placed.partition(".")
        if component == "vae":
            vae[name] = shape
            continue
        table, within = tables[component]
        out.setdefault(component, {})[inside(place(rest, table) or "", within)] = Origin(name, shape)
    if vae:
        out["vae"] = original.vae_parts(vae)
    if unknown:
        raise CheckpointError(
            f"of {len(shapes)} tensors, {len(unknown)} belong to no part of a Stable Diffusion 1.x "
            f"checkpoint ({', '.join(unknown[:4])}{', …' if len(unknown) > 4 else ''})"
        )
    return out


def lora_names(component: str, paths: Shapes) -> dict[str, list[Place]]:
    """What LoRA files call a component's layers: name → the layer at one of these `paths`."""
    if component == "text_encoder":
        return original.clip_lora_names(paths)
    early = {inside(path, LORA_EARLY): [Place(path)] for path in paths}
    return early | {path: [Place(path)] for path in paths}


def config(component: str, shapes: Shapes, settings: Mapping[str, Any] | None) -> dict[str, Any]:
    """The config of a component whose tensors have these shapes, by our names.

    What shapes cannot tell comes from `settings`, a config of the same kind, or else from the published
    values. Raises CheckpointError where a tensor that tells something is missing.
    """
    try:
        if component == "vae":
            told, guessed = original.vae_config(shapes), {}
        else:
            told, guessed = _unet_config(shapes) if component == "unet" else _text_config(shapes)
    except (LookupError, ValueError) as error:
        raise CheckpointError(
            f"{component}: the tensor {error} is missing, so its config cannot be told"
        ) from error
    return {**PUBLISHED[component], **guessed, **(settings or {}), **told}


def _unet_table(shapes: Shapes) -> Table:
    """The original counts the blocks of each half in the order in which they run."""
    blocks = [int(n) for n in numbers(r"model\.diffusion_model\.input_blocks\.(\d+)\.", shapes)]
    strided = numbers(r"model\.diffusion_model\.input_blocks\.(\d+)\.0\.op\.weight", shapes)
    levels = len(strided) + 1
    layers = (max(blocks, default=0) + 1 - levels) // levels
    table = dict(UNET)
    for level in range(levels):
        first = 1 + level * (layers + 1)
        for layer in range(layers):
            table[f"input_blocks.{first + layer}.0."] = f"down_blocks.{level}.resnets.{layer}."
            table[f"input_blocks.{first + layer}.1."] = f"down_blocks.{level}.attentions.{layer}."
        table[f"input_blocks.{first + layers}.0.op."] = f"down_blocks.{level}.downsamplers.0.conv."
        first = level * (layers + 1)
        for layer in range(layers + 1):
            table[f"output_blocks.{first + layer}.0."] = f"up_blocks.{level}.resnets.{layer}."
            table[f"output_blocks.{first + layer}.1."] = f"up_blocks.{level}.attentions.{layer}."
        for slot in (1, 2):  # behind the attention, where there is one
            table[f"output_blocks.{first + layers}.{slot}.conv."] = f"up_blocks.{level}.upsamplers.0.conv."
    return table


def _unet_config(shapes: Shapes) -> tuple[dict[str, Any], dict[str, Any]]:
    levels = len(numbers(r"down_blocks\.(\d+)\.", shapes))
    widths = [shapes[f"down_blocks.{level}.resnets.0.conv1.weight"][0] for level in range(levels)]
    attentive = [
        f"{half}_blocks.{level}.attentions.0.norm.weight" in shapes
        for half in ("down", "up")
        for level in range(levels)
    ]
    linear = len(shapes["mid_block.attentions.0.proj_in.weight"]) == 2
    told = {
        "in_channels": shapes["conv_in.weight"][1],
        "out_channels": shapes["conv_out.weight"][0],
        "block_out_channels": widths,
        "layers_per_block": len(numbers(r"down_blocks\.0\.resnets\.(\d+)\.", shapes)),
        "down_block_types": ["CrossAttnDownBlock2D" if a else "DownBlock2D" for a in attentive[:levels]],
        "up_block_types": ["CrossAttnUpBlock2D" if a else "UpBlock2D" for a in attentive[levels:]],
        "cross_attention_dim": shapes["mid_block.attentions.0.transformer_blocks.0.attn2.to_k.weight"][1],
        "use_linear_projection": linear,
    }
    # SD2 has linear projections and heads of 64 channels
    return told, {"attention_head_dim": [width // 64 for width in widths]} if linear else {}


def _text_config(shapes: Shapes) -> tuple[dict[str, Any], dict[str, Any]]:
    shapes = {name.removeprefix("text_model."): shape for name, shape in shapes.items()}
    vocabulary, width = shapes["embeddings.token_embedding.weight"]
    told = {
        "vocab_size": vocabulary,
        "hidden_size": width,
        "intermediate_size": shapes["encoder.layers.0.mlp.fc1.weight"][0],
        "num_hidden_layers": len(numbers(r"encoder\.layers\.(\d+)\.", shapes)),
        "max_position_embeddings": shapes["embeddings.position_embedding.weight"][0],
    }
    # every published CLIP text model has heads of 64 channels
    return told, {"num_attention_heads": max(width // 64, 1)}
