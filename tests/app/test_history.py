"""The History tab in a real browser: what was made is found, looked at, compared, used again, thrown away."""

from __future__ import annotations

import base64
import io
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from playwright.sync_api import Browser, Locator, Page, expect

from backend import gallery_index, infotext
from backend.gallery import Gallery
from tests.app.pages import NARROW, generate, no_sideways_scroll, opened, prompt, reload, slider
from tests.app.support import Server

SETTINGS: dict[str, Any] = {
    "negative_prompt": "rain",
    "steps": 3,
    "guidance_scale": 4.0,
    "sampler": "euler",
    "width": 128,
    "height": 128,
    "checkpoint": "demo",
    "raw_prompt": False,
    "clip_skip": 0,
}
CASCADE: dict[str, Any] = {
    "negative_prompt": "",
    "prior_steps": 7,
    "prior_guidance_scale": 3.5,
    "decoder_steps": 4,
    "decoder_guidance_scale": 1.5,
    "width": 256,
    "height": 128,
    "checkpoint": "demo",
    "stages": "auto",
    "stage_c": None,
    "stage_b": None,
    "ran": {"stage_c": "full", "stage_b": "full"},
    "images": [],
    "raw_prompt": False,
    "clip_skip": 0,
}
OTHER_TOOL = (
    "a cat in a hat\nNegative prompt: dogs\nSteps: 9, Sampler: DPM++ 2M, Schedule type: Karras, CFG scale: 6,"
    " Seed: 4711, Size: 128x192, Model: ponyXL_v6, VAE hash: 735e4c3a44, Hires upscale: 2, Version: v1.10.1"
)
KEPT = 3000
# Drops a PNG, given in base64, on an element.
DROP = """(element, content) => {
  const bytes = Uint8Array.from(atob(content), (each) => each.charCodeAt(0)), data = new DataTransfer();
  data.items.add(new File([bytes], 'dropped.png', {type: 'image/png'}));
  element.dispatchEvent(new DragEvent('drop', {dataTransfer: data, bubbles: true, cancelable: true}));
}"""


@pytest.fixture
def narrow(browser: Browser, server: Server) -> Iterator[Page]:
    yield from opened(browser, server, viewport=NARROW, has_touch=True)


def keep(home: Path, words: str, colour: str, seed: int, family: str = "sd15", **more: Any) -> Path:
    """A picture in the server's history, without the work of painting it."""
    settings: dict[str, Any] = {
        **(CASCADE if family == "stable_cascade" else SETTINGS),
        "prompt": words,
        **more,
    }
    image = Image.new("RGB", (settings["width"], settings["height"]), colour)
    facts = {**settings, "seed": seed, "family": family}
    return Gallery(home).save(image, infotext.describe(settings, seed), facts)


def open_history(page: Page, search: str = "") -> Locator:
    """The tab, with what the search finds."""
    page.get_by_role("tab", name="History").click()
    panel = page.get_by_role("tabpanel")
    panel.locator(".pages").first.wait_for()
    panel.get_by_label("Search").fill(search)
    return panel


def names(panel: Locator) -> list[str]:
    return panel.locator(".thumb").evaluate_all("all => all.map((each) => each.ariaLabel)")


