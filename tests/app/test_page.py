"""The page in a real browser, as a person uses it."""

from __future__ import annotations

import re
import time
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import pytest
from gradio_client import Client
from playwright.sync_api import Browser, Page, expect

from tests.app.pages import (
    SEEN,
    WATCH,
    WIDE,
    generate,
    no_sideways_scroll,
    open_tab,
    opened,
    prompt,
    reload,
    slider,
    status,
    wait_for_preview,
)
from tests.app.support import LONG, Server
from tests.checkpoints import sd15_folder


def make_it_long(page: Page) -> None:
    """Settings that keep any CPU busy for longer than the test takes to interrupt it."""
    slider(page, "Steps", 150)
    slider(page, "Number of pictures", 8)
    for side in ("Width", "Height"):
        page.get_by_label(side, exact=True).fill("256")


def test_a_prompt_becomes_a_picture(page: Page, server: Server) -> None:
    page.evaluate(WATCH)
    slider(page, "Steps", 60)
    prompt(page).fill("a red house on green hills at night")
    page.keyboard.press("Control+Enter")
    said = status(page, "done")
    expect(said).to_contain_text("1 picture in")
    seen = page.evaluate(SEEN)
    assert "Painting · step" in seen["said"]
    assert not seen["sideways"]
    assert seen["previews"] >= 2, (seen, said.inner_text())
    assert len(seen["heights"]) == 1, "the page jumped"
    image = page.locator(".canvas img")
    assert image.evaluate("image => image.decode().then(() => image.naturalWidth)") == 128
    assert no_sideways_scroll(page)
    link = page.get_by_role("tabpanel").locator(".files").get_by_role("link")
    with page.expect_download() as download:
        link.click()
    kept = server.home / "outputs" / unquote(link.get_attribute("href") or "").removeprefix("pictures/")
    assert download.value.path().read_bytes() == kept.read_bytes()
    assert b"parameters\0a red house on green hills at night\n" in kept.read_bytes()


def test_a_first_picture_takes_two_clicks(page: Page) -> None:
    page.locator(".examples button").first.click()
    page.get_by_role("button", name="Generate").click()
    expect(status(page, "done")).to_contain_text("1 picture in")
    expect(page.locator(".canvas img")).to_have_attribute("src", re.compile("^pictures/"))


def test_the_picture_is_the_largest_thing(page: Page) -> None:
    sizes = "each => each.getBoundingClientRect().width * each.getBoundingClientRect().height"
    canvas = page.locator(".canvas").evaluate(sizes)
    for area in (".ask", ".about", ".below"):
        assert canvas > page.locator(area).evaluate(sizes)


def test_escape_stops_and_the_next_one_works(wide: Page, server: Server) -> None:
    before = len(server.pictures)
    make_it_long(wide)
    prompt(wide).fill("a blue tent")
    wide.keyboard.press("Control+Enter")
    wait_for_preview(wide)
    wide.keyboard.press("Escape")
    expect(wide.locator(".status")).to_have_text("Stopped.")
    wide.wait_for_timeout(1500)
    expect(wide.locator(".status")).to_have_text("Stopped.")
    expect(wide.locator(".canvas")).to_have_attribute("data-state", "idle")
    slider(wide, "Steps", 2)
    slider(wide, "Number of pictures", 2)
    expect(generate(wide)).to_contain_text("2 pictures in")
    assert len(server.pictures) == before + 2
    wide.get_by_role("button", name="Stop").click()
    wide.wait_for_timeout(500)
    expect(status(wide, "done")).to_contain_text("2 pictures in")  # with nothing to stop, nothing changes


def test_a_stop_that_overtakes_its_run_holds(wide: Page, server: Server) -> None:
    """Stopped before the server has named the run, which Gradio's own cancel then misses."""
    before = len(server.pictures)
    make_it_long(wide)
    wide.route("**/queue/join*", lambda route: (time.sleep(0.2), route.continue_()))
    wide.get_by_role("button", name="Generate").click()
    wide.keyboard.press("Escape")
    expect(wide.locator(".status")).to_have_text("Stopped.")
    wide.wait_for_timeout(1500)
    expect(wide.locator(".status")).to_have_text("Stopped.")
    wide.unroute_all()
    slider(wide, "Steps", 2)
    slider(wide, "Number of pictures", 1)
    generate(wide)
    assert len(server.pictures) == before + 1


def test_pictures_enlarge_and_walk_by_keyboard(wide: Page) -> None:
    slider(wide, "Steps", 2)
    slider(wide, "Number of pictures", 3)
    generate(wide)
    tiles = wide.locator(".canvas .tile")
    tiles.first.focus()
    wide.keyboard.press("Enter")
    expect(tiles.nth(0)).to_be_visible()
    expect(tiles.nth(1)).to_be_hidden()
    wide.keyboard.press("ArrowRight")
    expect(tiles.nth(1)).to_be_visible()
    expect(tiles.nth(0)).to_be_hidden()
    wide.keyboard.press("Escape")
    expect(tiles.nth(2)).to_be_visible()


