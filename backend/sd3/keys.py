"""What Stable Diffusion 3 and 3.5 checkpoints are called and hold; no torch here.

The original release keeps its networks in one file, with the text encoders or without, under the names of the
MMDiT paper's code (arXiv:2403.03206), and without their settings.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from typing import Any

from backend.errors import CheckpointError
from backend.weights import original
from backend.weights.files import Shapes
from backend.weights.keymap import Origin, Place, Table, inside, inverted, numbers, place, shares

COMPONENTS = ("transformer", "vae", "text_encoder", "text_encoder_2", "text_encoder_3")
REQUIRED = ("transformer", "vae", "text_encoder", "text_encoder_2")  # what no picture can be made without

# The class in model_index.json (None for any other) → component → its folder.
FOLDERS: dict[str | None, dict[str, str]] = {
    None: {
        name: name for name in (*COMPONENTS, "tokenizer", "tokenizer_2", "tokenizer_3", "scheduler")
    }
}  # fmt: skip
LITE: dict[str, str] = {}  # component → the smaller one that does its work
LATENT_STAGES: tuple[str, ...] = ()  # whose latents have preview colours of their own
FLAX = False  # whether checkpoints were published in Flax's files, too

CLIP: dict[str, Any] = {
    "max_position_embeddings": 77, "vocab_size": 49408, "layer_norm_eps": 1e-5,
    # 2 stands for the highest number in a text, which the end token has in every CLIP vocabulary
    "bos_token_id": 0, "eos_token_id": 2, "pad_token_id": 1,
}  # fmt: skip

# The configs of SD3-medium as published, as far as a single file's tensors cannot tell.
PUBLISHED: dict[str, dict[str, Any]] = {
    "transformer": {
        "_class_name": "SD3Transformer2DModel",
        "sample_size": 128, "patch_size": 2, "in_channels": 16, "out_channels": 16, "num_layers": 24,
        "num_attention_heads": 24, "attention_head_dim": 64, "joint_attention_dim": 4096,
        "caption_projection_dim": 1536, "pooled_projection_dim": 2048, "pos_embed_max_size": 192,
        "qk_norm": None, "dual_attention_layers": [],
    },
    "vae": {
        "in_channels": 3, "out_channels": 3, "layers_per_block": 2,
        "block_out_channels": [128, 256, 512, 512],
        "latent_channels": 16, "norm_num_groups": 32, "scaling_factor": 1.5305, "shift_factor": 0.0609,
        "act_fn": "silu", "sample_size": 1024, "use_quant_conv": False, "use_post_quant_conv": False,
    },
    "text_encoder": {
        **CLIP,
        "hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12,
        "hidden_act": "quick_gelu", "projection_dim": 768,
    },
    "text_encoder_2": {
        **CLIP,
        "hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32, "num_attention_heads": 20,
        "hidden_act": "gelu", "projection_dim": 1280,
    },
    "text_encoder_3": {
        "d_model": 4096, "d_kv": 64, "d_ff": 10240, "num_layers": 24, "num_heads": 64,
        "feed_forward_proj": "gated-gelu", "relative_attention_num_buckets": 32,
        "relative_attention_max_distance": 128, "layer_norm_epsilon": 1e-6, "vocab_size": 32128,
        "pad_token_id": 0, "eos_token_id": 1, "decoder_start_token_id": 0, "tie_word_embeddings": False,
    },
    "scheduler": {
        "_class_name": "FlowMatchEulerDiscreteScheduler", "num_train_timesteps": 1000, "shift": 3.0,
    },
}  # fmt: skip

CLASSES = {"transformer": "SD3Transformer2DModel", "vae": "AutoencoderKL"}

PREFIX = "model.diffusion_model."
PARTS: Table = {
    PREFIX: "transformer.",
    original.VAE_PREFIX: "vae.",
    "text_encoders.clip_l.transformer.": "text_encoder.",
    "text_encoders.clip_g.transformer.": "text_encoder_2.",
    "text_encoders.t5xxl.transformer.": "text_encoder_3.",
    # what no network is made of
    "first_stage_model.loss.": None,
    "model.model_sampling.": None,
    "model_sampling.": None,
    "text_encoders.clip_l.logit_scale": None,
    "text_encoders.clip_l.transformer.logit_scale": None,
    "text_encoders.clip_g.logit_scale": None,
    "text_encoders.clip_g.transformer.logit_scale": None,
    "text_encoders.t5xxl.logit_scale": None,
}

TRANSFORMER: Table = {
    "": "",  # names that no other row fits stay, and the strict load reports them
    "pos_embed": "pos_embed.pos_embed",
    "x_embedder.proj.": "pos_embed.proj.",
    "t_embedder.mlp.0.": "time_text_embed.timestep_embedder.linear_1.",
    "t_embedder.mlp.2.": "time_text_embed.timestep_embedder.linear_2.",
    "y_embedder.mlp.0.": "time_text_embed.text_embedder.linear_1.",
    "y_embedder.mlp.2.": "time_text_embed.text_embedder.linear_2.",
    "joint_blocks.": "transformer_blocks.",
    "final_layer.adaLN_modulation.1.": "norm_out.linear.",
    "final_layer.linear.": "proj_out.",
}
BLOCK = {
    ".x_block.adaLN_modulation.1.": ".norm1.linear.",
    ".x_block.attn.proj.": ".attn.to_out.0.",
    ".x_block.attn.ln_": ".attn.norm_",
    ".x_block.attn2.proj.": ".attn2.to_out.0.",
    ".x_block.attn2.ln_": ".attn2.norm_",
    ".x_block.mlp.fc1.": ".ff.net.0.proj.",
    ".x_block.mlp.fc2.": ".ff.net.2.",
    ".context_block.adaLN_modulation.1.": ".norm1_context.linear.",
    ".context_block.attn.proj.": ".attn.to_add_out.",
    ".context_block.attn.ln_": ".attn.norm_added_",
    ".context_block.mlp.fc1.": ".ff_context.net.0.proj.",
    ".context_block.mlp.fc2.": ".ff_context.net.2.",
}

# Encoders' layers: how their names begin, and what the config calls their number and the width.
LAYERS = dict.fromkeys(
    ("text_encoder", "text_encoder_2"),
    (r"text_model\.encoder\.layers\.(\d+)\.", "num_hidden_layers", "hidden_size"),
) | {"text_encoder_3": (r"encoder\.block\.(\d+)\.", "num_layers", "d_model")}

# One matrix for queries, keys and values, and what each of the three is called here.
STACKED = re.compile(r"(.*\.)(x|context)_block\.(attn2?)\.qkv\.(weight|bias)")
TO_EACH = {"x": "to_{}", "context": "add_{}_proj"}
PROJECTION = "text_projection.weight"

# How the names of a LoRA's layers begin → the component that they are of; without any of these the first's.
LORA_PREFIXES = {
    "": "transformer",
    **dict.fromkeys(
        ("transformer.", "lora_transformer_", "lora_unet_", "lycoris_", "base_model.model.",
         "diffusion_model.", PREFIX), "transformer",
    ),
    **dict.fromkeys(("text_encoder.", "lora_te1_"), "text_encoder"),
    **dict.fromkeys(("text_encoder_2.", "lora_te2_"), "text_encoder_2"),
    **dict.fromkeys(("text_encoder_3.", "lora_te3_"), "text_encoder_3"),
}  # fmt: skip
# Layers that no other family has, as the hub's and the trainers' layouts call them.
LORA_TELLS = r"joint_blocks|transformer_blocks[._]\d+[._](attn2?|ff|ff_context|norm1|norm1_context)[._]"
# The original's layers that a LoRA can be for: of the whole, and of each block.
LORA_LAYERS = (
    "context_embedder", "x_embedder.proj", "t_embedder.mlp.0", "t_embedder.mlp.2", "y_embedder.mlp.0",
    "y_embedder.mlp.2", "final_layer.adaLN_modulation.1", "final_layer.linear",
)  # fmt: skip
LORA_BLOCK_LAYERS = (
    "attn.qkv",
    "attn.proj",
    "attn2.qkv",
    "attn2.proj",
    "mlp.fc1",
    "mlp.fc2",
    "adaLN_modulation.1",
)


def check(component: str, config: Mapping[str, Any]) -> None:
    """Refuse networks of other kinds, by name. Raises CheckpointError."""
    kind, due = config.get("_class_name"), CLASSES.get(component)
    if due is not None and kind not in (None, due):
        raise CheckpointError(f"{component} is a {kind}; it can be a {due}")
    if quantised := config.get("quantization_config"):
        method = quantised.get("quant_method") if isinstance(quantised, dict) else quantised
        raise CheckpointError(
            f"{component} was quantised beforehand ({method}), which cannot be read; take it in float32, "
            "bfloat16 or float16"
        )
    channels, out = config.get("in_channels"), config.get("out_channels") or 16
    if component == "transformer" and channels is not None and channels != out:
        raise CheckpointError(
            f"this is an inpainting or editing model (its transformer takes {channels} channels and gives "
            f"{out}); only text-to-image models, which take and give as many, can be run as yet"
        )
    model = config.get("model_type")
    if component == "text_encoder_3" and model not in (None, "t5"):
        raise CheckpointError(f"text_encoder_3 is of the type {model!r}; it can be 't5'")


def is_part(shapes: Shapes) -> bool:
    """Whether a file that does not say so itself holds a network of this family: never, here."""
    return False


def pipeline_of(repository: str) -> str | None:
    """The class that a repository's model_index.json most likely names; it makes no difference here."""
    return None


