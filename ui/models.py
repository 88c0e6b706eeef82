"""The Models tab: what the machine has, what is loaded and where, which checkpoints there are."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from html import escape
from typing import Any

import gradio as gr

from backend import Hardware, Studio, catalog
from backend.downloads import WAITING, Downloads
from backend.errors import TriptychError
from backend.manager import LoadedPart
from ui import checkpoints, i18n, memory, words
from ui.checkpoints import answer, button, table
from ui.i18n import ENGLISH, Tongue, label
from ui.theme import ASSETS

EVERYTHING = ""  # as a key: all that is not in use
SCRIPT = (ASSETS / "models.js").read_text(encoding="utf-8")
KINDS = {"cpu": "Processor", "cuda": "Graphics card", "mps": "Graphics processor"}
ALLOWS = {"bf16": "16 bit (bfloat16)", "fp8": "8 bit (fp8)"}


def tab(studio: Studio, downloads: Downloads) -> None:
    """The tab, filled anew whenever it is opened. Strangers only see which checkpoints there are."""
    quiet: dict[str, Any] = {"queue": False, "show_progress": "hidden", "api_visibility": "private"}
    public = studio.settings.public
    with gr.Tab(label("Models"), id="models") as opened:
        page = gr.HTML(elem_classes="models-page", js_on_load=SCRIPT, visible=not public)
        shelf = gr.HTML(elem_classes="models-page", js_on_load=SCRIPT)
        own = gr.HTML(elem_classes="models-page", js_on_load=None, visible=not public)
        again = gr.Button(label("Look again"), size="sm", elem_classes="quiet look-again")

    def look(asker: gr.Request) -> tuple[str, str, str]:
        t = i18n.of(asker)
        return (
            shown(studio, t),
            checkpoints.shelf(studio, downloads, t),
            checkpoints.own(studio.settings, t),
        )

    gr.on([opened.select, again.click], look, None, [page, shelf, own], **quiet)
    if public:
        return

    def refresh(asker: gr.Request) -> str:
        return checkpoints.shelf(studio, downloads, i18n.of(asker))

    page.click(freeing(studio), None, page, **quiet)
    shelf.click(acting(studio, downloads), None, [page, shelf], **quiet)
    shelf.tick(refresh, None, shelf, **quiet)  # models.js asks, while something is downloaded and seen


def freeing(studio: Studio) -> Callable[[gr.EventData, gr.Request], str]:
    """The handler of the Free buttons."""

    def free(event: gr.EventData, asker: gr.Request) -> str:
        t, key = i18n.of(asker), _said(event, "key")
        return shown(studio, t, freed(studio, key, t), key or "")

    return free


def acting(studio: Studio, downloads: Downloads) -> Callable[[gr.EventData, gr.Request], tuple[str, str]]:
    """The handler of the buttons at the checkpoints."""

    def act(event: gr.EventData, asker: gr.Request) -> tuple[str, str]:
        t, key = i18n.of(asker), _said(event, "key") or ""
        told = acted(downloads, _said(event, "do"), key, t)
        return shown(studio, t), checkpoints.shelf(studio, downloads, t, told, key)

    return act


def _said(event: gr.EventData, name: str) -> str | None:
    """What the button bears; whoever posts to the handler by other ways may send anything."""
    data = event._data
    value = data.get(name) if isinstance(data, dict) else None
    return value if isinstance(value, str) else None


def freed(studio: Studio, key: str | None, t: Tongue = ENGLISH) -> str:
    """Free what the key names → what came of it, in words. In public mode nothing: strangers would take away
    what others wait for."""
    if studio.settings.public:
        return t("On this public server nothing is freed from the page.")
    parts = {part.key: part for part in studio.loaded()}
    if key == EVERYTHING:
        studio.free(None)
        left = sum(part.lent for part in studio.loaded())
        return t("Freed what was not in use.") if left else t("Freed everything.")
    part = parts.get(key) if key is not None else None
    if part is None:
        return t("That is no longer loaded.")
    name = words.the_part(part.name, t)
    if studio.free(part.key):
        return t("Freed {part}: {size}.", part=name, size=words.size(part.bytes))
    return t("Not freed: a picture is being made with {part}.", part=name)


def acted(downloads: Downloads, act: str | None, key: str, t: Tongue = ENGLISH) -> str:
    """Begin, pause or remove the checkpoint that the key names → what came of it, in words."""
    family, _, name = key.partition("/")
    entry = catalog.entry(family, name)
    title = entry.title if entry else name
    try:
        if act == "start":
            downloads.start(family, name)
            status = downloads.status(family, name)
            if status is not None and status.state == WAITING and len(downloads.line()) > 1:
                return t("{title} is downloaded when those before it are here.", title=title)
            return t("{title} is being downloaded.", title=title)
        if act == "pause":
            downloads.pause(family, name)
            return t("The download of {title} is paused; it goes on from there.", title=title)
        if act == "remove":
            size = words.size(downloads.remove(family, name))
            return t("Removed {title}: {size} are free.", title=title, size=size)
    except TriptychError as error:
        return t.told(str(error))
    return t("That is nothing that can be done here.")


def shown(studio: Studio, t: Tongue = ENGLISH, told: str = "", about: str = "") -> str:
    """The machine and what is in its memory, as HTML; `told` is what came of a click on the button whose key
    is `about`."""
    if studio.settings.public:
        return ""
    try:
        hardware, budget, parts = studio.hardware(), studio.budget_bytes(), studio.loaded()
    except TriptychError as error:
        problem = escape(t.told(str(error)))
        return f'<section class="models"><p class="problem" role="alert">{problem}</p></section>'
    return (
        f'<section class="models"><h2>{t("This machine")}</h2>{machine(hardware, budget, t)}'
        f"<h2>{t('In memory')}</h2>{answer(told, about)}{loaded(parts, t)}</section>"
    )


# ---- the machine


def machine(hardware: Hardware, budget: int, t: Tongue = ENGLISH) -> str:
    """Device and memory, as a list of facts."""
    device = hardware.device
    facts = [(t.told(KINDS.get(device, device)), escape(hardware.name))]
    if device != "cpu":
        facts.append((t("Its memory"), _room(hardware.total_bytes, hardware.free_bytes, t)))
    facts.append((t("RAM"), _room(hardware.ram_bytes, hardware.ram_free_bytes, t)))
    facts.append((t("For pictures"), t("{size} may be used now", size=words.size(budget))))
    fast = ", ".join(t.told(ALLOWS.get(what, what)) for what in hardware.allows)
    facts.append((t("Runs fast here"), escape(fast)))
    facts += [
        (
            escape(t("Also {device}", device=card.device)),
            f"{escape(card.name)} {_room(card.total_bytes, card.free_bytes, t)}",
        )
        for card in hardware.others
    ]
    return f"<dl>{''.join(f'<dt>{name}</dt><dd>{fact}</dd>' for name, fact in facts if fact)}</dl>"


def _room(total: int, free: int, t: Tongue) -> str:
    taken = round(100 * (total - free) / total, 1) if total else 0
    return f"{memory.gauge(taken)} {t('{share} free', share=words.share(free, total, t))}"


# ---- what is loaded


def loaded(parts: Sequence[LoadedPart], t: Tongue = ENGLISH) -> str:
    """A row a part, the largest first, with a button that frees it."""
    if not parts:
        nothing = t("Nothing: what a picture needs is loaded when it is asked for, and stays if it may.")
        return f"<div><p>{nothing}</p></div>"
    columns = ("part", "checkpoint", "precision", "where", "size", "do")
    heads = (t("Part"), t("Checkpoint"), t("Precision"), t("Where"), t("Size"), "")
    rows = [_loaded(part, t) for part in sorted(parts, key=lambda part: -part.bytes)]
    total = t("{size} in all.", size=words.size(sum(part.bytes for part in parts)))
    everything = button(t("Free everything"), t("Free everything"), "free", EVERYTHING)
    return f"<div>{table(columns, heads, rows)}<p><bdi>{total}</bdi> {everything}</p></div>"


def _loaded(part: LoadedPart, t: Tongue) -> list[str]:
    name, owner = words.the_part(part.name, t), _checkpoint(part)
    text = t("Free {part} of {checkpoint}", part=name, checkpoint=owner)
    free = t("in use") if part.lent else button(t("Free"), text, "free", part.key)
    return [
        f"{memory.swatch(part.name)}{escape(words.part(part.name, t))}",
        escape(owner),
        escape(words.precision(part.precision, t)),
        escape(_where(part, t)),
        words.size(part.bytes),
        free,
    ]


def _checkpoint(part: LoadedPart) -> str:
    """Every family has a demo."""
    title = catalog.FAMILIES[part.family].title if part.family in catalog.FAMILIES else ""
    return f"{part.checkpoint}, {title}" if part.checkpoint == "demo" else part.checkpoint


def _where(part: LoadedPart, t: Tongue) -> str:
    if part.where == "RAM":
        return t("in RAM, waiting") if part.placement == "swapped" else t("in RAM")
    if part.where == "cpu":
        return t("in RAM")
    if part.where == "file":
        return t("in its file")
    first = part.where in ("cuda", "mps", "cuda:0")
    card = t("on the card") if first else t("on {device}", device=part.where)
    return t("{where}, streamed", where=card) if part.placement == "streamed" else card
