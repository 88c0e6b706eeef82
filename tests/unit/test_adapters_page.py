"""The fold of adapters: what is written of them, what comes of clicks, and of settings with LoRAs in them."""

from __future__ import annotations

import html
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gradio as gr
import pytest

from backend import Settings
from backend.weights.adapters import EMBEDDING, LORA, Adapter
from ui import adapters as page
from ui.adapters import OFFERED, AdapterFold, shown
from ui.controls import Controls
from ui.i18n import LANGUAGES, tongue

HOSTILE = "<img src=x onerror=alert(1)>\"' onclick='x' &amp;"
LCM: dict[str, Any] = {"sampler": "lcm", "steps": 4, "guidance_scale": 1.0}
HERE = Settings(models_dir=Path("/secret/models"))


def known(name: str, kind: str = LORA, **facts: Any) -> Adapter:
    given: dict[str, Any] = {"bytes": 3 * 2**20, "families": ("sd15",)}
    path = Path("/secret/models") / f"{name.replace('/', '-')}.safetensors"
    return Adapter(name=name, path=path, kind=kind, **given | facts)


INK = known("ink", title="Ink drawings", words=("ink drawing", "black, lines"), rank="4 to 16", base="sd_v1")
FAST = known("lcm-lora", offers=LCM)
HANDS = known("bad hands", EMBEDDING, words=("bad hands", "<hands>"))


def rows(text: str) -> list[dict[str, str]]:
    """The data of each row of the list."""
    found = re.findall(r"<li((?: data-[a-z]+=\"[^\"]*\")*)>", text)
    return [
        {key: html.unescape(value) for key, value in re.findall(r'data-([a-z]+)="([^"]*)"', each)}
        for each in found
    ]


def test_what_is_there_is_told_in_short() -> None:
    text = shown([HANDS, INK], HERE, "sd15")
    ink, hands = rows(text)  # LoRAs first
    assert (ink["name"], ink["stem"], json.loads(ink["words"])) == ("ink", "ink", list(INK.words))
    assert all(word in ink["find"] for word in ("ink drawings", "black, lines", "sd_v1"))
    assert (hands["kind"], json.loads(hands["words"])) == ("embedding", ["bad hands", "<hands>"])
    facts = [re.sub("<[^>]+>", "", each) for each in re.findall("<small>(.*?)</small>", text)]
    assert facts == ["LoRA · rank 4–16 · 3.0 MiB · sd_v1", "Embedding · 3.0 MiB"]
    assert text.count('data-toggle="prompt"') == 2
    assert text.count('data-toggle="negative"') == 1  # a LoRA works on the whole picture


def test_everything_from_outside_is_escaped() -> None:
    facts = dict.fromkeys(("title", "licence", "base", "rank"), HOSTILE)
    both = [known(HOSTILE, kind, words=(HOSTILE,), **facts) for kind in (LORA, EMBEDDING)]
    for code in LANGUAGES:
        text = shown(both, HERE, "sd15", tongue(code))
        assert "<img" not in text
        assert "onclick='" not in text
        assert [row["name"] for row in rows(text)] == [HOSTILE, HOSTILE]
        assert "/secret" not in text, "paths are nobody's business"


@pytest.mark.parametrize("name", ["a:b", "a<b", "a>b", " a", "a "])
def test_a_name_that_no_tag_can_hold_has_no_button(name: str) -> None:
    text = shown([known(name)], HERE, "sd15")
    assert "rename the file" in text
    assert "data-toggle" not in text
    assert "data-toggle" in shown([known(name, EMBEDDING)], HERE, "sd15")  # which is no tag


def test_the_settings_that_a_lora_is_made_for_are_told() -> None:
    (row,) = rows(shown([FAST], HERE, "sd15"))
    assert row["offer"] == "Made for few steps: LCM, 4 steps, guidance 1"
    (row,) = rows(shown([known("x", offers=LCM | {"steps": 1})], HERE, "sd15"))
    assert row["offer"] == "Made for one step: LCM, guidance 1"
    for offers, family in (({"steps": 4}, "sd15"), (LCM, "stable_cascade"), ({}, "sd15")):
        assert "offer" not in rows(shown([known("x", offers=offers)], HERE, family))[0]


