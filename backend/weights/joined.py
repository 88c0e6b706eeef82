"""Checkpoints that come in several parts, each a folder or repository of its own."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from backend import catalog
from backend.errors import CheckpointError
from backend.events import Loading
from backend.weights.base import Amount, Source, alternatives, companion_of, keys_of
from backend.weights.files import Shapes
from backend.weights.folder import read_extras
from backend.weights.remote import HubSource

if TYPE_CHECKING:
    from torch import Tensor


class JoinedSource(Source):
    """Each component comes from the first of `sources` that offers it, or another that does its work.

    `root` is the folder that holds them all, where there is one.
    """

    def __init__(self, name: str, family: str, sources: Sequence[Source], root: Path | None = None) -> None:
        super().__init__(name, family)
        self.sources = list(sources)
        self.root = root
        self._keys = keys_of(family)

    def check(self) -> None:
        """Raises CheckpointError where a part of the release is in none of the sources."""
        family = catalog.FAMILIES[self.family].title
        repositories = " and ".join(catalog.published(self.family).repositories)
        for full in self._keys.LITE:
            if self._offering(full) is None:
                raise CheckpointError(
                    f"{self.root or self.name} lacks the half of {family} with the {full}; put that beside "
                    f"it, or set config_from to its folder or hub repository (published: {repositories})"
                )

    def fetch(self, components: Iterable[str], dtype: str, *, weights: bool = True) -> Iterator[Loading]:
        components = list(components)
        for source in self.sources:
            if isinstance(source, HubSource) and source.guessed:  # its index tells what it is to give
                yield from source.fetch([], dtype, weights=False)
        for source, share in self._shares(components).items():
            yield from source.fetch(share, dtype, weights=weights)

    def has(self, component: str) -> bool:
        source = self._offering(component)
        return source is not None and source.has(component)

    def config(self, component: str) -> dict[str, Any]:
        return self._source(component).config(component)

    def tensors(self, component: str, dtype: str) -> Mapping[str, Tensor]:
        return self._source(component).tensors(component, dtype)

    def shapes(self, component: str, dtype: str) -> Shapes:
        return self._source(component).shapes(component, dtype)

    def tokenizer(self, component: str = "tokenizer") -> Path:
        return self._source(component).tokenizer(component)

    def files(self, component: str, dtype: str) -> list[Path]:
        return self._source(component).files(component, dtype)

    def amount(self, components: Iterable[str], dtype: str) -> Amount:
        parts = [source.amount(share, dtype) for source, share in self._shares(list(components)).items()]
        here, total = (sum(each) for each in zip(*parts, strict=True)) if parts else (0, 0)
        return Amount(here, total if all(part.total for part in parts) else 0)

    def parameter_bytes(self, component: str, dtype: str) -> int:
        return self._source(component).parameter_bytes(component, dtype)

    def precision(self, component: str, dtype: str) -> str:
        return self._source(component).precision(component, dtype)

    def extras(self) -> dict[str, Any]:
        extras = read_extras(self.root, self.family) if self.root is not None else {}
        return extras or next((extras for source in self.sources if (extras := source.extras())), {})

    def fingerprint(self, component: str, dtype: str) -> str:
        source, companion = self._source(component), companion_of(component)
        text = source.fingerprint(component, dtype)
        if companion and self.has(companion) and self._source(companion) is not source:
            text += "|" + self._source(companion).fingerprint(companion, dtype)
        return text

    def _shares(self, components: list[str]) -> dict[Source, list[str]]:
        """Who is to fetch what."""
        shares: dict[Source, list[str]] = {}
        for component in components:
            shares.setdefault(self._source(component), []).append(component)
        return shares

    def _offering(self, component: str) -> Source | None:
        for network in self._keys.COMPONENTS:
            if companion_of(network) == component:  # a tokenizer comes with its text encoder
                source = self._offering(network)
                if source is not None and source.has(component):
                    return source
        names = alternatives(self._keys, component)
        return next((source for source in self.sources if any(map(source.has, names))), None)

    def _source(self, component: str) -> Source:
        source = self._offering(component)
        if source is None or not source.has(component):
            raise CheckpointError(f"{self.name} has no {component}")
        return source
