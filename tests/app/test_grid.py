"""Grids on the page: what would be made, what is painted, what is still there after a stop."""

from __future__ import annotations

import json
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gradio as gr
import pytest
from PIL import Image
from playwright.sync_api import Locator, Page, expect

from backend import SD15Request, Settings, Studio
from backend.errors import Cancelled, CheckpointError, InvalidRequest
from backend.events import Event, Finished, GridProgress
from backend.grid import Grid, fields, unfinished
from backend.requests import REQUESTS
from tests.app.pages import no_sideways_scroll, prompt, reload, slider, status
from tests.app.support import Server
from tests.unit.test_grid import Pretence, stop_before
from ui import grid as grids
from ui.grid import GridFold, fold
from ui.jobs import Jobs
from ui.visitors import COOKIE, visitor

PROMPT = "a red house on green hills"


def unfold(page: Page) -> Locator:
    """Open the fold → what says what would be made."""
    page.locator(".grid-fold button.label-wrap").click()
    said = page.locator(".grid-said p")
    expect(said).to_contain_text("One after the other, or a range")
    return said


def choose(page: Page, side: str, name: str, values: str) -> None:
    field = page.get_by_label(side)
    field.click()
    options = page.locator(f"#{field.get_attribute('aria-controls')}")  # another list may not be closed yet
    options.get_by_role("option", name=name, exact=True).click()
    page.get_by_label("Values").nth(0 if side.startswith("Across") else 1).fill(values)


def paint(page: Page) -> None:
    page.get_by_role("button", name="Paint grid").click()


def made(server: Server) -> set[Path]:
    return {path for path in server.pictures if not path.name.startswith(".")}


def test_a_grid_is_painted_on_the_page(page: Page, server: Server) -> None:
    before = made(server)
    prompt(page).fill(PROMPT)
    slider(page, "Steps", 2)
    said = unfold(page)
    choose(page, "Across (X)", "Prompt words", "red, blue, purple")
    expect(said).to_contain_text("3 pictures")
    choose(page, "Down (Y)", "Guidance", "1-5 (+4)")
    expect(said).to_contain_text("6 pictures, 3 × 2")
    assert no_sideways_scroll(page)
    paint(page)
    expect(status(page, "done")).to_contain_text("6 pictures in")
    files = made(server) - before
    assert len(files) == 7
    shown = page.locator(".canvas[data-state=done] img")
    expect(shown).to_have_count(1)
    sheet = next(file for file in files if file.name in (shown.get_attribute("src") or ""))
    with Image.open(sheet) as picture:
        assert 'X Values: "red, blue, purple"' in picture.info["parameters"]
        ratio = float(shown.evaluate("each => each.offsetWidth / each.offsetHeight"))
        assert ratio == pytest.approx(picture.width / picture.height, rel=0.02)
    assert no_sideways_scroll(page)
    expect(page.locator(".grid-rest")).to_have_count(0)
    assert not unfinished(server.home, "sd15")


def test_what_is_wrong_is_said_while_typing(wide: Page) -> None:
    prompt(wide).fill(PROMPT)
    said = unfold(wide)
    values = wide.get_by_label("Values").first
    expect(values).to_have_attribute("placeholder", "10-30 (+5)")
    for text, answer in {
        "0, 20": "steps is 0; it can be a whole number from 1 to 150",
        "1-150": "steps 1-150 has 150 values",
        "<b>20": "steps is '<b>20'",
        "20": "1 picture",
        "": "One after the other",
    }.items():
        values.fill(text)
        expect(said).to_contain_text(answer)
    choose(wide, "Across (X)", "Prompt words", "yellow, red")
    expect(said).to_contain_text("begins with 'yellow', which the prompt does not have")
    prompt(wide).fill("a yellow house")
    values.focus()
    expect(said).to_contain_text("2 pictures")
    choose(wide, "Across (X)", "Checkpoint", "demo, deom")
    expect(said).to_contain_text("checkpoint is 'deom'")
    values.fill("demo")
    choose(wide, "Down (Y)", "Sampler", "euler, nothing")
    expect(said).to_contain_text("sampler is 'nothing'; it can be pndm")


def test_a_bad_grid_is_refused_on_the_progress_line(wide: Page) -> None:
    unfold(wide)
    wide.get_by_label("Values").first.fill("0")
    paint(wide)
    expect(status(wide, "failed")).to_contain_text("steps is 0; it can be a whole number from 1 to 150")


