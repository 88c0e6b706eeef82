"""The one front door: `Studio.generate(request)` yields events and ends with pictures."""

from __future__ import annotations

import errno
import secrets
import tempfile
import threading
import time
from collections import deque
from collections.abc import Generator, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, replace
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from backend import catalog, infotext
from backend.errors import Cancelled, InvalidRequest, OutOfMemory, StorageError
from backend.events import Event, Finished, Loading, Notice, Planned, Result, Step, Waiting
from backend.gallery import Gallery
from backend.manager import Manager, release
from backend.memory.hardware import Hardware, PeakMeter, anonymous_bytes
from backend.memory.plan import Plan, budget_bytes, make_plan
from backend.phases import Phase, PhaseCache, Pipeline, Progress
from backend.requests import MAX_SEED, Request, SD15Request
from backend.settings import Settings
from backend.weights.source import Source, resolve

if TYPE_CHECKING:
    import torch
    from PIL.Image import Image

PREVIEW_SECONDS = 0.3  # between previews: a few a second look alive and cost little
WAITING_SECONDS = 0.5


@dataclass(frozen=True, kw_only=True)
class CheckpointInfo:
    """What the page says of a checkpoint before it is loaded."""

    name: str
    title: str
    licence: str
    defaults: dict[str, Any]
    vocabulary: dict[str, list[str]]
    examples: list[str]