def hub_names(component: str, shapes: Shapes) -> dict[str, Origin]:
    """Our names of the tensors in a hub-layout component's files.

    T5's table of tokens is there once, as `shared.weight`.
    """
    found = {
        name: Origin(name, shape) for name, shape in shapes.items() if not name.endswith(".position_ids")
    }
    return _embedded_once(found) if component == "text_encoder_3" else found


def parts(shapes: Shapes) -> dict[str, dict[str, Origin]]:
    """The tensors of an original single file by component and by our names.

    Raises CheckpointError for tensors that belong to none of the components.
    """
    # a transformer alone may lack the prefix of a whole checkpoint
    table = PARTS if any(name.startswith(PREFIX) for name in shapes) else {**PARTS, "": "transformer."}
    found: dict[str, Shapes] = {}
    rests: dict[str, str] = {}
    unknown: list[str] = []
    for name, shape in shapes.items():
        try:
            placed = place(name, table)
        except KeyError:
            unknown.append(name)
            continue
        if placed is None or placed.endswith(".position_ids"):
            continue
        component, _, rests[name] = placed.partition(".")
        found.setdefault(component, {})[name] = shape
    if unknown:
        raise CheckpointError(
            f"of {len(shapes)} tensors, {len(unknown)} belong to no part of a Stable Diffusion 3 "
            f"checkpoint ({', '.join(unknown[:4])}{', …' if len(unknown) > 4 else ''})"
        )
    out: dict[str, dict[str, Origin]] = {}
    for component, theirs in found.items():
        named = {rests[name]: Origin(name, shape) for name, shape in theirs.items()}
        if component == "transformer":
            out[component] = _transformer(named)
        elif component == "vae":
            out[component] = original.vae_parts(theirs)
        elif component == "text_encoder":
            out[component] = _unprojected(named)
        else:
            out[component] = _embedded_once(named)
    return out