def test_a_stopped_grid_is_resumed(wide: Page, server: Server) -> None:
    before = made(server)
    prompt(wide).fill(PROMPT)
    unfold(wide)
    choose(wide, "Across (X)", "Steps", "2, 3, 150")
    choose(wide, "Down (Y)", "Size", "256, 64")  # time enough to press a button
    paint(wide)
    expect(wide.locator(".status")).to_contain_text("Picture 3 of 6")
    wide.locator(".canvas img").first.wait_for()
    wide.get_by_role("button", name="Stop", exact=True).click()
    expect(status(wide, "idle")).to_contain_text("Stopped.")
    resume = wide.get_by_role("button", name="Resume")
    expect(resume).to_have_text("Resume (2 of 6)")
    expect(wide.locator(".grid-rest p")).to_contain_text(f"Not finished: Steps × Size {PROMPT}")
    assert len(made(server) - before) == 2
    reload(wide)  # whoever comes back finds it again
    wide.locator(".plan .bars").wait_for()
    unfold(wide)
    resume.click()
    expect(status(wide, "done")).to_contain_text("6 pictures in")
    assert len(made(server) - before) == 7
    expect(wide.locator(".grid-rest")).to_have_count(0)


def test_a_stopped_grid_can_be_forgotten(wide: Page, server: Server) -> None:
    before = made(server)
    prompt(wide).fill(PROMPT)
    unfold(wide)
    choose(wide, "Across (X)", "Steps", "2, 150")
    for side in ("Width", "Height"):
        wide.get_by_label(side, exact=True).fill("256")
    paint(wide)
    expect(wide.locator(".status")).to_contain_text("Picture 2 of 2")
    wide.get_by_role("button", name="Stop", exact=True).click()
    wide.get_by_role("button", name="Forget").click()
    expect(wide.locator(".grid-rest")).to_have_count(0)
    assert not unfinished(server.home, "sd15")
    assert len(made(server) - before) == 1  # what was made stays


# ---- the fold alone


def folded(settings: Settings, family: str = "sd15", studio: Any = None) -> GridFold:
    with gr.Blocks():
        return fold(studio or Studio(settings), REQUESTS[family])


@pytest.fixture
def private(tmp_path: Path) -> GridFold:
    return folded(Settings(home=tmp_path))


BASE = SD15Request(prompt=PROMPT, seed=1, width=64, height=64)


class Asked:
    """What Gradio tells of a browser with a session."""

    request = SimpleNamespace()
    client = SimpleNamespace(host="192.0.2.1")
    session_hash = "page"

    def __init__(self, session: str = "", language: str = "en") -> None:
        self.cookies = {COOKIE: session * 30} if session else {}
        self.headers = {"accept-language": language}


@pytest.mark.parametrize("family", REQUESTS)
def test_every_field_has_its_words(family: str, tmp_path: Path) -> None:
    known, words = fields(family), grids.titles()
    own = folded(Settings(home=tmp_path), family)
    assert known.keys() <= words.keys()
    assert [value for _, value in own.x.choices] == [name for name in words if name in known]
    assert own.y.choices[0] == ("nothing", "")
    for name, each in known.items():
        assert own.example(name)["placeholder"] == each.example
        assert grids.hint(each)
        assert grids.hint(each) in own.told(BASE, [name, "", "", "", True], "", grids.ENGLISH)


def test_the_choices_are_spoken_in_the_visitors_language(private: GridFold) -> None:
    page: Any = Asked(language="de")
    x, y = private.spoken(page)
    assert [value for _, value in x["choices"]] == [value for _, value in private.x.choices]
    assert y["choices"][1:] == x["choices"]


@pytest.mark.parametrize(
    "values",
    [
        ["num_images", "1, 2", "", "", True],
        [["steps"], "1, 2", "", "", True],
        [None, "1, 2", "", "", True],
        ["steps", 7, "", "", True],
        ["steps", ["1"], "", "", True],
        ["steps", "1, " * 5000, "", "", True],
        ["steps", "1", "steps", "2", True],
        ["steps", "1", {"a": 1}, "2", True],
        ["steps", None, "", None, None],
    ],
)
def test_whatever_is_posted_is_refused_in_words(private: GridFold, values: list[Any]) -> None:
    with pytest.raises(InvalidRequest):
        private.grid_of(BASE, values)
    assert private.told(BASE, values, "", grids.ENGLISH).startswith('<p class="p')


def test_a_checkpoint_that_is_none_is_refused_before_hours_have_passed(private: GridFold) -> None:
    with pytest.raises(CheckpointError, match="checkpoint is 'deom'"):
        private.grid_of(BASE, ["checkpoint", "demo, deom", "", "", True])


