"""The checkpoints that Triptych knows by name: what they are, under which licence, and how large."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

FAMILIES = {"sd15": "Stable Diffusion 1.5"}


@dataclass(frozen=True, kw_only=True)
class CatalogueEntry:
    """`repository` is None for what ships with Triptych. `defaults` are the publisher's recommended settings.

    `parameters` are in millions per component, so that a checkpoint can be planned before it is downloaded.
    """

    name: str
    family: str
    title: str
    repository: str | None
    licence: str
    url: str | None
    defaults: Mapping[str, Any] = field(default_factory=dict)
    parameters: Mapping[str, float] = field(default_factory=dict)

    @property
    def bundled(self) -> bool:
        return self.repository is None


CATALOGUE = (
    CatalogueEntry(
        name="demo",
        family="sd15",
        title="Postcards, the built-in demo",
        repository=None,
        licence="Apache-2.0, as Triptych itself",
        url=None,
    ),
    CatalogueEntry(
        name="sd15",
        family="sd15",
        title="Stable Diffusion 1.5",
        repository="stable-diffusion-v1-5/stable-diffusion-v1-5",
        licence="CreativeML Open RAIL-M: free to use, within the use restrictions that it lists",
        url="https://huggingface.co/stable-diffusion-v1-5/stable-diffusion-v1-5",
        defaults={"steps": 50, "guidance_scale": 7.5, "sampler": "pndm", "width": 512, "height": 512},
        parameters={"unet": 859.52, "vae": 83.65, "text_encoder": 123.06},
    ),
)


def entries(family: str) -> list[CatalogueEntry]:
    """The catalogued checkpoints of a family, the demo first."""
    return [entry for entry in CATALOGUE if entry.family == family]


def names(family: str) -> list[str]:
    return [entry.name for entry in entries(family)]


def entry(family: str, name: str) -> CatalogueEntry | None:
    """The family's checkpoint of that name, None for one that is not catalogued."""
    return next((entry for entry in entries(family) if entry.name == name), None)


def published(family: str) -> CatalogueEntry:
    """The family's first published checkpoint: the measure for those that are not known."""
    return next(entry for entry in entries(family) if not entry.bundled)
