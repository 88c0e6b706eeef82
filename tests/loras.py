"""Random LoRAs for the tests' checkpoints, in every layout that is read, written apart from the engine."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor


@dataclass(frozen=True)
class Pair:
    """A layer's matrices, those of a convolution with a kernel, and its alpha."""

    down: Tensor
    up: Tensor
    alpha: float

    @property
    def rank(self) -> int:
        return len(self.down)


Layers = dict[str, dict[str, Pair]]  # component → path of the layer, in the hub's names → pair


def weights_of(folder: Path) -> dict[str, Tensor]:
    """The tensors of a component's folder."""
    (path,) = list(folder.glob("*.safetensors"))
    return load_file(path)


def pairs(
    weights: Mapping[str, Tensor], ends: Iterable[str], *, rank: int = 4, seed: int = 0, scale: float = 0.15
) -> dict[str, Pair]:
    """Random pairs for the layers whose path ends with one of these; each alpha differs from the rank."""
    made: dict[str, Pair] = {}
    generator = torch.Generator().manual_seed(seed)
    for name in sorted(weights):
        path, _, kind = name.rpartition(".")
        if kind != "weight" or weights[name].ndim < 2 or not path.endswith(tuple(ends)):
            continue
        rows, *inner = weights[name].shape
        own = rank + len(made) % 2
        down = torch.randn(own, *inner, generator=generator) * scale
        up = torch.randn(rows, own, generator=generator) * scale
        made[path] = Pair(down, up, alpha=2.0 + len(made) % 3)
    assert made, f"no layer ends with {ends}"
    return made


def _up(pair: Pair) -> Tensor:
    return pair.up.view(*pair.up.shape, *[1] * (pair.down.ndim - 2)).contiguous()


def hub(path: Path, layers: Layers) -> Path:
    """As peft and the hub have it: lora_A, lora_B, and the settings among the file's metadata."""
    tensors: dict[str, Tensor] = {}
    settings: dict[str, object] = {}
    for component, found in layers.items():
        first = next(iter(found.values()))
        settings |= {
            f"{component}.r": first.rank,
            f"{component}.lora_alpha": first.alpha,
            f"{component}.rank_pattern": {k: p.rank for k, p in found.items() if p.rank != first.rank},
            f"{component}.alpha_pattern": {k: p.alpha for k, p in found.items() if p.alpha != first.alpha},
            f"{component}.target_modules": sorted(found),
        }
        for name, pair in found.items():
            tensors[f"{component}.{name}.lora_A.weight"] = pair.down.contiguous()
            tensors[f"{component}.{name}.lora_B.weight"] = _up(pair)
    save_file(tensors, path, metadata={"format": "pt", "lora_adapter_metadata": json.dumps(settings)})
    return path


def early(path: Path, layers: Layers) -> Path:
    """As the hub had it at first: attention processors' pairs, whose alpha is the rank."""
    tensors: dict[str, Tensor] = {}
    for component, found in layers.items():
        for name, pair in found.items():
            block, layer = name.replace(".to_out.0", ".to_out").rsplit(".", 1)
            start = f"{component}.{block}.processor.{layer}_lora"
            tensors[f"{start}.down.weight"] = pair.down.contiguous()
            tensors[f"{start}.up.weight"] = (pair.up * (pair.alpha / pair.rank)).contiguous()
    save_file(tensors, path)
    return path


TRAINERS = {
    "unet": "lora_unet_",
    "transformer": "lora_transformer_",
    "prior": "lora_prior_unet_",
    "text_encoder": "lora_te_",
}


