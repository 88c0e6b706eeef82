"""The checkpoints on the Models tab: the catalogue with its downloads, and what else lies on the disk.

All of it is HTML, in which everything from outside is escaped. Buttons say in `data-do` and `data-key` what
they are for; assets/models.js tells the server.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape

from backend import Settings, Studio, catalog
from backend.catalog import CatalogueEntry
from backend.downloads import DONE, FAILED, PAUSED, RUNNING, WAITING, Download, Downloads
from backend.errors import TriptychError
from backend.weights import local
from backend.weights.base import alternatives, keys_of
from backend.weights.hub import has_token, is_offline
from backend.weights.local import Local
from backend.weights.source import resolve
from ui import render, words
from ui.i18n import ENGLISH, Tongue

NATIVE = "bfloat16"  # 16 bits, in which the catalogue's sizes are given
ADDRESS = re.compile(r"https?://[^\s,;<>\"']+[\w/]")


@dataclass(frozen=True)
class Known:
    """A catalogued checkpoint: its parts, their bytes at 16 bits, and which of them are not here."""

    entry: CatalogueEntry
    parts: tuple[str, ...]
    bytes: int
    lacking: tuple[str, ...]

    @classmethod
    def of(cls, settings: Settings, entry: CatalogueEntry) -> Known:
        """Lite stages stand in for the full ones, and have no place of their own. Raises CheckpointError for
        one that is damaged."""
        source, keys = resolve(entry.name, entry.family, settings), keys_of(entry.family)
        full = (name for name in keys.COMPONENTS if name not in keys.LITE.values())
        parts = tuple(name for name in full if source.has(name))
        size = sum(source.parameter_bytes(name, NATIVE) for name in parts)
        lacking = [
            name
            for name in parts
            if not any(source.present([each], NATIVE) for each in alternatives(keys, name))
        ]
        return cls(entry, parts, size, tuple(lacking))

    @property
    def begun(self) -> bool:
        """Whether any of it is here."""
        return self.lacking != self.parts


def key(entry: CatalogueEntry) -> str:
    return f"{entry.family}/{entry.name}"


# ---- the catalogue


def shelf(studio: Studio, downloads: Downloads, t: Tongue = ENGLISH, told: str = "", about: str = "") -> str:
    """The catalogue, family by family; `told` is what came of a click on a button whose key is `about`."""
    public = studio.settings.public
    families = (_family(studio.settings, downloads, family, t) for family in catalog.FAMILIES)
    busy = " data-busy" if not public and downloads.working() else ""  # the page asks again while it is there
    return (
        f'<section class="models"{busy}><h2>{t("Checkpoints")}</h2>{answer(told, about)}'
        f"{''.join(families)}</section>"
    )


def answer(told: str, about: str) -> str:
    """The line that says what came of a click. It is always there: what is read out is what changes in it."""
    return f'<p class="told" role="status" tabindex="-1" data-about="{escape(about)}">{_linked(told)}</p>'


def _family(settings: Settings, downloads: Downloads, family: str, t: Tongue) -> str:
    entries = catalog.entries(family)
    if settings.public:
        present = local.here(settings, family)
        entries = [entry for entry in entries if entry.name in present]
    heads = [t("Name"), t("Size"), t("Licence"), *([] if settings.public else [t("On this machine")])]
    rows = [_row(settings, downloads, entry, t) for entry in entries]
    columns = ("name", "size", "licence", "state")
    title = escape(catalog.FAMILIES[family].title)
    return f"<div><h3>{title}</h3>{table(columns, heads, rows)}{_gate(settings, entries, t)}</div>"


def _gate(settings: Settings, entries: Iterable[CatalogueEntry], t: Tongue) -> str:
    """What a gated family asks for first, until there is a token to show."""
    if settings.public or not any(entry.gated for entry in entries) or has_token():
        return ""
    hint = t(
        "These are gated: accept the licence on the checkpoint's page, make a token for your account there, "
        "and start Triptych with it in the environment variable HF_TOKEN, or log in once by `hf auth login`."
    )
    return f'<p class="hint">{escape(hint)}</p>'


def _row(settings: Settings, downloads: Downloads, entry: CatalogueEntry, t: Tongue) -> list[str]:
    title = f"{render.linked(t(entry.title), entry.url)}<small>{escape(entry.name)}</small>"
    status = None if settings.public else downloads.status(entry.family, entry.name)
    try:
        known = Known.of(settings, entry)
    except TriptychError as error:
        problem = f'<span class="problem">{escape(t.told(str(error)))}</span>'
        removal = "" if entry.bundled or settings.public else _removal(entry, t)
        return [title, "", escape(t.told(entry.licence)), problem + removal]
    row = [title, words.size(known.bytes), escape(t.told(entry.licence))]
    if settings.public:
        return row
    buttons = "" if entry.bundled else _buttons(known, status, t, offline=is_offline(settings.offline))
    return [*row, f'<div class="state">{_state(known, status, t)}</div>{buttons}']


def _state(known: Known, status: Download | None, t: Tongue) -> str:
    """Where it is, in words; with a bar while it comes, or half of it is there."""
    if known.entry.bundled:
        return t("comes with Triptych")
    if status is None or status.state == DONE:
        return escape(_presence(known, status, t))
    if status.state == FAILED:
        return f'<span class="problem">{_linked(t.told(status.error))}</span>'
    share = words.share(status.here_bytes, status.total_bytes, t) if status.total_bytes else ""
    if status.state == WAITING:
        return t("waits for its turn")
    if status.state == PAUSED:
        return _bar(known, status, t) + (t("paused at {share}", share=share) if share else t("paused"))
    facts = [words.the_part(status.part, t)] if status.part not in ("", "checkpoint") else []
    facts += [t("{size} a second", size=words.size(status.speed))] if status.speed else []
    if status.seconds_left is not None:
        facts.append(t("{time} left", time=words.seconds(status.seconds_left)))
    under = f"<small>{escape(' · '.join(facts))}</small>" if facts else ""
    return f"{_bar(known, status, t)}{share or t('asking the hub…')}{under}"


def _presence(known: Known, status: Download | None, t: Tongue) -> str:
    if not known.lacking:
        return t("here")
    if not known.begun:
        return t("not downloaded")
    parts = ", ".join(words.the_part(name, t) for name in known.lacking)
    if status is not None:  # all that the download was to bring
        return t("here, without {parts}: a picture on this machine does without", parts=parts)
    return t("here, but for {parts}", parts=parts)


def _bar(known: Known, status: Download, t: Tongue) -> str:
    name = escape(t("Download of {title}", title=known.entry.title))
    if not status.total_bytes:
        unknown = '<i class="unknown"></i>' if status.state == RUNNING else "<i></i>"
        return f'<div class="bar" role="progressbar" aria-label="{name}">{unknown}</div>'
    percent = round(100 * min(status.here_bytes / status.total_bytes, 1), 1)
    return (
        f'<div class="bar" role="progressbar" aria-label="{name}" aria-valuenow="{percent}">'
        f'<i style="width:{percent}%"></i></div>'
    )


def _buttons(known: Known, status: Download | None, t: Tongue, *, offline: bool) -> str:
    """What can be done with it now. The first stays in its place while it changes its name."""
    entry, state = known.entry, status.state if status else ""
    names = {
        WAITING: (t("Pause"), t("Pause the download of {title}", title=entry.title), "pause"),
        PAUSED: (t("Resume"), t("Resume the download of {title}", title=entry.title), "start"),
        FAILED: (t("Try again"), t("Try again to download {title}", title=entry.title), "start"),
        "": (t("Download"), t("Download {title}", title=entry.title), "start"),
    }
    buttons = ""
    if state in (WAITING, RUNNING):
        buttons = button(*names[WAITING], key(entry))
    elif known.lacking and state != DONE and not offline:
        buttons = button(*names[state], key(entry))
    if known.begun or (status is not None and status.here_bytes and state != RUNNING):
        buttons += _removal(entry, t) if state not in (WAITING, RUNNING) else ""
    return f'<div class="do">{buttons}</div>' if buttons else ""


def button(text: str, label: str, act: str, about: str) -> str:
    return (
        f'<button type="button" data-do="{act}" data-key="{escape(about)}" aria-label="{escape(label)}">'
        f"{escape(text)}</button>"
    )


def _removal(entry: CatalogueEntry, t: Tongue) -> str:
    """A button that asks first, in a popover: the browser closes it, and brings the focus back."""
    name = f"remove-{entry.family}-{entry.name}"
    question = t("Remove {title} from the disk?", title=entry.title)
    warning = t(
        "It lies in the hub's cache, where other programs may find it, too. It can be downloaded again."
    )
    hides = f'popovertarget="{name}" popovertargetaction="hide"'
    return (
        f'<button type="button" popovertarget="{name}" aria-label="{escape(question)}">{t("Remove")}</button>'
        f'<div popover id="{name}" class="confirm" role="dialog" aria-label="{escape(question)}">'
        f"<p><b>{escape(question)}</b></p><p>{escape(warning)}</p><p>"
        f'<button type="button" {hides}>{t("Keep")}</button>'
        f'<button type="button" {hides} class="grave" data-do="remove" data-key="{escape(key(entry))}">'
        f"{t('Remove')}</button></p></div>"
    )


# ---- what else lies on the disk


def own(settings: Settings, t: Tongue = ENGLISH) -> str:
    """Files and folders of one's own, or how to have them listed here."""
    if settings.public:
        return ""
    found = local.found(settings)
    head = f'<section class="models own"><h2>{t("Of your own")}</h2>'
    if settings.models_dir is None:
        hint = t(
            "Start Triptych with --models-dir DIR, and every .safetensors file and every checkpoint's folder "
            "in DIR is listed here, and under Advanced in the tab of its family. Downloads go there, too."
        )
    elif not found.entries:
        hint = t(
            "Nothing in {folder} yet. A .safetensors file or a checkpoint's folder that is put there is "
            "found at the next look, without a restart.",
            folder=settings.models_dir,
        )
    else:
        hint = t(
            "From {folder}. What can paint is found under Advanced in the tab of its family.",
            folder=settings.models_dir,
        )
    rows = [_own(each, t) for each in found.entries]
    heads = (t("Name"), t("Size"), t("What it is"))
    cut = t("There is more: only the first {n} files and folders were looked at.", n=local.MOST)
    return (
        f'{head}<p class="hint">{escape(hint)}</p>'
        f"{table(('name', 'size', 'what'), heads, rows) if rows else ''}"
        f"{f'<p>{cut}</p>' if found.cut else ''}</section>"
    )


