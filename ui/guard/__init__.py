"""Stands in front of Gradio and lets through what the page and its clients need, and nothing else.

Gradio answers whoever asks: under any name, for pages of other sites, with every file whose path is known,
at dozens of routes that Triptych has no use for. Here a request passes, in this order, the name that the
server was called by, the page that it came from, the login, the route, and the body. Every answer leaves with
headers that keep browsers from doing more with it than they should.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection
from typing import TYPE_CHECKING

from starlette.middleware import Middleware

from backend import Settings
from backend.gallery import Gallery
from ui.guard.calls import Names
from ui.guard.front import Guard, Rules

if TYPE_CHECKING:
    import gradio as gr


def middleware(
    settings: Settings,
    gallery: Gallery,
    *,
    share_url: Callable[[], str | None] = lambda: None,
    hosts: Collection[str] = (),
) -> list[Middleware]:
    """For `launch(app_kwargs={"middleware": ...})`.

    `share_url` tells the share link as soon as there is one; `hosts` are further names of this server.
    """
    # It warns of each upload that is refused.
    logging.getLogger("python_multipart.multipart").setLevel(logging.ERROR)
    return [Middleware(Guard, rules=Rules(settings, gallery, Names(settings, share_url, hosts)))]


def settle(demo: gr.Blocks) -> None:
    """After the launch: answers do not tell what serves them, and the page of a share link takes its scripts
    from here as well. Gradio would load them from a site that the policy does not allow."""
    demo.share = False
    config = demo.server.config
    config.encoded_headers = [each for each in config.encoded_headers if each[0] != b"server"]
