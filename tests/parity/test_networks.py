"""The UNet and the KL-VAE against the reference's, on random weights: within 1e-5 of the largest value."""

from __future__ import annotations

from typing import Any, cast

import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch import Tensor, nn
from torch.nn import functional

from backend.errors import CheckpointError
from backend.nn import layers
from backend.nn.autoencoder import Autoencoder, AutoencoderConfig
from backend.sd15.unet import UNet, UNetConfig

UNET: dict[str, Any] = {
    "sample_size": 8,
    "block_out_channels": (32, 64),
    "layers_per_block": 2,
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    "cross_attention_dim": 24,
    "norm_num_groups": 8,
    "attention_head_dim": 4,
}
THREE_LEVELS: dict[str, Any] = {
    "block_out_channels": (32, 64, 96),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "layers_per_block": 1,
}
UNET_VARIANTS: dict[str, dict[str, Any]] = {
    "as SD1.5": {},
    "as SD2.1: linear projection, a list of heads, upcast attention": {
        "use_linear_projection": True,
        "attention_head_dim": [2, 8],
        "upcast_attention": True,
    },
    "other timestep embedding": {"flip_sin_to_cos": False, "freq_shift": 1},
    "layers by level": {"layers_per_block": [1, 2], "norm_eps": 1e-6},
    "three levels, two transformer layers, one level without self-attention": {
        **THREE_LEVELS,
        "transformer_layers_per_block": 2,
        "only_cross_attention": [False, True, False],
    },
    "more channels in and out": {"in_channels": 9, "out_channels": 8},
}
VAE: dict[str, Any] = {
    "block_out_channels": (32, 64),
    "down_block_types": ("DownEncoderBlock2D",) * 2,
    "up_block_types": ("UpDecoderBlock2D",) * 2,
    "norm_num_groups": 8,
    "layers_per_block": 2,
}
VAE_VARIANTS: dict[str, dict[str, Any]] = {
    "as SD1.5": {},
    "as SD3: 16 channels, no quant convolutions": {
        "latent_channels": 16,
        "use_quant_conv": False,
        "use_post_quant_conv": False,
        "shift_factor": 0.06,
        "scaling_factor": 1.5,
    },
    "no attention, one layer": {"mid_block_add_attention": False, "layers_per_block": 1},
}


def relative(ours: Tensor, reference: Tensor) -> float:
    assert ours.shape == reference.shape
    return float((ours - reference).abs().max() / reference.abs().max())


@pytest.mark.parametrize("variant", UNET_VARIANTS)
@pytest.mark.parametrize("size", [(16, 16), (12, 20), (9, 15)], ids=str)
@torch.no_grad()
def test_unet(variant: str, size: tuple[int, int]) -> None:
    torch.manual_seed(0)
    reference = UNet2DConditionModel(**{**UNET, **UNET_VARIANTS[variant]}).eval()
    ours = UNet(UNetConfig.from_dict(dict(reference.config)))
    ours.load_state_dict(reference.state_dict())
    latents = torch.randn(2, ours.config.in_channels, *size)
    timesteps = torch.tensor([3.0, 999.0])
    context = torch.randn(2, 77, 24)
    assert relative(ours(latents, timesteps, context), reference(latents, timesteps, context).sample) <= 1e-5


@pytest.mark.parametrize("variant", VAE_VARIANTS)
@torch.no_grad()
def test_autoencoder(variant: str) -> None:
    torch.manual_seed(0)
    reference = AutoencoderKL(**{**VAE, **VAE_VARIANTS[variant]}).eval()
    ours = Autoencoder(AutoencoderConfig.from_dict(dict(reference.config)))
    ours.load_state_dict(reference.state_dict())
    pixels = torch.randn(2, 3, 32, 48)
    mean, logvar = ours.encode(pixels)
    (theirs,) = reference.encode(pixels, return_dict=False)
    assert relative(mean, theirs.mean) <= 1e-5
    assert relative(logvar, theirs.logvar) <= 1e-5
    latents = torch.randn_like(mean)
    decoded = ours.decode(latents)
    assert relative(decoded, reference.decode(cast(Any, latents), return_dict=False)[0]) <= 1e-5
    assert relative(ours.decode(latents, sliced=True), decoded) <= 1e-5
    assert relative(ours.from_model(ours.to_model(latents)), latents) <= 1e-5


