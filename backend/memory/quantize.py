"""Linear layers whose weights take 8 or 4 bits: LLM.int8 (arXiv:2208.07339), NF4 (arXiv:2305.14314), float8.

The weights are buffers like any others: they move between devices, are counted, and are made of one tensor a
piece at a time, so that nothing but the result and one piece is in memory. bitsandbytes computes with the
first two; it is imported when the first of them is made. Shapes: a weight is (N, K) for K features in, N out.
"""

from __future__ import annotations

import importlib.util
import logging
import math
import sys
from collections.abc import Callable, Generator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from backend.errors import InvalidRequest

PRECISIONS = ("int8", "nf4")
BLOCK = 64  # how many weights share a scale in nf4
PIECE = 1 << 20  # weights quantised at once: in the processor's cache, 4 times as fast as all of a layer
BAND = 1 << 22  # weights widened at once on a CPU: 1.1 times the time of a bf16 layer, whole 1.4 (512 tokens)
# A feature as large as this is multiplied unrounded: the paper's choice. With some 30 times as large as the
# others the cosine to the exact product is 0.99996, without 0.9986, and the time is the same.
OUTLIER = 6.0


def unavailable(precision: str, device: str) -> str | None:
    """Why weights of this precision cannot run on a device of this type; None where they can.

    Whether bitsandbytes works too shows when it is imported, which takes seconds: not here, before each run.
    """
    if precision not in PRECISIONS:
        return None
    if device not in ("cpu", "cuda"):
        return f"{precision} weights run on cpu and cuda, not on {device}"
    if importlib.util.find_spec("bitsandbytes") is None:
        return f"{precision} weights need the package bitsandbytes, which is not installed"
    return None


def fits(precision: str, shape: tuple[int, ...]) -> bool:
    """Whether a weight of this shape can be kept so: NF4 takes rows of whole blocks."""
    return precision == "int8" or (precision == "nf4" and shape[-1] % BLOCK == 0)


def quantised_bytes(precision: str, shape: tuple[int, ...]) -> int:
    """What such a weight takes with its scales, which are float32."""
    rows, columns = shape
    if precision == "int8":
        return rows * columns + rows * 4
    return rows * columns // 2 + rows * columns // BLOCK * 4


def quantised(precision: str, shape: tuple[int, ...], device: torch.device) -> Int8Linear | NF4Linear:
    """A linear layer without bias on `device`, with room for a weight of this shape, which `read` takes in.

    Of several layers, make all before the first reads: memory that passes then leaves no holes between
    lasting ones (7 MB a block of T5-XXL). Raises InvalidRequest where bitsandbytes cannot be had.
    """
    return {"int8": Int8Linear, "nf4": NF4Linear}[precision](shape, device)


