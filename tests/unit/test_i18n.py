"""What the page says, in every language."""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gradio as gr
import pytest

from backend import catalog
from backend.memory import plan
from backend.sampling.catalog import FLOW_SAMPLER_INFO, SAMPLER_INFO
from ui import controls, i18n, memory, prices, words
from ui.i18n import FIELD, LANGUAGES, Tongue

UI = Path(i18n.__file__).parent
OTHERS = [code for code in LANGUAGES if code != "en"]
TABLES = {code: json.loads((i18n.FOLDER / f"{code}.json").read_text(encoding="utf-8")) for code in OTHERS}


def texts(function: str) -> Iterator[str]:
    """The literal texts that the page's code hands to `label`, or to a tongue."""
    for file in sorted(UI.rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and ast.unparse(node.func).split(".")[-1] == function and node.args:
                for part in ast.walk(node.args[0]):
                    if isinstance(part, ast.Constant) and isinstance(part.value, str):
                        yield part.value


def named() -> set[str]:
    """Texts that stand in tables of the code."""
    parts = {words.part(name) for name in plan.TITLES} | {words.the_part(name) for name in plan.TITLES}
    phases = {words.phase(name) for name in plan.PHASES}
    samplers = {info.note for info in (*SAMPLER_INFO.values(), *FLOW_SAMPLER_INFO.values())}
    choices = {
        name for rows in (controls.SIZES, controls.PREFERENCES, controls.PRECISIONS) for name, _ in rows
    }
    licences = {entry.licence for entry in catalog.CATALOGUE}
    told = {prices.ABOUT, prices.AUTO, *prices.NAMES.values(), *prices.HOW.values(), *memory.PLACED.values()}
    return parts | phases | samplers | choices | licences | told | set(words.BITS.values())


@pytest.mark.parametrize("code", OTHERS)
def test_every_label_has_its_words(code: str) -> None:
    assert {*texts("label"), prices.ABOUT} - TABLES[code]["labels"].keys() == set()


@pytest.mark.parametrize("code", OTHERS)
def test_everything_told_has_its_words(code: str) -> None:
    assert {*texts("t"), *named()} - TABLES[code]["told"].keys() == set()


@pytest.mark.parametrize("code", OTHERS)
def test_what_is_filled_in_is_in_the_translation_too(code: str) -> None:
    for table in TABLES[code].values():
        for text, known in table.items():
            assert known.strip(), text
            assert sorted(FIELD.findall(known)) == sorted(FIELD.findall(text)), text
            assert known.count("<") == text.count("<"), text


@pytest.mark.parametrize("code", OTHERS)
def test_labels_mean_what_they_say_to_gradio(code: str) -> None:
    """Its texts are messages of ICU's form, in which braces and tags have a meaning."""
    for text, known in TABLES[code]["labels"].items():
        assert not re.search(r"[{}<>]", text + known), text


def test_a_tongue() -> None:
    german = Tongue("xx", {"{n} pictures": "{n} Bilder", "steps is {value}; it can be {allowed}": "{value}?"})
    assert german("{n} pictures", n=3) == "3 Bilder"
    assert german("{n} pictures", n="{value}") == "{value} Bilder"
    assert german("unknown {n}", n=3) == "unknown 3"
    assert i18n.ENGLISH("{n} pictures", n=3) == "3 pictures"


def test_a_sentence_of_the_engine_is_found_by_its_form() -> None:
    for code in OTHERS:
        t = i18n.tongue(code)
        said = t.told("steps is 0; it can be a whole number from 1 to 150")
        assert "steps" in said
        assert "0" in said
        assert "150" in said
        assert "it can be" not in said
        assert t.told("something else") == "something else"


class Asked:
    """What Gradio's request tells of a browser's."""

    request = SimpleNamespace()

    def __init__(self, accept: str = "", cookie: str = "") -> None:
        self.headers = {"accept-language": accept}
        self.cookies = {i18n.COOKIE: cookie}


@pytest.mark.parametrize(
    ("accept", "cookie", "code"),
    [
        ("de-AT,de;q=0.9,en;q=0.5", "", "de"),
        ("fr,it;q=0.8", "", "it"),
        ("fr", "", "en"),
        ("", "", "en"),
        ("de", "ar", "ar"),
        ("de", "xx", "de"),
        ("de", "../../etc", "de"),
        ("*", "", "en"),
    ],
)
def test_the_language_of_who_asks(accept: str, cookie: str, code: str) -> None:
    asked: Any = Asked(accept, cookie)
    assert i18n.of(asked).code == code


def test_without_a_browser_it_is_english() -> None:
    assert i18n.of(None) is i18n.ENGLISH
    assert i18n.of(gr.Request()) is i18n.ENGLISH
