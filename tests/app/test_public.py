"""A public server: what strangers may ask for, and that each sees their own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from gradio_client import Client
from gradio_client.exceptions import AppError
from playwright.sync_api import Browser, expect

from tests.app.pages import WIDE, generate, opened, prompt, slider
from tests.app.support import LONG, Server, connected
from ui.jobs import MOST_OF_A_STRANGER

QUICK: Any = {"prompt": "a red house", "steps": 2}


@pytest.fixture
def stranger(strangers: Server, tmp_path: Path) -> Client:
    return connected(strangers, tmp_path)


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"checkpoint": "/etc/passwd"}, "on this public server it can be demo, sd15"),
        ({"checkpoint": "somebody/model"}, "on this public server it can be demo, sd15"),
        ({"checkpoint": "sd15"}, "sd15"),
        ({"config_from": "somebody/model"}, "config_from is 'somebody/model'; on this public server"),
        ({"prompt": "a" * 1001}, "prompt has 1001 characters"),
        ({"steps": 51}, "steps is 51; on this public server it can be 1 to 50"),
        ({"num_images": 8}, "num_images is 8; on this public server it can be 1 to 4"),
        (
            {"width": 2048, "height": 1024},
            "2048 × 1024; on this public server it can be up to 1048576 pixels",
        ),
    ],
)
def test_caps_hold_on_the_server(stranger: Client, asked: dict[str, Any], message: str) -> None:
    with pytest.raises(AppError, match=message) as caught:
        stranger.predict(**QUICK | asked, api_name="/sd15")
    told = str(caught.value)
    assert "/home" not in told
    assert "Traceback" not in told
    if asked != {"checkpoint": "sd15"}:  # which is not here, but can be planned
        with pytest.raises(AppError, match=message):
            stranger.predict("sd15", QUICK | asked, api_name="/plan")


def test_a_stranger_waits_with_a_few_and_others_have_their_turn(strangers: Server, tmp_path: Path) -> None:
    greedy, other = connected(strangers, tmp_path / "1"), connected(strangers, tmp_path / "2")
    long = LONG | {"steps": 50, "num_images": 4}
    jobs = [greedy.submit(**long, api_name="/sd15") for _ in range(MOST_OF_A_STRANGER)]
    for job in jobs:
        next(iter(job))
    with pytest.raises(AppError, match=f"it can be {MOST_OF_A_STRANGER} at a time"):
        greedy.predict(**QUICK, api_name="/sd15")
    answer = other.submit(**QUICK, api_name="/sd15")
    first = next(said for _, said in answer if said["phase"] == "waiting")
    assert first["steps"] in (1, 2), "the other stands behind one of the greedy one's at most"
    for job in jobs:
        job.cancel()
    assert answer.result()[0]


def test_each_sees_their_own_pictures(browser: Browser, strangers: Server) -> None:
    for page in opened(browser, strangers, viewport=WIDE):
        slider(page, "Steps", 2)
        prompt(page).fill("a yellow tent, mine alone")
        generate(page)
        page.get_by_role("tab", name="History").click()
        expect(page.locator("img[src^=thumbnails]:visible").first).to_be_visible()
        page.get_by_role("tab", name="Models").click()
        expect(page.locator(".models")).to_contain_text("Postcards")
        expect(page.locator(".models")).not_to_contain_text("This machine")
    for page in opened(browser, strangers, viewport=WIDE):
        expect(page.locator(".canvas").first).to_have_attribute("data-state", "idle")
        page.get_by_role("tab", name="History").click()
        page.wait_for_timeout(1000)
        assert page.locator("img[src^=thumbnails]:visible").count() == 0
        assert "yellow tent" not in page.content()


def test_the_page_offers_what_may_be_had(browser: Browser, strangers: Server) -> None:
    for page in opened(browser, strangers, viewport=WIDE):
        assert page.get_by_label("number input for Steps").get_attribute("max") == "50"
        assert page.get_by_label("number input for Number of pictures").get_attribute("max") == "4"
        page.get_by_role("button", name="Advanced").click()
        expect(page.get_by_label("Configuration from")).to_have_count(0)
