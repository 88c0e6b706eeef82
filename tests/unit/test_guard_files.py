"""Pictures, uploads and calls: what comes in, and who gets which file."""

from __future__ import annotations

import json
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from PIL import Image
from python_multipart.exceptions import MultipartParseError
from python_multipart.multipart import MultipartParser

from backend import Settings
from tests.guarded import (
    COOKIE,
    GIF,
    JPEG,
    OTHER,
    PNG,
    SESSION,
    SVG,
    WEBP,
    Answer,
    Server,
    public,
    server,
)
from ui.guard.bodies import FILE, FILES, FORM, MOST_MARKS, Parcel
from ui.guard.files import Uploads
from ui.i18n import ENGLISH

FIXTURES = (server, public)  # found here by pytest

# ---- pictures


def saved(server: Server, owner: str = "") -> str:
    path = server.gallery.save(Image.new("RGB", (64, 48), "red"), "", {"prompt": "a red house"}, owner)
    return path.relative_to(server.gallery.outputs).as_posix()


def test_pictures_are_shown_and_kept_by_the_browser(server: Server) -> None:
    name = saved(server)
    answer = server.ask(f"/pictures/{name}")
    assert (answer.status, answer.headers["content-type"]) == (200, "image/png")
    assert answer.content == (server.gallery.outputs / name).read_bytes()
    assert answer.headers["cache-control"] == "private, max-age=31536000, immutable"
    assert answer.headers["content-disposition"] == f'inline; filename="{name.split("/")[1]}"'
    assert server.ask(f"/pictures/{name}?download").headers["content-disposition"].startswith("attachment")
    head = server.ask(f"/pictures/{name}", "HEAD")
    assert (head.status, head.content) == (200, b"")
    part = server.ask(f"/pictures/{name}", headers={"range": "bytes=0-7"})
    assert (part.status, part.content) == (206, b"\x89PNG\r\n\x1a\n")


def test_pictures_are_shown_in_small(server: Server) -> None:
    answer = server.ask(f"/thumbnails/{saved(server)}")
    assert (answer.status, answer.headers["content-type"]) == (200, "image/webp")
    assert answer.headers["cache-control"] == "private, max-age=31536000, immutable"
    assert answer.content[8:12] == b"WEBP"


def test_results_of_the_api_are_the_same_pictures(server: Server, public: Server) -> None:
    for each in (server, public):
        name = saved(each, SESSION)
        file = each.gallery.outputs / name
        assert each.ask(f"/gradio_api/file={file}").content == file.read_bytes()
    assert public.ask(f"/gradio_api/file={file}", cookie=OTHER).status == 404


@pytest.mark.parametrize("kind", ["pictures", "thumbnails"])
def test_on_a_public_server_pictures_are_their_owners(public: Server, kind: str) -> None:
    mine, nobodys = saved(public, SESSION), saved(public)
    assert public.ask(f"/{kind}/{mine}").status == 200
    for cookie in (OTHER, "", "short", COOKIE[:-1]):
        assert public.ask(f"/{kind}/{mine}", cookie=cookie).status == 404
    assert public.ask(f"/{kind}/{nobodys}").status == 404
    public.gallery.delete(mine)
    assert public.ask(f"/{kind}/{mine}").status == 404


def test_at_home_all_share_the_library_but_pages_of_others_do_not(server: Server) -> None:
    name = saved(server)
    assert server.ask(f"/pictures/{name}", cookie=OTHER).status == 200
    assert server.ask(f"/pictures/{name}", cookie="").status == 404


def test_a_broken_index_shows_nobodys_pictures(public: Server, caplog: pytest.LogCaptureFixture) -> None:
    name = saved(public, SESSION)
    public.gallery.index.write_bytes(b"not a database" * 100)
    assert public.ask(f"/pictures/{name}").status == 404
    assert "nobody's picture is shown" in caplog.text


