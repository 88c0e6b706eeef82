"""The History tab: pictures kept, in pages; a viewer, two of them compared, settings taken from PNG files.
What is written here, assets/history.js walks through."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any
from urllib.parse import quote

import gradio as gr

from backend import Studio, catalog, infotext
from backend.errors import InvalidRequest, StorageError
from backend.gallery import Entry, Gallery
from backend.requests import REQUESTS
from ui import i18n
from ui.i18n import Tongue, label
from ui.theme import ASSETS
from ui.visitors import visitor

PAGE = 48  # pictures at once: rows of two, three, four, six and eight are all full
MOST_NAMES, MOST_LETTERS = 8, 40  # of fields that a text has and nobody here knows
MOST_ALT = 120  # letters of a prompt that are read out
SCRIPT = (ASSETS / "history.js").read_text(encoding="utf-8")
ISOLATED = "\u2066", "\u2069"  # what is between them runs from left to right in every language
POINTS = {"de": ".", "it": "."}  # between thousands; elsewhere a comma

log = logging.getLogger("triptych")

# Makes the updates that open a family's tab with these settings.
Restore = Callable[[gr.Request, str, dict[str, Any]], list[Any]]


def tab(studio: Studio, restore: Restore, outputs: Sequence[Any]) -> None:
    """The tab, filled anew whenever it is opened. `restore` makes the updates of `outputs`."""
    private: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private"}
    at_once: dict[str, Any] = {
        **private,
        "queue": False,
    }  # a note in the corner of the page comes through the queue alone
    shelf = Shelf(studio, restore, len(outputs))
    # Its children stay once they were seen: a PNG that is dropped on any tab goes to the field in this one.
    with gr.Tab(label("History"), id="history", render_children=True) as opened:
        with gr.Row(elem_classes="history-bar"):
            search = gr.Textbox(
                label=label("Search"),
                placeholder=label("words of the prompt"),
                max_lines=1,
                elem_classes="history-search",
            )
            only = gr.Checkbox(label=label("Favourites only"), elem_classes="history-only")
            file = gr.File(
                label=label("Drop a PNG here to restore its settings"),
                file_types=[".png"],
                type="filepath",
                elem_id="restore-png",
                elem_classes="restore-png",
            )
        sheet = gr.HTML(elem_classes="history-sheet", js_on_load=SCRIPT)
    asked = [search, only]
    gr.on(
        [opened.select, search.change, search.submit, only.change],
        shelf.newest,
        asked,
        sheet,
        trigger_mode="always_last",
        **at_once,
    )
    sheet.act(shelf.act, asked, sheet, trigger_mode="multiple", **at_once)
    sheet.reuse(shelf.reuse, None, outputs, **private)
    file.upload(shelf.read, file, [file, *outputs], **private)


@dataclass(frozen=True)
class Shelf:
    """The handlers. Whoever posts to them by other ways than the page may send anything."""

    studio: Studio
    restore: Restore
    width: int  # of what `restore` makes

    def newest(self, page: gr.Request, search: Any, favourites: Any) -> str:
        """The newest pictures of whoever asks."""
        return self._shown(page, search, favourites)

    def act(self, page: gr.Request, search: Any, favourites: Any, event: gr.EventData) -> str:
        """Another page of the list, or a change of one picture."""
        asked, t = _asked(event), i18n.of(page)
        told = self._changed(page, asked, t)
        start = asked.get("start")
        return self._shown(page, search, favourites, start if type(start) is int else 0, told)

    def _changed(self, page: gr.Request, asked: Mapping[str, Any], t: Tongue) -> str:
        """What came of it, as HTML; nothing for what shows itself."""
        gallery, owner = self.studio.gallery, self._owner(page)
        name = _text(asked.get("name"))
        try:
            match asked.get("deed"):
                case "favourite":
                    done = gallery.favourite(name, asked.get("on") is True, owner)
                    return "" if done else t("That picture is no longer there.")
                case "delete" if gallery.delete(name, owner):
                    return f"{t('Deleted.')} {_button(t('Undo'), deed='undelete', name=name)}"
                case "undelete" if gallery.undelete(name, owner):
                    return t("It is back.")
                case "delete" | "undelete":
                    return t("That picture is no longer there.")
        except StorageError as error:
            return escape(self._explained(error, t))
        return ""

    def reuse(self, page: gr.Request, event: gr.EventData) -> list[Any]:
        """Open the picture's tab with the settings that it was made with."""
        t = i18n.of(page)
        try:
            entry = self.studio.gallery.entry(_text(_asked(event).get("name")), self._owner(page))
        except StorageError as error:
            entry = None
            log.warning("%s", error)
        if entry is None or not _is_ours(entry):
            gr.Warning(t("That picture is no longer there."))
            return self._blank()
        settings = settings_of(entry)
        if settings.get("images"):
            gr.Info(t("Its image prompts were not kept: add them again."))
            settings = settings | {"images": []}
        return self._restored(page, entry.family, settings)

    def read(self, page: gr.Request, path: Any) -> list[Any]:
        """Open the tab that a PNG file belongs to, with its settings."""
        t = i18n.of(page)
        if not isinstance(path, str):
            return [None, *self._blank()]
        try:
            restored = infotext.of_file(Path(path))
        except InvalidRequest as error:
            gr.Warning(escape(t.told(str(error))))
            return [None, *self._blank()]
        settings, refused = dict(restored.settings), list(restored.refused)
        if self.studio.settings.public and not catalog.entry(
            restored.family, settings.get("checkpoint", "demo")
        ):
            del settings["checkpoint"]
            refused.append("Model")
        gr.Info(escape(in_words(restored, refused, t)), duration=15)
        return [None, *self._restored(page, restored.family, settings | {"num_images": 1})]

    def _restored(self, page: gr.Request, family: str, settings: dict[str, Any]) -> list[Any]:
        t = i18n.of(page)
        if settings.get("loras") and settings.get("raw_prompt"):  # other programs can ask for both
            gr.Info(t("Its LoRAs are left out: name them in the prompt, and switch off Raw prompt."))
        return self.restore(page, family, settings)

    def _blank(self) -> list[Any]:
        return [gr.skip()] * self.width

    def _owner(self, page: gr.Request) -> str | None:
        """In private mode everybody's pictures are listed; who is unknown in public mode finds none."""
        settings = self.studio.settings
        return visitor(page, settings).session if settings.public else None

    def _shown(self, page: gr.Request, search: Any, favourites: Any, start: int = 0, told: str = "") -> str:
        t, gallery = i18n.of(page), self.studio.gallery
        try:
            sheet = Sheet.of(gallery, _text(search), favourites is True, start, self._owner(page))
        except StorageError as error:
            problem = f'<p class="problem" role="alert">{escape(self._explained(error, t))}</p>'
            return f'<section class="history">{problem}</section>'
        return sheet.html(t, told)

    def _explained(self, error: StorageError, t: Tongue) -> str:
        """Paths are nobody's business on a public server."""
        if self.studio.settings.public:
            log.warning("%s", error)
            return t("The history cannot be read just now. The pictures are safe.")
        return t.told(str(error))


