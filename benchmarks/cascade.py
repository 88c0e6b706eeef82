"""Stable Cascade, one side in a process of its own: `python -m benchmarks.cascade '{"side": "ours", ...}'`.

"ours" and "reference" time one forward of every stage on the same inputs; "studio" paints a whole picture,
then decodes it again with other settings. Prints its figures as one line of JSON.
"""

from __future__ import annotations

import gc
import json
import math
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from backend.cascade.pipeline import C_COMPRESSION
from benchmarks.side import PROMPT

TOKENS, REPEATS = 77, 2


@dataclass(frozen=True, kw_only=True)
class Job:
    side: str  # "ours", "reference" or "studio"
    checkpoint: str
    device: str
    dtype: str
    size: int
    prior_steps: int = 20
    decoder_steps: int = 10


Forward = Callable[[], Any]
Stage = tuple[str, Callable[[], Forward]]  # what it is called, and what loads it


def main() -> None:
    job = Job(**json.loads(sys.argv[1]))
    print(json.dumps(studio(job) if job.side == "studio" else stages(job)))


@torch.no_grad()
def stages(job: Job) -> dict[str, float]:
    """Seconds to load each stage and to run it once: C with guidance, B and A without. Medians, best kept."""
    figures: dict[str, float] = {}
    for name, load in (ours if job.side == "ours" else reference)(job):
        begin = time.perf_counter()
        forward = load()
        figures[f"{name}_load_s"] = time.perf_counter() - begin
        forward()  # reads the mapped weights and settles the allocator
        figures[f"{name}_s"] = min(timed(forward, job.device) for _ in range(REPEATS))
        del forward
        gc.collect()
    return figures


def timed(forward: Forward, device: str) -> float:
    begin = time.perf_counter()
    forward()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - begin


@dataclass(frozen=True)
class Inputs:
    """What both sides are given, the same numbers."""

    c: torch.Tensor
    b: torch.Tensor
    pooled: torch.Tensor
    text: torch.Tensor
    images: torch.Tensor
    effnet: torch.Tensor

    @classmethod
    def make(cls, job: Job, prior: Any, decoder: Any) -> Inputs:
        """For the published widths of `prior` and `decoder` configs, at the job's size."""
        torch.manual_seed(0)
        side, quarter = math.ceil(job.size / C_COMPRESSION), job.size // 4
        c = (2, prior["in_channels"], side, side)
        return cls(
            *(
                torch.randn(shape).to(job.device, getattr(torch, job.dtype))
                for shape in (
                    c,
                    (1, decoder["in_channels"], quarter, quarter),
                    (2, prior["clip_text_pooled_in_channels"]),
                    (2, TOKENS, prior["clip_text_in_channels"]),
                    (2, 1, prior["clip_image_in_channels"]),
                    (1, *c[1:]),
                )
            )
        )


def configs(job: Job) -> tuple[dict[str, Any], dict[str, Any]]:
    folder = Path(job.checkpoint)
    prior = json.loads((folder / "stable-cascade-prior" / "prior" / "config.json").read_text())
    return prior, json.loads((folder / "stable-cascade" / "decoder" / "config.json").read_text())


def ours(job: Job) -> Iterator[Stage]:
    from backend import Settings, StableCascadeRequest
    from backend.cascade.pipeline import pipeline
    from backend.weights.parts import Parts
    from backend.weights.source import resolve

    dtype, device = getattr(torch, job.dtype), torch.device(job.device)
    made = Parts(source=resolve(job.checkpoint, "stable_cascade", Settings()), device=device)
    request = StableCascadeRequest(checkpoint=job.checkpoint, width=job.size, height=job.size)
    full = {"stage_c": "full", "stage_b": "full"}
    parts = pipeline(request, made, seeds=(0,), dtype=dtype, stages=full).components
    given = Inputs.make(job, *configs(job))
    ratio, quarter = torch.full((2,), 0.5, device=device), job.size // 4

    def load_c() -> Forward:
        unet = parts["prior"].load(job.device)
        conditioning = unet.condition(given.pooled, given.text, given.images)
        return lambda: unet(given.c, ratio, conditioning)

    def load_b() -> Forward:
        unet = parts["decoder"].load(job.device)
        conditioning = unet.condition(given.pooled[:1], effnet=given.effnet, size=(quarter, quarter))
        return lambda: unet(given.b, ratio[:1], conditioning)

    def load_a() -> Forward:
        stage_a = parts["vqgan"].load(job.device)
        return lambda: stage_a.decode(given.b)

    yield from (("stage_c", load_c), ("stage_b", load_b), ("stage_a", load_a))


def reference(job: Job) -> Iterator[Stage]:
    from diffusers.models.unets.unet_stable_cascade import StableCascadeUNet
    from diffusers.pipelines.deprecated.wuerstchen import PaellaVQModel

    dtype, folder = getattr(torch, job.dtype), Path(job.checkpoint)
    given = Inputs.make(job, *configs(job))
    ratio = torch.full((2,), 0.5, device=job.device).to(dtype)

    def loaded(kind: Any, half: str, name: str) -> Any:
        return kind.from_pretrained(folder / half, subfolder=name, torch_dtype=dtype).to(job.device)

    def load_c() -> Forward:
        unet = loaded(StableCascadeUNet, "stable-cascade-prior", "prior")
        return lambda: unet(given.c, ratio, given.pooled[:, None], given.text, given.images)

    def load_b() -> Forward:
        unet = loaded(StableCascadeUNet, "stable-cascade", "decoder")
        return lambda: unet(given.b, ratio[:1], given.pooled[:1, None], effnet=given.effnet)

    def load_a() -> Forward:
        vqgan = loaded(PaellaVQModel, "stable-cascade", "vqgan")
        return lambda: vqgan.decode(given.b)

    yield from (("stage_c", load_c), ("stage_b", load_b), ("stage_a", load_a))


def studio(job: Job) -> dict[str, float]:
    """A picture from nothing, the same again with one decoder step fewer, and what memory they took."""
    from backend import Settings, StableCascadeRequest, Studio

    ours = Studio(Settings(device=job.device, dtype=job.dtype, home=Path(tempfile.mkdtemp())))

    def paint(decoder_steps: int) -> Any:
        request = StableCascadeRequest(
            checkpoint=job.checkpoint, prompt=PROMPT, seed=1, width=job.size, height=job.size,
            prior_steps=job.prior_steps, decoder_steps=decoder_steps,
        )  # fmt: skip
        return ours.run(request)

    # the second run must not find Stage B's result, so it is given the steps that are to be compared
    first, again = paint(job.decoder_steps + 1), paint(job.decoder_steps)
    spare = first.timings["stage_b"] / (job.decoder_steps + 1)
    return {
        "first_s": first.timings["total"] - spare,
        "again_s": again.timings["total"],
        **{f"{phase}_s": seconds for phase, seconds in first.timings.items() if phase != "total"},
        "peak_bytes": max(first.peak_bytes, again.peak_bytes),
        "plan_bytes": first.plan.peak_bytes,
        "weights_bytes": sum(
            {part.name: part.bytes for phase in first.plan.phases for part in phase.components}.values()
        ),
    }


if __name__ == "__main__":
    main()
