"""A Stable Diffusion 3 medium checkpoint in hub layout, of the published sizes and random weights."""

from __future__ import annotations

import json
import shutil
import string
import struct
import sys
from collections.abc import Callable, Mapping
from functools import partial
from itertools import accumulate, islice, product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModelWithProjection, T5Config, T5EncoderModel, T5Tokenizer

from backend.nn.autoencoder import Autoencoder, AutoencoderConfig
from backend.sd3.keys import PUBLISHED
from backend.sd3.mmdit import MMDiT, MMDiTConfig, positions
from benchmarks.checkpoint import write_json, write_tokenizer

INDEX: dict[str, Any] = {
    "_class_name": "StableDiffusion3Pipeline",
    "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
    "text_encoder": ["transformers", "CLIPTextModelWithProjection"],
    "text_encoder_2": ["transformers", "CLIPTextModelWithProjection"],
    "text_encoder_3": ["transformers", "T5EncoderModel"],
    "tokenizer": ["transformers", "CLIPTokenizer"],
    "tokenizer_2": ["transformers", "CLIPTokenizer"],
    "tokenizer_3": ["transformers", "T5Tokenizer"],
    "transformer": ["diffusers", "SD3Transformer2DModel"],
    "vae": ["diffusers", "AutoencoderKL"],
}
NETWORKS: dict[str, Callable[[Mapping[str, Any]], nn.Module]] = {
    "transformer": lambda config: MMDiT(MMDiTConfig.from_dict(config)),
    "vae": lambda config: Autoencoder(AutoencoderConfig.from_dict(config)),
    "text_encoder": lambda config: CLIPTextModelWithProjection(CLIPTextConfig(**config)),
    "text_encoder_2": lambda config: CLIPTextModelWithProjection(CLIPTextConfig(**config)),
    "text_encoder_3": lambda config: T5EncoderModel(T5Config(**config)),
}
CLIP: dict[str, Any] = {"model_type": "clip_text_model", "bos_token_id": 49406, "eos_token_id": 49407}
# What the reference needs to be told besides.
STATED: dict[str, dict[str, Any]] = {
    "transformer": {},
    "vae": {
        "_class_name": "AutoencoderKL",
        "down_block_types": ["DownEncoderBlock2D"] * 4,
        "up_block_types": ["UpDecoderBlock2D"] * 4,
    },
    "text_encoder": CLIP,
    "text_encoder_2": CLIP,
    "text_encoder_3": {"model_type": "t5"},
}
TINY: dict[str, dict[str, Any]] = {
    "transformer": {
        "sample_size": 8, "num_layers": 2, "num_attention_heads": 2, "attention_head_dim": 32,
        "joint_attention_dim": 128, "caption_projection_dim": 64, "pooled_projection_dim": 96,
        "pos_embed_max_size": 96,
    },
    "vae": {"block_out_channels": [32, 32, 64, 64], "sample_size": 64},
    "text_encoder": {
        "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2,
        "projection_dim": 32,
    },
    "text_encoder_2": {
        "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2,
        "projection_dim": 64,
    },
    "text_encoder_3": {"d_model": 128, "d_kv": 32, "d_ff": 256, "num_layers": 2, "num_heads": 4},
}  # fmt: skip
FIRST_SHARD = 0.525  # of T5: the first shard of the published release is the larger


