"""One server for all of these tests, as a person starts it, and a browser."""

from __future__ import annotations

import shutil
from collections.abc import Iterator

import pytest
from gradio_client import Client
from playwright.sync_api import Browser, Page, sync_playwright

from tests.app.pages import NARROW, WIDE, opened
from tests.app.support import Server, connected, hub, serving

FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    # One thread: on a machine that is busy already, two wait for each other most of the time.
    folder = tmp_path_factory.mktemp("app")
    with hub() as endpoint, serving(folder, HF_ENDPOINT=endpoint, OMP_NUM_THREADS="1") as server:
        yield server


@pytest.fixture(scope="session")
def strangers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A public one."""
    with serving(tmp_path_factory.mktemp("public"), "--public", OMP_NUM_THREADS="1") as server:
        yield server


@pytest.fixture(scope="session")
def client(server: Server, tmp_path_factory: pytest.TempPathFactory) -> Client:
    return connected(server, tmp_path_factory.mktemp("downloads"))


@pytest.fixture(scope="module")  # not longer: Playwright keeps an event loop running in this thread
def browser() -> Iterator[Browser]:
    chromium = shutil.which("chromium")
    if chromium is None:
        pytest.fail("these tests need Debian's chromium (apt-get install chromium)")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=list(FLAGS))
        yield browser
        browser.close()


@pytest.fixture(params=[WIDE, NARROW], ids=["wide", "narrow"])
def page(request: pytest.FixtureRequest, browser: Browser, server: Server) -> Iterator[Page]:
    yield from opened(browser, server, viewport=request.param)


@pytest.fixture
def wide(browser: Browser, server: Server) -> Iterator[Page]:
    yield from opened(browser, server, viewport=WIDE)
