"""Where a checkpoint's parts come from: a hub repository, a folder in hub layout, or an original single file.

No torch at import: the plan and the page ask sources for configs and sizes.
"""

from __future__ import annotations

import importlib
import json
import math
import re
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from backend import catalog
from backend.errors import AccessError, CheckpointError, InvalidRequest
from backend.events import Loading
from backend.settings import Settings
from backend.weights import kinds
from backend.weights.files import WEIGHTS, Shapes, open_tensors, read_json, shapes
from backend.weights.hub import Repository, pasted_url
from backend.weights.keymap import Origin, Renamed

if TYPE_CHECKING:
    from torch import Tensor

DEMO = Path(__file__).parents[2] / "assets" / "demo"
DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
VARIANTS = {"bfloat16": "bf16", "float16": "fp16"}  # how weight files of that dtype are marked
WEIGHT_FILE = re.compile(
    r"(?:diffusion_pytorch_model|pytorch_model|model)(?:\.(?P<variant>\w+))?"
    r"\.(?P<kind>safetensors|bin)(?P<index>\.index(?:\.(?P<variant_behind>\w+))?\.json)?"
)
REPOSITORY = re.compile(r"[\w.-]+/[\w.-]+")


class Source(ABC):
    """A checkpoint's parts, by the component names of the hub layout."""

    def __init__(self, name: str, family: str) -> None:
        self.name = name
        self.family = family

    def fetch(self, components: Iterable[str], dtype: str, *, weights: bool = True) -> Iterator[Loading]:
        """Download what is missing, with progress; nothing is yielded when all is there.

        `weights=False` leaves out all but configs and tokenizers. Raises AccessError where the hub refuses.
        """
        yield from ()

    @abstractmethod
    def config(self, component: str) -> dict[str, Any]:
        """The parsed config.json of a component, or scheduler_config.json of "scheduler"."""

    @abstractmethod
    def tensors(self, component: str, dtype: str) -> Mapping[str, Tensor]:
        """The tensors by their hub-layout names, mapped into memory and not read, in the dtype they have."""

    @abstractmethod
    def shapes(self, component: str, dtype: str) -> Shapes:
        """The shapes of those tensors, from the files' headers."""

    @abstractmethod
    def tokenizer(self, component: str = "tokenizer") -> Path:
        """A folder with the tokenizer's files."""

    @abstractmethod
    def files(self, component: str, dtype: str) -> list[Path]:
        """What `component` is read from."""

    def present(self, components: Iterable[str], dtype: str) -> bool:
        """Whether these components can be loaded without a download."""
        try:
            return all(path.is_file() for component in components for path in self.files(component, dtype))
        except CheckpointError:
            return False

    def parameter_bytes(self, component: str, dtype: str) -> int:
        """The size of the component's weights when they run at `dtype`; loads and downloads nothing."""
        return sum(math.prod(shape) for shape in self.shapes(component, dtype).values()) * DTYPE_BYTES[dtype]

    def extras(self) -> dict[str, Any]:
        """What a checkpoint of ours says of itself in triptych.json (defaults, preview colours, examples)."""
        return {}

    def fingerprint(self, component: str, dtype: str) -> str:
        """A text that changes when what the component is made from does, its tokenizer included."""
        tokenizer = tokenizer_of(component)
        paths = [*self.files(component, dtype), *(self.files(tokenizer, dtype) if tokenizer else [])]
        return "|".join(map(_stamp, paths))