def test_a_picture_that_is_made_is_kept_found_loved_and_thrown_away(wide: Page, server: Server) -> None:
    slider(wide, "Steps", 2)
    wide.get_by_label("Seed", exact=True).fill("99")
    prompt(wide).fill("a yellow tent on green hills, QUOKKA")
    generate(wide)
    panel, viewer = open_history(wide, "quokka tent"), wide.locator("dialog.viewer")
    expect(panel.locator(".thumb")).to_have_count(1)
    expect(panel.locator(".pages").first).to_have_text("1 picture")
    thumbnail = panel.locator(".thumb img")
    assert thumbnail.evaluate("image => image.decode().then(() => image.naturalWidth)") == 128
    panel.locator(".thumb").click()
    expect(viewer.locator(".prompt")).to_have_text("a yellow tent on green hills, QUOKKA")
    expect(viewer.locator("dl")).to_contain_text("Seed99")
    assert (
        viewer.locator(".picture img").evaluate("image => image.decode().then(() => image.naturalWidth)")
        == 128
    )
    with wide.expect_download() as download:
        viewer.get_by_role("link", name="Download").click()
    name = unquote(panel.locator(".thumb").get_attribute("data-name") or "")
    assert download.value.path().read_bytes() == (server.home / "outputs" / name).read_bytes()

    viewer.get_by_role("button", name="Favourite").click()
    expect(viewer.get_by_role("button", name="Favourite")).to_have_attribute("aria-pressed", "true")
    for _ in range(12):  # the keyboard stays within
        wide.keyboard.press("Tab")
        assert viewer.evaluate(
            "all => all.contains(document.activeElement) || document.body === document.activeElement"
        )
    wide.keyboard.press("Escape")
    expect(viewer).to_be_hidden()
    expect(panel.locator(".thumb")).to_be_focused()
    panel.get_by_label("Search").fill("")
    panel.get_by_label("Favourites only").check()
    expect(panel.locator(".thumb")).to_have_count(1)
    assert names(panel) == ["Favourite: a yellow tent on green hills, QUOKKA"]

    panel.locator(".thumb").click()
    viewer.get_by_role("button", name="Delete").click()
    expect(viewer).to_be_hidden()  # there is no other to show
    expect(panel.locator(".empty")).to_contain_text("No favourites yet")
    expect(panel.locator(".told")).to_contain_text("Deleted.")
    expect(panel.locator(".told")).to_be_focused()
    panel.get_by_role("button", name="Undo").click()
    expect(panel.locator(".thumb")).to_have_count(1)
    assert names(panel) == ["Favourite: a yellow tent on green hills, QUOKKA"]
    panel.get_by_label("Search").fill("quokka zeppelin")
    expect(panel.locator(".empty")).to_contain_text("No picture has all of these words")


def test_settings_are_had_back(wide: Page, server: Server, tmp_path: Path) -> None:
    """From a picture of the list, a file of ours, one of another tool; one with nothing in it is told."""
    keep(server.home, "a numbat <b>in</b> Stable Cascade", "green", 31, "stable_cascade")
    ours = keep(server.home, "a numbat of ours", "blue", 32, width=192)
    panel = open_history(wide, "numbat cascade")
    expect(panel.locator(".thumb")).to_have_count(1)
    panel.locator(".thumb").click()
    expect(wide.locator("dialog.viewer .prompt")).to_have_text("a numbat <b>in</b> Stable Cascade")
    wide.get_by_role("button", name="Use these settings").click()
    expect(wide.get_by_role("tab", name="Stable Cascade")).to_have_attribute("aria-selected", "true")
    panel = wide.get_by_role("tabpanel")
    expect(prompt(panel)).to_have_value("a numbat <b>in</b> Stable Cascade")
    for label, value in {
        "Seed": "31",
        "Width": "256",
        "number input for Composition steps": "7",
        "number input for Detail guidance": "1.5",
    }.items():
        expect(panel.get_by_label(label, exact=True)).to_have_value(value)

    reload(wide)  # so that the field for files is not there yet
    expect(wide.get_by_role("tab", name="Stable Cascade")).to_have_attribute("aria-selected", "true")
    field, note = wide.locator("#restore-png input[type=file]"), wide.locator(".toast-body")
    wide.locator(".canvas:visible").evaluate(DROP, base64.b64encode(ours.read_bytes()).decode())
    expect(note).to_contain_text("Restored into Stable Diffusion 1.5.")
    expect(note).not_to_contain_text("Not known")
    expect(wide.get_by_role("tab", name="Stable Diffusion 1.5")).to_have_attribute("aria-selected", "true")
    panel = wide.get_by_role("tabpanel")
    expect(prompt(panel)).to_have_value("a numbat of ours")
    expect(panel.get_by_label("Width", exact=True)).to_have_value("192")

    info = PngInfo()
    info.add_text("parameters", OTHER_TOOL)
    other, bare = tmp_path / "other.png", tmp_path / "bare.png"
    Image.new("RGB", (8, 8)).save(other, pnginfo=info)
    Image.new("RGB", (8, 8)).save(bare)
    field.set_input_files(other)
    expect(note.last).to_contain_text("Not known here: VAE hash, Hires upscale. Of no use here: Model.")
    expect(prompt(panel)).to_have_value("a cat in a hat")
    expect(panel.get_by_label("Negative prompt")).to_have_value("dogs")
    expect(panel.get_by_label("Seed", exact=True)).to_have_value("4711")
    expect(panel.get_by_label("number input for Steps")).to_have_value("9")
    field.set_input_files(bare)
    expect(note.last).to_contain_text("bare.png has no settings in it")
    expect(prompt(panel)).to_have_value("a cat in a hat")


