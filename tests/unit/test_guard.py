"""Who reaches Gradio, and with what every answer leaves."""

from __future__ import annotations

import asyncio
import base64
import socket
from pathlib import Path
from typing import Any

import pytest

from tests.guarded import OURS, Answer, Server, server
from ui import i18n
from ui.guard.front import Guard
from ui.guard.signin import FREE, PAUSE, Tries

FIXTURES = (server,)  # found here by pytest

# ---- names


@pytest.mark.parametrize(
    "host",
    [
        "localhost:7860", "LOCALHOST", "localhost.:80", "127.0.0.1:7860", "192.168.1.5:7860", "[::1]:7860",
        "[fe80::1]", socket.gethostname(), "studio.test",
    ],
)  # fmt: skip
def test_the_server_answers_to_its_own_names(server: Server, host: str) -> None:
    server.guard.rules.names._local.add("studio.test")
    assert server.reaches("/", headers={"host": host})


@pytest.mark.parametrize(
    "host",
    [
        "evil.test", "evil.test:7860", "localhost.evil.test", "127.0.0.1.evil.test", "0x7f.1", "2130706433",
        "", "local host", "localhost:port", "localhost@evil.test", "[evil]", "abc.gradio.live", "me.hf.space",
    ],
)  # fmt: skip
def test_other_names_are_refused(server: Server, host: str) -> None:
    answer = server.ask("/", headers={"host": host})
    assert answer.status == 400
    assert "does not go by the name" in answer.content.decode()
    assert server.gradio.asked == []


def test_the_share_link_is_a_name_as_soon_as_it_is_known(tmp_path: Path) -> None:
    link: list[str | None] = [None]
    server = Server(tmp_path, {"share_url": lambda: link[0]}, {"share": True})
    assert not server.reaches("/", headers={"host": "abc.gradio.live"})
    link[0] = "https://abc.gradio.live"
    assert server.reaches("/", headers={"host": "abc.gradio.live"})
    assert not server.reaches("/", headers={"host": "def.gradio.live"})


def test_further_names_can_be_given(tmp_path: Path) -> None:
    server = Server(tmp_path, {"hosts": ["Studio.Example.org"]})
    assert server.reaches("/", headers={"host": "studio.example.org"})
    # a proxy may call the server otherwise, and not say so
    assert server.reaches("/config", headers={"origin": "https://studio.example.org"})
    assert server.ask("/config", headers={"origin": "https://studio.example.com"}).status == 403


def test_a_space_goes_by_its_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPACE_ID", "me/triptych")
    monkeypatch.setenv("SPACE_HOST", "me-triptych.hf.space")
    server = Server(tmp_path)
    for host in ("me-triptych.hf.space", "other-name.hf.space", "10.0.0.3:7860"):
        assert server.reaches("/", headers={"host": host})
    assert not server.reaches("/", headers={"host": "evil.test"})
    # a proxy of the Space may go by any name, which then does not count
    assert server.reaches("/", headers={"host": "me-triptych.hf.space", "x-forwarded-host": "inner.test"})
    assert "x-forwarded-host" not in server.gradio.asked[-1][1]


@pytest.mark.parametrize(
    ("peer", "believed"),
    [(("127.0.0.1", 9), True), (("::1", 9), True), (("10.0.0.9", 0), True), (("10.0.0.9", 9), False)],
)
def test_only_a_proxy_on_this_machine_is_believed(
    tmp_path: Path, peer: tuple[str, int], believed: bool
) -> None:
    server = Server(tmp_path, settings={"host": "studio.test"})
    told = {"x-forwarded-host": "studio.test", "x-forwarded-proto": "https", "origin": "https://studio.test"}
    assert server.reaches("/", headers=told, peer=peer) == believed
    del told["origin"]
    assert server.reaches("/", headers=told, peer=peer)
    assert ("x-forwarded-host" in server.gradio.asked[-1][1]) == believed
    assert ("x-forwarded-proto" in server.gradio.asked[-1][1]) == believed
    answer = server.ask("/", headers=told, peer=peer, cookie="")
    assert ("Secure" in answer.cookies[0]) == believed
    # rebinding by way of a proxy that passes everything on
    told["x-forwarded-host"] = "evil.test"
    assert server.reaches("/", headers=told, peer=peer) != believed


# ---- origins


