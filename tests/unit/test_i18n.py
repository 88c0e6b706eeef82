"""What the page says, in every language."""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gradio as gr
import pytest

from backend import Hardware, catalog
from backend.memory import plan
from backend.sampling.catalog import FLOW_SAMPLER_INFO, SAMPLER_INFO
from ui import controls, i18n, memory, models, prices, words
from ui.i18n import LANGUAGES, Tongue
from ui.sentences import FIELD

UI = Path(i18n.__file__).parent
DEMOS = UI.parent / "assets" / "demo"
OTHERS = [code for code in LANGUAGES if code != "en"]
TABLES = {code: json.loads((i18n.FOLDER / f"{code}.json").read_text(encoding="utf-8")) for code in OTHERS}


FUNCTION = ast.FunctionDef | ast.AsyncFunctionDef


def texts(function: str) -> Iterator[str]:
    """The literal texts that the page's code hands to `label`, or to a tongue."""
    for file in sorted(UI.rglob("*.py")):
        tree = ast.parse(file.read_text(encoding="utf-8"))
        for scope in ast.walk(tree):
            if isinstance(scope, ast.Module | ast.FunctionDef | ast.AsyncFunctionDef):
                yield from in_scope(scope, function)


def in_scope(scope: ast.AST, function: str) -> Iterator[str]:
    nodes = list(ast.walk(scope))
    values = [
        (ast.unparse(node.targets[0]), node.value)
        for node in nodes
        if isinstance(node, ast.Assign) and isinstance(scope, FUNCTION)
    ]
    for node in nodes:
        if isinstance(node, ast.Call) and node.args:
            called = ast.unparse(node.func).split(".")[-1].lstrip("_")
            yield from literals(node.args[0], values) if called == function else ()


def literals(node: ast.expr, assigned: Sequence[tuple[str, ast.expr]] = ()) -> Iterator[str]:
    """What an argument can be: a text, one of two, or one that a name stands for."""
    match node:
        case ast.Constant(value=str(text)) if text:
            yield text
        case ast.IfExp():
            yield from [*literals(node.body), *literals(node.orelse)]
        case ast.Name():
            for name, value in assigned:
                yield from literals(value) if name == node.id else ()


def named() -> set[str]:
    """Texts that stand in tables of the code."""
    parts = {words.part(name) for name in plan.TITLES} | {words.the_part(name) for name in plan.TITLES}
    phases = {words.phase(name) for name in plan.PHASES}
    samplers = {info.note for info in (*SAMPLER_INFO.values(), *FLOW_SAMPLER_INFO.values())}
    choices = {
        name for rows in (controls.SIZES, controls.PREFERENCES, controls.PRECISIONS) for name, _ in rows
    }
    licences = {entry.licence for entry in catalog.CATALOGUE}
    licences |= {entry.title for entry in catalog.CATALOGUE if entry.bundled}
    told = {prices.ABOUT, prices.AUTO, *prices.NAMES.values(), *prices.HOW.values(), *memory.PLACED.values()}
    allowed = Hardware.card(gib=80, capability=(9, 0)).allows
    machine = {*models.KINDS.values(), *(models.ALLOWS.get(what, what) for what in allowed)}
    vocabulary = {
        kind for file in DEMOS.glob("*/triptych.json") for kind in json.loads(file.read_text())["vocabulary"]
    }
    bits = set(words.BITS.values())
    loaded = {words.the_part("checkpoint")}
    return parts | phases | samplers | choices | licences | told | machine | vocabulary | bits | loaded


@pytest.mark.parametrize("code", OTHERS)
def test_every_label_has_its_words(code: str) -> None:
    assert TABLES[code]["labels"].keys() == {*texts("label"), prices.ABOUT}


@pytest.mark.parametrize("code", OTHERS)
def test_everything_told_has_its_words(code: str) -> None:
    assert TABLES[code]["told"].keys() == {*texts("t"), *named()}


@pytest.mark.parametrize("code", OTHERS)
def test_what_is_filled_in_is_in_the_translation_too(code: str) -> None:
    for table in TABLES[code].values():
        for text, known in table.items():
            assert known.strip() or not text.strip(), text
            assert sorted(FIELD.findall(known)) == sorted(FIELD.findall(text)), text
            assert not re.search(r'[<>&"]', known), f"{text}: it is shown in HTML, and in its attributes"


@pytest.mark.parametrize("code", OTHERS)
def test_a_full_stop_is_one_in_both(code: str) -> None:
    """Sentences are looked for without it."""
    for text, known in TABLES[code]["sentences"].items():
        assert known.endswith(".") == text.endswith("."), text


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


def test_in_arabic_what_is_filled_in_keeps_its_own_direction() -> None:
    told = i18n.tongue("ar")("{size} in all.", size="1.5 GiB")
    assert "\u20681.5 GiB\u2069" in told
    assert "\u2068" not in i18n.tongue("de")("{size} in all.", size="1.5 GiB")


@pytest.mark.parametrize("code", OTHERS)
def test_the_files_are_written_as_a_machine_would(code: str) -> None:
    """So that a changed translation is a changed line, and no other."""
    text = (i18n.FOLDER / f"{code}.json").read_text(encoding="utf-8")
    assert text == json.dumps(TABLES[code], indent=1, sort_keys=True, ensure_ascii=False) + "\n"


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
