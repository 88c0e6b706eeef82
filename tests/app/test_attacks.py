"""What was published against Gradio, tried on a public server and on one with a login, and refused."""

from __future__ import annotations

import base64
import http.client
import json
import secrets
import socket
import threading
import time
import zlib
from collections.abc import Generator, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlencode, urlsplit

import pytest
from gradio_client import handle_file
from gradio_client.exceptions import AppError
from PIL import Image
from playwright.sync_api import Browser, expect

from tests.app.pages import PATIENCE, open_tab
from tests.app.support import Server, connected, serving

PASSWORD = "correct horse"
QUICK: Any = {"prompt": "a red house", "steps": 2}
FILE = {"meta": {"_type": "gradio.FileData"}}
INSIDE = ("Traceback", "site-packages", 'File "', "/etc/", "/root", "/home", "/tmp")


@dataclass
class Answer:
    status: int
    headers: dict[str, str]
    content: bytes

    @property
    def text(self) -> str:
        return self.content.decode("utf-8", "replace")


@dataclass
class Stranger:
    """Sends what no browser would, as it is spelt, and keeps the cookies."""

    server: Server
    cookies: dict[str, str] = field(default_factory=dict)
    tab: str = field(default_factory=lambda: secrets.token_hex(6))

    def ask(
        self, path: str, method: str = "GET", body: Any = None, headers: Mapping[str, str] | None = None
    ) -> Answer:
        place = urlsplit(self.server.url)
        line = http.client.HTTPConnection(place.hostname or "", place.port, timeout=60)
        content = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
        sent = {"Host": place.netloc, "Content-Type": "application/json", **(headers or {})}
        if self.cookies:
            sent["Cookie"] = "; ".join(f"{name}={value}" for name, value in self.cookies.items())
        line.putrequest(method, path, skip_host=True, skip_accept_encoding=True)
        for name, value in sent.items():
            line.putheader(name, value)
        if content is not None:
            line.putheader("Content-Length", str(len(content)))
        line.endheaders(content)
        answer = line.getresponse()
        for header in answer.headers.get_all("set-cookie") or []:
            name, _, value = header.partition(";")[0].partition("=")
            self.cookies[name] = value
        got = Answer(answer.status, {k.lower(): v for k, v in answer.headers.items()}, answer.read())
        line.close()
        return got

    @property
    def events(self) -> list[dict[str, Any]]:
        """Of the page, shown or not, and of the API."""
        events = json.loads(self.ask("/config").text)["dependencies"]
        assert len(events) > 10
        return events

    def join(self, event: int, data: list[Any]) -> Answer:
        body = {"data": data, "fn_index": event, "session_hash": self.tab}
        return self.ask("/gradio_api/queue/join", "POST", body)

    def plan(self, prompt: str) -> Answer:
        """Ask for a memory plan, which takes no time."""
        event = next(event["id"] for event in self.events if event["api_name"] == "plan")
        return self.join(event, ["sd15", {"prompt": prompt}])

    def heard(self) -> str:
        """What comes of what was asked."""
        return self.ask(f"/gradio_api/queue/data?session_hash={self.tab}").text

    def get_in(self, password: str = PASSWORD) -> Answer:
        form = urlencode({"username": "me", "password": password}).encode()
        return self.ask("/login", "POST", form, {"Content-Type": "application/x-www-form-urlencoded"})

    def upload(self, *files: tuple[str, bytes]) -> Answer:
        parts = [
            f'--XX\r\nContent-Disposition: form-data; name="files"; filename="{name}"\r\n\r\n'.encode()
            + content
            for name, content in files
        ]
        body = b"\r\n".join([*parts, b"--XX--\r\n"])
        return self.ask(
            "/gradio_api/upload", "POST", body, {"Content-Type": "multipart/form-data; boundary=XX"}
        )


@pytest.fixture
def stranger(strangers: Server) -> Stranger:
    one = Stranger(strangers)
    assert one.ask("/config").status == 200
    return one


