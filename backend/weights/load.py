"""Weights into modules: built on the meta device, checked strictly, assigned tensor by tensor."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TypeVar
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from backend.errors import CheckpointError

M = TypeVar("M", bound=nn.Module)

LISTED = 4  # keys that an error names before it only counts

_UNREAD: WeakKeyDictionary[nn.Module, Mapping[str, Tensor]] = WeakKeyDictionary()


def load_module(
    build: Callable[[], M],
    tensors: Mapping[str, Tensor],
    *,
    dtype: torch.dtype,
    device: torch.device,
    what: str,
    layout: torch.memory_format = torch.contiguous_format,
    buffers: Mapping[str, Tensor] | None = None,
) -> M:
    """The module that `build` makes, with `tensors` for its weights: in eval mode, not asking for gradients.

    A tensor of the right dtype, layout and device is taken as it is, so a mapped file is read as the module
    runs; the others are converted one at a time, so memory peaks at the weights as run plus one tensor.
    `layout` is that of the convolutions' weights. `buffers` are those that a module computes
    when it is built, which checkpoints leave out. `what` names the component in errors. On the device "meta"
    nothing is read: the module's weights say as what they run, `unread` where they are.

    Raises CheckpointError where the tensors are not just those of the module, or the module cannot be built.
    """
    module = build_on_meta(build, what)
    check_tensors(module.state_dict(), tensors, what)
    for name, meta in list(module.state_dict(keep_vars=True).items()):
        kept = dtype if meta.is_floating_point() else meta.dtype
        value = _placed(tensors[name], kept, device, layout if meta.ndim == 4 else torch.contiguous_format)
        assign(
            module,
            name,
            nn.Parameter(value, requires_grad=False) if isinstance(meta, nn.Parameter) else value,
        )
    for name, value in (buffers or {}).items():
        assign(module, name, value.to(device))
    if device.type == "meta":
        _UNREAD[module] = {**{name: tensors[name] for name in module.state_dict()}, **(buffers or {})}
        return module.eval()
    left = [name for name, tensor in (*module.named_parameters(), *module.named_buffers()) if tensor.is_meta]
    assert not left, f"{what}: {left} have no values"
    return module.eval()


def unread(module: nn.Module) -> Mapping[str, Tensor] | None:
    """The tensors, mapped as the files have them, of a module that was made on the device "meta"."""
    return _UNREAD.get(module)


def build_on_meta(build: Callable[[], M], what: str) -> M:
    """What `build` makes, without memory for its weights. Raises CheckpointError where it cannot be made."""
    try:
        with torch.device("meta"):
            return build()
    except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        # a config may hold anything; what it holds is not the program's fault
        raise CheckpointError(f"{what}: no network can be built from its config: {error}") from error


def check_tensors(expected: Mapping[str, Tensor], tensors: Mapping[str, Tensor], what: str) -> None:
    """Raises CheckpointError, naming them, for tensors that are missing, too many or of another shape."""
    missing = expected.keys() - tensors.keys()
    unexpected = tensors.keys() - expected.keys()
    shaped = (
        f"{name} is {_shape(tensors[name])}, due {_shape(tensor)}"
        for name, tensor in expected.items()
        if name not in missing and tensors[name].shape != tensor.shape
    )
    faults = [
        f"{len(keys)} {kind} ({', '.join(keys[:LISTED])}{', …' if len(keys) > LISTED else ''})"
        for kind, keys in (
            ("missing", sorted(missing)),
            ("unexpected", sorted(unexpected)),
            ("of a wrong shape", list(shaped)),
        )
        if keys
    ]
    if faults:
        raise CheckpointError(
            f"{what} does not fit its config: of {len(expected)} tensors, {'; '.join(faults)}"
        )


def _placed(tensor: Tensor, dtype: torch.dtype, device: torch.device, layout: torch.memory_format) -> Tensor:
    if device.type == "meta":
        return torch.empty(tensor.shape, dtype=dtype, device=device).to(memory_format=layout)
    # `to` leaves axes in another order, as Flax's files have them, where nothing else is to change
    placed = tensor.to(device=device, dtype=dtype, memory_format=layout).contiguous(memory_format=layout)
    return placed.clone() if placed.data_ptr() % placed.element_size() else placed  # nor at odd addresses


def assign(module: nn.Module, name: str, value: Tensor) -> None:
    """Make `value` the parameter or buffer called `name`, dots and all, of the module."""
    *path, last = name.split(".")
    owner = module.get_submodule(".".join(path))
    setattr(owner, last, value)


def _shape(tensor: Tensor) -> str:
    return "×".join(map(str, tensor.shape)) or "a single number"
