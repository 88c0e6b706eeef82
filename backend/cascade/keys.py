"""What Stable Cascade checkpoints are called and hold; no torch here.

The release comes in two halves in hub layout, one with the prior (Stage C), one with the decoder (Stages B
and A), and in original files, one network each, under the names of the Würstchen paper's code
(arXiv:2306.00637).
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

from backend.errors import CheckpointError
from backend.weights import original
from backend.weights.files import Shapes
from backend.weights.keymap import Origin, Place, inside, numbers, shares

COMPONENTS = (
    "prior", "prior_lite", "decoder", "decoder_lite", "vqgan", "text_encoder", "image_encoder",
    "effnet_encoder", "previewer",
)  # fmt: skip
REQUIRED: tuple[str, ...] = ()  # each stage comes in two sizes, and an original file holds one network
LITE = {"prior": "prior_lite", "decoder": "decoder_lite"}  # component → the smaller one that does its work
LATENT_STAGES = ("stage_c", "stage_b")  # whose latents have preview colours of their own
FLAX = False  # whether checkpoints were published in Flax's files, too

PRIOR = {
    **{name: name for name in ("prior", "prior_lite", "text_encoder", "tokenizer")},
    **{name: name for name in ("image_encoder", "feature_extractor", "effnet_encoder", "previewer")},
    "prior_scheduler": "scheduler",
}
DECODER = {
    name: name for name in ("decoder", "decoder_lite", "vqgan", "text_encoder", "tokenizer", "scheduler")
}
# The class in model_index.json (None for any other) → component → its folder.
FOLDERS: dict[str | None, dict[str, str]] = {
    None: {**PRIOR, **DECODER},
    "StableCascadePriorPipeline": PRIOR,
    "StableCascadeDecoderPipeline": DECODER,
    "StableCascadeCombinedPipeline": {
        **{name: folder for name, folder in DECODER.items() if name not in PRIOR},
        **{name: f"prior_{folder}" for name, folder in PRIOR.items()},
    },
}

RESIDUAL, TIMESTEP, ATTENTION = "SDCascadeResBlock", "SDCascadeTimestepBlock", "SDCascadeAttnBlock"

UNET: dict[str, Any] = {
    "_class_name": "StableCascadeUNet", "timestep_ratio_embedding_dim": 64, "clip_seq": 4, "kernel_size": 3,
    "clip_text_pooled_in_channels": 1280, "self_attn": True,
}  # fmt: skip
STAGE_C: dict[str, Any] = {
    **UNET,
    "in_channels": 16, "out_channels": 16, "patch_size": 1,
    "clip_text_in_channels": 1280, "clip_image_in_channels": 768,
    "effnet_in_channels": None, "pixel_mapper_in_channels": None,
    "block_types_per_layer": [[RESIDUAL, TIMESTEP, ATTENTION]] * 2,
    "down_blocks_repeat_mappers": [1, 1], "up_blocks_repeat_mappers": [1, 1],
    "timestep_conditioning_type": ["sca", "crp"], "switch_level": [False],
}  # fmt: skip
STAGE_B: dict[str, Any] = {
    **UNET,
    "in_channels": 4, "out_channels": 4, "patch_size": 2, "conditioning_dim": 1280,
    "clip_text_in_channels": None, "clip_image_in_channels": None,
    "effnet_in_channels": 16, "pixel_mapper_in_channels": 3,
    "block_types_per_layer": [
        *[[RESIDUAL, TIMESTEP]] * 2, *[[RESIDUAL, TIMESTEP, ATTENTION]] * 2,
    ],
    "down_blocks_repeat_mappers": [1, 1, 1, 1],
    "timestep_conditioning_type": ["sca"], "switch_level": None,
}  # fmt: skip
SCHEDULER = {"_class_name": "DDPMWuerstchenScheduler", "s": 0.008, "scaler": 1.0}

# The published configs, as far as a single file's tensors cannot tell.
PUBLISHED: dict[str, dict[str, Any]] = {
    "prior": {
        **STAGE_C,
        "conditioning_dim": 2048, "block_out_channels": [2048, 2048], "num_attention_heads": [32, 32],
        "down_num_layers_per_block": [8, 24], "up_num_layers_per_block": [24, 8],
    },
    "prior_lite": {
        **STAGE_C,
        "conditioning_dim": 1536, "block_out_channels": [1536, 1536], "num_attention_heads": [24, 24],
        "down_num_layers_per_block": [4, 12], "up_num_layers_per_block": [12, 4],
    },
    "decoder": {
        **STAGE_B,
        "block_out_channels": [320, 640, 1280, 1280], "num_attention_heads": [0, 0, 20, 20],
        "down_num_layers_per_block": [2, 6, 28, 6], "up_num_layers_per_block": [6, 28, 6, 2],
        "up_blocks_repeat_mappers": [3, 3, 2, 2],
    },
    "decoder_lite": {
        **STAGE_B,
        "block_out_channels": [320, 576, 1152, 1152], "num_attention_heads": [0, 9, 18, 18],
        "down_num_layers_per_block": [2, 4, 14, 4], "up_num_layers_per_block": [4, 14, 4, 2],
        "up_blocks_repeat_mappers": [2, 2, 2, 2],
    },
    "vqgan": {
        "_class_name": "PaellaVQModel", "in_channels": 3, "out_channels": 3, "up_down_scale_factor": 2,
        "levels": 2, "bottleneck_blocks": 12, "embed_dim": 384, "latent_channels": 4,
        "num_vq_embeddings": 8192, "scale_factor": 0.3764,
    },
    "text_encoder": {
        "hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32, "num_attention_heads": 20,
        "max_position_embeddings": 77, "vocab_size": 49408, "hidden_act": "gelu", "layer_norm_eps": 1e-5,
        "projection_dim": 1280,
        # 2 stands for the highest number in a text, which the end token has in every CLIP vocabulary
        "bos_token_id": 0, "eos_token_id": 2, "pad_token_id": 1,
    },
    "image_encoder": {
        "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16,
        "num_channels": 3, "image_size": 224, "patch_size": 14, "hidden_act": "quick_gelu",
        "layer_norm_eps": 1e-5, "projection_dim": 768,
    },
    "effnet_encoder": {"latent_channels": 16},
    "previewer": {"in_channels": 16, "hidden_channels": 512, "out_channels": 3},
    "scheduler": SCHEDULER,
    "prior_scheduler": SCHEDULER,
    "feature_extractor": {
        "do_resize": True, "size": {"shortest_edge": 224}, "resample": 3,  # bicubic
        "do_center_crop": True, "crop_size": {"height": 224, "width": 224},
        "do_rescale": True, "rescale_factor": 1 / 255, "do_convert_rgb": True,
        "do_normalize": True, "image_mean": [0.48145466, 0.4578275, 0.40821073],
        "image_std": [0.26862954, 0.26130258, 0.27577711],
    },
}  # fmt: skip

CLASSES = {"vqgan": "PaellaVQModel", **dict.fromkeys((*LITE, *LITE.values()), "StableCascadeUNet")}
LITE_WIDTHS = {"prior": 1536, "decoder": 576}  # of the tensors that tell the sizes apart
TELLING = {"prior": "clip_txt_mapper.weight", "decoder": "down_blocks.1.0.channelwise.0.weight"}

# The original's attention is torch's, with one matrix for queries, keys and values.
ATTENTION_NAMES = {".attention.attn.out_proj.": ".attention.to_out.0."}
STACKED = re.compile(r"(?P<block>.*\.attention\.)attn\.in_proj_(?P<kind>weight|bias)")
STAGE_B_NAMES = {"clip_mapper.": "clip_txt_pooled_mapper."}
STAGE_A_NAMES = {"vquantizer.codebook.": "vquantizer.embedding."}

# How the names of a LoRA's layers begin → the component that they are of; without any of these the first's.
LORA_PREFIXES = {
    "": "prior",
    **dict.fromkeys(
        ("prior.", "unet.", "lora_prior_unet_", "lora_unet_", "base_model.model.", "diffusion_model."),
        "prior",
    ),
    **dict.fromkeys(("decoder.", "lora_decoder_unet_"), "decoder"),
    **dict.fromkeys(
        ("text_encoder.", "prior_text_encoder.", "lora_prior_te_", "lora_te_", "lora_te1_"), "text_encoder"
    ),
}
# Layers that no other family has, as the hub's and the trainers' layouts call them.
LORA_TELLS = (
    r"^lora_prior_|^prior\.|attention[._](attn[._])?(to_|in_proj|out_proj)|kv_mapper|channelwise"
    r"|clip_txt_|clip_img_"
)
LORA_NAMES = {  # of the original's attention: here → there
    ".attention.to_out.0": (".attention.attn.out_proj",),
    ".attention.to_q": (".attention.attn.to_q",),
    ".attention.to_k": (".attention.attn.to_k",),
    ".attention.to_v": (".attention.attn.to_v",),
}
LORA_STACKED = ".attention.attn.in_proj"


def check(component: str, config: Mapping[str, Any]) -> None:
    """Refuse networks of other kinds, by name. Raises CheckpointError."""
    kind, due = str(config.get("_class_name")), CLASSES.get(component)
    if due is not None and "_class_name" in config and kind.lower() != due.lower():
        raise CheckpointError(f"{component} is a {kind}; it can be a {due}")


def pipeline_of(repository: str) -> str | None:
    """The class that a repository's model_index.json most likely names."""
    half = "Prior" if "prior" in repository.lower() else "Decoder"
    return f"StableCascade{half}Pipeline"


