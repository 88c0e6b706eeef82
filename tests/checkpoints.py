"""Tiny random checkpoints, made with the reference library, for every test that loads one.

`sd15_folder`, `sd3_folder` and `cascade_folder` write the hub layout, `sd15_single_file`, `sd3_single_file`
and `cascade_single_files` the same weights under the original release's names.
The names of the original release are derived here from how its networks are laid out (blocks counted in the
order in which they run), not read from our own key tables, so that a mistake there shows.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

WORDS = (
    "a",
    "red",
    "blue",
    "house",
    "tree",
    "on",
    "green",
    "hills",
    "at",
    "night",
    "of",
    "the",
    "photo",
    "sea",
)


def sd15_folder(
    path: Path,
    *,
    seed: int = 0,
    vae: Mapping[str, Any] | None = None,
    text: Mapping[str, Any] | None = None,
    scheduler: Mapping[str, Any] | None = None,
    **unet: Any,
) -> Path:
    """A Stable Diffusion 1.x checkpoint of random weights in hub layout, float32 → `path`.

    Keywords override the UNet's config; `vae`, `text` and `scheduler` the others'. Without any, what single
    files cannot tell (heads, groups, prediction type, ...) is as published, so that they need no config.
    """
    from diffusers import AutoencoderKL, PNDMScheduler, StableDiffusionPipeline, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

    torch.manual_seed(seed)
    tokenizer_files(path / "tokenizer")
    tokenizer = CLIPTokenizer.from_pretrained(path / "tokenizer")
    unet_config: dict[str, Any] = {
        "sample_size": 8,
        "block_out_channels": (32, 64, 64),
        "down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        "cross_attention_dim": 64,
        **unet,
    }
    vae_config: dict[str, Any] = {
        "sample_size": 64,
        "block_out_channels": (32, 32, 64, 64),
        "down_block_types": ("DownEncoderBlock2D",) * 4,
        "up_block_types": ("UpDecoderBlock2D",) * 4,
        **(vae or {}),
    }
    text_config: dict[str, Any] = {
        "vocab_size": len(tokenizer),
        "hidden_size": unet_config["cross_attention_dim"],
        "intermediate_size": 96,
        "num_hidden_layers": 3,
        "num_attention_heads": max(unet_config["cross_attention_dim"] // 64, 1),
        "hidden_act": "quick_gelu",
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        **(text or {}),
    }
    scheduler_config: dict[str, Any] = {
        "beta_start": 0.00085,
        "beta_end": 0.012,
        "beta_schedule": "scaled_linear",
        "skip_prk_steps": True,
        "steps_offset": 1,
        **(scheduler or {}),
    }
    parts: dict[str, Any] = {
        "vae": unlike_at_start(AutoencoderKL(**vae_config)),
        "text_encoder": unlike_at_start(CLIPTextModel(CLIPTextConfig(**text_config))),
        "tokenizer": tokenizer,
        "unet": unlike_at_start(UNet2DConditionModel(**unet_config)),
        "scheduler": PNDMScheduler(**scheduler_config),
        "safety_checker": None,
        "feature_extractor": None,
        "requires_safety_checker": False,
    }
    StableDiffusionPipeline(**parts).save_pretrained(path)
    return path


def unlike_at_start(module: nn.Module) -> Any:
    """Shake norms and biases: while all are 1 and 0, weights under each other's names would go unnoticed."""
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.ndim == 1:
                parameter += 0.1 * torch.randn_like(parameter)
    return module


