"""The share link: a login that is told once, a tunnel that nobody waits for, strangers at the other end."""

from __future__ import annotations

import asyncio
import base64
import json
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from gradio import networking, tunneling
from gradio_client import Client
from gradio_client.exceptions import AppError
from mcp import ClientSession
from mcp.client.streamable_http import streamable_http_client
from mcp.types import CallToolResult, ImageContent, TextContent

from tests.app.support import Server, called_by, serving
from ui import sharing

PATIENCE = 60.0  # seconds, for what takes one on a machine that is not busy
HOST = "strangers.gradio.live"
# In the place of the tunnel's program: it waits until it may, tells a link, and stays until it is ended.
PROGRAM = f"""#!/bin/sh
echo "$$ $*" > "{{folder}}/asked"
while [ ! -e "{{folder}}/go" ]; do sleep 0.1; done
echo "2026/01/01 [I] start proxy success: http://{HOST}"
exec sleep 600
"""


def wait_for(true: Callable[[], object], what: str) -> None:
    end = time.monotonic() + PATIENCE
    while not true():
        assert time.monotonic() < end, what
        time.sleep(0.05)


def tunnel_program(folder: Path, text: str) -> Path:
    """Put a program where Gradio keeps the tunnel's → the folder for HF_HOME."""
    file = folder / "gradio" / "frpc" / tunneling.BINARY_FILENAME
    file.parent.mkdir(parents=True)
    file.write_text(text.format(folder=folder))
    file.chmod(0o755)
    return folder


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A page with tools that is started with --share, and has no link yet."""
    folder = tmp_path_factory.mktemp("share")
    tunnel_program(folder / "hub", PROGRAM)
    variables: dict[str, Any] = {
        "GRADIO_SHARE_SERVER_ADDRESS": "127.0.0.1:1",
        "HF_HOME": str(folder / "hub"),
        "OMP_NUM_THREADS": "1",
    }
    with serving(folder, "--share", "--mcp", **variables) as server:
        wait_for(lambda: "To sign in" in server.log.read_text(), "no login was told")
        yield server
        asked = (folder / "hub" / "asked").read_text()
    wait_for(lambda: not is_running(int(asked.split()[0])), "the tunnel outlived the page")


def is_running(process: int) -> bool:
    stat = Path(f"/proc/{process}/stat")
    return stat.exists() and stat.read_text().rsplit(")", 1)[1].split()[0] != "Z"


def login(server: Server) -> tuple[str, str]:
    found = re.search(r"To sign in: user (\S+), password (\S+)\n", server.log.read_text())
    assert found
    return found[1], found[2]


def test_the_page_answers_before_there_is_a_link_and_under_it_after(shared: Server) -> None:
    folder = shared.home.parent / "hub"
    wait_for((folder / "asked").exists, "the tunnel was not asked for")
    port = shared.url.rsplit(":", 1)[1].strip("/")
    assert f"-l {port} -i 127.0.0.1" in (folder / "asked").read_text()
    assert "Shared at" not in shared.log.read_text()
    assert called_by(shared, "127.0.0.1") == 200
    assert called_by(shared, HOST) == 400
    (folder / "go").touch()
    wait_for(lambda: "Shared at" in shared.log.read_text(), "no link was told")
    assert called_by(shared, HOST) == 200


def test_all_that_is_said_is_where_it_is_and_how_to_sign_in_once(shared: Server) -> None:
    (shared.home.parent / "hub" / "go").touch()
    wait_for(lambda: "Shared at" in shared.log.read_text(), "no link was told")
    user, password = login(shared)
    said = shared.log.read_text()
    assert said.splitlines() == [
        f"Triptych is at {shared.url}",
        f"Its tools for MCP are at {shared.url}gradio_api/mcp/",
        f"To sign in: user {user}, password {password}",
        f"Shared at https://{HOST}",
    ]
    assert said.count(password) == 1
    assert re.fullmatch(r"[a-km-z2-9]{4}(-[a-km-z2-9]{4}){3}", password)


def test_only_who_knows_the_password_gets_in_and_is_a_stranger(shared: Server, tmp_path: Path) -> None:
    user, password = login(shared)
    with pytest.raises(ValueError, match="Could not login"):
        Client(shared.url, verbose=False, auth=(user, password[::-1]))
    with pytest.raises(httpx.HTTPStatusError, match="401"):
        httpx.get(f"{shared.url}config").raise_for_status()
    client = Client(shared.url, verbose=False, auth=(user, password), download_files=str(tmp_path))
    with pytest.raises(AppError, match="on this public server it can be demo"):
        client.predict(prompt="a red house", checkpoint="someone/else", api_name="/sd15")
    files, _ = client.predict(prompt="a red house", steps=2, api_name="/sd15")
    assert Path(files[0]).read_bytes() == shared.pictures[0].read_bytes()


def tool(server: Server, login: str | None, **asked: Any) -> CallToolResult:
    headers = {"Authorization": f"Basic {base64.b64encode(login.encode()).decode()}"} if login else {}

    async def call() -> CallToolResult:
        async with (
            httpx.AsyncClient(headers=headers) as line,
            streamable_http_client(f"{server.url}gradio_api/mcp/", http_client=line) as (read, write, _),
            ClientSession(read, write) as session,
        ):
            await session.initialize()
            return await session.call_tool("sd15", asked)

    return asyncio.run(call())


def test_tools_ask_for_the_login_with_each_call(shared: Server) -> None:
    user, password = login(shared)
    before = len(shared.pictures)
    for wrong in (None, user, f"{user}:wrong", f"nobody:{password}"):
        with pytest.raises(ExceptionGroup) as caught:
            tool(shared, wrong, prompt="a red house", steps=2)
        assert caught.group_contains(httpx.HTTPStatusError, match="401")
    answer = tool(shared, f"{user}:{password}", prompt="a red house", steps=2)
    assert isinstance(answer.content[0], ImageContent)
    assert len(shared.pictures) == before + 1
    refused = tool(shared, f"{user}:{password}", prompt="a red house", checkpoint="someone/else")
    assert isinstance(refused.content[0], TextContent)
    assert "on this public server it can be demo" in refused.content[0].text


def test_logins_differ() -> None:
    logins = [sharing.login() for _ in range(50)]
    assert len({user for user, _ in logins}) > 40
    assert len({password for _, password in logins}) == 50


# ---- the link alone


def ended(folder: Path, capsys: pytest.CaptureFixture[str]) -> tuple[sharing.Link, str, str]:
    """A link whose end was told, and what was said."""
    link, err = sharing.Link(folder, "127.0.0.1"), ""
    link.open(7860)
    end, out = time.monotonic() + PATIENCE, ""
    while "triptych:" not in err:
        assert time.monotonic() < end
        time.sleep(0.05)
        said = capsys.readouterr()
        out, err = out + said.out, err + said.err
    return link, out, err


@pytest.fixture
def own_server(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(networking, "GRADIO_SHARE_SERVER_ADDRESS", "127.0.0.1:1")


def put(program: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    home = tunnel_program(folder / "hub", program)
    file = home / "gradio" / "frpc" / tunneling.BINARY_FILENAME
    monkeypatch.setattr(tunneling, "BINARY_PATH", str(file))


@pytest.mark.usefixtures("own_server")
def test_a_tunnel_that_is_refused_is_told_in_a_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    put("#!/bin/sh\necho login to server failed\necho why >&2\nexit 1\n", tmp_path, monkeypatch)
    link, out, err = ended(tmp_path, capsys)
    assert link.url is None
    assert out == ""
    assert err == "triptych: There is no share link (its program ended); the page goes on without\n"


@pytest.mark.usefixtures("own_server")
def test_a_tunnel_that_is_slow_is_given_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    put("#!/bin/sh\nexec sleep 600\n", tmp_path, monkeypatch)
    monkeypatch.setattr(sharing, "PATIENCE", 0.2)
    assert "There is no share link" in ended(tmp_path, capsys)[2]


@pytest.mark.usefixtures("own_server")
def test_a_link_that_ends_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    program = f"#!/bin/sh\necho start proxy success: http://{HOST}\nsleep 0.2\n"
    put(program, tmp_path, monkeypatch)
    link, out, err = ended(tmp_path, capsys)
    assert link.url is None
    assert out == f"Shared at https://{HOST}\n"
    assert f"The share link https://{HOST} has ended" in err


def test_who_cannot_be_asked_is_told_in_a_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(networking, "GRADIO_SHARE_SERVER_ADDRESS", None)
    monkeypatch.setattr(networking, "GRADIO_API_SERVER", "http://127.0.0.1:1/")
    err = ended(tmp_path, capsys)[2]
    assert "There is no share link (ConnectError: " in err
    assert err.count("\n") == 1


@pytest.mark.parametrize("answer", [{}, [], [{"host": "h"}], [{"host": "h", "port": "x", "root_ca": "c"}]])
def test_an_answer_that_makes_no_sense_is_told_in_a_line(
    answer: object, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(networking, "GRADIO_SHARE_SERVER_ADDRESS", None)
    request = httpx.Request("GET", "http://nowhere/")
    monkeypatch.setattr(
        httpx, "get", lambda *_, **__: httpx.Response(200, text=json.dumps(answer), request=request)
    )
    err = ended(tmp_path, capsys)[2]
    assert "There is no share link" in err
    assert err.count("\n") == 1


@pytest.mark.usefixtures("own_server")
def test_closing_ends_the_program_and_says_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    put(PROGRAM, tmp_path, monkeypatch)
    link = sharing.Link(tmp_path, "127.0.0.1")
    link.open(7860)
    wait_for((tmp_path / "hub" / "asked").exists, "the tunnel was not asked for")
    link.close()
    process = int((tmp_path / "hub" / "asked").read_text().split()[0])
    wait_for(lambda: not is_running(process), "the program is still there")
    assert capsys.readouterr() == ("", "")
