"""The guard in front of an app that stands in for Gradio, asked by hand."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from backend import Settings
from backend.gallery import Gallery
from ui.guard import middleware
from ui.guard.front import Guard
from ui.visitors import session_of

COOKIE = "A" * 43
SESSION = session_of({"triptych-session": COOKIE})
OTHER = "B" * 43
OURS = {"host": "localhost:7860", "origin": "http://localhost:7860"}
PNG = b"\x89PNG\r\n\x1a\n" + bytes(40)
JPEG = b"\xff\xd8\xff\xe0" + bytes(40)
WEBP = b"RIFF\x20\0\0\0WEBPVP8 " + bytes(40)
GIF = b"GIF89a" + bytes(40)
SVG = b"<svg xmlns='http://www.w3.org/2000/svg'/>"


@dataclass
class Answer:
    status: int
    headers: dict[str, str]
    cookies: list[str]
    content: bytes

    @property
    def detail(self) -> str:
        return json.loads(self.content)["detail"]


class Gradio:
    """As much of Gradio's app as the guard looks at. Answers with what it was asked."""

    def __init__(self) -> None:
        self.auth: dict[str, str] | None = None
        self.tokens: dict[str, str] = {}
        self.cookie_id = "id"
        self.state_holder: dict[str, Any] = {}
        self.middleware_stack: Any = None
        functions = {0: ("sd15", "public"), 1: ("stop", "private")}
        self.functions = {
            index: SimpleNamespace(api_name=name, api_visibility=visibility)
            for index, (name, visibility) in functions.items()
        }
        self.asked: list[tuple[str, dict[str, str], bytes]] = []
        self.answers: dict[str, tuple[int, bytes]] = {"/gradio_api/upload": (200, b"[]")}

    def get_blocks(self) -> Any:
        return SimpleNamespace(fns=self.functions)

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "lifespan":
            self.asked.append(("lifespan", {}, b""))
            return
        content, more = b"", scope["method"] == "POST"
        while more:
            message = await receive()
            content += message.get("body", b"")
            more = message.get("more_body", False)
        headers = {name.decode(): value.decode() for name, value in scope["headers"]}
        self.asked.append((scope["path"], headers, content))
        status, answer = self.answers.get(scope["path"], (200, b"gradio"))
        if answer == b"broken":
            raise RuntimeError("/secret/path")
        start = {"type": "http.response.start", "status": status, "headers": [(b"x-from", b"gradio")]}
        await send(start)
        await send({"type": "http.response.body", "body": answer})


@dataclass
class Server:
    """The guard in front of Gradio, asked by hand: nothing tidies up what a test sends."""

    home: Path
    options: dict[str, Any] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.gallery = Gallery(self.home)
        self.gradio = Gradio()
        settings = Settings(home=self.home, **self.settings)
        (guard,) = middleware(settings, self.gallery, **self.options)
        self.guard = Guard(self.gradio, cast("Any", guard.kwargs)["rules"])

    def ask(
        self,
        path: str,
        method: str = "GET",
        *,
        cookie: str = COOKIE,
        body: bytes | list[bytes] = b"",
        peer: tuple[str, int] = ("127.0.0.1", 5000),
        headers: Mapping[str, str] | None = None,
        end: str = "whole",
    ) -> Answer:
        """`end`: the body is whole, the line is "cut" after it, or it "never" ends."""
        path, _, query = path.partition("?")
        pieces = body if isinstance(body, list) else [body]
        given = {"host": "localhost:7860", **(headers or {})}
        if cookie:
            given["cookie"] = "; ".join(filter(None, [f"triptych-session={cookie}", given.get("cookie")]))
        scope = {
            "type": "http",
            "method": method,
            "path": path,
            "query_string": query.encode(),
            "headers": [(name.encode(), value.encode()) for name, value in given.items()],
            "client": peer,
            "scheme": "http",
            "app": self.gradio,
        }
        more = [{"type": "http.request", "body": piece, "more_body": True} for piece in pieces]
        more[-1]["more_body"] = end != "whole"
        sent: list[Any] = []

        async def receive() -> Any:
            if more:
                return more.pop(0)
            if end == "cut":
                return {"type": "http.disconnect"}
            return await asyncio.Future()

        async def send(message: Any) -> None:
            sent.append(message)

        asyncio.run(self.guard(scope, receive, send))
        raw = [(name.decode().lower(), value.decode()) for name, value in sent[0]["headers"]]
        cookies = [value for name, value in raw if name == "set-cookie"]
        content = b"".join(message.get("body", b"") for message in sent[1:])
        return Answer(sent[0]["status"], dict(raw), cookies, content)

    def reaches(self, path: str, method: str = "GET", **how: Any) -> bool:
        before = len(self.gradio.asked)
        answer = self.ask(path, method, **how)
        assert (answer.content == b"gradio") == (len(self.gradio.asked) > before)
        return answer.content == b"gradio"

    def call(self, what: str = "queue/join", **body: Any) -> Answer:
        return self.ask(f"/gradio_api/{what}", "POST", body=json.dumps(body).encode())


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Server:
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path / "temp"))
    return Server(tmp_path / "home")


@pytest.fixture
def public(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Server:
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path / "temp"))
    return Server(tmp_path / "home", settings={"public": True})
