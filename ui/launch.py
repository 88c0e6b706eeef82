"""Builds every object once, launches the page, and takes all down again."""

from __future__ import annotations

import logging
import os
import threading
import time
from contextlib import redirect_stdout
from dataclasses import replace
from io import StringIO
from pathlib import Path
from typing import Any

from backend import Settings, Studio, catalog
from backend.downloads import Downloads
from backend.errors import StorageError, TriptychError
from ui import blocks, desktop, guard, i18n, sharing, theme
from ui.console import say, warn
from ui.guard.bodies import FILE
from ui.jobs import Jobs

OURSELVES = "localhost,127.0.0.1,::1"
LOOK = 1.0  # seconds between looks whether to end; on Windows only Ctrl+C interrupts a sleep


class NotStarted(TriptychError):
    """The page cannot be served."""


def serve(settings: Settings, ending: threading.Event, *, lent: bool = False) -> None:
    """Run until a signal ends the program, or sets `ending`. Where the GPU is only `lent`, the demos are
    loaded first: what is there before the launch is on the GPU whenever it comes."""
    secret = None
    if settings.share and settings.auth is None:
        secret = sharing.login()
        settings = replace(settings, auth=":".join(secret))
    studio = Studio(settings)
    jobs, downloads = Jobs(studio), Downloads(studio)
    if lent:
        warm(studio, *catalog.FAMILIES, run=False)
    link = sharing.Link(Path(os.environ["GRADIO_TEMP_DIR"]), settings.host)
    try:
        launch(settings, jobs, downloads, link)
        url = address(settings.host, settings.port)
        say(f"Triptych is at {url}")
        if settings.mcp:
            say(f"Its tools for MCP are at {url}gradio_api/mcp/")
        if secret:
            say("To sign in: user {}, password {}".format(*secret))
        if settings.share:
            link.open(settings.port)
        desktop.open_page(settings, url)
        threading.Thread(target=settle, args=(studio, lent), daemon=True, name="settle").start()
        if settings.fetch:
            threading.Thread(target=fetch, args=(settings, downloads), daemon=True, name="fetch").start()
        while not ending.is_set():
            time.sleep(LOOK)
    finally:
        link.close()
        jobs.close()
        downloads.close()


def launch(settings: Settings, jobs: Jobs, downloads: Downloads, link: sharing.Link) -> None:
    """The page, answering. Raises NotStarted."""
    demo = blocks.build(jobs, downloads)
    if settings.mcp:
        from ui import tools

        tools.install()
    _reach_ourselves(settings.host)
    gallery = jobs.studio.gallery
    rules = guard.middleware(settings, gallery, share_url=lambda: link.url, hosts=settings.hosts)
    app: dict[str, Any] = {"middleware": rules, "routes": desktop.routes()}
    styles = sorted(theme.ASSETS.glob("*.css"), key=lambda file: (file != theme.STYLE, file))
    try:
        with redirect_stdout(StringIO()):  # what Gradio says of itself
            demo.launch(
                server_name=f"[{settings.host}]" if ":" in settings.host else settings.host,
                server_port=settings.port,
                share=False,  # `link` does it, and nobody waits for it
                auth=_login(settings.auth),
                app_kwargs=app,
                allowed_paths=[str(gallery.outputs)],
                max_file_size=FILE,
                strict_cors=True,
                enable_monitoring=False,
                mcp_server=settings.mcp,
                pwa=True,
                i18n=i18n.for_gradio(),
                theme=theme.theme(),
                css_paths=styles,
                js=theme.PAGE.read_text(encoding="utf-8"),
                head=desktop.HEAD + i18n.head(),
                favicon_path=theme.ICON,
                footer_links=["api"],
                run_history=False,
                ssr_mode=False,
                quiet=True,
                prevent_thread_lock=True,
            )
    except OSError as error:
        where = f"{settings.host} port {settings.port}"
        raise NotStarted(f"cannot listen on {where} any more; choose another with --port") from error
    except ValueError as error:
        if "localhost is not accessible" not in str(error):
            raise
        where = address(settings.host, settings.port)
        raise NotStarted(f"the page does not answer at {where}: is a firewall in the way?") from error
    guard.settle(demo)
    if demo.mcp_error:
        warn(demo.mcp_error)


def settle(studio: Studio, lent: bool) -> None:
    """What can wait until the page is up: the state of the home, then torch and the first demo."""
    try:
        studio.gallery.check()
        studio.gallery.reconcile()
    except StorageError as error:
        warn(f"{error}; until then pictures cannot be kept")
    if not lent:
        warm(studio, "sd15")


def fetch(settings: Settings, downloads: Downloads) -> None:
    """Download what the start was asked for. On a public server, where nobody else may, by a line of its own:
    then strangers can use it."""
    if settings.public:
        downloads = Downloads(Studio(replace(settings, public=False)))
    wanted = [entry for entry in catalog.CATALOGUE if entry.name in settings.fetch]
    try:
        for entry in wanted:
            downloads.start(entry.family, entry.name)
        while not downloads.idle():
            time.sleep(LOOK)
        told = [downloads.status(entry.family, entry.name) for entry in wanted]
        problems = [each.error for each in told if each and each.error]
    except TriptychError as error:  # --offline
        problems = [str(error)]
    for problem in problems:
        warn(problem)


def warm(studio: Studio, *families: str, run: bool = True) -> None:
    """Import torch and load the demos, of sd15 while the page is already up."""
    for family in families:
        try:
            studio.warm(family, run=run)
        # RuntimeError: what ZeroGPU shows as CUDA holds networks, but does not run all of them
        except (TriptychError, RuntimeError) as error:
            logging.getLogger("triptych").warning("the demo of %s could not be prepared: %s", family, error)


def address(host: str, port: int) -> str:
    """Where a browser on this machine finds the page."""
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    return f"http://[{host}]:{port}/" if ":" in host else f"http://{host}:{port}/"


def _login(auth: str | None) -> tuple[str, str] | None:
    user, _, password = (auth or "").partition(":")
    return (user, password) if auth else None


def _reach_ourselves(host: str) -> None:
    """Gradio's launch asks for its own page: not by way of a proxy that the environment names."""
    for name in ("no_proxy", "NO_PROXY"):
        os.environ[name] = ",".join(filter(None, (os.environ.get(name), OURSELVES, host)))