def test_strangers_are_told_what_they_may(tmp_path: Path) -> None:
    public = folded(Settings(home=tmp_path, public=True))
    said = public.told(BASE, ["seed", "1-10", "", "", True], "me", grids.ENGLISH)
    assert "10 x 1 pictures; on this public server it can have up to 9" in said
    said = public.told(BASE, ["checkpoint", "demo, /etc/passwd", "", "", True], "me", grids.ENGLISH)
    assert "checkpoint is &#x27;/etc/passwd&#x27;; on this public server it can be demo, sd15" in said
    assert (
        public.told(BASE, ["seed", "1-9", "", "", False], "me", grids.ENGLISH)
        == '<p class="plain">9 pictures</p>'
    )


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(0.3, "a few seconds"), (12, "10 s"), (58, "60 s"), (170, "3 min"), (5900, "98 min"), (9000, "2.5 h")],
)
def test_times_that_are_guessed(seconds: float, words: str) -> None:
    assert grids.roughly(seconds) == words


def test_how_long_it_takes_goes_by_what_was_made_last(private: GridFold) -> None:
    values = ["steps", "10, 20, 40", "", "", True]
    assert private.duration(private.grid_of(BASE, values), "") is None
    facts = {
        "family": "sd15",
        "checkpoint": "demo",
        "steps": 10,
        "width": 128,
        "height": 128,
        "num_images": 2,
    }
    for total in (4.0, 8.0, 400.0):
        private.studio.gallery.save(Image.new("RGB", (8, 8)), "", {**facts, "timings": {"total": total}})
    for other in ({"family": "sd3"}, {"checkpoint": "sd15"}, {"grid": {}}, {"timings": {}}):
        told = {**facts, "timings": {"total": 1e6}, **other}
        private.studio.gallery.save(Image.new("RGB", (8, 8)), "", told)
    # 8 s of two pictures: 4 s for 10 steps at four times the size, and 70 steps to go
    assert private.duration(private.grid_of(BASE, values), "") == pytest.approx(7.0)
    assert (
        private.told(BASE, values, "", grids.ENGLISH)
        == '<p class="plain">3 pictures, in about a few seconds</p>'
    )


def begun(studio: Any, owner: str, prompt: str = PROMPT) -> Grid:
    from backend.grid import Axis, paint

    grid = Grid(SD15Request(prompt=prompt, seed=1, width=64, height=64), Axis("steps", (1, 2, 3)))
    studio.before = stop_before(2)
    with pytest.raises(Cancelled):
        list(paint(studio, grid, threading.Event(), owner))
    return grid


def test_visitors_resume_and_forget_their_own_alone(tmp_path: Path) -> None:
    studio: Any = Pretence(tmp_path, public=True)
    public = folded(studio.settings, studio=studio)
    one, other, nobody = (Asked(session) for session in ("a", "b", ""))
    pages: list[Any] = [one, other, nobody]
    owners = [visitor(page, studio.settings).owner(studio.settings) for page in pages]
    for owner in owners:
        begun(studio, owner, "<i>red</i>")
    visible, told, button = public.refresh(pages[0])
    assert visible["visible"] is True
    assert "&lt;i&gt;red" in told
    assert button["value"] == "Resume (1 of 3)"
    assert public.refresh(pages[2])[0]["visible"] is False  # those without a cookie cannot be told apart
    assert public.forget(pages[0])[0]["visible"] is False
    assert public.forget(pages[2])[0]["visible"] is False
    assert public.refresh(pages[1])[0]["visible"] is True
    assert len(unfinished(tmp_path, "sd15", owners[2])) == 1


def test_while_a_grid_runs_there_is_nothing_to_resume(tmp_path: Path) -> None:
    studio: Any = Pretence(tmp_path)
    own = folded(studio.settings, studio=studio)
    grid = begun(studio, "")
    studio.before = stop_before(99)
    first = own.begun("")
    assert first is not None
    jobs = Jobs(studio)
    work, again = (own.work(jobs, grid, "", first.key) for _ in range(2))
    events: list[Event] = []
    for event in work(threading.Event()):
        events.append(event)
        if isinstance(event, GridProgress):
            assert own.begun("") is None
    assert isinstance(events[-1], Finished)
    assert own.begun("") is None
    with pytest.raises(InvalidRequest, match="no grid to resume; it is finished"):
        list(again(threading.Event()))  # pressed twice: it is not painted twice
    assert len(studio.asked) == 3


def test_a_state_is_no_place_for_secrets(tmp_path: Path) -> None:
    studio: Any = Pretence(tmp_path, public=True)
    page: Any = Asked("a")
    owner = visitor(page, studio.settings).owner(studio.settings)
    begun(studio, owner)
    (file,) = tmp_path.glob("grids/*/grid.json")
    assert json.loads(file.read_text())["owner"] == owner
    assert page.cookies[COOKIE] not in file.read_text()