def test_several_are_queued_each_with_its_place(wide: Page, server: Server, client: Client) -> None:
    before = len(server.pictures)
    slider(wide, "Steps", 2)
    busy = client.submit(**LONG, api_name="/sd15")
    next(said for _, said in busy if said["phase"] == "denoise")
    button = wide.get_by_role("button", name="Generate")
    for asked in ("a red tent", "a blue tent", "a green tent"):
        prompt(wide).fill(asked)
        button.click()
        queue = wide.locator(".queue")
        expect(wide.locator(".status")).to_have_text("Waiting: one picture comes before yours.")
    expect(queue.locator("li")).to_have_count(3)
    expect(queue.locator("li").nth(2)).to_contain_text("place 4")
    wide.get_by_role("button", name="Cancel: a blue tent").click()
    expect(queue.locator("li")).to_have_count(2)
    expect(queue.locator("li").nth(1)).to_contain_text("place 3")
    expect(queue).not_to_contain_text("blue")
    busy.cancel()
    expect(status(wide, "done")).to_contain_text("1 picture in")
    expect(queue).to_have_count(0)
    made = wide.locator(".made button")
    expect(made).to_have_count(2)
    shown = wide.locator(".canvas img")
    expect(shown).to_have_attribute("alt", "a green tent")
    wide.get_by_role("button", name="Show again: a red tent").click()
    expect(shown).to_have_attribute("alt", "a red tent")
    assert len(server.pictures) == before + 2


def test_a_page_that_is_left_finds_its_job_again(browser: Browser, server: Server, client: Client) -> None:
    """With its settings; and another browser sees nothing of them."""
    inside = browser.new_context(viewport={"width": 1400, "height": 900})
    page = inside.new_page()
    page.goto(server.url)
    make_it_long(page)
    prompt(page).fill("a yellow windmill")
    page.get_by_role("button", name="Generate").click()
    wait_for_preview(page)
    page.close()
    page = inside.new_page()
    page.goto(server.url)
    wait_for_preview(page)
    expect(page.locator(".status")).to_contain_text("Painting · step")
    expect(prompt(page)).to_have_value("a yellow windmill")
    expect(page.get_by_label("number input for Steps")).to_have_value("150")
    for other in opened(browser, server, viewport=WIDE):
        expect(other.locator(".canvas")).to_have_attribute("data-state", "idle")
        expect(prompt(other)).to_have_value("")
    page.keyboard.press("Escape")
    expect(page.locator(".status")).to_have_text("Stopped.")
    assert client.predict(prompt="a tent", steps=2, api_name="/sd15")[0]
    inside.close()


def test_an_error_is_told_and_the_picture_stays(wide: Page) -> None:
    slider(wide, "Steps", 2)
    generate(wide)
    shown = wide.locator(".canvas img").get_attribute("src")
    wide.get_by_label("Width", exact=True).fill("130")
    message = "width is 130; it can be a whole number from 64 to 2048 in multiples of 8"
    expect(generate(wide, "failed")).to_have_text(message)
    expect(wide.get_by_test_id("toast-body")).to_contain_text(message)
    assert wide.locator(".canvas img").get_attribute("src") == shown
    wide.get_by_text("3:2", exact=True).click()
    expect(wide.get_by_label("Width", exact=True)).to_have_value("160")
    generate(wide)
    wide.get_by_label("Width", exact=True).fill("")
    expect(generate(wide, "failed")).to_contain_text("width is empty")
    wide.get_by_label("Width", exact=True).fill("128")
    wide.get_by_label("Seed", exact=True).fill("7" * 5000)
    expect(generate(wide, "failed")).to_contain_text("seed is '77777777777777777777…'; it can be")


def test_a_full_queue_is_told(wide: Page) -> None:
    """Nothing of ours runs then."""
    wide.route("**/queue/join*", lambda route: route.fulfill(status=503, json={"detail": "busy"}))
    expect(generate(wide, "failed")).to_contain_text("Not begun")
    wide.unroute_all()
    slider(wide, "Steps", 2)
    generate(wide)


