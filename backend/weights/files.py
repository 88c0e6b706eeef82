"""What lies in checkpoint files: their headers, read without torch, and their tensors, mapped into memory."""

from __future__ import annotations

import json
import math
import pickle
import struct
from collections.abc import Container, Iterable, Iterator, Mapping
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from backend.errors import CheckpointError
from backend.weights import flax

if TYPE_CHECKING:
    from torch import Tensor

SINGLE = (".safetensors", ".ckpt", ".bin", ".pt", ".pth")  # what may hold a whole checkpoint
WEIGHTS = (*SINGLE, flax.SUFFIX)
HEADED = (".safetensors", flax.SUFFIX)  # names and shapes are told without reading, and without torch
Shapes = dict[str, tuple[int, ...]]  # by tensor name

DTYPES = {  # as safetensors names them
    "F32": "float32",
    "BF16": "bfloat16",
    "F16": "float16",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
}
MAX_HEADER = 100_000_000  # bytes: the limit of the safetensors format


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object. Raises CheckpointError for a missing or broken file, and for NaN and infinity in it."""

    def refuse(constant: str) -> NoReturn:
        raise ValueError(f"{constant} is not a number a config can hold")

    def finite(text: str) -> float:
        return float(text) if math.isfinite(float(text)) else refuse(text)

    try:
        text = path.read_text(encoding="utf-8")
        value = json.loads(text, parse_constant=refuse, parse_float=finite)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror or error}") from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} must hold a JSON object, but holds a {type(value).__name__}")
    return value


def shapes(path: Path) -> Shapes:
    """The name and shape of every tensor in a checkpoint file; only a legacy pickle has to be opened for it.

    Raises CheckpointError for a file that is missing, empty, truncated or something else.
    """
    return {name: shape for name, (shape, _) in _header(path).items()}


def precision(path: Path, names: Container[str | None] | None = None) -> str:
    """The dtype that most of the file's numbers, or of those in the tensors `names`, are kept in: "float32",
    "bfloat16", "float16" or another."""
    sizes: dict[str, int] = {}
    for name, (shape, dtype) in _header(path).items():
        if names is None or name in names:
            sizes[dtype] = sizes.get(dtype, 0) + math.prod(shape)
    return max(sizes, key=lambda dtype: sizes[dtype])


def _header(path: Path) -> Mapping[str, tuple[tuple[int, ...], str]]:
    """The shape and dtype of every tensor."""
    try:
        seen = path.stat()
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror or error}") from error
    return _read_header(path, seen.st_size, seen.st_mtime_ns)


@lru_cache(maxsize=64)  # every plan asks for those of all components
def _read_header(path: Path, size: int, changed_ns: int) -> Mapping[str, tuple[tuple[int, ...], str]]:
    if path.suffix not in HEADED:
        return {
            name: (tuple(tensor.shape), str(tensor.dtype).removeprefix("torch."))
            for name, tensor in _pickled(path).items()
        }
    try:
        with path.open("rb") as file:
            start = file.read(8)
            length = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
            text = file.read(length) if length <= MAX_HEADER else b""
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror or error}") from error
    if size == 0:
        raise CheckpointError(f"{path} is empty")
    if path.suffix == flax.SUFFIX:
        return _flax_header(path, start)
    if not text.startswith(b"{"):
        raise CheckpointError(f"{path} is not a safetensors file{_what_else(start)}")
    try:
        if len(text) < length:
            raise CheckpointError(
                f"{path} is truncated: its header takes {length} bytes, and {len(text)} are there"
            )
        entries = json.loads(text)
        entries.pop("__metadata__", None)
        end = 8 + length + max((entry["data_offsets"][1] for entry in entries.values()), default=0)
        out = {
            name: (tuple(int(n) for n in entry["shape"]), DTYPES.get(entry["dtype"], str(entry["dtype"])))
            for name, entry in entries.items()
        }
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{path} is not a safetensors file: its header cannot be read") from error
    if size < end:
        raise CheckpointError(
            f"{path} is truncated: {end} bytes are due, and {size} are there; download it again"
        )
    if not out:
        raise CheckpointError(f"{path} holds no tensors")
    return out


def _flax_header(path: Path, start: bytes) -> Mapping[str, tuple[tuple[int, ...], str]]:
    if not flax.begins(start):
        raise CheckpointError(f"{path} is not a Flax file{_what_else(start)}")
    out = {name: (array.shape, array.dtype) for name, array in flax.index(path).items()}
    if not out:
        raise CheckpointError(f"{path} holds no tensors")
    return out


def metadata(path: Path) -> dict[str, str]:
    """What a safetensors file says of itself, {} of others. Raises CheckpointError for a damaged one."""
    if path.suffix != ".safetensors":
        return {}
    shapes(path)  # says what is wrong
    with path.open("rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        told = json.loads(file.read(length)).get("__metadata__")
    return {str(key): str(value) for key, value in told.items()} if isinstance(told, dict) else {}


class Tensors(Mapping[str, "Tensor"]):
    """The tensors of safetensors files as one mapping.

    A tensor is a view of the mapped file: asking for it reads and copies nothing. It is not to be written to.
    """

    def __init__(self, paths: Iterable[Path]) -> None:
        from safetensors import SafetensorError, safe_open

        self._files: dict[str, Any] = {}
        for path in paths:
            shapes(path)  # says what is wrong in words of our own
            try:
                file = safe_open(path, framework="pt", device="cpu")
            except (SafetensorError, OSError) as error:
                raise CheckpointError(f"{path} is not a valid safetensors file: {error}") from error
            for name in file.keys():  # noqa: SIM118 (it is no dict)
                if name in self._files:
                    raise CheckpointError(
                        f"{path} repeats the tensor {name} of another part of the checkpoint"
                    )
                self._files[name] = file

    def __getitem__(self, name: str) -> Tensor:
        return self._files[name].get_tensor(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._files)

    def __len__(self) -> int:
        return len(self._files)

    def __contains__(self, name: object) -> bool:
        return name in self._files  # the mixin's would fetch the tensor


def open_tensors(paths: Iterable[Path]) -> Mapping[str, Tensor]:
    """The tensors of the files, by name, mapped and not read. Raises CheckpointError for a damaged file."""
    paths = list(paths)
    if all(path.suffix == ".safetensors" for path in paths):
        return Tensors(paths)
    if all(path.suffix == flax.SUFFIX for path in paths):
        for path in paths:
            shapes(path)  # says what is wrong in words of our own
        return flax.Arrays(paths)
    return {name: tensor for path in paths for name, tensor in _pickled(path).items()}


def _pickled(path: Path) -> dict[str, Tensor]:
    """The tensors of a legacy pickle."""
    import torch

    content = unpickled(path)
    if isinstance(content, dict) and isinstance(content.get("state_dict"), dict):
        content = content["state_dict"]
    tensors = (
        {k: v for k, v in content.items() if isinstance(v, torch.Tensor)} if isinstance(content, dict) else {}
    )
    if not tensors:
        raise CheckpointError(f"{path} holds no tensors")
    return tensors


def unpickled(path: Path) -> Any:
    """What lies in a legacy pickle, through torch's reader that runs no code. Raises CheckpointError."""
    if path.is_file() and path.stat().st_size == 0:
        raise CheckpointError(f"{path} is empty")
    try:
        return _load_pickle(path)
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"{path} is a pickle that holds more than weights, so reading it could run somebody's code: "
            "it was not read. Take the .safetensors version of it"
        ) from error
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror or error}") from error
    except (RuntimeError, EOFError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path} is damaged, or no checkpoint: {str(error).splitlines()[0]}") from error


def _load_pickle(path: Path) -> Any:
    import torch

    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except RuntimeError as error:
        if "mmap can only be used" not in str(error):
            raise
        return torch.load(path, map_location="cpu", weights_only=True)  # the format before torch 1.6


def _what_else(start: bytes) -> str:
    kinds = {
        b"version": ": it is the pointer that git keeps in place of a large file; download the file itself",
        b"PK\x03\x04": ": it is a zip, perhaps a pickled checkpoint under a wrong name",
        b"\x80": ": it is a pickled checkpoint under a wrong name",
        b"<": ": it is a web page; download the file itself",
    }
    return next((text for magic, text in kinds.items() if start.startswith(magic)), "")
