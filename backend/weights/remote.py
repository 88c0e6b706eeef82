"""Checkpoints on the hub, by way of its cache on this machine."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from backend import catalog
from backend.errors import CheckpointError
from backend.events import Loading
from backend.weights.base import DTYPE_BYTES, Amount, Source, companion_of, keys_of
from backend.weights.files import SINGLE, Shapes
from backend.weights.folder import (
    INDEX,
    FolderSource,
    choose_weights,
    hint,
    refuse_flax,
    shard_names,
    shards_of,
)
from backend.weights.hub import Listed, Repository
from backend.weights.single import FileSource

if TYPE_CHECKING:
    from torch import Tensor


class HubSource(Source):
    """A hub repository in hub layout, or one single file of a repository, by way of the hub's cache.

    Until it is downloaded, configs and sizes are those of the catalogue, or else of the family's first
    published checkpoint.
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
        self._keys = keys_of(family)
        self._found: FolderSource | FileSource | None = None

    @property
    def local(self) -> FolderSource | FileSource | None:
        """What is downloaded, or None."""
        root = self.repository.cached()
        if self._found is None and root is not None and (root / (self.file or INDEX)).is_file():
            if self.file is None:
                self._found = FolderSource(self.name, self.family, root)
            else:
                path = root / self.file
                self._found = FileSource(self.name, self.family, [path], self._complement, self._standard)
        return self._found

    @property
    def guessed(self) -> bool:
        """Whether it is not known yet which pipeline the repository holds."""
        return self.file is None and self.local is None and self._entry() is None

    def fetch(self, components: Iterable[str], dtype: str, *, weights: bool = True) -> Iterator[Loading]:
        components = list(components)
        if self.file is not None:
            if self.local is None:
                yield from self._download("checkpoint", [self.file], self.repository.listing())
            yield from self._here().fetch(components, dtype, weights=weights)
            return
        if not self._missing(components, dtype, weights):
            return
        listing = self.repository.listing()
        if INDEX not in listing:
            files = [name for name in listing if name.endswith(SINGLE)]
            raise CheckpointError(
                f"{self.name} is no repository in hub layout{hint(files, self.repository.page)}"
            )
        yield from self._download("checkpoint", self._indexes(listing), listing)
        self.repository.remember(listing)
        self._here()  # refuses a checkpoint of another family before its weights are downloaded
        required = self._keys.REQUIRED
        optional = [name for name in self._keys.COMPONENTS if name not in required and not self.has(name)]
        components = [name for name in components if name not in optional]  # which the index has told
        for component in self._missing(components, dtype, weights):
            yield from self._fetch(component, dtype, listing, weights)

    def _missing(self, components: list[str], dtype: str, weights: bool) -> list[str]:
        """What is not here of these components, what prepares their input, and the schedulers."""
        wanted = self._with_companions(components)
        return [name for name in wanted if not self._has(name, dtype, weights)]

    def _with_companions(self, components: Iterable[str]) -> list[str]:
        components = list(components)
        schedulers = [name for name in self._folders() if name.endswith("scheduler")]
        wanted = dict.fromkeys([*components, *map(companion_of, components), *schedulers])
        return [name for name in wanted if name]

    def _fetch(
        self, component: str, dtype: str, listing: Mapping[str, Listed], weights: bool
    ) -> Iterator[Loading]:
        if component not in self._folders():
            raise CheckpointError(f"{self.name} has no {component}")
        yield from self._download(component, self._settings(component, listing), listing)
        if component in self._keys.COMPONENTS and weights:
            self.config(component)  # refuses an inpainting UNet, too, before its weights are downloaded
            chosen = self._weights(component, dtype, listing)
            if not chosen:
                raise CheckpointError(
                    f"{self.name} has no weights for {component} that can be read (.safetensors)"
                )
            refuse_flax(self.name, component, Path(chosen[0]).name, self._keys)
            yield from self._download(component, chosen, listing)

    def _indexes(self, listing: Iterable[str]) -> list[str]:
        """The configs of all networks, which show which there are; last the index: it stands for them."""
        folders = {
            layout[name]
            for layout in self._keys.FOLDERS.values()
            for name in self._keys.COMPONENTS
            if name in layout
        }
        configs = {f"{folder}/config.json" for folder in folders}
        return [*sorted(configs.intersection(listing)), INDEX]

    def _settings(self, component: str, listing: Iterable[str]) -> list[str]:
        names = self._within(component, listing)
        return [name for name in names if name.endswith((".json", ".txt", ".model"))]

    def _weights(self, component: str, dtype: str, listing: Iterable[str]) -> list[str]:
        """The files with the component's weights that suit a run in `dtype` best; [] if there are none."""
        names = {Path(name).name: name for name in self._within(component, listing)}
        chosen = choose_weights(names, dtype)
        if chosen is None or not chosen.endswith(".json"):
            return [names[chosen]] if chosen else []
        root = self.repository.cached()
        if root is not None and (root / names[chosen]).is_file():
            folder = names[chosen].removesuffix(chosen)
            return [folder + name for name in shard_names(root / names[chosen])]
        shards = shards_of(chosen)  # by their names, until the index is there
        return [path for name, path in names.items() if shards.fullmatch(name)]

    def _within(self, component: str, listing: Iterable[str]) -> list[str]:
        """The files in the component's folder."""
        folder = Path(self._folders()[component])
        return [name for name in listing if Path(name).parent == folder]

    def amount(self, components: Iterable[str], dtype: str) -> Amount:
        listing, folders = self.repository.known(), self._folders()
        if self.file is not None or INDEX not in listing:
            return Amount(0, 0)
        files = dict.fromkeys(self._indexes(listing))
        for component in [name for name in self._with_companions(components) if name in folders]:
            if self.present([component], dtype):
                root = self.repository.cached()
                assert root is not None
                paths = self.files(component, dtype)
                files |= dict.fromkeys(path.relative_to(root).as_posix() for path in paths)
            else:
                files |= dict.fromkeys(self._settings(component, listing))
                if component in self._keys.COMPONENTS:
                    files |= dict.fromkeys(self._weights(component, dtype, listing))
        listed = {file: listing[file] for file in files if file in listing}
        here = sum(self.repository.here(file, each) for file, each in listed.items())
        return Amount(here, sum(each.size for each in listed.values()))

    def has(self, component: str) -> bool:
        if self.file is not None:
            if self.local is not None:
                return self.local.has(component)
            return self._complement.has(component) if self._complement else component in self._keys.PUBLISHED
        if component not in self._folders():
            return False
        if isinstance(self.local, FolderSource) and component in self._keys.COMPONENTS:
            return self.local.config_file(component).is_file() or self._is_published(component)
        if component not in self._keys.COMPONENTS or self._entry() is not None:
            return component not in self._keys.COMPONENTS or self._is_published(component)
        usual = catalog.published(self.family).parameters  # a repository of somebody's, not seen yet
        return component in usual and component not in self._keys.LITE.values()

    def config(self, component: str) -> dict[str, Any]:
        if not self._has(component, "float32", weights=False):
            entry = self._entry()
            own = entry.configs.get(component, {}) if entry else {}
            return {**self._keys.PUBLISHED[component], **own}
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
        entry = self._entry() or catalog.published(self.family)
        return round(entry.parameters.get(component, 0) * 1e6) * DTYPE_BYTES[dtype]

    def precision(self, component: str, dtype: str) -> str:
        return self._here().precision(component, dtype)

    def extras(self) -> dict[str, Any]:
        return self.local.extras() if self.local else {}

    def fingerprint(self, component: str, dtype: str) -> str:
        if self.present([component], dtype):
            return self._here().fingerprint(component, dtype)
        return f"{self.repository.name}@{self.repository.revision}/{self.file or component}, not downloaded"

    def _entry(self) -> catalog.CatalogueEntry | None:
        known = catalog.entries(self.family)
        return next((entry for entry in known if self.repository.name in entry.repositories), None)

    def _is_published(self, component: str) -> bool:
        """Whether the catalogue knows that this repository has the component."""
        entry = self._entry()
        return entry is not None and component in entry.parameters and component in self._folders()

    def _folders(self) -> Mapping[str, str]:
        """Component → folder; a guess by the repository's name until its index is downloaded."""
        if isinstance(self.local, FolderSource):
            return self.local.folders
        return self._keys.FOLDERS[self._keys.pipeline_of(self.repository.name)]

    def _here(self) -> FolderSource | FileSource:
        if self.local is None:
            raise CheckpointError(f"{self.name} is not downloaded yet")
        return self.local

    def _has(self, component: str, dtype: str, weights: bool) -> bool:
        if isinstance(self.local, FolderSource) and not weights and not component.startswith("tokenizer"):
            return component in self._folders() and self.local.config_file(component).is_file()
        return self.present([component], dtype)

    def _download(self, component: str, files: list[str], listing: Mapping[str, Listed]) -> Iterator[Loading]:
        for file in files:
            if file not in listing:
                raise CheckpointError(f"{self.name} has no file {file}; see {self.repository.page}")
        total = sum(listing[file].size for file in files)
        before = 0
        for file in files:
            for done in self.repository.download(file, listing[file].size):
                yield Loading(
                    component=component, action="download", done_bytes=before + done, total_bytes=total
                )
            before += listing[file].size
