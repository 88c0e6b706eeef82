"""Checkpoints that are a folder in hub layout."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from backend.errors import CheckpointError
from backend.weights import flax, kinds
from backend.weights.base import PREFERENCE, Source, config_name, holds_tokenizer, keys_of, tokenizer_files
from backend.weights.files import SINGLE, WEIGHTS, Shapes, open_tensors, read_json, shapes
from backend.weights.keymap import Origin, Renamed

if TYPE_CHECKING:
    from torch import Tensor

INDEX = "model_index.json"
VARIANTS = {"float32": "", "bfloat16": "bf16", "float16": "fp16"}  # how weight files of that dtype are marked
KINDS = ("safetensors", "bin", "msgpack")  # the best first
WEIGHT_FILE = re.compile(
    r"(?:diffusion_pytorch_model|pytorch_model|model|(?:diffusion_)?flax_model(?=\.msgpack))"
    r"(?:\.(?P<variant>\w+))?"
    rf"\.(?P<kind>{'|'.join(KINDS)})(?P<index>\.index(?:\.(?P<variant_behind>\w+))?\.json)?"
)


class FolderSource(Source):
    """A folder in hub layout. Raises CheckpointError if it is none, or of another family."""

    def __init__(self, name: str, family: str, root: Path) -> None:
        super().__init__(name, family)
        self.root = root
        self._keys = keys_of(family)
        if (root / INDEX).is_file():
            index = read_json(root / INDEX)
            kinds.refuse_others(name, kinds.by_index(index), family)
            self.folders: Mapping[str, str] = folders_of(self._keys, index)
        else:
            self.folders = self._keys.FOLDERS[None]
            if not is_layout(root, family):
                raise CheckpointError(_no_layout(name, root, family))

    def has(self, component: str) -> bool:
        if component not in self.folders:
            return False
        folder = self._folder(component)
        if component.startswith("tokenizer"):
            return holds_tokenizer(folder)
        if not (folder / config_name(component)).is_file():
            return False
        return component not in self._keys.COMPONENTS or self._chosen(component, "float32") is not None

    def config(self, component: str) -> dict[str, Any]:
        config = read_json(self.config_file(component))
        try:
            self._keys.check(component, config)
        except CheckpointError as error:
            raise CheckpointError(f"{self.name}: {error}") from error
        return config

    def tensors(self, component: str, dtype: str) -> Mapping[str, Tensor]:
        return Renamed(open_tensors(self._weights(component, dtype)), self._origins(component, dtype))

    def shapes(self, component: str, dtype: str) -> Shapes:
        return {name: origin.shape for name, origin in self._origins(component, dtype).items()}

    def tokenizer(self, component: str = "tokenizer") -> Path:
        folder = self._folder(component)
        if not holds_tokenizer(folder):
            raise CheckpointError(
                f"{self.name} has no {component}: {folder} holds no {tokenizer_files(component)}"
            )
        return folder

    def files(self, component: str, dtype: str) -> list[Path]:
        if component.startswith("tokenizer"):
            return sorted(path for path in self.tokenizer(component).iterdir() if path.is_file())
        config = self.config_file(component)
        return [config, *(self._weights(component, dtype) if component in self._keys.COMPONENTS else [])]

    def extras(self) -> dict[str, Any]:
        return read_extras(self.root, self.family)

    def config_file(self, component: str) -> Path:
        return self._folder(component) / config_name(component)

    def _folder(self, component: str) -> Path:
        if component not in self.folders:
            raise CheckpointError(f"{self.name} has no {component}")
        return self.root / self.folders[component]

    def _origins(self, component: str, dtype: str) -> dict[str, Origin]:
        found: Shapes = {}
        paths = self._weights(component, dtype)
        for path in paths:
            found |= shapes(path)
        by_flax = paths[0].suffix == flax.SUFFIX
        return (self._keys.flax_names if by_flax else self._keys.hub_names)(component, found)

    def _chosen(self, component: str, dtype: str) -> str | None:
        folder = self._folder(component)
        return choose_weights([path.name for path in folder.glob("*") if path.is_file()], dtype)

    def _weights(self, component: str, dtype: str) -> list[Path]:
        folder, chosen = self._folder(component), self._chosen(component, dtype)
        if chosen is None:
            raise CheckpointError(
                f"{self.name} has no weights for {component}: {folder} holds no .safetensors file"
            )
        refuse_flax(self.name, component, chosen, self._keys)
        names = shard_names(folder / chosen) if chosen.endswith(".json") else [chosen]
        for name in names:
            if not (folder / name).is_file():
                raise CheckpointError(
                    f"{self.name} is incomplete: {folder / chosen} lists {name}, which is not there"
                )
        return [folder / name for name in names]


def folders_of(keys: Any, index: Mapping[str, Any]) -> Mapping[str, str]:
    """Where a checkpoint with this model_index.json keeps its components: component → folder."""
    return keys.FOLDERS.get(index.get("_class_name"), keys.FOLDERS[None])


def is_layout(root: Path, family: str) -> bool:
    """Whether a folder has hub layout; some lack the model_index.json."""
    keys = keys_of(family)
    telling = [*keys.LITE, *keys.LITE.values()] or keys.COMPONENTS  # a text encoder may lie beside any files
    return (root / INDEX).is_file() or any((root / name / "config.json").is_file() for name in telling)


def read_extras(root: Path, family: str) -> dict[str, Any]:
    """The triptych.json of a folder, {} without one. Raises CheckpointError for one that cannot be used."""
    path = root / "triptych.json"
    extras = read_json(path) if path.is_file() else {}
    stages = keys_of(family).LATENT_STAGES
    if stages:
        rgb = extras.get("latent_rgb", {})
        fits = isinstance(rgb, dict) and set(rgb) <= set(stages) and all(map(_is_linear_map, rgb.values()))
    else:
        rgb = extras.get("latent_rgb")
        fits = rgb is None or _is_linear_map(rgb)
    if not isinstance(extras.get("defaults", {}), dict) or not fits:
        each = f", for each of {' and '.join(stages)}," if stages else ""
        raise CheckpointError(
            f"{path} cannot be used: defaults must be an object, and latent_rgb{each} hold factors, "
            "three numbers a channel, and bias, three numbers"
        )
    return extras


def hint(files: list[str], where: str = "") -> str:
    """What to say of a folder or repository without hub layout that holds these weight files."""
    if not files:
        return ""
    return f", but {'paste the URL of' if where else 'name'} one of its single files: {', '.join(files[:4])}"


def choose_weights(names: Iterable[str], dtype: str) -> str | None:
    """The file or shard index to read of those in a component's folder, None if there is none.

    Safetensors come before pickles, Flax's files last; then the variant that suits a run in `dtype` best, the
    plain one being float32; then any other.
    """
    best: tuple[int, int, str] | None = None
    for name in names:
        if match := WEIGHT_FILE.fullmatch(name):
            variant = match["variant"] or match["variant_behind"] or ""
            order = [*(VARIANTS[kept] for kept in PREFERENCE[dtype]), variant]
            rank = (KINDS.index(match["kind"]), order.index(variant), name)
            best = min(best or rank, rank)
    return best[2] if best else None


def refuse_flax(name: str, component: str, chosen: str, keys: Any) -> None:
    """Raises CheckpointError where the weights chosen are Flax's, in which the family was never published."""
    if flax.SUFFIX in chosen and not keys.FLAX:
        raise CheckpointError(
            f"{name} has the weights for {component} in Flax's form only ({chosen}), which can be read for "
            "Stable Diffusion 1.5 alone; take the .safetensors version of it"
        )


