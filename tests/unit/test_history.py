"""The History tab's handlers: what they show to whom, and what they make of calls that no page would send."""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gradio as gr
import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from starlette.requests import Request

from backend import Settings, infotext
from backend.errors import InvalidRequest
from backend.gallery import Gallery
from ui.history import PAGE, Shelf, number
from ui.i18n import Tongue
from ui.visitors import COOKIE, session_of

PICTURE = Image.new("RGB", (16, 8), "red")
SETTINGS: dict[str, Any] = {
    "prompt": "a red house",
    "negative_prompt": "rain",
    "steps": 3,
    "guidance_scale": 4.0,
    "sampler": "euler",
    "width": 128,
    "height": 64,
    "checkpoint": "demo",
    "raw_prompt": False,
    "clip_skip": 0,
}
TOKENS = {name: f"{name}-{'x' * 30}" for name in ("me", "you")}
HOSTILE: list[Any] = [
    None,
    "text",
    17,
    [],
    {},
    {"deed": "delete"},
    {"deed": "delete", "name": None},
    {"deed": "delete", "name": ["a"]},
    {"deed": "delete", "name": "../../etc/passwd"},
    {"deed": "delete", "name": "\ud83c\0"},
    {"deed": ["delete"], "name": {}},
    {"deed": "favourite", "name": "x", "on": "<script>"},
    {"deed": "<script>", "name": "<script>"},
    {"deed": "page", "start": 10**30},
    {"deed": "page", "start": -(10**30)},
    {"deed": "page", "start": "48"},
    {"deed": "page", "start": float("nan")},
    {"deed": "page", "start": True},
]


def page(who: str = "") -> gr.Request:
    """Somebody's call; without a name, from one that keeps no cookies."""
    headers = [(b"cookie", f"{COOKIE}={TOKENS[who]}".encode())] if who else []
    scope = {"type": "http", "headers": headers, "method": "POST", "path": "/", "query_string": b""}
    return gr.Request(Request(scope | {"client": ("10.0.0.1", 1), "server": ("here", 80)}))


def event(data: Any) -> gr.EventData:
    return gr.EventData(None, data)