@pytest.fixture
def many(server: Server) -> Iterator[None]:
    """Thousands of pictures that are older than all others: one file under many names."""
    folder = server.home / "outputs" / "2001-01-01"
    folder.mkdir(parents=True)
    Image.new("RGB", (64, 64), "navy").save(folder / "00000.png")
    rows: list[tuple[Any, ...]] = []
    for number in range(KEPT):
        name = f"{number:05}.png"
        if number:
            os.link(folder / "00000.png", folder / name)
        words = f"a bilby number {number}"
        rows.append((f"outputs/2001-01-01/{name}", 1e9 + number, words, words))
    index = Gallery(server.home).index
    with gallery_index.changing(index) as database:
        columns = "file, created, prompt, folded, parameters, facts"
        database.executemany(f"INSERT INTO pictures ({columns}) VALUES (?, ?, ?, ?, '', '{{}}')", rows)
    yield
    with gallery_index.changing(index) as database:
        database.execute("DELETE FROM pictures WHERE created < 2e9 AND file LIKE 'outputs/2001-01-01/%'")
    for file in folder.iterdir():
        file.unlink()
    folder.rmdir()


@pytest.mark.usefixtures("many")
def test_thousands_are_listed_a_page_at_a_time(wide: Page) -> None:
    panel, viewer = open_history(wide, "bilby"), wide.locator("dialog.viewer")
    where = panel.locator(".pages").first
    expect(where).to_contain_text("1–48 of 3,000")
    expect(panel.locator(".thumb")).to_have_count(48)
    assert panel.locator(".thumb img[loading=lazy]").count() == 48
    heights = panel.locator(".thumb").evaluate_all("all => all.map((each) => each.offsetHeight)")
    assert len(set(heights)) == 1  # before they are loaded, too
    panel.get_by_role("button", name="Older").first.click()
    expect(where).to_contain_text("49–96 of 3,000")
    assert names(panel)[0] == "a bilby number 2951"
    panel.locator(".thumb").first.click()
    wide.keyboard.press("ArrowLeft")  # beyond the beginning of the page
    expect(viewer.locator(".prompt")).to_have_text("a bilby number 2952")
    expect(where).to_contain_text("1–48 of 3,000")
    for number in (2951, 2950):
        wide.keyboard.press("ArrowRight")
        expect(viewer.locator(".prompt")).to_have_text(f"a bilby number {number}")
    wide.keyboard.press("Escape")
    assert names(panel)[1] == "a bilby number 2950"
    expect(panel.locator(".thumb").nth(1)).to_be_focused()


