"""One side of a comparison, in a process of its own: `python -m benchmarks.side '{"side": "ours", ...}'`.

Prints its figures as one line of JSON. Both sides are timed by the same code, from the outside.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

PROMPT = "a red lighthouse on green hills at sunset"
FEW_PIXELS = 64  # a picture of this side touches every weight and computes next to nothing


@dataclass(frozen=True, kw_only=True)
class Job:
    side: str  # "ours", "reference" or "demo"
    checkpoint: str
    device: str
    dtype: str
    size: int
    steps: int


# size, steps, seed, called at each step → the seconds of it that went into loading
Paint = Callable[[int, int, int, Callable[[], None]], float]


def main() -> None:
    job = Job(**json.loads(sys.argv[1]))
    print(json.dumps(demo(job) if job.side == "demo" else compare(job)))


def compare(job: Job) -> dict[str, Any]:
    """Load, a first small picture, then the picture that counts. Seconds, and bytes above the start."""
    load = ours(job) if job.side == "ours" else reference(job)
    from backend.memory.hardware import PeakMeter, anonymous_bytes

    baseline = 0 if job.device == "cuda" else anonymous_bytes()
    with PeakMeter(job.device) as loading:
        begin = time.perf_counter()
        paint = load()
        load_s = time.perf_counter() - begin
        load_s += paint(FEW_PIXELS, 1, 0, lambda: None)
        ready_s = time.perf_counter() - begin

    marks: list[float] = []
    with PeakMeter(job.device) as painting:
        begin = time.perf_counter()
        paint(job.size, job.steps, 1, lambda: marks.append(time.perf_counter()))
        picture_s = time.perf_counter() - begin
    step_s = median(later - earlier for earlier, later in pairwise(marks))
    return {
        "load_s": load_s,
        "ready_s": ready_s,
        "picture_s": picture_s,
        "step_s": step_s,
        "around_steps_s": picture_s - step_s * forwards(job.steps),
        "load_peak_bytes": loading.peak - baseline,
        "picture_peak_bytes": painting.peak - baseline,
    }


def forwards(steps: int) -> int:
    """PNDM, the checkpoint's own sampler, runs its second step twice."""
    return steps + 1


def ours(job: Job) -> Callable[[], Paint]:
    """Import what is needed, so that no import is timed → the loading."""
    for module in ("clip.modeling_clip", "clip.tokenization_clip"):
        import_module(f"transformers.models.{module}")
    import_module("backend.sd15.pipeline")
    from backend import SD15Request, Settings, Studio
    from backend.events import Loading, Step

    def load() -> Paint:
        studio = Studio(Settings(device=job.device, dtype=job.dtype, home=Path(tempfile.mkdtemp())))

        def paint(size: int, steps: int, seed: int, at_step: Callable[[], None]) -> float:
            request = SD15Request(
                checkpoint=job.checkpoint, prompt=PROMPT + "!" * seed, seed=seed, width=size, height=size,
                steps=steps, guidance_scale=7.5,
            )  # fmt: skip
            loads: list[float] = []
            begun = 0.0
            for event in studio.generate(request):
                if isinstance(event, Step) and event.phase == "denoise":
                    at_step()
                elif isinstance(event, Loading) and not event.done_bytes:
                    begun = time.perf_counter()
                elif isinstance(event, Loading):
                    loads.append(time.perf_counter() - begun)
            return sum(loads)

        return paint

    return load


def reference(job: Job) -> Callable[[], Paint]:
    """Import what is needed, so that no import is timed → the loading."""
    import torch
    from diffusers import StableDiffusionPipeline

    def load() -> Paint:
        pipeline = StableDiffusionPipeline.from_pretrained(
            job.checkpoint, dtype=getattr(torch, job.dtype), local_files_only=True
        ).to(job.device)
        pipeline.set_progress_bar_config(disable=True)
        call: Any = pipeline  # its signature knows less than it takes

        def paint(size: int, steps: int, seed: int, at_step: Callable[[], None]) -> float:
            def mark(_pipeline: Any, _step: int, _timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
                at_step()
                return tensors

            call(
                PROMPT + "!" * seed, height=size, width=size, num_inference_steps=steps, guidance_scale=7.5,
                generator=torch.Generator().manual_seed(seed), callback_on_step_end=mark,
            )  # fmt: skip
            return 0.0

        return paint

    return load


def demo(job: Job) -> dict[str, Any]:
    """The built-in model, from a process that has imported no torch yet."""
    from backend import SD15Request, Settings, Studio

    studio = Studio(Settings(device=job.device, dtype=job.dtype, home=Path(tempfile.mkdtemp())))

    def timed(seed: int) -> float:
        begin = time.perf_counter()
        studio.run(SD15Request(prompt=PROMPT, seed=seed))
        return time.perf_counter() - begin

    fresh = timed(0)
    again = median(timed(seed) for seed in range(1, 6))
    studio.unload()
    return {"fresh_process_s": fresh, "loaded_s": again, "cold_manager_s": timed(9)}


if __name__ == "__main__":
    main()
