"""Training the demo image encoder: a small CLIP vision model that learns to name what a postcard shows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

from training.data import Postcards
from training.judge import roughen
from training.loop import Losses, Recipe, fit
from training.postcards import SIZE
from training.text import COUNTS, attribute_loss

BATCH = 48
SHIFT = 4  # in pixels, at most
MEAN, SPREAD = (0.481, 0.458, 0.408), (0.269, 0.261, 0.276)  # CLIP's
VISION_CONFIG: dict[str, Any] = {
    "hidden_act": "quick_gelu",
    "hidden_size": 88,
    "image_size": SIZE,
    "intermediate_size": 264,
    "num_attention_heads": 4,
    "num_hidden_layers": 3,
    "patch_size": 16,
}
PROCESSOR_CONFIG: dict[str, Any] = {
    "crop_size": {"height": SIZE, "width": SIZE},
    "do_center_crop": True,
    "do_convert_rgb": True,
    "do_normalize": True,
    "do_rescale": True,
    "do_resize": True,
    "image_mean": MEAN,
    "image_processor_type": "CLIPImageProcessor",
    "image_std": SPREAD,
    "resample": 3,
    "rescale_factor": 1 / 255,
    "size": {"shortest_edge": SIZE},
}


def vision_config(projected: int) -> CLIPVisionConfig:
    return CLIPVisionConfig(**VISION_CONFIG, projection_dim=projected)


class Viewer(nn.Module):
    """The image encoder with heads that name the attributes, the clouds and the subject's box."""

    def __init__(self, eyes: CLIPVisionModelWithProjection) -> None:
        super().__init__()
        self.eyes = eyes
        self.head = nn.Linear(eyes.config.projection_dim, sum(COUNTS) + 5)

    def forward(self, pixels: Tensor) -> Tensor:
        return self.head(features(self.eyes, pixels))


def features(eyes: CLIPVisionModelWithProjection, pixels: Tensor) -> Tensor:
    """Pixels (B, 3, 128, 128) in [-1, 1] → image features (B, D)."""
    mean, spread = (torch.tensor(values).view(3, 1, 1) for values in (MEAN, SPREAD))
    return eyes(pixel_values=((pixels + 1) / 2 - mean) / spread).image_embeds


def teach_seeing(
    eyes: CLIPVisionModelWithProjection, shown: Postcards, recipe: Recipe, checkpoint: Path
) -> CLIPVisionModelWithProjection:
    viewer = Viewer(eyes)
    labels, boxes = shown.labels(), torch.from_numpy(shown.boxes) / SIZE
    clouds = torch.tensor([float(scene.clouds) for scene in shown.scenes])

    def losses_at(_: int, generator: torch.Generator) -> Losses:
        indices = torch.randint(len(shown), (BATCH,), generator=generator)
        pixels = shifted(roughen(shown.batch(indices), generator), generator)
        with torch.autocast("cpu", torch.bfloat16):
            read = viewer(pixels).float()
        scores, cloudy, box = read.split([sum(COUNTS), 1, 4], 1)
        naming = attribute_loss(scores, labels[indices])
        cloud = functional.binary_cross_entropy_with_logits(cloudy[:, 0], clouds[indices])
        placing = functional.l1_loss(box, boxes[indices])
        best = torch.stack([part.argmax(1) for part in scores.split(COUNTS, 1)], 1)
        right = (best == labels[indices]).float().mean()
        return {"loss": naming + cloud + 4 * placing, "naming": naming, "placing": placing, "right": right}

    fit(viewer, losses_at, recipe, checkpoint)
    return eyes.eval()


def shifted(pixels: Tensor, generator: torch.Generator) -> Tensor:
    """The batch moved by a few pixels, its edges continued outwards."""
    x, y = torch.randint(2 * SHIFT + 1, (2,), generator=generator).tolist()
    padded = functional.pad(pixels, (SHIFT,) * 4, mode="replicate")
    return padded[:, :, y : y + SIZE, x : x + SIZE]