def is_part(shapes: Shapes) -> bool:
    """Whether a file holds a network of this family, as far as its names tell."""
    return _component(shapes) is not None


def hub_names(component: str, shapes: Shapes) -> dict[str, Origin]:
    """Our names of the tensors in a hub-layout component's files."""
    return {name: Origin(name, shape) for name, shape in shapes.items() if not name.endswith(".position_ids")}


def parts(shapes: Shapes) -> dict[str, dict[str, Origin]]:
    """The tensors of an original file by component and by our names.

    Raises CheckpointError where it is none of the family's networks.
    """
    component = _component(shapes)
    if component is None:
        raise CheckpointError(
            "its tensors are not those of a Stage C, B or A of the original release "
            f"({', '.join(list(shapes)[:3])}, …)"
        )
    out: dict[str, Origin] = {}
    for name, shape in shapes.items():
        if component == "image_encoder" and not name.startswith(("vision_model.", "visual_projection.")):
            continue  # the rest of CLIP
        if name.endswith(".position_ids") or name.startswith(("vquantizer.ema_", "logit_scale")):
            continue
        if stacked := STACKED.fullmatch(name):
            out |= shares(name, shape, [f"{stacked['block']}to_{x}.{stacked['kind']}" for x in "qkv"])
        else:
            out[_ours(component, name)] = Origin(name, shape)
    return {component: out}


