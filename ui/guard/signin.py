"""Signing in: a page of our own before Gradio's, and tries that are counted."""

from __future__ import annotations

import ipaddress
import math
import time
from collections import OrderedDict, deque
from collections.abc import Callable
from html import escape

from starlette.responses import HTMLResponse, RedirectResponse, Response
from starlette.types import ASGIApp

from ui.guard.bodies import FORM, Body, taken
from ui.guard.calls import Call, Refused
from ui.render import LOGO
from ui.theme import ASSETS

PAGE = ASSETS / "signin.html"
MINUTE = 60.0
FREE, PAUSE = 5, 5.0  # tries of an address within a minute; then one in so many seconds
FREE_OF_ALL, PAUSE_OF_ALL = 30, 2.0  # the same for all addresses together
MOST_ADDRESSES = 10_000


class Tries:
    """Counts tries, each as failed until it succeeds: many at once are no way around it.

    Past the free ones, one is let through every few seconds: guessing stays hopeless, and whoever has the
    password is in after a short wait. An address that got in before is not held up by the others.
    """

    def __init__(self, now: Callable[[], float] = time.monotonic) -> None:
        self._now = now
        self._of: OrderedDict[str, deque[float]] = OrderedDict()
        self._all: deque[float] = deque()
        self._known: OrderedDict[str, None] = OrderedDict()

    def begin(self, address: str) -> float:
        """Count a try → 0, or the seconds to wait before the next one."""
        now, who = self._now(), _network(address)
        mine = self._of.setdefault(who, deque())
        for times in (mine, self._all):
            while times and times[0] <= now - MINUTE:
                times.popleft()
        wait = mine[-1] + PAUSE - now if len(mine) >= FREE else 0.0
        if len(self._all) >= FREE_OF_ALL and who not in self._known:
            wait = max(wait, self._all[-1] + PAUSE_OF_ALL - now)
        if wait <= 0:
            mine.append(now)
            self._all.append(now)
        self._of.move_to_end(who)
        while len(self._of) > MOST_ADDRESSES:
            self._of.popitem(last=False)
        return max(wait, 0.0)

    def succeed(self, address: str) -> None:
        who = _network(address)
        if self._of.pop(who, None) and self._all:
            self._all.pop()
        self._known[who] = None
        if len(self._known) > MOST_ADDRESSES:
            self._known.popitem(last=False)


def _network(address: str) -> str:
    """Who has one address of IPv6 has 2^64 of them."""
    try:
        parsed = ipaddress.ip_address(address)
    except ValueError:
        return address[:80]
    if isinstance(parsed, ipaddress.IPv6Address) and parsed.ipv4_mapped is None:
        return str(ipaddress.ip_network((parsed, 64), strict=False))
    return str(parsed)


def page(call: Call, status: int = 200, problem: str = "", **headers: str) -> Response:
    """The form, with what went wrong."""
    t = call.t
    words = {
        "lang": t.code,
        "dir": "rtl" if t.code == "ar" else "ltr",
        "logo": LOGO,
        "problem": f'<p role="alert">{escape(problem)}</p>' if problem else "",
        "sign_in": escape(t("Sign in")),
        "user_name": escape(t("User")),
        "password": escape(t("Password")),
    }
    text = PAGE.read_text(encoding="utf-8")
    for name, value in words.items():
        text = text.replace(f"{{{{{name}}}}}", value)
    return HTMLResponse(text, status, {name.replace("_", "-"): value for name, value in headers.items()})


async def sign_in(call: Call, body: Body, tries: Tries, app: ASGIApp) -> Response:
    """Gradio checks user and password. A browser's form gets a page, a client the answer as it is."""
    body.limit(FORM)
    content = await body.whole()
    wait = tries.begin(call.address)
    shown = "text/html" in call.headers.get("accept", "")
    if wait:
        seconds = math.ceil(wait)
        text = call.t("Too many tries. Try again in {n} seconds.", n=seconds)
        if shown:
            return page(call, 429, text, Retry_After=str(seconds))
        raise Refused(429, text, Retry_After=str(seconds))
    answer = await taken(app, call.inner(), body.again(content))
    if answer.status_code == 200:
        tries.succeed(call.address)
        if shown:
            done = RedirectResponse("./", 303)
            done.raw_headers += [each for each in answer.raw_headers if each[0] == b"set-cookie"]
            return done
    elif shown:
        return page(call, 401, call.t("User or password is wrong."))
    return answer