def shard_names(index: Path) -> list[str]:
    """The files that a shard index lists. Raises CheckpointError if it is broken or leads elsewhere."""
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index} lists no files")
    names = sorted({str(name) for name in weight_map.values()})
    for name in names:
        if Path(name).name != name or "\\" in name or not name.endswith(WEIGHTS):
            raise CheckpointError(f"{index} names the file {name!r}; it can name weight files beside it only")
    return names


def shards_of(index: str) -> re.Pattern[str]:
    """What the files that a shard index of this name lists are usually called."""
    match = WEIGHT_FILE.fullmatch(index)
    assert match is not None, f"{index} is no shard index"
    variant = match["variant"] or match["variant_behind"]
    mark = rf"(?:\.{variant})?" if variant else ""
    return re.compile(rf"{index.partition('.')[0]}{mark}-\d+-of-\d+\.{match['kind']}")


def _no_layout(name: str, root: Path, family: str) -> str:
    for index in sorted(root.glob(f"*/{INDEX}")):
        kinds.refuse_others(name, kinds.by_index(read_json(index)), family)
    files = [path.name for path in root.glob("*") if path.name.endswith(SINGLE)]
    return f"{name} is no checkpoint in hub layout: it has no {INDEX}{hint(files)}"


def _is_linear_map(rgb: Any) -> bool:
    """Whether this is what previews need."""
    rows = [*rgb.get("factors", []), rgb.get("bias")] if isinstance(rgb, dict) else [None]
    return all(isinstance(row, list) and [type(x) in (int, float) for x in row] == [True] * 3 for row in rows)
