"""Leaf layers that several networks use unchanged.

Letters in the shape comments: B batch, C channels, H W height and width, L tokens, D features.
"""

from __future__ import annotations

from collections.abc import Generator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from importlib.util import find_spec

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from backend.errors import InvalidRequest


class ResnetBlock(nn.Module):
    """Two normalised 3×3 convolutions around an optional timestep shift, plus the input.

    `time_dim` is the width of the timestep embedding, or None for a network without one (the KL-VAE).
    (B, C, H, W) → (B, C_out, H, W).
    """

    def __init__(
        self, in_channels: int, out_channels: int, *, groups: int, eps: float, time_dim: int | None = None
    ) -> None:
        super().__init__()
        self.norm1 = nn.GroupNorm(groups, in_channels, eps)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.time_emb_proj = nn.Linear(time_dim, out_channels) if time_dim else None
        self.norm2 = nn.GroupNorm(groups, out_channels, eps)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        self.conv_shortcut = nn.Conv2d(in_channels, out_channels, 1) if in_channels != out_channels else None

    def forward(self, x: Tensor, time: Tensor | None = None) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x), inplace=True))
        if self.time_emb_proj is not None and time is not None:
            h = h + self.time_emb_proj(F.silu(time))[:, :, None, None]  # (B, D) → (B, C, 1, 1)
        h = self.conv2(F.silu(self.norm2(h), inplace=True))
        return h + (x if self.conv_shortcut is None else self.conv_shortcut(x))