def test_only_what_is_a_picture_below_the_outputs_is_shown(server: Server, tmp_path: Path) -> None:
    name = saved(server)
    day, file = name.split("/")
    outputs = server.gallery.outputs
    secret = tmp_path / "secret.png"
    secret.write_bytes(PNG)
    (outputs / day / "link.png").symlink_to(secret)
    (outputs / day / "folder.png").mkdir()
    (outputs / "linked").symlink_to(tmp_path)
    (outputs / day / ".hidden.png").write_bytes(PNG)
    (outputs / day / "notes.txt").write_text("x")
    for path in (
        f"{day}/link.png", f"{day}/folder.png", "linked/secret.png", f"{day}/.hidden.png", f"{day}/notes.txt",
        f"{day}/../{name}", f"../outputs/{name}", f"./{name}", f"/{name}", f"{day}//{file}", file, f"{name}/",
        f"{day}\\{file}", f"{name}\0", f"{name}\n", f"{day}/missing.png", "../../secret.png", str(secret),
        f"{name}:stream", "C:/windows/win.png", f"{day}/%2e%2e/{name}", "x" * 300 + "/a.png",
    ):  # fmt: skip
        for kind in ("pictures", "thumbnails"):
            assert server.ask(f"/{kind}/{path}").status == 404, path
    assert server.ask(f"/pictures/{name}").status == 200


def test_a_home_behind_a_link_is_no_obstacle(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "home").symlink_to(tmp_path / "real")
    server = Server(tmp_path / "home")
    assert server.ask(f"/pictures/{saved(server)}").status == 200


# ---- files


@pytest.mark.parametrize(
    "path",
    [
        "/etc/passwd", "//etc/passwd", "/./etc/passwd", "../../etc/passwd", "%2e%2e/%2e%2e/etc/passwd",
        "%252e%252e%252fetc%252fpasswd", "..\\..\\etc\\passwd", "C:\\Windows\\win.ini", "C:/Windows/win.ini",
        "\\\\host\\share\\file", "//host/share/file", "\\/host/share", "file:///etc/passwd", "/etc/\0.png",
        "http://127.0.0.1:1/", "https://evil.test/a.png", "ftp://evil.test/a", "app.py", "/proc/self/environ",
        "~/.ssh/id_rsa", ".", "/", "", "\n", "data:image/png;base64,AAAA",
    ],
)  # fmt: skip
def test_no_spelling_of_a_file_gets_it(server: Server, path: str) -> None:
    saved(server)
    for prefix in ("", f"{server.gallery.outputs}/../../../../..", f"{server.gallery.outputs}/"):
        answer = server.ask(f"/gradio_api/file={prefix}{path}")
        assert (answer.status, server.gradio.asked) == (404, [])


# ---- uploads


def form(*files: bytes, name: str = "files", filename: str = "a.png") -> bytes:
    parts = [
        f'--XX\r\nContent-Disposition: form-data; name="{name}"; filename="{filename}"\r\n'
        f"Content-Type: image/png\r\n\r\n".encode()
        + file
        for file in files
    ]
    return b"\r\n".join([*parts, b"--XX--\r\n"])


SPOILT = Parcel("multipart/form-data; boundary=XX", ENGLISH).spoilt
FORM_TYPE = {"content-type": "multipart/form-data; boundary=XX"}


def uploaded(server: Server, body: bytes | list[bytes], **how: Any) -> Answer:
    how.setdefault("headers", FORM_TYPE)
    return server.ask("/gradio_api/upload", "POST", body=body, **how)


def kept(server: Server, name: str = "a.png", content: bytes = PNG, cookie: str = COOKIE) -> Path:
    """A file that Gradio keeps of an upload."""
    file = Path(os.environ["GRADIO_TEMP_DIR"]) / "0123abcd" / name
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(content)
    server.gradio.answers["/gradio_api/upload"] = (200, json.dumps([str(file)]).encode())
    assert uploaded(server, form(content), cookie=cookie).status == 200
    return file


@pytest.mark.parametrize("files", [(PNG,), (JPEG,), (WEBP,), (PNG, JPEG, WEBP)])
def test_pictures_come_in(server: Server, files: tuple[bytes, ...]) -> None:
    body = form(*files)
    for size in (1, 3, 1000):
        pieces = [body[start : start + size] for start in range(0, len(body), size)]
        assert uploaded(server, pieces).status == 200
        assert server.gradio.asked[-1][2] == body


