"""The fold of adapters in a family's tab: the LoRAs and embeddings that are there, and those that are used.

Which are used stands in the prompt and nowhere else. What is written here, assets/adapters.js walks through:
it finds the tags in the prompt's text, and changes them there.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

import gradio as gr

from backend import Settings
from backend.text.tags import UNSAYABLE
from backend.weights.adapters import LORA, Adapter, adapters
from ui import i18n, words
from ui.controls import SAMPLERS, Controls
from ui.i18n import ENGLISH, Tongue, label
from ui.theme import ASSETS

SCRIPT = (ASSETS / "adapters.js").read_text(encoding="utf-8")
QUIET: dict[str, Any] = {"queue": False, "show_progress": "hidden", "api_visibility": "private"}
OFFERED = ("sampler", "steps", "guidance_scale")  # fields that an adapter can be made for
# From a prompt to what its plan depends on: which LoRAs it names, and which of their weights are 0, or no
# numbers. The fold's script is told, too: what Gradio fills in changes without an event of the browser's, and
# of the box for raw prompts, as the page may not have it, or the fold, yet.
NAMED = """(prompt, raw) => {
  (window.triptychRaw ??= {}).FAMILY = raw;
  dispatchEvent(new Event('triptych-prompt'));
  const weight = (text) => Number(text) && Math.abs(Number(text)) <= 10 ? '1' : text;
  return [...(prompt ?? '').matchAll(/<((?:lora|lyco|hypernet):[^<>]*)>/gi)].map(([, tag]) => {
    const [kind, name, ...weights] = tag.split(':');
    return `<${[kind, name, ...weights.map((each) => each.replace(/[^=]*$/, weight))].join(':')}>`;
  }).join(' ');
}"""


def fold(settings: Settings, family: str) -> AdapterFold:
    """The components, where it is called; `connect` brings them to life."""
    named = gr.Textbox("", visible="hidden")
    with gr.Accordion(label("Adapters"), open=False, elem_classes="adapters-fold"):
        there = gr.HTML(js_on_load=SCRIPT)
    return AdapterFold(settings, family, there, named)


@dataclass(frozen=True)
class AdapterFold:
    """`there` is the list, made anew whenever it comes to be seen; `named` are the prompt's tags, for the
    plan."""

    settings: Settings
    family: str
    there: gr.HTML
    named: gr.Textbox

    def connect(self, controls: Controls) -> None:
        fields = controls.by_field
        told: list[Any] = [fields["prompt"], fields["negative_prompt"], fields["raw_prompt"]]
        named = NAMED.replace("FAMILY", self.family)
        gr.on([each.change for each in told], None, [told[0], told[2]], self.named, js=named, **QUIET)
        self.there.look(self.look, None, self.there, **QUIET)
        if all(name in fields for name in OFFERED):
            self.there.offer(self.offer, None, [fields[name] for name in OFFERED], **QUIET)

    def look(self, page: gr.Request) -> str:
        """What lies there now."""
        return shown(adapters(self.settings, self.family), self.settings, self.family, i18n.of(page))

    def offer(self, event: gr.EventData) -> list[Any]:
        """The settings that a LoRA is made for, by its name; who posts by other ways may send anything."""
        asked = event._data.get("name") if isinstance(event._data, dict) else None
        there = adapters(self.settings, self.family, LORA)
        offers = next((each.offers for each in there if each.name == asked), {})
        return [offers.get(name, gr.skip()) for name in OFFERED]


# ---- what is shown


def shown(found: Sequence[Adapter], settings: Settings, family: str, t: Tongue = ENGLISH) -> str:
    """The list, LoRAs first, and the parts of what the script makes of the prompt's tags."""
    rows = "".join(_row(each, family, t) for each in sorted(found, key=lambda each: each.kind != LORA))
    search = escape(t("Search adapters"))
    find = f'<input type="search" autocomplete="off" aria-label="{search}" placeholder="{search}">'
    there = (
        f'{find}<ul class="there" aria-label="{escape(t("Adapters"))}">{rows}</ul>'
        f'<p class="none" role="status" hidden>{escape(t("None has all of these words."))}</p>'
    )
    raw = t("Raw prompt is on: what names an adapter is read as plain words.")
    return (
        f'<section class="adapters" data-family="{family}">'
        f'<p class="raw problem" role="status" hidden>{escape(raw)}</p>'
        f'<div class="used"></div>{there if rows else ""}'
        f'<p class="hint">{escape(_hint(settings, t, empty=not rows))}</p>{_parts(t)}</section>'
    )