def lora_names(component: str, paths: Shapes) -> dict[str, list[Place]]:
    """What LoRA files call a component's layers: name → the layers at some of these `paths` that it is."""
    if component == "text_encoder":
        return original.clip_lora_names(paths)
    found = {path: [Place(path)] for path in paths}
    for path in paths:
        for end, theirs in LORA_NAMES.items():
            if path.endswith(end):
                found |= {path.removesuffix(end) + each: [Place(path)] for each in theirs}
    for block in _attentions(paths):
        found[block + LORA_STACKED] = _stacked(block)
    return found


def lora_order(paths: Shapes) -> list[list[Place]]:
    """The layers in the order in which the original release's LoRA files number them: of each attention the
    result's, then the one of queries, keys and values."""
    places: list[list[Place]] = []
    for block in _attentions(paths):
        places += [[Place(f"{block}.attention.to_out.0")], _stacked(block)]
    return places


def _stacked(block: str) -> list[Place]:
    return [Place(f"{block}.attention.to_{letter}", chunk=(n, 3)) for n, letter in enumerate("qkv")]


def _attentions(paths: Shapes) -> list[str]:
    """The blocks with attention, as they run."""
    end = ".attention.to_q"
    blocks = [path.removesuffix(end) for path in paths if path.endswith(end)]
    return sorted(
        blocks, key=lambda path: [int(part) if part.isdigit() else part for part in path.split(".")]
    )