def test_two_pictures_are_compared(wide: Page, server: Server) -> None:
    for number, colour in enumerate(("red", "green", "blue")):
        keep(server.home, f"a wombat number {number}", colour, number, width=128 * (number + 1))
    panel, comparison = open_history(wide, "wombat"), wide.locator("dialog.compare")
    expect(panel.locator(".thumb")).to_have_count(3)
    panel.locator(".thumb").nth(2).click()
    wide.get_by_role("button", name="Compare").click()
    picking = panel.locator(".picking")
    expect(picking).to_be_visible()
    picking.get_by_role("button", name="Cancel").click()
    expect(picking).to_be_hidden()
    panel.locator(".thumb").nth(2).click()
    wide.get_by_role("button", name="Compare").click()
    panel.get_by_label("Search").fill("wombat 2")  # the first one stays chosen
    expect(panel.locator(".thumb")).to_have_count(1)
    panel.locator(".thumb").click()
    handle = comparison.get_by_role("slider")
    expect(handle).to_be_focused()
    expect(handle).to_have_attribute("aria-valuetext", "50 %")
    both, over = comparison.locator(".both"), comparison.locator(".over")
    expect(over).to_have_js_property("complete", True)
    assert [side.bounding_box() for side in (comparison.locator(".under"), over)] == [both.bounding_box()] * 2
    assert colours(comparison) == ["red", "blue"]
    for key, told in {"ArrowRight": "51 %", "End": "100 %", "Home": "0 %"}.items():
        wide.keyboard.press(key)
        expect(handle).to_have_attribute("aria-valuetext", told)
    assert over.evaluate("each => getComputedStyle(each).clipPath") == "inset(0px 0px 0px 0%)"
    box = both.bounding_box()
    assert box
    wide.mouse.click(box["x"] + box["width"] * 0.25, box["y"] + box["height"] / 2)
    expect(handle).to_have_attribute("aria-valuetext", "25 %")
    differing = comparison.locator("dd:visible").all_inner_texts()
    assert differing == ["0", "128x128", "2", "384x128"]  # seeds and sizes; all else is the same
    wide.keyboard.press("Escape")
    expect(comparison).to_be_hidden()
    expect(picking).to_be_hidden()


def colours(comparison: Locator) -> list[str]:
    """What is seen left and right of the handle, where even a wide picture is."""
    shot = Image.open(io.BytesIO(comparison.locator(".both").screenshot())).convert("RGB")
    names = {b"\xff\0\0": "red", b"\0\x80\0": "green", b"\0\0\xff": "blue"}
    left, right, above = shot.width * 2 // 5, shot.width * 3 // 5, shot.height * 2 // 5
    return [names.get(shot.crop((x, above, x + 1, above + 1)).tobytes(), "other") for x in (left, right)]


def test_on_a_phone(narrow: Page, server: Server) -> None:
    for number in range(4):
        keep(server.home, f"a potoroo {'with a very long description ' * 20}{number}", "teal", number)
    panel, viewer = open_history(narrow, "potoroo"), narrow.locator("dialog.viewer")
    expect(panel.locator(".thumb")).to_have_count(4)
    assert no_sideways_scroll(narrow)
    rows = panel.locator(".thumb").evaluate_all("all => all.map((each) => each.getBoundingClientRect().top)")
    assert len(set(rows)) == 2  # three side by side
    panel.locator(".thumb").nth(1).tap()
    expect(viewer.locator(".prompt")).to_contain_text("description 2")
    viewer.get_by_role("button", name="Older").tap()
    expect(viewer.locator(".prompt")).to_contain_text("description 1")
    assert viewer.bounding_box() == {"x": 0, "y": 0, **NARROW}
    assert viewer.evaluate("each => each.scrollWidth <= each.clientWidth")
    viewer.get_by_role("button", name="Compare").tap()
    panel.locator(".thumb").first.tap()
    handle = narrow.locator("dialog.compare").get_by_role("slider")
    box = handle.bounding_box()
    assert box
    narrow.touchscreen.tap(box["x"] + box["width"] * 0.75, box["y"] + box["height"] / 2)
    expect(handle).to_have_attribute("aria-valuetext", "75 %")
    narrow.locator("dialog.compare").get_by_role("button", name="Close").tap()
    expect(panel.locator(".thumb").first).to_be_visible()
