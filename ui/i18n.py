"""Languages. The English text is the key; `assets/languages/<code>.json` has the others.

What Gradio shows by itself (labels, hints, buttons, tabs) goes through its own `gr.I18n`, in the browser:
give components `label("Prompt")`. What is made here as HTML is spoken by a `Tongue`:
`t("{n} pictures", n=3)`. In the files the first are the `labels`, the second the `told`; `sentences` and
`pieces` are those of the engine (sentences.py).
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

from ui.sentences import Sentences, fill

FOLDER = Path(__file__).parent.parent / "assets" / "languages"
LANGUAGES = ("en", "de", "it", "ar")
COOKIE = "triptych-language"  # page.js writes what the page is shown in: it may have been chosen by hand
FROM_THE_RIGHT = ("ar",)


@dataclass(frozen=True)
class Tongue:
    """Speaks one language: English text in, its own out. What it has no words for stays English."""

    code: str = "en"
    table: Mapping[str, str] = field(default_factory=dict, repr=False)
    engine: Sentences = field(default_factory=Sentences, repr=False)

    def __call__(self, text: str, /, **values: object) -> str:
        """The text with its {names} filled in."""
        known = self.table.get(text, text)
        return fill(known, values, apart=self.code in FROM_THE_RIGHT) if values else known

    def told(self, text: str) -> str:
        """What the engine said, numbers and names already in it."""
        return self.engine.told(text) if self.table else text


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
    if code == "en":
        return ENGLISH
    read = _read(code)
    words = read.get("told", {})
    sentences, pieces = read.get("sentences", {}), read.get("pieces", {})
    return Tongue(code, words, Sentences(sentences, pieces, words, apart=code in FROM_THE_RIGHT))


def for_gradio() -> gr.I18n:
    """The labels, for `launch(i18n=…)`."""
    labels = {code: _read(code).get("labels", {}) for code in LANGUAGES if code != "en"}
    english = {text: text for table in labels.values() for text in table}
    return gr.I18n(en=english, **labels)


def head() -> str:
    """For `launch(head=…)`: what tells Gradio of a language that it does not have itself."""
    return f"<script>{(FOLDER.parent / 'language.js').read_text(encoding='utf-8')}</script>"


def _read(code: str) -> dict[str, dict[str, str]]:
    file = FOLDER / f"{code}.json"
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