def config(component: str, shapes: Shapes, settings: Mapping[str, Any] | None) -> dict[str, Any]:
    """The config of a component whose tensors have these shapes, by our names.

    What shapes cannot tell comes from `settings`, a config of the same kind, or else from the published
    values. Raises CheckpointError where a tensor that tells something is missing.
    """
    infer = {
        "vqgan": _vqgan_config, "text_encoder": original.projected_text_config,
        "image_encoder": _image_config, "previewer": _previewer_config, "effnet_encoder": _effnet_config,
    }  # fmt: skip
    known = {**PUBLISHED[component], **(settings or {})}
    try:
        told = infer.get(component, _unet_config)(shapes, known)
    except (LookupError, ValueError, TypeError, ArithmeticError) as error:
        raise CheckpointError(
            f"{component}: the tensor {error} is missing, so its config cannot be told"
        ) from error
    return {**known, **told}


def _component(shapes: Shapes) -> str | None:
    def starts(*parts: str) -> bool:
        return all(any(name.startswith(part) for name in shapes) for part in parts)

    if starts("clip_txt_mapper.", "down_blocks."):
        stage = "prior"
    elif starts("effnet_mapper.", "down_blocks."):
        stage = "decoder"
    elif starts("vquantizer.", "up_blocks."):
        return "vqgan"
    elif starts("vision_model.", "visual_projection."):
        return "image_encoder"
    elif starts("text_model.", "text_projection."):
        return "text_encoder"
    elif starts("backbone.", "mapper."):
        return "effnet_encoder"
    elif len(shapes.get("blocks.0.weight", ())) == 4 and all(name.startswith("blocks.") for name in shapes):
        return "previewer"
    else:
        return None
    telling = shapes.get(TELLING[stage], (0,))
    width = telling[0] if stage == "prior" else telling[-1]
    return LITE[stage] if width == LITE_WIDTHS[stage] else stage


def _ours(component: str, name: str) -> str:
    if component in ("decoder", "decoder_lite"):
        for start, end in STAGE_B_NAMES.items():
            if name.startswith(start):
                return end + name.removeprefix(start)
    return inside(name, STAGE_A_NAMES if component == "vqgan" else ATTENTION_NAMES)


