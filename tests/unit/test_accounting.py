"""Whole plans on the accounting device: full-size networks, placed as planned, on cards of the table's sizes.

What the plan says that a phase takes is what is allocated, and nothing fails for want of memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import cache
from unittest import mock

import pytest
import torch
from torch import Tensor, nn

from backend import Hardware, Settings, Studio
from backend.cascade.keys import PUBLISHED as CASCADE
from backend.cascade.stage_a import StageA, StageAConfig
from backend.cascade.unet import UNet as CascadeUNet
from backend.cascade.unet import UNetConfig as CascadeConfig
from backend.memory.placement import Streamer, move, tensors_of
from backend.memory.plan import Plan, PlannedPhase
from backend.nn.autoencoder import Autoencoder, AutoencoderConfig
from backend.nn.tiles import in_tiles
from backend.phases import Manner
from backend.sd3.keys import PUBLISHED as SD3
from backend.sd3.mmdit import MMDiT, MMDiTConfig
from backend.sd15.unet import UNet, UNetConfig
from backend.weights.parts import layout_of
from benchmarks.checkpoint import UNET, VAE
from tests.ledger import Ledger, placed
from tests.unit.test_plan import asked
from tests.unit.test_work import Size, stepping

CARDS = (2, 4, 6, 10, 24)
SIDES = {"sd15": 512, "sd3": 1024, "stable_cascade": 1024}
Forward = Callable[[nn.Module, Size, Manner, torch.dtype], None]
CUDA = torch.device("cuda")


def halves(manner: Manner) -> int:
    return 1 if manner.apart else 2


def paint(channels: int, forward: Callable[[nn.Module, Tensor], Tensor]) -> Forward:
    def run(network: nn.Module, size: Size, manner: Manner, dtype: torch.dtype) -> None:
        step = stepping("cuda", size, channels, manner.images * halves(manner), dtype)
        step(lambda x: forward(network, x))

    return run


def unet(network: nn.Module, x: Tensor) -> Tensor:
    return network(x, x.new_empty(len(x)), x.new_empty(len(x), 77, 768))


def mmdit(network: nn.Module, x: Tensor) -> Tensor:
    context = x.new_empty(len(x), 77 + 256, 4096)
    return network(x, x.new_empty(len(x)), context, x.new_empty(len(x), 2048))


def stage_c(network: nn.Module, x: Tensor) -> Tensor:
    assert isinstance(network, CascadeUNet)
    pooled, text, images = (x.new_empty(len(x), *shape) for shape in ((1280,), (77, 1280), (1, 768)))
    return network(x, x.new_empty(len(x)), network.condition(pooled, text, images))


def stage_b(network: nn.Module, x: Tensor) -> Tensor:
    assert isinstance(network, CascadeUNet)
    pooled, effnet = x.new_empty(1, 1280), x.new_empty(len(x), 16, 24, 24)
    size = (x.shape[2], x.shape[3])
    return network(x, x.new_empty(len(x)), network.condition(pooled, effnet=effnet, size=size))


def unguided(channels: int, forward: Callable[[nn.Module, Tensor], Tensor]) -> Forward:
    def run(network: nn.Module, size: Size, manner: Manner, dtype: torch.dtype) -> None:
        step = stepping("cuda", size, channels, manner.images, dtype)
        step(lambda x: forward(network, x))

    return run


def decode(network: nn.Module, size: Size, manner: Manner, dtype: torch.dtype) -> None:
    assert isinstance(network, Autoencoder)
    latents = torch.empty(1, network.config.latent_channels, *size, device="cuda")
    z = latents.to(dtype).to(memory_format=layout_of(dtype))
    network.decode(z, tile=manner.tile).float()


def pixels(network: nn.Module, size: Size, manner: Manner, dtype: torch.dtype) -> None:
    assert isinstance(network, StageA)
    x = torch.empty(1, 4, *size, device="cuda").to(dtype).to(memory_format=layout_of(dtype))
    in_tiles(network.decode, x, manner.tile, 4).float()


NETWORKS: dict[str, tuple[Callable[[], nn.Module], Forward, int]] = {
    "unet": (lambda: UNet(UNetConfig.from_dict(UNET)), paint(4, unet), 8),
    "transformer": (lambda: MMDiT(MMDiTConfig.from_dict(SD3["transformer"])), paint(16, mmdit), 8),
    "vae, sd15": (lambda: Autoencoder(AutoencoderConfig.from_dict(VAE)), decode, 8),
    "vae, sd3": (lambda: Autoencoder(AutoencoderConfig.from_dict(SD3["vae"])), decode, 8),
    **{
        name: (
            lambda name=name: CascadeUNet(CascadeConfig.from_dict(CASCADE[name])),
            paint(16, stage_c) if name.startswith("prior") else unguided(4, stage_b),
            0 if name.startswith("prior") else 4,
        )
        for name in ("prior", "prior_lite", "decoder", "decoder_lite")
    },
    "vqgan": (lambda: StageA(StageAConfig.from_dict(CASCADE["vqgan"])), pixels, 4),
}


@pytest.fixture(scope="module")
def studio(tmp_path_factory: pytest.TempPathFactory) -> Studio:
    home, models = (tmp_path_factory.mktemp(name) for name in ("home", "models"))
    return Studio(Settings(device="cpu", home=home, models_dir=models, offline=True))


@pytest.fixture(autouse=True)
def streams() -> Iterator[None]:
    """Torch without CUDA has no streams; what they order is the same one after the other."""
    with ExitStack() as patched:
        for name in ("Stream", "Event", "stream", "current_stream"):
            patched.enter_context(mock.patch.object(torch.cuda, name, mock.MagicMock()))
        yield


def counted(plan: Plan, phase: PlannedPhase, family: str) -> int:
    """The peak of a phase as it is planned, of what else is held and of its network at work."""
    part = phase.components[0]
    name = f"vae, {family}" if part.name == "vae" else part.name
    others = sum(each.held_bytes for each in plan.held(phase) if each is not part)
    held = part.held_bytes if part.placement == "streamed" else None
    return others + taken(name, SIDES[family], part.precision, held, phase.manner)


@cache  # cards that are planned alike are walked through once
def taken(name: str, side: int, precision: str, held: int | None, manner: Manner) -> int:
    """What a network takes at most: streamed, of which `held` bytes are there at a time, or whole."""
    build, forward, scale = NETWORKS[name]
    size = (side // scale, side // scale) if scale else (24, 24)
    dtype = getattr(torch, precision)
    with Ledger() as ledger:
        network = placed(build, dtype, "cpu", layout_of(dtype))
        homes = tensors_of(network)
        if held is not None:
            with Streamer(network, homes, CUDA, held, 2):
                for _ in range(2):
                    forward(network, size, manner, dtype)
        else:
            move(network, homes, CUDA)
            forward(network, size, manner, dtype)
        return ledger.peak


@pytest.mark.parametrize("card", CARDS)
@pytest.mark.parametrize("family", SIDES)
def test_what_is_planned_is_what_is_allocated(studio: Studio, family: str, card: int) -> None:
    plan = studio.plan(asked(family), Hardware.card(gib=card))
    assert plan.fits
    seen = 0
    for phase in plan.phases:
        if phase.name.startswith("encode"):  # the weights of transformers' networks, and little besides
            continue
        peak = counted(plan, phase, family)
        assert phase.peak_bytes == pytest.approx(peak, rel=0.1), (phase.name, phase.components[0])
        assert peak <= plan.budget_bytes * 1.05  # the card would have had that much
        seen += 1
    assert seen >= 2


def test_a_card_that_is_too_small_would_be_seen() -> None:
    with Ledger(limit=2**30):
        network = placed(NETWORKS["unet"][0], torch.float16, "cpu")
        with pytest.raises(torch.OutOfMemoryError):
            move(network, tensors_of(network), CUDA)
