"""Memory on the page: the plan's bars, the meter of a run, the tab that lists and frees what is loaded."""

from __future__ import annotations

import json
import re
import urllib.request
from collections.abc import Iterator

import pytest
from gradio_client import Client
from playwright.sync_api import Browser, Locator, Page, expect

from tests.app.pages import (
    NARROW,
    SEEN,
    WATCH,
    WIDE,
    generate,
    no_sideways_scroll,
    open_tab,
    opened,
    slider,
    status,
)
from tests.app.support import LONG, Server, serving

SD15, SD3 = "Stable Diffusion 1.5", "Stable Diffusion 3"
SIZE = r"[\d.]+ [KMG]iB"


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """On a machine with little memory."""
    folder = tmp_path_factory.mktemp("small")
    with serving(folder, "--vram", "4", "--offline", OMP_NUM_THREADS="1") as server:
        yield server


def bars(on: Page | Locator) -> Locator:
    return on.locator(".plan").get_by_role("img")


def prefer(on: Page | Locator, what: str) -> None:
    on.locator(".segmented", has_text="Memory").get_by_text(what, exact=True).click()


def models(page: Page) -> Locator:
    page.get_by_role("tab", name="Models").click()
    page.locator(".models h3").first.wait_for()
    return page.get_by_role("tabpanel")


# ---- the plan


def test_a_bar_a_phase_against_the_budget(page: Page) -> None:
    expect(bars(page)).to_have_count(3)
    for bar, name in zip(bars(page).all(), ("Reading the prompt", "Painting", "Decoding"), strict=True):
        label = bar.get_attribute("aria-label") or ""
        assert re.match(rf"{name}: {SIZE} of the {SIZE} that may be used\. .*; work {SIZE}\.$", label)
        box = bar.bounding_box() or {}
        parts = [each.bounding_box() or {} for each in bar.locator("i").all()]
        assert parts
        assert all(box["x"] - 1 <= part["x"] <= box["x"] + box["width"] for part in parts)
        assert all(part["width"] >= 2 for part in parts)
    expect(page.locator(".plan .limit")).to_have_text(re.compile(rf"^{SIZE} may be used$"))
    expect(page.locator(".plan .parts").nth(1)).to_contain_text("UNet")
    assert "text_encoder" not in page.locator(".plan").inner_text()
    assert no_sideways_scroll(page)


def test_the_bars_follow_the_size(wide: Page) -> None:
    decoding = wide.locator(".plan h3").nth(2)
    before = decoding.inner_text()
    for side in ("Width", "Height"):
        wide.get_by_label(side, exact=True).fill("512")
    expect(decoding).not_to_have_text(before)
    wide.wait_for_timeout(1000)  # both sides have their plan by now
    painting = wide.locator(".plan h3").nth(1)
    one = painting.inner_text()
    slider(wide, "Number of pictures", 4)
    expect(painting).not_to_have_text(one)


def test_what_is_preferred_where_memory_is_short(browser: Browser, small: Server) -> None:
    for page in opened(browser, small, viewport=NARROW):
        tab = open_tab(page, SD3)
        tab.get_by_role("button", name="Advanced").click()
        choice = tab.get_by_role("combobox", name="Checkpoint")
        choice.fill("sd3-medium")
        choice.press("Enter")
        expect(tab.locator(".plan")).to_contain_text("would take")
        expect(tab.locator(".plan[data-fits=yes]")).to_be_visible()
        prefer(tab, "quality")
        expect(tab.locator(".plan[data-fits=no]")).to_be_visible()
        expect(bars(tab)).to_have_count(4)
        over = tab.locator(".plan .phase.over")
        expect(over.locator("h3").first).to_contain_text("too much")
        marked = over.locator(".excess").first.bounding_box() or {}
        limit = tab.locator(".plan .limit span").bounding_box() or {}
        assert marked["width"] > 0
        assert min(abs(limit["x"] - marked["x"]), abs(limit["x"] + limit["width"] - marked["x"])) < 4
        assert no_sideways_scroll(page)
        expect(generate(tab, "failed")).to_contain_text("Does not fit")
        prefer(tab, "balanced")
        expect(tab.locator(".plan[data-fits=yes]")).to_be_visible()