def lora_names(component: str, paths: Shapes) -> dict[str, list[Place]]:
    """What LoRA files call a component's layers: name → the layers at some of these `paths` that it is."""
    if component in ("text_encoder", "text_encoder_2"):
        return original.clip_lora_names(paths)
    same = {path: [Place(path)] for path in paths}
    if component != "transformer":
        return same
    blocks = numbers(r"transformer_blocks\.(\d+)\.", paths)
    layers = [
        *LORA_LAYERS,
        *(
            f"joint_blocks.{block}.{stream}_block.{layer}"
            for block in blocks
            for stream in TO_EACH
            for layer in LORA_BLOCK_LAYERS
        ),
    ]
    ours = _transformer({f"{layer}.weight": Origin(f"{layer}.weight", (6,)) for layer in layers})
    return inverted(ours, paths) | same


def config(component: str, shapes: Shapes, settings: Mapping[str, Any] | None) -> dict[str, Any]:
    """The config of a component whose tensors have these shapes, by our names.

    What shapes cannot tell comes from `settings`, a config of the same kind, or else from the published
    values. Raises CheckpointError where a tensor that tells something, or a layer of an encoder, is missing.
    """
    infer: dict[str, Callable[[Shapes, Mapping[str, Any]], dict[str, Any]]] = {
        "transformer": _transformer_config,
        "vae": lambda shapes, known: original.vae_config(shapes),
        "text_encoder_3": _t5_config,
    }
    known = {**PUBLISHED[component], **(settings or {})}
    try:
        told = infer.get(component, original.projected_text_config)(shapes, known)
    except KeyError as error:
        raise CheckpointError(
            f"{component}: the tensor {error} is missing, so its config cannot be told"
        ) from error
    except (LookupError, ValueError, TypeError, ArithmeticError) as error:
        raise CheckpointError(
            f"{component}: its tensors' shapes are not those of such a network, so its config cannot be told"
        ) from error
    if component in LAYERS:
        _check_layers(component, shapes, known, told, "its settings say" if settings else "published")
    return {**known, **told}