class FolderSource(Source):
    """A folder in hub layout. Raises CheckpointError if it is none, or of another family."""

    def __init__(self, name: str, family: str, root: Path) -> None:
        super().__init__(name, family)
        self.root = root
        self._keys = _keys(family)
        index = root / "model_index.json"
        if index.is_file():
            _refuse_others(name, kinds.by_index(read_json(index)), family)
        elif not any((root / component / "config.json").is_file() for component in self._keys.COMPONENTS):
            files = [path.name for path in root.glob("*") if path.name.endswith(WEIGHTS)]
            raise CheckpointError(
                f"{name} is no checkpoint in hub layout: it has no model_index.json{_hint(files)}"
            )

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
        folder = self.root / component
        if (
            not ((folder / "vocab.json").is_file() and (folder / "merges.txt").is_file())
            and not (folder / "tokenizer.json").is_file()
        ):
            raise CheckpointError(
                f"{self.name} has no tokenizer: {folder} holds no vocab.json and merges.txt"
            )
        return folder

    def files(self, component: str, dtype: str) -> list[Path]:
        if component.startswith("tokenizer"):
            return sorted(path for path in self.tokenizer(component).iterdir() if path.is_file())
        config = self.config_file(component)
        return [config] if component == "scheduler" else [config, *self._weights(component, dtype)]

    def extras(self) -> dict[str, Any]:
        path = self.root / "triptych.json"
        extras = read_json(path) if path.is_file() else {}
        if not isinstance(extras.get("defaults", {}), dict) or not _is_linear_map(extras.get("latent_rgb")):
            raise CheckpointError(
                f"{path} cannot be used: defaults must be an object, and latent_rgb hold factors, "
                "three numbers a channel, and bias, three numbers"
            )
        return extras

    def config_file(self, component: str) -> Path:
        return self.root / component / config_name(component)

    def _origins(self, component: str, dtype: str) -> dict[str, Origin]:
        found: Shapes = {}
        for path in self._weights(component, dtype):
            found |= shapes(path)
        return self._keys.hub_names(component, found)

    def _weights(self, component: str, dtype: str) -> list[Path]:
        folder = self.root / component
        chosen = choose_weights([path.name for path in folder.glob("*") if path.is_file()], dtype)
        if chosen is None:
            raise CheckpointError(
                f"{self.name} has no weights for {component}: {folder} holds no .safetensors file"
            )
        names = shard_names(folder / chosen) if chosen.endswith(".json") else [chosen]
        for name in names:
            if not (folder / name).is_file():
                raise CheckpointError(
                    f"{self.name} is incomplete: {folder / chosen} lists {name}, which is not there"
                )
        return [folder / name for name in names]


class FileSource(Source):
    """An original single file, and the source of what it cannot tell: `complement`, or else published values.

    Raises CheckpointError if it is damaged, or of another family.
    """

    def __init__(
        self, name: str, family: str, path: Path, complement: Source | None, standard: Source | None
    ) -> None:
        super().__init__(name, family)
        self.path = path
        self._keys = _keys(family)
        self._complement = complement
        self._standard = standard  # where the published tokenizer lies
        if path.suffix == ".safetensors":  # a pickle would have to be opened for it
            for component in self._parts:
                self.config(component)

    @cached_property
    def _parts(self) -> dict[str, dict[str, Origin]]:
        found = shapes(self.path)
        _refuse_others(self.name, kinds.by_tensors(found) or "a file of an unknown kind", self.family)
        try:
            return self._keys.parts(found)
        except CheckpointError as error:
            raise CheckpointError(f"{self.name}: {error}") from error

    def fetch(self, components: Iterable[str], dtype: str, *, weights: bool = True) -> Iterator[Loading]:
        components = list(components)
        if self._complement is not None:
            lacking = [
                name for name in components if name in self._keys.COMPONENTS and name not in self._parts
            ]
            yield from self._complement.fetch([*components, "scheduler"], dtype, weights=False)
            yield from self._complement.fetch(lacking, dtype, weights=weights)
        elif self._standard is not None and any(
            name.startswith(("text_encoder", "tokenizer")) for name in components
        ):
            try:
                yield from self._standard.fetch(["tokenizer"], dtype, weights=False)
            except AccessError as error:
                raise CheckpointError(f"{self._no_tokenizer()} ({error})") from error

    def config(self, component: str) -> dict[str, Any]:
        known = self._complement.config(component) if self._complement else None
        if component not in self._keys.COMPONENTS:
            return known or dict(self._keys.PUBLISHED[component])
        if component not in self._parts:
            return self._lacking(component).config(component)
        try:
            config = self._keys.config(component, self.shapes(component, ""), known)
            self._keys.check(component, config)
        except CheckpointError as error:
            raise CheckpointError(f"{self.name}: {error}") from error
        return config

    def tensors(self, component: str, dtype: str) -> Mapping[str, Tensor]:
        if component not in self._parts:
            return self._lacking(component).tensors(component, dtype)
        return Renamed(open_tensors([self.path]), self._parts[component])

    def shapes(self, component: str, dtype: str) -> Shapes:
        if component not in self._parts:
            return self._lacking(component).shapes(component, dtype)
        return {name: origin.shape for name, origin in self._parts[component].items()}

    def tokenizer(self, component: str = "tokenizer") -> Path:
        source = self._complement or self._standard
        if source is None:
            raise CheckpointError(self._no_tokenizer())
        try:
            return source.tokenizer(component)
        except (AccessError, CheckpointError) as error:
            raise CheckpointError(f"{self._no_tokenizer()} ({error})") from error

    def files(self, component: str, dtype: str) -> list[Path]:
        if component.startswith("tokenizer"):
            return sorted(path for path in self.tokenizer(component).iterdir() if path.is_file())
        if component in self._keys.COMPONENTS and component not in self._parts:
            return self._lacking(component).files(component, dtype)
        return [self.path]

    def fingerprint(self, component: str, dtype: str) -> str:
        settings = json.dumps(self.config(component), sort_keys=True)  # the complement's share
        tokenizer = tokenizer_of(component)
        paths = [self.path]
        if component in self._keys.COMPONENTS and component not in self._parts:
            return self._lacking(component).fingerprint(component, dtype)
        if tokenizer and self.present([tokenizer], dtype):
            paths += self.files(tokenizer, dtype)
        return "|".join([*map(_stamp, paths), settings])

    def _lacking(self, component: str) -> Source:
        if self._complement is None:
            raise CheckpointError(
                f"{self.name} holds no {component}; set config_from to a folder or hub repository with one"
            )
        return self._complement

    def _no_tokenizer(self) -> str:
        return (
            f"{self.name} is a single file, which holds no tokenizer, and none was found; set config_from "
            "to a folder with a tokenizer/ (vocab.json and merges.txt), or to a hub repository such as "
            f"{catalog.published(self.family).repository}"
        )


