"""The sampler of Stable Cascade's Stages B and C: ancestral DDPM steps along a continuous cosine schedule.

Sources: Ho et al. (arXiv:2006.11239), Nichol and Dhariwal (arXiv:2102.09672), and the published
`scheduler_config.json` files of Stable Cascade.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from backend.errors import CheckpointError
from backend.nn.configs import read_config, require
from backend.sampling.noise import Noise
from backend.sampling.samplers import Sample

LEAST, MOST = 0.0001, 0.9999  # ᾱ stays between these


@dataclass(frozen=True, kw_only=True)
class CosineSchedule:
    """ᾱ(t) = cos²((t + s) / (1 + s) · π/2), relative to ᾱ(0), for ratios t from 0, no noise, to 1, all noise.

    `scaler` other than 1 bends t towards more noise: 1 - (1 - t)^scaler above it, t^scaler below.
    """

    scaler: float = 1.0
    s: float = 0.008

    @classmethod
    def from_dict(cls, published: Mapping[str, Any]) -> CosineSchedule:
        """Read a published `scheduler_config.json`. Raises CheckpointError for one of another scheduler."""
        require("scheduler", published, {"_class_name": ("DDPMWuerstchenScheduler",)})
        schedule = read_config(cls, "scheduler", published)
        if not (0 < schedule.scaler < math.inf and 0 < schedule.s < math.inf):
            raise CheckpointError(
                f"scheduler config: scaler is {schedule.scaler:g} and s {schedule.s:g}; "
                "both can be any number above 0"
            )
        return schedule

    def alpha_bars(self, ratios: Tensor) -> Tensor:
        """The share of the signal's variance that is left at each ratio, float32."""
        if self.scaler > 1:
            ratios = 1 - (1 - ratios) ** self.scaler
        elif self.scaler < 1:
            ratios = ratios**self.scaler
        s = torch.tensor(self.s)
        start = torch.cos(s / (1 + s) * torch.pi * 0.5) ** 2
        return (torch.cos((ratios + s) / (1 + s) * torch.pi * 0.5) ** 2 / start).clamp(LEAST, MOST)


def sample_wuerstchen(
    denoise: Callable[[Tensor, Tensor], Tensor],
    noise: Noise,
    schedule: CosineSchedule,
    steps: int,
    device: torch.device | str = "cpu",
) -> Iterator[Sample]:
    """Runs from pure noise, yielding `steps` Samples; the last one's latents are the result.

    denoise: takes float32 latents (B, C, H, W) and a 0-d float32 ratio, both on `device`; returns the noise
    in them, guidance included, of any float type.
    """
    ratios = torch.linspace(1.0, 0.0, steps + 1)
    alpha_bars = schedule.alpha_bars(ratios)
    latents = noise.draw(device)
    for index, (alpha_bar, previous) in enumerate(pairwise(alpha_bars.tolist())):
        epsilon = denoise(latents, ratios[index].to(device)).float()
        alpha = alpha_bar / previous
        denoised = (latents - (1 - alpha_bar) ** 0.5 * epsilon) / alpha_bar**0.5
        latents = (latents - (1 - alpha) / (1 - alpha_bar) ** 0.5 * epsilon) / alpha**0.5
        # drawn in the last step as well, which adds none: the generators run on into the next stage
        fresh = noise.draw(device)
        if index + 1 < steps:
            latents = latents + ((1 - alpha) * (1 - previous) / (1 - alpha_bar)) ** 0.5 * fresh
        yield Sample(index + 1, steps, latents, denoised)
