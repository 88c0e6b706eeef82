"""A LoRA on Stable Diffusion 1.5's UNet, one side in a process of its own: `python -m benchmarks.adapters
'{"side": "ours", ...}'`. It has the layers that the popular trainers choose, at rank 16.

Timed are a forward with guidance without it, with it beside the weights, and with it merged into them, in
turns, and what it takes to add it, to change its weight and to take it out again. The reference works with
peft. Prints its figures as a line of JSON.
"""

from __future__ import annotations

import gc
import json
import sys
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.cascade import timed

RANK = 16
ENDS = ("to_q", "to_k", "to_v", "to_out.0", "proj_in", "proj_out", "ff.net.0.proj", "ff.net.2")
ROUNDS = 6


@dataclass(frozen=True, kw_only=True)
class Job:
    side: str  # "ours" or "reference"
    checkpoint: str
    device: str
    dtype: str
    size: int
    rounds: int = ROUNDS


def main() -> None:
    job = Job(**json.loads(sys.argv[1]))
    print(json.dumps((ours if job.side == "ours" else reference)(job)))


@torch.no_grad()
def ours(job: Job) -> dict[str, float]:
    from backend.nn.lowrank import Merged, attached
    from backend.sd15.unet import UNet, UNetConfig
    from backend.settings import Settings
    from backend.weights.load import load_module
    from backend.weights.lora import Lora
    from backend.weights.parts import layout_of
    from backend.weights.source import resolve

    source = resolve(job.checkpoint, "sd15", Settings(offline=True))
    dtype, device = getattr(torch, job.dtype), torch.device(job.device)
    config = UNetConfig.from_dict(source.config("unet"))
    tensors = source.tensors("unet", job.dtype)
    unet = load_module(
        lambda: UNet(config), tensors, dtype=dtype, device=device, what="unet", layout=layout_of(dtype)
    )
    latents, timesteps, text = inputs(job, config.cross_attention_dim)
    latents = latents.to(memory_format=layout_of(dtype))

    def forward() -> Tensor:
        return unet(latents, timesteps, text)

    lora = Lora(lora_file(job, unet))
    places = lora.places("sd15", "unet", source.shapes("unet", job.dtype))

    @contextmanager
    def beside(weight: float) -> Generator[None]:
        with attached(unet, lora.terms(places, weight), device, dtype):
            yield

    merged = Merged(unet)

    @contextmanager
    def within(weight: float) -> Generator[None]:
        merged.set(lora.terms(places, weight))
        yield
        merged.undo()

    figures = alternate(job, forward, beside, within)
    figures["add_s"] = clocked(lambda: merged.set(lora.terms(places, 1.0)), job.device)
    figures["change_s"] = median(
        clocked(lambda w=w: merged.set(lora.terms(places, w)), job.device) for w in (0.2, 0.4, 0.6)
    )
    figures["merged_bytes"] = merged.bytes
    figures["remove_s"] = clocked(merged.undo, job.device)
    return figures


@torch.no_grad()
def reference(job: Job) -> dict[str, float]:
    import diffusers

    dtype = getattr(torch, job.dtype)
    unet: Any = diffusers.UNet2DConditionModel.from_pretrained(
        job.checkpoint, subfolder="unet", torch_dtype=dtype
    )
    unet = unet.to(job.device)
    latents, timesteps, text = inputs(job, unet.config.cross_attention_dim)
    file = lora_file(job, unet)

    def forward() -> Tensor:
        return unet(latents, timesteps, text).sample

    def add() -> None:
        from safetensors.torch import load_file

        unet.load_lora_adapter(load_file(file), adapter_name="a", prefix="unet")

    @contextmanager
    def beside(weight: float) -> Generator[None]:
        unet.set_adapters(["a"], [weight])
        unet.enable_lora()
        yield
        unet.disable_lora()

    @contextmanager
    def within(weight: float) -> Generator[None]:
        unet.enable_lora()
        unet.set_adapters(["a"], [weight])
        unet.fuse_lora()
        yield
        unet.unfuse_lora()
        unet.disable_lora()

    plain = min(timed(forward, job.device) for _ in range(2))  # before peft wraps the layers
    added = clocked(add, job.device)
    figures = alternate(job, forward, beside, within)
    figures |= {"untouched_s": plain, "add_s": added}
    unet.enable_lora()
    unet.fuse_lora()

    def change() -> None:
        unet.unfuse_lora()
        unet.set_adapters(["a"], [0.4])
        unet.fuse_lora()

    figures["change_s"] = clocked(change, job.device)
    figures["remove_s"] = clocked(unet.unfuse_lora, job.device)
    return figures


def alternate(
    job: Job, forward: Callable[[], Tensor], beside: Callable[[float], Any], within: Callable[[float], Any]
) -> dict[str, float]:
    """Medians of a forward each way, in turns, so that a busy machine spoils all alike."""
    seconds: dict[str, list[float]] = {"plain_s": [], "beside_s": [], "merged_s": []}
    timed(forward, job.device)
    for _ in range(job.rounds):
        seconds["plain_s"].append(timed(forward, job.device))
        with beside(0.8):
            seconds["beside_s"].append(timed(forward, job.device))
        with within(0.8):
            timed(forward, job.device)  # the first run reads the new weights into the caches
            seconds["merged_s"].append(timed(forward, job.device))
        timed(forward, job.device)
        gc.collect()
    return {
        **{name: median(each) for name, each in seconds.items()},
        "beside_ratio": median(b / p for b, p in zip(seconds["beside_s"], seconds["plain_s"], strict=True)),
        "merged_ratio": median(m / p for m, p in zip(seconds["merged_s"], seconds["plain_s"], strict=True)),
    }


def inputs(job: Job, width: int) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    dtype, side = getattr(torch, job.dtype), job.size // 8
    latents, text = torch.randn(2, 4, side, side), torch.randn(2, 77, width)
    return (
        latents.to(job.device, dtype),
        torch.full((2,), 500, device=job.device),
        text.to(job.device, dtype),
    )


def lora_file(job: Job, unet: nn.Module) -> Path:
    """A random LoRA for the checkpoint, made once."""
    from backend.nn.lowrank import Term
    from backend.weights.lora import save_lora

    path = Path(job.checkpoint).with_suffix(f".lora-{RANK}.safetensors")
    if not path.exists():
        torch.manual_seed(1)
        layers: dict[str, Term] = {}
        for name, weight in unet.named_parameters():
            layer = name.removesuffix(".weight")
            if layer.endswith(ENDS) and weight.ndim >= 2 and "attentions" in name:
                rows, *inner = weight.shape
                layers[layer] = Term(torch.randn(RANK, *inner) * 0.01, torch.randn(rows, RANK) * 0.01)
        save_lora(path, {"unet": layers}, family="sd15", base="random", alpha=RANK)
    return path


def clocked(work: Callable[[], object], device: str) -> float:
    begin = time.perf_counter()
    work()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - begin


if __name__ == "__main__":
    main()
