"""A Stable Diffusion 1.5 checkpoint in hub layout, of the published sizes and random weights."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn

from backend.nn.autoencoder import Autoencoder, AutoencoderConfig
from backend.sd15.unet import UNet, UNetConfig

UNET: dict[str, Any] = {
    "_class_name": "UNet2DConditionModel",
    "act_fn": "silu",
    "attention_head_dim": 8,
    "block_out_channels": [320, 640, 1280, 1280],
    "center_input_sample": False,
    "cross_attention_dim": 768,
    "down_block_types": ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"],
    "downsample_padding": 1,
    "flip_sin_to_cos": True,
    "freq_shift": 0,
    "in_channels": 4,
    "layers_per_block": 2,
    "mid_block_scale_factor": 1,
    "norm_eps": 1e-05,
    "norm_num_groups": 32,
    "out_channels": 4,
    "sample_size": 64,
    "up_block_types": ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3,
}
VAE: dict[str, Any] = {
    "_class_name": "AutoencoderKL",
    "act_fn": "silu",
    "block_out_channels": [128, 256, 512, 512],
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "in_channels": 3,
    "latent_channels": 4,
    "layers_per_block": 2,
    "norm_num_groups": 32,
    "out_channels": 3,
    "sample_size": 512,
    "scaling_factor": 0.18215,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
}
TEXT: dict[str, Any] = {
    "vocab_size": 49408,
    "hidden_size": 768,
    "intermediate_size": 3072,
    "projection_dim": 768,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "max_position_embeddings": 77,
    "hidden_act": "quick_gelu",
    "bos_token_id": 49406,
    "eos_token_id": 49407,
    "pad_token_id": 1,
}
SCHEDULER: dict[str, Any] = {
    "_class_name": "PNDMScheduler",
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "clip_sample": False,
    "num_train_timesteps": 1000,
    "set_alpha_to_one": False,
    "skip_prk_steps": True,
    "steps_offset": 1,
}
INDEX: dict[str, Any] = {
    "_class_name": "StableDiffusionPipeline",
    "feature_extractor": [None, None],
    "requires_safety_checker": False,
    "safety_checker": [None, None],
    "scheduler": ["diffusers", "PNDMScheduler"],
    "text_encoder": ["transformers", "CLIPTextModel"],
    "tokenizer": ["transformers", "CLIPTokenizer"],
    "unet": ["diffusers", "UNet2DConditionModel"],
    "vae": ["diffusers", "AutoencoderKL"],
}
TINY = {
    "unet": {"block_out_channels": [32, 32, 64, 64], "cross_attention_dim": 64, "sample_size": 8},
    "vae": {"block_out_channels": [32, 32, 64, 64], "sample_size": 64},
    "text": {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2},
}


def build(folder: Path, *, tiny: bool = False, dtype: torch.dtype = torch.float32) -> Path:
    """Write the checkpoint (4.3 GB in float32; `tiny` 5 MB) to `folder`, unless it is there already."""
    if (folder / "model_index.json").exists():
        return folder
    shutil.rmtree(folder, ignore_errors=True)
    changes: Mapping[str, Mapping[str, Any]] = TINY if tiny else {"unet": {}, "vae": {}, "text": {}}
    torch.manual_seed(0)
    unet, vae = {**UNET, **changes["unet"]}, {**VAE, **changes["vae"]}
    _write_network(folder / "unet", UNet(UNetConfig.from_dict(unet)), unet, dtype)
    _write_network(folder / "vae", Autoencoder(AutoencoderConfig.from_dict(vae)), vae, dtype)
    _write_text_encoder(folder / "text_encoder", {**TEXT, **changes["text"]}, dtype)
    write_tokenizer(folder / "tokenizer")
    write_json(folder / "scheduler" / "scheduler_config.json", SCHEDULER)
    write_json(folder / "model_index.json", INDEX)  # last: what has it is complete
    return folder


def _write_network(folder: Path, network: nn.Module, config: Mapping[str, Any], dtype: torch.dtype) -> None:
    write_json(folder / "config.json", config)
    tensors = {name: tensor.to(dtype).contiguous() for name, tensor in network.state_dict().items()}
    save_file(tensors, folder / "diffusion_pytorch_model.safetensors", {"format": "pt"})


def _write_text_encoder(folder: Path, config: Mapping[str, Any], dtype: torch.dtype) -> None:
    from transformers import CLIPTextConfig, CLIPTextModel

    encoder = CLIPTextModel(CLIPTextConfig(**config))
    nn.Module.to(encoder, dtype)
    encoder.save_pretrained(folder)


def write_tokenizer(folder: Path) -> None:
    """CLIP's form and size: 256 bytes, each inside and at the end of a word, merges of pairs, two marks."""
    printable = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    letters = [chr(code) for code in printable] + [chr(256 + n) for n in range(256 - len(printable))]
    pairs = [(a, b) for a in letters for b in letters][: TEXT["vocab_size"] - 2 * len(letters) - 2]
    tokens = [*letters, *(f"{letter}</w>" for letter in letters), *(a + b for a, b in pairs)]
    tokens += ["<|startoftext|>", "<|endoftext|>"]
    write_json(folder / "vocab.json", {token: number for number, token in enumerate(tokens)})
    merges = ["#version: 0.2", *(f"{a} {b}" for a, b in pairs), ""]
    (folder / "merges.txt").write_text("\n".join(merges), encoding="utf-8")
    marks = dict.fromkeys(("eos_token", "unk_token", "pad_token"), "<|endoftext|>")
    config = {
        "tokenizer_class": "CLIPTokenizer",
        "model_max_length": 77,
        "bos_token": "<|startoftext|>",
        **marks,
    }
    write_json(folder / "tokenizer_config.json", config)


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=2), encoding="utf-8")


if __name__ == "__main__":
    build(Path(sys.argv[1]), tiny=sys.argv[2] == "tiny", dtype=getattr(torch, sys.argv[3]))