class Unnormalised(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.clone()  # a norm returns a new tensor, which the activation then overwrites


def norms_removed(network: nn.Module) -> None:
    """Group norms see the whole picture; without them a result depends on its surroundings alone."""
    for module in network.modules():
        for name, child in module.named_children():
            if isinstance(child, nn.GroupNorm):
                setattr(module, name, Unnormalised())


@torch.no_grad()
def test_tiles_are_blended_without_seams() -> None:
    torch.manual_seed(0)
    vae = Autoencoder(AutoencoderConfig.from_dict({**VAE, "mid_block_add_attention": False}))
    norms_removed(vae)
    latents = torch.randn(1, 4, 40, 56)
    whole, tiled = vae.decode(latents), vae.decode(latents, tile=32)
    assert tiled.shape == whole.shape

    def roughness(x: Tensor) -> Tensor:  # mean change from one column of pixels to the next
        return x.diff(dim=-1).abs().mean(dim=(0, 1, 2))

    # a seam would be a column where the tiled picture jumps and the whole one does not
    assert (roughness(tiled) / roughness(whole)).max() < 1.1
    # where one tile alone covers the picture, its edges far away, nothing differs at all
    assert torch.allclose(tiled[..., :16, :16], whole[..., :16, :16], atol=1e-5)
    assert torch.allclose(tiled[..., -10:, -10:], whole[..., -10:, -10:], atol=1e-5)
    assert (tiled - whole).abs().mean() < 0.05 * whole.std()


@torch.no_grad()
def test_tiled_encoding_covers_the_picture() -> None:
    torch.manual_seed(0)
    vae = Autoencoder(AutoencoderConfig.from_dict(VAE | {"mid_block_add_attention": False}))
    norms_removed(vae)
    pixels = torch.randn(1, 3, 80, 112)
    whole, tiled = vae.encode(pixels)[0], vae.encode(pixels, tile=64)[0]
    assert tiled.shape == whole.shape == (1, 4, 40, 56)
    assert (tiled - whole).abs().mean() < 0.05 * whole.std()


@pytest.mark.parametrize(
    ("config", "named"),
    [
        ({"down_block_types": ["AttnDownBlock2D"]}, "AttnDownBlock2D"),
        ({"class_embed_type": "timestep"}, "class_embed_type"),
        ({"addition_embed_type": "text_time"}, "text_time"),
        ({"resnet_time_scale_shift": "scale_shift"}, "scale_shift"),
    ],
)
def test_settings_that_are_not_built_are_refused_by_name(config: dict[str, Any], named: str) -> None:
    with pytest.raises(CheckpointError, match=named):
        UNetConfig.from_dict(config)


def test_scaling_by_nothing_is_refused() -> None:
    with pytest.raises(CheckpointError, match="scaling_factor is 0"):
        AutoencoderConfig.from_dict({"scaling_factor": 0})


def test_autoencoder_of_another_kind_is_refused_by_name() -> None:
    with pytest.raises(CheckpointError, match="AttnDownEncoderBlock2D"):
        AutoencoderConfig.from_dict({"down_block_types": ["AttnDownEncoderBlock2D"]})


@pytest.mark.parametrize(
    ("config", "named"),
    [
        ({"block_out_channels": "wide"}, "block_out_channels"),
        ({"block_out_channels": [320, 640]}, "2 entries for 4 levels"),
        ({"block_out_channels": [320, -640, 640, 640]}, "block_out_channels"),
        ({"norm_num_groups": 32.5}, "norm_num_groups"),
        ({"cross_attention_dim": None}, "cross_attention_dim"),
        ({"attention_head_dim": ["8", "8", "8", "8"]}, "heads"),
        ({"down_block_types": None}, "down_block_types"),
        ({"attention_head_dim": 7}, "320 cannot be split into 7 heads"),
    ],
)
def test_values_of_a_wrong_type_are_named(config: dict[str, Any], named: str) -> None:
    with pytest.raises(CheckpointError, match=named):
        UNetConfig.from_dict(config)


@torch.no_grad()
def test_long_attention_in_bf16_stays_near_the_exact_one() -> None:
    """On a CPU it goes another way than torch's kernel, and rounds once more."""
    torch.manual_seed(0)
    q, k, v = (scale * torch.randn(2, layers.LONG + 40, 3 * 40) for scale in (2, 2, 1))  # scores up to 33
    exact = layers.attend(q, k, v, heads=3)

    def error(out: Tensor) -> float:
        return float((out.float() - exact).square().mean().sqrt() / exact.square().mean().sqrt())

    halves = [t.bfloat16() for t in (q, k, v)]
    split = [t.view(2, -1, 3, 40).transpose(1, 2) for t in halves]
    kernel = functional.scaled_dot_product_attention(split[0], split[1], split[2])
    chunked = error(layers.attend(halves[0], halves[1], halves[2], heads=3))
    assert 0 < chunked < 2.5 * error(kernel.transpose(1, 2).reshape(exact.shape))
    assert chunked < 0.02
