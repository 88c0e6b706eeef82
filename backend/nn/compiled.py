"""Compiling networks in place. What is repeated is compiled once: all blocks of a kind share their code, and
sizes stay symbols, so that the warm-up takes seconds and another size of picture needs none."""

from __future__ import annotations

from functools import cache

import torch
from torch import nn
from torch.nn import functional as F

RECOMPILES = 64


@cache
def no_compiler(device: str) -> str | None:
    """Why nothing can be compiled for this type of device; None where it can. Trying takes seconds."""

    def trial(x: torch.Tensor) -> torch.Tensor:
        return F.gelu(x) + 1

    try:
        torch.compile(trial, dynamic=True)(torch.zeros(2, 3, device=device))
    except Exception as error:  # noqa: BLE001 (what a missing compiler raises differs by platform and release)
        lines = str(error).strip().splitlines()
        return lines[0] if lines else type(error).__name__
    return None


def compile_parts(network: nn.Module) -> None:
    """Compile, at their first use, the submodules of the classes that the network's own lists as `COMPILED`.
    Where a piece of one cannot be compiled, that piece runs as it is."""
    torch._dynamo.config.suppress_errors = True
    # by code, whatever the checkpoint: kinds of blocks × precisions × one picture or several
    torch._dynamo.config.cache_size_limit = RECOMPILES
    for module in network.modules():
        if isinstance(module, getattr(network, "COMPILED", ())):
            module.compile(dynamic=True)