class HubSource(Source):
    """A hub repository in hub layout, or one single file of a repository, by way of the hub's cache.

    Until it is downloaded, configs and sizes are those of the family's first published checkpoint.
    """

    def __init__(
        self,
        name: str,
        family: str,
        repository: Repository,
        file: str | None = None,
        complement: Source | None = None,
        standard: Source | None = None,
    ) -> None:
        super().__init__(name, family)
        self.repository = repository
        self.file = file
        self._complement = complement
        self._standard = standard
        self._keys = _keys(family)
        self._found: FolderSource | FileSource | None = None

    @property
    def local(self) -> FolderSource | FileSource | None:
        """What is downloaded, or None."""
        root = self.repository.cached()
        if self._found is None and root is not None and (root / (self.file or "model_index.json")).is_file():
            if self.file is None:
                self._found = FolderSource(self.name, self.family, root)
            else:
                path = root / self.file
                self._found = FileSource(self.name, self.family, path, self._complement, self._standard)
        return self._found

    def fetch(self, components: Iterable[str], dtype: str, *, weights: bool = True) -> Iterator[Loading]:
        components = list(components)
        if self.file is not None:
            if self.local is None:
                yield from self._download("checkpoint", [self.file], self.repository.listing())
            yield from self._here().fetch(components, dtype, weights=weights)
            return
        wanted = dict.fromkeys([*components, *map(tokenizer_of, components), "scheduler"])
        missing = [name for name in wanted if name and not self._has(name, dtype, weights)]
        if not missing:
            return
        listing = self.repository.listing()
        if "model_index.json" not in listing:
            files = [name for name in listing if name.endswith(WEIGHTS)]
            raise CheckpointError(
                f"{self.name} is no repository in hub layout{_hint(files, self.repository.page)}"
            )
        yield from self._download("checkpoint", ["model_index.json"], listing)
        self._here()  # refuses a checkpoint of another family before its weights are downloaded
        for component in missing:
            names = [path.name for path in map(Path, listing) if path.parent == Path(component)]
            settings = [name for name in names if name.endswith((".json", ".txt", ".model"))]
            yield from self._download(component, [f"{component}/{name}" for name in settings], listing)
            if component in self._keys.COMPONENTS and weights:
                self.config(component)  # refuses an inpainting UNet, too, before its weights are downloaded
                chosen = choose_weights(names, dtype)
                if chosen is None:
                    raise CheckpointError(
                        f"{self.name} has no weights for {component} that can be read (.safetensors)"
                    )
                shards = [chosen]
                if chosen.endswith(".json"):
                    shards = shard_names(self._cached(f"{component}/{chosen}"))
                yield from self._download(component, [f"{component}/{name}" for name in shards], listing)

    def config(self, component: str) -> dict[str, Any]:
        if not self._has(component, "", weights=False):
            return dict(self._keys.PUBLISHED[component])
        return self._here().config(component)

    def tensors(self, component: str, dtype: str) -> Mapping[str, Tensor]:
        return self._here().tensors(component, dtype)

    def shapes(self, component: str, dtype: str) -> Shapes:
        return self._here().shapes(component, dtype)

    def tokenizer(self, component: str = "tokenizer") -> Path:
        return self._here().tokenizer(component)

    def files(self, component: str, dtype: str) -> list[Path]:
        return self._here().files(component, dtype)

    def parameter_bytes(self, component: str, dtype: str) -> int:
        if self.present([component], dtype):
            return super().parameter_bytes(component, dtype)
        known = (entry for entry in catalog.entries(self.family) if entry.repository == self.repository.name)
        entry = next(known, catalog.published(self.family))
        return round(entry.parameters[component] * 1e6) * DTYPE_BYTES[dtype]

    def extras(self) -> dict[str, Any]:
        return self.local.extras() if self.local else {}

    def fingerprint(self, component: str, dtype: str) -> str:
        if self.present([component], dtype):
            return self._here().fingerprint(component, dtype)
        return f"{self.repository.name}@{self.repository.revision}/{self.file or component}, not downloaded"

    def _here(self) -> FolderSource | FileSource:
        if self.local is None:
            raise CheckpointError(f"{self.name} is not downloaded yet")
        return self.local

    def _cached(self, file: str) -> Path:
        root = self.repository.cached()
        assert root is not None
        return root / file

    def _has(self, component: str, dtype: str, weights: bool) -> bool:
        if isinstance(self.local, FolderSource) and not weights and not component.startswith("tokenizer"):
            return self.local.config_file(component).is_file()
        return self.present([component], dtype)

    def _download(self, component: str, files: list[str], listing: Mapping[str, int]) -> Iterator[Loading]:
        for file in files:
            if file not in listing:
                raise CheckpointError(f"{self.name} has no file {file}; see {self.repository.page}")
        total = sum(listing[file] for file in files)
        before = 0
        for file in files:
            for done in self.repository.download(file, listing[file]):
                yield Loading(
                    component=component, action="download", done_bytes=before + done, total_bytes=total
                )
            before += listing[file]