def test_the_preference_is_reused(wide: Page) -> None:
    wide.get_by_role("button", name="Advanced").click()
    slider(wide, "Steps", 2)
    prefer(wide, "speed")
    generate(wide)
    prefer(wide, "quality")
    wide.get_by_role("button", name="Reuse these settings").click()
    expect(wide.get_by_role("radio", name="speed")).to_be_checked()


# ---- while it runs


def test_the_meter_and_the_peak(wide: Page) -> None:
    wide.evaluate(WATCH)
    slider(wide, "Steps", 60)
    said = generate(wide).inner_text()
    assert re.search(rf"peak memory {SIZE}, planned {SIZE}", said)
    seen = wide.evaluate(SEEN)
    assert re.search(rf"memory\s+[\d.]+( [KM]iB)? of {SIZE}", seen["said"]), seen
    assert len(seen["heights"]) == 1, "the page jumped"
    assert not seen["sideways"]


# ---- models


def test_what_is_loaded_can_be_freed(page: Page) -> None:
    slider(page, "Steps", 2)
    generate(page)
    files = page.get_by_role("tabpanel").locator(".files")
    expect(files).to_contain_text("seed")
    first = files.inner_text()
    shown = models(page)
    unet = shown.get_by_role("row", name=re.compile("^UNet demo"))
    expect(unet).to_contain_text("in RAM")
    expect(shown).to_contain_text("GiB free")
    assert no_sideways_scroll(page)
    shown.get_by_role("button", name="Free the UNet of demo").click()
    expect(shown.get_by_role("status").filter(has_text="Freed the UNet")).to_be_focused()
    expect(unet).to_have_count(0)
    expect(shown.get_by_role("row", name=re.compile("^VAE"))).not_to_have_count(0)
    shown.get_by_role("button", name="Free everything").click()
    expect(shown).to_contain_text("Nothing: what a picture needs is loaded")
    page.get_by_role("tab", name=SD15).click()
    generate(page)
    expect(files).not_to_have_text(first)  # the tab, seen again, first tells of the picture before
    models(page)
    expect(unet).to_have_count(1)


def test_what_is_in_use_is_not_freed(wide: Page, client: Client) -> None:
    busy = client.submit(**LONG, api_name="/sd15")
    next(said for _, said in busy if said["phase"] == "denoise" and said["step"] > 1)
    shown = models(wide)
    expect(shown.get_by_role("row", name=re.compile("^UNet demo"))).to_contain_text("in use")
    shown.get_by_role("button", name="Free everything").click()
    expect(shown.get_by_role("status").filter(has_text="Freed what was not in use.")).to_be_visible()
    expect(shown.get_by_role("row", name=re.compile("^UNet demo"))).to_contain_text("in use")
    busy.cancel()
    wide.get_by_role("tab", name=SD15).click()
    slider(wide, "Steps", 2)
    generate(wide)
    expect(status(wide, "done")).to_contain_text("1 picture in")


def test_checkpoints_are_listed(wide: Page) -> None:
    shown = models(wide)
    expect(shown.get_by_role("row", name=re.compile("sd3.5-large-turbo"))).to_contain_text("not downloaded")
    expect(shown.get_by_role("row", name=re.compile("sd3-medium"))).to_contain_text("14.4 GiB")
    expect(shown.get_by_role("link", name="Stable Cascade")).to_have_attribute(
        "href", "https://huggingface.co/stabilityai/stable-cascade"
    )
    expect(shown.get_by_role("row", name=re.compile("Postcards"))).to_have_count(3)


def test_strangers_see_which_checkpoints_there_are(browser: Browser, strangers: Server) -> None:
    for page in opened(browser, strangers, viewport=WIDE):
        slider(page, "Steps", 2)
        generate(page)
        shown = models(page)
        expect(shown.get_by_role("row", name=re.compile("Postcards"))).to_have_count(3)
        expect(shown.get_by_role("row", name=re.compile("sd3-medium|^UNet"))).to_have_count(0)
        expect(shown.get_by_role("button")).to_have_text("Look again")
        expect(shown).not_to_contain_text(re.compile("machine|memory|RAM"))
    with urllib.request.urlopen(f"{strangers.url}config") as answer:
        config = json.load(answer)
    ours = [each["id"] for each in config["components"] if "models-page" in str(each["props"])]
    assert len(ours) == 3
    listened = {tuple(target) for each in config["dependencies"] for target in each["targets"]}
    assert not listened.intersection((each, event) for each in ours for event in ("click", "tick"))
