"""LoRA files: whose layers they are for, in whatever layout, and the low-rank terms in them.

Read are the hub's layout (of peft, and of diffusers before it), the trainers' (`lora_unet_…`, also with
convolutions, as LoCon has them), and the original Stable Cascade release's. What the families call their
layers stands in their `keys`. No torch at import: what a file is, is told by its header.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from backend.catalog import FAMILIES
from backend.errors import CheckpointError, InvalidRequest
from backend.weights import kinds
from backend.weights.base import keys_of, stamp
from backend.weights.files import Shapes, metadata, open_tensors, read_json, shapes
from backend.weights.keymap import Place

if TYPE_CHECKING:
    from torch import Tensor

    from backend.nn.lowrank import Term

# The end of a tensor's name → what it is of its layer; what comes before names the layer.
ROLES = re.compile(
    r"(?P<layer>.+?)"
    r"(?:\.lora_(?P<peft>[AB])(?:\.[^.]+)?\.weight"  # perhaps with the adapter's name
    r"|\.lora_(?P<trainer>down|up|mid)(?:\.weight)?"
    r"|(?:\.lora|_lora|\.lora_linear_layer)\.(?P<early>down|up)\.weight"
    r"|\.(?P<alpha>alpha))"
)
PEFT = {"A": "down", "B": "up"}
STAGE_C = re.compile(r"weights\.(\d+)")  # the original release numbers its layers, and names none
RETOKENED = ("embeddings.embeddings", "embeddings.indices")  # what it changed of the text encoder's tokens

ELSEWHERE = {  # part of a layer's name → a program's network that it is of
    "single_transformer_blocks": "Flux",
    "double_blocks": "Flux",
    "single_blocks": "Flux",
    "caption_projection": "PixArt",
    "motion_modules": "AnimateDiff",
}
TEXT = {  # how the names of text encoders' layers begin, in files with nothing else → the family
    "lora_prior_te_": "stable_cascade",
    "lora_te3_": "sd3",
    "lora_te_": "sd15",
    "text_encoder.": "sd15",
}
SECOND_CLIP = ("lora_te2_", "text_encoder_2.")
CROSS = re.compile(r".*attn2[._]to_[kv]$")  # layers that take the text's features, whose width tells
XL = "Stable Diffusion XL"
WIDTHS = {1024: "Stable Diffusion 2", 2048: XL}
ADAPTER, ADAPTER_CONFIG = "adapter_model", "adapter_config.json"  # peft's own files
SETTINGS = "lora_adapter_metadata"  # where the hub's layout keeps peft's settings
DIFFERENCES = re.compile(r"(^|.*\.)(diff|diff_b|w_norm|b_norm|set_weight|reshape_weight)")

ARCHITECTURES = {
    "sd15": "stable-diffusion-v1",
    "sd3": "stable-diffusion-v3-medium",
    "stable_cascade": "stable-cascade-v1",
}


@dataclass
class Layer:
    """The names of a layer's tensors in the file."""

    down: str = ""
    up: str = ""
    mid: str = ""
    alpha: str = ""