def _check_layers(
    component: str, shapes: Shapes, known: Mapping[str, Any], told: Mapping[str, Any], whose: str
) -> None:
    """Refuse an encoder that lacks layers: the others are a network too, which would load and read nonsense.

    How many are due is known of encoders of the same width.
    """
    pattern, count, width = LAYERS[component]
    found = {int(number) for number in numbers(pattern, shapes)}
    if known[width] == told[width] and len(found) != known[count]:
        raise CheckpointError(f"{component} has {len(found)} layers, and {known[count]} are due, as {whose}")
    if gaps := sorted(set(range(max(found))) - found):
        raise CheckpointError(f"{component} lacks layers in between ({', '.join(map(str, gaps))})")


def _transformer(named: Mapping[str, Origin]) -> dict[str, Origin]:
    """The original stacks queries, keys and values. Where a modulation is of a shift and a scale alone, after
    the last block and for the text in it, the shift comes first there, and the scale here."""
    last = max((int(n) for n in numbers(r"joint_blocks\.(\d+)\.", named)), default=0)
    turned = ("final_layer.adaLN_modulation.", f"joint_blocks.{last}.context_block.adaLN_modulation.")
    out: dict[str, Origin] = {}
    for rest, origin in named.items():
        assert origin.name is not None
        if stacked := STACKED.fullmatch(rest):
            block, stream, layer, kind = stacked.groups()
            start = (place(block, TRANSFORMER) or "") + layer
            ours = [f"{start}.{TO_EACH[stream].format(letter)}.{kind}" for letter in "qkv"]
            out |= shares(origin.name, origin.shape, ours)
        else:
            ours = inside(place(rest, TRANSFORMER) or "", BLOCK)
            out[ours] = Origin(origin.name, origin.shape, swapped=rest.startswith(turned))
    return out


def _unprojected(named: Mapping[str, Origin]) -> dict[str, Origin]:
    """The original pools CLIP-L's features without a projection, whether the file has one or not; in the hub
    layout that is the identity matrix."""
    width = named.get("text_model.final_layer_norm.weight")
    out = {name: origin for name, origin in named.items() if name != PROJECTION}
    return {**out, PROJECTION: Origin(None, (width.shape[0],) * 2)} if width else out


def _embedded_once(named: Mapping[str, Origin]) -> dict[str, Origin]:
    """T5's table of tokens goes by two names; a file may hold it under either, or under both."""
    again, shared = "encoder.embed_tokens.weight", "shared.weight"
    out = {name: origin for name, origin in named.items() if name != again}
    return {shared: named[again], **out} if again in named else out


def _transformer_config(shapes: Shapes, known: Mapping[str, Any]) -> dict[str, Any]:
    width, channels, patch, _ = shapes["pos_embed.proj.weight"]
    norm = shapes.get("transformer_blocks.0.attn.norm_q.weight")
    heads, head = known["num_attention_heads"], known["attention_head_dim"]
    if norm is not None:
        head = norm[0]
    elif heads * head != width:  # those of another network
        head = 64  # as in every published one
    return {
        "in_channels": channels,
        "out_channels": shapes["proj_out.weight"][0] // patch**2,
        "patch_size": patch,
        "num_layers": len(numbers(r"transformer_blocks\.(\d+)\.", shapes)),
        "attention_head_dim": head,
        "num_attention_heads": max(width // head, 1),
        "caption_projection_dim": width,
        "joint_attention_dim": shapes["context_embedder.weight"][1],
        "pooled_projection_dim": shapes["time_text_embed.text_embedder.linear_1.weight"][1],
        "pos_embed_max_size": math.isqrt(shapes["pos_embed.pos_embed"][1]),
        "qk_norm": "rms_norm" if norm is not None else None,
        "dual_attention_layers": sorted(
            int(n) for n in numbers(r"transformer_blocks\.(\d+)\.attn2\.", shapes)
        ),
    }


def _t5_config(shapes: Shapes, known: Mapping[str, Any]) -> dict[str, Any]:
    vocabulary, width = shapes["shared.weight"]
    layer = "encoder.block.0.layer"
    buckets, heads = shapes[f"{layer}.0.SelfAttention.relative_attention_bias.weight"]
    gated = f"{layer}.1.DenseReluDense.wi_0.weight" in shapes
    inner = shapes[f"{layer}.1.DenseReluDense.{'wi_0' if gated else 'wi'}.weight"][0]
    stated = known["feed_forward_proj"]
    return {
        "vocab_size": vocabulary,
        "d_model": width,
        "d_kv": shapes[f"{layer}.0.SelfAttention.q.weight"][0] // heads,
        "d_ff": inner,
        "num_heads": heads,
        "num_layers": len(numbers(r"encoder\.block\.(\d+)\.", shapes)),
        "relative_attention_num_buckets": buckets,
        "feed_forward_proj": stated if gated == str(stated).startswith("gated-") else "relu",
    }
