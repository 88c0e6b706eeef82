"""Low-rank terms on the layers of a network: beside its weights as they are, or merged into them.

Source: Hu et al., LoRA (arXiv:2106.09685): a layer's weight W (N, K) becomes W + up · down, up (N, R), down
(R, K), R small. Of a convolution `down` is one to R channels, and `up` mixes them.

Letters: K features in, N features out, R the rank, B batch, H W height and width, k the kernel's side.
"""

from __future__ import annotations

from collections.abc import Generator, Iterable, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from backend.errors import CheckpointError


@dataclass(frozen=True)
class Term:
    """What is added to a layer: `down` (R, K), or (R, K, k, k) of a convolution, and `up` (N, R), its weight
    and alpha in it."""

    down: Tensor
    up: Tensor

    @property
    def bytes(self) -> int:
        return self.down.nbytes + self.up.nbytes

    def to(self, device: torch.device, dtype: torch.dtype) -> Term:
        return Term(self.down.to(device, dtype), self.up.to(device, dtype))


def together(terms: Iterable[Term]) -> Term:
    """Several terms of one layer as one, whose rank is the sum of theirs."""
    terms = list(terms)
    if len(terms) == 1:
        return terms[0]
    most = max(term.down.ndim for term in terms)  # a 1×1 convolution may be written as a linear layer
    downs = [term.down[(...,) + (None,) * (most - term.down.ndim)] for term in terms]
    return Term(torch.cat(downs), torch.cat([term.up for term in terms], dim=1))


def product(layer: nn.Linear | nn.Conv2d, x: Tensor, rows: slice = slice(None)) -> Tensor:
    """What a linear layer, or a 1×1 convolution, makes of (..., K), only these rows of it, its term included:
    for networks that do not call it as a whole."""
    bias = layer.bias if layer.bias is None else layer.bias[rows]
    out = F.linear(x, layer.weight.flatten(1)[rows], bias)
    term: Term | None = layer.__dict__.get("term")
    return out if term is None else _added(out, F.linear(x, term.down.flatten(1)), term.up[rows])


def _added(out: Tensor, low: Tensor, up: Tensor) -> Tensor:
    """out + low · upᵀ, for out (..., N) and low (..., R); in place where nobody asks for gradients."""
    low = low.to(out.dtype)
    if low.requires_grad or up.requires_grad or not out.is_contiguous():
        return out + F.linear(low, up)
    out.view(-1, out.shape[-1]).addmm_(low.view(-1, low.shape[-1]), up.t())
    return out


def _hook(layer: nn.Module, given: tuple[Tensor, ...], out: Tensor) -> Tensor:
    term, x = layer.__dict__["term"], given[0].to(out.device)
    if not isinstance(layer, nn.Conv2d):
        return _added(out, F.linear(x.to(term.down.dtype), term.down), term.up)
    down = term.down if term.down.ndim == 4 else term.down[..., None, None]
    low = F.conv2d(x, down, stride=layer.stride, padding=layer.padding, dilation=layer.dilation)
    mixed = F.conv2d(low, term.up[..., None, None])  # (B, R, H, W) → (B, N, H, W)
    return out + mixed if mixed.requires_grad else out.add_(mixed)


def layer_of(network: nn.Module, path: str, term: Term) -> nn.Module:
    """The layer that a term belongs to. Raises CheckpointError for one that is not there or does not fit."""
    try:
        layer = network.get_submodule(path)
    except AttributeError:
        try:  # transformers 5 dropped the prefix of its CLIP text model
            layer = network.get_submodule(path.removeprefix("text_model."))
        except AttributeError:
            raise CheckpointError(f"there is no layer {path} in this checkpoint") from None
    weight = getattr(layer, "weight", None)
    if isinstance(layer, nn.Linear | nn.Conv2d) and isinstance(weight, Tensor):
        due, has = weight.shape[:2], (term.up.shape[0], term.down.shape[1])
        kernel = (*term.down.shape[2:], 1, 1)[:2]
        fits = tuple(due) == has and (*weight.shape[2:], 1, 1)[:2] == kernel
        if not fits or (isinstance(layer, nn.Conv2d) and layer.groups > 1):
            raise CheckpointError(
                f"the term for {path} is for {has[0]}×{has[1]} features, and the layer has {due[0]}×{due[1]}"
            )
    return layer


