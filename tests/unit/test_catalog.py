"""The catalogue: what can be told of a checkpoint before it is downloaded."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
import torch
from transformers import (
    CLIPTextConfig,
    CLIPTextModelWithProjection,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
    T5Config,
    T5EncoderModel,
)

from backend import catalog
from backend.cascade import unet as stages
from backend.cascade.stage_a import StageA, StageAConfig
from backend.nn.autoencoder import Autoencoder, AutoencoderConfig
from backend.sd3.mmdit import MMDiT, MMDiTConfig
from backend.sd15 import unet
from backend.weights.base import keys_of


def test_every_family_has_a_demo_first_and_a_published_checkpoint() -> None:
    for family in catalog.FAMILIES:
        assert catalog.names(family)[0] == "demo"
        assert catalog.published(family).licence
        assert catalog.published(family).url


def test_names_are_found_in_their_own_family_alone() -> None:
    entry = catalog.entry("sd15", "sd15")
    assert entry is not None
    assert entry.repositories == ("stable-diffusion-v1-5/stable-diffusion-v1-5",)
    assert catalog.entry("sd3", "sd15") is None
    assert catalog.entry("sd15", "nothing") is None
    entry = catalog.entry("sd3", "stabilityai/stable-diffusion-3.5-large-turbo")
    assert entry is not None
    assert entry.name == "sd3.5-large-turbo"
    for name in ("stable-cascade", "stabilityai/stable-cascade", "stabilityai/stable-cascade-prior"):
        entry = catalog.entry("stable_cascade", name)
        assert entry is not None
        assert entry.name == "stable-cascade"


@pytest.mark.parametrize(
    ("family", "name", "build"),
    [
        ("sd15", "unet", lambda config: unet.UNet(unet.UNetConfig.from_dict(config))),
        ("sd15", "vae", lambda config: Autoencoder(AutoencoderConfig.from_dict(config))),
        *(
            ("stable_cascade", name, lambda config: stages.UNet(stages.UNetConfig.from_dict(config)))
            for name in ("prior", "prior_lite", "decoder", "decoder_lite")
        ),
        ("stable_cascade", "vqgan", lambda config: StageA(StageAConfig.from_dict(config))),
        (
            "stable_cascade",
            "text_encoder",
            lambda config: CLIPTextModelWithProjection(CLIPTextConfig(**config)),
        ),
        ("sd3", "transformer", lambda config: MMDiT(MMDiTConfig.from_dict(config))),
        ("sd3", "vae", lambda config: Autoencoder(AutoencoderConfig.from_dict(config))),
        ("sd3", "text_encoder", lambda config: CLIPTextModelWithProjection(CLIPTextConfig(**config))),
        ("sd3", "text_encoder_2", lambda config: CLIPTextModelWithProjection(CLIPTextConfig(**config))),
        ("sd3", "text_encoder_3", lambda config: T5EncoderModel(T5Config(**config))),
        (
            "stable_cascade",
            "image_encoder",
            lambda config: CLIPVisionModelWithProjection(CLIPVisionConfig(**config)),
        ),
    ],
)
def test_published_sizes_are_those_of_the_published_configs(family: str, name: str, build: Any) -> None:
    for entry in catalog.entries(family)[1:]:
        with torch.device("meta"):
            network = build({**keys_of(family).PUBLISHED[name], **entry.configs.get(name, {})})
        size = entry.parameters[name]
        digits = len(str(size).partition(".")[2])
        kept = [*network.parameters(), *network.buffers()]
        assert round(sum(t.numel() for t in kept if t.is_floating_point()) / 1e6, digits) == size


def test_catalogue_and_sources_need_no_torch() -> None:
    code = (
        "import sys, backend.catalog, backend.weights.source;"
        "import backend.sd15.keys, backend.sd3.keys, backend.cascade.keys, backend.cascade.defaults;"
        "print([name for name in ('torch', 'transformers', 'huggingface_hub') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
