"""Checkpoints on the hub, by way of its cache on this machine."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from backend import catalog
from backend.errors import CheckpointError
from backend.events import Loading
from backend.weights.base import DTYPE_BYTES, Source, companion_of, keys_of
from backend.weights.files import WEIGHTS, Shapes
from backend.weights.folder import INDEX, FolderSource, choose_weights, hint, shard_names
from backend.weights.hub import Repository
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
            files = [name for name in listing if name.endswith(WEIGHTS)]
            raise CheckpointError(
                f"{self.name} is no repository in hub layout{hint(files, self.repository.page)}"
            )
        # the configs of all networks show which there are; the index comes last, since it stands for them
        folders = {
            layout[name]
            for layout in self._keys.FOLDERS.values()
            for name in self._keys.COMPONENTS
            if name in layout
        }
        configs = [f"{folder}/config.json" for folder in sorted(folders)]
        yield from self._download(
            "checkpoint", [*(name for name in configs if name in listing), INDEX], listing
        )
        self._here()  # refuses a checkpoint of another family before its weights are downloaded
        required = self._keys.REQUIRED
        optional = [name for name in self._keys.COMPONENTS if name not in required and not self.has(name)]
        components = [name for name in components if name not in optional]  # which the index has told
        for component in self._missing(components, dtype, weights):
            yield from self._fetch(component, dtype, listing, weights)

    def _missing(self, components: list[str], dtype: str, weights: bool) -> list[str]:
        """What is not here of these components, what prepares their input, and the schedulers."""
        schedulers = [name for name in self._folders() if name.endswith("scheduler")]
        wanted = dict.fromkeys([*components, *map(companion_of, components), *schedulers])
        return [name for name in wanted if name and not self._has(name, dtype, weights)]

    def _fetch(
        self, component: str, dtype: str, listing: Mapping[str, int], weights: bool
    ) -> Iterator[Loading]:
        folder = self._folders().get(component)
        if folder is None:
            raise CheckpointError(f"{self.name} has no {component}")
        names = [path.name for path in map(Path, listing) if path.parent == Path(folder)]
        settings = [name for name in names if name.endswith((".json", ".txt", ".model"))]
        yield from self._download(component, [f"{folder}/{name}" for name in settings], listing)
        if component in self._keys.COMPONENTS and weights:
            self.config(component)  # refuses an inpainting UNet, too, before its weights are downloaded
            chosen = choose_weights(names, dtype)
            if chosen is None:
                raise CheckpointError(
                    f"{self.name} has no weights for {component} that can be read (.safetensors)"
                )
            shards = [chosen]
            if chosen.endswith(".json"):
                shards = shard_names(self._cached(f"{folder}/{chosen}"))
            yield from self._download(component, [f"{folder}/{name}" for name in shards], listing)

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

    def _cached(self, file: str) -> Path:
        root = self.repository.cached()
        assert root is not None
        return root / file

    def _has(self, component: str, dtype: str, weights: bool) -> bool:
        if isinstance(self.local, FolderSource) and not weights and not component.startswith("tokenizer"):
            return component in self._folders() and self.local.config_file(component).is_file()
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
