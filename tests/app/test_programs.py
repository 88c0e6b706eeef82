"""Other programs: what the README shows them, as it stands there, and the endpoints as tools of MCP."""

from __future__ import annotations

import asyncio
import base64
import io
import json
import re
import subprocess
import sys
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any, TypeVar

import pytest
from gradio_client import Client
from mcp import ClientSession
from mcp.client.streamable_http import streamable_http_client
from mcp.types import CallToolResult, ImageContent, TextContent
from PIL import Image

from backend.requests import REQUESTS
from tests.app.support import ROOT, Server, environment, serving

SECTION = (
    (ROOT / "README.md").read_text(encoding="utf-8").split("## From other programs")[1].split("\n## ")[0]
)
PYTHON = re.findall(r"```python\n(.*?)```", SECTION, re.DOTALL)
SHELL = re.findall(r"```sh\n(.*?)```", SECTION, re.DOTALL)
AT = "http://127.0.0.1:7860"
Result = TypeVar("Result")
QUICK: Any = {"prompt": "a red house on green hills", "steps": 2, "seed": 7}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with serving(tmp_path_factory.mktemp("tools"), "--mcp", OMP_NUM_THREADS="1") as server:
        yield server


# ---- the README's examples


def run(server: Server, folder: Path, *command: str) -> str:
    """Run the example, its last word, there, against this server → what it prints."""
    *before, text = command
    assert AT in text
    variables = environment(folder, HOME=str(folder), OMP_NUM_THREADS="1")
    variables["GRADIO_TEMP_DIR"] = str(folder / "downloads")
    done = subprocess.run(
        [*before, text.replace(AT, server.url.rstrip("/"))],
        cwd=folder,
        env=variables,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def block(word: str) -> str:
    """The one in Python with that word."""
    (text,) = (text for text in PYTHON if word in text)
    return text


def example(server: Server, folder: Path, word: str) -> str:
    return run(server, folder, sys.executable, "-c", block(word))


def is_of_seed(file: Path, seed: int) -> bool:
    return f"Seed: {seed}," in str(Image.open(file).info["parameters"])


def test_the_first_example_paints_follows_and_cancels(server: Server, tmp_path: Path) -> None:
    before = len(server.pictures)
    _, first, *steps = example(server, tmp_path, "job.cancel()").splitlines()
    file, timings = first.split(" ", 1)
    assert is_of_seed(Path(file), 7)
    assert "'denoise'" in timings
    assert re.search(r"'phase': 'denoise', 'step': \d+, 'steps': 100", steps[-1])
    Client(server.url, verbose=False).predict(**QUICK, api_name="/sd15")  # the device is free again
    assert len(server.pictures) == before + 2


def test_the_examples_of_the_other_families(server: Server, tmp_path: Path) -> None:
    Image.new("RGB", (80, 60), "skyblue").save(tmp_path / "holiday.jpg")
    before = len(server.pictures)
    example(server, tmp_path, "holiday.jpg")
    assert example(server, tmp_path, "skip_layer_guidance_scale").endswith(("full\n", "int8\n", "nf4\n"))
    assert len(server.pictures) == before + 2


def test_the_example_in_the_shell(server: Server, tmp_path: Path) -> None:
    (script,) = SHELL
    said = run(server, tmp_path, "sh", "-euc", script)
    assert '"phase": "denoise"' in said
    assert is_of_seed(tmp_path / "house.png", 7)


def test_the_example_with_tools(server: Server, tmp_path: Path) -> None:
    said = example(server, tmp_path, "ClientSession")
    assert re.search(r"^\w+: \d+ of \d+", said, re.MULTILINE)
    assert is_of_seed(tmp_path / "house.png", 7)


def test_the_example_without_a_server(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    exec(block("result.images"), {})  # here: torch is loaded already
    (kept,) = (tmp_path / ".triptych" / "outputs").rglob("*.png")
    assert str(kept) in capsys.readouterr().out
    pixels = [Image.open(file).tobytes() for file in (kept, tmp_path / "house.png")]
    assert pixels[0] == pixels[1]


# ---- tools


def with_session(server: Server, work: Callable[[ClientSession], Awaitable[Result]]) -> Result:
    async def run() -> Result:
        async with (
            streamable_http_client(f"{server.url}gradio_api/mcp/") as (read, write, _),
            ClientSession(read, write) as session,
        ):
            await session.initialize()
            return await work(session)

    return asyncio.run(run())


def call(server: Server, tool: str, told: list[str] | None = None, **arguments: Any) -> CallToolResult:
    async def hear(progress: float, total: float | None, message: str | None) -> None:
        if told is not None:
            told.append(message or "")

    follow = None if told is None else hear
    return with_session(server, lambda session: session.call_tool(tool, arguments, progress_callback=follow))


def text(answer: CallToolResult) -> str:
    last = answer.content[-1]
    assert isinstance(last, TextContent)
    return last.text


def test_where_the_tools_are_is_said_and_nothing_else(server: Server) -> None:
    assert server.log.read_text().splitlines() == [
        f"Triptych is at {server.url}",
        f"Its tools for MCP are at {server.url}gradio_api/mcp/",
    ]


def test_the_tools_are_the_endpoints_each_parameter_typed_and_explained(server: Server) -> None:
    tools = {tool.name: tool for tool in with_session(server, lambda session: session.list_tools()).tools}
    assert set(tools) == {"plan", *REQUESTS}
    for name, family in REQUESTS.items():
        parameters = tools[name].inputSchema["properties"]
        assert set(parameters) == {field.name for field in fields(family)}
        for each in parameters.values():
            assert each["description"].endswith(".")
            assert "type" in each or "oneOf" in each
        assert "required" not in tools[name].inputSchema
        assert "Paint pictures" in (tools[name].description or "")
    assert set(tools["plan"].inputSchema["required"]) == {"family", "request"}


def test_a_tool_tells_each_step_and_gives_the_pictures(server: Server) -> None:
    told: list[str] = []
    answer = call(server, "sd15", told, **QUICK | {"num_images": 2})
    assert not answer.isError
    assert "denoise: 2 of 2" in told
    first, second, facts = answer.content
    assert isinstance(first, ImageContent)
    assert isinstance(second, ImageContent)
    assert isinstance(facts, TextContent)
    files = [base64.b64decode(each.data) for each in (first, second)]
    assert set(files) <= {path.read_bytes() for path in server.pictures}
    assert Image.open(io.BytesIO(files[1])).format == "PNG"
    assert json.loads(facts.text)["seeds"] == [7, 8]


def test_a_tool_without_anybody_to_tell(server: Server) -> None:
    assert json.loads(text(call(server, "sd3", **QUICK)))["seeds"] == [7]
    plan = json.loads(text(call(server, "plan", family="sd15", request={"checkpoint": "sd15"})))
    assert plan["peak_bytes"] > 1e9


@pytest.mark.parametrize("told", [None, []])
def test_what_a_tool_cannot_do_is_said_and_the_next_call_goes_on(
    server: Server, told: list[str] | None
) -> None:
    answer = call(server, "sd15", told, **QUICK | {"steps": 1000})
    assert answer.isError
    assert "steps is 1000; it can be a whole number from 1 to 150" in text(answer)
    assert not call(server, "sd15", told, **QUICK).isError
