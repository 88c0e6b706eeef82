"""When the page opens by itself, and in what."""

from __future__ import annotations

import webbrowser
from typing import Any

import pytest

from backend import Settings
from ui import desktop, launch

DESK: Any = {"DISPLAY": ":0"}


@pytest.mark.parametrize(
    ("environ", "platform", "expected"),
    [
        (DESK, "linux", True),
        ({"WAYLAND_DISPLAY": "wayland-0"}, "linux", True),
        ({}, "linux", False),
        ({"DISPLAY": ""}, "linux", False),
        ({"SSH_CONNECTION": "1.2.3.4 5 6.7.8.9 22"}, "linux", False),
        (DESK | {"SSH_CONNECTION": "1.2.3.4 5 6.7.8.9 22"}, "linux", True),  # ssh -X
        ({}, "darwin", True),
        ({}, "win32", True),
        ({"SSH_CONNECTION": "1.2.3.4 5 6.7.8.9 22"}, "darwin", False),
        ({"SSH_TTY": "/dev/ttys1"}, "darwin", False),
        (DESK | {"SPACE_ID": "me/triptych"}, "linux", False),
        (DESK | {"CI": "true"}, "linux", False),
    ],
)
def test_the_page_opens_where_a_person_sees_it(
    environ: dict[str, str], platform: str, expected: bool
) -> None:
    assert desktop.wanted(Settings(), environ, platform=platform, terminal=True) is expected
    assert not desktop.wanted(Settings(), environ, platform=platform, terminal=False)  # a service, a test
    assert not desktop.wanted(Settings(no_browser=True), environ, platform=platform, terminal=True)


class Browser:
    def __init__(self, basename: str, *, works: bool = True) -> None:
        self.basename, self.works, self.opened = basename, works, ""

    def open(self, url: str) -> bool:
        self.opened = url
        return self.works


@pytest.mark.parametrize(
    ("browser", "opened", "said"),
    [
        (Browser("firefox"), True, ""),
        (Browser("firefox", works=False), True, "No browser could be opened"),
        (Browser("w3m"), False, "No browser could be opened"),
        (None, False, "No browser could be opened"),
    ],
)
def test_what_cannot_be_opened_is_said(
    browser: Browser | None,
    opened: bool,
    said: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def get() -> Browser:
        if browser is None:
            raise webbrowser.Error("could not locate runnable browser")
        return browser

    monkeypatch.setattr(webbrowser, "get", get)
    desktop._open("http://127.0.0.1:7860/")
    assert bool(browser and browser.opened) is opened
    assert capsys.readouterr().out.startswith(said)


@pytest.mark.parametrize(
    ("host", "expected"),
    [
        ("127.0.0.1", "http://127.0.0.1:81/"),
        ("0.0.0.0", "http://127.0.0.1:81/"),
        ("::", "http://[::1]:81/"),
        ("::1", "http://[::1]:81/"),
        ("studio.lan", "http://studio.lan:81/"),
    ],
)
def test_where_a_browser_here_finds_the_page(host: str, expected: str) -> None:
    assert launch.address(host, 81) == expected
