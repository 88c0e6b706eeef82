"""Stable Cascade's networks against the reference's, on random weights: within 1e-5 of the largest value."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import DDPMWuerstchenScheduler
from diffusers.models.unets.unet_stable_cascade import StableCascadeUNet
from diffusers.pipelines.deprecated.wuerstchen import PaellaVQModel
from torch import Tensor, nn

from backend.cascade.optional import BackboneStage, EffnetEncoder, Previewer
from backend.cascade.stage_a import StageA, StageAConfig
from backend.cascade.unet import ATTENTION, RESIDUAL, TIMESTEP, UNet, UNetConfig
from backend.errors import CheckpointError
from backend.sampling.noise import Noise
from backend.sampling.wuerstchen import CosineSchedule, sample_wuerstchen

CT, CTA = (RESIDUAL, TIMESTEP), (RESIDUAL, TIMESTEP, ATTENTION)
STAGE_C: dict[str, Any] = {
    "in_channels": 16,
    "out_channels": 16,
    "timestep_ratio_embedding_dim": 16,
    "conditioning_dim": 40,
    "block_out_channels": (32, 48),
    "num_attention_heads": (2, 4),
    "down_num_layers_per_block": (1, 2),
    "up_num_layers_per_block": (2, 1),
    "clip_text_in_channels": 24,
    "clip_text_pooled_in_channels": 20,
    "clip_image_in_channels": 12,
    "switch_level": (False,),
}
STAGE_B: dict[str, Any] = {
    "in_channels": 4,
    "out_channels": 4,
    "timestep_ratio_embedding_dim": 16,
    "patch_size": 2,
    "conditioning_dim": 40,
    "block_out_channels": (16, 24, 32, 32),
    "num_attention_heads": (0, 9, 2, 4),
    "down_num_layers_per_block": (1, 2, 3, 1),
    "up_num_layers_per_block": (1, 3, 2, 1),
    "down_blocks_repeat_mappers": (1, 1, 1, 1),
    "up_blocks_repeat_mappers": (3, 3, 2, 2),
    "block_types_per_layer": (CT, CT, CTA, CTA),
    "clip_text_pooled_in_channels": 20,
    "effnet_in_channels": 16,
    "pixel_mapper_in_channels": 3,
    "timestep_conditioning_type": ("sca",),
    "dropout": 0.1,
}
C_VARIANTS: dict[str, dict[str, Any]] = {
    "as published": {},
    "switching resolution": {"switch_level": (True,)},
    "three levels, one switching, one without self-attention": {
        "block_out_channels": (32, 32, 48),
        "num_attention_heads": (2, 2, 4),
        "down_num_layers_per_block": (1, 1, 2),
        "up_num_layers_per_block": (2, 1, 1),
        "down_blocks_repeat_mappers": (1, 2, 1),
        "up_blocks_repeat_mappers": (2, 1, 1),
        "block_types_per_layer": (CTA, CTA, CTA),
        "switch_level": (False, True),
        "self_attn": (True, False, True),
        "dropout": 0.1,
    },
    "fewer clip tokens, one condition on time": {"clip_seq": 2, "timestep_conditioning_type": ("sca",)},
}
B_VARIANTS: dict[str, dict[str, Any]] = {
    "as the full one": {},
    "as the lite one": {"up_blocks_repeat_mappers": (2, 2, 2, 2), "down_num_layers_per_block": (1, 1, 1, 1)},
    "no pixels, larger kernel": {"pixel_mapper_in_channels": None, "kernel_size": 5},
}


def randomised(module: nn.Module) -> nn.Module:
    """Weights that leave no path at zero, as fresh ones do."""
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.1)
    for name, buffer in module.named_buffers():
        if name.endswith(("running_mean", "running_var")):
            buffer.uniform_(0.5, 1.5)
    return module.eval()


def relative(ours: Tensor, reference: Tensor) -> float:
    assert ours.shape == reference.shape
    return float((ours - reference).abs().max() / reference.abs().max())


def pair(config: dict[str, Any]) -> tuple[Any, UNet]:
    torch.manual_seed(0)
    reference: Any = randomised(StableCascadeUNet(**config))
    ours = UNet(UNetConfig.from_dict(dict(reference.config)))
    ours.load_state_dict(reference.state_dict())
    return reference, ours


@pytest.mark.parametrize("variant", C_VARIANTS)
@pytest.mark.parametrize("size", [(6, 6), (5, 9), (3, 3)], ids=str)
@torch.no_grad()
def test_stage_c(variant: str, size: tuple[int, int]) -> None:
    reference, ours = pair({**STAGE_C, **C_VARIANTS[variant]})
    latents, ratio = torch.randn(3, 16, *size), torch.tensor([0.05, 0.6, 1.0])
    pooled, text, images = torch.randn(3, 20), torch.randn(3, 7, 24), torch.randn(3, 2, 12)
    expected = reference(latents, ratio, pooled[:, None], text, images, return_dict=False)[0]
    assert relative(ours(latents, ratio, ours.condition(pooled, text, images)), expected) < 1e-5


@pytest.mark.parametrize("variant", B_VARIANTS)
@pytest.mark.parametrize("size", [(32, 32), (16, 48)], ids=str)
@torch.no_grad()
def test_stage_b(variant: str, size: tuple[int, int]) -> None:
    reference, ours = pair({**STAGE_B, **B_VARIANTS[variant]})
    latents, ratio = torch.randn(3, 4, *size), torch.tensor([0.05, 0.6, 1.0])
    pooled, effnet = torch.randn(3, 20), torch.randn(3, 16, 3, 5)
    expected = reference(latents, ratio, pooled[:, None], effnet=effnet, return_dict=False)[0]
    assert relative(ours(latents, ratio, ours.condition(pooled, effnet=effnet, size=size)), expected) < 1e-5


@torch.no_grad()
def test_conditioning_of_one_prompt_serves_a_batch() -> None:
    _, ours = pair(STAGE_C)
    latents, ratio = torch.randn(4, 16, 3, 3), torch.full((4,), 0.5)
    inputs = torch.randn(2, 20), torch.randn(2, 7, 24), torch.randn(2, 1, 12)
    every = ours.condition(*(each.repeat_interleave(2, dim=0) for each in inputs))
    assert relative(ours(latents, ratio, ours.condition(*inputs)), ours(latents, ratio, every)) < 1e-6


@pytest.mark.parametrize("band", [4096, 30])  # of pixels: the whole picture, or a row or two
@pytest.mark.parametrize("levels", [1, 2, 3])
@torch.no_grad()
def test_stage_a(levels: int, band: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("backend.cascade.stage_a.BAND_PIXELS", band)
    torch.manual_seed(0)
    reference: Any = randomised(
        PaellaVQModel(levels=levels, embed_dim=32, bottleneck_blocks=3, num_vq_embeddings=20)
    )
    ours = StageA(StageAConfig.from_dict(dict(reference.config))).eval()
    ours.load_state_dict(reference.state_dict())
    pixels = torch.rand(2, 3, 32, 48)
    latents = reference.encode(pixels).latents
    assert latents.shape[-1] * ours.config.scale == 48
    assert relative(ours.encode(pixels), latents) < 1e-5
    assert relative(ours.decode(latents), reference.decode(latents).sample) < 1e-5


@pytest.mark.parametrize("scaler", [1.0, 2.0, 0.5])
@pytest.mark.parametrize("steps", [1, 2, 10, 33])
def test_sampler(scaler: float, steps: int) -> None:
    """Step by step with a network that is wrong in a way that depends on everything it is given."""

    def network(latents: Tensor, ratio: Tensor) -> Tensor:
        return (latents * (0.9 + 0.1 * ratio)).tanh() + 0.1 * ratio

    scheduler: Any = DDPMWuerstchenScheduler(scaler=scaler)
    scheduler.set_timesteps(steps)
    generators = [torch.Generator().manual_seed(seed) for seed in (3, 4)]
    expected = torch.cat([torch.randn(1, 4, 5, 6, generator=g) for g in generators])
    schedule = CosineSchedule.from_dict(dict(scheduler.config) | {"_class_name": type(scheduler).__name__})
    noise = Noise([3, 4], (4, 5, 6))
    ours = sample_wuerstchen(network, noise, schedule, steps)
    for ratio, state in zip(scheduler.timesteps[:-1], ours, strict=True):
        predicted = network(expected, ratio)
        expected = scheduler.step(predicted, ratio.expand(2), expected, generators).prev_sample
        assert relative(state.latents, expected) < 1e-5
    assert all(torch.equal(a, b.get_state()) for a, b in zip(noise.state(), generators, strict=True))


def test_the_encoder_and_the_previewer_have_the_published_sizes() -> None:
    """EfficientNetV2-S without its classifier has 20,177,488 parameters; the previewer's file 16 MB."""
    with torch.device("meta"):
        encoder, previewer = EffnetEncoder(), Previewer()
    assert sum(p.numel() for p in encoder.backbone.parameters()) == 20_177_488
    assert 15.5e6 < 4 * sum(p.numel() for p in previewer.state_dict().values()) < 16.5e6
    assert previewer.state_dict()["blocks.24.weight"].shape == (3, 128, 1, 1)