@pytest.mark.parametrize(
    "origin",
    [
        "https://evil.test", "null", "", "http://localhost:3000", "http://127.0.0.1:7860", "file://",
        "http://localhost:7860.evil.test", "http://localhost", "chrome-extension://abc",
    ],
)  # fmt: skip
def test_pages_of_other_sites_get_nothing(server: Server, origin: str) -> None:
    for path in ("/", "/config", "/login", "/gradio_api/queue/join", "/gradio_api/upload"):
        for method in ("GET", "POST", "OPTIONS"):
            answer = server.ask(path, method, body=b"{}", headers={"origin": origin})
            assert answer.status == 403
            assert "access-control-allow-origin" not in answer.headers
            assert answer.cookies == []
    assert server.gradio.asked == []


@pytest.mark.parametrize(
    ("host", "origin"),
    [
        ("localhost:7860", "http://localhost:7860"),
        ("LocalHost:7860", "http://localhost:7860"),
        ("localhost", "https://localhost"),
        ("localhost:80", "http://localhost"),
        ("[::1]:7860", "http://[::1]:7860"),
    ],
)
def test_our_own_page_is_served(server: Server, host: str, origin: str) -> None:
    assert server.reaches("/config", headers={"host": host, "origin": origin})
    assert "origin" not in server.gradio.asked[-1][1]  # Gradio would only repeat it


@pytest.mark.parametrize("site", ["cross-site", "same-site", "made-up"])
def test_other_sites_can_link_here_and_nothing_else(server: Server, site: str) -> None:
    link = {"sec-fetch-site": site, "sec-fetch-mode": "navigate", "sec-fetch-dest": "document"}
    assert server.reaches("/", headers=link)
    assert server.reaches("/?view=api", headers=link)
    assert server.ask("/logout", headers=link).status == 403
    assert server.ask("/", "POST", headers=link).status == 403
    assert server.ask("/", headers=link | {"sec-fetch-dest": "iframe"}).status == 403
    assert server.ask("/", headers=link | {"sec-fetch-mode": "no-cors"}).status == 403
    assert server.ask("/gradio_api/info", headers=link).status == 403
    for own in ("same-origin", "none"):
        assert server.reaches("/config", headers={"sec-fetch-site": own})


def test_a_space_may_be_framed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPACE_ID", "me/triptych")
    server = Server(tmp_path)
    frame = {"sec-fetch-site": "cross-site", "sec-fetch-mode": "navigate", "sec-fetch-dest": "iframe"}
    answer = server.ask("/", headers={"host": "me-triptych.hf.space", **frame}, cookie="")
    assert answer.status == 200
    assert "frame-ancestors 'self' https://huggingface.co" in answer.headers["content-security-policy"]
    assert "x-frame-options" not in answer.headers
    assert answer.cookies[0].endswith("; HttpOnly; SameSite=None; Secure; Partitioned")


# ---- routes


@pytest.mark.parametrize(
    "path",
    [
        "/", "/config", "/config/", "/theme.css", "/gradio_api/theme.css", "/favicon.ico", "/manifest.json",
        "/pwa_icon", "/logout", "/assets/index-DphvyggB.js", "/static/js/iframeResizer.js", "/svelte/a.js",
        "/gradio_api/info", "/gradio_api/app_id", "/gradio_api/user", "/gradio_api/login_check",
        "/gradio_api/startup-events", "/gradio_api/heartbeat/abc123", "/gradio_api/upload_progress",
        "/gradio_api/queue/data", "/gradio_api/call/sd15/0123abcd", "/gradio_api/call/v2/sd15/0123abcd",
    ],
)  # fmt: skip
def test_what_the_page_and_its_clients_need_is_there(server: Server, path: str) -> None:
    assert server.reaches(path)
    assert server.reaches(path, "HEAD")
    assert not server.reaches(path, "POST", body=b"{}")
    assert not server.reaches(path, "DELETE")