def _unet_config(shapes: Shapes, known: Mapping[str, Any]) -> dict[str, Any]:
    levels = len(numbers(r"down_blocks\.(\d+)\.", shapes))
    kinds = {
        half: [_block_kinds(f"{half}_blocks.{level}.", shapes) for level in range(levels)]
        for half in ("down", "up")
    }
    types = [_period(level) for level in kinds["down"]]
    widths = [shapes[f"down_blocks.{level}.0.depthwise.weight"][0] for level in range(levels)]
    patch = known["patch_size"] ** 2
    pooled = shapes["clip_txt_pooled_mapper.weight"]
    if "clip_txt_mapper.weight" in shapes:
        dim = shapes["clip_txt_mapper.weight"][0]
    else:
        attention = [name for name in shapes if name.endswith(".kv_mapper.1.weight")]
        dim = shapes[attention[0]][1] if attention else pooled[0] // known["clip_seq"]
    mapped = {
        "clip_text_in_channels": "clip_txt_mapper.weight",
        "clip_image_in_channels": "clip_img_mapper.weight",
        "effnet_in_channels": "effnet_mapper.0.weight",
        "pixel_mapper_in_channels": "pixels_mapper.0.weight",
    }
    timestep = next(name for name in shapes if re.fullmatch(r"down_blocks\.\d+\.\d+\.mapper\.weight", name))
    conditions = {name.split(".mapper_")[1].split(".")[0]: None for name in shapes if ".mapper_" in name}
    order = ["sca", "crp"]
    told: dict[str, Any] = {
        "in_channels": shapes["embedding.1.weight"][1] // patch,
        "out_channels": shapes["clf.1.weight"][0] // patch,
        "timestep_ratio_embedding_dim": shapes[timestep][1],
        "conditioning_dim": dim,
        "clip_seq": pooled[0] // dim,
        "clip_text_pooled_in_channels": pooled[1],
        **{key: shapes[name][1] if name in shapes else None for key, name in mapped.items()},
        "block_out_channels": widths,
        "block_types_per_layer": types,
        "kernel_size": shapes["down_blocks.0.0.depthwise.weight"][2],
        "timestep_conditioning_type": sorted(conditions, key=lambda x: order.index(x) if x in order else 9),
    }
    for half, order_of_levels in (("down", range(levels)), ("up", range(levels - 1, -1, -1))):
        told[f"{half}_num_layers_per_block"] = [
            len(kinds[half][index]) // len(types[level]) for index, level in enumerate(order_of_levels)
        ]
        told[f"{half}_blocks_repeat_mappers"] = [
            1 + len(numbers(rf"{half}_repeat_mappers\.{index}\.(\d+)\.", shapes)) for index in range(levels)
        ]
    if not any(name.startswith("down_downscalers.1.1.blocks.") for name in shapes) and levels > 1:
        told["switch_level"] = None
    elif len(known["switch_level"] or ()) < levels - 1:
        told["switch_level"] = [False] * (levels - 1)
    if list(known.get("block_out_channels") or ()) != widths:  # the head counts are those of another network
        # every published network has heads of 64 channels
        told["num_attention_heads"] = [
            max(width // 64, 1) if ATTENTION in kinds else 0
            for width, kinds in zip(widths, types, strict=True)
        ]
        told["self_attn"] = True
    return told


def _block_kinds(prefix: str, shapes: Shapes) -> list[str]:
    """The kinds of the blocks of a level, in the order in which they run."""
    tell = {"depthwise.weight": RESIDUAL, "mapper.weight": TIMESTEP, "kv_mapper.1.weight": ATTENTION}
    found: list[str] = []
    while True:
        start = f"{prefix}{len(found)}."
        kind = next((kind for name, kind in tell.items() if start + name in shapes), None)
        if kind is None:
            return found
        found.append(kind)


def _period(kinds: list[str]) -> list[str]:
    """The shortest sequence that gives `kinds` when it is repeated."""
    for length in range(1, len(kinds)):
        if kinds == kinds[:length] * (len(kinds) // length):
            return kinds[:length]
    return kinds


def _vqgan_config(shapes: Shapes, known: Mapping[str, Any]) -> dict[str, Any]:
    pixels = known["up_down_scale_factor"] ** 2
    levels = len(numbers(r"down_blocks\.(\d+)\.gammas", shapes))
    width, latent = shapes["up_blocks.0.0.weight"][:2]
    return {
        "in_channels": shapes["in_block.1.weight"][1] // pixels,
        "out_channels": shapes["out_block.0.weight"][0] // pixels,
        "levels": levels,
        "bottleneck_blocks": len(numbers(r"up_blocks\.(\d+)\.gammas", shapes)) - (levels - 1),
        "embed_dim": width,
        "latent_channels": latent,
        "num_vq_embeddings": shapes["vquantizer.embedding.weight"][0],
    }


def _image_config(shapes: Shapes, known: Mapping[str, Any]) -> dict[str, Any]:
    width, channels, patch, _ = shapes["vision_model.embeddings.patch_embedding.weight"]
    positions = shapes["vision_model.embeddings.position_embedding.weight"][0]
    return {
        "num_channels": channels,
        "patch_size": patch,
        "image_size": patch * math.isqrt(positions - 1),  # one position is the class token's
        "projection_dim": shapes["visual_projection.weight"][0],
        **original.clip_layers("vision_model.", width, shapes, known),
    }


def _previewer_config(shapes: Shapes, known: Mapping[str, Any]) -> dict[str, Any]:
    hidden, channels = shapes["blocks.0.weight"][:2]
    last = max((int(n) for n in numbers(r"blocks\.(\d+)\.weight", shapes)), default=0)
    return {
        "in_channels": channels,
        "hidden_channels": hidden,
        "out_channels": shapes[f"blocks.{last}.weight"][0],
    }


def _effnet_config(shapes: Shapes, known: Mapping[str, Any]) -> dict[str, Any]:
    return {"latent_channels": shapes["mapper.0.weight"][0]}