def trainers(
    path: Path, layers: Layers, prefixes: Mapping[str, str] = TRAINERS, *, mid: bool = False
) -> Path:
    """As the popular trainers write it; with `mid`, convolutions are three each, as LoCon can have them."""
    tensors: dict[str, Tensor] = {}
    for component, found in layers.items():
        for name, pair in found.items():
            start = prefixes[component] + name.replace(".", "_")
            tensors[f"{start}.alpha"] = torch.tensor(pair.alpha)
            tensors[f"{start}.lora_up.weight"] = _up(pair)
            if mid and pair.down.ndim == 4 and pair.down.shape[2] > 1:
                # down = mid ∘ 1×1: the kernel of the pair over the identity of its inputs
                inner = pair.down.shape[1]
                tensors[f"{start}.alpha"] = torch.tensor(pair.alpha / pair.rank * inner)
                tensors[f"{start}.lora_mid.weight"] = pair.down.contiguous()
                tensors[f"{start}.lora_down.weight"] = torch.eye(inner)[..., None, None].contiguous()
            else:
                tensors[f"{start}.lora_down.weight"] = pair.down.contiguous()
    save_file(tensors, path)
    return path


def original_sd3(path: Path, layers: Layers) -> Path:
    """As trainers of Stable Diffusion 3's own code write it: queries, keys and values are one matrix, whose
    pair has those of the three in blocks."""
    parts = {"to_q": 0, "to_k": 1, "to_v": 2, "add_q_proj": 0, "add_k_proj": 1, "add_v_proj": 2}
    places = {
        "attn.to_out.0": "x_block_attn_proj",
        "attn.to_add_out": "context_block_attn_proj",
        "ff.net.0.proj": "x_block_mlp_fc1",
        "ff_context.net.2": "context_block_mlp_fc2",
        "norm1.linear": "x_block_adaLN_modulation_1",
    }
    tensors: dict[str, Tensor] = {}
    stacked: dict[str, list[Pair | None]] = {}
    for name, pair in layers["transformer"].items():
        _, block, rest = name.split(".", 2)
        start = f"lora_unet_joint_blocks_{block}_"
        last = rest.rpartition(".")[2]
        if last in parts:
            stream = "context" if last.startswith("add_") else "x"
            attention = rest.partition(".")[0]
            row = stacked.setdefault(f"{start}{stream}_block_{attention}_qkv", [None] * 3)
            row[parts[last]] = pair
        else:
            _pair(tensors, start + places[rest], pair.down, pair.up, pair.alpha)
    for start, three in stacked.items():
        full = [pair for pair in three if pair is not None]
        assert len(full) == 3, "a stacked matrix takes all three"
        up = torch.block_diag(*(pair.up * (pair.alpha / pair.rank) for pair in full))
        down = torch.cat([pair.down for pair in full])
        _pair(tensors, start, down, up, float(len(down)))
    save_file(tensors, path)
    return path


def original_cascade(path: Path, layers: Layers) -> Path:
    """As the original Stable Cascade release writes it: the attentions' layers by number, of each that of the
    result, then that of queries, keys and values in one; the alpha is 1."""
    blocks: dict[str, dict[str, Pair]] = {}
    for name, pair in layers["prior"].items():
        block, _, layer = name.partition(".attention.")
        blocks.setdefault(block, {})[layer] = pair
    tensors: dict[str, Tensor] = {
        "embeddings.embeddings": torch.zeros(2, 8),
        "embeddings.indices": torch.tensor([7, 49408]),
    }
    number = 0
    for block in sorted(
        blocks,
        key=lambda each: [
            part if part.isalpha() else int(part) for part in each.replace("_blocks", "").split(".")
        ],
    ):
        own = blocks[block]
        out, three = own["to_out.0"], [own[f"to_{letter}"] for letter in "qkv"]
        up = torch.block_diag(*(pair.up * (pair.alpha / pair.rank) for pair in three))
        down = torch.cat([pair.down for pair in three])
        for d, u in ((out.down, out.up * (out.alpha / out.rank)), (down, up)):
            tensors[f"weights.{number}.lora_down"] = d.contiguous()
            tensors[f"weights.{number}.lora_up"] = (u * len(d)).contiguous()
            number += 1
    save_file(tensors, path)
    return path


def _pair(tensors: dict[str, Tensor], start: str, down: Tensor, up: Tensor, alpha: float) -> None:
    tensors[f"{start}.lora_down.weight"] = down.contiguous()
    tensors[f"{start}.lora_up.weight"] = up.contiguous()
    tensors[f"{start}.alpha"] = torch.tensor(alpha)