@pytest.mark.parametrize(
    "path",
    [
        "/docs", "/redoc", "/openapi.json", "/gradio_api/openapi.json", "/gradio_api/proxy=https://a.hf.space",
        "/gradio_api/file/etc/passwd", "/file=/etc/passwd", "/file/etc/passwd", "/gradio_api/run/sd15",
        "/gradio_api/api/sd15", "/run/sd15", "/gradio_api/vibe-code", "/gradio_api/vibe-edit/",
        "/gradio_api/dev/reload", "/monitoring", "/monitoring/summary", "/monitoring/key",
        "/gradio_api/deep_link", "/gradio_api/token", "/gradio_api/process_recording", "/gradio_api/runs",
        "/gradio_api/stream/abc", "/gradio_api/stream/abc/1/2/playlist.m3u8", "/gradio_api/queue/status",
        "/gradio_api/custom_component/a/client/b/c", "/gradio_api/component_server",
        "/gradio_api/profiling/traces", "/gradio_api/mcp", "/gradio_api/mcp/sse", "/pwa_icon/100000",
        "/login/huggingface", "/login/callback", "/oauth/huggingface", "/assets/", "/assets/../app.py",
        "/assets/a/../../app.py", "/assets//etc/passwd", "/assets/a\\..\\b", "/assets/.hidden", "//evil.test",
        "/\\evil.test", "/gradio_api//file=/etc/passwd", "/gradio_api/file=", "/%2e%2e", "/assets/a\0b",
        "/gradio_api/queue/data/", "/gradio_api/heartbeat/a/b", "/GRADIO_API/info", "/pictures",
    ],
)  # fmt: skip
def test_nothing_else_is_there(server: Server, path: str) -> None:
    for method in ("GET", "POST", "PUT", "OPTIONS"):
        assert server.ask(path, method, body=b"{}", headers=OURS).status == 404
    assert server.gradio.asked == []


def test_tools_are_there_where_they_are_wanted(server: Server) -> None:
    message = b'{"jsonrpc": "2.0", "id": 1, "method": "tools/list"}'
    server.guard.rules.mcp = True
    assert server.reaches("/gradio_api/mcp/sse")
    assert server.reaches("/gradio_api/mcp/", "POST", body=message)
    assert server.gradio.asked[-1][2] == message
    assert server.reaches("/gradio_api/mcp/", "DELETE")
    assert not server.reaches("/gradio_api/mcp/../info")
    assert server.reaches("/gradio_api/mcp/", "POST", body=b"[" + message + b"]")
    theirs = b'{"params": {"arguments": {"images": [{"path": "/etc/passwd"}]}}}'
    assert not server.reaches("/gradio_api/mcp/", "POST", body=theirs)


def test_robots_are_sent_away(server: Server) -> None:
    assert server.ask("/robots.txt").content == b"User-agent: *\nDisallow: /\n"


# ---- logins


@pytest.fixture
def locked(server: Server) -> Server:
    server.gradio.auth = {"me": "secret"}
    server.gradio.tokens = {"token": "me"}
    server.gradio.answers = {"/login": (400, b'{"detail": "Incorrect credentials."}')}
    return server


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("GET", "/config"), ("GET", "/gradio_api/info"), ("GET", "/gradio_api/heartbeat/abc"),
        ("GET", "/assets/index.js"), ("GET", "/gradio_api/app_id"), ("GET", "/gradio_api/queue/data"),
        ("GET", "/logout"), ("GET", "/openapi.json"), ("GET", "/theme.css"), ("GET", "/monitoring"),
        ("GET", "/pictures/2026-01-01/a.png"), ("GET", "/gradio_api/file=/etc/passwd"), ("GET", "/login"),
        ("POST", "/gradio_api/queue/join"), ("POST", "/gradio_api/cancel"), ("POST", "/gradio_api/reset"),
        ("POST", "/gradio_api/upload"), ("POST", "/gradio_api/call/sd15"), ("POST", "/"),
    ],
)  # fmt: skip
def test_without_a_login_there_is_only_the_form(locked: Server, method: str, path: str) -> None:
    for token in ("", "wrong", "None"):
        headers = {"cookie": f"access-token-id={token}; access-token-unsecure-id={token}"}
        answer = locked.ask(path, method, headers=headers, body=b"{}")
        assert answer.status == 401
    assert locked.gradio.asked == []
    page = locked.ask("/")
    assert page.status == 200
    assert b'<form method="post" action="login">' in page.content
    assert b"gradio" not in page.content


@pytest.mark.parametrize("name", ["access-token-id", "access-token-unsecure-id"])
def test_with_a_login_all_is_there(locked: Server, name: str) -> None:
    assert locked.reaches("/", headers={"cookie": f"{name}=token"})
    assert locked.reaches("/config", headers={"cookie": f"{name}=token"})


def test_what_needs_no_login(locked: Server) -> None:
    for path in (
        "/favicon.ico",
        "/manifest.json",
        "/static/triptych/icon-192.png",
        "/gradio_api/startup-events",
    ):
        assert locked.reaches(path)


