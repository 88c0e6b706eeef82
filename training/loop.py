"""The training loop of every demo network: AdamW, cosine, a moving average, checkpoints that resume."""

from __future__ import annotations

import argparse
import math
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, distributed, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

Losses = dict[str, Tensor]
Weights = dict[str, Tensor]


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How long and how hard to train. `average` is the decay of the weights' moving average, 0 for none."""

    steps: int
    learning_rate: float
    warmup: int = 100
    weight_decay: float = 0.01
    average: float = 0.0
    seed: int = 0
    save_every: int = 250
    log_every: int = 50


def fit(
    model: nn.Module,
    losses_at: Callable[[int, torch.Generator], Losses],
    recipe: Recipe,
    checkpoint: Path,
    *,
    on_save: Callable[[int, Weights], None] | None = None,
) -> nn.Module:
    """Trains `model` and returns it with its averaged weights.

    `losses_at(step, generator)` returns named losses, the first of which is minimised, the others logged. All
    of a step's randomness comes from its generator, seeded by the step, so an interrupted run that resumes
    from `checkpoint` equals one that was not. `on_save` sees the averaged weights at every save.
    """
    rank, ranks = processes()
    averaged = {name: value.detach().clone() for name, value in model.state_dict().items()}
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(
        parameters, lr=recipe.learning_rate, weight_decay=recipe.weight_decay, betas=(0.9, 0.99)
    )
    start = 0
    if checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        averaged, start = state["averaged"], state["step"]
        log(f"{checkpoint.stem}: resuming at step {start}" + f", process {rank} of {ranks}" * (ranks > 1))

    model.train()
    sums: dict[str, float] = {}
    began = time.perf_counter()
    for step in range(start, recipe.steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate_at(step, recipe)
        with sdpa_kernel(SDPBackend.MATH):  # on a CPU the fused kernel's backward takes a third of the step
            draw = (recipe.seed * 1_000_003 + step) * ranks + rank
            losses = losses_at(step, torch.Generator().manual_seed(draw))
        optimizer.zero_grad(set_to_none=True)
        next(iter(losses.values())).backward()
        share_gradients(parameters, ranks)
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        decay = min(recipe.average, (1 + step) / (10 + step))
        update_average(averaged, model, decay)

        for name, loss in losses.items():
            sums[name] = sums.get(name, 0.0) + loss.item()
        done = step + 1
        if rank:  # the first process logs and saves
            continue
        if done % recipe.log_every == 0:
            pace = (time.perf_counter() - began) / recipe.log_every
            means = " ".join(f"{name} {total / recipe.log_every:.4f}" for name, total in sums.items())
            log(f"{checkpoint.stem} {done}/{recipe.steps}: {means} · {pace:.3f} s/step")
            sums, began = {}, time.perf_counter()
        if done % recipe.save_every == 0 or done == recipe.steps:
            save(checkpoint, model, optimizer, averaged, done)
            if on_save:
                on_save(done, averaged)
            began = time.perf_counter()
    model.load_state_dict(averaged)
    return model.eval()


def run_stages(stages: Mapping[str, Callable[[], None]], about: str | None) -> None:
    """The command line of a training: the stages that are named, or all of them in their order."""
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stages", nargs="*", metavar="stage", help=", ".join(stages))
    for stage in parser.parse_args().stages or stages:
        stages[stage]()


def processes() -> tuple[int, int]:
    """This process's number and how many train together: `torchrun --nproc-per-node 2 -m training.train_...`.

    On a CPU two processes of one thread beat one of two threads: they meet once a step, not once a layer.
    """
    if "WORLD_SIZE" not in os.environ:
        return 0, 1
    if not distributed.is_initialized():
        distributed.init_process_group("gloo")
    return distributed.get_rank(), distributed.get_world_size()


def share_gradients(parameters: list[nn.Parameter], ranks: int) -> None:
    """Replaces each gradient by its mean over the processes."""
    if ranks == 1:
        return
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    flat = torch.cat([gradient.flatten() for gradient in gradients])
    distributed.all_reduce(flat)
    for gradient, mean in zip(gradients, flat.split([one.numel() for one in gradients]), strict=True):
        gradient.copy_(mean.view_as(gradient) / ranks)


def learning_rate_at(step: int, recipe: Recipe) -> float:
    """Linear warm-up, then a cosine down to a hundredth."""
    if step < recipe.warmup:
        return recipe.learning_rate * (step + 1) / recipe.warmup
    progress = (step - recipe.warmup) / max(1, recipe.steps - recipe.warmup)
    return recipe.learning_rate * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * progress)))


@torch.no_grad()
def update_average(averaged: Weights, model: nn.Module, decay: float) -> None:
    for name, value in model.state_dict().items():
        if value.is_floating_point():
            averaged[name].lerp_(value, 1 - decay)
        else:
            averaged[name].copy_(value)


def save(
    checkpoint: Path, model: nn.Module, optimizer: torch.optim.Optimizer, averaged: Weights, step: int
) -> None:
    """Written beside and moved into place, so that a kill never leaves half a checkpoint."""
    state = {
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "averaged": averaged,
        "step": step,
    }
    checkpoint.parent.mkdir(parents=True, exist_ok=True)
    part = checkpoint.with_suffix(".part")
    torch.save(state, part)
    part.replace(checkpoint)


def averaged_weights(checkpoint: Path, prefix: str = "") -> Weights | None:
    """The averaged weights in a checkpoint, those under `prefix`; None where training has not begun."""
    if not checkpoint.exists():
        return None
    weights: Weights = torch.load(checkpoint, weights_only=True)["averaged"]
    return {name.removeprefix(prefix): value for name, value in weights.items() if name.startswith(prefix)}


def log(line: str) -> None:
    print(time.strftime("%H:%M:%S"), line, flush=True)
