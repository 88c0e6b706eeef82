"""Writing a demo checkpoint in hub layout: component folders of `config.json` and half-precision weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from training.loop import Weights, log
from training.postcards import known_words

DEMO = Path(__file__).parents[1] / "assets" / "demo"
NOISE = 0.1  # of latents of unit variance
EXAMPLES = [
    "a red lighthouse on green hills at sunset",
    "a blue house in snowy mountains at night, full moon",
    "a white sailboat on a calm sea at noon, sun, a few clouds",
    "a purple hot-air balloon on the left, in front of sand dunes at dawn",
    "a yellow castle by the sea in the centre, at night, starry sky",
    "an orange tent in snowy mountains on the right, at sunset",
    "a green windmill on green hills at noon, clear sky",
]


def write_json(path: Path, content: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    part.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    part.replace(path)


def write_component(folder: Path, config: dict[str, Any], weights: Weights, name: str) -> None:
    """`config.json` and the weights file `name` in `folder`; a reader sees the old or the new, not half."""
    write_json(folder / "config.json", config)
    part = folder / f"{name}.part"
    save_file({key: half(value) for key, value in weights.items()}, part, metadata={"format": "pt"})
    part.chmod(0o644)
    part.replace(folder / name)


def half(value: Tensor) -> Tensor:
    return (value.half() if value.is_floating_point() else value).contiguous().clone()


def write_settings(folder: Path, defaults: dict[str, Any], latent_rgb: dict[str, Any]) -> None:
    """`triptych.json`: what the engine and the page know of a demo beside its networks."""
    settings = {"defaults": defaults, "latent_rgb": latent_rgb}
    write_json(folder / "triptych.json", settings | {"vocabulary": known_words(), "examples": EXAMPLES})
    size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    log(f"exported to {folder.relative_to(DEMO.parents[1])}: {size / 1e6:.2f} MB")


def colour_fit(latents: Tensor, colours: Tensor) -> Tensor:
    """Least squares from latents (N, C, h, w) to colours (N, 3, h, w): (C + 1, 3), the bias last.

    Painted latents differ from encoded ones, as if by `NOISE`, which the fit expects: without, what nearly
    equal channels differ in would weigh most. By the normal equations in float64: `lstsq` of millions of
    float32 rows takes most channels for sums of others.
    """
    columns = latents.permute(0, 2, 3, 1).flatten(0, 2).double()
    with_bias = torch.cat([columns, columns.new_ones(len(columns), 1)], 1)
    wanted = colours.permute(0, 2, 3, 1).flatten(0, 2).double()
    noise = columns.new_full((with_bias.shape[1],), len(columns) * NOISE**2)
    noise[-1] = 0
    return torch.linalg.solve(with_bias.T @ with_bias + noise.diag(), with_bias.T @ wanted).float()


def rounded(fit_to_rgb: Tensor) -> dict[str, Any]:
    """What `colour_fit` found, as `triptych.json` has it."""
    rows = [[round(value, 4) for value in row] for row in fit_to_rgb.tolist()]
    return {"factors": rows[:-1], "bias": rows[-1]}
