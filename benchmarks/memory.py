"""What a plan predicts against what is measured, family by family, on a device of several sizes.

A card is capped with `torch.cuda.set_per_process_memory_fraction`, so that what does not fit fails as it
would there; on a CPU the cap is the plan's budget of RAM, and anonymous memory is what is measured. Each
picture is painted in a process of its own, from random weights of the published size:

    python -m benchmarks --parts memory             make bench-gpu: the same on a GPU, with every size of card
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

GIB = 1024**3
CARDS = (2, 4, 6, 8, 10, 12, 16, 24)  # GiB
BUDGETS = (4, 8, 16, 24)  # GiB of RAM, where there is no card
PROMPT = "a red lighthouse on green hills at sunset"
SIDES = {"sd15": 512, "sd3": 1024, "stable_cascade": 1024}  # pixels
STEPS = {"sd15": ("steps",), "sd3": ("steps",), "stable_cascade": ("prior_steps", "decoder_steps")}


@dataclass(frozen=True, kw_only=True)
class Job:
    """`side` is the family; `cap` is in GiB, `offload` a setting of the Studio's."""

    side: str
    checkpoint: str
    device: str
    dtype: str
    cap: float
    size: int
    steps: int
    prefer: str = "auto"
    offload: str = "auto"


def jobs(folders: dict[str, Path], device: str, *, smoke: bool) -> Iterator[Job]:
    """Every family at every size; on a card, SD3's transformer resident and streamed besides, which tells
    what streaming costs."""
    steps = 1 if device == "cpu" or smoke else 8
    for family, folder in folders.items():
        size = 64 if smoke else SIDES[family]
        fields: dict[str, Any] = {"side": family, "checkpoint": str(folder), "device": device, "size": size}
        for cap in (BUDGETS if device == "cpu" else CARDS)[-1 if smoke else 0 :]:
            yield Job(**fields, dtype="auto", cap=cap, steps=steps)
        if family == "sd3" and device != "cpu":
            for cap, offload in ((24, "none"), (4, "auto")):
                yield Job(**fields, dtype="auto", cap=cap, steps=28, offload=offload)


def main() -> None:
    print(json.dumps(measure(Job(**json.loads(sys.argv[1])))))


def measure(job: Job) -> dict[str, Any]:
    """A picture: predicted and measured peaks, placements, steps down on the way, seconds a step."""
    from backend import Settings, Studio
    from backend.events import Finished, Planned
    from backend.requests import REQUESTS

    if job.device == "cuda":
        import torch

        total = torch.cuda.mem_get_info()[1]
        torch.cuda.set_per_process_memory_fraction(min(job.cap * GIB / total, 1.0))
    studio = Studio(
        Settings(
            device=job.device, dtype=job.dtype, vram=job.cap, offload=job.offload, t5="auto",
            home=Path(tempfile.mkdtemp()),
        )
    )  # fmt: skip
    steps: dict[str, Any] = dict.fromkeys(STEPS[job.side], job.steps)
    request = REQUESTS[job.side](
        checkpoint=job.checkpoint, prompt=PROMPT, seed=1, width=job.size, height=job.size, prefer=job.prefer,
        **steps,
    )  # fmt: skip
    plans = 0
    for event in studio.generate(request):
        plans += isinstance(event, Planned)
        if isinstance(event, Finished):
            result, plan = event.result, event.result.plan
            painting = next(phase for phase in ("denoise", "stage_c") if phase in result.timings)
            return {
                "cap_gib": job.cap,
                "offload": job.offload,
                "plan_bytes": plan.peak_bytes,
                "peak_bytes": result.peak_bytes,
                "plan_of_peak": round(plan.peak_bytes / max(result.peak_bytes, 1), 3),
                "stepped_down": plans - 1,
                "placements": {
                    part.name: f"{part.placement} {part.precision}" for part in plan.components.values()
                },
                "phases": {phase.name: phase.peak_bytes for phase in plan.phases},
                "painting_step_s": round(result.timings[painting] / job.steps, 3),
                "picture_s": result.timings["total"],
            }
    raise AssertionError("generate ends with Finished or an error")


if __name__ == "__main__":
    main()