@pytest.mark.parametrize(
    ("settings", "found", "told"),
    [
        (HERE, [INK], "the models&#x27; folder is found when"),
        (HERE, [], "none for this family yet"),
        (Settings(), [], "--models-dir"),
        (Settings(public=True), [], "none for this family on this server"),
        (Settings(public=True, models_dir=Path("/secret")), [INK], '<p class="hint"></p>'),
    ],
)
def test_how_more_come_here_is_told(settings: Settings, found: list[Adapter], told: str) -> None:
    text = shown(found, settings, "sd15")
    assert told in text
    assert ('type="search"' in text) == bool(found)
    assert "/secret" not in text


def test_it_speaks_every_language() -> None:
    texts = {code: shown([INK, FAST, HANDS], HERE, "sd15", tongue(code)) for code in LANGUAGES}
    said = {code: re.findall(r'data-(?:add|remove|offer)="([^"]+)"', text) for code, text in texts.items()}
    assert said["en"][:2] == ["Add", "Remove"]
    for words in zip(*said.values(), strict=True):
        assert len(set(words)) == len(LANGUAGES), words


# ---- clicks


@pytest.fixture
def at(monkeypatch: pytest.MonkeyPatch) -> AdapterFold:
    def adapters(settings: Settings, family: str, kind: str | None = None) -> list[Adapter]:
        return [each for each in (INK, FAST, HANDS) if kind in (None, each.kind)]

    monkeypatch.setattr(page, "adapters", adapters)
    with gr.Blocks():
        return page.fold(HERE, "sd15")


def test_offered_settings_are_looked_up_by_name(at: AdapterFold) -> None:
    assert at.offer(gr.EventData(None, {"name": "lcm-lora"})) == [LCM[name] for name in OFFERED]


@pytest.mark.parametrize(
    "data",
    [
        None,
        "lcm-lora",
        {},
        {"name": None},
        {"name": ["lcm-lora"]},
        {"name": {"lcm-lora": 1}},
        {"name": "/secret/models/lcm-lora.safetensors"},
        {"name": "ink", "offers": {"steps": 150}},
        {"name": "bad hands"},
    ],
)
def test_whatever_else_is_posted_changes_nothing(at: AdapterFold, data: Any) -> None:
    assert at.offer(gr.EventData(None, data)) == [gr.skip()] * len(OFFERED)


# ---- settings of pictures that programs asked for


@pytest.fixture
def filled() -> Callable[[dict[str, Any]], list[Any]]:
    with gr.Blocks():
        return Controls({"prompt": gr.Textbox(), "negative_prompt": gr.Textbox()}).filled


def test_loras_of_a_request_are_filled_in_as_tags(filled: Callable[[dict[str, Any]], list[Any]]) -> None:
    loras = (("ink", 0.8), ("paper cut", -1.0, 0.5))
    settings = {"prompt": "a red house <lora:third:1>", "loras": loras, "raw_prompt": False}
    tags = "<lora:third:1> <lora:ink:0.8> <lora:paper cut:0.5:-1>"
    assert filled(settings) == [f"a red house {tags}", gr.skip()]
    assert filled({"prompt": "", "loras": loras[:1]})[0] == "<lora:ink:0.8>"
    assert filled({"prompt": "a red house", "loras": ()})[0] == "a red house"
    assert filled({"prompt": "a", "loras": loras, "raw_prompt": True})[0] == "a"  # there they would be words
    assert filled({"negative_prompt": "rain"}) == [gr.skip(), "rain"]


def test_the_hidden_tags_begin_empty(at: AdapterFold) -> None:
    """A plan is asked for before anything was typed."""
    assert at.named.value == ""
