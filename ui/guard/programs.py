"""Programs that bring user and password along with each request: they fill in no form, and keep no cookie."""

from __future__ import annotations

import base64
import math
import secrets

from ui.guard.calls import Call, Refused
from ui.guard.signin import Tries


def signed_in(call: Call, tries: Tries) -> bool:
    """Whether the request has the right ones, as HTTP's Basic. Raises Refused after too many wrong ones."""
    kind, _, told = call.headers.get("authorization", "").partition(" ")
    if kind.lower() != "basic" or not call.settings.auth:
        return False
    if wait := tries.begin(call.address):
        seconds = math.ceil(wait)
        text = call.t("Too many tries. Try again in {n} seconds.", n=seconds)
        raise Refused(429, text, Retry_After=str(seconds))
    try:
        given = base64.b64decode(told.strip(), validate=True)
    except ValueError:  # no base64
        return False
    right = secrets.compare_digest(given, call.settings.auth.encode())
    if right:
        tries.succeed(call.address)
    return right
