"""What is said to whoever started the program: a line at a time, whole, and never in the way of the page."""

from __future__ import annotations

import sys
from contextlib import suppress
from typing import TextIO


def say(text: str) -> None:
    _write(sys.stdout, text)


def warn(text: str) -> None:
    _write(sys.stderr, f"triptych: {text}")


def _write(stream: TextIO | None, text: str) -> None:
    if stream is None:  # a program without a console
        return
    with suppress(OSError, ValueError):  # nobody reads it any more
        stream.write(f"{text}\n")
        stream.flush()