def test_clients_sign_in_as_with_gradio(locked: Server) -> None:
    answer = locked.ask("/login", "POST", body=b"username=me&password=wrong")
    assert (answer.status, answer.detail) == (400, "Incorrect credentials.")
    assert locked.gradio.asked[-1][2] == b"username=me&password=wrong"
    locked.gradio.answers["/login"] = (200, b'{"success":true}')
    answer = locked.ask("/login", "POST", body=b"username=me&password=secret")
    assert (answer.status, answer.content) == (200, b'{"success":true}')


def test_browsers_get_the_page_back(locked: Server) -> None:
    browser = OURS | {"accept": "text/html,*/*", "accept-language": "de"}
    answer = locked.ask("/login", "POST", body=b"username=me&password=wrong", headers=browser)
    assert answer.status == 401
    wrong = i18n.tongue("de")("User or password is wrong.")
    assert f'<p role="alert">{wrong}</p>'.encode() in answer.content
    assert b'<html lang="de" dir="ltr">' in answer.content
    locked.gradio.answers["/login"] = (200, b'{"success":true}')
    answer = locked.ask("/login", "POST", body=b"username=me&password=secret", headers=browser)
    assert (answer.status, answer.headers["location"]) == (303, "./")


def test_guessing_is_slowed_down_and_the_right_password_gets_in(
    locked: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [1000.0]
    monkeypatch.setattr(locked.guard.rules.tries, "_now", lambda: now[0])

    def guess(**how: Any) -> Answer:
        return locked.ask("/login", "POST", body=b"username=me&password=x", **how)

    assert [guess().status for _ in range(FREE + 3)] == [400] * FREE + [429] * 3
    assert len(locked.gradio.asked) == FREE
    refused = guess()
    assert refused.headers["retry-after"] == f"{PAUSE:.0f}"
    assert refused.detail == f"Too many tries. Try again in {PAUSE:.0f} seconds."
    assert b"Too many tries" in guess(headers={"accept": "text/html"}).content
    assert guess(peer=("192.168.1.9", 5)).status == 400  # others are not held up
    now[0] += PAUSE
    assert [guess().status for _ in range(2)] == [400, 429]
    now[0] += PAUSE
    locked.gradio.answers["/login"] = (200, b'{"success":true}')
    assert [guess().status for _ in range(3)] == [200] * 3  # and are free again


def test_a_minute_of_guesses_from_everywhere() -> None:
    now = [0.0]
    tries = Tries(lambda: now[0])
    tries.begin("10.9.9.9")
    tries.succeed("10.9.9.9")
    let = 0
    for step in range(600):
        now[0] = step / 10
        let += tries.begin(f"10.0.{step // 250}.{step % 250}") == 0
    assert let <= 60
    assert tries.begin("10.9.9.9") == 0  # who has been in before is not held up by them
    now[0] += 61
    assert tries.begin("10.0.0.1") == 0


def test_one_who_has_many_addresses_is_one() -> None:
    tries = Tries(lambda: 0.0)
    let = [tries.begin(f"2001:db8:1:2::{number:x}") == 0 for number in range(10)]
    assert let == [True] * FREE + [False] * 5
    assert tries.begin("2001:db8:1:3::1") == 0


def test_programs_may_bring_user_and_password_along(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path))
    server = Server(tmp_path, settings={"auth": "me:a:b", "mcp": True})
    server.gradio.auth = {"me": "a:b"}

    def bring(told: str, path: str = "/gradio_api/mcp/") -> int:
        basic = base64.b64encode(told.encode()).decode()
        return server.ask(path, headers={"authorization": f"Basic {basic}"}).status

    assert bring("me:a:b") == 200
    assert bring("me:a:b", "/config") == 401  # only for those
    wrong = ["me:a", "me", "", "me:a:b\n", "you:a:b"]
    assert [bring(told) for told in wrong] == [401] * FREE
    assert bring("me:a:b") == 429


def test_what_is_remembered_of_tries_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ui.guard.signin.MOST_ADDRESSES", 10)
    now = [0.0]
    tries = Tries(lambda: now[0])
    for number in range(100):
        now[0] += 10
        tries.begin(f"10.0.0.{number}")
        tries.succeed(f"10.0.1.{number}")
    assert (len(tries._of), len(tries._known)) == (10, 10)
    assert len(tries._all) < 10


def test_a_login_is_no_place_for_large_bodies(locked: Server) -> None:
    answer = locked.ask("/login", "POST", body=[b"x" * 4096] * 3)
    assert (answer.status, answer.detail) == (413, "The request is too large; it can be up to 8 kB.")