def settings_of(entry: Entry) -> dict[str, Any]:
    """The settings that make the very picture again; one that was only found tells of them in its text."""
    facts = entry.facts if "prompt" in entry.facts else infotext.understand(entry.parameters).settings
    return {**facts, "num_images": 1}


def in_words(restored: infotext.Restored, refused: Sequence[str], t: Tongue) -> str:
    """What was restored, and what of the text was not, in words."""
    words = [t("Restored into {family}.", family=catalog.FAMILIES[restored.family].title)]
    if restored.unknown:
        words.append(t("Not known here: {names}.", names=_names(restored.unknown, t)))
    if refused:
        words.append(t("Of no use here: {names}.", names=_names(refused, t)))
    return " ".join(words)


def _names(names: Sequence[str], t: Tongue) -> str:
    shown = [name if len(name) <= MOST_LETTERS else f"{name[:MOST_LETTERS]}…" for name in names[:MOST_NAMES]]
    more = len(names) - len(shown)
    return ", ".join([*shown, *([t("{n} more", n=more)] if more else [])])


def _asked(event: gr.EventData) -> dict[str, Any]:
    return event._data if isinstance(event._data, dict) else {}


def _text(value: Any) -> str:
    return value if isinstance(value, str) else ""


def _is_ours(entry: Entry) -> bool:
    """Whether there are settings to go back to: anything may lie in the folder."""
    return entry.family in REQUESTS


# ---- what is shown