class Studio:
    """Makes pictures, one request at a time; a second waits for the first.

    Safe to share between threads. Nothing is loaded, probed or written before the first request.
    """

    def __init__(self, settings: Settings | None = None, hardware: Hardware | None = None) -> None:
        """`hardware` stands in for the machine's own when planning (tests)."""
        self.settings = settings or Settings()
        self.gallery = Gallery(self.settings.home)
        self._hardware = hardware
        self._manager = Manager()
        self._cache = PhaseCache()
        # no RLock: a closed generator may release it from another thread
        self._device_lock = threading.Lock()

    def run(self, request: Request, stop: threading.Event | None = None) -> Result:
        """Make the pictures. Raises what `generate` raises."""
        for event in self.generate(request, stop):
            if isinstance(event, Finished):
                return event.result
        raise AssertionError("generate ends with Finished or an error")

    def generate(self, request: Request, stop: threading.Event | None = None) -> Iterator[Event]:
        """Yield events until Finished. `stop`, once set, ends the work within a step.

        Raises InvalidRequest, CheckpointError, AccessError, StorageError, OutOfMemory or Cancelled; whatever
        it raises, the device is free for the next request. Until it ends or is closed it holds the device.
        """
        stop = stop or threading.Event()
        while not self._device_lock.acquire(timeout=WAITING_SECONDS):
            yield Waiting()
            _check(stop)
        try:
            yield from self._generate(request, stop)
        except (MemoryError, RuntimeError, OSError) as error:
            if not _is_shortage(error):
                raise
            raise OutOfMemory(
                "The device ran out of memory. A smaller picture or fewer images take less; "
                "so does closing other programs that use it."
            ) from None
        finally:
            self._device_lock.release()

    def plan(self, request: Request, hardware: Hardware | None = None) -> Plan:
        """How the request would run, on this machine or on `hardware`; loads and downloads nothing."""
        here = hardware or self._machine()
        return self._plan(self._pipeline(request, _seeds(request), here), here)

    def describe(self, family: str, checkpoint: str) -> CheckpointInfo:
        """What is known of a checkpoint without loading, downloading or torch."""
        entry = catalog.entry(family, checkpoint)
        source = self._source(checkpoint, family)
        extras = source.extras()
        room = _room(family, "defaults")
        return CheckpointInfo(
            name=checkpoint,
            title=entry.title if entry else source.name,
            licence=entry.licence if entry else "",
            defaults=room.defaults(source),
            vocabulary=extras.get("vocabulary", {}),
            examples=extras.get("examples", []),
        )

    def catalogue(self, family: str) -> list[str]:
        """The names of the checkpoints known by name."""
        return catalog.names(family)

    def warm(self, family: str = "sd15") -> None:
        """Load the built-in checkpoint and run a step, so that the first picture does not wait for it."""
        request = SD15Request(seed=0, steps=1)
        with self._device_lock:
            here = self._machine()
            compiled, _ = self._compiler(here)
            pipeline = self._pipeline(request, _seeds(request), here, compiled=compiled)
            deque(self._run_phases(pipeline, threading.Event(), {}, {}, []), maxlen=0)

    def unload(self) -> None:
        """Free every component and kept result; waits for the request that is running."""
        with self._device_lock:
            self._cache.clear()
            self._manager.clear()

    def _generate(self, request: Request, stop: threading.Event) -> Iterator[Event]:
        begin = time.perf_counter()
        _check(stop)
        here = self._machine()
        seeds = _seeds(request)
        compiled, refused = self._compiler(here)
        pipeline = self._pipeline(request, seeds, here, compiled=compiled)
        plan = self._plan(pipeline, here)
        yield from _announced(plan)
        self.gallery.check()
        loading = None
        for loading in self._fetch(request, pipeline):
            yield loading
            _check(stop)
        if loading is not None:  # its configs and sizes are the checkpoint's own now
            pipeline = self._pipeline(request, seeds, here, compiled=compiled)
            plan = self._plan(pipeline, here)
            yield from _announced(plan)
        lasting = [component for component in pipeline.components.values() if not component.passing]
        for_a_while = plan.peak_bytes - sum(component.bytes for component in lasting)
        self._manager.make_room(plan.budget_bytes - for_a_while, lasting)

        timings: dict[str, float] = {}
        results: dict[str, Any] = {}
        notices = [*refused, *pipeline.notices]
        yield from (Notice(text=text) for text in notices)
        baseline = anonymous_bytes() - self._manager.anonymous_bytes if here.device == "cpu" else 0
        with PeakMeter(here.device) as meter:
            yield from self._run_phases(pipeline, stop, results, timings, notices)
        pictures: list[Image] = results[pipeline.phases[-1].name]
        timings["total"] = time.perf_counter() - begin
        rounded = {name: round(seconds, 3) for name, seconds in timings.items()}
        files = self._save(pictures, pipeline, seeds, {"family": request.family, "timings": rounded}, notices)
        yield Finished(
            result=Result(
                images=pictures,
                files=files,
                seeds=list(seeds),
                plan=plan,
                timings=rounded,
                settings=pipeline.settings,
                peak_bytes=max(meter.peak - baseline, 0),
                notices=notices,
            )
        )

    def _run_phases(
        self,
        pipeline: Pipeline,
        stop: threading.Event,
        results: dict[str, Any],
        timings: dict[str, float],
        notices: list[str],
    ) -> Iterator[Event]:
        """Run each phase, or take its kept result; fills `results`, `timings` and `notices`."""
        for phase in pipeline.phases:
            begin = time.perf_counter()
            kept = self._cache.get(phase.key)
            results[phase.name] = kept if kept is not None else (
                yield from self._run_phase(phase, pipeline, stop, results, notices)
            )  # fmt: skip
            self._cache.put(phase.key, results[phase.name])
            if kept is None and any(pipeline.components[name].passing for name in phase.components):
                release()
            timings[phase.name] = time.perf_counter() - begin

    def _run_phase(
        self,
        phase: Phase,
        pipeline: Pipeline,
        stop: threading.Event,
        results: dict[str, Any],
        notices: list[str],
    ) -> Generator[Event, None, Any]:
        with ExitStack() as loans:
            parts = {}
            for name in phase.components:
                component = pipeline.components[name]
                fresh = not self._manager.holds(component)
                if fresh:
                    yield Loading(component=name, action="load", done_bytes=0, total_bytes=component.bytes)
                parts[name] = loans.enter_context(self._manager.use(component))
                if fresh:
                    size = component.bytes
                    yield Loading(component=name, action="load", done_bytes=size, total_bytes=size)
                _check(stop)
            begin, shown = time.perf_counter(), -PREVIEW_SECONDS
            work = phase.run(parts, results)
            while True:
                try:
                    report = next(work)
                except StopIteration as done:
                    return done.value
                if isinstance(report, Notice):
                    notices.append(report.text)
                    yield report
                    continue
                now = time.perf_counter() - begin
                drawn = report.preview is not None and now - shown >= PREVIEW_SECONDS
                if drawn:
                    shown = now
                yield _step(phase.name, report, now, drawn)
                _check(stop)

    def _machine(self) -> Hardware:
        """The hardware as it is now; what our components hold counts as free, since it is ours to use."""
        if self._hardware:
            return self._hardware
        here = Hardware.detect(self.settings.device)
        return replace(here, free_bytes=min(here.free_bytes + self._manager.bytes, here.total_bytes))

    def _source(self, checkpoint: str, family: str, config_from: str | None = None) -> Source:
        """Where the checkpoint comes from. In public mode nobody names paths or repositories of their own."""
        if self.settings.public and (checkpoint not in self.catalogue(family) or config_from):
            value = f"config_from is {config_from!r}" if config_from else f"checkpoint is {checkpoint!r}"
            names = ", ".join(self.catalogue(family))
            raise InvalidRequest(
                f"{value}; on this public server checkpoint can be {names}, and no config_from"
            )
        return resolve(checkpoint, family, self.settings, config_from)

    def _fetch(self, request: Request, pipeline: Pipeline) -> Iterator[Loading]:
        """Download what the pipeline lacks here; nothing for a local checkpoint."""
        source = self._source(request.checkpoint, request.family, request.config_from)
        for dtype in dict.fromkeys(component.dtype for component in pipeline.components.values()):
            names = [name for name, part in pipeline.components.items() if part.dtype == dtype]
            yield from source.fetch(names, dtype)

    def _pipeline(
        self, request: Request, seeds: tuple[int, ...], here: Hardware, *, compiled: bool = False
    ) -> Pipeline:
        import torch

        from backend.weights.parts import Parts

        if request.family not in catalog.FAMILIES:
            raise InvalidRequest(f"family is {request.family!r}; it can be {', '.join(catalog.FAMILIES)}")
        source = self._source(request.checkpoint, request.family, request.config_from)
        parts = Parts(source=source, device=torch.device(here.device), compiled=compiled)
        room, budget = _room(request.family, "pipeline"), budget_bytes(here, self.settings.vram)
        dtype = self._dtype(request, here)
        return room.pipeline(request, parts, seeds=seeds, dtype=dtype, budget_bytes=budget)

    def _compiler(self, here: Hardware) -> tuple[bool, list[str]]:
        """Whether networks are to be compiled, and what there is to say about it."""
        if not self.settings.compile:
            return False, []
        from backend.nn.compiled import no_compiler

        reason = no_compiler(here.device)
        refused = f"Nothing is compiled: this machine has no compiler that works ({reason})."
        return reason is None, [refused] if reason else []

    def _dtype(self, request: Request, here: Hardware) -> torch.dtype:
        """The request's precision over the settings'; "auto" is the fastest that the device computes in."""
        import torch

        name = request.dtype if request.dtype != "auto" else self.settings.dtype
        if name == "auto":
            # CPUs compute in bf16 or fp32 only
            on_cpu = ("bfloat16", "float32")
            wished = on_cpu if here.device == "cpu" else _room(request.family, "pipeline").AUTO_DTYPES
            name = next((name for name in wished if name != "bfloat16" or here.bf16), wished[-1])
        return getattr(torch, name)

    def _plan(self, pipeline: Pipeline, here: Hardware) -> Plan:
        return make_plan(
            {name: (part.bytes, part.precision) for name, part in pipeline.components.items()},
            [(phase.name, phase.components, phase.work_bytes) for phase in pipeline.phases],
            hardware=here,
            cap_gib=self.settings.vram,
            decisions=pipeline.decisions,
            passing=[name for name, part in pipeline.components.items() if part.passing],
        )

    def _save(
        self,
        pictures: list[Image],
        pipeline: Pipeline,
        seeds: tuple[int, ...],
        facts: dict[str, Any],
        notices: list[str],
    ) -> list[Path]:
        """Write every picture; where the home fails (a full disk), to a temporary folder rather than nowhere.

        Raises StorageError, which holds the pictures, where that fails too.
        """
        gallery, files = self.gallery, []
        for picture, seed in zip(pictures, seeds, strict=True):
            text = infotext.describe(pipeline.settings, seed)
            record = {**pipeline.settings, "seed": seed, **facts}
            try:
                files.append(gallery.save(picture, text, record))
            except StorageError as error:
                spare = Gallery(Path(tempfile.mkdtemp(prefix="triptych-")))
                notices.append(f"{error}. Until then pictures go to {spare.outputs}.")
                gallery = spare
                try:
                    files.append(gallery.save(picture, text, record))
                except StorageError:
                    raise StorageError(str(error), tuple(pictures)) from error
        return files


