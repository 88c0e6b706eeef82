"""An accounting device: what a program would take of a card's memory, counted without a card.

Tensors are torch's fake ones, which have shapes, dtypes and a device, and no numbers; a forward of the
largest network takes a second. Counted is every storage that a tensor made on the device holds, once, for as
long as it lives, rounded up as CUDA's allocator does. Where torch on a card goes other ways than the CPU-only
torch that tests run with, so does the ledger: attention and RMS norm are fused kernels (their result, and a
float32 for each query or row), and convolutions run channels last where their input or weight is, copying
the other.

Not counted: workspaces of convolutions and matrix products, and what the allocator keeps of freed memory.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Generator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any, TypeVar
from unittest import mock

import torch
from torch import Tensor, nn
from torch._prims_common import suggest_memory_format
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

M = TypeVar("M", bound=nn.Module)

GRAIN = 512  # bytes, to a multiple of which CUDA's allocator rounds up
FLASH_WIDTH = 256  # features of a head up to which the faster kernel goes; the other sums beside its result


class Ledger(TorchDispatchMode):
    """`with Ledger() as ledger:` tensors are fake, and those on `device` are counted.

    `live` is what they take now, `peak` the most so far, both in bytes; `reset_peak` starts anew. An
    allocation that would bring `live` above `limit` raises torch.OutOfMemoryError, as on a card. `explain`
    keeps what is alive at the peak, for `largest`. Device "cpu" counts the CPU's tensors, but not what its
    libraries take besides.
    """

    def __init__(self, device: str = "cuda", *, limit: int | None = None, explain: bool = False) -> None:
        super().__init__()
        self.device, self.limit = device, limit
        self.live = self.peak = 0
        self._explain = explain
        self._held: dict[int, tuple[int, str]] = {}  # storage → its bytes and how it was made
        self._at_peak: list[tuple[int, str]] = []
        self._watched: dict[int, weakref.ref[torch.UntypedStorage]] = {}
        self._exits = ExitStack()

    def __enter__(self) -> Ledger:
        self._exits.enter_context(torch.no_grad())
        self._exits.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        if self.device == "cuda":
            kernels = {"scaled_dot_product_attention": _fused_attention, "rms_norm": _fused_rms_norm}
            for name, kernel in kernels.items():
                self._exits.enter_context(mock.patch.object(F, name, kernel))
        self._exits.enter_context(_Methods())
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._exits.close()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is torch.ops.aten.convolution.default and self.device == "cuda" and _on(args[0], "cuda"):
            args, out = self._convolved(args)
        else:
            out = func(*args, **kwargs)
        for leaf in tree_leaves(out):
            self._count(leaf, str(func))
        return out

    def reset_peak(self) -> None:
        self.peak = self.live
        self._at_peak = list(self._held.values())

    def largest(self, count: int = 20) -> list[tuple[int, str]]:
        """What was alive at the peak, the largest first: bytes, and shape and operator."""
        assert self._explain
        return sorted(self._at_peak, reverse=True)[:count]

    def _convolved(self, args: tuple[Any, ...]) -> tuple[tuple[Any, ...], Tensor]:
        """cuDNN's way: one layout for input, weight and output, copies of those that have another."""
        pair = args[:2]
        last = any(suggest_memory_format(x) == torch.channels_last for x in pair)
        layout = torch.channels_last if last and pair[0].ndim == 4 else torch.contiguous_format
        pair = tuple(_contiguous(x, layout) for x in pair)
        for tensor in pair:
            self._count(tensor, "copy for convolution")
        args = (*pair, *args[2:])
        out = torch.ops.aten.convolution.default(*args)
        # made outside of the count, so that a fake output of another layout leaves no trace
        return args, _contiguous(out, layout)

    def _count(self, leaf: Any, what: str) -> None:
        if not _on(leaf, self.device):
            return
        storage = leaf.untyped_storage()
        key = storage._cdata
        if key in self._held:
            return
        size = -(-storage.nbytes() // GRAIN) * GRAIN
        if self.limit is not None and self.live + size > self.limit:
            raise torch.OutOfMemoryError(
                f"out of memory: {size} bytes asked for by {what}, {self.live} of {self.limit} taken"
            )
        self._held[key] = (size, f"{what} {tuple(leaf.shape)} {leaf.dtype}")
        self._watched[key] = weakref.ref(storage, lambda _: self._free(key))
        self.live += size
        if self.live > self.peak:
            self.peak = self.live
            if self._explain:
                self._at_peak = list(self._held.values())

    def _free(self, key: int) -> None:
        self.live -= self._held.pop(key)[0]
        del self._watched[key]


def _on(value: Any, device: str) -> bool:
    return isinstance(value, FakeTensor) and value.device.type == device


def placed(
    build: Callable[[], M],
    dtype: torch.dtype,
    device: str = "cuda",
    layout: torch.memory_format = torch.contiguous_format,
) -> M:
    """Under a ledger: the network that `build` makes, its weights (convolutions' in `layout`) on `device`."""
    with torch.device("meta"):
        network = build()
    made: dict[int, Tensor] = {}  # weights that go by two names are made once
    every = (
        *network.named_parameters(remove_duplicate=False),
        *network.named_buffers(remove_duplicate=False),
    )
    for name, meta in every:
        if id(meta) not in made:
            kept = dtype if meta.is_floating_point() else meta.dtype
            order = layout if meta.ndim == 4 else torch.contiguous_format
            value: Tensor = torch.empty(meta.shape, dtype=kept, device=device, memory_format=order)
            parameter = isinstance(meta, nn.Parameter)
            made[id(meta)] = nn.Parameter(value, requires_grad=False) if parameter else value
        *path, last = name.split(".")
        setattr(network.get_submodule(".".join(path)), last, made[id(meta)])
    return network.eval()


@contextmanager
def work_of(ledger: Ledger) -> Generator[list[int], None, None]:
    """`with work_of(ledger) as work:` afterwards `work[0]` is the peak inside, above what was live before."""
    before, work = ledger.live, [0]
    ledger.reset_peak()
    yield work
    work[0] = ledger.peak - before


class _Methods(TorchFunctionMode):
    """What torch's own methods do only after asking for the device's driver, which is not there; and linear
    layers that add their bias in place, as they do to all but fake tensors."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func is Tensor.__getitem__ and isinstance(args[0], FakeTensor):
            return _indexed(args[0], args[1])
        if func in (Tensor.__setitem__, Tensor.copy_) and isinstance(args[0], FakeTensor):
            return args[0]  # written in place: nothing is made
        if func is Tensor.to and isinstance(args[0], FakeTensor) and torch.device("cuda") in args[1:]:
            return torch.empty_like(args[0], device="cuda")
        if func is Tensor.contiguous and isinstance(args[0], FakeTensor):
            return _contiguous(*args, **(kwargs or {}))
        if func is F.linear and len(args) == 3 and args[2] is not None and not args[0].is_contiguous():
            return torch.matmul(args[0], args[1].t()).add_(args[2])
        return func(*args, **(kwargs or {}))


def _contiguous(x: Tensor, memory_format: torch.memory_format = torch.contiguous_format) -> Tensor:
    return x if x.is_contiguous(memory_format=memory_format) else x.clone(memory_format=memory_format)


def _indexed(x: Tensor, index: Any) -> Tensor:
    parts = list(index) if isinstance(index, tuple) else [index]
    if Ellipsis in [part for part in parts if not isinstance(part, Tensor)]:
        at = next(i for i, part in enumerate(parts) if part is Ellipsis)
        given = sum(part is not None for part in parts) - 1
        parts[at : at + 1] = [slice(None)] * (x.ndim - given)
    dim, tensors = 0, []
    for part in parts:
        if part is None:
            x = x.unsqueeze(dim)
        elif isinstance(part, slice):
            if part != slice(None):
                x = torch.ops.aten.slice.Tensor(x, dim, part.start, part.stop, part.step or 1)
        elif isinstance(part, Tensor):
            tensors += [None] * (dim - len(tensors)) + [part]
        else:
            x = x.select(dim, part)
            continue
        dim += 1
    return torch.ops.aten.index.Tensor(x, tensors) if tensors else x


def _fused_attention(
    query: Tensor, key: Tensor, value: Tensor, *_: Any, scale: float | None = None, **__: Any
) -> Tensor:
    """What a fused kernel allocates for queries (B, H, L, d): the result, laid out (B, L, H, d), and the
    logarithm of each query's sum; in 16 bits with wide heads, whose sums it keeps outside, those too."""
    batch, heads, length, width = query.shape
    if width % 8 and query.dtype.itemsize == 2:  # the kernel takes heads of a multiple of 8 features
        query, key, value = (F.pad(x, (0, -width % 8)) for x in (query, key, value))
    out = query.new_empty(batch, length, heads, query.shape[-1])
    _sums = query.new_empty(batch, heads, length, dtype=torch.float32)
    wide = width > FLASH_WIDTH and query.dtype.itemsize == 2
    _partial = torch.empty_like(out, dtype=torch.float32) if wide else None
    return out[..., :width].transpose(1, 2)


def _fused_rms_norm(x: Tensor, shape: Any, weight: Tensor | None = None, eps: float | None = None) -> Tensor:
    _scales = x.new_empty(x.shape[: x.ndim - len(shape)], dtype=torch.float32)
    return torch.empty_like(x)
