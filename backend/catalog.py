"""The checkpoints that Triptych knows by name: what they are, under which licence, and how large."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Family:
    """`room` is the package with its `pipeline`, `defaults` and `keys`, `demo` its folder in assets/demo."""

    title: str
    room: str
    demo: str


FAMILIES = {
    "sd15": Family("Stable Diffusion 1.5", room="backend.sd15", demo="sd15"),
    "sd3": Family("Stable Diffusion 3", room="backend.sd3", demo="sd3"),
    "stable_cascade": Family("Stable Cascade", room="backend.cascade", demo="stable-cascade"),
}


@dataclass(frozen=True, kw_only=True)
class CatalogueEntry:
    """`repositories` are the hub's, none for what ships with Triptych; a release in parts has several.

    `defaults` are the publisher's recommended settings. `parameters` are in millions per component, tables of
    positions that come with the weights included, so that a checkpoint can be planned before it is
    downloaded. So do `configs`: what differs from those of the family's first published checkpoint.
    """

    name: str
    family: str
    title: str
    repositories: tuple[str, ...]
    licence: str
    url: str | None
    defaults: Mapping[str, Any] = field(default_factory=dict)
    parameters: Mapping[str, float] = field(default_factory=dict)
    configs: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    gated: bool = False  # given to those alone who accepted the licence on its page

    @property
    def bundled(self) -> bool:
        return not self.repositories


def _demo(family: str) -> CatalogueEntry:
    return CatalogueEntry(
        name="demo",
        family=family,
        title="Postcards, the built-in demo",
        repositories=(),
        licence="Apache-2.0, as Triptych itself",
        url=None,
    )


def _sd3(
    name: str,
    title: str,
    repository: str,
    transformer: float,
    *,
    steps: int,
    guidance_scale: float,
    config: Mapping[str, Any] | None = None,
) -> CatalogueEntry:
    return CatalogueEntry(
        name=name,
        family="sd3",
        title=title,
        repositories=(f"stabilityai/{repository}",),
        licence="Stability AI Community License: free below a yearly revenue of 1 million US dollars, within "
        "the publisher's Acceptable Use Policy. Gated: accept it on its page, then give a token",
        url=f"https://huggingface.co/stabilityai/{repository}",
        defaults={
            "steps": steps,
            "guidance_scale": guidance_scale,
            "sampler": "euler",
            "shift": 3.0,
            "width": 1024,
            "height": 1024,
        },
        parameters={
            "transformer": transformer,
            "vae": 83.82,
            "text_encoder": 123.7,
            "text_encoder_2": 694.7,
            "text_encoder_3": 4762.3,
        },
        configs={"transformer": config} if config else {},
        gated=True,
    )


SD35_MEDIUM = {
    "qk_norm": "rms_norm",
    "dual_attention_layers": list(range(13)),
    "pos_embed_max_size": 384,
}
SD35_LARGE = {
    "qk_norm": "rms_norm",
    "num_layers": 38,
    "num_attention_heads": 38,
    "caption_projection_dim": 2432,
}

CATALOGUE = (
    _demo("sd15"),
    CatalogueEntry(
        name="sd15",
        family="sd15",
        title="Stable Diffusion 1.5",
        repositories=("stable-diffusion-v1-5/stable-diffusion-v1-5",),
        licence="CreativeML Open RAIL-M: free to use, within the use restrictions that it lists",
        url="https://huggingface.co/stable-diffusion-v1-5/stable-diffusion-v1-5",
        defaults={"steps": 50, "guidance_scale": 7.5, "sampler": "pndm", "width": 512, "height": 512},
        parameters={"unet": 859.52, "vae": 83.65, "text_encoder": 123.06},
    ),
    _demo("sd3"),
    _sd3(
        "sd3-medium",
        "Stable Diffusion 3 Medium",
        "stable-diffusion-3-medium-diffusers",
        2084.95,
        steps=28,
        guidance_scale=7.0,
    ),
    _sd3(
        "sd3.5-medium",
        "Stable Diffusion 3.5 Medium",
        "stable-diffusion-3.5-medium",
        2469.66,
        steps=40,
        guidance_scale=4.5,
        config=SD35_MEDIUM,
    ),
    _sd3(
        "sd3.5-large",
        "Stable Diffusion 3.5 Large",
        "stable-diffusion-3.5-large",
        8146.28,
        steps=28,
        guidance_scale=3.5,
        config=SD35_LARGE,
    ),
    _sd3(
        "sd3.5-large-turbo",
        "Stable Diffusion 3.5 Large Turbo",
        "stable-diffusion-3.5-large-turbo",
        8146.28,
        steps=4,
        guidance_scale=0.0,
        config=SD35_LARGE,
    ),
    _demo("stable_cascade"),
    CatalogueEntry(
        name="stable-cascade",
        family="stable_cascade",
        title="Stable Cascade",
        repositories=("stabilityai/stable-cascade-prior", "stabilityai/stable-cascade"),
        licence="Stability AI Non-Commercial Research Community License: for research, not for commercial "
        "use, and within the publisher's Acceptable Use Policy. Faces and people may come out wrong, and "
        "its autoencoder loses detail",
        url="https://huggingface.co/stabilityai/stable-cascade",
        defaults={
            "prior_steps": 20,
            "prior_guidance_scale": 4.0,
            "decoder_steps": 10,
            "decoder_guidance_scale": 0.0,
            "width": 1024,
            "height": 1024,
        },
        parameters={
            "prior": 3589.1,
            "prior_lite": 1030.8,
            "decoder": 1562.9,
            "decoder_lite": 699.5,
            "vqgan": 18.41,
            "text_encoder": 694.7,
            "image_encoder": 304.0,
        },
    ),
)


def entries(family: str) -> list[CatalogueEntry]:
    """The catalogued checkpoints of a family, the demo first."""
    return [entry for entry in CATALOGUE if entry.family == family]


def names(family: str) -> list[str]:
    return [entry.name for entry in entries(family)]


def entry(family: str, name: str) -> CatalogueEntry | None:
    """The family's checkpoint of that name, or of that repository; None for one that is not catalogued."""
    return next((entry for entry in entries(family) if name in (entry.name, *entry.repositories)), None)


def published(family: str) -> CatalogueEntry:
    """The family's first published checkpoint: the measure for those that are not known."""
    return next(entry for entry in entries(family) if not entry.bundled)