@pytest.fixture(scope="module")
def locked(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    login = f"me:{PASSWORD}"
    with serving(tmp_path_factory.mktemp("locked"), "--auth", login, OMP_NUM_THREADS="1") as server:
        yield server


@dataclass(frozen=True)
class Painted:
    """A picture, by a client of the API: the client's cookies, and the picture's name below the outputs."""

    cookies: dict[str, str]
    name: str


@pytest.fixture(scope="module")
def painted(strangers: Server, tmp_path_factory: pytest.TempPathFactory) -> Painted:
    client = connected(strangers, tmp_path_factory.mktemp("client"))
    (files,) = [files for files, _ in client.submit(**QUICK, api_name="/sd15") if files]
    file = next(each for each in strangers.pictures if each.name == Path(files[0]).name)
    return Painted(dict(client.cookies), f"{file.parent.name}/{file.name}")


@contextmanager
def listening() -> Generator[tuple[str, list[str]]]:
    """A server on this machine that nobody should be made to ask → its address, and what it was asked."""
    asked: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            self.send_error(404)

        def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 (named so by the base class)
            """Say nothing."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", asked
    finally:
        server.shutdown()


def png(width: int = 8, height: int = 8) -> bytes:
    """A PNG of one grey; of thousands of millions of pixels it takes some hundred bytes."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return len(data).to_bytes(4) + kind + data + zlib.crc32(kind + data).to_bytes(4)

    size = width.to_bytes(4) + height.to_bytes(4) + bytes([1, 0, 0, 0, 0])
    rows = zlib.compress(bytes(1 + (width + 7) // 8) * min(height, 100))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", size) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


# ---- files by their address: CVE-2023-51449, CVE-2024-1561, CVE-2026-28414


def test_no_file_of_the_machine_is_served(stranger: Stranger) -> None:
    home = stranger.server.home
    for file in ("/etc/passwd", str(home / "history.sqlite"), "/proc/self/environ", "app.py"):
        up = "../" * 12 + file.lstrip("/")
        for path in (
            file, quote(file), quote(file, safe=""), quote(quote(file, safe=""), safe=""), f"/{file}",
            up, up.replace("..", "%2e%2e"), up.replace("..", "%252e%252e"), up.replace("/", "%2f"),
            up.replace("/", "%5c"), up.replace("/", "\\"), f"{file}%00", f"{file}%00.png", f"./{file}",
            f"{home}/outputs/{up}", f"{home}/outputs/%2e%2e/history.sqlite", f"file://{file}", f"//a{file}",
            f"C:{file}", f"C:%5c{file}", f"%5c%5clocalhost%5c{file}", f"%5c/{file}", f"{file}::$DATA",
        ):  # fmt: skip
            nothing_is_served(stranger, f"/gradio_api/file={path}")


@pytest.mark.parametrize(
    "place",
    [
        "/gradio_api/file/", "/file=", "/file/", "/pictures/", "/thumbnails/", "/assets/", "/static/",
        "/svelte/", "/static/triptych/", "/gradio_api/custom_component/a/client/b/",
    ],
)  # fmt: skip
def test_nor_from_anywhere_else(stranger: Stranger, place: str) -> None:
    up = "../" * 12 + "etc/passwd"
    for path in (
        "/etc/passwd",
        up,
        up.replace("..", "%2e%2e"),
        up.replace("/", "%2f"),
        up.replace("/", "%5c"),
    ):
        nothing_is_served(stranger, place + path)


def nothing_is_served(stranger: Stranger, path: str) -> None:
    answer = stranger.ask(path)
    assert answer.status in (400, 404), path
    assert b"root:" not in answer.content
    assert not answer.content.startswith(b"SQLite")


# ---- files that a call names: CVE-2024-1728


def test_no_event_reads_a_file_of_the_machine(stranger: Stranger) -> None:
    """As the one behind the upload button did; at every event of the page, shown or not."""
    for event in stranger.events:
        for shape in ({"path": "/etc/passwd", **FILE}, [{"image": {"path": "/etc/passwd", **FILE}}]):
            data = [shape] * len(event["inputs"] or [0])
            not_a_file_of_theirs(stranger.join(event["id"], data))


@pytest.mark.parametrize("path", ["/etc/passwd", "history.sqlite", "C:\\Windows\\win.ini", "\\\\host\\share"])
def test_no_endpoint_reads_a_file_of_the_machine(stranger: Stranger, path: str) -> None:
    path = str(stranger.server.home / path) if path == "history.sqlite" else path
    for shape in (
        {"path": path},
        {"path": path, **FILE},
        [{"image": {"path": path, **FILE}, "caption": None}],
    ):
        for name in ("stable_cascade", "sd15", "sd3", "plan"):
            not_a_file_of_theirs(stranger.ask(f"/gradio_api/call/{name}", "POST", {"data": [shape]}))
            not_a_file_of_theirs(stranger.ask(f"/gradio_api/call/v2/{name}", "POST", {"images": shape}))


def not_a_file_of_theirs(answer: Answer) -> None:
    assert answer.status == 400
    assert "is no file that you uploaded here" in answer.text


def test_no_call_takes_a_path_for_a_picture(strangers: Server, tmp_path: Path) -> None:
    client = connected(strangers, tmp_path)
    for value in ("/etc/passwd", str(strangers.home / "history.sqlite"), "file:///etc/passwd"):
        with pytest.raises(AppError, match="it can be an uploaded file or a data URL"):
            client.predict(prompt="a red house", images=[value], api_name="/stable_cascade")


# ---- other pages and other names: #13594, and DNS rebinding


@pytest.mark.parametrize("origin", ["https://evil.test", "null", "http://localhost:1"])
@pytest.mark.parametrize("host", [{}, {"Host": "10.1.2.3"}])
def test_pages_of_other_sites_cannot_use_the_server(
    stranger: Stranger, origin: str, host: dict[str, str]
) -> None:
    headers = {"Origin": origin, "Access-Control-Request-Method": "POST", **host}
    for path in ("/gradio_api/queue/join", "/gradio_api/upload", "/gradio_api/cancel", "/config", "/"):
        for method in ("GET", "POST", "OPTIONS"):
            answer = stranger.ask(path, method, {} if method == "POST" else None, headers)
            assert answer.status == 403
            assert not [name for name in answer.headers if name.startswith("access-control")]


@pytest.mark.parametrize(
    "host", ["evil.test", "evil.test:7860", "localhost.evil.test", "127.0.0.1.evil.test"]
)
def test_other_names_do_not_lead_here(stranger: Stranger, host: str) -> None:
    for headers in ({"Host": host}, {"Host": host, "Origin": f"http://{host}"}, {"X-Forwarded-Host": host}):
        for path in ("/", "/config", "/gradio_api/info"):
            assert stranger.ask(path, headers=headers).status == 400


# ---- redirects: CVE-2024-4940, CVE-2026-28415, #13593


def test_nobody_is_sent_elsewhere(stranger: Stranger, locked: Server) -> None:
    inside = Stranger(locked)
    for one in (stranger, inside):
        for path in (
            "//evil.test", "//evil.test/", "/%2f%2fevil.test", "/\\evil.test", "/%5cevil.test/",
            "/login/huggingface?_target_url=https://evil.test", "/login/callback?_target_url=https://evil.test",
            "/?_target_url=https://evil.test", "/config/?next=//evil.test", "/file=https://evil.test",
            "/gradio_api/file=https://evil.test", "/gradio_api/file=//evil.test", "/monitoring/x",
            "/gradio_api/file/https://evil.test/a", "/gradio_api/proxy=https://evil.hf.space/",
            "/logout?_target_url=https://evil.test",
        ):  # fmt: skip
            if one is inside:
                assert one.get_in().status == 200
            to = one.ask(path).headers.get("location", one.server.url)
            assert to.rstrip("/") == one.server.url.rstrip("/"), path


# ---- what the server could be made to fetch: CVE-2026-28416, #13436


def test_the_server_fetches_nothing_for_strangers(stranger: Stranger, tmp_path: Path) -> None:
    client = connected(stranger.server, tmp_path)
    with listening() as (address, asked):
        for url in (f"{address}/a.svg", f"{address}/a.wav".replace("127.0.0.1", "localhost")):
            for route in ("file=", "proxy=", "file/"):
                assert stranger.ask(f"/gradio_api/{route}{url}").status == 404
            for file in ({"path": url}, {"path": url, "url": url}, {"path": "", "url": url}):
                body = {"data": ["a red house", [{**file, **FILE}]]}
                answer = stranger.ask("/gradio_api/call/stable_cascade", "POST", body)
                if answer.status == 200:  # no file at all: the endpoint says so
                    event = json.loads(answer.text)["event_id"]
                    assert "event: error" in stranger.ask(f"/gradio_api/call/stable_cascade/{event}").text
                else:
                    not_a_file_of_theirs(answer)
            with pytest.raises(AppError, match="it can be an uploaded file or a data URL"):
                client.predict(prompt="a red house", images=[url], api_name="/stable_cascade")
            with pytest.raises(AppError, match="on this public server it can be demo"):
                client.predict(prompt="a red house", checkpoint=url, api_name="/sd15")
        config = stranger.ask("/config", headers={"X-Gradio-Server": address})
        assert address not in config.text
    assert asked == []


# ---- routes: CVE-2026-27167, GHSA-j36p-7w88-g82j, and what there is besides


def test_hidden_routes_are_not_there(stranger: Stranger) -> None:
    listing = {"component_id": 1, "fn_name": "ls", "session_hash": "a", "data": ["../../etc"]}
    for path in (
        "/login/huggingface", "/login/callback", "/oauth/huggingface", "/gradio_api/component_server",
        "/gradio_api/component_server/", "/docs", "/redoc", "/openapi.json", "/gradio_api/openapi.json",
        "/monitoring", "/monitoring/summary", "/monitoring/x/dashboard", "/gradio_api/run/sd15",
        "/gradio_api/api/sd15", "/run/sd15", "/api/sd15", "/gradio_api/vibe-edit", "/gradio_api/vibe-code",
        "/gradio_api/undo-vibe-edit", "/gradio_api/vibe-starter-queries/", "/gradio_api/dev/reload",
        "/gradio_api/deep_link?session_hash=a", "/gradio_api/token", "/gradio_api/process_recording",
        "/gradio_api/stream/a", "/gradio_api/stream/a/close", "/gradio_api/queue/status", "/login",
        "/gradio_api/profiling/summary", "/gradio_api/runs", "/gradio_api/run-history/buckets",
        "/gradio_api/mcp/", "/gradio_api/mcp/sse",
    ):  # fmt: skip
        assert stranger.ask(path).status == 404, path
        assert stranger.ask(path, "POST", listing).status == 404, path


def test_events_of_the_page_are_no_endpoints(stranger: Stranger) -> None:
    private = [event["api_name"] for event in stranger.events if event["api_visibility"] == "private"]
    hidden = {name for name in private if name}
    assert len(hidden) > 5
    for name in hidden:
        for way in ("call", "call/v2", "run"):
            assert stranger.ask(f"/gradio_api/{way}/{name}", "POST", {"data": []}).status == 404


# ---- pictures, uploads and pages of others


def others(server: Server) -> list[Stranger]:
    """One with a cookie of their own, one without, one with one that is made up."""
    known = Stranger(server)
    known.ask("/config")
    return [known, Stranger(server), Stranger(server, {"triptych-session": "x" * 43})]


def test_pictures_are_seen_by_their_makers_only(strangers: Server, painted: Painted) -> None:
    maker, file = Stranger(strangers, dict(painted.cookies)), strangers.home / "outputs" / painted.name
    for path in (f"/pictures/{painted.name}", f"/gradio_api/file={file}", f"/thumbnails/{painted.name}"):
        answer = maker.ask(path)
        assert answer.status == 200
        assert answer.content == file.read_bytes() or path.startswith("/thumbnails/")
        for other in others(strangers):
            assert other.ask(path).status == 404


def test_uploads_are_used_by_their_owners_only(stranger: Stranger) -> None:
    (path,) = json.loads(stranger.upload(("mine.png", png())).text)
    assert stranger.ask(f"/gradio_api/file={path}").content == png()
    for other in others(stranger.server):
        assert other.ask(f"/gradio_api/file={path}").status == 404
        not_a_file_of_theirs(other.join(0, [[{"image": {"path": path, **FILE}}]]))
        # nor does anybody come to have it by having its path said
        assert other.plan(f'"path":"{path}"').status == 200
        assert "process_completed" in other.heard()
        assert other.ask(f"/gradio_api/file={path}").status == 404


def test_pages_are_heard_and_stopped_by_their_visitors_only(stranger: Stranger) -> None:
    assert stranger.plan("a red house").status == 200
    for other in others(stranger.server):
        other.ask("/config")
        for path in ("queue/data?session_hash=", "heartbeat/", "call/plan/"):
            assert other.ask(f"/gradio_api/{path}{stranger.tab}").status == 404
        stop = {"session_hash": stranger.tab, "fn_index": 0, "event_id": "1"}
        assert other.ask("/gradio_api/cancel", "POST", stop).status == 404
        other.tab = stranger.tab
        assert other.plan("a red house").status == 404
    assert "process_completed" in stranger.heard()


# ---- what comes in


def test_only_pictures_come_in_and_nothing_else_stays(stranger: Stranger) -> None:
    (temporary,) = (stranger.server.log.parent / "tmp").glob("triptych-*")
    before = set(temporary.rglob("*"))
    for name, content in (
        ("page.png", b"<html><script>alert(1)</script></html>"), ("a.svg", b"<svg onload='alert(1)'/>"),
        ("moving.gif", b"GIF89a" + bytes(99)), ("empty.png", b""), ("shell.png", b"#!/bin/sh\nid\n" * 9),
    ):  # fmt: skip
        for files in ([(name, content)], [("fine.png", png(9, 9)), (name, content)]):
            answer = stranger.upload(*files)
            assert (answer.status, answer.text) == (415, "Only PNG, JPEG and WebP pictures can be uploaded.")
    assert stranger.upload(("large.png", png() + bytes(21 << 20))).status == 413
    assert stranger.upload(*[("a.png", png())] * 9).status == 413
    assert stranger.upload(("../../../evil.png", png())).status == 200
    assert stranger.ask("/gradio_api/queue/join", "POST", b"x" * (40 << 20)).status == 413
    left = [file for file in set(temporary.rglob("*")) - before if file.is_file()]
    assert [file.name for file in left] == ["evil.png"]


def test_of_an_upload_that_breaks_off_nothing_stays(stranger: Stranger) -> None:
    (temporary,) = (stranger.server.log.parent / "tmp").glob("triptych-*")
    before = set(temporary.rglob("*"))
    place = urlsplit(stranger.server.url)
    head = [
        "POST /gradio_api/upload HTTP/1.1", f"Host: {place.netloc}", "Content-Length: 10000000",
        f"Cookie: triptych-session={stranger.cookies['triptych-session']}",
        "Content-Type: multipart/form-data; boundary=XX", "", "--XX",
        'Content-Disposition: form-data; name="files"; filename="a.png"', "", "",
    ]  # fmt: skip
    with socket.create_connection((place.hostname or "", place.port or 0)) as line:
        line.sendall("\r\n".join(head).encode() + png() + bytes(1 << 20))
        while not set(temporary.rglob("*")) - before:  # it has begun to come in
            time.sleep(0.02)
    while set(temporary.rglob("*")) - before:
        time.sleep(0.02)


def test_tiny_files_that_unpack_to_millions_of_pixels(strangers: Server, tmp_path: Path) -> None:
    client = connected(strangers, tmp_path)
    bomb = tmp_path / "bomb.png"
    bomb.write_bytes(png(60_000, 60_000))
    assert bomb.stat().st_size < 2000
    address = "data:image/png;base64," + base64.b64encode(bomb.read_bytes()).decode()
    for image in (handle_file(bomb), address):
        with pytest.raises(AppError, match="which is too large: it can be up to 64 million pixels"):
            client.predict(prompt="a red house", images=[image], api_name="/stable_cascade")


def test_calls_that_make_no_sense_are_told_so_and_nothing_more(stranger: Stranger) -> None:
    event = {"data": [], "fn_index": 0, "session_hash": stranger.tab}
    bodies: list[Any] = [
        b"", b"{", b"null", b"[]", b"\xff\xfe\0", b"[" * 50_000, b'{"data":' * 50_000, {}, {"data": []},
        event | {"data": None}, {"fn_index": 0, "session_hash": stranger.tab}, event | {"fn_index": 99999},
        event | {"fn_index": "x"}, event | {"fn_index": -1}, {"data": [], "fn_index": 0},
        event | {"batched": True}, event | {"session_hash": ["b"]}, event | {"session_hash": "../b"},
        event | {"data": [1] * 500},
    ]  # fmt: skip
    for route in ("queue/join", "call/sd15", "call/v2/sd15", "cancel", "reset", "upload"):
        for body in bodies:
            tells_nothing(stranger.ask(f"/gradio_api/{route}", "POST", body).text)
    for data in ([], [1] * 99, [{"a": 1}], ["sd15"], [None, None]):
        call = json.loads(stranger.ask("/gradio_api/call/plan", "POST", {"data": data}).text)["event_id"]
        told = stranger.ask(f"/gradio_api/call/plan/{call}").text
        assert "event: error" in told
        tells_nothing(told)


def tells_nothing(text: str) -> None:
    for word in INSIDE:
        assert word not in text


# ---- logins


def test_without_a_login_there_is_nothing_but_the_form(locked: Server) -> None:
    one = Stranger(locked)
    page = one.ask("/")
    assert page.status == 200
    assert '<form method="post" action="login">' in page.text
    for secret in ("gradio_config", "gradio_api_info", "sd15"):
        assert secret not in page.text
    for path in (
        "/config", "/openapi.json", "/gradio_api/openapi.json", "/gradio_api/info", "/gradio_api/heartbeat/a",
        "/monitoring", "/monitoring/summary", "/gradio_api/app_id", "/gradio_api/user", "/gradio_api/token",
        "/gradio_api/queue/data?session_hash=a", "/gradio_api/queue/status", "/theme.css", "/assets/index.js",
        "/gradio_api/file=/etc/passwd", "/pictures/2026-01-01/a.png", "/nowhere", "/logout",
    ):  # fmt: skip
        assert one.ask(path).status == 401, path
    for path in ("queue/join", "cancel", "reset", "upload", "call/sd15", "run/sd15", "component_server"):
        assert one.ask(f"/gradio_api/{path}", "POST", {"data": [], "session_hash": "a"}).status == 401
    assert one.get_in().status == 200
    assert one.ask("/config").status == 200


def test_passwords_are_not_guessed(locked: Server) -> None:
    one = Stranger(locked)
    one.get_in()  # forgets what was tried before
    answers = [one.get_in(f"guess {number}") for number in range(30)]
    assert [answer.status for answer in answers].count(400) <= 6  # a slow machine may get one more
    refused = answers[-1]
    assert refused.status == 429
    assert 1 <= int(refused.headers["retry-after"]) <= 5
    wait = one.get_in()
    while wait.status == 429:
        time.sleep(int(wait.headers["retry-after"]))
        wait = one.get_in()
    assert wait.status == 200


# ---- answers


def test_answers_hold_browsers_back_and_tell_nothing(stranger: Stranger, locked: Server) -> None:
    for one in (stranger, Stranger(locked)):
        for path in (
            "/",
            "/config",
            "/nowhere",
            "/gradio_api/info",
            "/theme.css",
            "/gradio_api/file=/etc/passwd",
        ):
            headers = one.ask(path).headers
            assert "server" not in headers
            assert headers["x-content-type-options"] == "nosniff"
            assert headers["x-frame-options"] == "DENY"
            assert "frame-ancestors 'none'" in headers["content-security-policy"]
            assert "http" not in headers["content-security-policy"]


def test_the_page_keeps_its_policy_and_asks_nobody_else(
    browser: Browser, strangers: Server, tmp_path: Path
) -> None:
    Image.new("RGB", (8, 8), "red").save(tmp_path / "red.png")
    page, asked, said = browser.new_page(), set[str](), list[str]()
    page.on("request", lambda request: asked.add(urlsplit(request.url).netloc))
    page.on("console", lambda message: said.append(message.text))
    page.set_default_timeout(PATIENCE)
    page.goto(strangers.url)
    panel = open_tab(page, "Stable Cascade")
    panel.locator("input[type=file]").first.set_input_files(tmp_path / "red.png")
    expect(panel.locator(".image-prompts img").first).to_be_visible()
    page.close()
    assert asked - {""} == {urlsplit(strangers.url).netloc}  # no name: an address that holds its data
    assert not [text for text in said if "Content Security Policy" in text or "Failed to load" in text]


def test_nothing_leaves_the_page_for_another_site(browser: Browser, locked: Server) -> None:
    page = browser.new_page()
    page.goto(locked.url)
    with listening() as (address, asked):
        held_back = "address => fetch(address).then(() => false, () => true)"
        assert page.evaluate(held_back, address)
        assert page.evaluate(held_back, address.replace("127.0.0.1", "localhost"))
    assert asked == []
    page.close()


def test_signing_in_with_a_browser(browser: Browser, locked: Server) -> None:
    page = browser.new_page()
    page.goto(locked.url)
    page.get_by_label("User").fill("me")
    page.get_by_label("Password").fill("wrong")
    page.get_by_role("button", name="Sign in").click()
    expect(page.get_by_role("alert")).to_have_text("User or password is wrong.")
    page.get_by_label("User").fill("me")
    page.get_by_label("Password").fill(PASSWORD)
    page.keyboard.press("Enter")
    page.locator(".plan .bars").wait_for(timeout=PATIENCE)
    page.goto(f"{locked.url}logout")
    expect(page.get_by_label("Password")).to_be_visible()
    page.close()