@contextmanager
def attached(
    network: nn.Module, terms: Mapping[str, Term], device: torch.device, dtype: torch.dtype
) -> Generator[None, None, None]:
    """With a term beside each of these layers, by their paths; the weights stay as they are.

    `dtype` is what layers compute in whose weights do not tell (quantised ones), `device` where those are
    whose weights come and go. Compiled code knows nothing of terms: it is not used meanwhile.
    """
    handles: list[Any] = []
    compiled = {each: code for each in network.modules() if (code := each._compiled_call_impl) is not None}
    try:
        for module in compiled if terms else ():
            module._compiled_call_impl = None
        for path, term in terms.items():
            layer = layer_of(network, path, term)
            weight = getattr(layer, "weight", None)
            tells = isinstance(weight, Tensor) and weight.is_floating_point() and weight.dtype.itemsize > 1
            where = weight.device if isinstance(weight, Tensor) and not weight.is_meta else device
            layer.__dict__["term"] = term.to(where, weight.dtype if tells and weight is not None else dtype)
            handles.append((layer, layer.register_forward_hook(_hook)))
        yield
    finally:
        for layer, handle in handles:
            handle.remove()
            del layer.__dict__["term"]
        for module, code in compiled.items():
            module._compiled_call_impl = code


class Merged:
    """A network whose weights have terms in them, and what those were before, which comes back bit for bit.

    On a CPU the former weights stay where they are, in RAM or in a mapped file, beside the merged ones; those
    of a card wait in RAM, where `homes` may have them anyway.
    """

    def __init__(self, network: nn.Module, homes: Mapping[str, Tensor] | None = None) -> None:
        self._network = network
        self._homes = homes or {}
        self._before: dict[str, Tensor] = {}

    @property
    def bytes(self) -> int:
        """What merging takes of RAM beside the network, wherever that is."""
        return 0 if self._homes else sum(tensor.nbytes for tensor in self._before.values())

    def set(self, terms: Mapping[str, Term]) -> None:
        """Have these terms in the weights and no others. Raises CheckpointError, with the network as it was
        before any were merged, for one that does not fit."""
        try:
            layers = {path: layer_of(self._network, path, term) for path, term in terms.items()}
        except CheckpointError:
            self.undo()
            raise
        self._restore([path for path in self._before if path not in terms])
        for path, layer in layers.items():
            weight = layer._parameters["weight"]
            assert weight is not None
            if path not in self._before:
                on_cpu = weight.device.type == "cpu"
                home = self._homes.get(f"{path}.weight")
                self._before[path] = weight.data.cpu() if home is None else home  # on a CPU itself
                if on_cpu and home is None:
                    weight = nn.Parameter(torch.empty_like(weight), requires_grad=False)
                    layer._parameters["weight"] = weight
            merge(weight.data, self._before[path], terms[path])

    def undo(self) -> None:
        self._restore(list(self._before))

    def _restore(self, paths: Iterable[str]) -> None:
        for path in paths:
            layer, before = self._network.get_submodule(path), self._before.pop(path)
            weight = layer._parameters["weight"]
            assert weight is not None
            if weight.device.type == "cpu" and not self._homes:
                layer._parameters["weight"] = nn.Parameter(before, requires_grad=False)
            else:
                weight.data.copy_(before)


def merge(into: Tensor, weight: Tensor, term: Term) -> None:
    """Write weight + term `into` a tensor of the weight's shape, dtype and layout."""
    if into.is_contiguous():
        # one product in the weight's own dtype takes a quarter of the time of one in float32, and in bfloat16
        # its error is 1.04 times that of rounding the exact sum
        term = term.to(into.device, into.dtype)
        whole, down = into.flatten(1), term.down.flatten(1)
        if weight.device == into.device:
            torch.addmm(weight.flatten(1), term.up, down, out=whole)
        else:
            whole.copy_(weight.flatten(1)).addmm_(term.up, down)
        return
    term = term.to(into.device, torch.float32)  # convolutions whose channels come last
    wide = weight.to(into.device, torch.float32, memory_format=torch.contiguous_format)
    into.copy_(wide + (term.up @ term.down.flatten(1)).view(wide.shape))
