"""The catalogue: what can be told of a checkpoint before it is downloaded."""

from __future__ import annotations

import subprocess
import sys

import torch

from backend import catalog
from backend.nn.autoencoder import Autoencoder, AutoencoderConfig
from backend.sd15 import keys
from backend.sd15.unet import UNet, UNetConfig


def test_every_family_has_a_demo_first_and_a_published_checkpoint() -> None:
    for family in catalog.FAMILIES:
        assert catalog.names(family)[0] == "demo"
        assert catalog.published(family).licence
        assert catalog.published(family).url


def test_names_are_found_in_their_own_family_alone() -> None:
    entry = catalog.entry("sd15", "sd15")
    assert entry is not None
    assert entry.repository == "stable-diffusion-v1-5/stable-diffusion-v1-5"
    assert catalog.entry("sd3", "sd15") is None
    assert catalog.entry("sd15", "nothing") is None


def test_published_sizes_are_those_of_the_published_configs() -> None:
    with torch.device("meta"):
        built = {
            "unet": UNet(UNetConfig.from_dict(keys.PUBLISHED["unet"])),
            "vae": Autoencoder(AutoencoderConfig.from_dict(keys.PUBLISHED["vae"])),
        }
    sizes = catalog.published("sd15").parameters
    for name, network in built.items():
        assert round(sum(p.numel() for p in network.parameters()) / 1e6, 2) == sizes[name]


def test_catalogue_and_sources_need_no_torch() -> None:
    code = (
        "import sys, backend.catalog, backend.weights.source, backend.sd15.keys;"
        "print([name for name in ('torch', 'transformers', 'huggingface_hub') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
