"""Memory as pictures: the plan's bars and the meter of a run. Everything from outside is escaped here."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from html import escape

from backend.memory.plan import Plan, PlannedComponent, PlannedPhase
from ui import words
from ui.i18n import ENGLISH, Tongue

# One colour a component, in every tab (`.k-…` in style.css): no two that a family's pictures show are alike.
COLOURS = {
    "text_encoder": "clip",
    "text_encoder_2": "clip-2",
    "text_encoder_3": "t5",
    "image_encoder": "eye",
    "unet": "main",
    "transformer": "main",
    "prior": "main",
    "prior_lite": "main",
    "decoder": "detail",
    "decoder_lite": "detail",
    "vae": "pixels",
    "vqgan": "pixels",
}
PLACED = {"resident": "stays", "swapped": "in for its phase", "cpu": "on the CPU, in RAM"}
FAR = 5  # times the peak: a budget beyond would leave nothing to see of the bars
NEAR = 75  # percent of the width that the peak then takes


# ---- the plan


@dataclass(frozen=True)
class Scale:
    """Bytes as percent of the width, the same in every bar. Where the budget is far beyond what is taken the
    axis is `cut`, and the budget stands at its end."""

    end: float
    budget: int
    cut: bool

    @classmethod
    def of(cls, plan: Plan) -> Scale:
        peak = max(plan.peak_bytes, *(phase.peak_bytes for phase in plan.phases), 1)
        if plan.budget_bytes > FAR * peak:
            return cls(peak * 100 / NEAR, plan.budget_bytes, cut=True)
        return cls(max(plan.budget_bytes, peak), plan.budget_bytes, cut=False)

    def percent(self, count: float) -> float:
        return round(100 * min(count / self.end, 1), 2)

    @property
    def limit(self) -> float:
        return 100 if self.cut else self.percent(self.budget)


def picture(plan: Plan, t: Tongue = ENGLISH) -> str:
    """The plan as a bar a phase, and in words."""
    scale = Scale.of(plan)
    verdict, *reasons = map(t.told, plan.decisions or ("",))
    bars = "".join(_phase(plan, phase, scale, t) for phase in plan.phases)
    told = "".join(f"<li>{escape(text)}</li>" for text in reasons)
    fits, kind = ("yes" if plan.fits else "no"), ("bars cut" if scale.cut else "bars")
    return (
        f'<section class="plan" data-fits="{fits}"><h2>{t("Memory plan")}</h2>'
        f'<p class="verdict">{escape(verdict)}</p>'
        f'<div class="{kind}" style="--limit:{scale.limit / 100:.4f}">{_limit(scale, t)}'
        f'<ol class="phases">{bars}</ol></div>'
        f'{_key(plan, t)}<ul class="reasons">{told}</ul></section>'
    )


def no_plan(text: str, t: Tongue = ENGLISH) -> str:
    return f'<section class="plan"><h2>{t("Memory plan")}</h2><p class="problem">{escape(text)}</p></section>'


def _limit(scale: Scale, t: Tongue) -> str:
    """The budget's label, on the side of its line where there is room."""
    side = "before" if scale.limit > 50 else "after"
    return (
        f'<p class="limit {side}"><span>{t("{size} may be used", size=words.size(scale.budget))}</span></p>'
    )


def _phase(plan: Plan, phase: PlannedPhase, scale: Scale, t: Tongue) -> str:
    excess = phase.peak_bytes - plan.budget_bytes
    over = f" <em>{t('{size} too much', size=words.size(excess))}</em>" if excess > 0 else ""
    segments = "".join(
        _segment(_colour(part), part.held_bytes, scale, used) for part, used in _held(plan, phase)
    )
    segments += _segment("work", phase.work_bytes, scale)
    if excess > 0:
        segments += f'<i class="excess" style="left:{scale.limit}%;width:{scale.percent(excess)}%"></i>'
    name, spoken = escape(words.phase(phase.name, t)), escape(_spoken(plan, phase, t))
    taken = words.size(phase.peak_bytes) if phase.peak_bytes else t("nothing")
    return (
        f'<li class="phase{" over" if excess > 0 else ""}">'
        f"<h3>{name} <span>{taken}{over}</span></h3>"
        f'<div class="track" role="img" aria-label="{spoken}">{segments}</div>'
        f'<ul class="parts">{"".join(_parts(plan, phase, t))}</ul></li>'
    )


def _held(plan: Plan, phase: PlannedPhase) -> Iterator[tuple[PlannedComponent, bool]]:
    """What takes memory of the phase's card while it runs, and whether the phase uses it."""
    used = {part.name for part in phase.components}
    cards = {part.device for part in phase.components if part.placement != "cpu"} or {plan.device}
    there = (part for part in plan.held(phase) if part.held_bytes > 0 and part.device in cards)
    return ((part, part.name in used) for part in there)


def _segment(kind: str, count: int, scale: Scale, used: bool = True) -> str:
    idle = "" if used else " idle"
    return f'<i class="k-{kind}{idle}" style="width:{scale.percent(count)}%"></i>' if count else ""


