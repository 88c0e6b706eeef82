"""A real server in a process of its own, and what stands in for the hub."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from gradio_client import Client

ROOT = Path(__file__).parents[2]
DEMO = ROOT / "assets" / "demo" / "sd15"

# A request that keeps any CPU busy for longer than a test takes to interrupt it.
LONG: Any = {"prompt": "a blue castle", "steps": 150, "num_images": 8, "width": 256, "height": 256}


@dataclass(frozen=True)
class Server:
    url: str
    home: Path
    log: Path
    process: subprocess.Popen[bytes]

    @property
    def pictures(self) -> list[Path]:
        return sorted((self.home / "outputs").rglob("*.png"))


def environment(folder: Path, **extra: str) -> dict[str, str]:
    """This process's environment without what would change the program, with temporary places of its own."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("TRIPTYCH_", "GRADIO_", "HF_"))}
    (folder / "tmp").mkdir(parents=True, exist_ok=True)
    return kept | {"TMPDIR": str(folder / "tmp"), "HF_HOME": str(folder / "hub"), **extra}


@contextmanager
def serving(folder: Path, *flags: str, home: Path | None = None, **extra: str) -> Generator[Server]:
    """`python app.py` on a free port; ends it as a person would and checks that it went cleanly."""
    port, home, log = free_port(), home or folder / "home", folder / "server.log"
    flags = ("--port", str(port), "--home", str(home), "--device", "cpu", *flags)
    with log.open("wb") as out:
        process = subprocess.Popen(
            [sys.executable, "app.py", *flags],
            cwd=ROOT,
            env=environment(folder, **extra),
            stdout=out,
            stderr=subprocess.STDOUT,
        )
    server = Server(f"http://127.0.0.1:{port}/", home, log, process)
    try:
        wait_until_up(server)
        yield server
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0, log.read_text()
    finally:
        process.kill()
        process.wait()
    assert not list((folder / "tmp").glob("triptych-*")), "copies of pictures were left behind"


def wait_until_up(server: Server, seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        assert server.process.poll() is None, server.log.read_text()
        try:
            with urllib.request.urlopen(server.url, timeout=5) as answer:
                assert answer.status == 200
                return
        except (urllib.error.URLError, ConnectionError, TimeoutError):
            time.sleep(0.1)
    raise AssertionError(f"no answer within {seconds} s:\n{server.log.read_text()}")


def connected(server: Server, folder: Path) -> Client:
    """A client that waits for a busy machine, where its own default is five seconds."""
    patience = {"timeout": 60}
    return Client(server.url, verbose=False, download_files=str(folder), httpx_kwargs=patience)


def called_by(server: Server, host: str) -> int:
    """The status of the page, when it is called by that name."""
    try:
        with urllib.request.urlopen(urllib.request.Request(server.url, headers={"Host": host})) as answer:
            return answer.status
    except urllib.error.HTTPError as error:
        return error.code


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class Hub(BaseHTTPRequestHandler):
    """A model hub that has a gated repository, loses the line at another, and lacks all others."""

    def do_GET(self) -> None:
        if "gated/model" in self.path:
            self._refuse(403, "GatedRepo")
        elif "down/model" in self.path:
            self.close_connection = True
        else:
            self._refuse(404, "RepoNotFound")

    do_HEAD = do_GET  # noqa: N815 (the name that http.server calls)

    def _refuse(self, status: int, code: str) -> None:
        self.send_response(status)
        self.send_header("X-Error-Code", code)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 (named so by the base class)
        """Say nothing."""


@contextmanager
def hub() -> Generator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