def _own(entry: Local, t: Tongue) -> list[str]:
    what = catalog.FAMILIES[entry.family].title if entry.family else t.told(entry.what)
    problem = f'<span class="problem">{escape(t.told(entry.problem))}</span>' if entry.problem else ""
    note = f"<small>{escape(t.told(entry.note))}</small>" if entry.note else ""
    parts = [f"<span>{escape(what)}</span>" if what else "", problem, note]
    return [f'<bdi class="path">{escape(entry.name)}</bdi>', words.size(entry.bytes), "".join(parts)]


# ---- tables


def table(columns: Sequence[str], heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Cells are HTML; each bears its column's name, for the narrow page where a row becomes a card."""
    head = "".join(f'<th scope="col">{escape(name)}</th>' for name in heads)
    body = "".join(
        "<tr>"
        + "".join(f'<td data-column="{name}">{cell}</td>' for name, cell in zip(columns, row, strict=False))
        + "</tr>"
        for row in rows
    )
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def _linked(text: str) -> str:
    """A text with the addresses in it as links."""
    out, end = "", 0
    for found in ADDRESS.finditer(text):
        address = escape(found[0])
        out += escape(text[end : found.start()])
        out += f'<a href="{address}" target="_blank" rel="noopener">{address}</a>'
        end = found.end()
    return out + escape(text[end:])
