"""A checkpoint's components as the manager lends them: made of what, how large, and how they load."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from backend.errors import CheckpointError, InvalidRequest, TriptychError
from backend.nn.compiled import compile_parts
from backend.phases import Component
from backend.requests import Request
from backend.weights.load import load_module
from backend.weights.source import Source


@dataclass(frozen=True, kw_only=True)
class Parts:
    """Makes components of one checkpoint for one device; networks of our own may be `compiled`."""

    source: Source
    device: torch.device
    compiled: bool = False

    def component(self, name: str, dtype: torch.dtype, load: Callable[[], Any]) -> Component:
        """`load` makes what is lent, in `dtype`."""
        precision = dtype_name(dtype)
        return Component(
            name=name,
            identity=(name, self.fingerprint(name, dtype), precision, str(self.device)),
            bytes=self.source.parameter_bytes(name, precision),
            precision=precision,
            dtype=precision,
            load=load,
        )

    def network(self, name: str, dtype: torch.dtype, build: Callable[[], nn.Module]) -> Component:
        """A network of our own, which `build` makes."""

        def load() -> nn.Module:
            network = load_module(
                build,
                self.source.tensors(name, dtype_name(dtype)),
                dtype=dtype,
                device=self.device,
                layout=layout_of(dtype),
                what=f"{self.source.name}: {name}",
            )
            if self.compiled:
                compile_parts(network)
            return network

        return self.component(name, dtype, load)

    def fingerprint(self, name: str, dtype: torch.dtype) -> str:
        """Changes with what the component is made of; before it is downloaded, the plan needs no more."""
        precision = dtype_name(dtype)
        present = self.source.present([name], precision)
        return self.source.fingerprint(name, precision) if present else self.source.name


def dtype_name(dtype: torch.dtype) -> str:
    """torch.bfloat16 → "bfloat16"."""
    return str(dtype).removeprefix("torch.")


def layout_of(dtype: torch.dtype) -> torch.memory_format:
    """Channels last where it helps: in 16 bits convolutions gain; in float32 they do not, and weights in the
    files' own layout are run from the mapped file without a copy."""
    return torch.channels_last if dtype.itemsize == 2 else torch.contiguous_format


def completed(request: Request, source: Source, defaults: Mapping[str, Any]) -> dict[str, Any]:
    """The fields that `defaults` names, as the request has them, else by those defaults of the checkpoint's.

    Raises CheckpointError for a default that cannot be served.
    """
    missing = {name: value for name, value in defaults.items() if getattr(request, name) is None}
    try:
        full = replace(request, **missing)
    except InvalidRequest as error:
        raise CheckpointError(f"{source.name} has a default that cannot be served: {error}") from error
    return {name: getattr(full, name) for name in defaults}


def finite(values: Tensor, what: str, dtype: torch.dtype) -> Tensor:
    """`values`, which `what` gave, computing in `dtype`.

    Raises TriptychError where no picture can be made of them.
    """
    if not values.isfinite().all():
        wider = {torch.float16: "bfloat16 or float32", torch.bfloat16: "float32"}.get(dtype)
        advice = f"{wider} may help" if wider else "the weights may be damaged"
        raise TriptychError(f"{what} in {dtype_name(dtype)} gave values that are not numbers; {advice}")
    return values