def test_every_tab_is_found_as_it_was_left(wide: Page) -> None:
    panel = open_tab(wide, "Stable Diffusion 3")
    prompt(panel).fill("a castle that is kept")
    slider(panel, "Steps", 3)
    reload(wide)
    expect(wide.get_by_role("tab", name="Stable Diffusion 3")).to_have_attribute("aria-selected", "true")
    expect(prompt(panel)).to_have_value("a castle that is kept")
    expect(panel.get_by_label("number input for Steps")).to_have_value("3")
    expect(panel.locator(".plan .bars")).to_be_visible()
    open_tab(wide, "Stable Diffusion 1.5")
    expect(prompt(panel)).to_have_value("")
    open_tab(wide, "Stable Diffusion 3")
    expect(prompt(panel)).to_have_value("a castle that is kept")


def test_a_seed_is_reused(wide: Page) -> None:
    slider(wide, "Steps", 2)
    generate(wide)
    wide.get_by_role("button", name="Reuse last").click()
    seed = wide.get_by_label("Seed", exact=True)
    expect(seed).not_to_have_value("")
    expect(wide.get_by_role("tabpanel").locator(".files")).to_contain_text(f"seed {seed.input_value()}")
    wide.get_by_role("button", name="Random").click()
    expect(seed).to_have_value("")


def test_settings_are_reused(wide: Page) -> None:
    wide.locator(".examples button").first.click()
    expect(prompt(wide)).not_to_have_value("")
    asked = prompt(wide).input_value()
    wide.get_by_text("2:3", exact=True).click()
    expect(wide.get_by_label("Height", exact=True)).to_have_value("160")
    slider(wide, "Steps", 2)
    generate(wide)
    prompt(wide).fill("something else")
    wide.get_by_text("1:1", exact=True).click()
    slider(wide, "Steps", 9)
    wide.get_by_role("button", name="Reuse these settings").click()
    expect(prompt(wide)).to_have_value(asked)
    expect(wide.get_by_label("Height", exact=True)).to_have_value("160")
    expect(wide.get_by_label("number input for Steps")).to_have_value("2")
    expect(wide.locator(".segmented", has_text="Shape").locator(".selected")).to_have_text("2:3")


def test_a_checkpoint_brings_its_settings(wide: Page) -> None:
    expect(wide.locator(".note")).to_contain_text("built-in demo")
    expect(wide.locator(".note")).to_contain_text("hot-air balloon")
    wide.get_by_role("button", name="Advanced").click()
    choice = wide.get_by_role("combobox", name="Checkpoint")
    choice.fill("sd15")
    choice.press("Enter")
    expect(wide.get_by_label("number input for Steps")).to_have_value("50")
    expect(wide.get_by_label("Width", exact=True)).to_have_value("512")
    expect(wide.get_by_role("combobox", name="Sampler")).to_have_value("PLMS")
    expect(wide.locator(".note")).to_contain_text("Open RAIL-M")
    expect(wide.locator(".plan")).to_contain_text("1.6 GiB")
    choice.fill("no such thing")
    choice.press("Enter")
    expect(wide.locator(".note [role=alert]")).to_contain_text("'no such thing'")


def test_a_folder_brings_its_settings(wide: Page, tmp_path: Path) -> None:
    folder = str(sd15_folder(tmp_path / "tiny"))
    wide.get_by_role("button", name="Advanced").click()
    choice = wide.get_by_role("combobox", name="Checkpoint")
    choice.fill(folder)
    choice.press("Enter")
    width, height = (wide.get_by_label(side, exact=True) for side in ("Width", "Height"))
    steps = wide.get_by_label("number input for Steps")
    expect(width).to_have_value("64")
    expect(height).to_have_value("64")
    expect(steps).to_have_value("50")
    expect(wide.get_by_label("number input for Guidance")).to_have_value("7.5")
    expect(wide.get_by_role("combobox", name="Sampler")).to_have_value("PLMS")
    expect(wide.locator(".note")).to_contain_text("Licence unknown: see where it came from.")
    wide.get_by_text("3:2", exact=True).click()
    expect(width).to_have_value("96")
    slider(wide, "Steps", 2)
    generate(wide)
    wide.get_by_text("1:1", exact=True).click()
    slider(wide, "Steps", 9)
    wide.get_by_role("button", name="Reuse these settings").click()
    expect(steps).to_have_value("2")
    expect(width).to_have_value("96")
    expect(height).to_have_value("64")
    expect(wide.locator(".segmented", has_text="Shape").locator(".selected")).to_have_text("3:2")
    expect(choice).to_have_value(folder)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_light_and_dark_follow_the_system(browser: Browser, server: Server, scheme: Any) -> None:
    lightness = "([...getComputedStyle(document.body).backgroundColor.matchAll(/\\d+/g)].slice(0, 3))"
    for page in opened(browser, server, viewport=WIDE, color_scheme=scheme):
        shade = sum(int(match[0]) for match in page.evaluate(lightness)) / 3
        assert (shade > 200) if scheme == "light" else (shade < 50)