class Int8Linear(nn.Module):
    """Features are rounded to 8 bits too, each token by its own scale, but for outliers."""

    def __init__(self, shape: tuple[int, ...], device: torch.device) -> None:
        super().__init__()
        self._round: Callable[..., Any] = bitsandbytes().functional.int8_vectorwise_quant
        self._multiply = torch.ops.bitsandbytes.int8_mixed_scaled_mm.default
        self.register_buffer("weight", torch.empty(shape, dtype=torch.int8, device=device))
        self.register_buffer("scale", torch.empty(shape[0], device=device))

    def read(self, weight: Tensor) -> None:
        """Take in a weight of any float dtype, mapped or not."""
        start, rounded, scale = 0, self.get_buffer("weight"), self.get_buffer("scale")
        for rows in weight.split(max(PIECE // weight.shape[1], 1)):
            stop = start + len(rows)
            values = widened(rows.to(scale.device), torch.float16)
            rounded[start:stop], scale[start:stop], _ = self._round(values)
            start = stop

    def forward(self, x: Tensor) -> Tensor:
        weight, scale = self.get_buffer("weight"), self.get_buffer("scale")
        features = x.reshape(-1, x.shape[-1])
        rounded, scales, outliers = self._round(features.to(torch.float16), threshold=OUTLIER)
        out, _ = self._multiply(features, rounded, weight, scales, scale, outliers, None)
        return out.reshape(*x.shape[:-1], len(weight))


class NF4Linear(nn.Module):
    """Weights are one of 16 levels times their block's largest; the features stay as they are.

    bitsandbytes can also lay the weights out for the bf16 instructions of a CPU, at the first use. That takes
    0.1 to 0.25 s a layer of T5-XXL and 10 times the weights' memory, to gain nothing at 512 tokens: not done.
    """

    def __init__(self, shape: tuple[int, ...], device: torch.device) -> None:
        super().__init__()
        levels = bitsandbytes().functional.get_4bit_type("nf4", device="cpu")
        self._between: list[float] = ((levels[1:] + levels[:-1]) / 2).tolist()
        self._multiply = torch.ops.bitsandbytes.gemm_4bit.default
        self.shape = shape
        size = math.prod(shape)
        self.register_buffer("weight", torch.empty(size // 2, dtype=torch.uint8, device=device))
        self.register_buffer("scale", torch.empty(size // BLOCK, device=device))

    def read(self, weight: Tensor) -> None:
        """Take in a weight of any float dtype, mapped or not."""
        start, packed, scale = 0, self.get_buffer("weight"), self.get_buffer("scale")
        for piece in weight.flatten().split(PIECE):
            stop = start + len(piece)
            blocks = widened(piece.to(scale.device), torch.float32).view(-1, BLOCK)
            largest = blocks.abs().amax(1)
            nearest = _levels(
                blocks * largest.clamp(min=1e-38).reciprocal()[:, None], self._between
            ).flatten()
            packed[start // 2 : stop // 2] = (nearest[::2] << 4) | nearest[1::2]
            scale[start // BLOCK : stop // BLOCK] = largest
            start = stop

    def forward(self, x: Tensor) -> Tensor:
        rows, columns = self.shape
        weight, scale = self.get_buffer("weight").view(rows, -1), self.get_buffer("scale").view(rows, -1)

        def multiply(band: slice) -> Tensor:
            packed = weight[band]
            shape = (len(packed), columns)
            return self._multiply(x, packed.view(-1, 1), shape, scale[band].flatten(), BLOCK, "nf4")

        return _in_bands(multiply, rows, columns, x.device)


def _levels(values: Tensor, between: list[float]) -> Tensor:
    """The number of the nearest level of each value. 15 comparisons in the processor's cache take a tenth of
    the time of a search."""
    number = torch.zeros(values.shape, dtype=torch.uint8, device=values.device)
    for bound in between:
        number += values > bound
    return number


class Float8Linear(nn.Module):
    """The weight stays as the file has it, and is widened whenever it is used; it computes in `dtype`.

    T5-XXL, loaded to read 512 tokens once, takes one core 15 s and 0.3 GB besides the mapped file; widened to
    bfloat16 at load 19 s and 9.5 GB, with the same result. Its second reading takes 14 s, and 12.
    """

    weight = None  # T5 casts features to the dtype of a weight, and there are none in float8

    def __init__(self, stored: Tensor, dtype: torch.dtype) -> None:
        super().__init__()
        self.register_buffer("stored", stored)
        self.computes_in = dtype

    def forward(self, x: Tensor) -> Tensor:
        x, stored = x.to(self.computes_in), self.get_buffer("stored")
        rows, columns = stored.shape
        return _in_bands(lambda band: F.linear(x, widened(stored[band], x.dtype)), rows, columns, x.device)


def _in_bands(multiply: Callable[[slice], Tensor], rows: int, columns: int, device: torch.device) -> Tensor:
    """What `multiply` gives for all rows of a weight; on a CPU for a few at a time, so that what it widens
    stays in the cache."""
    if device.type != "cpu" or rows * columns <= BAND:
        return multiply(slice(rows))
    step = max(BAND // columns, 1)
    return torch.cat([multiply(slice(start, start + step)) for start in range(0, rows, step)], dim=-1)


def widened(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """`weight.to(dtype)`. Of float8_e4m3fn on a CPU 4 times as fast as torch's: its bits are those of a
    bfloat16 but for the exponent's offset. There are no NaNs in weights, which this would not keep."""
    if weight.dtype != torch.float8_e4m3fn or weight.device.type != "cpu":
        return weight.to(dtype)
    out = torch.empty(weight.shape, dtype=torch.bfloat16)
    for narrow, wide in zip(weight.flatten().split(PIECE), out.flatten().split(PIECE), strict=True):
        bits = wide.view(torch.int16).copy_(narrow.view(torch.int8))  # the sign fills the upper byte
        bits.bitwise_left_shift_(4).bitwise_and_(-0x7810)  # sign, 4 bits of exponent, 3 of mantissa
        wide.mul_(2.0**120)  # the offsets of the exponents are 127 and 7
    return out.to(dtype)


@cache
def bitsandbytes() -> Any:
    """The package. Raises InvalidRequest where it is missing or cannot be loaded."""
    with _quiet():
        try:
            import bitsandbytes
        except Exception as error:  # a package that does not fit torch or the driver raises anything
            raise InvalidRequest(
                f"int8 and nf4 weights need the package bitsandbytes, which cannot be loaded: {error}"
            ) from error
    return bitsandbytes


@contextmanager
def _quiet() -> Generator[None, None, None]:
    """While bitsandbytes is imported on a CPU with bf16, it asks the package `kernels`, if that is there, to
    download code from the hub, which only the layout that is not used here calls; else it warns."""
    logger = logging.getLogger("bitsandbytes.backends.cpu.ops")
    before = {name: module for name, module in sys.modules.items() if name == "kernels"}
    level = logger.level
    # None makes an import of it fail; others may use it, so that what was there comes back
    sys.modules["kernels"] = None  # pyright: ignore[reportArgumentType]
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
        sys.modules.pop("kernels", None)
        sys.modules.update(before)
