"""Measure everything and keep it: `python -m benchmarks [--smoke]`.

Each side runs in a process of its own, in alternating order: the file cache cold in odd rounds, warm in even
ones. Figures are medians over the rounds; ratios are the reference's over ours, so more is better.
"""

from __future__ import annotations

import argparse
import itertools
import json
import re
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks import adapters, app, cascade, changes, machine, memory, sd3
from benchmarks.side import FEW_PIXELS, Job, forwards

HERE = Path(__file__).parent
PUBLISHED_STEPS = 50
Run = dict[str, Any]


def main(arguments: Sequence[str] | None = None) -> None:
    options = parse(arguments)
    here = machine.describe(options.device)
    device = here["device"]
    print(f"{here['processor']}, {here['cores']} cores, {here['accelerator'] or 'no GPU'}", flush=True)

    runs: list[Run] = []
    half = "bfloat16" if device == "cpu" else "float16"
    if "picture" in options.parts:
        folder = checkpoint(options)
        sides = [("ours", "auto"), ("reference", "float32"), ("reference", half)]
        for number in range(options.rounds):
            cache = ("cold", "warm")[number % 2]
            for side, dtype in sides if number % 2 == 0 else reversed(sides):
                (machine.cool if cache == "cold" else machine.warm)(folder)
                job = Job(
                    side=side, checkpoint=str(folder), device=device, dtype=dtype,
                    size=options.size, steps=options.steps,
                )  # fmt: skip
                runs.append(run(job, cache=cache))
    if "load" in options.parts:
        folder = checkpoint(options)
        for number, dtype in itertools.product(range(2 * options.rounds), ("float32", half)):
            cache = ("warm", "cold")[number % 2]
            for side in ("ours", "reference") if number // 2 % 2 else ("reference", "ours"):
                (machine.cool if cache == "cold" else machine.warm)(folder)
                job = Job(
                    side=side, checkpoint=str(folder), device=device, dtype=dtype, size=FEW_PIXELS, steps=2
                )
                figures = run(job, cache=cache)
                kept_keys = ("dtype", "cache", "load_s", "ready_s", "load_peak_bytes")
                runs.append({"side": f"load, {side}", **{key: figures[key] for key in kept_keys}})
    if "changes" in options.parts and device == "cpu":
        for variant in changes.variants(options.size):
            runs.append(changes.measure(variant))
            print(shown(runs[-1]), flush=True)
    if {"cascade", "redecode"} & set(options.parts):
        runs += stable_cascade(options, device, half)
    if {"sd3", "t5"} & set(options.parts):
        runs += stable_diffusion_3(options, device, half)
    if "memory" in options.parts:
        folders = {
            "sd15": checkpoint(options),
            "sd3": checkpoint(options, "sd3", half),
            "stable_cascade": checkpoint(options, "cascade", half),
        }
        for job in memory.jobs(folders, device, smoke=options.smoke):
            made = run(job)
            runs.append({**made, "side": f"memory, {job.side} {job.cap:g} GiB {job.offload}"})
    if "adapters" in options.parts:
        folder = checkpoint(options)
        machine.warm(folder)
        for number, dtype in itertools.product(range(options.rounds), ("float32", half)):
            for side in ("ours", "reference")[:: 1 if number % 2 == 0 else -1]:
                lora = adapters.Job(
                    side=side, checkpoint=str(folder), device=device, dtype=dtype, size=options.size
                )
                runs.append({**run(lora), "side": f"lora, {side}"})
    if "demo" in options.parts:
        job = Job(side="demo", checkpoint="demo", device=device, dtype="auto", size=0, steps=0)
        runs += [run(job) for _ in range(options.rounds)]
    if "app" in options.parts:
        for _ in range(options.rounds):
            runs.append({"side": "app", **app.measure(device)})
            print(shown(runs[-1]), flush=True)

    results = {
        "made": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": here,
        "options": {
            name: str(value) for name, value in vars(options).items() if name not in ("cache", "out")
        },
        "summary": summary(runs),
        "runs": runs,
    }
    print(json.dumps(results["summary"], indent=2))
    print(f"kept in {keep(results, options)}")


def stable_cascade(options: argparse.Namespace, device: str, half: str) -> list[Run]:
    """Every stage against the reference's in the published precision, then whole pictures of ours."""
    folder = checkpoint(options, "cascade", half)
    machine.warm(folder)
    size = 128 if options.smoke else 1024
    made: list[Run] = []
    for number in range(options.rounds if "cascade" in options.parts else 0):
        for side in ("ours", "reference")[:: 1 if number % 2 == 0 else -1]:
            job = cascade.Job(side=side, checkpoint=str(folder), device=device, dtype=half, size=size)
            made.append(run(job))
    if "redecode" in options.parts:
        few = {"prior_steps": 2, "decoder_steps": 1} if options.smoke else {}
        job = cascade.Job(side="studio", checkpoint=str(folder), device=device, dtype=half, size=size, **few)
        made.append(run(job))
    return [{**one, "side": f"cascade, {one['side']}"} for one in made]


