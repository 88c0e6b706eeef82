"""The Models tab: what the machine has, what is loaded and where, which checkpoints are known by name."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

import gradio as gr

from backend import Hardware, Studio, catalog
from backend.catalog import CatalogueEntry
from backend.errors import TriptychError
from backend.manager import LoadedPart
from backend.weights.base import keys_of
from backend.weights.source import resolve
from ui import memory, render, words

EVERYTHING = ""  # as a key: all that is not in use
# A click on a button that bears a key, and on nothing else.
FREE = """element.addEventListener('click', (event) => {
  const button = event.target.closest('button[data-key]');
  if (button) { button.disabled = true; trigger('click', {key: button.dataset.key}); }
});"""
# The button that was pressed is gone: the line that says what came of it is where the keyboard goes on.
TOLD = "() => requestAnimationFrame(() => document.querySelector('.models .told')?.focus())"
KINDS = {"cpu": "Processor", "cuda": "Graphics card", "mps": "Graphics processor"}
ALLOWS = {"bf16": "16 bit (bfloat16)", "fp8": "8 bit (fp8)"}
NATIVE = "bfloat16"  # 16 bits, in which the catalogue's sizes are given


def tab(studio: Studio) -> None:
    """The tab, filled anew whenever it is opened."""
    quiet: dict[str, Any] = {"queue": False, "show_progress": "hidden", "api_visibility": "private"}
    with gr.Tab("Models", id="models") as opened:
        page = gr.HTML(elem_classes="models-page", js_on_load=FREE)
        again = gr.Button("Look again", size="sm", elem_classes="quiet look-again")
    gr.on([opened.select, again.click], lambda: shown(studio), None, page, **quiet)
    if not studio.settings.public:
        freed = page.click(freeing(studio), None, page, **quiet)
        freed.then(None, js=TOLD, **quiet)


def freeing(studio: Studio) -> Callable[[gr.EventData], str]:
    """The handler of the Free buttons."""

    def free(event: gr.EventData) -> str:
        return shown(studio, freed(studio, _key(event)))

    return free


def _key(event: gr.EventData) -> str | None:
    """What the button bears; whoever posts to the handler by other ways may send anything."""
    data = event._data
    key = data.get("key") if isinstance(data, dict) else None
    return key if isinstance(key, str) else None


def freed(studio: Studio, key: str | None) -> str:
    """Free what the key names → what came of it, in words. In public mode nothing: strangers would take away
    what others wait for."""
    if studio.settings.public:
        return "On this public server nothing is freed from the page."
    parts = {part.key: part for part in studio.loaded()}
    if key == EVERYTHING:
        studio.free(None)
        left = sum(part.lent for part in studio.loaded())
        return "Freed what was not in use." if left else "Freed everything."
    part = parts.get(key) if key is not None else None
    if part is None:
        return "That is no longer loaded."
    name = words.the_part(part.name)
    if studio.free(part.key):
        return f"Freed {name}: {words.size(part.bytes)}."
    return f"Not freed: a picture is being made with {name}."


def shown(studio: Studio, told: str = "") -> str:
    """All that the tab says, as HTML."""
    try:
        hardware, budget, parts = studio.hardware(), studio.budget_bytes(), studio.loaded()
    except TriptychError as error:
        return f'<section class="models"><p class="problem" role="alert">{escape(str(error))}</p></section>'
    line = f'<p class="told" role="status" tabindex="-1">{escape(told)}</p>' if told else ""
    return (
        f'<section class="models"><h2>This machine</h2>{machine(hardware, budget)}'
        f"<h2>In memory</h2>{line}{loaded(parts, public=studio.settings.public)}"
        f"<h2>Checkpoints</h2>{''.join(_family(studio, family) for family in catalog.FAMILIES)}</section>"
    )


# ---- the machine


def machine(hardware: Hardware, budget: int) -> str:
    """Device and memory, as a list of facts."""
    device = hardware.device
    facts = [(KINDS.get(device, device), escape(hardware.name))]
    if device != "cpu":
        facts.append(("Its memory", _room(hardware.total_bytes, hardware.free_bytes)))
    facts.append(("RAM", _room(hardware.ram_bytes, hardware.ram_free_bytes)))
    facts.append(("For pictures", f"{words.size(budget)} may be used now"))
    facts.append(("Runs fast here", escape(", ".join(ALLOWS.get(what, what) for what in hardware.allows))))
    facts += [
        (f"Also {escape(card.device)}", f"{escape(card.name)} {_room(card.total_bytes, card.free_bytes)}")
        for card in hardware.others
    ]
    return f"<dl>{''.join(f'<dt>{name}</dt><dd>{fact}</dd>' for name, fact in facts if fact)}</dl>"


def _room(total: int, free: int) -> str:
    taken = round(100 * (total - free) / total, 1) if total else 0
    return f"{memory.gauge(taken)} {words.share(free, total)} free"


# ---- what is loaded


def loaded(parts: Sequence[LoadedPart], *, public: bool) -> str:
    """A row a part, the largest first, with a button that frees it unless strangers look."""
    if not parts:
        return "<p>Nothing: what a picture needs is loaded when it is asked for, and stays if it may.</p>"
    heads = ("Part", "Checkpoint", "Precision", "Where", "Size", *(() if public else ("",)))
    rows = (_loaded(part, public) for part in sorted(parts, key=lambda part: -part.bytes))
    total = f"{words.size(sum(part.bytes for part in parts))} in all."
    everything = "" if public else f' <button type="button" data-key="{EVERYTHING}">Free everything</button>'
    return f"{_table(heads, rows)}<p>{total}{everything}</p>"


def _loaded(part: LoadedPart, public: bool) -> list[str]:
    name = escape(words.part(part.name))
    row = [
        f"{memory.swatch(part.name)}{name}",
        _checkpoint(part),
        escape(words.precision(part.precision)),
        escape(_where(part)),
        words.size(part.bytes),
    ]
    label = f"Free {escape(words.the_part(part.name))} of {_checkpoint(part)}"
    button = f'<button type="button" data-key="{escape(part.key)}" aria-label="{label}">Free</button>'
    return row if public else [*row, "in use" if part.lent else button]


def _checkpoint(part: LoadedPart) -> str:
    """Every family has a demo."""
    title = catalog.FAMILIES[part.family].title if part.family in catalog.FAMILIES else ""
    return escape(f"{part.checkpoint}, {title}" if part.checkpoint == "demo" else part.checkpoint)


def _where(part: LoadedPart) -> str:
    if part.where == "RAM":
        return "in RAM, waiting" if part.placement == "swapped" else "in RAM"
    if part.where == "cpu":
        return "in RAM"
    if part.where == "file":
        return "in its file"
    card = "on the card" if part.where in ("cuda", "mps", "cuda:0") else f"on {part.where}"
    return f"{card}, streamed" if part.placement == "streamed" else card


# ---- checkpoints


@dataclass(frozen=True)
class Known:
    """A catalogued checkpoint: its parts, their bytes at 16 bits, and which of them are not here."""

    entry: CatalogueEntry
    parts: tuple[str, ...]
    bytes: int
    lacking: tuple[str, ...]

    @classmethod
    def of(cls, studio: Studio, entry: CatalogueEntry) -> Known:
        """Lite stages count neither way: they stand in for the full ones. Raises CheckpointError for one that
        is damaged."""
        source, keys = resolve(entry.name, entry.family, studio.settings), keys_of(entry.family)
        full = (name for name in keys.COMPONENTS if name not in keys.LITE.values())
        parts = tuple(name for name in full if source.has(name))
        size = sum(source.parameter_bytes(name, NATIVE) for name in parts)
        return cls(entry, parts, size, tuple(name for name in parts if not source.present([name], NATIVE)))

    @property
    def here(self) -> str:
        if self.entry.bundled:
            return "comes with Triptych"
        if not self.lacking:
            return "here"
        if self.lacking == self.parts:
            return "not downloaded"
        return f"here, but for {', '.join(map(words.the_part, self.lacking))}"


def _family(studio: Studio, family: str) -> str:
    rows = [_row(studio, entry) for entry in catalog.entries(family)]
    table = _table(("Name", "Size", "Licence", "On this machine"), rows)
    return f"<h3>{escape(catalog.FAMILIES[family].title)}</h3>{table}"


def _row(studio: Studio, entry: CatalogueEntry) -> list[str]:
    title = render.linked(entry.title, entry.url)
    try:
        known = Known.of(studio, entry)
        size, here = words.size(known.bytes), known.here
    except TriptychError as error:
        size, here = "", str(error)
    return [f"{title}<small>{escape(entry.name)}</small>", size, escape(entry.licence), escape(here)]


def _table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Cells are HTML; each bears its column's name, for the narrow page where a row becomes a card."""
    head = "".join(f'<th scope="col">{name}</th>' for name in heads)
    body = "".join(
        "<tr>"
        + "".join(f'<td data-label="{name}">{cell}</td>' for name, cell in zip(heads, row, strict=True))
        + "</tr>"
        for row in rows
    )
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
