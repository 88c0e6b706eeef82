"""A Stable Cascade checkpoint, both its halves in hub layout, of the published sizes and random weights."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModelWithProjection

from backend.cascade.keys import PUBLISHED
from backend.cascade.stage_a import StageA, StageAConfig
from backend.cascade.unet import UNet, UNetConfig
from benchmarks.checkpoint import write_json, write_tokenizer

PRIOR, DECODER = "stable-cascade-prior", "stable-cascade"
NETWORKS = {
    "prior": PRIOR, "prior_lite": PRIOR, "decoder": DECODER, "decoder_lite": DECODER, "vqgan": DECODER,
    "text_encoder": PRIOR,
}  # fmt: skip
TINY: dict[str, dict[str, Any]] = {
    "prior": {
        "conditioning_dim": 64, "block_out_channels": [64, 64], "num_attention_heads": [2, 2],
        "down_num_layers_per_block": [1, 1], "up_num_layers_per_block": [1, 1],
        "clip_text_in_channels": 64, "clip_text_pooled_in_channels": 64,
    },
    "decoder": {
        "conditioning_dim": 64, "block_out_channels": [32, 32, 64, 64], "num_attention_heads": [0, 0, 2, 2],
        "down_num_layers_per_block": [1, 1, 1, 1], "up_num_layers_per_block": [1, 1, 1, 1],
        "clip_text_pooled_in_channels": 64,
    },
    "vqgan": {"embed_dim": 32, "bottleneck_blocks": 2, "num_vq_embeddings": 64},
    "text_encoder": {
        "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2,
        "projection_dim": 64,
    },
}  # fmt: skip


def build(folder: Path, *, tiny: bool = False, dtype: torch.dtype = torch.bfloat16) -> Path:
    """Write the checkpoint (15.2 GB in bfloat16; `tiny` 17 MB) to `folder`, what is not there already."""
    if not (folder / DECODER / "model_index.json").exists():
        shutil.rmtree(folder, ignore_errors=True)
    torch.manual_seed(0)
    for name, half in NETWORKS.items():
        if (folder / half / name / "config.json").exists():
            continue
        config = {**PUBLISHED[name], **(TINY[name.removesuffix("_lite")] if tiny else {})}
        if levels := config.get("block_out_channels"):  # only the reference reads it, and does not default
            config["dropout"] = [0.1] * len(levels)
        stem = "model" if name == "text_encoder" else "diffusion_pytorch_model"
        tensors = random_tensors(network(name, config), dtype)
        (folder / half / name).mkdir(parents=True, exist_ok=True)
        save_file(tensors, folder / half / name / f"{stem}.safetensors", {"format": "pt"})
        write_json(folder / half / name / "config.json", config)  # last: what has it is complete
    write_tokenizer(folder / PRIOR / "tokenizer")
    for half, pipeline in ((PRIOR, "Prior"), (DECODER, "Decoder")):
        write_json(folder / half / "scheduler" / "scheduler_config.json", PUBLISHED["scheduler"])
        index = {"_class_name": f"StableCascade{pipeline}Pipeline"}
        write_json(folder / half / "model_index.json", index)  # last: what has both is complete
    return folder


def network(name: str, config: Mapping[str, Any]) -> nn.Module:
    """Without memory for its weights."""
    with torch.device("meta"):
        if name == "text_encoder":
            return CLIPTextModelWithProjection(CLIPTextConfig(**config))
        if name == "vqgan":
            return StageA(StageAConfig.from_dict(config))
        return UNet(UNetConfig.from_dict(config))


def random_tensors(module: nn.Module, dtype: torch.dtype) -> dict[str, Tensor]:
    """Weights that keep activations near their size, made in `dtype` at once."""
    return {name: random_tensor(name, meta, dtype) for name, meta in module.state_dict().items()}


def random_tensor(name: str, meta: Tensor, dtype: torch.dtype) -> Tensor:
    if not meta.is_floating_point():
        return torch.zeros(meta.shape, dtype=meta.dtype)
    if "norm" in name or name.endswith("running_var"):
        return torch.full(meta.shape, float(not name.endswith("bias")), dtype=dtype)
    fan_in = meta[0].numel() if meta.ndim > 1 else 100
    return torch.empty(meta.shape, dtype=dtype).normal_(0, 0.5 * fan_in**-0.5)


if __name__ == "__main__":
    build(Path(sys.argv[1]), tiny=sys.argv[2] == "tiny", dtype=getattr(torch, sys.argv[3]))
