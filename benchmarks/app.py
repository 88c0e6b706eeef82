"""The app as a person meets it: started, its page served, the first and the second demo picture."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
PATIENCE = 120.0


def measure(device: str) -> dict[str, Any]:
    """Start the app, fetch the page, ask for two pictures. Seconds."""
    from gradio_client import Client

    with tempfile.TemporaryDirectory() as home:
        command = [sys.executable, "app.py", "--port", "0", "--device", device, "--home", home]
        begin = time.perf_counter()
        with subprocess.Popen(
            command, cwd=ROOT, stdout=subprocess.PIPE, text=True, env=_environment()
        ) as app:
            try:
                assert app.stdout is not None
                url = next(word for line in app.stdout for word in line.split() if word.startswith("http"))
                page_bytes = _fetch(url)
                served_s = time.perf_counter() - begin
                client = Client(url, verbose=False, download_files=home)
                pictures = [_paint(client, seed) for seed in (1, 2)]
            finally:
                app.terminate()
    return {
        "page_served_s": served_s,
        "page_bytes": page_bytes,
        "first_picture_s": pictures[0],
        "second_picture_s": pictures[1],
    }


def _environment() -> dict[str, str]:
    """Ours, without what would change the app's settings."""
    return {name: value for name, value in os.environ.items() if not name.startswith("TRIPTYCH_")}


def _fetch(url: str) -> int:
    """Fetch the page as soon as it is there → its size."""
    deadline = time.monotonic() + PATIENCE
    while True:
        try:
            with urllib.request.urlopen(url, timeout=PATIENCE) as answer:
                return len(answer.read())
        except urllib.error.URLError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.02)


def _paint(client: Any, seed: int) -> float:
    begin = time.perf_counter()
    files, _ = client.predict(prompt="a red lighthouse on green hills at sunset", seed=seed, api_name="/sd15")
    seconds = time.perf_counter() - begin
    assert files
    return seconds