@pytest.mark.parametrize("file", [GIF, SVG, b"", b"PNG", b"%PDF-1.7 " * 9, WEBP.replace(b"WEBP", b"WAVE")])
def test_nothing_else_comes_in(server: Server, file: bytes) -> None:
    for before in ((), (PNG,)):
        answer = uploaded(server, form(*before, file))
        assert (answer.status, answer.content) == (415, b"Only PNG, JPEG and WebP pictures can be uploaded.")
        assert server.gradio.asked[-1][2] == SPOILT


def test_large_files_stop_on_their_way(server: Server) -> None:
    piece = bytes(1 << 20)
    answer = uploaded(server, [form(PNG)[:-10], *[piece] * 25])
    assert (answer.status, answer.content) == (413, b"The file is too large; it can be up to 20 MB.")
    assert len(server.gradio.asked[-1][2]) <= FILE + 1000


def test_large_uploads_do_not_even_begin(server: Server) -> None:
    headers = FORM_TYPE | {"content-length": str(FILES * FILE + (2 << 20))}
    answer = uploaded(server, form(PNG), headers=headers)
    assert answer.status == 413
    assert server.gradio.asked == []


def test_few_files_at_a_time(server: Server) -> None:
    answer = uploaded(server, form(*[PNG] * (FILES + 1)))
    assert (answer.status, answer.content) == (413, b"Too many files; up to 8 can be uploaded at a time.")


@pytest.mark.parametrize(
    "form_of",
    [{"name": "other"}, {"filename": ""}, {"filename": ".."}, {"filename": "/"}, {"filename": "a\0b"}],
)
def test_only_named_files_come_in(server: Server, form_of: dict[str, str]) -> None:
    assert uploaded(server, form(PNG, **form_of)).status == 400


@pytest.mark.parametrize(
    "content_type",
    ["application/json", "", "multipart/form-data", "multipart/form-data; boundary=XX; charset=utf-7"],
)
def test_only_forms_come_in(server: Server, content_type: str) -> None:
    assert uploaded(server, form(PNG), headers={"content-type": content_type}).status == 415
    assert server.gradio.asked == []


def test_of_an_upload_that_breaks_off_nothing_is_kept(server: Server) -> None:
    answer = uploaded(server, form(PNG)[:-20], end="cut")
    assert answer.status == 400
    assert server.gradio.asked[-1][2].endswith(SPOILT)


def test_whatever_has_come_in_of_a_spoilt_upload_gradio_gives_it_up() -> None:
    """Only then it removes its files: of a form that merely ends it keeps the last."""
    whole = form(PNG, JPEG)
    for length in range(len(whole) - len(b"--\r\n")):
        parser = MultipartParser(b"XX")
        parser.write(whole[:length])
        with pytest.raises(MultipartParseError):
            parser.write(SPOILT)


def test_uploads_are_seen_by_who_brought_them(server: Server, public: Server) -> None:
    for each in (server, public):
        file = kept(each)
        answer = each.ask(f"/gradio_api/file={file}")
        assert (answer.status, answer.headers["content-type"], answer.content) == (200, "image/png", PNG)
        for cookie in (OTHER, ""):
            assert each.ask(f"/gradio_api/file={file}", cookie=cookie).status == 404
        for spelling in (f"{file}/", f"/{file}", f"{file.parent}/./a.png", f"{file.parent}/x/../a.png"):
            assert each.ask(f"/gradio_api/file={spelling}").status == 404
        kept(each, cookie=OTHER)  # the same picture again
        for cookie in (COOKIE, OTHER):
            assert each.ask(f"/gradio_api/file={file}", cookie=cookie).status == 200


def test_strangers_upload_with_a_cookie_only(public: Server) -> None:
    assert uploaded(public, form(PNG), cookie="").status == 403


