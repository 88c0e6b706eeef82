"""Pages in a browser, and what the tests do on them; `On` is a page, or the open tab of one."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary, WeakSet

from playwright.sync_api import Browser, ConsoleMessage, Error, Locator, Page, expect

from tests.app.support import Server

On = Page | Locator

WIDE, NARROW = {"width": 1400, "height": 900}, {"width": 390, "height": 844}
SCREENSHOTS = Path(__file__).parent / "screenshots"  # how each test left its page; git ignores them
PATIENCE = 120_000  # milliseconds: two cores that do other work as well are slow
expect.set_options(timeout=PATIENCE)
_KEPT: WeakKeyDictionary[Browser, dict[str, Page]] = WeakKeyDictionary()
_LEFT: WeakSet[Page] = WeakSet()  # pages that are being loaded anew

# Remembers every preview that the canvas shows, every height that it takes, what the progress line says, and
# whether the page was ever wider than its window. Asking meanwhile could come too late.
WATCH = """() => {
  window.seen = {previews: new Set(), heights: new Set(), said: new Set(), sideways: false};
  const look = () => {
    seen.sideways ||= document.documentElement.scrollWidth > window.innerWidth;
    const canvas = [...document.querySelectorAll('.canvas')].find((each) => each.offsetParent);
    seen.heights.add(canvas.offsetHeight);
    const preview = canvas.querySelector('img[alt=Preview]');
    if (preview) seen.previews.add(preview.src);
    seen.said.add([...document.querySelectorAll('.status')].find((each) => each.offsetParent).innerText);
  };
  look();
  new MutationObserver(look).observe(document.body, {subtree: true, childList: true, attributes: true});
}"""
SEEN = """() => ({
  ...seen, previews: seen.previews.size, heights: [...seen.heights], said: [...seen.said].join('; '),
})"""


def opened(browser: Browser, server: Server, **context: Any) -> Iterator[Page]:
    """A page as nobody has used it yet; whatever it complained of in its console fails the test.

    A browser keeps those that tests are done with: read a second time, the program of the page takes half as
    long. Nothing else is left of who was there before.
    """
    done_with = _KEPT.setdefault(browser, {})
    kind = repr(sorted(context.items()))
    page = done_with.pop(kind, None) or browser.new_context(**context).new_page()
    complaints = []

    def complain(words: str) -> None:
        # Gradio says this of whatever it still asks for as its page is left
        if not (page in _LEFT and re.search("Connection errored out|AbortError", words)):
            complaints.append(words)

    def hear(said: ConsoleMessage) -> None:
        # 422: Gradio's cancel of a run without a name yet; 503: a full queue
        if said.type == "error" and not re.search("422|503", said.text):
            complain(said.text)

    def fail(error: Error) -> None:
        complain(str(error))

    page.on("console", hear)
    page.on("pageerror", fail)
    page.set_default_timeout(PATIENCE)
    page.goto(server.url)
    page.locator(".plan .bars").wait_for()  # the page has loaded, and told the plan
    yield page
    page.screenshot(path=SCREENSHOTS / f"{_running()}.png")
    page.remove_listener("console", hear)
    page.remove_listener("pageerror", fail)
    _forget(page, server)
    done_with[kind] = page
    assert not complaints, complaints


def reload(page: Page) -> None:
    """Load a page anew, whatever it still waits for."""
    _LEFT.add(page)
    page.reload()
    _LEFT.discard(page)


def _forget(page: Page, server: Server) -> None:
    """Leave a page and whatever it knows of its visitor."""
    page.unroute_all()
    page.goto(f"{server.url}nowhere")  # of the same origin; as it is left, the page writes down its open tab
    page.evaluate("localStorage.clear()")
    page.goto("about:blank")
    page.context.clear_cookies()


def _running() -> str:
    """The test that runs, as a file's name."""
    name = os.environ["PYTEST_CURRENT_TEST"].split(" ")[0].removeprefix("tests/app/")
    return re.sub(r"[^\w.-]+", "-", name).strip("-")


def prompt(on: On) -> Any:
    return on.get_by_label("Prompt", exact=True)


def slider(on: On, name: str, value: int) -> None:
    field = on.get_by_label(f"number input for {name}")
    field.fill(str(value))
    field.blur()


def status(on: On, state: str) -> Any:
    return _found(on, f".status[data-state={state}]")


def _found(on: On, selector: str) -> Any:
    found = on.locator(selector)
    found.wait_for()
    return found


def generate(on: On, state: str = "done") -> Any:
    """Press the button and wait until what this run came to is told: a kept picture is there at once, before
    anybody could see that the page was busy."""
    on.locator(".status").evaluate("told => told.dataset.before = ''")
    on.get_by_role("button", name="Generate").click()
    told = _found(on, f".status[data-state={state}]:not([data-before])")
    if state == "done":  # the line of progress may tell of it before the canvas does
        on.locator(".canvas[data-state=done] img:visible").first.wait_for()
    return told


def wait_for_preview(on: On) -> None:
    on.locator(".canvas[data-state=busy] img").first.wait_for()


def no_sideways_scroll(page: Page) -> bool:
    return page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")


def open_tab(page: Page, name: str) -> Locator:
    """Open a tab and wait for its plan → what is in it."""
    page.get_by_role("tab", name=name).click()
    panel = page.get_by_role("tabpanel")
    panel.locator(".plan .bars").wait_for()
    return panel
