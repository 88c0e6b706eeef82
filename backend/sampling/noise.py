"""The noise rule: image i of a batch draws from its own CPU generator, seeded with seed + i."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


class Noise:
    """Standard normal noise for a batch, one generator per image, so a batch equals its images run alone.

    Drawn in float32 on the CPU, so one seed gives one picture on every device.
    """

    def __init__(self, seeds: Sequence[int], shape: Sequence[int]) -> None:
        """seeds: one per image. shape: of one image's latents, without the batch."""
        self.shape = tuple(shape)
        self._generators = [torch.Generator().manual_seed(seed) for seed in seeds]

    def draw(self, device: torch.device | str = "cpu") -> Tensor:
        """The next noise, (B, *shape) in float32."""
        return torch.stack([torch.randn(self.shape, generator=g) for g in self._generators]).to(device)

    def state(self) -> list[Tensor]:
        """The generators' states, to be given to `restore`."""
        return [generator.get_state() for generator in self._generators]

    def restore(self, state: Sequence[Tensor]) -> None:
        """Goes on from where `state` was taken; the batch must be as large as it was then."""
        for generator, saved in zip(self._generators, state, strict=True):
            generator.set_state(saved)
