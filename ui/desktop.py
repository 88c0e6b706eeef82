"""At home on a desktop: the page opens by itself, and can be installed as an app."""

from __future__ import annotations

import os
import sys
import threading
import webbrowser
from collections.abc import Mapping

from starlette.requests import Request
from starlette.responses import FileResponse, JSONResponse, Response
from starlette.routing import Route

from backend import Settings
from ui.console import say
from ui.theme import ASSETS

ICONS = ASSETS / "icons"
OF_TEXT = ("www-browser", "links", "elinks", "lynx", "w3m")  # they would take over the terminal
AT = "/static/triptych"  # where Gradio has files of its own
HEAD = f'<link rel="apple-touch-icon" href=".{AT}/icon-180.png">'


def wanted(settings: Settings, environ: Mapping[str, str], *, platform: str, terminal: bool) -> bool:
    """Whether a person sits before this machine's screen, who started it and wants the page: there is a
    terminal and a screen, and this is neither a Space nor a test."""
    if settings.no_browser or not terminal or any(name in environ for name in ("SPACE_ID", "CI")):
        return False
    if platform in ("darwin", "win32"):  # always with a screen, but who comes by ssh does not see it
        return not any(name in environ for name in ("SSH_CONNECTION", "SSH_TTY"))
    return any(environ.get(name) for name in ("DISPLAY", "WAYLAND_DISPLAY"))


def open_page(settings: Settings, url: str) -> None:
    """Open the page in the browser where that is wanted, without waiting for it."""
    terminal = sys.stdout is not None and sys.stdout.isatty()
    if wanted(settings, os.environ, platform=sys.platform, terminal=terminal):
        threading.Thread(target=_open, args=(url,), daemon=True, name="browser").start()


def _open(url: str) -> None:
    try:
        browser = webbrowser.get()
        opened = getattr(browser, "basename", "") not in OF_TEXT and browser.open(url)
    except (webbrowser.Error, OSError):
        opened = False
    if not opened:
        say("No browser could be opened; open that address in one.")


def routes() -> list[Route]:
    """The manifest of the app and its icons, before Gradio's, which knows one icon and no colours."""
    return [
        Route("/manifest.json", _manifest),
        Route(f"{AT}/{{name}}", _icon),
    ]


async def _manifest(_: Request) -> Response:
    icons = [
        {
            "src": f".{AT}/{kind}-{side}.png",
            "sizes": f"{side}x{side}",
            "type": "image/png",
            "purpose": purpose,
        }
        for kind, purpose in (("icon", "any"), ("maskable", "maskable"))
        for side in (192, 512)
    ]
    content = {
        "id": "./",
        "name": "Triptych",
        "short_name": "Triptych",
        "description": "A text-to-image studio",
        "start_url": "./",
        "scope": "./",
        "display": "standalone",
        "background_color": "#f7f6f3",
        "theme_color": "#f7f6f3",
        "icons": icons,
    }
    return JSONResponse(content, media_type="application/manifest+json")


async def _icon(request: Request) -> Response:
    name = request.path_params["name"]
    if name not in {file.name for file in ICONS.glob("*.png")}:
        return Response(status_code=404)
    return FileResponse(ICONS / name, headers={"Cache-Control": "public, max-age=86400"})
