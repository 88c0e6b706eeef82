"""What the trainings of Stages B and C share: the noise schedule, the weighting and the first weights."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from backend.cascade.unet import AttentionBlock, ResidualBlock, TimestepBlock, UNet, UNetConfig

OFFSET = 0.008
SIGNAL_RANGE = (1e-4, 0.9999)
SNR_CAP = 5.0
SIGNAL_FLOOR = 3e-3
NOISY = 0.6  # every other timestep ratio is above this
ANCHOR = 3.0

SCHEDULER_CONFIG = {"_class_name": "DDPMWuerstchenScheduler", "s": OFFSET, "scaler": 1.0}


def signal_at(ratio: Tensor) -> Tensor:
    """The share of signal in the variance at timestep ratios from 0 (picture) to 1 (noise)."""
    angle = (ratio + OFFSET) / (1 + OFFSET) * math.pi / 2
    start = math.cos(OFFSET / (1 + OFFSET) * math.pi / 2) ** 2
    return (angle.cos().square() / start).clamp(*SIGNAL_RANGE)


def draw_ratios(count: int, generator: torch.Generator) -> Tensor:
    """Timestep ratios (count,): stratified, for less noise in the loss. Every other one is a noisy one: there
    it is still open what is where."""
    spread = (torch.arange(count) + torch.rand(count, generator=generator)) / count
    spread[::2] = NOISY + (1 - NOISY) * spread[::2]
    return spread


def error_weight(signal: Tensor) -> Tensor:
    """How much an error in the noise counts: as much as the error in velocity that it stands for, by min-SNR
    (arXiv:2303.09556) and one more, without which composition is hardly learned. Where noise is nearly all
    there is, an error in it becomes a large one in the picture."""
    snr = signal / (1 - signal)
    return (snr.clamp(max=SNR_CAP) + 1) / (snr + 1) / signal.clamp(min=SIGNAL_FLOOR)


def compile_blocks(unet: UNet) -> None:
    """Two minutes of compiling, for which there must be a C++ compiler, save a third of every step."""
    for block in unet.modules():
        if isinstance(block, ResidualBlock):
            block.compile(dynamic=False)


def new_unet(published: Mapping[str, Any], seed: int) -> UNet:
    """A network that at first finds all of its input to be noise, which is nearly right where noise is nearly
    all there is, and leaves the other timesteps to be learned.

    Its input is kept, with both signs, beside channels that start out constant: their size keeps the norms
    from hiding how large the input is. The way up takes it from the skip connections.
    """
    torch.manual_seed(seed)
    unet = UNet(UNetConfig.from_dict(published))
    blocks = [block for block in unet.modules() if isinstance(block, ResidualBlock | AttentionBlock)]
    share = 0.5 / math.sqrt(len(blocks))
    with torch.no_grad():
        for block in unet.modules():
            if isinstance(block, ResidualBlock):
                _shrink(block.channelwise[4], share)
                _pass_skip(block)
            elif isinstance(block, AttentionBlock):
                _shrink(block.attention.to_out[0], share)
            elif isinstance(block, TimestepBlock):
                for mapper in block.children():
                    _shrink(mapper, 0.0)
        for scale in unet.up_upscalers:
            for layer in scale.modules():
                _shrink(layer, 0.2)
        _keep_input(unet)
        _calibrate(unet)
    return unet


def _shrink(layer: nn.Module, factor: float) -> None:
    if isinstance(layer, nn.Linear | nn.Conv2d | nn.ConvTranspose2d):
        for parameter in layer.parameters():
            parameter.mul_(factor)


def _pass_skip(block: ResidualBlock) -> None:
    """Adds the skip connection, if the block has one, to what goes through: gelu(x) - gelu(-x) = x."""
    into, out = block.channelwise[0], block.channelwise[4]
    assert isinstance(into, nn.Linear)
    assert isinstance(out, nn.Linear)
    channels = out.out_features
    skip = into.in_features - channels
    if not skip:
        return
    one = torch.eye(channels)
    both = torch.cat([one, -one])
    into.weight[: 2 * channels] = torch.cat([torch.zeros_like(both), both], 1)
    into.bias[: 2 * channels] = 0
    out.weight[:, : 2 * channels] = both.T


def _keep_input(unet: UNet) -> None:
    embedding, out = unet.embedding[1], unet.clf[1]
    assert isinstance(embedding, nn.Conv2d)
    assert isinstance(out, nn.Conv2d)
    inputs = embedding.in_channels
    one = torch.eye(inputs)
    both = torch.stack([one, -one], 1).flatten(0, 1)  # (2·inputs, inputs): rows x, -x, y, -y, …
    embedding.weight[: 2 * inputs] = both[:, :, None, None]
    assert embedding.bias is not None
    assert out.bias is not None
    embedding.bias[: 2 * inputs] = 0
    embedding.bias[2 * inputs :: 2] = ANCHOR
    embedding.bias[2 * inputs + 1 :: 2] = -ANCHOR
    out.weight.zero_()
    out.weight[:, : 2 * inputs] = both.T[:, :, None, None]
    out.bias.zero_()
    for name in ("effnet_mapper", "pixels_mapper"):
        mapper = getattr(unet, name, None)
        if mapper is not None:
            mapper[2].weight[: 2 * inputs] = 0
            mapper[2].bias[: 2 * inputs] = 0


def _calibrate(unet: UNet) -> None:
    """Scales the output so that it is the input's size at first."""
    config = unet.config
    noise, side = torch.randn(16, config.in_channels, 8, 8), (8, 8)
    pooled = torch.randn(16, config.clip_text_pooled_in_channels)
    text = images = effnet = None
    if config.clip_text_in_channels and config.clip_image_in_channels:
        text = torch.randn(16, 8, config.clip_text_in_channels)
        images = torch.zeros(16, 1, config.clip_image_in_channels)
    if config.effnet_in_channels:
        effnet = torch.randn(16, config.effnet_in_channels, 3, 3)
    conditioning = unet.condition(
        pooled, text, images, effnet=effnet, size=side if effnet is not None else None
    )
    found = unet(noise, torch.ones(16), conditioning)
    _shrink(unet.clf[1], float((found * noise).sum() / found.square().sum()))