def resolve(checkpoint: str, family: str, settings: Settings, config_from: str | None = None) -> Source:
    """The source that `checkpoint` names; downloads nothing.

    That can be "demo", a catalogue name, a folder or single file (also relative to `settings.models_dir`), a
    hub repository OWNER/NAME, or a pasted hub URL. `config_from`, a folder or repository in the same
    spellings, completes a single file. Raises InvalidRequest for what means nothing, CheckpointError for what
    is missing, damaged or of another family.
    """
    if family not in catalog.FAMILIES:
        raise InvalidRequest(f"family is {family!r}; it can be {', '.join(catalog.FAMILIES)}")
    complement = None
    if config_from:
        complement = _resolve(config_from, family, settings, None, None)
        if isinstance(complement, FileSource) or (isinstance(complement, HubSource) and complement.file):
            raise InvalidRequest(f"config_from is {config_from!r}; it can be a folder or a hub repository")
    hub = catalog.published(family).repository
    standard = HubSource(hub, family, _repository(hub, settings)) if hub else None
    return _resolve(checkpoint, family, settings, complement, standard)


def _resolve(
    text: str, family: str, settings: Settings, complement: Source | None, standard: Source | None
) -> Source:
    text = text.strip()
    if text == "demo":
        return FolderSource("demo", family, DEMO / family)
    for entry in catalog.CATALOGUE:
        if entry.name == text and entry.repository:
            _refuse_others(text, entry.family, family)
            return HubSource(text, family, _repository(entry.repository, settings))
    if url := pasted_url(text):
        name, revision, file = url
        return HubSource(name, family, _repository(name, settings, revision), file, complement, standard)
    path = _on_disk(text, settings.models_dir)
    if path is None and REPOSITORY.fullmatch(text) and not text.endswith(WEIGHTS):
        return HubSource(text, family, _repository(text, settings))
    if path is None:
        names = ", ".join(entry.name for entry in catalog.entries(family))
        raise CheckpointError(
            f"checkpoint is {text!r}, and there is no such file or folder; it can be {names}, "
            "a hub repository (OWNER/NAME), a folder, or a .safetensors file"
        )
    if path.is_dir():
        return FolderSource(path.name, family, path)
    if path.suffix not in WEIGHTS:
        raise CheckpointError(f"{path} is no checkpoint: a single file ends in {', '.join(WEIGHTS)}")
    return FileSource(path.name, family, path, complement, standard)


