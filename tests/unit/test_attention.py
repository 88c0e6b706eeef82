"""Attention by every policy against attention written out, and policies that are refused or end."""

from __future__ import annotations

import sys
from collections.abc import Generator, Iterator
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.attention import _cur_sdpa_kernel_backends

from backend import InvalidRequest
from backend.nn import layers
from backend.nn.layers import AUTO, BACKENDS, Attention, attend, attention_available, attention_by
from backend.settings import CHOICES

HEADS = 4
LENGTHS = [(70, 70), (70, 9), (600, 700)]  # the last one long enough for the chunks of the CPU
ON_CPU = ("auto", "flash", "math")


@pytest.fixture(autouse=True)
def asked_anew() -> Iterator[None]:
    attention_available.cache_clear()
    yield
    attention_available.cache_clear()


def tensors(lengths: tuple[int, int], dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    queries, keys = lengths
    return tuple(  # pyright: ignore[reportReturnType]
        torch.randn(2, length, 64, generator=generator).to(dtype) for length in (queries, keys, keys)
    )


def written_out(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    q, k, v = (t.double().unflatten(2, (HEADS, -1)).transpose(1, 2) for t in (query, key, value))
    scores = q @ k.mT * q.shape[-1] ** -0.5
    return (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)


@pytest.mark.parametrize("backend", ON_CPU)
@pytest.mark.parametrize("rows", [None, 1, 64, 1000])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 1e-2)])
@pytest.mark.parametrize("lengths", LENGTHS)
def test_every_policy_attends_as_written_out(
    backend: str, rows: int | None, dtype: torch.dtype, tolerance: float, lengths: tuple[int, int]
) -> None:
    given = tensors(lengths, dtype)
    with attention_by(Attention(backend, rows)):
        out = attend(*given, HEADS)
    assert (out.dtype, out.shape) == (dtype, given[0].shape)
    torch.testing.assert_close(out.double(), written_out(*given), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("rows", [None, 100])
def test_slices_are_of_the_kernel_that_was_chosen(rows: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[list[Any], int]] = []
    whole = layers.F.scaled_dot_product_attention

    def watched(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        seen.append((_cur_sdpa_kernel_backends(), q.shape[2]))
        return whole(q, k, v)

    monkeypatch.setattr(layers.F, "scaled_dot_product_attention", watched)
    with attention_by(Attention("math", rows)):
        attend(*tensors((250, 9), torch.float32), HEADS)
    assert [length for _, length in seen] == ([250] if rows is None else [100, 100, 50])
    assert all(backends == layers.KERNELS["math"] for backends, _ in seen)


def test_the_policy_ends_with_its_block_and_with_an_error() -> None:
    before = _cur_sdpa_kernel_backends(with_priority=True)

    def work() -> Generator[Attention]:
        with attention_by(Attention("math", 5)):
            yield layers._policy
            raise RuntimeError("half way")

    running = work()
    assert next(running) == Attention("math", 5)
    with attention_by(Attention(rows=3)):
        assert layers._policy == Attention(rows=3)
    assert layers._policy == Attention("math", 5)
    with pytest.raises(RuntimeError, match="half way"):
        next(running)
    abandoned = work()
    next(abandoned)
    abandoned.close()
    assert layers._policy is AUTO
    assert _cur_sdpa_kernel_backends(with_priority=True) == before


@pytest.mark.parametrize("backend", ["efficient", "cudnn", "xformers"])
def test_what_a_processor_lacks_is_refused(backend: str) -> None:
    said = f"attention is '{backend}', but it needs a CUDA card; here it can be auto, flash, math"
    with pytest.raises(InvalidRequest, match=said), attention_by(Attention(backend)):
        attend(*tensors((70, 70), torch.float32), HEADS)
    assert layers._policy is AUTO


def test_what_cannot_be_is_refused() -> None:
    with pytest.raises(InvalidRequest, match="attention is 'slow'; it can be auto, flash"):
        Attention("slow")
    with pytest.raises(InvalidRequest, match="rows is 0; it can be a whole number from 1"):
        Attention(rows=0)
    assert CHOICES["attention"] == BACKENDS


def test_what_can_be_had(monkeypatch: pytest.MonkeyPatch) -> None:
    assert [name for name in BACKENDS if not attention_available(name, "mps")] == ["auto", "math"]
    cards = {"cuda": (7, 5), "cuda:1": (8, 6)}
    monkeypatch.setattr(torch.cuda, "get_device_capability", cards.__getitem__)
    monkeypatch.setattr(torch.backends.cuda, "is_flash_attention_available", lambda: True)
    monkeypatch.setattr(torch.backends.cudnn, "is_available", lambda: False)
    monkeypatch.setattr(layers, "find_spec", lambda name: None)
    refused = {name: attention_available(name, "cuda") for name in BACKENDS}
    assert refused == {
        "auto": None,
        "flash": "it needs a card of compute capability 8.0 (Ampere) or later",
        "efficient": None,
        "cudnn": "this build of torch lacks it",
        "math": None,
        "xformers": "the package xformers is not installed",
    }
    assert attention_available("flash", "cuda:1") is None


def test_xformers_where_it_is_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    shapes: list[torch.Size] = []

    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:  # (B, L, heads, d)
        shapes.append(q.shape)
        return written_out(q.flatten(2), k.flatten(2), v.flatten(2)).view(q.shape).to(q.dtype)

    ops: Any = ModuleType("xformers.ops")
    ops.memory_efficient_attention = attention
    monkeypatch.setitem(sys.modules, "xformers", ModuleType("xformers"))
    monkeypatch.setitem(sys.modules, "xformers.ops", ops)
    monkeypatch.setattr(layers, "find_spec", lambda name: SimpleNamespace())
    assert attention_available("xformers", "cuda") is None
    monkeypatch.setattr(layers, "attention_available", lambda backend, device: None)
    given = tensors((70, 9), torch.float32)
    with attention_by(Attention("xformers", 40)):
        out = attend(*given, HEADS)
    assert shapes == [(2, 40, HEADS, 16), (2, 30, HEADS, 16)]
    torch.testing.assert_close(out.double(), written_out(*given), rtol=1e-6, atol=1e-6)


def test_a_compiler_follows_the_policy() -> None:
    torch._dynamo.reset()
    compiled = torch.compile(attend, dynamic=True, fullgraph=True, backend="aot_eager")
    for length in (70, 90):
        given = tensors((length, 30), torch.float32)
        expected = written_out(*given)
        for policy in (AUTO, Attention("math"), Attention(rows=16), Attention("flash", 16), AUTO):
            with attention_by(policy):
                out = compiled(*given, HEADS)
            torch.testing.assert_close(out.double(), expected, rtol=1e-6, atol=1e-6)
    with pytest.raises(InvalidRequest, match="attention is 'cudnn'"), attention_by(Attention("cudnn")):
        compiled(*given, HEADS)
    torch._dynamo.reset()


def test_gradients_go_by_torchs_own_choice() -> None:
    query, key, value = tensors((30, 30), torch.float32)
    query.requires_grad_()
    with attention_by(Attention(rows=7)):
        attend(query, key, value, HEADS).sum().backward()
    assert query.grad is not None