def _hint(settings: Settings, t: Tongue, *, empty: bool) -> str:
    """How more come here: no folder is named, as strangers may look."""
    if settings.public:
        return t("There is none for this family on this server.") if empty else ""
    if settings.models_dir is None:
        return t("Start Triptych with --models-dir DIR: LoRAs and embeddings in DIR are found here.")
    none = t("There is none for this family yet.") + " " if empty else ""
    return none + t("What you put into the models' folder is found when this is opened again.")


def _row(each: Adapter, family: str, t: Tongue) -> str:
    """An adapter: what it is called and is, and the buttons that name it in a prompt."""
    lora = each.kind == LORA
    data = {
        "kind": each.kind,
        "name": each.name,
        "stem": each.path.stem,
        "find": " ".join((each.name, each.title, each.base, *each.words)).lower(),
        "words": json.dumps(each.words) if each.words else "",
        "offer": _offer(each, family, t),
    }
    attributes = "".join(f' data-{key}="{escape(value)}"' for key, value in data.items() if value)
    known = ("", each.name, each.path.stem)
    title = f'<span class="title">{escape(each.title)}</span>' if each.title not in known else ""
    facts = [t("LoRA") if lora else t("Embedding"), words.size(each.bytes), each.base, each.licence]
    if each.rank:
        facts.insert(1, t("rank {n}", n=each.rank.replace(" to ", "–")))
    told = " · ".join(f"<bdi>{escape(fact)}</bdi>" for fact in facts if fact)
    buttons = problem = ""
    if lora and UNSAYABLE.search(each.name):
        way = t("No prompt can hold its name: rename the file, without angle brackets and colons.")
        problem = f'<span class="problem">{escape(way)}</span>'
    else:
        buttons = _button("prompt", t("Add"), t("Remove"), each.name)
        if not lora:
            buttons += _button("negative", t("Add to negative"), t("Remove from negative"), each.name)
    return (
        f'<li{attributes}><div class="what"><bdi class="name">{escape(each.name)}</bdi>{title}'
        f'<small>{told}</small>{problem}</div><div class="do">{buttons}</div></li>'
    )


def _button(where: str, add: str, remove: str, name: str) -> str:
    """Its first words are what it does now; the others, which only are read out, with what."""
    data = f'data-toggle="{where}" data-add="{escape(add)}" data-remove="{escape(remove)}"'
    return (
        f'<button type="button" {data}><span>{escape(add)}</span>'
        f'<span class="unseen"> {escape(name)}</span></button>'
    )


def _offer(each: Adapter, family: str, t: Tongue) -> str:
    """The settings that it is made for, in words."""
    if not all(name in each.offers for name in OFFERED) or family not in SAMPLERS:
        return ""
    sampler, steps, scale = (each.offers[name] for name in OFFERED)
    known = SAMPLERS[family].get(sampler)
    told = {"sampler": known.label if known else sampler, "scale": f"{scale:g}"}
    if steps == 1:
        return t("Made for one step: {sampler}, guidance {scale}", **told)
    return t("Made for few steps: {sampler}, {n} steps, guidance {scale}", n=steps, **told)


def _parts(t: Tongue) -> str:
    """Of a LoRA that the prompt names; the script takes what it needs, for each."""
    weights = {"both": t("Weight"), "network": t("Network weight"), "text": t("Text weight")}
    sliders = "".join(_weight(slot, escape(text)) for slot, text in weights.items())
    return (
        '<div class="parts" hidden><div class="row" role="group"><div class="head">'
        f'<bdi class="name"></bdi> <span class="problem">{escape(t("not found here"))}</span>'
        f'<button type="button" data-do="drop">{escape(t("Remove"))}</button></div>{sliders}'
        f'<div class="words"><span>{escape(t("Trigger words"))}</span></div>'
        f'<div class="offer"><span></span>'
        f'<button type="button" data-do="offer">{escape(t("Use these settings"))}</button></div></div></div>'
    )


def _weight(slot: str, text: str) -> str:
    return (
        f'<div class="weight" data-slot="{slot}"><span aria-hidden="true">{text}</span>'
        f'<input type="range" dir="ltr" min="-2" max="2" step="0.05" aria-label="{text}">'
        f'<input type="number" dir="ltr" min="-10" max="10" step="0.05" aria-label="{text}"></div>'
    )
