"""The one front door: `Studio.generate(request)` yields events and ends with pictures."""

from __future__ import annotations

import errno
import secrets
import tempfile
import threading
import time
from collections import deque
from collections.abc import Generator, Hashable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import cache, partial
from importlib import import_module
from itertools import islice
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from backend import adapting, catalog, infotext, public
from backend.errors import Cancelled, InvalidRequest, OutOfMemory, StorageError
from backend.events import Event, Finished, Loading, Notice, Planned, Result, Step, Waiting
from backend.gallery import Gallery
from backend.manager import LoadedPart, Manager, release
from backend.memory.hardware import Hardware, PeakMeter, anonymous_bytes, current_bytes
from backend.memory.plan import (
    FIRST_TIME_BYTES,
    WHOLE,
    Plan,
    PlannedPhase,
    Wishes,
    budget_bytes,
    lessons_of,
    make_plan,
    phase_title,
)
from backend.phases import NotFinite, Phase, PhaseCache, Pipeline, Progress
from backend.requests import MAX_SEED, REQUESTS, Request, SD3Request
from backend.settings import Settings
from backend.weights import local
from backend.weights.source import Source, resolve

if TYPE_CHECKING:
    import torch
    from PIL.Image import Image

PREVIEW_SECONDS = 0.3  # between previews: a few a second look alive and cost little
WAITING_SECONDS = 0.5
TRUSTED = 2.0  # a formula may be wrong by so much; a larger shortage is told of requests of that size only
RETRIES = 4  # of a request whose phases fail for want of memory, each with a leaner plan
WARM = {  # the steps of each family's sampling
    "sd15": ("steps",),
    "sd3": ("steps",),
    "stable_cascade": ("prior_steps", "decoder_steps"),
}


@dataclass(frozen=True, kw_only=True)
class CheckpointInfo:
    """What the page says of a checkpoint before it is loaded."""

    name: str
    title: str
    licence: str
    defaults: dict[str, Any]
    vocabulary: dict[str, list[str]]
    examples: list[str]


@dataclass
class _Run:
    """What a running request has come to; `baseline` is the process's memory without it, on a CPU."""

    stop: threading.Event
    device: str
    baseline: int = 0
    results: dict[str, Any] = field(default_factory=dict)
    timings: dict[str, float] = field(default_factory=dict)
    notices: list[str] = field(default_factory=list)

    def say(self, *texts: str) -> Iterator[Event]:
        for text in texts:
            self.notices.append(text)
            yield Notice(text=text)

    def memory_bytes(self) -> int:
        return max(current_bytes(self.device) - self.baseline, 0)


@dataclass(frozen=True)
class _Failure:
    """A phase without a result: for want of memory, or because a `component` gave no numbers."""

    phase: Phase
    component: str | None = None
    what: str = ""