def test_copies_that_gradio_makes_are_seen_by_whom_they_were_made_for(server: Server) -> None:
    folder = Path(os.environ["GRADIO_TEMP_DIR"])
    folder.mkdir()
    mine, theirs = folder / "mine.png", kept(server, cookie=OTHER)
    mine.write_bytes(PNG)
    (folder / "grid.csv").write_text("a,b")
    told = [{"path": str(file)} for file in (mine, theirs, folder / "grid.csv", "/etc/passwd")]
    server.gradio.answers["/gradio_api/queue/data"] = (200, b"data: " + json.dumps({"output": told}).encode())
    assert server.ask("/gradio_api/queue/data?session_hash=abc").status == 200
    assert server.ask(f"/gradio_api/file={mine}").content == PNG
    table = server.ask(f"/gradio_api/file={folder}/grid.csv")
    assert table.headers["content-type"] == "application/octet-stream"
    assert table.headers["content-disposition"].startswith("attachment")
    for hidden in (theirs, "/etc/passwd"):
        assert server.ask(f"/gradio_api/file={hidden}").status == 404
    assert server.ask(f"/gradio_api/file={mine}", cookie=OTHER).status == 404


def test_the_oldest_files_make_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ui.guard.files.MOST_BYTES", 250)
    uploads = Uploads(Settings(home=tmp_path), str(tmp_path))
    files = [tmp_path / f"{number}" / "a.png" for number in range(4)]
    for file in files:
        file.parent.mkdir()
        file.write_bytes(bytes(100))
        uploads.uploaded([str(file)], SESSION)
    assert [file.exists() for file in files] == [False, False, True, True]
    assert [uploads.has(str(file), SESSION) for file in files] == [False, False, True, True]
    assert not files[0].parent.exists()
    monkeypatch.setattr("ui.guard.files.MOST_FILES", 1)
    uploads.uploaded([str(files[2])], SESSION)
    assert [file.exists() for file in files[2:]] == [True, False]


# ---- calls


def test_calls_of_what_is_there_reach_it(server: Server) -> None:
    body: dict[str, Any] = {"data": ["a red house"], "fn_index": 1, "session_hash": "abc", "trigger_id": 7}
    assert server.call(**body).content == b"gradio"
    assert json.loads(server.gradio.asked[-1][2]) == body
    assert server.call("call/sd15", data=[]).content == b"gradio"
    assert server.call("call/v2/sd15", prompt="a red house").content == b"gradio"
    assert server.call("cancel", session_hash="abc", fn_index=1, event_id="1").content == b"gradio"
    assert server.call("reset", event_id="1").content == b"gradio"


@pytest.mark.parametrize("index", [None, 2, -1, "0", 0.0, True, [0], {"a": 1}, 10**30])
def test_events_that_are_not_there(server: Server, index: Any) -> None:
    answer = server.call(data=[], session_hash="abc", fn_index=index)
    assert answer.status == 404
    assert "there is no such event" in answer.detail


@pytest.mark.parametrize("name", ["stop", "nothing", "sd1"])
def test_private_events_are_no_endpoints(server: Server, name: str) -> None:
    for way in ("call", "call/v2"):
        assert server.call(f"{way}/{name}", data=[]).detail == f"There is no endpoint /{name}."


def test_a_page_made_for_one_visitor_has_events_of_its_own(server: Server) -> None:
    server.gradio.state_holder["abc"] = SimpleNamespace(blocks_config=SimpleNamespace(fns={5: None}))
    assert server.call(data=[], session_hash="abc", fn_index=5).status == 200
    assert server.call(data=[], session_hash="def", fn_index=5).status == 404


@pytest.mark.parametrize(
    "path",
    ["/etc/passwd", "http://127.0.0.1:1/a.png", "https://evil.test/a.png", "..\\a", "C:\\a.png", "a.png"],
)
def test_calls_name_own_files_only(server: Server, path: str) -> None:
    for extra in ({}, {"meta": {"_type": "gradio.FileData"}}, {"url": "/gradio_api/file=x", "meta": None}):
        file = {"path": path, **extra}
        for data in (file, [{"image": file, "caption": None}], {"a": [[{"b": file}]]}):
            answer = server.call(data=[data], session_hash="abc", fn_index=0)
            assert answer.status == 400
            assert "is no file that you uploaded here" in answer.detail
            assert server.call("call/sd15", data=[data]).status == 400
            assert server.call("call/v2/sd15", images=data).status == 400
    assert server.gradio.asked == []


