"""Where every component lives and what each phase takes, decided before anything loads.

A pure function of (components, phases, hardware, cap). This version knows two placements: `resident`, which
stays on the device, and `swapped`, which is there for its phase only. Peak of a phase = all that is resident
+ what it uses that is swapped + its work.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from backend.memory.hardware import GIB, Hardware

# Kept free for the device's own context, its libraries' workspaces and fragmentation.
RESERVE_BYTES = {"cpu": GIB // 2, "cuda": GIB // 2, "mps": GIB // 2}


@dataclass(frozen=True, kw_only=True)
class PlannedComponent:
    name: str
    placement: str
    precision: str
    bytes: int


@dataclass(frozen=True, kw_only=True)
class PlannedPhase:
    name: str
    work_bytes: int
    peak_bytes: int
    components: tuple[PlannedComponent, ...]


@dataclass(frozen=True, kw_only=True)
class Plan:
    device: str
    budget_bytes: int
    peak_bytes: int
    phases: tuple[PlannedPhase, ...]
    decisions: tuple[str, ...]

    @property
    def fits(self) -> bool:
        return self.peak_bytes <= self.budget_bytes

    def to_dict(self) -> dict[str, Any]:
        """The shape that the `/plan` endpoint returns."""
        plain = asdict(self)
        for phase in plain["phases"]:
            phase["components"] = list(phase["components"])
        return {**plain, "phases": list(plain["phases"]), "decisions": list(plain["decisions"])}

    def __str__(self) -> str:
        lines = [f"{self.device}: {gib(self.peak_bytes)} of {gib(self.budget_bytes)}"]
        for phase in self.phases:
            parts = ", ".join(f"{c.name} {c.precision} {c.placement}" for c in phase.components)
            lines.append(f"  {phase.name}: {gib(phase.peak_bytes)} ({parts}; work {gib(phase.work_bytes)})")
        return "\n".join([*lines, *(f"  {decision}" for decision in self.decisions)])


def gib(size: int) -> str:
    """1610612736 → "1.5 GiB", 52428800 → "50 MiB"."""
    return f"{size / GIB:.1f} GiB" if size >= GIB else f"{size / 1024**2:.0f} MiB"


def _advice(weights_alone: bool, precisions: set[str]) -> str:
    if weights_alone and "float32" not in precisions:
        return "The weights alone are too large: another device or a smaller checkpoint is needed."
    if weights_alone:
        return "The weights alone are too large; in 16 bits they take half."
    return "A smaller picture or fewer images take less."


def budget_bytes(hardware: Hardware, cap_gib: float | None) -> int:
    """min(free, cap) − reserve: what components and work may take together."""
    free = hardware.free_bytes if cap_gib is None else min(hardware.free_bytes, int(cap_gib * GIB))
    return max(free - RESERVE_BYTES[hardware.device], 0)


def make_plan(
    components: Mapping[str, tuple[int, str]],
    phases: Sequence[tuple[str, Sequence[str], int]],
    *,
    hardware: Hardware,
    cap_gib: float | None = None,
    decisions: Sequence[str] = (),
    passing: Collection[str] = (),
) -> Plan:
    """Plan components (name → bytes as run, precision) and phases (name, the components it uses, bytes of
    work). Those that are `passing` leave the device after their phase."""
    budget = budget_bytes(hardware, cap_gib)
    resident = sum(size for name, (size, _) in components.items() if name not in passing)

    def phase(name: str, used: Sequence[str], work: int) -> PlannedPhase:
        parts = tuple(
            PlannedComponent(
                name=part,
                placement="swapped" if part in passing else "resident",
                precision=components[part][1],
                bytes=components[part][0],
            )
            for part in used
        )
        swapped = sum(part.bytes for part in parts if part.placement == "swapped")
        peak = resident + swapped + work
        return PlannedPhase(name=name, work_bytes=work, peak_bytes=peak, components=parts)

    planned = tuple(phase(*each) for each in phases)
    peak = max(phase.peak_bytes for phase in planned)
    largest = max(planned, key=lambda phase: phase.peak_bytes)
    weights = largest.peak_bytes - largest.work_bytes
    where = hardware.name if hardware.device != "cpu" else "the CPU"
    advice = _advice(weights > budget, {precision for _, precision in components.values()})
    if passing and resident + max(phase.work_bytes for phase in planned) <= budget:
        advice = f"All but {' and '.join(passing)} fits: it can run smaller, or be left out."
    if peak <= budget:
        stays = f"All but {' and '.join(passing)} stays" if passing else "Everything stays"
        verdict = f"{stays} in memory on {where}: {gib(peak)} of the {gib(budget)} at hand."
    else:
        verdict = (
            f"Does not fit {where}: {largest.name} needs {gib(peak)}, {gib(weights)} of it weights, "
            f"and {gib(budget)} is at hand. {advice}"
        )
    return Plan(
        device=hardware.device,
        budget_bytes=budget,
        peak_bytes=peak,
        phases=planned,
        decisions=(verdict, *decisions),
    )
