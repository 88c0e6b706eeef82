"""Checkpoints in Flax's files, for tests: written here byte by byte, under names that are derived here, too.

The names follow the published networks of Flax: a layer in a list is `list_0`, but for the text encoder's,
whose lists are maps with numbers for keys; the VAE's attention has its first names; what is a `weight`
elsewhere is a norm's `scale`, a table's `embedding`, and else a `kernel`, whose axes lie the other way round.
"""

from __future__ import annotations

import shutil
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

FILES = {
    "unet": "diffusion_flax_model.msgpack",
    "vae": "diffusion_flax_model.msgpack",
    "text_encoder": "flax_model.msgpack",
}
CHUNK = 2**30  # bytes of an array that are written in one piece


def flax_folder(folder: Path, path: Path, *, dtype: torch.dtype = torch.float32) -> Path:
    """The checkpoint of Stable Diffusion 1.x in `folder` with Flax's files in place of its own → `path`."""
    shutil.copytree(folder, path)
    for component, file in FILES.items():
        (weights,) = (path / component).glob("*.safetensors")
        tensors = {name: tensor.to(dtype) for name, tensor in load_file(weights).items()}
        weights.unlink()
        (path / component / file).write_bytes(packed(flax_tree(component, tensors)))
    return path


def flax_tree(component: str, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for name, tensor in tensors.items():
        *path, last = name.split(".")
        if component == "text_encoder":
            path = ["text_model", *(part for part in path if part != "text_model")]
        else:
            path = in_lists(path)
        if component == "vae" and "attentions_0" in path:
            names = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out_0": "proj_attn"}
            path = [names.get(part, part) for part in path]
        place = tree
        for part in path:
            place = place.setdefault(part, {})
        if last == "weight" and tensor.ndim == 1:
            place["scale"] = tensor
        elif last == "weight" and path[-1] in ("token_embedding", "position_embedding"):
            place["embedding"] = tensor
        elif last == "weight":
            place["kernel"] = tensor.T if tensor.ndim == 2 else tensor.permute(2, 3, 1, 0)
        else:
            place[last] = tensor
    return tree


def in_lists(path: list[str]) -> list[str]:
    """("resnets", "0", "norm1") → ("resnets_0", "norm1")."""
    out: list[str] = []
    for part in path:
        if part.isdigit():
            out[-1] += f"_{part}"
        else:
            out.append(part)
    return out


def packed(value: Any, chunk: int = CHUNK) -> bytes:
    """As flax.serialization writes it; arrays of more than `chunk` bytes in pieces of that size."""
    match value:
        case dict():
            inner = b"".join(packed(key, chunk) + packed(each, chunk) for key, each in value.items())
            return sized(len(value), 0x80, 16, (None, 0xDE, 0xDF)) + inner
        case list() | tuple():
            inner = b"".join(packed(each, chunk) for each in value)
            return sized(len(value), 0x90, 16, (None, 0xDC, 0xDD)) + inner
        case str():
            return sized(len(value.encode()), 0xA0, 32, (0xD9, 0xDA, 0xDB)) + value.encode()
        case bytes():
            return sized(len(value), 0, 0, (0xC4, 0xC5, 0xC6)) + value
        case True | False | None:
            return {None: b"\xc0", False: b"\xc2", True: b"\xc3"}[value]
        case int():
            return (
                sized(value, 0, 128, (0xCC, 0xCD, 0xCE)) if value >= 0 else b"\xd3" + struct.pack(">q", value)
            )
        case float():
            return b"\xcb" + struct.pack(">d", value)
        case Tensor():
            return packed_array(value, chunk)
    raise TypeError(value)


def packed_array(tensor: Tensor, chunk: int) -> bytes:
    if tensor.nbytes > chunk:
        pieces = tensor.reshape(-1).split(max(1, chunk // tensor.itemsize))
        return packed({
            "__msgpack_chunked_array__": True,
            "shape": {str(place): side for place, side in enumerate(tensor.shape)},
            "chunks": {str(place): piece for place, piece in enumerate(pieces)},
        })  # fmt: skip
    numbers = bytes(tensor.contiguous().reshape(-1).view(torch.uint8).numpy())
    return extension(1, packed((tuple(tensor.shape), str(tensor.dtype).removeprefix("torch."), numbers)))


def extension(kind: int, content: bytes) -> bytes:
    fixed = {1: b"\xd4", 2: b"\xd5", 4: b"\xd6", 8: b"\xd7", 16: b"\xd8"}.get(len(content))
    return (fixed or sized(len(content), 0, 0, (0xC7, 0xC8, 0xC9))) + bytes([kind]) + content


def sized(size: int, small: int, below: int, wide: tuple[int | None, int, int]) -> bytes:
    """The first bytes of a value: a small size is part of the first, others follow it in 1, 2 or 4."""
    if size < below:
        return bytes([small + size])
    one, two, four = wide
    if one is not None and size < 2**8:
        return bytes([one, size])
    return bytes([two]) + struct.pack(">H", size) if size < 2**16 else bytes([four]) + struct.pack(">I", size)
