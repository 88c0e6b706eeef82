"""What T5, Stable Diffusion 3's largest text encoder, costs on this machine: one plan a choice."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import gradio as gr

from backend import Studio
from backend.errors import TriptychError
from backend.memory.plan import Plan, PlannedComponent
from backend.requests import SD3Request
from ui import i18n, words
from ui.i18n import ENGLISH, Tongue

T5 = "text_encoder_3"  # its component
NAMES = {"full": "whole", "int8": "8 bits", "nf4": "4 bits", "off": "off"}
AUTO = "automatic"
HOW = {"streamed": "streamed", "cpu": "on the CPU"}
CHOICES = [(AUTO, "auto"), *((name, t5) for t5, name in NAMES.items())]  # before anything is known
ABOUT = (
    "The largest of the three text encoders: with it long prompts and lettering come out right. It works only"
    " while a prompt is read for the first time."
)


@dataclass(frozen=True, kw_only=True)
class Price:
    """How T5 would run: None for a choice that cannot be had, and then why."""

    plan: Plan | None = None
    refused: str = ""

    @property
    def part(self) -> PlannedComponent | None:
        return self.plan.components.get(T5) if self.plan else None

    @property
    def ran(self) -> str:
        if self.part is None:
            return "off"
        return self.part.precision if self.part.precision in NAMES else "full"


def prices(studio: Studio, request: SD3Request) -> dict[str, Price]:
    """What each choice costs, all else as asked for. Raises TriptychError for a request that cannot be
    served whatever T5 does."""
    found = {"off": Price(plan=studio.plan(replace(request, t5="off")))}
    for t5 in ("auto", "full", "int8", "nf4"):
        try:
            found[t5] = Price(plan=studio.plan(replace(request, t5=t5)))
        except TriptychError as error:
            found[t5] = Price(refused=str(error))
    return found


def shown(found: dict[str, Price], t: Tongue = ENGLISH) -> tuple[list[tuple[str, str]], str]:
    """The choices in words, and beneath them why some cannot be had."""
    auto = found["auto"]
    how = f": {t(NAMES[auto.ran])}{_room(auto, t)}" if auto.plan else f" · {t('not here')}"
    choices = [(f"{t(AUTO)}{how}", "auto")]
    choices += [(f"{t(name)} · {_cost(found[t5], t)}", t5) for t5, name in NAMES.items()]
    reasons: dict[str, list[str]] = {}
    for t5, price in found.items():
        if price.refused:
            reasons.setdefault(t.told(_reason(price.refused)), []).append(t(NAMES.get(t5, AUTO)))
    told = (t("Not {names}: {why}.", names=", ".join(names), why=why) for why, names in reasons.items())
    return choices, " ".join([t(ABOUT), *told])


def _cost(price: Price, t: Tongue) -> str:
    if price.plan is None:
        return t("not here")
    return (words.size(price.part.bytes) if price.part else t("nothing")) + _room(price, t)


def _room(price: Price, t: Tongue) -> str:
    """How it is made to fit, or that it does not."""
    plan, part = price.plan, price.part
    if plan is None or plan.fits:
        how = HOW.get(part.placement, "") if part else ""
        return f" · {t(how)}" if how else ""
    if plan.peak_bytes <= plan.budget_bytes:
        return f" · {t('does not fit: RAM is short')}"
    taken, free = words.size(plan.peak_bytes), words.size(plan.budget_bytes)
    return f" · {t('does not fit: {taken} in all, {free} free', taken=taken, free=free)}"


def _reason(text: str) -> str:
    """The reason alone: which choice it is about is said once for all that share it."""
    return re.sub(r"^t5 is '\w+', (and|which) ", "", text).rstrip(".")


def teller(studio: Studio, request_of: Callable[[Sequence[Any]], SD3Request]) -> Callable[..., Any]:
    """The handler that writes the costs beside the choices; the choice itself stays."""

    def tell(page: gr.Request, *values: Any) -> Any:
        t = i18n.of(page)
        try:
            choices, info = shown(prices(studio, request_of(values)), t)
        except Exception:  # noqa: BLE001 (the plan, asked for at the same time, says what is wrong)
            choices, info = [(t(name), value) for name, value in CHOICES], t(ABOUT)
        return gr.update(choices=choices, info=info)

    return tell
