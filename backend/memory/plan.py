"""Where every component lives and what each phase takes, decided before anything loads.

A pure function of (the ways to make the picture, hardware, wishes, lessons). The ladder of `auto`, a rung
taken only when no earlier one fits:

    resident → swapped → fewer images per forward, guidance's halves apart, tiles → the next smaller way
    (T5 with 8 bits, with 4; Cascade lite) → what all ways share streamed, the best way first → all streamed,
    the smallest way → T5 beside the card, on the CPU → without T5

`quality` keeps to the best way and streams it; `speed` takes the way with the least to compute, or the first
that stays resident, and else the one with the least to move. Several cards share the components before
anything leaves them; one component is split over them only where no card holds it. Peak of a phase = what
stays on the device + what it uses that does not + its work.
"""

from __future__ import annotations

from collections.abc import Collection, Hashable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache
from typing import Any

from backend.memory.blocks import slots
from backend.memory.hardware import GIB, Hardware
from backend.phases import Adapted, Component, Manner, Phase, Pipeline, Way

# Kept free for the device's own context, its libraries' workspaces and fragmentation.
RESERVE_BYTES = {"cpu": GIB // 2, "cuda": GIB // 2, "mps": GIB // 2}
# What libraries take of a CPU's memory when they compute for the first time (30 to 45 MB, measured).
FIRST_TIME_BYTES = {"cpu": 32 * 1024**2}
RAM_RESERVE_BYTES = GIB  # beside a card, for the program itself and the rest of the machine
WHOLE = 2**30  # attention's queries at once: more than there ever are
ROWS = (1024, 128)  # fewer, where scores are held
ALL = Manner()
# Forwards of a network from which merging LoRAs into it takes less time than computing them beside it.
MERGED_FROM = 4

TITLES = {
    "text_encoder": "the text encoder",
    "text_encoder_2": "the second text encoder",
    "text_encoder_3": "T5",
    "image_encoder": "the image encoder",
    "unet": "the UNet",
    "transformer": "the transformer",
    "vae": "the VAE",
    "prior": "Stage C",
    "prior_lite": "Stage C lite",
    "decoder": "Stage B",
    "decoder_lite": "Stage B lite",
    "vqgan": "Stage A",
    "previewer": "the previewer",
}
PHASES = {
    "encode": "reading the prompt",
    "encode_clip": "reading the prompt",
    "encode_t5": "reading the prompt with T5",
    "denoise": "painting",
    "decode": "decoding",
    "stage_c": "Stage C",
    "stage_b": "Stage B",
    "stage_a": "Stage A",
}
SENT = ("device", "budget_bytes", "peak_bytes", "decisions")
SENT_OF_PHASE = ("name", "work_bytes", "peak_bytes")
SENT_OF_COMPONENT = ("name", "placement", "precision", "bytes")


@dataclass(frozen=True, kw_only=True)
class Wishes:
    """What the user asks of the plan; "auto" leaves it the choice. `offload` can be "none", "model" (whole
    components, swapped) or "sequential" (streamed); the others "on" or "off"; `device_map` "single" or
    "balanced"."""

    prefer: str = "auto"
    offload: str = "auto"
    attention_slicing: str = "auto"
    vae_slicing: str = "auto"
    vae_tiling: str = "auto"
    device_map: str = "auto"


@dataclass(frozen=True, kw_only=True)
class PlannedComponent:
    """`placement` is resident, swapped, streamed or cpu. `held_bytes` is what it takes of the device's memory
    when its phase runs: less than its `bytes` if it is streamed, or mapped from a file. What is not on the
    `device` waits at `home`: in "ram", or in the "file" alone. `merged`: the LoRAs that go with it are in its
    weights; else they are beside them, and counted with what it holds."""

    name: str
    placement: str
    precision: str
    bytes: int
    held_bytes: int
    device: str
    home: str = ""
    shares: tuple[tuple[str, int], ...] = ()
    merged: bool = False


@dataclass(frozen=True, kw_only=True)
class PlannedPhase:
    name: str
    work_bytes: int
    peak_bytes: int
    components: tuple[PlannedComponent, ...]
    manner: Manner = ALL
    device: str = ""  # where it runs, one of several cards
    budget_bytes: int = 0  # of that device


@dataclass(frozen=True, kw_only=True)
class Plan:
    """`way` is the number of the one that was chosen among those offered."""

    device: str
    budget_bytes: int
    peak_bytes: int
    phases: tuple[PlannedPhase, ...]
    decisions: tuple[str, ...]
    fits: bool
    way: int = 0

    @property
    def components(self) -> dict[str, PlannedComponent]:
        return {part.name: part for phase in self.phases for part in phase.components}

    @property
    def shape(self) -> tuple[Any, ...]:
        """What tells one way to run from another."""
        return self.way, tuple((phase.manner, phase.components) for phase in self.phases)

    def held(self, phase: PlannedPhase, device: str | None = None) -> list[PlannedComponent]:
        """What is in a device's memory while a phase runs, that where the phase runs unless another is named:
        what the phase uses there, and what stays besides."""
        where = device or phase.device
        used = {part.name for part in phase.components}
        parts = [*phase.components, *(part for part in self.components.values() if part.name not in used)]
        return [
            part
            for part in parts
            if (part.name in used and where == phase.device)
            or (part.placement == "resident" and (where in ("", part.device) or where in dict(part.shares)))
        ]

    def spare(self, phase: PlannedPhase) -> dict[str, int]:
        """What each device of the plan has to spare beside what the plan holds there during a phase."""
        spare = {phase.device: phase.budget_bytes - phase.peak_bytes}
        for other in self.phases:
            if other.device not in spare:
                held = self.held(phase, other.device)
                spare[other.device] = other.budget_bytes - sum(part.held_bytes for part in held)
        return spare

    def to_dict(self) -> dict[str, Any]:
        """The shape that the `/plan` endpoint returns."""
        plain = asdict(self)
        phases = [
            {
                **{key: phase[key] for key in SENT_OF_PHASE},
                "components": [{key: part[key] for key in SENT_OF_COMPONENT} for part in phase["components"]],
            }
            for phase in plain["phases"]
        ]
        sent = {key: plain[key] for key in SENT}
        return {**sent, "phases": phases, "decisions": list(plain["decisions"])}

    def __str__(self) -> str:
        lines = [f"{self.device}: {gib(self.peak_bytes)} of {gib(self.budget_bytes)}"]
        for phase in self.phases:
            parts = ", ".join(f"{c.name} {c.precision} {c.placement}" for c in phase.components)
            lines.append(f"  {phase.name}: {gib(phase.peak_bytes)} ({parts}; work {gib(phase.work_bytes)})")
        return "\n".join([*lines, *(f"  {decision}" for decision in self.decisions)])


def gib(size: int) -> str:
    """1610612736 → "1.5 GiB", 52428800 → "50 MiB", 300000 → "0.3 MiB"."""
    if size >= GIB:
        return f"{size / GIB:.1f} GiB"
    return f"{size / 1024**2:.{int(0 < size < 1024**2)}f} MiB"


def budget_bytes(hardware: Hardware, cap_gib: float | None) -> int:
    """min(free, cap) − reserve: what components and work may take together."""
    free = hardware.free_bytes if cap_gib is None else min(hardware.free_bytes, int(cap_gib * GIB))
    return max(free - RESERVE_BYTES[hardware.device], 0)


def lessons_of(phase: Phase, pipeline: Pipeline) -> tuple[Hashable, Hashable]:
    """What is learned of a phase's work is learned for its networks: for all requests, or for those alone
    whose work is as large."""
    networks = phase.name, tuple(pipeline.components[name].identity for name in phase.components)
    return networks, (networks, phase.work(phase.manners[0]))


def make_plan(
    ways: Sequence[Way],
    *,
    hardware: Hardware,
    cap_gib: float | None = None,
    wishes: Wishes = Wishes(),
    lessons: Mapping[Hashable, float] | None = None,
) -> Plan:
    """The plan of the first rung that fits; of the leanest one, saying what it lacks, where none does.

    `ways` are offered the best first, those that lack a part last. `lessons` are factors by which the work of
    phases (`lessons_of`) turned out to be larger than its formula.
    """
    planner = _Planner(hardware, cap_gib, wishes, lessons or {})
    pipelines = [cache(way.make) for way in ways]  # a smaller one is not made while a larger one fits
    failed: dict[int, _Sketch] = {}  # the leanest of each way
    for number, rung in _ladder(ways, wishes):
        if rung == "shared":
            planner.shared = _shared(
                [make() for way, make in zip(ways, pipelines, strict=True) if not way.lacking]
            )
        for sketch in planner.sketches(pipelines[number](), rung):
            if sketch.fits:
                return planner.plan(sketch, number, _why(ways, number, failed))
            failed[number] = sketch
    leanest = min(failed, key=lambda number: failed[number].excess)
    return planner.plan(failed[leanest], leanest, "")


def _shared(pipelines: Sequence[Pipeline]) -> frozenset[str]:
    """The components that are the same whichever way is chosen."""
    each = [{(name, part.identity) for name, part in made.components.items()} for made in pipelines]
    return frozenset(name for name, _ in set.intersection(*each))


def _why(ways: Sequence[Way], number: int, failed: Mapping[int, _Sketch]) -> str:
    """In words, which way was chosen, and what kept the best one from fitting."""
    label = ways[number].label
    if not label:
        return ""
    better = [each for each in failed if each < number]
    if not better:
        return f"{label}."
    short = failed[max(better)]  # the next better one
    if short.ram_excess > 0:
        return f"{label}: otherwise RAM would lack {gib(short.ram_excess)} for what waits in it."
    worst = short.worst
    return (
        f"{label}: otherwise {PHASES.get(worst.name, worst.name)} would take {gib(worst.peak_bytes)} at "
        f"once, and {gib(worst.budget_bytes)} is at hand."
    )


def _ladder(ways: Sequence[Way], wishes: Wishes) -> Iterator[tuple[int, str]]:
    """Numbers of ways with the rungs to try of them, in order."""
    whole = [number for number, way in enumerate(ways) if not way.lacking]
    lacking = [number for number, way in enumerate(ways) if way.lacking]
    fitting = {
        "none": ("resident", "spread", "packed"),
        "model": ("swapped", "split"),
        "sequential": ("streamed",),
    }.get(wishes.offload, ("resident", "spread", "swapped", "split", "divided"))
    if wishes.device_map == "balanced":
        fitting = ("spread", *(rung for rung in fitting if rung != "spread"))
    last = {"none": (), "model": ("aside",)}.get(wishes.offload, ("streamed", "aside"))
    shared = whole if wishes.offload == "auto" else []
    if wishes.prefer == "quality":
        whole, lacking = ([*whole, *lacking][:1], [])
        shared = []
    if wishes.prefer == "speed":
        stay = ("resident", "spread")
        swift = sorted(whole, key=lambda number: ways[number].pace)
        yield from ((number, rung) for number in swift for rung in fitting if rung in stay)
        yield from ((number, rung) for number in whole[-1:] for rung in fitting if rung not in stay)
    else:
        yield from ((number, rung) for number in whole for rung in fitting)
    # a smaller T5 is no help to a transformer that does not fit beside none
    yield from ((number, "shared") for number in shared)
    yield from ((number, rung) for rung in last for number in whole[-1:])
    yield from ((number, rung) for number in lacking for rung in (*fitting, *last))


@dataclass(frozen=True, kw_only=True)
class _SketchedPhase:
    """A phase as it would run: on a card, with what it uses there."""

    name: str
    manner: Manner
    device: str
    work_bytes: int
    peak_bytes: int
    budget_bytes: int
    used: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class _Sketch:
    """A plan without words: where each component goes, how each phase runs."""

    pipeline: Pipeline
    phases: tuple[_SketchedPhase, ...]
    components: Mapping[str, PlannedComponent]
    ram_excess: int = 0  # what RAM lacks for what waits in it or runs there

    def merged(self, name: str, more: int) -> _Sketch:
        """With the LoRAs of a component in its weights, which takes so much more all the time."""
        part = self.components[name]
        held = replace(part, merged=True, held_bytes=part.held_bytes + more)
        phases = tuple(replace(phase, peak_bytes=phase.peak_bytes + more) for phase in self.phases)
        return replace(self, components={**self.components, name: held}, phases=phases)

    @property
    def worst(self) -> _SketchedPhase:
        return max(self.phases, key=lambda phase: phase.peak_bytes - phase.budget_bytes)

    @property
    def excess(self) -> int:
        return max(self.worst.peak_bytes - self.worst.budget_bytes, self.ram_excess)

    @property
    def fits(self) -> bool:
        return self.excess <= 0


class _Planner:
    def __init__(
        self, hardware: Hardware, cap_gib: float | None, wishes: Wishes, lessons: Mapping[Hashable, float]
    ) -> None:
        self.hardware, self.wishes, self.lessons = hardware, wishes, lessons
        self.formulas: dict[tuple[int, Manner], int] = {}
        self.shared: frozenset[str] = frozenset()
        self.on_cpu = hardware.device == "cpu"
        self.budget = budget_bytes(hardware, cap_gib)
        capped = cap_gib is not None and cap_gib * GIB < hardware.free_bytes
        kept = gib(RESERVE_BYTES[hardware.device])
        self.capped = f" (of the {cap_gib:g} GiB that vram allows {kept} is kept free)" if capped else ""
        self.ram = max(hardware.ram_free_bytes - RAM_RESERVE_BYTES, 0)
        reserve = RESERVE_BYTES["cuda"]
        cap = cap_gib * GIB if cap_gib is not None else float("inf")
        self.others = {
            card.device: max(int(min(card.free_bytes, cap)) - reserve, 0) for card in hardware.others
        }

    def sketches(self, pipeline: Pipeline, rung: str) -> Iterator[_Sketch]:
        """The sketches of a rung, to be tried in order."""
        parts = pipeline.components
        # first out is what runs once a prompt, the largest first
        order = sorted(parts, key=lambda n: (not _once(n), -self.takes(parts[n])))
        passing = [name for name in parts if self.on_cpu and parts[name].passing]
        rest = [name for name in order if name not in passing]
        if rung in ("resident", "packed"):
            yield self.sketch(pipeline, passing, lean=rung == "packed")
        elif rung == "spread" and self.others and self.wishes.device_map != "single":
            yield self.sketch(pipeline, [], devices=self.spread(pipeline))
        elif rung == "divided" and self.others and self.wishes.device_map != "single":
            yield self.divided(pipeline, order)
        elif rung == "swapped":
            first = len(rest) if self.wishes.offload == "model" else 1
            for count in range(first, len(rest) + 1):
                yield self.sketch(pipeline, [*passing, *rest[:count]])
        elif rung == "split":
            yield self.sketch(pipeline, order, lean=True)
        elif rung == "streamed":
            always = self.wishes.offload == "sequential"
            yield self.sketch(pipeline, order, lean=True, streams="always" if always else "if need be")
        elif rung == "shared":
            yield self.sketch(pipeline, order, lean=True, streams="shared")
        elif rung == "aside" and not self.on_cpu:
            aside = [name for name in order if parts[name].stands_aside]
            if aside:
                yield self.sketch(pipeline, order, lean=True, streams="if need be", aside=aside)

    def takes(self, component: Component) -> int:
        """Of the device's memory: what is mapped from a file takes none of a CPU's."""
        return (component.copied_bytes if self.on_cpu else component.bytes) + component.added_bytes

    def sketch(
        self,
        pipeline: Pipeline,
        off: Collection[str],
        *,
        lean: bool = False,
        streams: str = "never",
        aside: Collection[str] = (),
        devices: Mapping[str, str] | None = None,
        divided: PlannedComponent | None = None,
    ) -> _Sketch:
        """With the components `off` the device but for their phases, those that stand `aside` on the CPU; a
        `lean` one takes for each phase the first manner that fits."""
        parts, here = pipeline.components, self.hardware.device
        where = {name: (devices or {}).get(name, here) for name in parts}
        held = {name: self.takes(part) for name, part in parts.items()}
        if divided is not None:
            held[divided.name] = divided.held_bytes
        stays = [name for name in parts if name not in off and name not in aside]
        streamed: set[str] = set()
        phases: list[_SketchedPhase] = []
        for phase in pipeline.phases:
            used = tuple(name for name in phase.components if name not in aside)
            device = where[phase.components[0]]
            budget = self.others.get(device, self.budget)
            keeps = sum(held[name] for name in stays if where[name] == device)
            manners = self.manners(phase)
            room = budget - keeps
            need = {name: held[name] for name in used if name in off}
            chosen: tuple[Manner, Mapping[str, int], Collection[str]] | None = None
            if streams != "always":
                # one that has failed goes about it more leanly before anything has to leave
                tried = manners if lean or self.lesson(phase, pipeline) > 1 else manners[:1]
                fitting = (m for m in tried if self.work(phase, pipeline, m) + sum(need.values()) <= room)
                chosen = next(((manner, need, ()) for manner in fitting), None)
            if chosen is None and streams != "never":
                among = [name for name in need if streams != "shared" or name in self.shared]
                always = streams == "always"
                chosen = self.streamed(phase, pipeline, need, manners, room, among=among, always=always)
            manner, taken, coming = chosen or (manners[-1 if lean else 0], need, ())
            streamed |= set(coming)
            held |= taken
            work = self.work(phase, pipeline, manner) if used else 0
            phases.append(
                _SketchedPhase(
                    name=phase.name,
                    manner=manner,
                    device=device,
                    work_bytes=work,
                    used=phase.components,
                    peak_bytes=keeps + sum(taken.values()) + work,
                    budget_bytes=budget,
                )
            )
        waiting = {name: parts[name].copied_bytes for name in parts if name in off or name in aside}
        homes, excess = self.homes(pipeline, waiting, aside, streamed)

        def planned(name: str) -> PlannedComponent:
            part = parts[name]
            placement = "cpu" if name in aside else "streamed" if name in streamed else "swapped"
            if name in stays:
                placement = "resident"
                if self.on_cpu and part.bytes > self.budget:
                    placement = "streamed"  # mapped, it is read from its file as it runs
            return PlannedComponent(
                name=name, placement=placement, precision=part.precision, bytes=part.bytes,
                held_bytes=0 if name in aside else held[name],
                device="cpu" if name in aside else where[name], home=homes.get(name, ""),
            )  # fmt: skip

        components = {name: planned(name) for name in parts}
        if divided is not None:
            components[divided.name] = divided
        made = _Sketch(pipeline=pipeline, phases=tuple(phases), components=components, ram_excess=excess)
        return self.merging(made) if made.fits else made

    def merging(self, sketch: _Sketch) -> _Sketch:
        """With LoRAs merged into the weights that they are for, where that saves time and there is room for
        those weights as they were before: on a CPU beside them, of a card's in RAM, where what is swapped has
        them anyway."""
        for name, part in sketch.pipeline.components.items():
            adapted, planned = part.adapted, sketch.components[name]
            if adapted is None or not adapted.merging_bytes or adapted.forwards < MERGED_FROM:
                continue
            if planned.placement == "swapped" and planned.home == "ram":
                more, room = 0, 0
            elif planned.placement != "resident":
                continue
            elif self.on_cpu:
                more = adapted.merging_bytes
                room = min(phase.budget_bytes - phase.peak_bytes for phase in sketch.phases)
            else:
                more, room = 0, -sketch.ram_excess - adapted.merging_bytes
            if more <= room:
                sketch = sketch.merged(name, more)
        return sketch

    def streamed(
        self,
        phase: Phase,
        pipeline: Pipeline,
        need: Mapping[str, int],
        manners: Sequence[Manner],
        room: int,
        *,
        among: Collection[str],
        always: bool,
    ) -> tuple[Manner, Mapping[str, int], Sequence[str]]:
        """The first manner with which the phase fits if its largest components `among` these are streamed, as
        few as need be; what all take then, those using the room that is left; and which they are. The
        leanest, where none fits."""
        parts = pipeline.components
        blocks = {
            name: of()
            for name in among
            if (of := parts[name].blocks) is not None and (parts[name].open is not None or not self.on_cpu)
        }
        candidates = sorted(blocks, key=lambda name: -need[name])
        count = slots(self.hardware.device)
        least = {
            name: min(
                blocks[name].kept + count * max(blocks[name].blocks, default=0) + parts[name].added_bytes,
                need[name],
            )
            for name in candidates
        }
        taken, coming = dict(need), candidates
        for manner in manners:
            work = self.work(phase, pipeline, manner)
            for several in range(len(candidates) if always else 1, len(candidates) + 1):
                coming = candidates[:several]
                taken = {**need, **{name: least[name] for name in coming}}
                spare = room - work - sum(taken.values())
                if spare >= 0:
                    if coming and not always:
                        taken[coming[0]] = min(taken[coming[0]] + spare, need[coming[0]] - 1)
                    return manner, taken, coming
        return manners[-1], taken, coming

    def divided(self, pipeline: Pipeline, order: Sequence[str]) -> _Sketch:
        """With the largest component over all cards, each taking as much of it as it has room for."""
        parts = pipeline.components
        largest = max(order, key=lambda name: parts[name].bytes)
        rest = [name for name in order if name != largest]
        work = max(
            self.work(phase, pipeline, phase.manners[-1])
            for phase in pipeline.phases
            if largest in phase.components
        )
        room = {self.hardware.device: max(self.budget - work, 0), **self.others}
        whole, size = max(sum(room.values()), 1), parts[largest].bytes
        shares = tuple((card, size * free // whole) for card, free in room.items())
        first = PlannedComponent(
            name=largest, placement="resident", precision=parts[largest].precision, bytes=size,
            held_bytes=size if size > whole else shares[0][1], device=self.hardware.device, shares=shares,
        )  # fmt: skip
        return self.sketch(pipeline, rest, lean=True, divided=first)

    def homes(
        self,
        pipeline: Pipeline,
        waiting: Mapping[str, int],
        aside: Collection[str],
        streamed: Collection[str],
    ) -> tuple[dict[str, str], int]:
        """Where what is not on the device waits, and what RAM lacks for it. On a CPU that is the file; beside
        a card RAM, as long as that holds it."""
        if self.on_cpu:
            return dict.fromkeys(waiting, "file"), 0
        homes, total = dict.fromkeys(waiting, "ram"), sum(waiting.values())
        for name in sorted(waiting, key=lambda name: -waiting[name]):
            # what is streamed from its file must be readable in pieces, what runs on the CPU is there
            part = pipeline.components[name]
            if total > self.ram and name not in aside and not (name in streamed and part.open is None):
                homes[name], total = "file", total - waiting[name]
        return homes, total - self.ram

    def spread(self, pipeline: Pipeline) -> dict[str, str]:
        """Component → card: each, the largest first, where most room is left."""
        parts = pipeline.components
        work: dict[str, int] = {}
        for phase in pipeline.phases:
            for name in phase.components:
                work[name] = max(work.get(name, 0), self.work(phase, pipeline, self.manners(phase)[0]))
        room = {self.hardware.device: self.budget, **self.others}
        cards: dict[str, str] = {}
        for phase in sorted(pipeline.phases, key=lambda p: -sum(parts[n].bytes for n in p.components)):
            card = max(room, key=lambda card: room[card])
            for name in phase.components:  # together: they compute on each other's results
                if name not in cards:
                    cards[name] = card
                    room[card] -= parts[name].bytes
        return cards

    def manners(self, phase: Phase) -> tuple[Manner, ...]:
        """Those that the wishes leave, the fastest first; where attention holds its scores, with fewer and
        fewer queries at once."""
        wishes, chosen = self.wishes, phase.manners
        tiled = [manner for manner in chosen if manner.tile is not None]
        if tiled and wishes.vae_tiling != "auto":
            chosen = [manner for manner in chosen if (manner.tile is not None) == (wishes.vae_tiling == "on")]
        if wishes.vae_slicing == "off" and phase.name in ("decode", "stage_a"):
            chosen = [manner for manner in chosen if manner.images == phase.pictures] or chosen
        chosen = [manner for manner in chosen if manner.images <= chosen[0].images]  # others take more
        if phase.name.startswith("encode"):  # of transformers' networks, over a few tokens
            return tuple(chosen)
        if wishes.attention_slicing == "on":
            return tuple(replace(manner, rows=rows) for manner in chosen for rows in ROWS)
        if self.hardware.fused_attention:
            return tuple(chosen)
        each = (WHOLE,) if wishes.attention_slicing == "off" else (WHOLE, *ROWS)
        return tuple(replace(manner, rows=rows) for manner in chosen for rows in each)

    def lesson(self, phase: Phase, pipeline: Pipeline) -> float:
        if not self.lessons:
            return 1.0
        return max(self.lessons.get(key, 1.0) for key in lessons_of(phase, pipeline))

    def work(self, phase: Phase, pipeline: Pipeline, manner: Manner) -> int:
        factor = self.lesson(phase, pipeline)
        asked = manner
        if self.hardware.fused_attention and manner.rows is not None:
            asked = replace(manner, rows=None)
        key = id(phase), asked
        if key not in self.formulas:  # the same for every rung
            self.formulas[key] = phase.work(asked)
        return round(self.formulas[key] * factor) + FIRST_TIME_BYTES.get(self.hardware.device, 0)

    # ---- words

    def plan(self, sketch: _Sketch, number: int, why: str) -> Plan:
        parts, worst = sketch.components, sketch.worst
        phases = tuple(
            PlannedPhase(
                name=phase.name,
                work_bytes=phase.work_bytes,
                peak_bytes=phase.peak_bytes,
                components=tuple(parts[name] for name in phase.used),
                manner=phase.manner,
                device=phase.device,
                budget_bytes=phase.budget_bytes,
            )
            for phase in sketch.phases
        )
        details = self.details(sketch) if sketch.fits else ()
        told = (self.verdict(sketch), why, *details, *sketch.pipeline.decisions)
        return Plan(
            device=self.hardware.device,
            budget_bytes=worst.budget_bytes,
            peak_bytes=worst.peak_bytes,
            phases=phases,
            decisions=tuple(filter(None, told)),
            fits=sketch.fits,
            way=number,
        )

    def verdict(self, sketch: _Sketch) -> str:
        parts, worst = sketch.components.values(), sketch.worst
        where = "the CPU" if self.on_cpu else self.hardware.name
        if len({part.device for part in parts if part.placement != "cpu"}) > 1:
            where = "the cards"
        if sketch.ram_excess > 0:
            return (
                f"Does not fit this machine: RAM lacks {gib(sketch.ram_excess)} for what is not on {where} "
                "all the time."
            )
        if not sketch.fits:
            weights = worst.peak_bytes - worst.work_bytes
            return (
                f"Does not fit {where}: {PHASES.get(worst.name, worst.name)} needs {gib(worst.peak_bytes)}, "
                f"{gib(weights)} of it weights, and {gib(worst.budget_bytes)} is at hand{self.capped}."
            )
        at_most = f"{gib(worst.peak_bytes)} of the {gib(worst.budget_bytes)} at hand"
        coming = [part.name for part in parts if part.placement in ("swapped", "streamed")]
        if not coming:
            return f"Everything stays in memory on {where}: {at_most}."
        if len(coming) == len(parts):
            return f"Nothing stays in memory on {where} between the phases: at most {at_most}."
        return f"{listed(coming)} in memory on {where} only while {works(coming)}: at most {at_most}."

    def details(self, sketch: _Sketch) -> Iterator[str]:
        """A sentence for each thing that is done for want of memory, and is no order."""
        parts = sketch.components.values()
        where = "CPU" if self.on_cpu else "card"
        for part in parts:
            name = title(part.name)
            if part.placement == "cpu":
                yield f"{name} runs on the CPU, in RAM: the card has no room for it."
            elif part.placement == "streamed" and part.home == "ram":
                yield (
                    f"{name} is streamed: all but {gib(part.bytes - part.held_bytes)} of its "
                    f"{gib(part.bytes)} are on the {where} at once, and that comes block by block."
                )
            elif part.placement == "streamed":
                why = "as asked for" if self.wishes.offload == "sequential" else "memory does not hold it"
                yield f"{name} is read from its file block by block as it computes: {why}."
            elif part.home == "file" and not self.on_cpu:
                yield f"{name} is read again from its file for every use: RAM does not hold it."
            if part.shares:
                of = ", ".join(f"{gib(size)} on {card}" for card, size in part.shares)
                yield f"{name} is split over the cards: {of}."
            if part.device not in (self.hardware.device, "cpu"):
                yield f"{name} is on {part.device}."
            if adapted := sketch.pipeline.components[part.name].adapted:
                yield _adapters(part, adapted)
        for phase, sketched in zip(sketch.pipeline.phases, sketch.phases, strict=True):
            yield from self.cuts(phase, sketched.manner)
        mapped = sum(part.bytes - part.held_bytes for part in parts if self.on_cpu)
        if mapped > GIB // 100:
            yield f"{gib(mapped)} of weights are read where they lie in their files, and take no memory."

    def cuts(self, phase: Phase, manner: Manner) -> Iterator[str]:
        first, name = phase.manners[0], phase_title(phase.name)
        if manner.images < first.images:
            together = "one" if manner.images == 1 else str(manner.images)
            yield f"{name} works on {together} of the {first.images} pictures at once: all would not fit."
        if manner.apart and not first.apart:
            yield f"{name} computes guidance's two halves one after the other: both would not fit."
        if manner.tile is not None and first.tile is None:
            why = "as asked for" if self.wishes.vae_tiling == "on" else "the whole would not fit"
            yield f"{name} goes in tiles of {manner.tile} latent pixels: {why}."
        if manner.rows in ROWS:
            why = "as asked for" if self.wishes.attention_slicing == "on" else "all would not fit"
            yield f"{name} attends with {manner.rows} queries at a time: {why}."


def _adapters(part: PlannedComponent, adapted: Adapted) -> str:
    count = len(adapted.names)
    loras = "a LoRA" if count == 1 else f"{count} LoRAs"
    if part.merged:
        return f"{title(part.name)} has {loras} merged into {gib(adapted.merging_bytes)} of its weights."
    return f"{title(part.name)} has {loras} beside its weights: {gib(adapted.bytes)}."


def title(name: str) -> str:
    """A component in words, as at the start of a sentence."""
    return _capital(TITLES.get(name, name))


def phase_title(name: str) -> str:
    return _capital(PHASES.get(name, name.replace("_", " ")))


def _capital(words: str) -> str:
    return words[:1].upper() + words[1:]


def listed(names: Sequence[str]) -> str:
    """ "The transformer and T5 are" """
    words = [TITLES.get(name, name) for name in names]
    text = words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"
    return f"{_capital(text)} {'is' if len(words) == 1 else 'are'}"


def works(names: Sequence[str]) -> str:
    return "it works" if len(names) == 1 else "they work"


def _once(name: str) -> bool:
    """Whether a component runs once a prompt, so that its absence costs the least."""
    return "encoder" in name