class Studio:
    """Makes pictures, one request at a time; a second waits for the first.

    Safe to share between threads. Nothing is loaded, probed or written before the first request.
    """

    def __init__(self, settings: Settings | None = None, hardware: Hardware | None = None) -> None:
        """`hardware` stands in for the machine's own when planning (tests)."""
        self.settings = settings or Settings()
        self.gallery = Gallery(self.settings.home)
        self._hardware = hardware
        self._manager = Manager(stands_in=hardware.stand_in if hardware else None)
        self._cache = PhaseCache()
        self._lessons: dict[Hashable, float] = {}  # phases whose work is larger than its formula says
        self._wider: dict[
            tuple[str, str, str], str
        ] = {}  # dtypes of what overflowed: family, checkpoint, part
        # no RLock: a closed generator may release it from another thread
        self._device_lock = threading.Lock()

    def run(self, request: Request, stop: threading.Event | None = None) -> Result:
        """Make the pictures. Raises what `generate` raises."""
        for event in self.generate(request, stop):
            if isinstance(event, Finished):
                return event.result
        raise AssertionError("generate ends with Finished or an error")

    def generate(
        self, request: Request, stop: threading.Event | None = None, owner: str = ""
    ) -> Iterator[Event]:
        """Yield events until Finished. `stop`, once set, ends the work within a step; `owner` is whose the
        pictures are, for the index.

        Raises InvalidRequest, CheckpointError, AccessError, StorageError, OutOfMemory or Cancelled; whatever
        it raises, the device is free for the next request. Until it ends or is closed it holds the device.
        """
        stop = stop or threading.Event()
        while not self._device_lock.acquire(timeout=WAITING_SECONDS):
            yield Waiting()
            _check(stop)
        try:
            yield from self._generate(request, stop, owner)
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
        self._admit(request)
        return self._planned(request, _seeds(request), hardware or self._machine())[0]

    def hardware(self) -> Hardware:
        """The machine as it is now; what our components hold counts as free, since it is ours to use."""
        return self._machine()

    def budget_bytes(self) -> int:
        """What a plan may use of the device now."""
        return budget_bytes(self._machine(), self.settings.vram)

    def loaded(self) -> list[LoadedPart]:
        """The components in memory, and where they are."""
        return self._manager.parts()

    def free(self, key: str | None = None) -> bool:
        """Let go of the component that `loaded` lists under a key, or of all; not of what is being used."""
        return self._manager.free(key)

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

    def warm(self, family: str = "sd15", *, run: bool = True) -> None:
        """Load the built-in checkpoint, so that the first picture does not wait for it; and `run` a step."""
        once: dict[str, Any] = dict.fromkeys(WARM[family], 1)
        request = REQUESTS[family](seed=0, **once)
        with self._device_lock:
            here = self._machine()
            compiled, _ = self._compiler(here)
            plan, pipeline = self._planned(request, _seeds(request), here, compiled=compiled)
            if not plan.fits:
                return
            if run:
                steps = _Run(threading.Event(), here.stand_in or here.device)
                deque(self._run_phases(plan, pipeline, steps), maxlen=0)
                return
            for name, part in plan.components.items():
                with self._manager.use(pipeline.components[name], part):
                    pass

    def fetch(self, request: Request) -> Iterator[Loading]:
        """Download what the request's checkpoint lacks here, and no more. Raises as `generate` does."""
        _, pipeline = self._planned(request, _seeds(request), self._machine())
        yield from self._fetch(request, pipeline)

    def needs(self, request: Request) -> dict[str, list[str]]:
        """The components that the request runs with when all memory is free, by the dtype that suits them."""
        here = self._machine()
        idle = replace(here, free_bytes=here.total_bytes, ram_free_bytes=here.ram_bytes)
        return _by_dtype(self._planned(request, _seeds(request), idle)[1])

    def unload(self) -> None:
        """Free every component and kept result; waits for the request that is running."""
        with self._device_lock:
            self._cache.clear()
            self._lessons.clear()
            self._manager.free()

    def _generate(self, request: Request, stop: threading.Event, owner: str) -> Iterator[Event]:
        begin = time.perf_counter()
        _check(stop)
        self._admit(request)
        here = self._machine()
        self._check_attention(here)
        seeds = _seeds(request)
        compiled, refused = self._compiler(here)
        plan, pipeline = self._planned(request, seeds, here, compiled=compiled)
        yield from self._announced(plan, request, here)
        self.gallery.check()
        loading = None
        for loading in self._fetch(request, pipeline):
            yield loading
            _check(stop)
        if loading is not None:  # its configs and sizes are the checkpoint's own now
            plan, pipeline = self._planned(request, seeds, here, compiled=compiled)
            yield from self._announced(plan, request, here)

        run = _Run(stop, here.stand_in or here.device)
        if run.device == "cpu":
            run.baseline = anonymous_bytes() - self._manager.anonymous_bytes
        yield from run.say(*refused, *pipeline.notices)
        tried: list[Hashable] = []
        with PeakMeter(run.device) as meter:
            while failed := (yield from self._run_phases(plan, pipeline, run)):
                tried.append(plan.shape)
                release()  # what failed is gone by now, and its traceback, which held tensors
                here = self._machine()
                told = self._learn(failed, plan, pipeline, request, here)
                plan, pipeline = self._planned(request, seeds, here, compiled=compiled)
                if plan.shape in tried or len(tried) > RETRIES:
                    raise OutOfMemory(
                        "The device ran out of memory, and again with leaner plans. A smaller picture or "
                        "fewer images take less; so does closing other programs that use it."
                    )
                yield from run.say(told)
                yield from self._announced(plan, request, here)
        pictures: list[Image] = run.results[pipeline.phases[-1].name]
        timings = {**run.timings, "total": time.perf_counter() - begin}
        rounded = {name: round(seconds, 3) for name, seconds in timings.items()}
        facts = {"family": request.family, "timings": rounded}
        asked = pipeline.settings
        if hashes := adapting.hashes(request, self.settings):
            asked = asked | {"lora_hashes": hashes}
        files = self._save(pictures, asked, seeds, facts, run.notices, owner)
        yield Finished(
            result=Result(
                images=pictures,
                files=files,
                seeds=list(seeds),
                plan=plan,
                timings=rounded,
                settings=asked,
                peak_bytes=max(meter.peak - run.baseline, 0),
                notices=run.notices,
            )
        )

    def _run_phases(
        self, plan: Plan, pipeline: Pipeline, run: _Run
    ) -> Generator[Event, None, _Failure | None]:
        """Run each phase, or take its kept result; → what failed for want of memory or of a wider dtype."""
        run.results.clear()
        for phase, planned in zip(pipeline.phases, plan.phases, strict=True):
            begin = time.perf_counter()
            kept = self._cache.get(phase.key)
            failed = None
            if kept is None:
                kept, failed = yield from self._try_phase(phase, planned, plan, pipeline, run)
            run.timings[phase.name] = run.timings.get(phase.name, 0.0) + time.perf_counter() - begin
            if failed is not None:
                return failed
            run.results[phase.name] = kept
            self._cache.put(phase.key, kept)
        return None

    def _try_phase(
        self, phase: Phase, planned: PlannedPhase, plan: Plan, pipeline: Pipeline, run: _Run
    ) -> Generator[Event, None, tuple[Any, _Failure | None]]:
        """→ the phase's result, or why it has none."""
        try:
            return (yield from self._run_phase(phase, planned, plan, pipeline, run)), None
        except NotFinite as error:
            return None, _Failure(phase, error.component, error.what)
        except (MemoryError, RuntimeError, OSError) as error:
            if not _is_shortage(error):
                raise
            return None, _Failure(phase)

    def _run_phase(
        self, phase: Phase, planned: PlannedPhase, plan: Plan, pipeline: Pipeline, run: _Run
    ) -> Generator[Event, None, Any]:
        from backend.nn.layers import Attention, attention_by

        for device, allowed in plan.spare(planned).items():
            here = {pipeline.components[part.name].identity for part in plan.held(planned, device)}
            self._manager.make_room(device, allowed, here)
        rows = planned.manner.rows if planned.manner.rows != WHOLE else None
        with ExitStack() as loans:
            parts = {}
            for part in planned.components:
                component = pipeline.components[part.name]
                fresh, size = not self._manager.holds(component), component.bytes
                if fresh:
                    yield Loading(component=part.name, action="load", done_bytes=0, total_bytes=size)
                parts[part.name] = loans.enter_context(self._manager.use(component, part))
                if fresh:
                    yield Loading(component=part.name, action="load", done_bytes=size, total_bytes=size)
                _check(run.stop)
            loans.enter_context(attention_by(Attention(self.settings.attention, rows)))
            begin, shown = time.perf_counter(), -PREVIEW_SECONDS
            work = phase.run(parts, run.results, planned.manner)
            while True:
                try:
                    report = next(work)
                except StopIteration as done:
                    result = done.value
                    break
                if isinstance(report, Notice):
                    yield from run.say(report.text)
                    continue
                now = time.perf_counter() - begin
                drawn = report.preview is not None and now - shown >= PREVIEW_SECONDS
                if drawn:
                    shown = now
                yield _step(phase.name, report, now, drawn, run.memory_bytes())
                _check(run.stop)
        if any(part.placement != "resident" for part in planned.components):
            release()
        return result

    def _learn(
        self, failed: _Failure, plan: Plan, pipeline: Pipeline, request: Request, here: Hardware
    ) -> str:
        """Keep for the session what a failure taught, so that the next plan differs. → it in words."""
        if failed.component is not None:
            part = pipeline.components[failed.component]
            wider = "float32" if failed.component in ("vae", "vqgan") or not here.bf16 else "bfloat16"
            again = "float32" if part.dtype == wider else wider
            self._wider[part.family, part.checkpoint, part.name] = again
            return f"{failed.what} overflowed in {part.dtype}: it is repeated in {again}."
        title, seeds = phase_title(failed.phase.name), tuple(range(request.num_images))
        leaner, _ = self._planned(request, seeds, here)
        if leaner.shape == plan.shape:  # the device has no less room than before: the formula was wrong
            ran = next(phase for phase in plan.phases if phase.name == failed.phase.name)
            room = leaner.budget_bytes - (ran.peak_bytes - ran.work_bytes)
            first = FIRST_TIME_BYTES.get(here.device, 0)  # which no lesson changes
            factor = max((room + 1 - first) / max(ran.work_bytes - first, 1), 1.1)
            for_all, for_this = lessons_of(failed.phase, pipeline)
            lesson = for_all if factor <= TRUSTED else for_this
            before = max(self._lessons.get(for_all, 1.0), self._lessons.get(for_this, 1.0))
            self._lessons[lesson] = before * factor
            leaner, _ = self._planned(request, seeds, here)
        news = [text for text in leaner.decisions[1:] if text not in plan.decisions] or [leaner.decisions[0]]
        return f"{title} ran out of memory and is repeated with a leaner plan. {' '.join(news)}".rstrip()

    def _machine(self) -> Hardware:
        if self._hardware is None:
            self._hardware = Hardware.detect(self.settings.device)
        here = self._hardware.now()
        if here.read is None:  # described, not detected
            return here
        if here.device == "cpu":
            ours = self._manager.anonymous_bytes
            return replace(here, free_bytes=min(here.free_bytes + ours, here.total_bytes))
        held = self._manager.bytes_on
        others = (
            replace(card, free_bytes=min(card.free_bytes + held(card.device), card.total_bytes))
            for card in here.others
        )
        return replace(
            here,
            free_bytes=min(here.free_bytes + held(here.device), here.total_bytes),
            ram_free_bytes=min(here.ram_free_bytes + self._manager.ram_bytes, here.ram_bytes),
            others=tuple(others),
        )

    def _source(self, checkpoint: str, family: str, config_from: str | None = None) -> Source:
        """Where the checkpoint comes from. In public mode nobody names paths or repositories of their own."""
        if self.settings.public and checkpoint not in self.catalogue(family):
            names = ", ".join(self.catalogue(family))
            raise InvalidRequest(f"checkpoint is {checkpoint!r}; on this public server it can be {names}")
        return resolve(checkpoint, family, self.settings, config_from)

    def _admit(self, request: Request) -> None:
        """Raise InvalidRequest for what a public server does not do for strangers."""
        if self.settings.public:
            public.check(request)

    def _fetch(self, request: Request, pipeline: Pipeline) -> Iterator[Loading]:
        """Download what the pipeline lacks here; nothing for a local checkpoint, or on a public server."""
        source = self._source(request.checkpoint, request.family, request.config_from)
        for dtype, names in _by_dtype(pipeline).items():
            if self.settings.public:
                local.refuse_absent(self.settings, source, names, dtype)
            else:
                yield from source.fetch(names, dtype)

    def _planned(
        self,
        request: Request,
        seeds: tuple[int, ...],
        here: Hardware,
        *,
        compiled: bool = False,
        settings: Settings | None = None,
    ) -> tuple[Plan, Pipeline]:
        """The plan of a request, and the pipeline that it chose; with other `settings`, if they are given."""
        settings = settings or self.settings
        import torch

        from backend.weights.parts import Parts

        if request.family not in catalog.FAMILIES:
            raise InvalidRequest(f"family is {request.family!r}; it can be {', '.join(catalog.FAMILIES)}")
        if isinstance(request, SD3Request) and request.t5 == "auto":
            request = replace(request, t5=settings.t5)
        source = self._source(request.checkpoint, request.family, request.config_from)
        read, found = adapting.plain(request, settings)
        wider = {
            name: getattr(torch, dtype)
            for (family, checkpoint, name), dtype in self._wider.items()
            if (family, checkpoint) == (request.family, source.name)
        }
        parts = Parts(
            source=source, device=torch.device(here.device), compiled=compiled, wider=wider,
            loras=found.loras, embeddings=found.embeddings,
        )  # fmt: skip
        dtype = self._dtype(request, here, settings)
        offered = _room(request.family, "pipeline").ways(read, parts, seeds=seeds, dtype=dtype)
        ways = [replace(way, make=cache(way.make)) for way in offered]
        wishes = Wishes(
            prefer=request.prefer,
            offload=settings.offload,
            attention_slicing=settings.attention_slicing,
            vae_slicing=settings.vae_slicing,
            vae_tiling=settings.vae_tiling,
            device_map=settings.device_map,
        )
        planned = partial(make_plan, ways, hardware=here, cap_gib=settings.vram, wishes=wishes)
        plan = planned(lessons=self._lessons)
        if not plan.fits and self._lessons:
            plan = planned()  # a lesson tells how to go about it; what it measured is no reason to refuse
        pipeline = ways[plan.way].make()
        if words := ", ".join(use.name for use in found.embeddings):  # they may be meant as plain words
            pipeline = replace(pipeline, notices=(*pipeline.notices, f"Read as embeddings: {words}."))
        asked = {"prompt": request.prompt, "loras": request.loras}  # as it was, its tags included
        return plan, replace(pipeline, settings=pipeline.settings | asked)

    def _announced(self, plan: Plan, request: Request, here: Hardware) -> Iterator[Event]:
        yield Planned(plan=plan)
        if not plan.fits:
            raise OutOfMemory(f"{plan.decisions[0]} {self._what_fits(request, here)}")

    def _what_fits(self, request: Request, here: Hardware) -> str:
        """What would fit this machine instead of a request that does not."""
        asked = self._planned(request, _seeds(request), here)[1].settings
        tries: list[tuple[str, dict[str, Any], dict[str, Any]]] = []  # in words, of the request, of settings
        for name in (
            "offload",
            "vae_slicing",
            "vae_tiling",
            "attention_slicing",
            "device_map",
            "t5",
            "dtype",
        ):
            if getattr(self.settings, name) != "auto":
                flag = f"--{name.replace('_', '-')} auto"
                tries.append((flag, {}, {name: "auto"}))
        tries += [
            (f"{name} 'auto'", {name: "auto"}, {})
            for name in ("t5", "stages", "stage_c", "stage_b", "dtype", "prefer")
            if getattr(request, name, "auto") != "auto"
        ]
        if request.num_images > 1:
            tries.append(("num_images 1", {"num_images": 1}, {}))
        for share in (3 / 4, 1 / 2, 1 / 4):
            width, height = (max(round(asked[side] * share / 64) * 64, 64) for side in ("width", "height"))
            tries.append((f"{width}×{height} pixels", {"width": width, "height": height}, {}))
        if self.settings.vram is not None:
            tries.append((f"more than --vram {self.settings.vram:g}", {}, {"vram": None}))
        fits = (
            words
            for words, change, other in tries
            if self._planned(
                replace(request, **change), (0,) * change.get("num_images", request.num_images), here,
                settings=replace(self.settings, **other),
            )[0].fits
        )  # fmt: skip
        found = list(islice(fits, 2))
        if found:
            return f"It would fit with {' or '.join(found)}."
        return "A smaller picture does not fit either: another device or a smaller checkpoint is needed."

    def _check_attention(self, here: Hardware) -> None:
        """Raise InvalidRequest for a kernel of attention that cannot be had here."""
        from backend.nn.layers import attention_available

        if refused := attention_available(self.settings.attention, here.device):
            raise InvalidRequest(f"attention is {self.settings.attention!r}: {refused}")

    def _compiler(self, here: Hardware) -> tuple[bool, list[str]]:
        """Whether networks are to be compiled, and what there is to say about it."""
        if not self.settings.compile:
            return False, []
        from backend.nn.compiled import no_compiler

        reason = no_compiler(here.device)
        refused = f"Nothing is compiled: this machine has no compiler that works ({reason})."
        return reason is None, [refused] if reason else []

    def _dtype(self, request: Request, here: Hardware, settings: Settings) -> torch.dtype:
        """The request's precision over the settings'; "auto" is the fastest that the device computes in."""
        import torch

        name = request.dtype if request.dtype != "auto" else settings.dtype
        if name == "auto":
            # CPUs compute in bf16 or fp32 only
            on_cpu = ("bfloat16", "float32")
            wished = on_cpu if here.device == "cpu" else _room(request.family, "pipeline").AUTO_DTYPES
            name = next((name for name in wished if name != "bfloat16" or here.bf16), wished[-1])
        return getattr(torch, name)

    def _save(
        self,
        pictures: list[Image],
        settings: dict[str, Any],
        seeds: tuple[int, ...],
        facts: dict[str, Any],
        notices: list[str],
        owner: str,
    ) -> list[Path]:
        """Write every picture; where the home fails (a full disk), to a temporary folder rather than nowhere.

        Raises StorageError, which holds the pictures, where that fails too.
        """
        gallery, files = self.gallery, []
        for picture, seed in zip(pictures, seeds, strict=True):
            text = infotext.describe(settings, seed)
            record = {**settings, "seed": seed, **facts}
            try:
                files.append(gallery.save(picture, text, record, owner=owner))
            except StorageError as error:
                spare = Gallery(Path(tempfile.mkdtemp(prefix="triptych-")))
                notices.append(f"{error}. Until then pictures go to {spare.outputs}.")
                gallery = spare
                try:
                    files.append(gallery.save(picture, text, record, owner=owner))
                except StorageError:
                    raise StorageError(str(error), tuple(pictures)) from error
        return files


def _by_dtype(pipeline: Pipeline) -> dict[str, list[str]]:
    """The names of the components, by the dtype in which they are best kept."""
    names: dict[str, list[str]] = {}
    for name, part in pipeline.components.items():
        names.setdefault(part.dtype, []).append(name)
    return names


def _room(family: str, module: str) -> ModuleType:
    """A module of the family's room, imported at first use: some need torch, and the page must not wait."""
    return import_module(f"{catalog.FAMILIES[family].room}.{module}")


def _step(name: str, report: Progress, elapsed: float, drawn: bool, memory: int) -> Step:
    left = elapsed / report.step * (report.steps - report.step)
    previews = report.preview() if drawn and report.preview else ()
    return Step(
        phase=name,
        step=report.step,
        steps=report.steps,
        eta_s=round(left, 2),
        previews=previews,
        memory_bytes=memory,
    )


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
