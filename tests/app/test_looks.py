"""For everybody: contrast, names and order as WCAG 2.2 AA asks, seen by axe; widths; languages."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

import pytest
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Browser, Page, expect

from tests.app.pages import NARROW, WIDE, generate, no_sideways_scroll, opened, prompt, slider
from tests.app.support import Server
from ui import i18n

RULES = {"runOnly": ["wcag2a", "wcag2aa", "wcag21a", "wcag21aa", "wcag22aa"], "resultTypes": ["violations"]}
TABS = 5
WIDTHS = (390, 600, 861, 1400, 2560)


def violations(page: Page) -> list[str]:
    found = Axe().run(page, options=RULES).response["violations"]
    return [
        f"{each['id']} ({each['help']}): {node['html'][:160]} {node['failureSummary'][:200]}"
        for each in found
        for node in each["nodes"]
    ]


def tabs(page: Page, pause: int = 400) -> Iterator[str]:
    """Open each tab in turn, and wait for what it asks for (milliseconds) → its name."""
    for tab in page.get_by_role("tab").all():
        tab.click()
        expect(tab).to_have_attribute("aria-selected", "true")
        page.wait_for_timeout(pause)
        yield tab.inner_text()


@pytest.mark.parametrize(("scheme", "viewport"), [("light", WIDE), ("dark", NARROW)], ids=["light", "dark"])
def test_axe_finds_nothing(browser: Browser, server: Server, scheme: Any, viewport: Any) -> None:
    for page in opened(browser, server, viewport=viewport, color_scheme=scheme, reduced_motion="reduce"):
        slider(page, "Steps", 2)
        prompt(page).fill("a red house")
        generate(page)
        page.get_by_role("button", name="Advanced").click()
        found = {name: violations(page) for name in tabs(page)}
        assert len(found) == TABS
        assert {name: each for name, each in found.items() if each} == {}


def test_everything_has_its_place_at_any_width(browser: Browser, server: Server) -> None:
    for page in opened(browser, server, viewport=WIDE):
        for width in WIDTHS:
            page.set_viewport_size({"width": width, "height": 900})
            for name in tabs(page, 400 if width == WIDTHS[0] else 50):
                assert no_sideways_scroll(page), (width, name)
            page.get_by_role("tab").first.click()
            for area in ("button.generate", ".canvas", ".plan .bars"):
                box = page.locator(area).first.bounding_box()
                assert box, (width, area)
                assert box["x"] >= 0, (width, area)
                assert box["x"] + box["width"] <= width, (width, area)


@pytest.mark.parametrize("code", ["de", "it", "ar"])
def test_the_page_in_other_languages(browser: Browser, server: Server, code: str) -> None:
    table = json.loads((i18n.FOLDER / f"{code}.json").read_text(encoding="utf-8"))
    labels, told = table["labels"], table["told"]
    for page in opened(browser, server, viewport=NARROW, locale=code):
        root = page.locator("html")
        expect(root).to_have_attribute("dir", "rtl" if code == "ar" else "ltr")
        expect(root).to_have_attribute("lang", re.compile(f"^{code}"))
        expect(page.get_by_label(labels["Prompt"], exact=True)).to_be_visible()
        expect(page.locator(".canvas .hint")).to_contain_text(
            told["Write what you want to see, or try one of the examples. Your picture appears here."]
        )
        expect(page.locator(".plan h2").first).to_have_text(told["Memory plan"])
        slider_named = labels["Steps"]
        page.locator("label", has_text=slider_named).first.wait_for()
        page.get_by_label(labels["Prompt"], exact=True).fill("a red house")
        page.locator("button.generate:visible").click()
        page.locator(".status[data-state=done]").wait_for()
        expect(page.locator(".status")).to_contain_text(told["1 picture in {time}"].split("{")[0].strip())
        page.get_by_role("button", name=labels["Advanced"]).click()
        for name in tabs(page):
            seen = page.locator("main").inner_text()
            words = [text for text in labels if len(text) > 8 and text != labels[text]]
            left = [text for text in words if re.search(rf"\b{re.escape(text)}(?!\w)", seen)]
            assert left == [], (name, left)
            assert no_sideways_scroll(page), name