def _room(family: str, module: str) -> ModuleType:
    """A module of the family's room, imported at first use: some need torch, and the page must not wait."""
    return import_module(f"{catalog.FAMILIES[family].room}.{module}")


def _step(name: str, report: Progress, elapsed: float, drawn: bool) -> Step:
    left = elapsed / report.step * (report.steps - report.step)
    previews = report.preview() if drawn and report.preview else ()
    return Step(phase=name, step=report.step, steps=report.steps, eta_s=round(left, 2), previews=previews)


def _announced(plan: Plan) -> Iterator[Event]:
    yield Planned(plan=plan)
    if not plan.fits:
        raise OutOfMemory(plan.decisions[0])


def _is_shortage(error: Exception) -> bool:
    """CUDA has a class for it, mapping memory a number, torch's other allocators only a text."""
    import torch

    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    told = str(error).lower()
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or any(
        text in told for text in ("out of memory", "not enough memory", "can't allocate memory")
    )


def _check(stop: threading.Event) -> None:
    if stop.is_set():
        raise Cancelled("Stopped.")


def _seeds(request: Request) -> tuple[int, ...]:
    first = request.seed if request.seed >= 0 else secrets.randbelow(MAX_SEED + 1)
    return tuple((first + index) % (MAX_SEED + 1) for index in range(request.num_images))