@pytest.fixture
def notes(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What appears in the corner of the page."""
    said: list[str] = []
    for name in ("Info", "Warning"):
        monkeypatch.setattr(gr, name, lambda text, **_: said.append(text))
    return said


def shelf(home: Path, *, public: bool = False) -> Shelf:
    studio: Any = SimpleNamespace(settings=Settings(home=home, public=public), gallery=Gallery(home))
    return Shelf(studio, lambda page, family, settings: [family, settings], 2)


def keep(at: Shelf, prompt: str = "a red house", owner: str = "", **more: Any) -> str:
    """A picture → its name."""
    facts = {**SETTINGS, "prompt": prompt, **more}
    text = infotext.describe(facts, 7)
    file = at.studio.gallery.save(PICTURE, text, {**facts, "seed": 7, "family": "sd15"}, owner=owner)
    return file.relative_to(at.studio.gallery.outputs).as_posix()


def shown(html: str) -> list[str]:
    """The names of the pictures that it lists."""
    return re.findall(r'class="thumb" data-name="([^"]+)"', html)


def test_newest_first_a_page_at_a_time(tmp_path: Path) -> None:
    at = shelf(tmp_path)
    names = [keep(at, f"number {count}") for count in range(PAGE + 2)][::-1]
    first, second = at.newest(page(), "", False), at.act(page(), "", False, event({"start": PAGE}))
    assert shown(first) == names[:PAGE]
    assert shown(second) == names[PAGE:]
    assert f"1–{PAGE} of {PAGE + 2}" in first
    assert f"{PAGE + 1}–{PAGE + 2} of {PAGE + 2}" in second
    assert shown(at.newest(page(), "NUMBER 47", False)) == [names[-48]]
    assert at.act(page(), "", False, event({"start": 10**30})) == second  # the last that there is
    assert shown(at.newest(page(), "", True)) == []


def test_everything_from_outside_is_escaped(tmp_path: Path) -> None:
    at, bad = shelf(tmp_path), "<img src=x onerror=alert(1)>\"'&"
    keep(at, bad, negative_prompt=bad, checkpoint=f"me/{bad}", sampler=bad)
    html = at.newest(page(), bad, False)
    assert shown(html)
    assert "<img src=x" not in html
    assert "&lt;img src=x onerror=alert(1)&gt;&quot;&#x27;&amp;" in html
    assert "<img src=x" not in at.newest(page(), f"{bad} nowhere", True)


@pytest.mark.parametrize("data", HOSTILE, ids=lambda data: f"{data!r:.40}")
@pytest.mark.parametrize("public", [False, True])
def test_calls_that_no_page_would_send(tmp_path: Path, notes: list[str], data: Any, public: bool) -> None:
    at = shelf(tmp_path, public=public)
    name = keep(at, owner=session_of({COOKIE: TOKENS["me"]}))
    for search, favourites in (("", False), (None, None), (["a"], "yes"), ({"a": 1}, 3)):
        html = at.act(page("me"), search, favourites, event(data))
        assert shown(html) == [name]
        assert "<script>" not in html
    assert len(at.reuse(page("me"), event(data))) == 2
    assert notes == ["That picture is no longer there."]
    assert len(at.read(page("me"), data)) == 3


def test_a_picture_is_loved_deleted_and_had_back(tmp_path: Path) -> None:
    at = shelf(tmp_path)
    name = keep(at)
    html = at.act(page(), "", False, event({"deed": "favourite", "name": name, "on": True}))
    assert 'data-favourite="true"' in html
    assert shown(at.newest(page(), "", True)) == [name]
    html = at.act(page(), "", False, event({"deed": "delete", "name": name}))
    assert shown(html) == []
    assert f'Deleted. <button type="button" data-deed="undelete" data-name="{name}">Undo</button>' in html
    assert "no longer there" in at.act(page(), "", False, event({"deed": "delete", "name": name}))
    html = at.act(page(), "", False, event({"deed": "undelete", "name": name}))
    assert shown(html) == [name]
    assert "It is back." in html


def test_strangers_have_pictures_of_their_own(tmp_path: Path, notes: list[str]) -> None:
    at = shelf(tmp_path, public=True)
    mine, yours = (keep(at, owner=session_of({COOKIE: TOKENS[who]})) for who in ("me", "you"))
    unknown = keep(at)
    assert shown(at.newest(page("me"), "", False)) == [mine]
    assert shown(at.newest(page("you"), "house", False)) == [yours]
    assert shown(at.newest(page(), "", False)) == []
    for who in ("me", ""):
        for name in (yours, unknown):
            for deed in ("delete", "undelete", "favourite"):
                asked = {"deed": deed, "name": name, "on": True}
                assert "no longer there" in at.act(page(who), "", False, event(asked))
            assert at.reuse(page(who), event({"name": name}))[0] != "sd15"
    assert set(notes) == {"That picture is no longer there."}
    assert shown(at.newest(page("you"), "", True)) == []
    private = shelf(tmp_path)
    assert shown(private.newest(page("me"), "", False)) == [unknown, yours, mine]  # one library for all
    assert shown(private.newest(page(), "", False)) == [unknown, yours, mine]


def test_no_paths_are_shown(tmp_path: Path) -> None:
    at = shelf(tmp_path, public=True)
    keep(at, owner=session_of({COOKIE: TOKENS["me"]}))
    assert str(tmp_path) not in at.newest(page("me"), "", False)
    at.studio.gallery.index.write_bytes(b"no database" * 100)
    told = at.newest(page("me"), "", False)
    assert "The history cannot be read just now" in told
    assert str(tmp_path) not in told
    assert "The pictures are safe" in shelf(tmp_path).newest(page(), "", False)


def test_settings_of_a_picture(tmp_path: Path) -> None:
    at = shelf(tmp_path)
    family, settings = at.reuse(page(), event({"name": keep(at, num_images=4)}))
    assert family == "sd15"
    assert settings == {**SETTINGS, "seed": 7, "family": "sd15", "num_images": 1}


def test_settings_of_a_picture_that_was_only_found(tmp_path: Path) -> None:
    at = shelf(tmp_path)
    name = keep(at)
    at.studio.gallery.index.unlink()
    family, settings = at.reuse(page(), event({"name": shown(at.newest(page(), "", False))[0]}))
    assert family == "sd15"
    assert {**SETTINGS, "seed": 7}.items() <= settings.items()
    assert name in at.newest(page(), "", False)


def png(folder: Path, text: str | None) -> str:
    info = PngInfo()
    if text is not None:
        info.add_text("parameters", text)
    PICTURE.save(folder / "some.png", pnginfo=info)
    return str(folder / "some.png")


def test_settings_of_a_file(tmp_path: Path, notes: list[str]) -> None:
    text = infotext.describe(SETTINGS, 7)
    assert shelf(tmp_path).read(page(), png(tmp_path, text)) == [
        None,
        "sd15",
        {**infotext.understand(text).settings, "num_images": 1},
    ]
    assert notes == ["Restored into Stable Diffusion 1.5."]


def test_what_of_a_file_is_not_restored_is_named(tmp_path: Path, notes: list[str]) -> None:
    fields = {f"Field <b>{number}": 1 for number in range(20)}
    named = {f"Field {number}": 1 for number in range(20)} | {"Some very long name " * 5: 1}
    for more in (named, fields):
        shelf(tmp_path).read(
            page(), png(tmp_path, infotext.write("a", "", {"Steps": 999, **more, "Seed": 1}))
        )
    assert "Not known here: Field 0, Field 1, Field 2," in notes[0]
    assert "Field 7, 13 more. Of no use here: Steps." in notes[0]
    assert "<b>" not in notes[1]


def test_strangers_restore_catalogued_checkpoints_alone(tmp_path: Path, notes: list[str]) -> None:
    text = infotext.describe({**SETTINGS, "checkpoint": "someone/else"}, 7)
    _, _, settings = shelf(tmp_path).read(page(), png(tmp_path, text))
    assert settings["checkpoint"] == "someone/else"
    _, _, settings = shelf(tmp_path, public=True).read(page(), png(tmp_path, text))
    assert "checkpoint" not in settings
    assert notes[1] == "Restored into Stable Diffusion 1.5. Of no use here: Model."


def test_a_file_that_tells_nothing(tmp_path: Path, notes: list[str]) -> None:
    at = shelf(tmp_path)
    for path in (png(tmp_path, None), str(tmp_path), str(tmp_path / "missing.png"), "\0"):
        first, *rest = at.read(page(), path)
        assert first is None
        assert [update["__type__"] for update in rest] == ["update", "update"]
    assert "some.png has no settings in it" in notes[0]
    assert len(notes) == 4
    assert not any(str(tmp_path.parent) in note for note in notes)
    with pytest.raises(InvalidRequest):
        infotext.of_file(Path("\0"))


@pytest.mark.parametrize(
    ("code", "text"), [("en", "5,231"), ("de", "5.231"), ("it", "5.231"), ("ar", "5,231")]
)
def test_numbers_as_the_language_writes_them(code: str, text: str) -> None:
    assert number(5231, Tongue(code)) == text
