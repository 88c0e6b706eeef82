"""The two small networks that came with the original release of Stable Cascade, beside its three stages.

The encoder makes Stage C's latents of a picture, the previewer a small picture of the latents. Neither is
needed to paint: where a checkpoint holds the previewer, it draws the live preview of Stage C.

Sources: Tan and Le, EfficientNetV2 (arXiv:2104.00298), its "S" network; module names as in the published
`effnet_encoder` and `previewer` files. Letters: B batch, C channels, H W pixels, h w latent pixels.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor, nn

LATENT_CHANNELS = 16
PIXEL_MEAN, PIXEL_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of the photographs it was trained on


@dataclass(frozen=True, kw_only=True)
class BackboneStage:
    """`fused` blocks convolve where the others expand, convolve each channel apart, and weigh channels."""

    fused: bool
    expansion: int
    stride: int
    channels: int
    layers: int


BACKBONE_S = (
    BackboneStage(fused=True, expansion=1, stride=1, channels=24, layers=2),
    BackboneStage(fused=True, expansion=4, stride=2, channels=48, layers=4),
    BackboneStage(fused=True, expansion=4, stride=2, channels=64, layers=4),
    BackboneStage(fused=False, expansion=4, stride=2, channels=128, layers=6),
    BackboneStage(fused=False, expansion=6, stride=1, channels=160, layers=9),
    BackboneStage(fused=False, expansion=6, stride=2, channels=256, layers=15),
)
STEM_CHANNELS, HEAD_CHANNELS = 24, 1280


def _convolution(
    before: int, after: int, kernel: int, stride: int = 1, groups: int = 1, *, active: bool = True
) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(before, after, kernel, stride, kernel // 2, groups=groups, bias=False),
        nn.BatchNorm2d(after, eps=1e-3),
        *([nn.SiLU()] if active else []),
    )


class ChannelWeights(nn.Module):
    """Squeeze and excitation: each channel weighed by what all channels' means say (arXiv:1709.01507)."""

    def __init__(self, channels: int, squeezed: int) -> None:
        super().__init__()
        self.fc1 = nn.Conv2d(channels, squeezed, 1)
        self.fc2 = nn.Conv2d(squeezed, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        weights = self.fc2(torch.nn.functional.silu(self.fc1(x.mean((2, 3), keepdim=True))))
        return x * weights.sigmoid()


class BackboneBlock(nn.Module):
    """One block of the backbone, with a skip connection where its output is as large as its input."""

    def __init__(self, before: int, stage: BackboneStage, stride: int) -> None:
        super().__init__()
        wide, after = before * stage.expansion, stage.channels
        if stage.fused and stage.expansion == 1:
            parts: list[nn.Module] = [_convolution(before, after, 3, stride)]
        elif stage.fused:
            parts = [_convolution(before, wide, 3, stride), _convolution(wide, after, 1, active=False)]
        else:
            parts = [
                _convolution(before, wide, 1),
                _convolution(wide, wide, 3, stride, groups=wide),
                ChannelWeights(wide, before // 4),
                _convolution(wide, after, 1, active=False),
            ]
        self.block = nn.Sequential(*parts)
        self.skips = stride == 1 and before == after

    def forward(self, x: Tensor) -> Tensor:
        return x + self.block(x) if self.skips else self.block(x)


class EffnetEncoder(nn.Module):
    """Pixels (B, 3, H, W) in [0, 1] → Stage C's latents (B, 16, H / 32, W / 32).

    The published pipeline gives it pictures of three quarters of the size: 768² for the 24² of 1024².
    """

    def __init__(self, stages: tuple[BackboneStage, ...] = BACKBONE_S) -> None:
        super().__init__()
        layers: list[nn.Module] = [_convolution(3, STEM_CHANNELS, 3, 2)]
        before = STEM_CHANNELS
        for stage in stages:
            blocks: list[nn.Module] = []
            for index in range(stage.layers):
                blocks.append(BackboneBlock(before, stage, 1 if index else stage.stride))
                before = stage.channels
            layers.append(nn.Sequential(*blocks))
        self.backbone = nn.Sequential(*layers, _convolution(before, HEAD_CHANNELS, 1))
        self.mapper = nn.Sequential(
            nn.Conv2d(HEAD_CHANNELS, LATENT_CHANNELS, 1, bias=False),
            nn.BatchNorm2d(LATENT_CHANNELS, affine=False),
        )

    def forward(self, pixels: Tensor) -> Tensor:
        mean, std = (pixels.new_tensor(values).view(1, 3, 1, 1) for values in (PIXEL_MEAN, PIXEL_STD))
        return self.mapper(self.backbone((pixels - mean) / std))


class Previewer(nn.Module):
    """Stage C's latents (B, 16, h, w) → a small picture (B, 3, 8·h, 8·w) around [0, 1].

    `hidden` is the width of the first layers, halved at the first two doublings of the resolution.
    """

    def __init__(self, hidden: int = 512) -> None:
        super().__init__()
        widths = [hidden, hidden // 2, hidden // 4, hidden // 4]
        layers: list[nn.Module] = [*_layer(nn.Conv2d(LATENT_CHANNELS, hidden, 1))]
        layers += _layer(nn.Conv2d(hidden, hidden, 3, padding=1))
        for before, after in pairwise(widths):
            layers += _layer(nn.ConvTranspose2d(before, after, 2, stride=2))
            layers += _layer(nn.Conv2d(after, after, 3, padding=1))
        self.blocks = nn.Sequential(*layers, nn.Conv2d(widths[-1], 3, 1))

    def forward(self, latents: Tensor) -> Tensor:
        return self.blocks(latents)


def _layer(convolution: nn.Conv2d | nn.ConvTranspose2d) -> list[nn.Module]:
    return [convolution, nn.GELU(), nn.BatchNorm2d(convolution.out_channels)]
