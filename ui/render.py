"""What the page says, as HTML: the canvas, the progress line, the jobs, the note about the checkpoint.

Every value from outside is escaped here. The components that show these strings keep Gradio's plain
`${value}` template: a template of their own would be evaluated as JavaScript, the values in it too.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import Path
from urllib.parse import quote

from PIL.Image import Image

from backend.catalog import CatalogueEntry
from backend.events import GridProgress, Loading, Result, Step
from backend.memory.plan import Plan
from ui import memory, words
from ui.i18n import ENGLISH, Tongue
from ui.jobs import Job
from ui.words import seconds, size

COLUMNS = {1: 1, 2: 2, 3: 2, 4: 2, 5: 3, 6: 3, 7: 4, 8: 4}
QUALITY = 88  # JPEG: a 64-pixel preview is about 2 kB

LOGO = """
<header class="masthead">
  <svg viewBox="0 0 34 24" width="34" height="24" aria-hidden="true">
    <path d="M1 4 9 1v22l-8-3z"/><path d="M12 1h10v22H12z"/><path d="m25 1 8 3v16l-8 3z"/></svg>
  <h1>Triptych</h1>
</header>"""


# ---- the canvas


def idle(t: Tongue = ENGLISH) -> str:
    keys = t(
        "{keys} paints it, {stop} stops.", keys="<kbd>Ctrl</kbd> <kbd>Enter</kbd>", stop="<kbd>Esc</kbd>"
    )
    text = t("Write what you want to see, or try one of the examples. Your picture appears here.")
    return _canvas("idle", f'<p class="hint">{text}<span class="keys"><br>{keys}</span></p>')


def previews(images: Sequence[Image], ratio: float, t: Tongue = ENGLISH, *, over: bool = False) -> str:
    """What there is to see so far, in the shape of the picture to come; or not to come, when it is over."""
    tiles = [_tile(data_url(image), t("Preview"), ratio, t) for image in images]
    return _canvas("idle" if over else "busy", "".join(tiles), len(tiles))


def pictures(result: Result, outputs: Path, t: Tongue = ENGLISH) -> str:
    """The finished pictures, shown from their PNG files."""
    size, prompt = result.settings.get("grid", result.settings), result.settings["prompt"]
    ratio = size["width"] / size["height"]  # of the sheet, if it is a grid's
    tiles = [_tile(file_url(file, outputs), prompt, ratio, t) for file in result.files]
    return _canvas("done", "".join(tiles), len(tiles))


def unsaved(images: Sequence[Image], t: Tongue = ENGLISH) -> str:
    """Pictures that could not be written, carried by the page itself: the browser can still save them."""
    tiles = [
        _tile(data_url(image, "png"), t("Unsaved picture"), image.width / image.height, t) for image in images
    ]
    return _canvas("done", "".join(tiles), len(tiles), "canvas unsaved")


def _canvas(state: str, inner: str, count: int = 1, name: str = "canvas") -> str:
    columns = COLUMNS.get(count, 4)
    return f'<div class="{name}" data-state="{state}" style="--columns:{columns}">{inner}</div>'


def _tile(url: str, alt: str, ratio: float, t: Tongue) -> str:
    image = f'<img src="{escape(url)}" alt="{escape(alt)}" style="--ratio:{ratio:.4f}" draggable="true">'
    label = escape(t("Enlarge: {what}", what=alt))
    return f'<button type="button" class="tile" aria-label="{label}">{image}</button>'


def data_url(image: Image, kind: str = "jpeg") -> str:
    buffer = io.BytesIO()
    image.convert("RGB").save(buffer, kind, quality=QUALITY)
    return _base64(buffer.getvalue(), kind)


def file_url(file: Path, outputs: Path, folder: str = "pictures") -> str:
    """Where the page finds a picture: the very file, so that a download keeps its text chunk; in the folder
    `thumbnails` a small one.

    One that had to be written elsewhere travels in the page: the server serves the outputs alone.
    """
    if file.is_relative_to(outputs):
        return f"{folder}/{quote(file.relative_to(outputs).as_posix())}"
    return _base64(file.read_bytes(), "png")


def _base64(data: bytes, kind: str) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"


# ---- the progress line


def ready(t: Tongue = ENGLISH) -> str:
    return _status("idle", f"<p>{t('Ready.')}</p>")


def starting(text: str = "") -> str:
    return _status("busy", _bar(None) + f"<p>{escape(text) or '&hellip;'}</p>")


def waiting(place: int, t: Tongue = ENGLISH) -> str:
    """The progress line of a job that waits its turn behind `place` others."""
    if place == 1:
        return starting(t("Waiting: one picture comes before yours."))
    return starting(t("Waiting: {n} others come before yours.", n=place))


def loading(event: Loading, t: Tongue = ENGLISH) -> str:
    text = "Downloading {part}" if event.action == "download" else "Loading {part}"
    share = event.done_bytes / event.total_bytes if event.total_bytes else None
    done = size(event.done_bytes)
    told = t("{some} of {all}", some=done, all=size(event.total_bytes)) if event.total_bytes else done
    said = escape(t(text, part=words.the_part(event.component, t)))
    return _status("busy", _bar(share, t) + f"<p>{said} <span>{told}</span></p>")


def step(event: Step, plan: Plan | None = None, t: Tongue = ENGLISH, before: str = "") -> str:
    """How far it is, and beside it what memory it takes of what it may; `before` is said first."""
    left = ""
    if event.eta_s is not None and event.eta_s >= 0.05:
        left = f" <span>{t('{time} left', time=seconds(event.eta_s))}</span>"
    count = t(" · step {n} of {all}", n=event.step, all=event.steps) if event.steps > 1 else ""
    text = f"<p>{before}{escape(words.phase(event.phase, t))}{count}{left}</p>"
    meter = memory.meter(event.memory_bytes, plan, t) if plan and event.memory_bytes else ""
    return _status(
        "busy", f'{_bar(event.step / max(event.steps, 1), t)}<div class="line">{text}{meter}</div>'
    )


def grid_progress(event: GridProgress, t: Tongue = ENGLISH) -> str:
    """Of which picture of a grid the progress line speaks, and how long all take."""
    now = min(event.done + 1, event.cells)
    text = t("Picture {n} of {all}", n=now, all=event.cells)
    if event.eta_s is not None:
        text = t(
            "Picture {n} of {all}, {time} left in all", n=now, all=event.cells, time=seconds(event.eta_s)
        )
    return f"<b>{text}</b> · "


def done(result: Result, t: Tongue = ENGLISH) -> str:
    peak = f" · {memory.peaks(result.peak_bytes, result.plan, t)}" if result.peak_bytes else ""
    time = seconds(result.timings["total"])
    count = result.settings.get("grid", {}).get("cells", len(result.files))  # a grid's sheet has many
    text = (
        t("1 picture in {time}", time=time) if count == 1 else t("{n} pictures in {time}", n=count, time=time)
    )
    return _status("done", f"<p>{text}{peak}</p>{notices(result.notices, t)}")


def failed(text: str) -> str:
    return _status("failed", f'<p role="alert">{escape(text)}</p>')


def stopped(t: Tongue = ENGLISH) -> str:
    return _status("idle", f"<p>{t('Stopped.')}</p>")


def notices(texts: Iterable[str], t: Tongue = ENGLISH) -> str:
    return "".join(f'<p class="notice">{escape(t.told(text))}</p>' for text in texts)


def files(result: Result, outputs: Path, t: Tongue = ENGLISH) -> str:
    """Links to the finished pictures; apart from the progress line, as they stay as long as the pictures."""
    links = "".join(
        _download(file, seed, outputs, t) for file, seed in zip(result.files, result.seeds, strict=False)
    )
    return f'<ul class="files">{links}</ul>'


def _download(file: Path, seed: int, outputs: Path, t: Tongue) -> str:
    href, label = escape(file_url(file, outputs)), t("Download the PNG of seed {seed}", seed=seed)
    return (
        f'<li><a href="{href}" download="{escape(file.name)}" aria-label="{escape(label)}">'
        f"<span>{t('seed')}</span> {seed} <b>PNG ↓</b></a></li>"
    )


def _status(state: str, inner: str) -> str:
    live = "" if state == "busy" else ' role="status"'
    return f'<div class="status" data-state="{state}"{live}>{inner}</div>'


def _bar(share: float | None, t: Tongue = ENGLISH) -> str:
    label = t("Progress")
    if share is None:
        return f'<div class="bar" role="progressbar" aria-label="{label}"><i class="unknown"></i></div>'
    percent = round(100 * min(share, 1))
    return (
        f'<div class="bar" role="progressbar" aria-label="{label}" aria-valuenow="{percent}">'
        f'<i style="width:{percent}%"></i></div>'
    )


# ---- the jobs of a tab


def jobs(mine: Sequence[tuple[Job, int]], outputs: Path, t: Tongue = ENGLISH) -> str:
    """What was made lately, the newest first, and what runs and waits, each with its place; nothing where the
    canvas and the progress line say all."""
    active = [(job, place) for job, place in mine if job.active]
    ended = [job for job, _ in reversed(mine) if not job.active and job.finished is not None]
    rows = "".join(_job(job, place, t) for job, place in active) if len(active) > 1 else ""
    made = "".join(_made(job, outputs, t) for job in ended)
    queue = f'<ol class="queue" aria-label="{t("Queue")}">{rows}</ol>' if rows else ""
    few = len(ended) < 2 and not active
    strip = f'<ul class="made" aria-label="{t("Made just now")}">{made}</ul>' if made and not few else ""
    return f'<div class="jobs">{queue}{strip}</div>' if queue or strip else ""


def _job(job: Job, place: int, t: Tongue) -> str:
    where = t("now") if job.state == "running" else t("place {n}", n=place + 1)
    title = escape(job.title) or f"<em>{t('no prompt')}</em>"
    label = escape(t("Cancel: {what}", what=job.title))
    return (
        f'<li data-state="{job.state}"><span class="where">{where}</span><span class="title">{title}</span>'
        f'<button type="button" data-cancel="{job.id}" aria-label="{label}">✕</button></li>'
    )


def _made(job: Job, outputs: Path, t: Tongue) -> str:
    assert job.finished is not None
    files = job.finished.result.files
    if not files or not files[0].is_relative_to(outputs):
        return ""
    source, more = escape(file_url(files[0], outputs, "thumbnails")), len(files) - 1
    count = f"<b>+{more}</b>" if more else ""
    label = escape(t("Show again: {what}", what=job.title))
    return (
        f'<li><button type="button" data-show="{job.id}" aria-label="{label}">'
        f'<img src="{source}" alt="" loading="lazy">{count}</button></li>'
    )


# ---- the checkpoint


def examples(texts: Sequence[str], t: Tongue = ENGLISH) -> str:
    """Prompts to click on."""
    chips = "".join(f'<button type="button">{escape(text)}</button>' for text in texts)
    return f'<div class="examples"><span>{t("Try")}</span>{chips}</div>' if texts else ""


def vocabulary(
    known: Mapping[str, Sequence[str]],
    full: CatalogueEntry,
    t: Tongue = ENGLISH,
    *,
    strangers: bool = False,
) -> str:
    """The note of a built-in demo checkpoint: what it is, what it knows, and the terms of the full one."""
    rows = "".join(
        f"<dt>{escape(t(kind))}</dt><dd>{escape(', '.join(each))}</dd>"
        for kind, each in known.items()
        if each
    )
    about = t("This is the built-in demo, a very small model that paints flat postcards and nothing else.")
    other = terms = ""
    if not strangers:  # who can have what is there, and nothing else
        name, link = f"<b>{escape(full.name)}</b>", linked(full.title, full.url)
        other = t(
            "For any other picture choose {name}, or a checkpoint of your own, under Advanced.", name=name
        )
        told = t("Terms of {name}: {terms}.", name=link, terms=escape(t(full.licence)))
        terms = f'<p class="terms">{told}</p>'
    return (
        f'<div class="note"><p><b>{about}</b> {other}</p>'
        f"<details><summary>{t('The words it knows')}</summary>"
        f"<p>{t('It reads English.')}</p><dl>{rows}</dl></details>"
        f"{terms}</div>"
    )


def licence(title: str, text: str, page: str | None, t: Tongue = ENGLISH, *, lacking: int = 0) -> str:
    """The note of any other; `lacking` are the bytes that are to be downloaded first."""
    unknown = t("Licence unknown: see where it came from.")
    terms = t("Licence of its weights: {terms}.", terms=escape(t(text))) if text else unknown
    first = t("Not on this machine yet: Generate downloads it first, {size}.", size=size(lacking))
    absent = f"<p><b>{first}</b></p>" if lacking else ""
    return f'<div class="note"><p><b>{linked(title, page)}</b>. {terms}</p>{absent}</div>'


def linked(title: str, page: str | None) -> str:
    """The title as a link to the page where a licence can be read, or accepted."""
    if page is None:
        return escape(title)
    return f'<a href="{escape(page)}" target="_blank" rel="noopener">{escape(title)}</a>'


def problem(text: str) -> str:
    return f'<div class="note"><p class="problem" role="alert">{escape(text)}</p></div>'
