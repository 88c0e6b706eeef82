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
from ui import words

T5 = "text_encoder_3"  # its component
NAMES = {"full": "whole", "int8": "8 bits", "nf4": "4 bits", "off": "off"}
AUTO = "automatic"
HOW = {"streamed": " · streamed", "cpu": " · on the CPU"}
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


def shown(found: dict[str, Price]) -> tuple[list[tuple[str, str]], str]:
    """The choices in words, and beneath them why some cannot be had."""
    auto = found["auto"]
    choices = [(f"{AUTO}: {NAMES[auto.ran]}{_room(auto)}" if auto.plan else f"{AUTO} · not here", "auto")]
    choices += [(f"{name} · {_cost(found[t5])}", t5) for t5, name in NAMES.items()]
    reasons: dict[str, list[str]] = {}
    for t5, price in found.items():
        if price.refused:
            reasons.setdefault(_reason(price.refused), []).append(NAMES.get(t5, AUTO))
    return choices, " ".join([ABOUT, *(f"Not {', '.join(names)}: {why}." for why, names in reasons.items())])


def _cost(price: Price) -> str:
    if price.plan is None:
        return "not here"
    return (words.size(price.part.bytes) if price.part else "nothing") + _room(price)


def _room(price: Price) -> str:
    """How it is made to fit, or that it does not."""
    plan, part = price.plan, price.part
    if plan is None or plan.fits:
        return HOW.get(part.placement, "") if part else ""
    if plan.peak_bytes <= plan.budget_bytes:
        return " · does not fit: RAM is short"
    return f" · does not fit: {words.size(plan.peak_bytes)} in all, {words.size(plan.budget_bytes)} free"


def _reason(text: str) -> str:
    """The reason alone: which choice it is about is said once for all that share it."""
    return re.sub(r"^t5 is '\w+', (and|which) ", "", text).rstrip(".")


def teller(studio: Studio, request_of: Callable[[Sequence[Any]], SD3Request]) -> Callable[..., Any]:
    """The handler that writes the costs beside the choices; the choice itself stays."""

    def tell(*values: Any) -> Any:
        try:
            choices, info = shown(prices(studio, request_of(values)))
        except Exception:  # noqa: BLE001 (the plan, asked for at the same time, says what is wrong)
            choices, info = CHOICES, ABOUT
        return gr.update(choices=choices, info=info)

    return tell
