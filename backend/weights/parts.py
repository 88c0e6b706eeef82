"""A checkpoint's components as the manager lends them: made of what, how large, and how they load."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from backend.errors import CheckpointError, InvalidRequest, TriptychError
from backend.memory.blocks import blocks_of
from backend.nn.compiled import compile_parts
from backend.nn.lowrank import Term, together
from backend.phases import Adapted, Blocks, Component, NotFinite
from backend.requests import Request
from backend.text.inversion import UsedEmbedding, check_fits, fitting, read_embedding
from backend.weights import flax
from backend.weights.base import keys_of, stamp
from backend.weights.files import Shapes
from backend.weights.load import load_module
from backend.weights.lora import UsedLora
from backend.weights.source import Source

UNSEEN = 24  # blocks of a network whose files are not here yet: as many as SD3's and T5's have

Load = Callable[[torch.device], Any]


@dataclass(frozen=True, kw_only=True)
class Parts:
    """Makes components of one checkpoint for a type of device; networks of our own may be `compiled`.

    `wider` are the dtypes of components that overflowed in a narrower one, `loras` go with the components
    that they have layers of, `embeddings` are words of the prompts.
    """

    source: Source
    device: torch.device
    compiled: bool = False
    wider: Mapping[str, torch.dtype] = field(default_factory=dict)
    loras: tuple[UsedLora, ...] = ()
    embeddings: tuple[UsedEmbedding, ...] = ()

    def dtype(self, name: str, dtype: torch.dtype) -> torch.dtype:
        """What a component computes in where all others do in `dtype`."""
        wider = self.wider.get(name, dtype)
        return wider if wider.itemsize > dtype.itemsize or dtype == torch.float16 else dtype

    def component(
        self, name: str, dtype: torch.dtype, load: Load, layout: torch.memory_format = torch.contiguous_format
    ) -> Component:
        """`load` makes what is lent, in `dtype`, its convolutions in `layout`; on the device "meta", too."""
        precision = dtype_name(dtype)

        def blocks() -> Blocks:
            return blocks_of(self._sizes(name, dtype))

        return Component(
            name=name,
            identity=(name, self.fingerprint(name, dtype), precision),
            bytes=self.source.parameter_bytes(name, precision),
            copied=self._copied(name, dtype, layout),
            precision=precision,
            dtype=precision,
            checkpoint=self.source.name,
            family=self.source.family,
            load=lambda device: load(torch.device(device)),
            open=lambda: load(torch.device("meta")),
            blocks=blocks,
            adapted=self._adapted(name, dtype),
        )

    def network(
        self, name: str, dtype: torch.dtype, build: Callable[[], nn.Module], *, forwards: int = 1
    ) -> Component:
        """A network of our own, which `build` makes and which runs at least so many times a picture."""

        def load(device: torch.device) -> nn.Module:
            network = load_module(
                build,
                self.source.tensors(name, dtype_name(dtype)),
                dtype=dtype,
                device=device,
                layout=layout_of(dtype),
                what=f"{self.source.name}: {name}",
            )
            if self.compiled and device.type != "meta":
                compile_parts(network)
            return network

        made = self.component(name, dtype, load, layout_of(dtype))
        if made.adapted is None:
            return made
        shapes = self._base(name, dtype)
        merging = sum(math.prod(shapes[f"{path}.weight"]) for path in made.adapted.paths if shapes)
        return replace(
            made, adapted=replace(made.adapted, merging_bytes=merging * dtype.itemsize, forwards=forwards)
        )

    def fits(self, name: str, dtype: torch.dtype) -> bool:
        """Whether the LoRAs fit a component, which may come in several sizes."""
        try:
            self._adapted(name, dtype)
        except (CheckpointError, InvalidRequest):
            return False
        return True

    def words(self, widths: Mapping[str, int]) -> Callable[[], dict[str, dict[str, Tensor]]]:
        """What reads the embeddings: by encoder ("clip_l", "clip_g"), whose tokens have these widths, and by
        name. Raises InvalidRequest for one that no encoder takes."""
        for use in self.embeddings:
            check_fits(use.name, use.look.sizes, widths)
        return lambda: fitting({use.name: read_embedding(use.path) for use in self.embeddings}, widths)

    @property
    def words_key(self) -> Hashable:
        return tuple((use.name, stamp(use.path)) for use in self.embeddings)

    def _base(self, name: str, dtype: torch.dtype) -> Shapes:
        """The shapes of a component's tensors; none, if it is not here yet."""
        precision = dtype_name(dtype)
        return self.source.shapes(name, precision) if self.source.present([name], precision) else {}

    def _adapted(self, name: str, dtype: torch.dtype) -> Adapted | None:
        """What the LoRAs add to a component. Raises CheckpointError for one that does not fit it."""
        uses = [use for use in self.loras if use.weight(name)]
        base = self._base(name, dtype) if uses else {}
        full = {lite: full for full, lite in keys_of(self.source.family).LITE.items()}
        found = [(use, use.lora.places(self.source.family, full.get(name, name), base)) for use in uses]
        found = [(use, places) for use, places in found if places]
        if not found:
            return None

        def terms() -> dict[str, Term]:
            each = [use.lora.terms(places, use.weight(name)) for use, places in found]
            paths = dict.fromkeys(path for terms in each for path in terms)
            return {path: together(terms[path] for terms in each if path in terms) for path in paths}

        return Adapted(
            key=tuple((use.lora.stamp, use.weight(name)) for use, _ in found),
            names=tuple(use.name for use, _ in found),
            paths=frozenset(place.path for _, places in found for each in places.values() for place in each),
            terms=terms,
            bytes=sum(use.lora.numbers(places) for use, places in found) * dtype.itemsize,
        )

    def _sizes(self, name: str, dtype: torch.dtype) -> dict[str, int]:
        """Bytes by tensor, as it runs; of a component that is not here yet, of a network of even parts."""
        precision = dtype_name(dtype)
        if not self.source.present([name], precision):
            size = self.source.parameter_bytes(name, precision)
            return {f"blocks.{index}.weight": size // UNSEEN for index in range(UNSEEN)}
        shapes = self.source.shapes(name, precision)
        return {each: math.prod(shape) * dtype.itemsize for each, shape in shapes.items()}

    def _copied(self, name: str, dtype: torch.dtype, layout: torch.memory_format) -> int:
        """How much of the component in RAM is no view of its mapped file: all, if that has another dtype or
        is one of Flax's or not here yet; else the convolutions that are laid out anew."""
        precision = dtype_name(dtype)
        here = self.source.present([name], precision)
        by_flax = here and any(path.suffix == flax.SUFFIX for path in self.source.files(name, precision))
        if not here or by_flax or self.source.precision(name, precision) != precision:
            return self.source.parameter_bytes(name, precision)
        if layout != torch.channels_last:
            return 0
        shapes = self.source.shapes(name, precision)
        kernels = (shape for shape in shapes.values() if len(shape) == 4 and shape[2] * shape[3] > 1)
        return sum(map(math.prod, kernels)) * dtype.itemsize

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


def finite(values: Tensor, component: str, what: str, dtype: torch.dtype) -> Tensor:
    """`values`, which `what` gave, computed by `component` in `dtype`.

    Raises NotFinite where no picture can be made of them and a wider dtype may help, else TriptychError.
    """
    if not values.isfinite().all():
        if dtype == torch.float16:
            raise NotFinite(component, what)
        advice = "float32 may help" if dtype == torch.bfloat16 else "the weights may be damaged"
        raise TriptychError(f"{what} in {dtype_name(dtype)} gave values that are not numbers; {advice}")
    return values


def device_of(module: nn.Module) -> torch.device:
    """Where a network computes."""
    return next(module.parameters()).device
