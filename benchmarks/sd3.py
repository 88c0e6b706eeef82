"""Stable Diffusion 3, one side in a process of its own: `python -m benchmarks.sd3 '{"side": "ours", ...}'`.

"ours", "compiled" and "reference" time a step with guidance and a decode on the same inputs; "studio" paints
a whole picture with T5 at one price, then another of the same prompt. Prints its figures as a line of JSON.
"""

from __future__ import annotations

import gc
import json
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.cascade import timed
from benchmarks.side import PROMPT

TOKENS, REPEATS = 77 + 256, 1
NETWORKS = ("transformer", "vae")


@dataclass(frozen=True, kw_only=True)
class Job:
    side: str  # "ours", "compiled", "reference" or "studio"
    checkpoint: str
    device: str
    dtype: str
    size: int
    t5: str = "full"
    steps: int = 1


Forward = Callable[[], Any]
Network = tuple[str, Callable[[], Forward]]  # what it is called, and what loads it


def main() -> None:
    job = Job(**json.loads(sys.argv[1]))
    print(json.dumps(studio(job) if job.side == "studio" else networks(job)))


@torch.no_grad()
def networks(job: Job) -> dict[str, float]:
    """Seconds to load each network, of its first run, and of the best of the next: the transformer with
    guidance, the decoder on one picture."""
    figures: dict[str, float] = {}
    for name, load in (reference if job.side == "reference" else ours)(job):
        begin = time.perf_counter()
        forward = load()
        figures[f"{name}_load_s"] = time.perf_counter() - begin
        # the first reads the mapped weights, settles the allocator, and compiles
        figures[f"{name}_first_s"] = timed(forward, job.device)
        figures[f"{name}_s"] = min(timed(forward, job.device) for _ in range(REPEATS))
        del forward
        gc.collect()
    return figures


@dataclass(frozen=True)
class Inputs:
    """What both sides are given, the same numbers."""

    latents: torch.Tensor
    text: torch.Tensor
    pooled: torch.Tensor
    timesteps: torch.Tensor

    @classmethod
    def make(cls, job: Job) -> Inputs:
        config = json.loads((Path(job.checkpoint) / "transformer" / "config.json").read_text())
        side, dtype = job.size // 8, getattr(torch, job.dtype)
        torch.manual_seed(0)
        shapes = (
            (2, config["in_channels"], side, side),
            (2, TOKENS, config["joint_attention_dim"]),
            (2, config["pooled_projection_dim"]),
        )
        latents, text, pooled = (torch.randn(shape).to(job.device, dtype) for shape in shapes)
        return cls(latents, text, pooled, torch.full((2,), 500.0, device=job.device))

    def latent(self) -> torch.Tensor:
        return self.latents[:1].contiguous(memory_format=torch.channels_last)


def ours(job: Job) -> Iterator[Network]:
    from backend import SD3Request, Settings
    from backend.sd3.pipeline import pipeline
    from backend.weights.parts import Parts
    from backend.weights.source import resolve

    source = resolve(job.checkpoint, "sd3", Settings())
    parts = Parts(source=source, device=torch.device(job.device), compiled=job.side == "compiled")
    request = SD3Request(checkpoint=job.checkpoint, width=job.size, height=job.size, t5="off")
    dtype = getattr(torch, job.dtype)
    components = pipeline(request, parts, seeds=(0,), dtype=dtype, t5="off").components
    given = Inputs.make(job)

    def transformer() -> Forward:
        network = components["transformer"].load(job.device)
        return lambda: network(given.latents, given.timesteps, given.text, given.pooled)

    def vae() -> Forward:
        network = components["vae"].load(job.device)
        return lambda: network.decode(given.latent())

    yield from zip(NETWORKS, (transformer, vae), strict=True)


def reference(job: Job) -> Iterator[Network]:
    from diffusers import AutoencoderKL, SD3Transformer2DModel

    given = Inputs.make(job)

    def loaded(kind: Any, name: str) -> Any:
        network = kind.from_pretrained(
            job.checkpoint, subfolder=name, torch_dtype=getattr(torch, job.dtype), local_files_only=True
        )
        return network.to(job.device).eval()

    def transformer() -> Forward:
        network = loaded(SD3Transformer2DModel, "transformer")
        return lambda: network(given.latents, given.text, given.pooled, given.timesteps)

    def vae() -> Forward:
        network = loaded(AutoencoderKL, "vae")
        return lambda: network.decode(given.latents[:1])

    yield from zip(NETWORKS, (transformer, vae), strict=True)


def studio(job: Job) -> dict[str, Any]:
    """A picture from nothing, and another of the same prompt: seconds by phase, what the second loaded, and
    the peak of memory above the start."""
    from backend import SD3Request, Settings, Studio
    from backend.events import Finished, Loading

    ours = Studio(Settings(device=job.device, dtype=job.dtype, home=Path(tempfile.mkdtemp())))

    def paint(seed: int) -> tuple[Any, list[str]]:
        request = SD3Request(
            checkpoint=job.checkpoint, prompt=PROMPT, seed=seed, t5=job.t5, steps=job.steps,
            width=job.size, height=job.size,
        )  # fmt: skip
        loaded: dict[str, None] = {}
        for event in ours.generate(request):
            if isinstance(event, Loading):
                loaded[event.component] = None
            if isinstance(event, Finished):
                return event.result, list(loaded)
        raise AssertionError("generate ends with Finished or an error")

    first, _ = paint(1)
    again, loaded = paint(2)
    if loaded:
        raise SystemExit(f"the second picture of the same prompt loaded {', '.join(loaded)}")
    return {
        "first_s": first.timings["total"],
        "again_s": again.timings["total"],
        **{f"{phase}_s": seconds for phase, seconds in first.timings.items() if phase != "total"},
        "peak_bytes": max(first.peak_bytes, again.peak_bytes),
        "plan_bytes": first.plan.peak_bytes,
        "t5_bytes": sum(
            part.bytes
            for phase in first.plan.phases
            for part in phase.components
            if part.name == "text_encoder_3"
        ),
    }


if __name__ == "__main__":
    main()