# ---- answers


@pytest.mark.parametrize("path", ["/", "/config", "/nowhere", "/assets/a.js", "/gradio_api/file=/etc/passwd"])
def test_every_answer_holds_browsers_back(server: Server, path: str) -> None:
    for host in ("localhost:7860", "evil.test"):
        headers = server.ask(path, headers={"host": host}).headers
        assert headers["x-content-type-options"] == "nosniff"
        assert headers["referrer-policy"] == "same-origin"
        assert headers["x-frame-options"] == "DENY"
        assert headers["cross-origin-resource-policy"] == "same-origin"
        assert "camera=()" in headers["permissions-policy"]
        policy = headers["content-security-policy"]
        assert "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval';" in policy
        assert "frame-ancestors 'none'" in policy
        assert "http" not in policy
        assert "server" not in headers
    kept = "public, max-age=86400" if path.startswith("/assets") else "no-store"
    assert server.ask(path).headers["cache-control"] == kept


def test_the_first_answer_brings_a_cookie(server: Server) -> None:
    cookies = {server.ask("/", cookie="").cookies[0] for _ in range(10)}
    assert len(cookies) == 10
    for cookie in cookies:
        value, rest = cookie.removeprefix("triptych-session=").split(";", 1)
        assert len(value) == 43
        assert rest == " Path=/; Max-Age=31536000; HttpOnly; SameSite=Lax"
        assert server.ask("/", cookie=value).cookies == []
    assert server.ask("/config", cookie="").cookies
    assert server.ask("/", cookie="too-short").cookies
    assert server.ask("/assets/a.js", cookie="").cookies == []  # it would come after the page's


def test_the_login_of_gradio_stays_on_this_site(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        headers = [(b"set-cookie", b"access-token-id=1; HttpOnly; SameSite=none; Secure")]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": b"gradio"})

    monkeypatch.setattr(server.guard, "_app", app)
    assert server.ask("/config").cookies == ["access-token-id=1; HttpOnly; SameSite=Lax; Secure"]
    server.guard.rules.names.hosted = True
    kept = ["access-token-id=1; HttpOnly; SameSite=none; Secure; Partitioned"]
    assert server.ask("/config").cookies == kept


def test_an_error_tells_nothing(server: Server, caplog: pytest.LogCaptureFixture) -> None:
    server.gradio.answers["/config"] = (200, b"broken")
    answer = server.ask("/config")
    assert answer.status == 500
    assert answer.detail == "Something went wrong inside Triptych; the server's log has the details."
    assert answer.headers["x-content-type-options"] == "nosniff"
    assert "/secret/path" in caplog.text


def test_streams_pass_piece_by_piece(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    sent: list[Any] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        for number in range(3):
            await send({"type": "http.response.body", "body": b"data: %d\n\n" % number, "more_body": True})
            assert sent[-1]["body"] == b"data: %d\n\n" % number  # it is on its way at once
        await send({"type": "http.response.body", "body": b""})

    monkeypatch.setattr(server.guard, "_app", app)

    async def receive() -> Any:
        return await asyncio.Future()

    async def send(message: Any) -> None:
        sent.append(message)

    scope = {
        "type": "http", "method": "GET", "path": "/gradio_api/queue/data", "query_string": b"session_hash=a",
        "headers": [(b"host", b"localhost")], "client": ("127.0.0.1", 5), "app": server.gradio,
    }  # fmt: skip
    asyncio.run(server.guard(scope, receive, send))
    assert [message.get("more_body", False) for message in sent] == [False, True, True, True, False]


def test_sockets_are_closed_and_the_guard_moves_to_the_front(server: Server) -> None:
    sent: list[Any] = []

    async def send(message: Any) -> None:
        sent.append(message)

    async def receive() -> Any:
        return {}

    asyncio.run(server.guard({"type": "websocket", "path": "/", "app": server.gradio}, receive, send))
    assert sent == [{"type": "websocket.close", "code": 1008}]
    first = object()
    server.gradio.middleware_stack = first
    for _ in range(2):
        asyncio.run(server.guard({"type": "lifespan", "app": server.gradio}, receive, send))
        moved = server.gradio.middleware_stack
        assert isinstance(moved, Guard)
        assert moved._app is first
        assert moved.rules is server.guard.rules
    assert [path for path, _, _ in server.gradio.asked] == ["lifespan"] * 2