@dataclass(frozen=True)
class Sheet:
    """A page of the list."""

    entries: Sequence[Entry]
    start: int
    count: int
    search: str
    favourites: bool

    @classmethod
    def of(cls, gallery: Gallery, search: str, favourites: bool, start: int, owner: str | None) -> Sheet:
        """The page with the picture of that number, or the last that there is. Raises StorageError."""
        count = gallery.count(search, owner=owner, favourites=favourites)
        start = max(min(start, count - 1), 0) // PAGE * PAGE
        entries = gallery.entries(search, PAGE, start, owner=owner, favourites=favourites)
        return cls(entries, start, count, search, favourites)

    def html(self, t: Tongue, told: str = "") -> str:
        """`told` is HTML: what came of the last click."""
        line = f'<p class="told" role="status" tabindex="-1">{told}</p>'
        tiles = "".join(_tile(entry, t) for entry in self.entries)
        shown = (
            f'<ul class="tiles">{tiles}</ul>{self._pages(t) if self.count > PAGE else ""}'
            if tiles
            else self._empty(t)
        )
        inner = f'<div class="line">{self._pages(t)}{line}</div>{shown}{_picking(t)}{_viewer(t)}{_compare(t)}'
        data = f'data-start="{self.start}" data-count="{self.count}" data-page="{PAGE}"'
        return f'<section class="history" {data}>{inner}</section>'

    def _pages(self, t: Tongue) -> str:
        """Where one is, and the ways to newer and to older pictures."""
        if not self.entries:
            return '<nav class="pages"></nav>'
        last = self.start + len(self.entries)
        before, after = ISOLATED if t.code == "ar" else ("", "")
        where = t(
            "{first}–{last} of {count}",
            first=before + number(self.start + 1, t),
            last=number(last, t) + after,
            count=number(self.count, t),
        )
        if self.count <= PAGE:
            pictures = t("1 picture") if self.count == 1 else t("{n} pictures", n=number(self.count, t))
            return f'<nav class="pages"><span>{pictures}</span></nav>'
        newer = _button(t("Newer"), deed="page", start=self.start - PAGE, disabled=self.start == 0)
        older = _button(t("Older"), deed="page", start=self.start + PAGE, disabled=last >= self.count)
        return (
            f'<nav class="pages" aria-label="{escape(t("Pages"))}">{newer}<span>{where}</span>{older}</nav>'
        )

    def _empty(self, t: Tongue) -> str:
        """What to do where there is nothing to see."""
        if self.search.strip():
            text = t(
                "No picture has all of these words in its prompt. Try fewer of them, or only a part of one."
            )
        elif self.favourites:
            text = t("No favourites yet: open a picture and press Favourite.")
        else:
            text = t(
                "Nothing here yet: every picture that you make is kept here. Begin in one of the other tabs."
            )
        return f'<p class="empty">{escape(text)}</p>'


def number(value: int, t: Tongue) -> str:
    """5231 → 5,231, with the point that the language has."""
    return f"{value:,}".replace(",", POINTS.get(t.code, ","))


def _tile(entry: Entry, t: Tongue) -> str:
    """A picture in small, and what the viewer says of it."""
    name = quote(entry.name)
    what = entry.prompt.strip()[:MOST_ALT] or t("a picture without a prompt")
    data = {
        "name": entry.name,
        "full": f"pictures/{name}",
        "file": entry.file.name,
        "favourite": str(entry.favourite).lower(),
        "usable": str(_is_ours(entry)).lower(),
        "ratio": f"{_ratio(entry):.4f}",
    }
    attributes = " ".join(f'data-{key}="{escape(value)}"' for key, value in data.items())
    star = '<b aria-hidden="true">★</b>' if entry.favourite else ""
    said = f"{t('Favourite')}: {what}" if entry.favourite else what
    return (
        f'<li><button type="button" class="thumb" {attributes} aria-label="{escape(said)}">'
        f'<img src="thumbnails/{name}" alt="" loading="lazy" decoding="async" width="320" height="320">{star}'
        f'</button><div class="details" hidden>{_details(entry, t)}</div></li>'
    )