def _parts(plan: Plan, phase: PlannedPhase, t: Tongue) -> Iterator[str]:
    """What the phase uses, what else is there meanwhile, and its work: as in the bar."""
    for part in phase.components:
        how = t(
            "{size}, {bits}, {placed}",
            size=words.size(part.bytes),
            bits=words.precision(part.precision, t),
            placed=_placed(plan, part, t),
        )
        state = "" if part.held_bytes else "none"  # it has no bar
        name = escape(words.part(part.name, t))
        yield f"<li>{_swatch(_colour(part), state)}<b>{name}</b> {escape(how)}</li>"
    for part, used in _held(plan, phase):
        if not used:
            text = f"{words.part(part.name, t)} {words.size(part.held_bytes)}"
            yield f'<li class="unused">{_swatch(_colour(part), "idle")}{escape(text)}</li>'
    if phase.work_bytes:
        yield f"<li>{_swatch('work')}<b>{t('Work')}</b> {words.size(phase.work_bytes)}</li>"


def _placed(plan: Plan, part: PlannedComponent, t: Tongue) -> str:
    """Where a component is, in plain words."""
    mapped = plan.device == "cpu" and part.held_bytes < part.bytes
    if part.placement == "streamed" and not mapped:
        return t("streamed: {share} at once", share=words.share(part.held_bytes, part.bytes, t))
    if part.placement == "streamed":
        return t("read from its file, block by block")
    placed = t(PLACED.get(part.placement, part.placement))
    if mapped and part.held_bytes:
        return t("{size} of it copied", size=words.size(part.held_bytes))
    if mapped:
        return t("read from its file")
    elsewhere = part.device not in (plan.device, f"{plan.device}:0", "cpu")
    return t("{placed}, on {device}", placed=placed, device=part.device) if elsewhere else placed


def _spoken(plan: Plan, phase: PlannedPhase, t: Tongue) -> str:
    """A bar for those who do not see it."""
    excess = phase.peak_bytes - plan.budget_bytes
    parts = [
        f"{words.part(part.name, t)} {words.size(part.held_bytes)}{'' if used else t(', not in use')}"
        for part, used in _held(plan, phase)
    ]
    parts += [f"{t('work')} {words.size(phase.work_bytes)}"] if phase.work_bytes else []
    over = f", {t('{size} too much', size=words.size(excess))}" if excess > 0 else ""
    peak, budget = words.size(phase.peak_bytes), words.size(plan.budget_bytes)
    told = t("{peak} of the {budget} that may be used", peak=peak, budget=budget)
    return f"{words.phase(phase.name, t)}: {told}{over}. {'; '.join(parts)}."


def _key(plan: Plan, t: Tongue) -> str:
    """What the patterns mean, of those that the picture shows."""
    held = [used for phase in plan.phases for _, used in _held(plan, phase)]
    said = []
    if not all(held):
        said.append(f"{_swatch('work', 'idle')}{t('hatched: stays in memory, not in use.')}")
    if plan.device == "cpu" and not all(part.held_bytes for part in plan.components.values()):
        said.append(
            t("Weights that are read where they lie in their files take no memory: they have no bar.")
        )
    return f'<p class="key">{" ".join(said)}</p>' if said else ""


def _colour(part: PlannedComponent) -> str:
    return COLOURS.get(part.name, "other")


def swatch(name: str) -> str:
    """A component's colour, as before its name."""
    return _swatch(COLOURS.get(name, "other"))


def _swatch(kind: str, state: str = "") -> str:
    return f'<i class="swatch k-{kind}{f" {state}" if state else ""}"></i>'


# ---- while it runs


def meter(used: int, plan: Plan, t: Tongue = ENGLISH) -> str:
    """What the run takes now of what it may use; a tick where the plan expects the peak."""
    scale, told = Scale.of(plan), words.share(used, plan.budget_bytes, t)
    spoken = t("{share}, at most {size} planned", share=told, size=words.size(plan.peak_bytes))
    return (
        f'<div class="meter" role="meter" aria-label="{t("Memory")}" aria-valuemin="0" '
        f'aria-valuenow="{used}" '
        f'aria-valuemax="{plan.budget_bytes}" aria-valuetext="{spoken}" title="{spoken}">'
        f"<span>{t('memory')}</span>{gauge(scale.percent(used), scale.percent(plan.peak_bytes))}"
        f"<span>{told}</span></div>"
    )


def gauge(percent: float, tick: float | None = None) -> str:
    mark = "" if tick is None else f'<b style="left:{tick}%"></b>'
    return f'<i class="gauge"><i style="width:{percent}%"></i>{mark}</i>'


def peaks(measured: int, plan: Plan, t: Tongue = ENGLISH) -> str:
    """peak memory 5.1 GiB, planned 5.3 GiB"""
    taken, planned = words.size(measured), words.size(plan.peak_bytes)
    return t("peak memory {taken}, planned {planned}", taken=taken, planned=planned)