def tokenizer_files(path: Path, *, pad: str = "<|endoftext|>") -> Path:
    """A byte-level BPE tokenizer in CLIP's form that knows `WORDS` whole, 77 positions → `path`."""
    path.mkdir(parents=True, exist_ok=True)
    printable = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    alphabet = [chr(code) for code in printable] + [chr(256 + n) for n in range(len(others))]
    vocabulary = alphabet + [letter + "</w>" for letter in alphabet]
    merges: list[str] = []
    for word in WORDS:
        *letters, last = word
        pieces = [*letters, last + "</w>"]
        while len(pieces) > 1:
            pair = f"{pieces[0]} {pieces[1]}"
            pieces[:2] = [pieces[0] + pieces[1]]
            if pair not in merges:
                merges.append(pair)
                vocabulary.append(pieces[0])
    vocabulary += ["<|startoftext|>", "<|endoftext|>"]  # last: CLIP finds the end of a text by the highest id
    numbers = {token: number for number, token in enumerate(vocabulary)}
    (path / "vocab.json").write_text(json.dumps(numbers, ensure_ascii=False), encoding="utf-8")
    (path / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]) + "\n", encoding="utf-8")
    config = {
        "tokenizer_class": "CLIPTokenizer",
        "model_max_length": 77,
        "bos_token": "<|startoftext|>",
        "eos_token": "<|endoftext|>",
        "unk_token": "<|endoftext|>",
        "pad_token": pad,
    }
    (path / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    return path


def sd15_single_file(folder: Path, path: Path, *, dtype: torch.dtype = torch.float32) -> Path:
    """The weights of a hub-layout folder under the names of the original release → the file `path`.

    A name that ends in .ckpt gets the original's pickle, anything else safetensors.
    """
    tensors = {
        **original_unet(
            load_file(folder / "unet/diffusion_pytorch_model.safetensors"), config_of(folder, "unet")
        ),
        **original_vae(
            load_file(folder / "vae/diffusion_pytorch_model.safetensors"), config_of(folder, "vae")
        ),
        **original_text(load_file(folder / "text_encoder/model.safetensors")),
    }
    tensors = {name: tensor.to(dtype).contiguous() for name, tensor in tensors.items()}
    tensors |= {  # what training left behind in the published files
        "alphas_cumprod": torch.linspace(0.9991, 0.0047, 1000),
        "betas": torch.linspace(0.00085, 0.012, 1000),
        "model_ema.decay": torch.tensor(0.9999),
        "model_ema.num_updates": torch.tensor(470000, dtype=torch.int32),
        "cond_stage_model.transformer.text_model.embeddings.position_ids": torch.arange(77)[None],
    }
    if path.suffix == ".ckpt":
        torch.save({"global_step": 470000, "state_dict": tensors}, path)
    else:
        save_file(tensors, path)
    return path


def spoil(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Rewrite a JSON or safetensors file with its content changed."""
    if path.suffix == ".json":
        content = json.loads(path.read_text())
        change(content)
        path.write_text(json.dumps(content))
    else:
        tensors = dict(load_file(path))
        change(tensors)
        save_file(tensors, path)


def config_of(folder: Path, component: str) -> dict[str, Any]:
    return json.loads((folder / component / "config.json").read_text(encoding="utf-8"))


def original_unet(tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> dict[str, Tensor]:
    """The original counts every block in the order in which it runs, within its input and its output half."""
    levels = len(config["block_out_channels"])
    layers = config["layers_per_block"]
    resnet = {
        "norm1": "in_layers.0", "conv1": "in_layers.2", "time_emb_proj": "emb_layers.1",
        "norm2": "out_layers.0", "conv2": "out_layers.3", "conv_shortcut": "skip_connection",
    }  # fmt: skip
    places: dict[str, str] = {
        "time_embedding.linear_1": "time_embed.0",
        "time_embedding.linear_2": "time_embed.2",
        "conv_in": "input_blocks.0.0",
        "mid_block.resnets.0": "middle_block.0",
        "mid_block.attentions.0": "middle_block.1",
        "mid_block.resnets.1": "middle_block.2",
        "conv_norm_out": "out.0",
        "conv_out": "out.2",
    }
    count = 1
    for level in range(levels):
        for layer in range(layers):
            places[f"down_blocks.{level}.resnets.{layer}"] = f"input_blocks.{count}.0"
            places[f"down_blocks.{level}.attentions.{layer}"] = f"input_blocks.{count}.1"
            count += 1
        if level < levels - 1:
            places[f"down_blocks.{level}.downsamplers.0.conv"] = f"input_blocks.{count}.0.op"
            count += 1
    count = 0
    for level in range(levels):
        attentive = any(name.startswith(f"up_blocks.{level}.attentions") for name in tensors)
        for layer in range(layers + 1):
            places[f"up_blocks.{level}.resnets.{layer}"] = f"output_blocks.{count}.0"
            places[f"up_blocks.{level}.attentions.{layer}"] = f"output_blocks.{count}.1"
            if layer == layers:  # the upsampler comes third where there is an attention, else second
                places[f"up_blocks.{level}.upsamplers.0.conv"] = f"output_blocks.{count}.{1 + attentive}.conv"
            count += 1
    return {
        "model.diffusion_model." + renamed(name, places, resnet): value for name, value in tensors.items()
    }


def original_vae(tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> dict[str, Tensor]:
    """The original numbers decoder blocks from the outermost, and its attention is of 1×1 convolutions."""
    levels = len(config["block_out_channels"])
    inside = {
        "conv_shortcut": "nin_shortcut", "group_norm": "norm",
        "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out",
    }  # fmt: skip
    places: dict[str, str] = {}
    for half in ("encoder", "decoder"):
        places[f"{half}.conv_norm_out"] = f"{half}.norm_out"
        places[f"{half}.mid_block.attentions.0"] = f"{half}.mid.attn_1"
        for number in (0, 1):
            places[f"{half}.mid_block.resnets.{number}"] = f"{half}.mid.block_{number + 1}"
    for level in range(levels):
        mirrored = levels - 1 - level
        for layer in range(config["layers_per_block"] + 1):
            places[f"encoder.down_blocks.{level}.resnets.{layer}"] = f"encoder.down.{level}.block.{layer}"
            places[f"decoder.up_blocks.{level}.resnets.{layer}"] = f"decoder.up.{mirrored}.block.{layer}"
        places[f"encoder.down_blocks.{level}.downsamplers.0.conv"] = f"encoder.down.{level}.downsample.conv"
        places[f"decoder.up_blocks.{level}.upsamplers.0.conv"] = f"decoder.up.{mirrored}.upsample.conv"
    out: dict[str, Tensor] = {}
    for name, value in tensors.items():
        linear = re.search(r"\.to_(q|k|v|out\.0)\.weight$", name)
        out["first_stage_model." + renamed(name, places, inside)] = (
            value[:, :, None, None] if linear else value
        )
    return out


def original_text(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    prefix = "cond_stage_model.transformer.text_model."
    return {prefix + name.removeprefix("text_model."): value for name, value in tensors.items()}


def renamed(name: str, places: Mapping[str, str], inside: Mapping[str, str]) -> str:
    """`name` with the block at its head and the layer within it under their original names."""
    for head in sorted(places, key=len, reverse=True):
        if name.startswith(head + "."):
            rest = name.removeprefix(head + ".")
            for layer, original in inside.items():
                if rest.startswith(layer + "."):
                    rest = original + rest.removeprefix(layer)
            return f"{places[head]}.{rest}"
    return name


def sd3_folder(
    path: Path,
    *,
    seed: int = 0,
    t5: Mapping[str, Any] | bool = True,
    vae: Mapping[str, Any] | None = None,
    text: Mapping[str, Any] | None = None,
    text_2: Mapping[str, Any] | None = None,
    scheduler: Mapping[str, Any] | None = None,
    **transformer: Any,
) -> Path:
    """A Stable Diffusion 3 checkpoint of random weights in hub layout, float32 → `path`.

    Keywords override the transformer's config (`qk_norm="rms_norm"`, `dual_attention_layers=(0, 1)`, ...);
    `vae`, `text`, `text_2` (the CLIP models), `t5` and `scheduler` the others'. `t5=False` leaves T5 and its
    tokenizer out. Without overrides, what single files cannot tell is as published, but for `sample_size`,
    which is of 128 pixels; up to 256 can be made. The projection of CLIP-L is the identity, as published,
    unless `text` gives it another size than the model's width.
    """
    from diffusers import (
        AutoencoderKL,
        FlowMatchEulerDiscreteScheduler,
        SD3Transformer2DModel,
        StableDiffusion3Pipeline,
    )
    from transformers import (
        CLIPTextConfig,
        CLIPTextModelWithProjection,
        CLIPTokenizer,
        T5Config,
        T5EncoderModel,
        T5Tokenizer,
    )

    torch.manual_seed(seed)
    tokenizer_files(path / "tokenizer")
    tokenizer_files(path / "tokenizer_2", pad="!")
    tokenizer, tokenizer_2 = (
        CLIPTokenizer.from_pretrained(path / name) for name in ("tokenizer", "tokenizer_2")
    )
    clip: dict[str, Any] = {
        "vocab_size": len(tokenizer),
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 3,
        "num_attention_heads": 1,
        "bos_token_id": 0,
        "eos_token_id": 2,
        "pad_token_id": 1,
    }
    text_config: dict[str, Any] = {**clip, "hidden_act": "quick_gelu", "projection_dim": 64, **(text or {})}
    text_config_2: dict[str, Any] = {  # of another width: by that the reference tells them apart
        **clip,
        "hidden_size": 80,
        "hidden_act": "gelu",
        "projection_dim": 32,
        **(text_2 or {}),
    }
    pooled = text_config["projection_dim"] + text_config_2["projection_dim"]
    transformer_config: dict[str, Any] = {
        "sample_size": 16,
        "patch_size": 2,
        "in_channels": 16,
        "out_channels": 16,
        "num_layers": 3,
        "num_attention_heads": 2,
        "attention_head_dim": 64,
        "joint_attention_dim": 160,  # more than the widths of both CLIP models
        "caption_projection_dim": 128,
        "pooled_projection_dim": pooled,
        "pos_embed_max_size": 16,
        **transformer,
    }
    vae_config: dict[str, Any] = {
        "sample_size": 128,
        "latent_channels": 16,
        "scaling_factor": 1.5305,
        "shift_factor": 0.0609,
        "block_out_channels": (32, 32, 64, 64),
        "down_block_types": ("DownEncoderBlock2D",) * 4,
        "up_block_types": ("UpDecoderBlock2D",) * 4,
        "use_quant_conv": False,
        "use_post_quant_conv": False,
        **(vae or {}),
    }
    scheduler_config: dict[str, Any] = {"shift": 3.0, **(scheduler or {})}
    clip_l = unlike_at_start(CLIPTextModelWithProjection(CLIPTextConfig(**text_config)))
    if text_config["projection_dim"] == text_config["hidden_size"]:
        nn.init.eye_(clip_l.text_projection.weight)
    parts: dict[str, Any] = {
        "transformer": unlike_at_start(SD3Transformer2DModel(**transformer_config)),
        "scheduler": FlowMatchEulerDiscreteScheduler(**scheduler_config),
        "vae": unlike_at_start(AutoencoderKL(**vae_config)),
        "text_encoder": clip_l,
        "tokenizer": tokenizer,
        "text_encoder_2": unlike_at_start(CLIPTextModelWithProjection(CLIPTextConfig(**text_config_2))),
        "tokenizer_2": tokenizer_2,
        "text_encoder_3": None,
        "tokenizer_3": None,
    }
    if t5 is not False:
        t5_tokenizer_files(path / "tokenizer_3")
        tokenizer_3 = T5Tokenizer.from_pretrained(path / "tokenizer_3")
        t5_config: dict[str, Any] = {
            "vocab_size": len(tokenizer_3),
            "d_model": transformer_config["joint_attention_dim"],
            "d_kv": 16,
            "d_ff": 96,
            "num_layers": 2,
            "num_heads": 4,
            "feed_forward_proj": "gated-gelu",
            **(t5 if isinstance(t5, Mapping) else {}),
        }
        encoder = T5EncoderModel(T5Config(**t5_config))
        parts |= {"text_encoder_3": unlike_at_start(encoder), "tokenizer_3": tokenizer_3}
    StableDiffusion3Pipeline(**parts).save_pretrained(path)
    return path


def t5_tokenizer_files(path: Path) -> Path:
    """A Unigram tokenizer in T5's form that knows `WORDS` whole and spells other ASCII → `path`."""
    from transformers import T5Tokenizer

    pieces = {"<pad>": 0.0, "</s>": 0.0, "<unk>": 0.0, "▁": -8.0}
    pieces |= {f"▁{word}": -4.0 for word in WORDS}
    pieces |= {chr(code): -12.0 for code in range(ord("!"), ord("~") + 1)}
    T5Tokenizer(vocab=list(pieces.items()), extra_ids=0, model_max_length=512).save_pretrained(path)
    return path


def sd3_single_file(
    path: Path,
    folder: Path,
    *,
    clips: bool = True,
    t5: str | None = None,
    dtype: torch.dtype = torch.float32,
) -> Path:
    """The weights of a hub-layout folder under the names of the original release → the file `path`.

    `clips` and `t5` (a dtype's name) say which text encoders it holds; T5 has a dtype of its own, as in the
    published files, "float8_e4m3fn" in the smallest that has it.
    """

    def read(component: str, file: str = "model") -> dict[str, Tensor]:
        return load_file(folder / component / f"{file}.safetensors")

    plain = "diffusion_pytorch_model"
    tensors = {
        **original_mmdit(read("transformer", plain), config_of(folder, "transformer")),
        **original_vae(read("vae", plain), config_of(folder, "vae")),
    }
    for name, component in (("clip_l", "text_encoder"), ("clip_g", "text_encoder_2")):
        if clips:
            clip = read(component)
            if name == "clip_l":  # published without: what its identity is multiplied by stays what it is
                del clip["text_projection.weight"]
            tensors |= {f"text_encoders.{name}.transformer.{key}": value for key, value in clip.items()}
    tensors = {name: tensor.to(dtype).contiguous() for name, tensor in tensors.items()}
    if t5:
        encoder = read("text_encoder_3")
        encoder["encoder.embed_tokens.weight"] = encoder["shared.weight"].clone()  # published twice
        tensors |= {
            f"text_encoders.t5xxl.transformer.{key}": value.to(getattr(torch, t5))
            for key, value in encoder.items()
        }
    save_file(tensors, path)
    return path


def original_mmdit(tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> dict[str, Tensor]:
    """The original has queries, keys and values in one matrix, a block for the picture (x) and one for the
    text (context) in each layer, and shift before scale in every modulation."""
    out = {"pos_embed": tensors["pos_embed.pos_embed"]}

    def copy(ours: str, theirs: str) -> None:
        out.update({f"{theirs}.{kind}": tensors[f"{ours}.{kind}"] for kind in ("weight", "bias")})

    def stack(ours: list[str], theirs: str) -> None:
        for kind in ("weight", "bias"):
            out[f"{theirs}.{kind}"] = torch.cat([tensors[f"{each}.{kind}"] for each in ours])

    def shift_first(ours: str, theirs: str) -> None:
        for kind in ("weight", "bias"):
            scale, shift = tensors[f"{ours}.{kind}"].chunk(2)
            out[f"{theirs}.{kind}"] = torch.cat([shift, scale])

    def norms(ours: str, theirs: str) -> None:
        for letter in "qk":
            if f"{ours}_{letter}.weight" in tensors:
                out[f"{theirs}.ln_{letter}.weight"] = tensors[f"{ours}_{letter}.weight"]

    copy("pos_embed.proj", "x_embedder.proj")
    for ours, theirs in (("timestep_embedder", "t_embedder"), ("text_embedder", "y_embedder")):
        copy(f"time_text_embed.{ours}.linear_1", f"{theirs}.mlp.0")
        copy(f"time_text_embed.{ours}.linear_2", f"{theirs}.mlp.2")
    copy("context_embedder", "context_embedder")
    for index in range(config["num_layers"]):
        block, joint = f"transformer_blocks.{index}", f"joint_blocks.{index}"
        x, context = f"{joint}.x_block", f"{joint}.context_block"
        copy(f"{block}.norm1.linear", f"{x}.adaLN_modulation.1")
        for attention in ("attn", "attn2"):
            if f"{block}.{attention}.to_q.weight" in tensors:
                ours = f"{block}.{attention}"
                stack([f"{ours}.to_{letter}" for letter in "qkv"], f"{x}.{attention}.qkv")
                copy(f"{ours}.to_out.0", f"{x}.{attention}.proj")
                norms(f"{ours}.norm", f"{x}.{attention}")
        stack([f"{block}.attn.add_{letter}_proj" for letter in "qkv"], f"{context}.attn.qkv")
        norms(f"{block}.attn.norm_added", f"{context}.attn")
        copy(f"{block}.ff.net.0.proj", f"{x}.mlp.fc1")
        copy(f"{block}.ff.net.2", f"{x}.mlp.fc2")
        if index == config["num_layers"] - 1:  # no text comes out of the last: no gates, no more layers
            shift_first(f"{block}.norm1_context.linear", f"{context}.adaLN_modulation.1")
        else:
            copy(f"{block}.norm1_context.linear", f"{context}.adaLN_modulation.1")
            copy(f"{block}.attn.to_add_out", f"{context}.attn.proj")
            copy(f"{block}.ff_context.net.0.proj", f"{context}.mlp.fc1")
            copy(f"{block}.ff_context.net.2", f"{context}.mlp.fc2")
    shift_first("norm_out.linear", "final_layer.adaLN_modulation.1")
    copy("proj_out", "final_layer.linear")
    return {f"model.diffusion_model.{name}": tensor for name, tensor in out.items()}


CASCADE_PRIORS: dict[str, dict[str, Any]] = {
    "prior": {
        "conditioning_dim": 128,
        "block_out_channels": (128, 128),
        "num_attention_heads": (2, 2),
        "down_num_layers_per_block": (1, 2),
        "up_num_layers_per_block": (2, 1),
    },
    "prior_lite": {
        "conditioning_dim": 64,
        "block_out_channels": (64, 64),
        "num_attention_heads": (1, 1),
        "down_num_layers_per_block": (1, 1),
        "up_num_layers_per_block": (1, 1),
    },
}
CASCADE_DECODERS: dict[str, dict[str, Any]] = {
    "decoder": {
        "block_out_channels": (32, 48, 128, 64),
        "num_attention_heads": (0, 0, 2, 1),
        "down_num_layers_per_block": (1, 2, 1, 2),
        "up_num_layers_per_block": (1, 1, 2, 1),
        "up_blocks_repeat_mappers": (3, 1, 2, 2),
    },
    "decoder_lite": {
        "block_out_channels": (32, 32, 64, 64),
        "num_attention_heads": (0, 0, 1, 1),
        "down_num_layers_per_block": (1, 1, 1, 1),
        "up_num_layers_per_block": (1, 1, 1, 1),
        "up_blocks_repeat_mappers": (2, 1, 1, 1),
    },
}


def cascade_folder(
    path: Path,
    *,
    seed: int = 0,
    prior: Mapping[str, Any] | None = None,
    decoder: Mapping[str, Any] | None = None,
    vqgan: Mapping[str, Any] | None = None,
    lite: bool = True,
    image_encoder: bool = True,
) -> Path:
    """A Stable Cascade checkpoint of random weights in hub layout, float32: its two halves → `path`.

    `prior`, `decoder` and `vqgan` override the configs of the full networks. Both sizes of Stages C and B are
    there, unless `lite` is False. Without overrides, what single files cannot tell is as published.
    """
    from diffusers import DDPMWuerstchenScheduler
    from diffusers.models.unets.unet_stable_cascade import StableCascadeUNet
    from diffusers.pipelines.deprecated.wuerstchen import PaellaVQModel
    from transformers import (
        CLIPTextConfig,
        CLIPTextModelWithProjection,
        CLIPTokenizer,
        CLIPVisionConfig,
        CLIPVisionModelWithProjection,
    )

    torch.manual_seed(seed)
    first, second = path / "stable-cascade-prior", path / "stable-cascade"
    tokenizer_files(first / "tokenizer")
    tokenizer = CLIPTokenizer.from_pretrained(first / "tokenizer")

    def save(network: nn.Module, folder: Path) -> None:
        unlike_at_start(network).save_pretrained(folder)

    for name, config in CASCADE_PRIORS.items():
        if lite or not name.endswith("_lite"):
            common: dict[str, Any] = {
                "clip_text_in_channels": 64,
                "clip_text_pooled_in_channels": 32,
                "clip_image_in_channels": 48,
                "switch_level": (False,),
            }
            overrides = prior if name == "prior" and prior else {}
            save(StableCascadeUNet(**{**common, **config, **overrides}), first / name)
    for name, config in CASCADE_DECODERS.items():
        if lite or not name.endswith("_lite"):
            residual, timestep, attention = (
                "SDCascadeResBlock",
                "SDCascadeTimestepBlock",
                "SDCascadeAttnBlock",
            )
            common = {
                "in_channels": 4,
                "out_channels": 4,
                "patch_size": 2,
                "conditioning_dim": 64,
                "down_blocks_repeat_mappers": (1, 1, 1, 1),
                "block_types_per_layer": (
                    *((residual, timestep),) * 2,
                    *((residual, timestep, attention),) * 2,
                ),
                "clip_text_pooled_in_channels": 32,
                "effnet_in_channels": 16,
                "pixel_mapper_in_channels": 3,
                "dropout": (0.0, 0.0, 0.1, 0.1),
                "timestep_conditioning_type": ("sca",),
            }
            overrides = decoder if name == "decoder" and decoder else {}
            save(StableCascadeUNet(**{**common, **config, **overrides}), second / name)
    stage_a: dict[str, Any] = {"embed_dim": 16, "bottleneck_blocks": 2, "num_vq_embeddings": 32}
    save(PaellaVQModel(**{**stage_a, **(vqgan or {})}), second / "vqgan")
    text_config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=1,
        hidden_act="gelu",
        projection_dim=32,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    save(CLIPTextModelWithProjection(text_config), first / "text_encoder")
    for part in ("text_encoder", "tokenizer"):
        shutil.copytree(first / part, second / part)
    if image_encoder:
        vision_config = CLIPVisionConfig(
            hidden_size=64,
            intermediate_size=96,
            num_hidden_layers=2,
            num_attention_heads=1,
            image_size=28,
            patch_size=14,
            projection_dim=48,
        )
        save(CLIPVisionModelWithProjection(vision_config), first / "image_encoder")
        (first / "feature_extractor").mkdir()
        (first / "feature_extractor/preprocessor_config.json").write_text(
            json.dumps(
                {
                    "image_processor_type": "CLIPImageProcessor",
                    "size": {"shortest_edge": 28},
                    "crop_size": {"height": 28, "width": 28},
                    "resample": 3,
                }
            )
        )
    library = "stable_cascade"
    index = {
        "prior": [library, "StableCascadeUNet"],
        "text_encoder": ["transformers", "CLIPTextModelWithProjection"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "scheduler": ["diffusers", "DDPMWuerstchenScheduler"],
        "image_encoder": ["transformers", "CLIPVisionModelWithProjection"] if image_encoder else [None, None],
        "feature_extractor": ["transformers", "CLIPImageProcessor"] if image_encoder else [None, None],
    }
    _write_index(first, "StableCascadePriorPipeline", index)
    for name in ("prior", "image_encoder", "feature_extractor"):
        index.pop(name)
    index |= {"decoder": [library, "StableCascadeUNet"], "vqgan": ["wuerstchen", "PaellaVQModel"]}
    _write_index(second, "StableCascadeDecoderPipeline", index)
    for half in (first, second):
        DDPMWuerstchenScheduler().save_pretrained(half / "scheduler")
    return path


def _write_index(folder: Path, pipeline: str, components: Mapping[str, Any]) -> None:
    index = {"_class_name": pipeline, "_diffusers_version": "0.27.0.dev0", **components}
    (folder / "model_index.json").write_text(json.dumps(index), encoding="utf-8")


def cascade_single_files(
    path: Path, folder: Path, *, dtype: torch.dtype = torch.float32, suffix: str = ""
) -> Path:
    """The weights of a hub-layout checkpoint in the original release's files, `suffix` to the stages' names
    → `path`, which also gets the text encoder, with its config and tokenizer, as published beside them."""
    path.mkdir(parents=True, exist_ok=True)
    plain = "diffusion_pytorch_model.safetensors"
    first, second = folder / "stable-cascade-prior", folder / "stable-cascade"
    files = {
        "stage_c": (first / "prior" / plain, original_stage),
        "stage_c_lite": (first / "prior_lite" / plain, original_stage),
        "stage_b": (second / "decoder" / plain, original_stage),
        "stage_b_lite": (second / "decoder_lite" / plain, original_stage),
        "stage_a": (second / "vqgan" / plain, original_stage_a),
        "image_encoder": (first / "image_encoder/model.safetensors", dict),
    }
    for name, (source, rename) in files.items():
        if source.is_file():
            tensors = {
                key: tensor.to(dtype) if tensor.is_floating_point() else tensor
                for key, tensor in rename(load_file(source)).items()
            }
            save_file(tensors, path / f"{name}{suffix}.safetensors")
    shutil.copytree(first / "text_encoder", path / "text_encoder", dirs_exist_ok=True)
    shutil.copytree(first / "tokenizer", path / "tokenizer", dirs_exist_ok=True)
    return path


def original_stage(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The original's attention is torch's own module, and Stage B has one mapper of text, for the pooled."""
    out: dict[str, Tensor] = {}
    stage_b = "effnet_mapper.0.weight" in tensors
    for name, tensor in tensors.items():
        head, _, kind = name.rpartition(".")
        block, _, layer = head.rpartition(".attention.")
        if layer == "to_q":
            rows = [tensors[f"{block}.attention.{each}.{kind}"] for each in ("to_q", "to_k", "to_v")]
            out[f"{block}.attention.attn.in_proj_{kind}"] = torch.cat(rows)
        elif layer == "to_out.0":
            out[f"{block}.attention.attn.out_proj.{kind}"] = tensor
        elif stage_b and head == "clip_txt_pooled_mapper":
            out[f"clip_mapper.{kind}"] = tensor
        elif layer not in ("to_k", "to_v"):
            out[name] = tensor
    return out


def original_stage_a(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The original's codebook has the averages of its training beside it."""
    out = dict(tensors)
    codebook = out.pop("vquantizer.embedding.weight")
    return out | {
        "vquantizer.codebook.weight": codebook,
        "vquantizer.ema_element_count": torch.ones(len(codebook)),
        "vquantizer.ema_weight_sum": codebook + 1,
    }
