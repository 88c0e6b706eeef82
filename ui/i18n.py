"""Languages. The English text is the key; `assets/languages/<code>.json` has the others.

What Gradio shows by itself (labels, hints, buttons, tabs) goes through its own `gr.I18n`, in the browser:
give components `label("Prompt")`. What is made here as HTML is spoken by a `Tongue`:
`t("{n} pictures", n=3)`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import gradio as gr

FOLDER = Path(__file__).parent.parent / "assets" / "languages"
LANGUAGES = ("en", "de", "it", "ar")
COOKIE = "triptych-language"  # page.js writes what the page is shown in: it may have been chosen by hand
FIELD = re.compile(r"\{(\w+)\}")


@dataclass(frozen=True)
class Tongue:
    """Speaks one language: English text in, its own out. What it has no words for stays English."""

    code: str = "en"
    table: Mapping[str, str] = field(default_factory=dict, repr=False)

    def __call__(self, text: str, /, **values: object) -> str:
        """The text with its {names} filled in."""
        known = self.table.get(text, text)
        return FIELD.sub(lambda found: str(values.get(found[1], found[0])), known) if values else known

    def told(self, text: str) -> str:
        """A sentence that the engine made, numbers and names already in it."""
        if not self.table or text in self.table:
            return self.table.get(text, text)
        for pattern, names, known in _patterns(self.code):
            if found := pattern.fullmatch(text):
                values = dict(zip(names, found.groups(), strict=True))
                return FIELD.sub(lambda name, values=values: values.get(name[1], name[0]), known)
        return text


ENGLISH = Tongue()


def label(text: str) -> Any:
    """For a component's label, info, placeholder, or a button's or tab's text: translated in the browser."""
    return gr.I18n()(text)


def of(request: gr.Request | None) -> Tongue:
    """The language of whoever asks: what the page is shown in, or else what the browser prefers."""
    if request is None or request.request is None:
        return ENGLISH
    chosen = request.cookies.get(COOKIE, "")
    wished = [chosen, *re.findall(r"[A-Za-z]{2,3}(?=[-,;]|$)", request.headers.get("accept-language", ""))]
    return tongue(next((code for each in wished if (code := each.lower()) in LANGUAGES), "en"))


@cache
def tongue(code: str) -> Tongue:
    return Tongue(code, _read(code).get("told", {})) if code != "en" else ENGLISH


def for_gradio() -> gr.I18n:
    """The labels, for `launch(i18n=…)`."""
    labels = {code: _read(code).get("labels", {}) for code in LANGUAGES if code != "en"}
    english = {text: text for table in labels.values() for text in table}
    return gr.I18n(en=english, **labels)


def _read(code: str) -> dict[str, dict[str, str]]:
    file = FOLDER / f"{code}.json"
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}


@cache
def _patterns(code: str) -> list[tuple[re.Pattern[str], list[str], str]]:
    """Texts with {names} as patterns that find what was filled in; the longest text first."""
    rows: list[tuple[re.Pattern[str], list[str], str]] = []
    for text, known in sorted(tongue(code).table.items(), key=lambda row: -len(row[0])):
        names = FIELD.findall(text)
        if names:
            pieces = map(re.escape, FIELD.sub("\0", text).split("\0"))
            rows.append((re.compile("(.+?)".join(pieces), re.DOTALL), names, known))
    return rows
