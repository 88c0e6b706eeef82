"""A request as the guard sees it: who asks, from where, and whether this server is what was asked for."""

from __future__ import annotations

import ipaddress
import os
import re
import socket
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from functools import cached_property
from urllib.parse import urlsplit

import gradio as gr
from starlette.datastructures import Headers
from starlette.requests import Request, cookie_parser
from starlette.types import Scope

from backend import Settings
from ui import i18n, visitors

AUTHORITY = re.compile(r"(?:\[([0-9A-Fa-f:.]+)\]|([\w.-]+))(?::(\d{1,5}))?", re.ASCII)
UNKNOWN = "This server does not go by the name {}. If it should, name it with --hosts."
ORIGIN = re.compile(r"https?://(.+)")


class Refused(Exception):
    """What is not answered: the status, and why in words for whoever asks."""

    def __init__(self, status: int, text: str, **headers: str) -> None:
        super().__init__(text)
        self.status, self.headers = status, {name.replace("_", "-"): value for name, value in headers.items()}


class Names:
    """The names that this server goes by.

    A page of another site can have its own name point at this machine (DNS rebinding), and then counts as one
    of ours for the browser, but not here. Addresses are safe: nobody can point them elsewhere.
    """

    def __init__(
        self,
        settings: Settings,
        share_url: Callable[[], str | None] = lambda: None,
        hosts: Collection[str] = (),
    ) -> None:
        self.hosted, self.shared = "SPACE_ID" in os.environ, settings.share
        self._share_url = share_url
        machine = socket.gethostname()
        local = ("localhost", settings.host, machine, f"{machine.partition('.')[0]}.local")
        self._local = {name.lower().rstrip(".") for name in local}
        given = (*hosts, os.environ.get("SPACE_HOST", ""))
        self._given = {name.lower().rstrip(".") for name in given} - {""}

    def __contains__(self, host: str) -> bool:
        try:
            ipaddress.ip_address(host)
        except ValueError:
            hosted = self.hosted and host.endswith(".hf.space")
            return host in self._local or hosted or self.is_given(host)
        return True

    def is_given(self, host: str) -> bool:
        """Whether the name is this server's alone, whatever a proxy makes of it; a local one is shared with
        other programs of this machine."""
        return host in self._given or host == self.share_host

    @property
    def share_host(self) -> str | None:
        """Of the share link, as soon as there is one."""
        return urlsplit(self._share_url() or "").hostname


@dataclass(frozen=True)
class Call:
    """A request, before anything of it is believed."""

    scope: Scope
    settings: Settings
    names: Names

    @cached_property
    def headers(self) -> Headers:
        return Headers(scope=self.scope)

    @cached_property
    def cookies(self) -> Mapping[str, str]:
        return cookie_parser("; ".join(self.headers.getlist("cookie")))

    @property
    def method(self) -> str:
        return self.scope["method"]

    @property
    def path(self) -> str:
        return self.scope["path"]

    @cached_property
    def request(self) -> Request:
        return Request(self.scope)

    @cached_property
    def session(self) -> str:
        """Who asks, "" for whoever has no cookie."""
        return visitors.session_of(self.cookies)

    @cached_property
    def address(self) -> str:
        peer, forwarded = self._peer[0], self.headers.get("x-forwarded-for", "")
        return visitors.address_of(peer, forwarded, self.settings)

    @cached_property
    def t(self) -> i18n.Tongue:
        """The language of whoever asks."""
        return i18n.of(gr.Request(self.request))

    @property
    def _peer(self) -> tuple[str, int]:
        return self.scope.get("client") or ("", -1)

    @property
    def proxied(self) -> bool:
        """Whether a proxy that may be believed stands before the server. Port 0 is how uvicorn notes that it
        took the client's address from one."""
        host, port = self._peer
        return self.names.shared or self.names.hosted or port == 0 or host == "::1" or host.startswith("127.")

    @property
    def secure(self) -> bool:
        """Whether the browser came by https, as far as can be told."""
        told = self.proxied and _first(self.headers.get("x-forwarded-proto", "")) == "https"
        public = self.names.hosted or self.host == self.names.share_host
        return told or public or self.scope.get("scheme") == "https"

    @property
    def host(self) -> str:
        return (parted(self.headers.get("host", "")) or ("", ""))[0]

    @property
    def logged_in(self) -> bool:
        """Whether the caller is, or need not be. Gradio checks the password and gives the cookie."""
        app = self.scope["app"]
        if app.auth is None:
            return True
        names = (f"access-token-{app.cookie_id}", f"access-token-unsecure-{app.cookie_id}")
        return any(self.cookies.get(name) in app.tokens for name in names)

    @cached_property
    def own(self) -> set[tuple[str, str]]:
        """Host and port under which it came here. Raises Refused where that is no name of this server."""
        told = self.headers.getlist("host")
        if len(told) != 1:
            raise Refused(400, "A request names one host.")
        own: set[tuple[str, str]] = set()
        for authority in (*told, *filter(None, [self.forwarded])):
            known = parted(authority)
            if known is None or known[0] not in self.names:
                raise Refused(400, UNKNOWN.format(f"{authority!r:.80}"))
            own.add(known)
        return own

    @property
    def forwarded(self) -> str:
        """The host that the browser asked a proxy for. A Space has proxies with names of their own."""
        host = _first(self.headers.get("x-forwarded-host", "")) if self.proxied else ""
        known = not self.names.hosted or (parted(host) or ("", ""))[0] in self.names
        return host if known else ""

    def check_origin(self) -> None:
        """Raise Refused for what the page of another site asks, but for a link to this page that is followed
        (on a Space also for the frame that it is shown in)."""
        own = self.own
        for origin in self.headers.getlist("origin"):
            found = ORIGIN.fullmatch(origin)
            page = parted(found[1]) if found else None
            if page is None or not (page in own or self.names.is_given(page[0])):
                raise Refused(403, f"Pages of {origin!r:.80} may not use this server.")
        if self.headers.get("sec-fetch-site", "none") in ("none", "same-origin"):
            return
        frames = ("document", "iframe") if self.names.hosted else ("document",)
        opened = (
            self.headers.get("sec-fetch-mode") == "navigate" and self.headers.get("sec-fetch-dest") in frames
        )
        if not (opened and self.method == "GET" and self.path == "/"):
            raise Refused(403, "Pages of other sites may not use this server.")

    def inner(self) -> Scope:
        """The scope for Gradio, without what it would believe of anybody; nor need it know the origin, which
        is our own."""
        dropped = {b"origin", b"x-gradio-server"}
        if not self.forwarded:
            dropped.add(b"x-forwarded-host")
        if not self.proxied:
            dropped.add(b"x-forwarded-proto")
        return {**self.scope, "headers": [each for each in self.scope["headers"] if each[0] not in dropped]}


def parted(authority: str) -> tuple[str, str] | None:
    """`host:port` → host in lower case and port, "" for the usual ones. None for what is no such thing."""
    found = AUTHORITY.fullmatch(authority)
    if not found:
        return None
    port = "" if found[3] in (None, "80", "443") else found[3]
    return (found[1] or found[2]).lower().rstrip("."), port


def _first(header: str) -> str:
    return header.split(",")[0].strip()
