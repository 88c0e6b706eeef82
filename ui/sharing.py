"""The share link: a login for it, and the tunnel, which is asked for while the page already answers.

Gradio's own way waits up to half a minute before it gives up, and prints. Here a thread asks, and follows the
tunnel's program to its end.
"""

from __future__ import annotations

import atexit
import secrets
import subprocess
import threading
from contextlib import suppress
from pathlib import Path
from typing import IO
from urllib.parse import urlsplit

import httpx
from gradio import networking
from gradio.exceptions import ChecksumMismatchError
from gradio.tunneling import Tunnel

from ui.console import say, warn

LETTERS = "abcdefghijkmnpqrstuvwxyz23456789"  # none that looks like another
PATIENCE = 30.0  # seconds for the tunnel's program to have a link


def login() -> tuple[str, str]:
    """A random user and password, to be read out or typed; the password is one of 2⁸⁰."""
    user = "guest-" + _letters(4)
    return user, "-".join(_letters(4) for _ in range(4))


def _letters(count: int) -> str:
    return "".join(secrets.choice(LETTERS) for _ in range(count))


class Link:
    """The share link of a page; `url` is None until there is one, and when it has ended."""

    def __init__(self, folder: Path, host: str) -> None:
        """`folder` is for temporary files, `host` where the page listens."""
        self.url: str | None = None
        self._folder, self._host, self._port = folder, host, 0
        self._process: subprocess.Popen[bytes] | None = None
        self._closed = threading.Event()

    def open(self, port: int) -> None:
        """Ask for the link; what comes of it is printed."""
        self._port = port
        threading.Thread(target=self._run, daemon=True, name="share").start()

    def close(self) -> None:
        self._closed.set()
        if self._process is not None:
            self._process.terminate()

    def _run(self) -> None:
        try:
            self._follow(self._start())
            problem = "its program ended"
        # what has no answer, an answer of another shape, a program that cannot be had, kept or run
        except (httpx.HTTPError, OSError, ValueError, LookupError, TypeError, ChecksumMismatchError) as error:
            problem = f"{type(error).__name__}: {error}".partition("\n")[0].rstrip(": ")
        if self._closed.is_set():
            return
        had, self.url = self.url, None
        begun = f"The share link {had} has ended" if had else "There is no share link"
        warn(f"{begun} ({problem}); the page goes on without")

    def _start(self) -> subprocess.Popen[bytes]:
        """Start the tunnel's program; it is downloaded when it is first needed."""
        host, port, certificate = self._server()
        tunnel = _Tunnel(host, port, self._host, self._port, secrets.token_urlsafe(32), certificate)
        tunnel.start_tunnel()
        atexit.unregister(tunnel.kill)  # it prints; `close` does it
        process = tunnel.proc
        if process is None:
            raise OSError("the tunnel's program did not start")
        self._process = process
        if self._closed.is_set():
            process.terminate()
        return process

    def _server(self) -> tuple[str, int, str | None]:
        """Who makes tunnels: the server that GRADIO_SHARE_SERVER_ADDRESS names, or one of Gradio's → host,
        port, file of its certificate."""
        if named := networking.GRADIO_SHARE_SERVER_ADDRESS:
            host, _, port = named.partition(":")
            return host, int(port), None
        told = httpx.get(networking.GRADIO_API_SERVER, timeout=PATIENCE).raise_for_status().json()[0]
        certificate = self._folder / "tunnel.pem"
        certificate.write_text(told["root_ca"], encoding="utf-8")
        return told["host"], int(told["port"]), str(certificate)

    def _follow(self, process: subprocess.Popen[bytes]) -> None:
        """Read what the program says, or it would stand still when the pipes are full, until it ends."""
        if process.stdout is None or process.stderr is None:
            raise OSError("the tunnel's program has no output")
        threading.Thread(target=_drop, args=(process.stderr,), daemon=True, name="share-errors").start()
        slow = threading.Timer(PATIENCE, process.terminate)
        slow.start()
        for line in process.stdout:
            _, found, address = line.decode("utf-8", "replace").partition("start proxy success: ")
            if found and self.url is None:
                slow.cancel()
                self.url = urlsplit(address.strip())._replace(scheme="https").geturl()
                say(f"Shared at {self.url}")
        process.wait()
        slow.cancel()


def _drop(pipe: IO[bytes]) -> None:
    with suppress(ValueError):  # it was closed meanwhile
        for _ in pipe:
            pass


class _Tunnel(Tunnel):
    def _read_url_from_tunnel_stream(self) -> str:
        """Gradio's waits at full tilt, and prints; `Link` reads it."""
        return ""
