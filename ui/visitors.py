"""Who asks: a browser or a client of the API by its session cookie, and the address that it comes from."""

from __future__ import annotations

import hashlib
import ipaddress
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass

import gradio as gr

from backend import Settings

COOKIE = "triptych-session"  # set by the guard, on the first answer to whoever has none
TOKEN = re.compile(r"[\w-]{20,100}", re.ASCII)
NOBODY = "nobody"  # owner of what someone without a cookie makes on a public server: shown to no one


@dataclass(frozen=True, kw_only=True)
class Visitor:
    """`session` stands for the cookie's value, which is never kept; it is "" for those without a cookie."""

    session: str = ""
    address: str = ""

    def owner(self, settings: Settings) -> str:
        """Whose the pictures are. In private mode all share one library."""
        return (self.session or NOBODY) if settings.public else ""


def visitor(request: gr.Request | None, settings: Settings) -> Visitor:
    if request is None or request.request is None:  # a call within the process
        return Visitor()
    peer = request.client.host if request.client else ""
    return Visitor(
        session=session_of(request.cookies),
        address=address_of(peer, request.headers.get("x-forwarded-for", ""), settings),
    )


def session_of(cookies: Mapping[str, str]) -> str:
    value = cookies.get(COOKIE, "")
    return hashlib.sha256(value.encode()).hexdigest()[:32] if TOKEN.fullmatch(value) else ""


def address_of(peer: str, forwarded: str, settings: Settings) -> str:
    """The client's address. What a proxy says of it counts where one stands before this server: its own
    entry, the last, as the others can be made up."""
    proxied = settings.share or "SPACE_ID" in os.environ or _is_loopback(peer)
    told = forwarded.rsplit(",", 1)[-1].strip()
    return told if proxied and told else peer


def _is_loopback(address: str) -> bool:
    try:
        return ipaddress.ip_address(address).is_loopback
    except ValueError:
        return False
