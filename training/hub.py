"""Writing a demo checkpoint in hub layout: component folders of `config.json` and half-precision weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from training.loop import Weights

DEMO = Path(__file__).parents[1] / "assets" / "demo"


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


def half(value: torch.Tensor) -> torch.Tensor:
    return (value.half() if value.is_floating_point() else value).contiguous().clone()