def stable_diffusion_3(options: argparse.Namespace, device: str, half: str) -> list[Run]:
    """A step and a decode of ours, as it is and compiled, against the reference's; then whole pictures of
    ours with T5 at each price."""
    folder = checkpoint(options, "sd3", half)
    machine.warm(folder / "transformer")
    size = 128 if options.smoke else 1024
    made: list[Run] = []
    for number in range(options.rounds if "sd3" in options.parts else 0):
        sides = ("ours", "reference", "compiled")[:: 1 if number % 2 == 0 else -1]
        made += [
            run(sd3.Job(side=side, checkpoint=str(folder), device=device, dtype=half, size=size))
            for side in sides
        ]
    for price in ("full", "int8", "nf4", "off") if "t5" in options.parts else ():
        job = sd3.Job(side="studio", checkpoint=str(folder), device=device, dtype=half, size=size, t5=price)
        made.append({**run(job), "side": f"t5 {price}"})
    return [{**one, "side": f"sd3, {one['side']}"} for one in made]


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks", formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=10, help="steps of the measured picture, 2 or more")
    parser.add_argument("--rounds", type=int, default=2, help="times that each side runs")
    parser.add_argument("--size", type=int, default=512, help="width and height in pixels")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")
    parser.add_argument("--weights", default="float32", help="precision of the checkpoint's files")
    parser.add_argument(
        "--parts",
        default="picture,load,changes,cascade,redecode,sd3,t5,memory,adapters,demo,app",
        help="which of these to measure",
    )
    parser.add_argument("--cache", type=Path, default=HERE / ".cache", help="where the checkpoint is made")
    parser.add_argument("--out", type=Path, default=HERE / "results", help="where the figures are kept")
    parser.add_argument("--smoke", action="store_true", help="a tiny checkpoint: does it run at all?")
    options = parser.parse_args(arguments)
    if options.smoke:
        options.size, options.steps = 64, min(options.steps, 3)
    if options.steps < 2 or options.rounds < 1:
        parser.error("--steps can be 2 or more, --rounds 1 or more")
    options.parts = options.parts.split(",")
    return options


def checkpoint(options: argparse.Namespace, family: str = "sd15", weights: str | None = None) -> Path:
    """Made in a process of its own: the memory that it takes would slow what is measured after it."""
    size, precision = "tiny" if options.smoke else "full", weights or str(options.weights)
    folder = options.cache / f"{family}-{size}-{precision}"
    print(f"checkpoint in {folder}", flush=True)
    maker = "benchmarks.checkpoint" if family == "sd15" else f"benchmarks.{family}_checkpoint"
    command = [sys.executable, "-m", maker, str(folder), size, precision]
    subprocess.run(command, check=True, cwd=HERE.parent)
    return folder


def run(job: Job | cascade.Job | sd3.Job | memory.Job | adapters.Job, **facts: str) -> Run:
    command = [sys.executable, "-m", type(job).__module__, json.dumps(asdict(job))]
    done = subprocess.run(command, capture_output=True, text=True, cwd=HERE.parent, check=False)
    if done.returncode:
        raise SystemExit(f"{job} failed:\n{done.stderr}")
    figures = json.loads(done.stdout.splitlines()[-1])
    result = {"side": job.side, "dtype": job.dtype, **facts, **figures}
    print(shown(result), flush=True)
    return result


def shown(result: Run) -> str:
    """One run on one line."""
    parts = []
    for name, value in result.items():
        if name.endswith("_bytes"):
            parts.append(f"{name.removesuffix('_bytes')} {value / 2**30:.2f} GiB")
        else:
            parts.append(f"{name.removesuffix('_s')} {value:.3f}" if isinstance(value, float) else str(value))
    return " · ".join(parts)


def summary(runs: Iterable[Run]) -> dict[str, dict[str, dict[str, float]]]:
    """Medians per side, and how many times as good as each reference ours is."""
    by_side: dict[str, list[Run]] = {}
    for one in runs:
        by_side.setdefault(f"{one['side']} {one.get('dtype', '')}".strip(), []).append(one)
    sides = {name: _figures(own) for name, own in by_side.items()}
    ratios = {
        f"{name} / ours": {
            key: round(value / best[key], 3) for key, value in figures.items() if best.get(key)
        }
        for name, figures in sides.items()
        # a picture against what ours does by default, a load against ours at the same precision
        if "reference" in name
        and (
            best := sides.get(
                "ours auto" if name.startswith("reference") else name.replace("reference", "ours")
            )
        )
    }
    return {"sides": sides, "ratios": ratios}


def _figures(runs: list[Run]) -> dict[str, float]:
    """The medians of one side's runs; loading apart by the state of the file cache."""
    samples: dict[str, list[float]] = {}
    for one in runs:
        for key, value in one.items():
            if isinstance(value, int | float):
                cached = "cache" in one and key in ("load_s", "ready_s")
                samples.setdefault(f"{key}_{one['cache']}" if cached else key, []).append(value)
    figures = {key: median(values) for key, values in samples.items()}
    if "around_steps_s" in figures:
        # a picture at the published number of steps, from the parts measured
        whole = figures["around_steps_s"] + forwards(PUBLISHED_STEPS) * figures["step_s"]
        figures[f"picture_{PUBLISHED_STEPS}_steps_s"] = whole
    return {key: round(value, 4) for key, value in figures.items()}


def keep(results: dict[str, Any], options: argparse.Namespace) -> Path:
    here = results["machine"]
    name = f"{here['accelerator'] or here['processor']} {here['cores']} cores {time.strftime('%Y%m%d %H%M')}"
    name += " smoke" * options.smoke
    path = options.out / (re.sub(r"\W+", "-", name.lower()).strip("-") + ".json")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    return path


if __name__ == "__main__":
    main()