def _details(entry: Entry, t: Tongue) -> str:
    """Prompt and settings in words."""
    info = infotext.parse(entry.parameters)
    prompt = escape(entry.prompt) or f"<i>{escape(t('no prompt'))}</i>"
    without = ""
    if info.negative_prompt:
        text = f'<span dir="auto">{escape(info.negative_prompt)}</span>'
        without = f'<p class="without"><b>{escape(t("Without"))}</b> {text}</p>'
    when = time.localtime(entry.created)
    moment = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(entry.created))
    facts = {t("Made"): f'<time datetime="{moment}">{time.strftime("%Y-%m-%d %H:%M", when)}</time>'}
    if _is_ours(entry):
        facts[t("Model")] = escape(catalog.FAMILIES[entry.family].title)
    words = _words(t)
    hidden = ("Version", infotext.HASHES)
    facts |= {words.get(key, key): escape(value) for key, value in info.fields.items() if key not in hidden}
    rows = "".join(f"<dt>{escape(key)}</dt><dd>{value}</dd>" for key, value in facts.items())
    return f'<p class="prompt" dir="auto">{prompt}</p>{without}<dl>{rows}</dl>'


def _words(t: Tongue) -> dict[str, str]:
    """The fields of a picture's text as the page calls them."""
    return {
        "Steps": t("Steps"),
        "Sampler": t("Sampler"),
        "CFG scale": t("Guidance"),
        "Seed": t("Seed"),
        "Size": t("Size"),
        "Model": t("Checkpoint"),
        "Decoder steps": t("Detail steps"),
        "Decoder CFG scale": t("Detail guidance"),
        "Stage C": t("Size of Stage C"),
        "Stage B": t("Size of Stage B"),
        "Image prompts": t("Image prompts"),
        "Shift": t("Shift"),
        "T5": "T5",
        "Max sequence length": t("Prompt length for T5"),
        "Skip layer guidance": t("Skip-layer guidance"),
        "Clip skip": t("CLIP skip"),
        "Raw prompt": t("Raw prompt"),
    }


def _ratio(entry: Entry) -> float:
    """Width over height, as far as it is known before the picture is loaded."""
    width, height = entry.facts.get("width"), entry.facts.get("height")
    if isinstance(width, int) and isinstance(height, int) and width > 0 < height:
        return width / height
    return 1.0


def _viewer(t: Tongue) -> str:
    """The parts of the dialog, which the script fills and shows."""
    deeds = [
        _button(t("Use these settings"), deed="reuse", kind="primary"),
        _button(t("Favourite"), deed="favourite"),
        f'<a data-deed="download" download>{escape(t("Download"))}</a>',
        _button(t("Compare"), deed="compare"),
        _button(t("Delete"), deed="delete"),
    ]
    return (
        f'<div class="parts viewer-parts" data-label="{escape(t("Picture"))}" hidden>'
        f'<div class="picture">{_button("‹", says=t("Newer"), deed="newer")}<img alt="">'
        f"{_button('›', says=t('Older'), deed='older')}</div>"
        f'<div class="beside"><p class="said" role="status"></p><div class="details"></div>'
        f'<div class="deeds">{"".join(deeds)}</div></div>'
        f"{_button('×', says=t('Close'), deed='close')}</div>"
    )


def _picking(t: Tongue) -> str:
    """While the second picture of a comparison is looked for."""
    text = t("Now choose the picture to compare it with, on this page or another.")
    return (
        f'<div class="picking" hidden><img alt=""><p role="status">{escape(text)}</p>'
        f"{_button(t('Cancel'), deed='cancel')}</div>"
    )


def _compare(t: Tongue) -> str:
    """The parts of the dialog that shows two pictures, one over the other."""
    says = t("How much of the first picture is seen")
    side = '<div class="half"><b>{}</b><div class="details"></div></div>'
    sides = "".join(side.format(escape(word)) for word in (t("Left"), t("Right")))
    slider = f'<input type="range" min="0" max="100" step="any" value="50" aria-label="{escape(says)}">'
    both = f'<img class="under" alt=""><img class="over" alt=""><i></i>{slider}'
    return (
        f'<div class="parts compare-parts" data-label="{escape(t("Two pictures compared"))}" hidden>'
        f'<div class="room"><div class="both" dir="ltr">{both}</div></div>'
        f'<div class="sides">{sides}</div>{_button("×", says=t("Close"), deed="close")}</div>'
    )


def _button(text: str, *, says: str = "", kind: str = "", disabled: bool = False, **data: object) -> str:
    attributes = "".join(f' data-{key}="{escape(str(value))}"' for key, value in data.items())
    attributes += f' aria-label="{escape(says)}"' if says else ""
    attributes += f' class="{kind}"' if kind else ""
    return f'<button type="button"{attributes}{" disabled" if disabled else ""}>{escape(text)}</button>'
