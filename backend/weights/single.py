"""Checkpoints in the original release's files: a single file, or a folder of them."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from backend import catalog
from backend.errors import AccessError, CheckpointError
from backend.events import Loading
from backend.weights import kinds
from backend.weights.base import (
    PREFERENCE,
    Source,
    alternatives,
    companion_of,
    holds_tokenizer,
    keys_of,
    stamp,
    tokenizer_files,
)
from backend.weights.files import HEADED, Shapes, open_tensors, precision, read_json, shapes
from backend.weights.folder import read_extras
from backend.weights.keymap import Origin, Renamed

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Part:
    """A component's tensors in a file, by our names."""

    path: Path
    origins: dict[str, Origin]

    @cached_property
    def precision(self) -> str:
        return precision(self.path, {origin.name for origin in self.origins.values()})

    @cached_property
    def size(self) -> int:
        return sum(math.prod(origin.shape) for origin in self.origins.values())


class FileSource(Source):
    """Original single files, and the source of what they cannot tell: `complement`, or else published values.

    `root` is the folder that holds `paths`, None where a single file was named. Raises CheckpointError if a
    file is damaged, or of another family.
    """

    def __init__(
        self,
        name: str,
        family: str,
        paths: Sequence[Path],
        complement: Source | None,
        standard: Source | None,
        root: Path | None = None,
    ) -> None:
        super().__init__(name, family)
        self.root = root
        self._paths = list(paths)
        self._keys = keys_of(family)
        self._complement = complement
        self._standard = standard  # where the published tokenizer lies
        if all(path.suffix in HEADED for path in paths):  # a pickle would have to be opened for it
            for component in self._parts:
                self.config(component)

    @cached_property
    def _parts(self) -> dict[str, list[Part]]:
        """The files that hold each component; they differ in precision."""
        parts: dict[str, list[Part]] = {}
        for path in self._paths:
            for component, origins in self._read(path).items():
                parts.setdefault(component, []).append(Part(path, origins))
        if not parts:
            raise CheckpointError(f"{self.name} holds no file of {kinds.title(self.family)}")
        parts = _sorted_by_size(parts, self._keys.LITE)
        for component, copies in parts.items():
            if len(copies) > 1 and len({part.precision for part in copies}) < len(copies):
                names = ", ".join(sorted(part.path.name for part in copies))
                raise CheckpointError(f"{self.name} holds several files for {component} ({names}); keep one")
        return parts

    def _read(self, path: Path) -> dict[str, dict[str, Origin]]:
        """The components in a file. What lies in a folder beside them, LoRAs say, is passed over."""
        found = shapes(path)
        kind = kinds.by_tensors(found) or "a file of an unknown kind"
        name = self.name if self.root is None else f"{self.name}/{path.relative_to(self.root)}"
        if kind != self.family and not self._keys.is_part(found):
            if self.root is not None and kind not in kinds.TITLES:
                return {}
            kinds.refuse_others(name, kind, self.family)
        try:
            kinds.refuse_scaled(found)
            return self._keys.parts(found)
        except CheckpointError as error:
            raise CheckpointError(f"{name}: {error}") from error

    def fetch(self, components: Iterable[str], dtype: str, *, weights: bool = True) -> Iterator[Loading]:
        components = list(components)
        if self._complement is not None:
            offered = [name for name in components if self._complement.has(name)]
            lacking = [name for name in offered if name in self._keys.COMPONENTS and not self._owns(name)]
            yield from self._complement.fetch(offered, dtype, weights=False)
            yield from self._complement.fetch(lacking, dtype, weights=weights)
        prepared = [companion_of(name) or name for name in components if self.has(name)]
        for name in dict.fromkeys(name for name in prepared if name.startswith("tokenizer")):
            source = self._tokenizer_source(name)
            if source is None or source is not self._standard or self._tokenizer_here(name) is not None:
                continue
            try:
                yield from source.fetch([name], dtype, weights=False)
            except AccessError as error:
                raise CheckpointError(f"{self._no_tokenizer(name)} ({error})") from error

    def has(self, component: str) -> bool:
        if component in self._parts:
            return True
        if component in self._keys.COMPONENTS:
            return (
                not self._owns(component) and self._complement is not None and self._complement.has(component)
            )
        if not component.startswith("tokenizer"):
            return component in self._keys.PUBLISHED
        return self._tokenizer_here(component) is not None or self._tokenizer_source(component) is not None

    def config(self, component: str) -> dict[str, Any]:
        known = (
            self._complement.config(component)
            if self._complement and self._complement.has(component)
            else None
        )
        if component not in self._keys.COMPONENTS:
            return known or dict(self._keys.PUBLISHED[component])
        if component not in self._parts:
            return self._lacking(component).config(component)
        part = self._part(component, "float32")
        beside = part.path.with_name("config.json")
        if part.path.parent != self.root and self.root is not None and beside.is_file():
            known = read_json(beside)
        try:
            config = self._keys.config(component, _shapes(part), known)
            self._keys.check(component, config)
        except CheckpointError as error:
            raise CheckpointError(f"{self.name}: {error}") from error
        return config

    def tensors(self, component: str, dtype: str) -> Mapping[str, Tensor]:
        if component not in self._parts:
            return self._lacking(component).tensors(component, dtype)
        part = self._part(component, dtype)
        return Renamed(open_tensors([part.path]), part.origins)

    def shapes(self, component: str, dtype: str) -> Shapes:
        if component not in self._parts:
            return self._lacking(component).shapes(component, dtype)
        return _shapes(self._part(component, dtype))

    def tokenizer(self, component: str = "tokenizer") -> Path:
        if (folder := self._tokenizer_here(component)) is not None:
            return folder
        source = self._tokenizer_source(component)
        if source is None:
            raise CheckpointError(self._no_tokenizer(component))
        try:
            return source.tokenizer(component)
        except (AccessError, CheckpointError) as error:
            raise CheckpointError(f"{self._no_tokenizer(component)} ({error})") from error

    def files(self, component: str, dtype: str) -> list[Path]:
        if component.startswith("tokenizer"):
            files = sorted(path for path in self.tokenizer(component).iterdir() if path.is_file())
            return [path for path in files if path not in self._paths]
        if component not in self._keys.COMPONENTS:
            return []
        if component not in self._parts:
            return self._lacking(component).files(component, dtype)
        return [self._part(component, dtype).path]

    def fingerprint(self, component: str, dtype: str) -> str:
        if component in self._keys.COMPONENTS and component not in self._parts:
            return self._lacking(component).fingerprint(component, dtype)
        settings = json.dumps(self.config(component), sort_keys=True)  # the complement's share
        paths, companion = self.files(component, dtype), companion_of(component)
        if companion and self.present([companion], dtype):
            paths += self.files(companion, dtype)
        return "|".join([*map(stamp, paths), settings])

    def precision(self, component: str, dtype: str) -> str:
        if component not in self._parts:
            return self._lacking(component).precision(component, dtype)
        return self._part(component, dtype).precision

    def extras(self) -> dict[str, Any]:
        return read_extras(self.root, self.family) if self.root is not None else {}

    def _part(self, component: str, dtype: str) -> Part:
        """The file whose precision suits a run in `dtype` best."""
        copies = self._parts[component]
        if len(copies) == 1:
            return copies[0]
        order = PREFERENCE[dtype]
        return min(
            copies, key=lambda part: order.index(part.precision) if part.precision in order else len(order)
        )

    def _owns(self, component: str) -> bool:
        """Whether the files hold the component, or another that does its work."""
        return any(name in self._parts for name in alternatives(self._keys, component))

    def _lacking(self, component: str) -> Source:
        if self._complement is None or self._owns(component) or not self._complement.has(component):
            also = [name for name in self._keys.REQUIRED if not self.has(name)]
            lacking = list(dict.fromkeys([component, *also]))
            raise CheckpointError(
                f"{self.name} holds no {', '.join(lacking)}; set config_from to a folder or hub repository "
                f"with {'them' if len(lacking) > 1 else 'one'}"
            )
        return self._complement

    def _tokenizer_here(self, component: str) -> Path | None:
        """The folder beside the files with that tokenizer."""
        if self.root is None:
            return None
        encoders = [
            part for name, parts in self._parts.items() if companion_of(name) == component for part in parts
        ]
        places = [self.root / component, *(part.path.parent for part in encoders), self.root]
        return next((place for place in places if holds_tokenizer(place)), None)

    def _tokenizer_source(self, component: str) -> Source | None:
        """Who else is to give that tokenizer."""
        others = (self._complement, self._standard)
        return next((source for source in others if source is not None and source.has(component)), None)

    def _no_tokenizer(self, component: str) -> str:
        return (
            f"{self.name} holds no {component}, as the original files do not, and none was found; set "
            f"config_from to a folder with a {component}/ ({tokenizer_files(component)}), or to a hub "
            f"repository such as {catalog.published(self.family).repositories[0]}"
        )


def _sorted_by_size(parts: dict[str, list[Part]], lite: Mapping[str, str]) -> dict[str, list[Part]]:
    """Of two networks of different size that do the same work, the smaller is the lite one."""
    out = dict(parts)
    for full, small in lite.items():
        both = [*parts.get(full, []), *parts.get(small, [])]
        sizes = sorted({part.size for part in both})
        if len(sizes) == 2:
            out |= {
                small: [part for part in both if part.size == sizes[0]],
                full: [part for part in both if part.size == sizes[1]],
            }
    return out


def _shapes(part: Part) -> Shapes:
    return {name: origin.shape for name, origin in part.origins.items()}