def test_an_upload_can_be_used_by_who_brought_it(server: Server) -> None:
    body: dict[str, Any] = {"data": [{"path": str(kept(server))}], "fn_index": 0}
    assert server.call(**body, session_hash="abc").status == 200
    content = json.dumps(body).encode()
    assert server.ask("/gradio_api/queue/join", "POST", body=content, cookie=OTHER).status == 400


def test_pictures_in_addresses_are_not_decoded_without_limits(server: Server) -> None:
    file = {"path": None, "url": "data:image/png;base64,AAAA", "meta": {"_type": "gradio.FileData"}}
    assert server.call(data=[file], session_hash="abc", fn_index=0).status == 400


@pytest.mark.parametrize(
    ("content", "status"),
    [
        (b"", 200), (b"{", 400), (b"[]", 400), (b"null", 400), (b"\xff\xfe", 400), (b"[" * 100_000, 400),
        (b"[]" + b",[]" * MOST_MARKS, 413), (b'{"batched": true, "fn_index": 0}', 400),
        (b'{"session_hash": "a/b", "fn_index": 0}', 400), (b'{"session_hash": 7, "fn_index": 0}', 400),
        (b'{"session_hash": "' + b"a" * 65 + b'", "fn_index": 0}', 400),
    ],
)  # fmt: skip
def test_calls_that_make_no_sense(server: Server, content: bytes, status: int) -> None:
    assert server.ask("/gradio_api/queue/join", "POST", body=content).status == status


@pytest.mark.parametrize(("public", "most"), [(False, 107), (True, 27)])
def test_bodies_of_calls_are_limited(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, public: bool, most: int
) -> None:
    monkeypatch.setattr("ui.guard.bodies.MIB", 1024)  # kB for MB: the same in small
    server = Server(tmp_path, settings={"public": public})
    start = b'{"fn_index": 0, "data": ["'
    small = [start, *[b"x" * 1024] * (most - 1), b'"]}']
    assert server.ask("/gradio_api/queue/join", "POST", body=small).status == 200
    large = [start, *[b"x" * 1024] * (most + 1), b'"]}']
    assert server.ask("/gradio_api/queue/join", "POST", body=large).status == 413
    assert server.ask("/gradio_api/cancel", "POST", body=b"x" * (FORM + 1)).status == 413


def test_bodies_take_a_limited_room_together(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ui.guard.bodies.MOST_HELD", 1000)
    busy = server.ask("/gradio_api/queue/join", "POST", body=b"x" * 2000)
    assert (busy.status, busy.headers["retry-after"]) == (503, "5")
    assert server.call(data=[], fn_index=0).status == 200  # and it is free again


@pytest.mark.parametrize("limit", ["IDLE", "LONGEST"])
def test_bodies_that_never_end_are_cut_off(
    server: Server, monkeypatch: pytest.MonkeyPatch, limit: str
) -> None:
    monkeypatch.setattr(f"ui.guard.bodies.{limit}", 0.01)
    answer = server.ask("/gradio_api/queue/join", "POST", body=b"{", end="never")
    assert answer.status == 408


# ---- tabs


def test_a_tab_is_heard_and_stopped_by_its_own_visitor_only(public: Server) -> None:
    assert public.call(data=[], fn_index=0, session_hash="abc").status == 200
    asks = [
        ("/gradio_api/queue/data?session_hash=abc", "GET", b""),
        ("/gradio_api/heartbeat/abc", "GET", b""),
        ("/gradio_api/call/sd15/abc", "GET", b""),  # Gradio takes a tab there as well as a call
        ("/gradio_api/queue/join", "POST", b'{"data": [], "fn_index": 0, "session_hash": "abc"}'),
        ("/gradio_api/cancel", "POST", b'{"session_hash": "abc", "fn_index": 0, "event_id": "1"}'),
    ]
    for path, method, body in asks:
        assert public.ask(path, method, body=body).status == 200
        for cookie in (OTHER, ""):
            assert public.ask(path, method, body=body, cookie=cookie).status == 404


def test_the_memory_of_tabs_is_bounded(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ui.guard.files.MOST_TABS", 3)
    for number in range(10):
        server.ask(f"/gradio_api/heartbeat/tab{number}")
    assert list(server.guard.rules.tabs._sessions) == ["tab7", "tab8", "tab9"]