def build(folder: Path, *, tiny: bool = False, dtype: torch.dtype = torch.bfloat16) -> Path:
    """Write the checkpoint (15.4 GB in bfloat16; `tiny` 37 MB) to `folder`, unless it is there already."""
    if (folder / "model_index.json").exists():
        return folder
    shutil.rmtree(folder, ignore_errors=True)
    torch.manual_seed(0)
    for name, make in NETWORKS.items():
        config = {**PUBLISHED[name], **STATED[name], **(TINY[name] if tiny else {})}
        write_json(folder / name / "config.json", config)
        with torch.device("meta"):
            tensors = make(config).state_dict()
        if name == "text_encoder_3":
            del tensors["encoder.embed_tokens.weight"]  # the same as `shared`
            write_shards(folder / name, tensors, dtype)
        else:
            stem = "model" if name.startswith("text_encoder") else "diffusion_pytorch_model"
            fixed = {"pos_embed.pos_embed": partial(position_table, config)} if name == "transformer" else {}
            write_tensors(folder / name / f"{stem}.safetensors", tensors, dtype, fixed)
    write_tokenizer(folder / "tokenizer")
    write_tokenizer(folder / "tokenizer_2")
    write_t5_tokenizer(folder / "tokenizer_3")
    write_json(folder / "scheduler" / "scheduler_config.json", PUBLISHED["scheduler"])
    write_json(folder / "model_index.json", INDEX)  # last: what has it is complete
    return folder


def write_shards(folder: Path, tensors: Mapping[str, Tensor], dtype: torch.dtype) -> None:
    """Two files and the index that says which tensor is in which."""
    ends = list(accumulate(meta.numel() for meta in tensors.values()))
    first = {name for name, end in zip(tensors, ends, strict=True) if end <= FIRST_SHARD * ends[-1]}
    files = {name: f"model-0000{1 if name in first else 2}-of-00002.safetensors" for name in tensors}
    for file in sorted(set(files.values())):
        write_tensors(folder / file, {n: meta for n, meta in tensors.items() if files[n] == file}, dtype)
    size = {"total_size": ends[-1] * dtype.itemsize}
    write_json(folder / "model.safetensors.index.json", {"metadata": size, "weight_map": files})


def write_tensors(
    path: Path,
    tensors: Mapping[str, Tensor],
    dtype: torch.dtype,
    fixed: Mapping[str, Callable[[], Tensor]] | None = None,
) -> None:
    """A safetensors file of random weights, made and written one at a time, so that memory holds one."""
    code = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}[dtype]
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, meta in tensors.items():
        start, end = end, end + meta.numel() * dtype.itemsize
        header[name] = {"dtype": code, "shape": list(meta.shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # tensors begin where any processor can read them in place
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for name, meta in tensors.items():
            make = (fixed or {}).get(name) or partial(random_tensor, name, meta, dtype)
            file.write(make().to(dtype).contiguous().view(torch.uint8).numpy().data)


def position_table(config: Mapping[str, Any]) -> Tensor:
    made = MMDiTConfig.from_dict(config)
    return positions(made.width, made.pos_embed_max_size, made.sample_size // made.patch_size)[None]


def random_tensor(name: str, meta: Tensor, dtype: torch.dtype) -> Tensor:
    """Weights that keep activations near their size, made in `dtype` at once."""
    *_, layer, kind = name.split(".")
    if "norm" in layer:
        return torch.full(meta.shape, float(kind != "bias"), dtype=dtype)
    fan_in = meta[0].numel() if meta.ndim > 1 else 100
    return torch.empty(meta.shape, dtype=dtype).normal_(0, 0.5 * fan_in**-0.5)


def write_t5_tokenizer(folder: Path) -> None:
    """SentencePiece's form and T5's size: what is printable, and one to three letters that begin a word."""
    spelled = sorted({*string.printable} - {*string.whitespace})
    words = ("▁" + "".join(letters) for n in (1, 2, 3) for letters in product(string.ascii_letters, repeat=n))
    pieces = {"<pad>": 0.0, "</s>": 0.0, "<unk>": 0.0, "▁": -8.0, **dict.fromkeys(spelled, -12.0)}
    pieces |= dict.fromkeys(islice(words, 32_000 - len(pieces)), -10.0)
    T5Tokenizer(vocab=list(pieces.items()), extra_ids=100, model_max_length=512).save_pretrained(folder)


if __name__ == "__main__":
    build(Path(sys.argv[1]), tiny=sys.argv[2] == "tiny", dtype=getattr(torch, sys.argv[3]))
