"""A network's predictions for several pictures and prompts, in as many forwards as memory asks for."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from backend.phases import Manner

Forward = Callable[
    [slice, slice], Tensor
]  # of these prompts, these pictures → (P · B, C, h, w), prompt by prompt


def predictions(forward: Forward, images: int, prompts: int, manner: Manner) -> list[Tensor]:
    """→ for each prompt the predictions of all pictures, (B, C, h, w).

    `manner` says how many pictures go into one forward, and whether prompts (guidance's halves) go apart.
    """
    rows: list[list[Tensor]] = []
    for start in range(0, images, manner.images):
        some = slice(start, start + manner.images)
        if manner.apart:
            rows.append([forward(slice(prompt, prompt + 1), some) for prompt in range(prompts)])
        else:
            rows.append(list(forward(slice(prompts), some).chunk(prompts)))
    return [torch.cat(each) for each in zip(*rows, strict=True)] if len(rows) > 1 else rows[0]
