"""The training pictures: rendered once, kept in a cache on disk, the same for the same seed."""

from __future__ import annotations

import random
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from training.postcards import SIZE, Scene, random_scene, render

CACHE = Path(__file__).parent / ".cache"


@dataclass(frozen=True, kw_only=True)
class Postcards:
    """Pictures and what they show: pixels (N, 128, 128, 3) uint8, boxes (N, 4) left, top, right, bottom."""

    pixels: np.ndarray
    boxes: np.ndarray
    scenes: list[Scene]

    def __len__(self) -> int:
        return len(self.scenes)

    def batch(self, indices: Tensor) -> Tensor:
        """The pictures at `indices`: (B, 3, 128, 128) in [-1, 1]."""
        pixels = torch.from_numpy(self.pixels[indices.numpy()])
        return pixels.permute(0, 3, 1, 2).float() / 127.5 - 1

    def labels(self) -> Tensor:
        """(N, 6): each picture's attributes, in the order of `postcards.ATTRIBUTES`."""
        return torch.tensor([scene.labels() for scene in self.scenes])


def postcards(count: int, *, seed: int, held_out: bool = False, subject: str | None = None) -> Postcards:
    """`count` renders from `seed`, of the eight subjects or one, from the cache where it has them.

    The cache knows nothing of changed drawing code: delete `training/.cache/` after such a change.
    """
    rng = random.Random(seed)
    scenes = [random_scene(rng, held_out=held_out, subject=subject) for _ in range(count)]
    parts = [
        f"postcards-{count}-{seed}",
        *(["held-out"] if held_out else []),
        *([subject] if subject else []),
    ]
    stem = CACHE / "-".join(parts)
    pixel_file, box_file = stem.with_suffix(".pixels.npy"), stem.with_suffix(".boxes.npy")
    if not box_file.exists():
        CACHE.mkdir(parents=True, exist_ok=True)
        pixels = np.empty((count, SIZE, SIZE, 3), np.uint8)
        boxes = np.empty((count, 4), np.float32)
        for index, scene in enumerate(scenes):
            picture, boxes[index] = render(scene, rng)
            pixels[index] = np.asarray(picture)
        np.save(pixel_file, pixels)
        np.save(box_file, boxes)
    return Postcards(pixels=np.load(pixel_file, mmap_mode="r"), boxes=np.load(box_file), scenes=scenes)


def box_weights(boxes: Tensor, side: int, extra: float) -> Tensor:
    """(N, 4) boxes in pixels → (N, 1, side, side) weights of mean 1, higher in the box.

    A cell that the box touches counts `1 + extra` times as much as one outside."""
    pixels = SIZE / side
    cells = torch.arange(side) * pixels
    left, top, right, bottom = (edge[:, None] for edge in boxes.unbind(1))
    across = (cells + pixels > left) & (cells < right)
    down = (cells + pixels > top) & (cells < bottom)
    weights = 1 + extra * (down[:, :, None] & across[:, None, :]).float()
    return (weights / weights.mean((1, 2), keepdim=True))[:, None]