@dataclass(frozen=True)
class Lora:
    """A LoRA file. Raises CheckpointError, from `layers` on, for one that is damaged or of another kind."""

    path: Path

    @cached_property
    def shapes(self) -> Shapes:
        return shapes(self.path)

    @cached_property
    def metadata(self) -> dict[str, str]:
        return metadata(self.path)

    @cached_property
    def layers(self) -> dict[str, Layer]:
        """By the names that the file has for them."""
        if kind := other_kind(self.shapes):
            raise CheckpointError(f"{self.path.name} is {kind}, which cannot be used; LoRAs can be")
        found: dict[str, Layer] = {}
        unknown: list[str] = []
        for name in self.shapes:
            match = ROLES.fullmatch(name)
            if match:
                told = match["trainer"] or match["early"] or match["alpha"]
                setattr(found.setdefault(match["layer"], Layer()), told or PEFT[match["peft"]], name)
            elif name not in RETOKENED:
                unknown.append(name)
        if any(map(DIFFERENCES.fullmatch, unknown)):
            raise CheckpointError(
                f"{self.path.name} holds whole differences of weights ({_some(unknown)}), which cannot be "
                "used; LoRAs can be"
            )
        if unknown or not found:
            raise CheckpointError(f"{self.path.name} is no LoRA: it holds {_some(unknown)}")
        for name, layer in found.items():
            self._check(name, layer)
        return found

    def _check(self, name: str, layer: Layer) -> None:
        if not (layer.down and layer.up):
            raise CheckpointError(f"{self.path.name} is damaged: {name} lacks one of its two matrices")
        down, up = self.shapes[layer.down], self.shapes[layer.up]
        low = self.shapes[layer.mid][0] if layer.mid else down[0]
        if (
            len(down) < 2
            or len(up) < 2
            or up[1] != low
            or (layer.mid and self.shapes[layer.mid][1] != down[0])
        ):
            raise CheckpointError(
                f"{self.path.name} is damaged: the ranks of {name} do not fit "
                f"({_shape(down)} and {_shape(up)})"
            )

    @cached_property
    def numbered(self) -> bool:
        """Whether its layers have numbers for names: the original Stable Cascade release's."""
        return all(map(STAGE_C.fullmatch, self.layers))

    @cached_property
    def family(self) -> str | None:
        """The family it is for; None where nothing tells. Raises CheckpointError for others' networks."""
        family = family_of(self.layers)
        if isinstance(family, Elsewhere):
            raise CheckpointError(f"{self.path.name} is a LoRA for {family}, which is not painted with here")
        read = {self.shapes[layer.down][1] for name, layer in self.layers.items() if CROSS.fullmatch(name)}
        for width, title in WIDTHS.items():
            if width in read:
                raise CheckpointError(
                    f"{self.path.name} is a LoRA for {title}, which is not painted with here"
                )
        return family

    @cached_property
    def ranks(self) -> tuple[int, ...]:
        """The different ranks of its layers, in order."""
        return tuple(sorted({self.shapes[layer.down][0] for layer in self.layers.values()}))

    @property
    def tokens(self) -> int:
        """How many words of the text encoder the original Stable Cascade release trained with it. They are
        left out: of new ones the file does not say what they are called, nor what it adds to."""
        return self.shapes[RETOKENED[1]][0] if RETOKENED[1] in self.shapes else 0

    def places(self, family: str, component: str, base: Shapes) -> dict[str, list[Place]]:
        """Which of its layers are for a component, by its tensors' names and shapes, and where they belong.

        Raises CheckpointError where it is of another family, InvalidRequest for layers that the component
        lacks, or has in another shape.
        """
        kinds.refuse_others(self.path.name, self.family, family)
        paths = {
            name.removesuffix(".weight"): shape
            for name, shape in base.items()
            if name.endswith(".weight") and len(shape) > 1
        }
        keys = keys_of(family)
        if not base:  # not here yet: what is it for, as far as its names tell
            return {n: [] for n in self.layers if _rest(n, keys.LORA_PREFIXES, component) is not None}
        if self.numbered:
            return self._numbered(keys, component, paths)
        known: dict[str, list[Place]] = keys.lora_names(component, paths)
        known |= {name.replace(".", "_"): places for name, places in known.items()}
        found: dict[str, list[Place]] = {}
        lacking: list[str] = []
        for name in self.layers:
            rest = _rest(name, keys.LORA_PREFIXES, component)
            if rest is None:
                continue
            places = known.get(rest)
            if places is None:
                lacking.append(name)
            else:
                found[name] = places
        if lacking:
            raise InvalidRequest(
                f"{self.path.name} has {len(lacking)} layers that the checkpoint's {component} lacks "
                f"({_some(lacking)}): it is for another one"
            )
        self._check_places(found, component, paths)
        return found

    def _check_places(self, places: Mapping[str, list[Place]], component: str, paths: Shapes) -> None:
        for name, targets in places.items():
            down, up = self.shapes[self.layers[name].down], self.shapes[self.layers[name].up]
            kernel = self.shapes[self.layers[name].mid or self.layers[name].down][2:]
            for place in targets:
                due = paths[place.path]
                rows = up[0] // (place.chunk[1] if place.chunk else 1)
                if (rows, down[1]) != due[:2] or (kernel or (1, 1)) != (due[2:] or (1, 1)):
                    raise InvalidRequest(
                        f"{self.path.name} is for another checkpoint: its layer {name} is for weights of "
                        f"{_shape((rows, down[1], *kernel))}, and those of the {component} are {_shape(due)}"
                    )

    def _numbered(self, keys: Any, component: str, paths: Shapes) -> dict[str, list[Place]]:
        """The original release lists the attentions' matrices in their order in the network: of each the
        result's, then that of queries, keys and values."""
        if component != "prior":
            return {}
        order: list[list[Place]] = keys.lora_order(paths)
        names = sorted(self.layers, key=lambda name: int(name.partition(".")[2]))
        if len(names) != len(order):
            raise InvalidRequest(
                f"{self.path.name} has {len(names)} layers, and the attentions of the checkpoint's "
                f"{component} {len(order)}: it is for another one"
            )
        places = dict(zip(names, order, strict=True))
        self._check_places(places, component, paths)
        return places

    def numbers(self, places: Iterable[str]) -> int:
        """How many numbers the terms of these layers have."""
        each = (self.layers[name] for name in places)
        return sum(math.prod(self.shapes[name]) for layer in each for name in (layer.down, layer.up))

    def terms(self, places: Mapping[str, list[Place]], weight: float) -> dict[str, Term]:
        """The terms by the paths of the layers that they are for, times `weight`; in float32."""
        tensors = open_tensors([self.path])
        scale = self._scales()
        return {
            path: term
            for name, targets in places.items()
            for path, term in self._terms(name, targets, tensors, weight, scale)
        }

    def _terms(
        self,
        name: str,
        targets: Iterable[Place],
        tensors: Mapping[str, Tensor],
        weight: float,
        scale: Callable[[str, int], float],
    ) -> Iterator[tuple[str, Term]]:
        import torch

        from backend.nn.lowrank import Term

        layer = self.layers[name]
        down, up = tensors[layer.down].float(), tensors[layer.up].float().flatten(1)
        rank = down.shape[0]
        if layer.mid:  # of a convolution in three: 1×1 to the rank, k×k inside it, 1×1 back
            down = torch.einsum("orhw,rk->okhw", tensors[layer.mid].float(), down.flatten(1))
        factor = float(tensors[layer.alpha]) / rank if layer.alpha else scale(name, rank)
        if not math.isfinite(factor):
            raise CheckpointError(f"{self.path.name} is damaged: the alpha of {name} is no number")
        if not (down.isfinite().all() and up.isfinite().all()):
            raise CheckpointError(
                f"{self.path.name} is damaged: the matrices of {name} are not all of finite numbers"
            )
        up = up * (factor * weight)
        for place in targets:
            rows = up.roll(len(up) // 2, 0) if place.swapped else up
            if place.chunk is not None:
                index, count = place.chunk
                rows = rows.chunk(count)[index]
            yield place.path, Term(down, rows)

    def _scales(self) -> Callable[[str, int], float]:
        """A layer's alpha over its rank, where no tensor tells: by the name of the layer and its rank."""
        if self.numbered:
            return lambda _, rank: 1.0 / rank
        settings = self._settings()
        starts = [key.removesuffix("lora_alpha") for key in settings if key.endswith("lora_alpha")]

        def scale(name: str, rank: int) -> float:
            start = next((start for start in starts if name.startswith(start)), None)
            if start is None:
                return 1.0
            alpha = settings[f"{start}lora_alpha"]
            for pattern, own in (settings.get(f"{start}alpha_pattern") or {}).items():
                if f".{name}".endswith(f".{pattern}"):
                    alpha = own
            if not isinstance(alpha, int | float):
                raise CheckpointError(f"{self.path.name} is damaged: its alpha is {alpha!r:.80}")
            return alpha / (math.sqrt(rank) if settings.get(f"{start}use_rslora") else rank)

        return scale

    def _settings(self) -> dict[str, Any]:
        """Those that peft wrote: into the file, each with the component's prefix, or into one beside it."""
        beside = self.path.with_name(ADAPTER_CONFIG)
        if self.path.stem == ADAPTER and beside.is_file():
            return read_json(beside)
        try:
            return dict(json.loads(self.metadata.get(SETTINGS, "{}")))
        except (ValueError, TypeError) as error:
            raise CheckpointError(f"{self.path.name} is damaged: its settings cannot be read") from error

    @property
    def stamp(self) -> str:
        return stamp(self.path)


class UsedLora(NamedTuple):
    """A LoRA, what the request calls it, and its weights for the network and for the text encoders."""

    lora: Lora
    name: str
    network: float
    text: float

    def weight(self, component: str) -> float:
        return self.text if component.startswith("text_encoder") else self.network


def other_kind(names: Iterable[str]) -> str | None:
    """What a file with tensors of these names is, of the kinds that are like LoRAs and cannot be used."""
    return kinds.by_tensors(names, kinds.LIKE_LORAS)


def family_of(layers: Iterable[str]) -> str | None:
    """The family whose layers have such names, or, as `Elsewhere`, another program's network."""
    names = list(layers)
    if names and all(map(STAGE_C.fullmatch, names)):
        return "stable_cascade"
    elsewhere = (title for part, title in ELSEWHERE.items() if any(part in name for name in names))
    if title := next(elsewhere, None):
        return Elsewhere(title)
    tells = {family: re.compile(keys_of(family).LORA_TELLS) for family in FAMILIES}
    told = next((family for family, telling in tells.items() if any(map(telling.search, names))), None)
    if told in ("sd15", None) and any(name.startswith(SECOND_CLIP) for name in names):
        return "sd3" if any(name.startswith("lora_te3_") for name in names) else Elsewhere(XL)
    return told or next(
        (family for start, family in TEXT.items() if any(name.startswith(start) for name in names)), None
    )


class Elsewhere(str):
    """The title of a network that is none of ours."""


def _rest(name: str, prefixes: Mapping[str, str], component: str) -> str | None:
    """The name of a layer of `component` without what says so; None of another's."""
    start = max((row for row in prefixes if name.startswith(row)), key=len, default="")
    if prefixes.get(start, prefixes[""]) != component:
        return None
    return name.removeprefix(start)


def _some(names: list[str]) -> str:
    return f"{', '.join(names[:3])}{', …' if len(names) > 3 else ''}"[:200] or "nothing"


def _shape(shape: tuple[int, ...]) -> str:
    return "×".join(map(str, shape))


def save_lora(
    path: Path,
    terms: Mapping[str, Mapping[str, Term]],
    *,
    family: str,
    base: str,
    alpha: float,
    words: Iterable[str] = (),
    licence: str = "",
    title: str = "",
    dtype: str = "float16",
) -> None:
    """Write a LoRA in the hub's layout: its `terms` by component and by the path of the layer.

    Beside them the file says what it is made for (`base`), its ranks and alpha, the words that call it and
    under which licence it is. What the terms are multiplied by, alpha over rank, is taken out of them.
    """
    import torch
    from safetensors.torch import save_file

    tensors: dict[str, Tensor] = {}
    settings: dict[str, Any] = {}
    ranks: set[int] = set()
    for component, layers in terms.items():
        own = {layer: term.down.shape[0] for layer, term in layers.items()}
        most = max(own.values())
        ranks |= set(own.values())
        settings |= {
            f"{component}.peft_type": "LORA",
            f"{component}.r": most,
            f"{component}.lora_alpha": alpha,
            f"{component}.rank_pattern": {layer: rank for layer, rank in own.items() if rank != most},
            f"{component}.alpha_pattern": {},
            f"{component}.target_modules": sorted(layers),
        }
        for layer, term in layers.items():
            up = term.up.detach().float() * (term.down.shape[0] / alpha)
            if term.down.ndim == 4:
                up = up[..., None, None]
            for name, tensor in (("lora_A", term.down.detach()), ("lora_B", up)):
                kept = tensor.to(getattr(torch, dtype)).contiguous()
                tensors[f"{component}.{layer}.{name}.weight"] = kept
    calling = ", ".join(words)
    told = {
        "format": "pt",
        SETTINGS: json.dumps(settings, sort_keys=True),
        "modelspec.sai_model_spec": "1.0.0",
        "modelspec.architecture": f"{ARCHITECTURES[family]}/lora",
        "modelspec.title": title or path.stem,
        "modelspec.trigger_phrase": calling,
        "modelspec.license": licence,
        "ss_base_model_version": base,
        "ss_network_dim": str(max(ranks)),
        "ss_network_alpha": f"{alpha:g}",
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.name}.part")
    save_file(tensors, unfinished, metadata={key: value for key, value in told.items() if value})
    unfinished.replace(path)
