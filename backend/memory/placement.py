"""Carries out where a plan puts a component: whole on the device, in RAM until its phase, or streamed.

A component's weights have a home: tensors in RAM (pinned where there is room, so that they reach a card
without a detour), or views of the mapped file. Leaving a device copies nothing back: the home is still there.
"""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from backend.memory.blocks import aligned, blocks_of, groups, staying
from backend.weights.load import unread

Spec = tuple[tuple[int, ...], torch.dtype, tuple[int, ...]]  # shape, dtype, strides


def module_of(value: Any) -> nn.Module | None:
    """The network in what a component's `load` made; what comes with it (a tokenizer) has no weights."""
    values = value if isinstance(value, tuple) else (value,)
    return next((each for each in values if isinstance(each, nn.Module)), None)


def tensors_of(module: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers by name, each once."""
    return {**dict(module.named_parameters()), **dict(module.named_buffers())}


def put(module: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Make these its parameters and buffers, whatever device, dtype or layout they had before."""
    for name, tensor in tensors.items():
        path, _, last = name.rpartition(".")
        owner = module.get_submodule(path)
        if last in owner._parameters:
            owner._parameters[last] = nn.Parameter(tensor, requires_grad=False)
        else:
            owner._buffers[last] = tensor


class Pinned(dict[str, Tensor]):
    """Weights in RAM that does not move, which a card reads by itself; it may again when this is gone."""


def pin(tensors: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """Copies side by side in memory that is pinned in place.

    Torch's own pinned memory rounds every tensor up to a power of two, which for T5's are half as much again,
    and is never handed back to the system.
    """
    specs = {name: _spec(tensor) for name, tensor in tensors.items()}
    flat = torch.empty(sum(aligned(_bytes(spec)) for spec in specs.values()), dtype=torch.uint8)
    views = Pinned(_views(flat, specs))
    for name, view in views.items():
        view.copy_(tensors[name])
    cuda: Any = torch.cuda.cudart()
    if int(cuda.cudaHostRegister(flat.data_ptr(), flat.nbytes, 0)) == 0:  # else it is slower, and no worse
        weakref.finalize(views, cuda.cudaHostUnregister, flat.data_ptr())
    return views


def _views(flat: Tensor, specs: Mapping[str, Spec]) -> dict[str, Tensor]:
    """Tensors of these shapes, dtypes and strides, one after the other in flat memory."""
    start, views = 0, {}
    for name, (shape, dtype, stride) in specs.items():
        size = _bytes((shape, dtype, stride))
        part = flat[start : start + size].view(dtype)
        views[name] = part.as_strided(shape, stride, part.storage_offset())
        start += aligned(size)
    return views


def move(module: nn.Module, tensors: Mapping[str, Tensor], device: torch.device) -> None:
    """Copies of `tensors` on the device, as the weights of the module."""
    put(module, {name: tensor.to(device, non_blocking=True, copy=True) for name, tensor in tensors.items()})


class Streamer:
    """A module that runs on a device that holds `held` bytes of it: some blocks stay, the others take turns
    in `slots`, the next one copied on a stream of its own while the one before computes.

    `homes` are the weights in RAM or in the file; those that the module has (perhaps on the meta device) say
    as what they run. Attached by `with`; in between, nothing of the module is on the device.
    """

    def __init__(
        self,
        module: nn.Module,
        homes: Mapping[str, Tensor],
        device: torch.device,
        held: int,
        slots: int,
    ) -> None:
        self.module, self.homes, self.device, self.slots = module, homes, device, slots
        self.specs = {name: _spec(tensor) for name, tensor in tensors_of(module).items()}
        sizes = {name: _bytes(spec) for name, spec in self.specs.items()}
        self.groups = groups(sizes)
        self.sizes = [sum(aligned(sizes[name]) for name in names) for names in self.groups]
        self.stay = staying(blocks_of(sizes), held, slots)
        self.coming = [index for index in range(len(self.groups)) if index not in self.stay]
        self._handles: list[Any] = []

    def __enter__(self) -> nn.Module:
        coming = {name for index in self.coming for name in self.groups[index]}
        put(
            self.module,
            {name: self._empty(name) if name in coming else self._kept(name) for name in self.specs},
        )
        for module in self.module.modules():  # compiled code would not see weights come and go
            module._compiled_call_impl = None
        self._turns = _Turns(self, self.slots)
        block = {name: index for index in self.coming for name in self.groups[index]}
        for path, module in self.module.named_modules():
            own = [*module._parameters, *module._buffers]
            of = {block[full] for name in own if (full := f"{path}.{name}" if path else name) in block}
            for index in of:
                hook = module.register_forward_pre_hook(lambda *_, index=index: self._turns.need(index))
                self._handles.append(hook)
        return self.module

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._turns.close()
        del self._turns
        put(self.module, {name: _made(spec, torch.device("meta")) for name, spec in self.specs.items()})

    def _empty(self, name: str) -> Tensor:
        """What stands for a weight that is not here: others look at its shape, dtype and device."""
        shape, dtype, _ = self.specs[name]
        return torch.empty((), dtype=dtype, device=self.device).expand(shape)

    def _kept(self, name: str) -> Tensor:
        return _made(self.specs[name], self.device).copy_(self.homes[name], non_blocking=True)

    def slot_bytes(self) -> int:
        return max((self.sizes[index] for index in self.coming), default=0)


class _Turns:
    """The blocks that take turns, and the slots that they take them in."""

    def __init__(self, streamer: Streamer, count: int) -> None:
        self.streamer = streamer
        device, size = streamer.device, streamer.slot_bytes()
        cuda = device.type == "cuda"
        self.slots = [torch.empty(size, dtype=torch.uint8, device=device) for _ in range(count)]
        self.side = torch.cuda.Stream(device) if cuda else None
        if self.side is not None:  # what had this memory before may still be read
            self.side.wait_stream(torch.cuda.current_stream(device))
        self.ready = [torch.cuda.Event() for _ in self.slots] if cuda else []
        self.unused = [torch.cuda.Event() for _ in self.slots] if cuda else []
        self.held: list[int | None] = [None] * count  # the block in each slot
        self.current: int | None = None
        coming = streamer.coming
        self.after = dict(pairwise([*coming, *coming[:1]]))  # until the network shows its own order
        self.views: dict[tuple[int, int], dict[str, Tensor]] = {}

    def close(self) -> None:
        """Let nobody have the slots' memory before the copy that is on its way has arrived."""
        if self.side is not None:
            torch.cuda.current_stream(self.streamer.device).wait_stream(self.side)

    def need(self, block: int) -> None:
        """Called before a module of the block runs: the block is here when this returns."""
        if block == self.current:
            return
        before = self.current
        if before is not None:
            self.after[before] = block
            if self.side is not None:  # all that reads the block before is on its way
                self.unused[self.held.index(before)].record(torch.cuda.current_stream(self.streamer.device))
        if block not in self.held:
            self._bring(block)
        slot = self.held.index(block)
        if self.side is not None:
            torch.cuda.current_stream(self.streamer.device).wait_event(self.ready[slot])
        self.current = block
        following = self.after.get(block)
        if len(self.slots) > 1 and following is not None and following not in self.held:
            self._bring(following)

    def _bring(self, block: int) -> None:
        """Copy a block into the slot of one that is done with."""
        done = [index for index, held in enumerate(self.held) if held is None or held != self.current]
        slot = done[0] if done else 0  # of a single slot the block before is done, too
        views = self._views(block, slot)
        if self.side is None:
            self._fill(views)
        else:
            with torch.cuda.stream(self.side):
                self.side.wait_event(self.unused[slot])
                self._fill(views)
                self.ready[slot].record(self.side)
        self.held[slot] = block
        put(self.streamer.module, views)

    def _fill(self, views: Mapping[str, Tensor]) -> None:
        for name, view in views.items():
            view.copy_(self.streamer.homes[name], non_blocking=True)

    def _views(self, block: int, slot: int) -> dict[str, Tensor]:
        """The block's weights as they lie in the slot."""
        if (block, slot) not in self.views:
            specs = {name: self.streamer.specs[name] for name in self.streamer.groups[block]}
            self.views[block, slot] = _views(self.slots[slot], specs)
        return self.views[block, slot]


def _spec(tensor: Tensor) -> Spec:
    return tuple(tensor.shape), tensor.dtype, tensor.stride()


def _bytes(spec: Spec) -> int:
    shape, dtype, _ = spec
    return torch.Size(shape).numel() * dtype.itemsize


def _made(spec: Spec, device: torch.device) -> Tensor:
    shape, dtype, stride = spec
    return torch.empty_strided(shape, stride, dtype=dtype, device=device)


def homes_of(module: nn.Module) -> Mapping[str, Tensor]:
    """Where a module's weights are when they are on no device: its own tensors, or those of the file it was
    opened from."""
    return unread(module) or tensors_of(module)


def divided_map(module: nn.Module, shares: Mapping[int, int]) -> dict[str, Any]:
    """Submodule → number of the card, by accelerate's balanced map: blocks stay whole, each card gets about
    its share of the bytes, the last one what is left."""
    from accelerate import infer_auto_device_map

    whole = {each.__name__ for each in getattr(module, "COMPILED", ())}
    whole |= set(getattr(module, "_no_split_modules", None) or ())
    limits: dict[int | str, int | str] = {card: int(size * 1.05) for card, size in shares.items()}
    limits[max(shares)] = 2**62
    return dict(infer_auto_device_map(module, max_memory=limits, no_split_module_classes=sorted(whole)))


def divide(module: nn.Module, shares: Mapping[int, int]) -> None:
    """Put a module over several CUDA cards; its inputs and results stay on the first."""
    from accelerate import dispatch_model

    first = torch.device("cuda", min(shares))
    dispatch_model(module, device_map=divided_map(module, shares), main_device=first)
