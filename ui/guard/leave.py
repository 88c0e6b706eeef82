"""What every answer leaves with: headers that hold browsers back, and a cookie for whoever has none."""

from __future__ import annotations

import re
import secrets
from functools import cache

from starlette.datastructures import MutableHeaders
from starlette.types import Message, Send

from ui.guard.calls import Call
from ui.guard.files import Uploads
from ui.visitors import COOKIE

YEAR = 365 * 24 * 3600  # seconds
# What is the same for everybody, and may be kept for a day.
STILL = re.compile(
    r"/(?:assets|static|svelte)/(?:[\w@-][\w@.-]*/)*[\w@-][\w@.-]*|(?:/gradio_api)?/theme\.css"
    r"|/favicon\.ico|/manifest\.json|/pwa_icon",
    re.ASCII,
)
POLICY = {
    "default-src": "'self'",
    "script-src": "'self' 'unsafe-inline' 'unsafe-eval'",  # the page compiles the functions of `js=`
    "style-src": "'self' 'unsafe-inline'",
    "img-src": "'self' data: blob:",
    "font-src": "'self' data:",
    "connect-src": "'self' data: blob:",
    "worker-src": "'self' blob:",
    "frame-src": "'none'",
    "object-src": "'none'",
    "base-uri": "'self'",
    "form-action": "'self'",
}
POWERS = ("camera", "display-capture", "geolocation", "microphone", "payment", "serial", "usb")
HEADERS = {
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "same-origin",  # with none, browsers would hide the origin of the form that signs in
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Permissions-Policy": ", ".join(f"{power}=()" for power in POWERS),
}


@cache
def _headers(hosted: bool) -> dict[str, str]:
    """Only a Space is shown in a frame."""
    ancestors = "'self' https://huggingface.co https://*.huggingface.co" if hosted else "'none'"
    policy = POLICY | {"frame-ancestors": ancestors}
    lines = "; ".join(f"{name} {sources}" for name, sources in policy.items())
    frames = {} if hosted else {"X-Frame-Options": "DENY"}
    return HEADERS | frames | {"Content-Security-Policy": lines}


class Leave:
    """The `send` of an answer. Adds the headers, and a cookie for whoever has none where they are `welcome`;
    notes the files that a `watched` answer names."""

    def __init__(self, call: Call, uploads: Uploads, send: Send) -> None:
        self._call, self._uploads, self._send = call, uploads, send
        self.begun = self.welcome = self.watched = False

    async def __call__(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.begun = True
            headers = MutableHeaders(raw=list(message.get("headers", ())))
            headers.update(_headers(self._call.names.hosted))
            still = message["status"] == 200 and STILL.fullmatch(self._call.path)
            headers.setdefault("Cache-Control", "public, max-age=86400" if still else "no-store")
            headers.raw[:] = [(name, self._kept(name, value)) for name, value in headers.raw]
            if self.welcome and not self._call.session:
                headers.append("Set-Cookie", self._cookie())
            message = {**message, "headers": headers.raw}
        elif self.watched:
            self._uploads.told(message.get("body", b""), self._call.session)
        await self._send(message)

    def _kept(self, name: bytes, value: bytes) -> bytes:
        """Gradio has its login sent along from every site. Only a frame needs that, and then its own."""
        if name != b"set-cookie":
            return value
        if self._call.names.hosted:
            return value + b"; Partitioned" if b"samesite=none" in value.lower() else value
        return re.sub(rb"(?i)samesite=none", b"SameSite=Lax", value)

    def _cookie(self) -> str:
        about = f"{COOKIE}={secrets.token_urlsafe(32)}; Path=/; Max-Age={YEAR}; HttpOnly"
        if self._call.names.hosted:  # the page is shown in a frame of another site
            return f"{about}; SameSite=None; Secure; Partitioned"
        return f"{about}; SameSite=Lax" + ("; Secure" if self._call.secure else "")
