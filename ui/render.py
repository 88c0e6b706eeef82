"""What the page says, as HTML: the canvas, the progress line, the note about the checkpoint.

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
from backend.events import Loading, Result, Step
from backend.memory.plan import Plan
from ui import memory, words
from ui.words import seconds, size

COLUMNS = {1: 1, 2: 2, 3: 2, 4: 2, 5: 3, 6: 3, 7: 4, 8: 4}
BUSY, IDLE = 'data-state="busy"', 'data-state="idle"'  # of the progress line, and of the canvas
QUALITY = 88  # JPEG: a 64-pixel preview is about 2 kB

LOGO = """
<header class="masthead">
  <svg viewBox="0 0 34 24" width="34" height="24" aria-hidden="true">
    <path d="M1 4 9 1v22l-8-3z"/><path d="M12 1h10v22H12z"/><path d="m25 1 8 3v16l-8 3z"/></svg>
  <h1>Triptych</h1><p>a text-to-image studio</p>
</header>"""


# ---- the canvas


def idle() -> str:
    keys = "<kbd>Ctrl</kbd> <kbd>Enter</kbd> paints it, <kbd>Esc</kbd> stops."
    return _canvas(
        "idle", f'<p class="hint">Your picture appears here.<span class="keys"><br>{keys}</span></p>'
    )


def previews(images: Sequence[Image], ratio: float) -> str:
    """What there is to see so far, in the shape of the picture to come."""
    tiles = [_tile(data_url(image), "Preview", ratio) for image in images]
    return _canvas("busy", "".join(tiles), len(tiles))


def pictures(result: Result, outputs: Path) -> str:
    """The finished pictures, shown from their PNG files."""
    ratio, prompt = result.settings["width"] / result.settings["height"], result.settings["prompt"]
    tiles = [_tile(file_url(file, outputs), prompt, ratio) for file in result.files]
    return _canvas("done", "".join(tiles), len(tiles))


def unsaved(images: Sequence[Image]) -> str:
    """Pictures that could not be written, carried by the page itself: the browser can still save them."""
    tiles = [_tile(data_url(image, "png"), "Unsaved picture", image.width / image.height) for image in images]
    return _canvas("done", "".join(tiles), len(tiles), "canvas unsaved")


def _canvas(state: str, inner: str, count: int = 1, name: str = "canvas") -> str:
    return f'<div class="{name}" data-state="{state}" style="--columns:{COLUMNS[count]}">{inner}</div>'


def _tile(url: str, alt: str, ratio: float) -> str:
    image = f'<img src="{escape(url)}" alt="{escape(alt)}" style="--ratio:{ratio:.4f}" draggable="true">'
    return f'<button type="button" class="tile" aria-label="Enlarge: {escape(alt)}">{image}</button>'


def data_url(image: Image, kind: str = "jpeg") -> str:
    buffer = io.BytesIO()
    image.convert("RGB").save(buffer, kind, quality=QUALITY)
    return _base64(buffer.getvalue(), kind)


def file_url(file: Path, outputs: Path) -> str:
    """Where the page finds a picture: the very file, so that a download keeps its text chunk.

    One that had to be written elsewhere travels in the page: the server serves the outputs alone.
    """
    if file.is_relative_to(outputs):
        return f"gradio_api/file={quote(file.as_posix())}"
    return _base64(file.read_bytes(), "png")


def _base64(data: bytes, kind: str) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"


# ---- the progress line


def ready() -> str:
    return _status("idle", "<p>Ready.</p>")


def starting(text: str = "Waiting for a place…") -> str:
    return _status("busy", _bar(None) + f"<p>{escape(text)}</p>")


def loading(event: Loading) -> str:
    verb = "Downloading" if event.action == "download" else "Loading"
    share = event.done_bytes / event.total_bytes if event.total_bytes else None
    of = f" of {size(event.total_bytes)}" if event.total_bytes else ""
    text = f"{verb} {escape(words.the_part(event.component))} <span>{size(event.done_bytes)}{of}</span>"
    return _status("busy", _bar(share) + f"<p>{text}</p>")


def step(event: Step, plan: Plan | None = None) -> str:
    """How far it is, and beside it what memory it takes of what it may."""
    left = "" if event.eta_s is None or event.eta_s < 0.05 else f" <span>{seconds(event.eta_s)} left</span>"
    count = f" · step {event.step} of {event.steps}" if event.steps > 1 else ""
    text = f"<p>{escape(words.phase(event.phase))}{count}{left}</p>"
    meter = memory.meter(event.memory_bytes, plan) if plan and event.memory_bytes else ""
    return _status("busy", f'{_bar(event.step / max(event.steps, 1))}<div class="line">{text}{meter}</div>')


def done(result: Result) -> str:
    peak = f" · {memory.peaks(result.peak_bytes, result.plan)}" if result.peak_bytes else ""
    noun = "picture" if len(result.files) == 1 else "pictures"
    text = f"<p>{len(result.files)} {noun} in {seconds(result.timings['total'])}{peak}</p>"
    return _status("done", text + notices(result.notices))


def failed(text: str) -> str:
    return _status("failed", f'<p role="alert">{escape(text)}</p>')


def stopped() -> str:
    return _status("idle", "<p>Stopped.</p>")


def notices(texts: Iterable[str]) -> str:
    return "".join(f'<p class="notice">{escape(text)}</p>' for text in texts)


def files(result: Result, outputs: Path) -> str:
    """Links to the finished pictures; apart from the progress line, as they stay as long as the pictures."""
    links = "".join(
        _download(file, seed, outputs) for file, seed in zip(result.files, result.seeds, strict=False)
    )
    return f'<ul class="files">{links}</ul>'


def _download(file: Path, seed: int, outputs: Path) -> str:
    href, label = escape(file_url(file, outputs)), f"Download the PNG of seed {seed}"
    return (
        f'<li><a href="{href}" download="{escape(file.name)}" aria-label="{label}">'
        f"<span>seed</span> {seed} <b>PNG ↓</b></a></li>"
    )


def _status(state: str, inner: str) -> str:
    live = "" if state == "busy" else ' role="status"'
    return f'<div class="status" data-state="{state}"{live}>{inner}</div>'


def _bar(share: float | None) -> str:
    if share is None:
        return '<div class="bar" role="progressbar" aria-label="Progress"><i class="unknown"></i></div>'
    percent = round(100 * min(share, 1))
    return (
        f'<div class="bar" role="progressbar" aria-label="Progress" aria-valuenow="{percent}">'
        f'<i style="width:{percent}%"></i></div>'
    )


# ---- the checkpoint


def examples(texts: Sequence[str]) -> str:
    """Prompts to click on."""
    chips = "".join(f'<button type="button">{escape(text)}</button>' for text in texts)
    return f'<div class="examples"><span>Try</span>{chips}</div>' if texts else ""


def vocabulary(words: Mapping[str, Sequence[str]], full: CatalogueEntry) -> str:
    """The note of a built-in demo checkpoint: what it is, what it knows, and the terms of the full one."""
    rows = "".join(
        f"<dt>{escape(kind)}</dt><dd>{escape(', '.join(known))}</dd>"
        for kind, known in words.items()
        if known
    )
    return (
        '<div class="note"><p><b>This is the built-in demo</b>, a very small model that paints flat postcards'
        f" and nothing else. For any other picture choose <b>{escape(full.name)}</b>, or a checkpoint of your"
        " own, under <b>Advanced</b>.</p>"
        f"<details><summary>The words it knows</summary><dl>{rows}</dl></details>"
        f'<p class="terms">Terms of {linked(full.title, full.url)}: {escape(full.licence)}.</p></div>'
    )


def licence(title: str, text: str, page: str | None) -> str:
    terms = f"Licence of its weights: {escape(text)}." if text else "Licence unknown: see where it came from."
    return f'<div class="note"><p><b>{linked(title, page)}</b>. {terms}</p></div>'


def linked(title: str, page: str | None) -> str:
    """The title as a link to the page where a licence can be read, or accepted."""
    if page is None:
        return escape(title)
    return f'<a href="{escape(page)}" target="_blank" rel="noopener">{escape(title)}</a>'


def problem(text: str) -> str:
    return f'<div class="note"><p class="problem" role="alert">{escape(text)}</p></div>'
