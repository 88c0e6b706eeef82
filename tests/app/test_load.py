"""Many at once: what is asked for is served or cleanly refused, nothing is lost or mixed up."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil
from gradio_client import Client
from gradio_client.exceptions import AppError
from PIL import Image

from tests.app.support import Server, connected

CLIENTS, REQUESTS = 20, 5
MIB = 2**20


def test_a_hundred_requests_of_twenty_clients(server: Server, client: Client, tmp_path: Path) -> None:
    ask(client, 0)
    for seed in range(10):
        ask(client, seed)  # what the first pictures take for good is not the load's
    process, before = psutil.Process(server.process.pid), len(server.pictures)
    taken = process.memory_info().rss
    clients = [connected(server, tmp_path / f"{n}") for n in range(CLIENTS)]
    with ThreadPoolExecutor(CLIENTS * REQUESTS) as pool:
        answers = list(pool.map(lambda n: ask(clients[n % CLIENTS], 1000 + n), range(CLIENTS * REQUESTS)))
    served = [answer for answer in answers if answer is not None]
    assert len(served) + answers.count(None) == CLIENTS * REQUESTS
    assert len(served) >= CLIENTS
    assert len({digest for _, digest in served}) == len(served), "two were given the same picture"
    assert len(server.pictures) == before + len(served)
    again = {seed: ask(client, seed) for seed, _ in served[:3]}
    assert all(again[seed] == answer for answer in served[:3] for seed in [answer[0]])
    grown = process.memory_info().rss - taken
    assert grown < 100 * MIB, f"{grown / MIB:.0f} MiB more than before"


def ask(client: Client, seed: int) -> tuple[int, bytes] | None:
    """A picture of that seed, seen to be that: its seed and pixels; None where it is refused in words."""
    size = {"width": 64, "height": 64}
    asked: Any = {"prompt": f"a red house, number {seed}", "seed": seed, "steps": 2, **size}
    try:
        (file,), facts = client.predict(**asked, api_name="/sd15")
    except AppError as error:
        assert "The queue is full" in str(error)  # noqa: PT017 (anything else is no clean refusal)
        return None
    with Image.open(file) as picture:
        text: str = picture.info["parameters"]
        assert facts["seeds"] == [seed]
        assert text.startswith(asked["prompt"])
        assert f"Seed: {seed}," in text
        return seed, picture.tobytes()