class Upsample(nn.Module):
    """Nearest-neighbour ×2 (or to `size`), then a 3×3 convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor, size: tuple[int, int] | None = None) -> Tensor:
        # a skip connection of odd height or width dictates the size
        target = size or (2 * x.shape[-2], 2 * x.shape[-1])
        return self.conv(F.interpolate(x, size=target, mode="nearest"))


def sinusoidal_embedding(
    timesteps: Tensor, dim: int, *, flip_sin_to_cos: bool = True, freq_shift: float = 0.0
) -> Tensor:
    """Sines and cosines of the timesteps (B,) at `dim` / 2 geometric frequencies → (B, dim), float32.

    Source: Transformer position encoding (arXiv:1706.03762) as DDPM (arXiv:2006.11239) applies it to time.
    """
    half = dim // 2
    index = torch.arange(half, dtype=torch.float32, device=timesteps.device)
    frequencies = torch.exp(index * (-torch.log(torch.tensor(10_000.0)) / (half - freq_shift)))
    angles = timesteps.float()[:, None] * frequencies
    sin, cos = angles.sin(), angles.cos()
    embedding = torch.cat([cos, sin] if flip_sin_to_cos else [sin, cos], dim=-1)
    return F.pad(embedding, (0, dim % 2))


class TimestepEmbedding(nn.Module):
    """Two linear layers with SiLU between: (B, D_in) → (B, D_out).

    `condition_dim` is the width of a second embedding that distilled networks add to the timestep's.
    """

    def __init__(self, in_dim: int, out_dim: int, condition_dim: int | None = None) -> None:
        super().__init__()
        self.linear_1 = nn.Linear(in_dim, out_dim)
        self.cond_proj = nn.Linear(condition_dim, in_dim, bias=False) if condition_dim else None
        self.linear_2 = nn.Linear(out_dim, out_dim)

    def forward(self, x: Tensor, condition: Tensor | None = None) -> Tensor:
        if self.cond_proj is not None and condition is not None:
            x = x + self.cond_proj(condition)
        return self.linear_2(F.silu(self.linear_1(x)))


# In bf16 on a CPU torch's kernel reaches a quarter of the speed of its own matrix products. From LONG
# tokens on, products of ROWS queries of a few heads, whose scores (SCORES, 8 MB) stay in the cache, take a
# third of its time: 1.3 seconds of one core for 3.6 at 4429 tokens of 48 heads. Scores are rounded to bf16
# on the way, which doubles the error of the attention alone; in the output of a trained UNet it is lost among
# the other roundings (0.5 to 0.7% rms from fp32 either way).
LONG, ROWS, SCORES = 512, 256, 2**22


# What torch is to try, in this order: a kernel that cannot take some tensors (the VAE's head of 512, float32
# for flash, masks) leaves those to the next.
KERNELS = {
    "flash": [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH],
    "efficient": [SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH],
    "cudnn": [SDPBackend.CUDNN_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH],
    "math": [SDPBackend.MATH],
}
BACKENDS = ("auto", *KERNELS, "xformers")


@dataclass(frozen=True)
class Attention:
    """How `attend` works: by which kernel, "auto" the fastest, and with at most `rows` queries at once.

    Few rows ("attention slicing") save memory where a kernel holds all scores of the queries it is given.
    """

    backend: str = "auto"
    rows: int | None = None

    def __post_init__(self) -> None:
        if self.backend not in BACKENDS:
            raise InvalidRequest(f"attention is {self.backend!r}; it can be {', '.join(BACKENDS)}")
        if self.rows is not None and self.rows < 1:
            raise InvalidRequest(f"rows is {self.rows}; it can be a whole number from 1, or None for all")


AUTO = Attention()
_policy = AUTO  # one request runs at a time


@contextmanager
def attention_by(policy: Attention) -> Generator[None, None, None]:
    """Attend by `policy` meanwhile, the former one afterwards.

    Raises InvalidRequest where tensors are met on a device that the backend does not run on.
    """
    global _policy  # noqa: PLW0603 (the alternative is an argument through every layer of every network)
    former = _policy
    with ExitStack() as stack:
        if policy.backend in KERNELS:  # for all of torch: the text encoders attend by it too
            stack.enter_context(sdpa_kernel(KERNELS[policy.backend], set_priority=True))
        _policy = policy
        try:
            yield
        finally:
            _policy = former


@cache
def attention_available(backend: str, device: str) -> str | None:
    """Why `backend` cannot be had on `device` ("cpu", "cuda", "cuda:1" or "mps"); None where it can."""
    kind = device.partition(":")[0]
    if backend in ("auto", "math") or (backend, kind) == ("flash", "cpu"):
        return None
    if kind != "cuda":
        return "it needs a CUDA card"
    if backend == "xformers":
        return None if find_spec("xformers") else "the package xformers is not installed"
    built = {
        "flash": torch.backends.cuda.is_flash_attention_available,
        "cudnn": torch.backends.cudnn.is_available,
    }
    if backend in built and not built[backend]():
        return "this build of torch lacks it"
    if backend in built and not torch.version.hip and torch.cuda.get_device_capability(device) < (8, 0):
        return "it needs a card of compute capability 8.0 (Ampere) or later"
    return None


def attend(query: Tensor, key: Tensor, value: Tensor, heads: int) -> Tensor:
    """Scaled-dot-product attention of queries (B, L, D) over keys and values (B, S, D), in `heads` parts."""
    batch, length, dim = query.shape
    q, k, v = (t.view(batch, -1, heads, dim // heads).transpose(1, 2) for t in (query, key, value))
    if q.requires_grad:
        out = F.scaled_dot_product_attention(q, k, v)  # (B, heads, L, D / heads)
    elif _policy.backend != "auto" or _policy.rows is not None:
        out = _attend_as_told(q, k, v)
    elif _long(q, k):
        out = _attend_in_chunks(q, k, v)
    else:
        out = F.scaled_dot_product_attention(q, k, v)
    return out.transpose(1, 2).reshape(batch, length, dim)


def _long(q: Tensor, k: Tensor) -> bool:
    at_least = min(q.shape[2], k.shape[2])
    return at_least >= LONG and q.dtype == torch.bfloat16 and q.device.type == "cpu"


# An operator of its own: what it does depends on more than its arguments, which a compiler would not notice.
@torch.library.custom_op("triptych::attend_as_told", mutates_args=())
def _attend_as_told(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Scaled-dot-product attention (B, heads, L, d) by the policy, as many queries at once as it allows."""
    backend = _policy.backend
    if reason := attention_available(backend, str(q.device)):
        can = [name for name in BACKENDS if not attention_available(name, str(q.device))]
        raise InvalidRequest(f"attention is {backend!r}, but {reason}; here it can be {', '.join(can)}")
    kernel = F.scaled_dot_product_attention
    if backend == "xformers":
        kernel = _attend_by_xformers
    elif backend == "auto" and _long(q, k):
        kernel = _attend_in_chunks
    out, rows = torch.empty_like(q), _policy.rows or q.shape[2]
    for here, queries in zip(out.split(rows, dim=2), q.split(rows, dim=2), strict=True):
        here.copy_(kernel(queries, k, v))
    return out


@_attend_as_told.register_fake
def _(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.empty_like(q)


def _attend_by_xformers(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """(B, heads, L, d) → the same, where xformers has (B, L, heads, d)."""
    attention = import_module("xformers.ops").memory_efficient_attention
    return attention(*(t.transpose(1, 2) for t in (q, k, v))).transpose(1, 2)


# An operator of its own: a compiler would unroll the loops, and compile them anew for every size.
@torch.library.custom_op("triptych::attend_in_chunks", mutates_args=())
def _attend_in_chunks(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Scaled-dot-product attention (B, heads, L, d) by matrix products that stay in the processor's cache."""
    keys, dim = k.shape[2:]
    out = torch.empty_like(q)  # laid out as q is: the heads of a token side by side
    together = max(SCORES // (ROWS * keys), 1)  # heads
    for one in zip(out, q, k, v, strict=True):
        for part, queries, keys_of, values in zip(*(t.split(together) for t in one), strict=True):
            keys_of, values = (keys_of * dim**-0.5).mT, values.contiguous()
            for here, rows in zip(part.split(ROWS, dim=1), queries.split(ROWS, dim=1), strict=True):
                here.copy_(torch.softmax(rows @ keys_of, dim=-1) @ values)
    return out


@_attend_in_chunks.register_fake
def _(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.empty_like(q)