def _on_disk(text: str, models_dir: Path | None) -> Path | None:
    try:
        places = [Path(text).expanduser(), *([models_dir / text] if models_dir else [])]
        return next((place.absolute() for place in places if place.exists()), None)
    except (OSError, RuntimeError, ValueError) as error:  # too long, a zero byte, an unknown user's home
        raise CheckpointError(f"checkpoint is {text[:80]!r}, which is no path") from error


def _repository(name: str, settings: Settings, revision: str = "main") -> Repository:
    return Repository(name, revision, settings.models_dir, settings.offline)


def _keys(family: str) -> Any:
    """The names of a family's tensors and its published configs: the module `keys` of its room."""
    return importlib.import_module(f"backend.{family.replace('stable-', '')}.keys")


def _stamp(path: Path) -> str:
    real = path.resolve()  # the hub's cache links to files that its revisions share
    return f"{real}:{real.stat().st_size}:{real.stat().st_mtime_ns}"


def _refuse_others(name: str, kind: str | None, family: str) -> None:
    if kind not in (family, None):
        raise CheckpointError(f"{name} is {kinds.title(kind)}, and {kinds.title(family)} is due here")


def _hint(files: list[str], where: str = "") -> str:
    """What to say of a folder or repository without hub layout that holds these weight files."""
    if not files:
        return ""
    return f", but {'paste the URL of' if where else 'name'} one of its single files: {', '.join(files[:4])}"


def _is_linear_map(rgb: Any) -> bool:
    """Whether this is what previews need, or nothing."""
    if rgb is None:
        return True
    rows = [*rgb.get("factors", []), rgb.get("bias")] if isinstance(rgb, dict) else [None]
    return all(isinstance(row, list) and [type(x) in (int, float) for x in row] == [True] * 3 for row in rows)


def config_name(component: str) -> str:
    return "scheduler_config.json" if component == "scheduler" else "config.json"


def tokenizer_of(component: str) -> str | None:
    """The tokenizer that belongs to a text encoder: text_encoder_2 → tokenizer_2."""
    return component.replace("text_encoder", "tokenizer") if component.startswith("text_encoder") else None


def choose_weights(names: Iterable[str], dtype: str) -> str | None:
    """The file or shard index to read of those in a component's folder, None if there is none.

    Safetensors come before pickles; then the variant that matches `dtype`, the plain one, any other.
    """
    best: tuple[bool, int, str] | None = None
    for name in names:
        if match := WEIGHT_FILE.fullmatch(name):
            variant = match["variant"] or match["variant_behind"] or ""
            order = [VARIANTS.get(dtype, ""), "", "bf16", "fp16", variant]
            rank = (match["kind"] == "bin", order.index(variant), name)
            best = min(best or rank, rank)
    return best[2] if best else None


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