@torch.no_grad()
def test_the_encoder_and_the_previewer_have_the_published_scales() -> None:
    stages = (
        BackboneStage(fused=True, expansion=1, stride=1, channels=24, layers=1),
        BackboneStage(fused=True, expansion=4, stride=2, channels=8, layers=2),
        BackboneStage(fused=False, expansion=4, stride=2, channels=8, layers=2),
    )
    latents = randomised(EffnetEncoder(stages))(torch.rand(2, 3, 48, 32))
    assert latents.shape == (2, 16, 6, 4)
    assert randomised(Previewer(16))(latents).shape == (2, 3, 48, 32)


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        ({"block_types_per_layer": (("SDCascadeResBlock",), ("Mystery",))}, "names 'Mystery'; it can be"),
        ({"num_attention_heads": (5, 4)}, "num_attention_heads is 5 for 32 channels; it must divide them"),
        ({"up_num_layers_per_block": (1,)}, "has 1 entries; block_out_channels has 2"),
        ({"switch_level": ()}, "switch_level"),
        ({"timestep_conditioning_type": ()}, "timestep_conditioning_type is empty"),
        ({"conditioning_dim": "wide"}, "conditioning_dim is 'wide', of a wrong type"),
    ],
)
def test_configs_that_make_no_network_are_refused(changed: dict[str, Any], told: str) -> None:
    with pytest.raises(CheckpointError, match=told):
        UNetConfig.from_dict(STAGE_C | changed)
