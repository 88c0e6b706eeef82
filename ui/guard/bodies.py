"""What comes in: bodies within a size and a time, uploads that are pictures, the files that a call names."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from pathlib import PurePosixPath
from typing import Any

from python_multipart.exceptions import MultipartParseError
from python_multipart.multipart import MultipartParser, parse_options_header
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope

from ui.guard.calls import Refused
from ui.i18n import Tongue

MIB = 1 << 20
IDLE, LONGEST = 20.0, 600.0  # seconds: between two pieces of a body, and for all of it
FORM = 8 << 10  # bytes of a login, or of a cancel
FILE = 20 * MIB
FILES = 8  # in one upload
PICTURES = 4  # image prompts of a request, as data URLs
MOST_HELD = 512 * MIB  # bytes of calls, all together, while they come in
MOST_MARKS = 200_000  # brackets and commas: a small body of brackets alone takes gigabytes when it is read
PAST, PATIENCE = 64 * MIB, 10.0  # of a refused body is read and dropped, or the answer would never be seen
HEAD = 12  # bytes by which a picture is told


def kind(head: bytes) -> str | None:
    """The media type of a picture by its first bytes, if it is one that is taken."""
    if head.startswith(b"\x89PNG\r\n\x1a\n"):
        return "image/png"
    if head.startswith(b"\xff\xd8\xff"):
        return "image/jpeg"
    return "image/webp" if head[:4] == b"RIFF" and head[8:12] == b"WEBP" else None


def most_of_a_call(public: bool) -> int:
    """Bytes: image prompts may come as data URLs, which take a third more than the files."""
    return PICTURES * (5 if public else 20) * MIB * 4 // 3 + MIB


class Body:
    """A request's body as it arrives. Raises Refused when it is too large, too slow, or cut off."""

    held = 0  # bytes, of all bodies

    def __init__(self, receive: Receive, headers: Mapping[str, str]) -> None:
        self.receive, self.ended = receive, False
        self._left, self._taken = LONGEST, 0
        self._most = 0
        self._declared = headers.get("content-length", "")

    def limit(self, most: int) -> None:
        self._most = most
        if self._declared.isdecimal() and int(self._declared) > most:
            raise _too_large(most)

    async def piece(self) -> bytes | None:
        """The next piece, None at the end."""
        if self.ended:
            return None
        loop = asyncio.get_running_loop()
        began = loop.time()
        try:
            async with asyncio.timeout(min(IDLE, self._left)):
                message = await self.receive()
        except TimeoutError:
            self.ended = True
            raise Refused(408, "The request took too long to arrive.") from None
        self._left = max(self._left - (loop.time() - began), 0.0)
        if message["type"] != "http.request":
            self.ended = True
            raise Refused(400, "The request was cut off.")
        self.ended = not message.get("more_body", False)
        piece = message.get("body", b"")
        self._taken += len(piece)
        if self._taken > self._most:
            raise _too_large(self._most)
        return piece

    async def whole(self) -> bytes:
        pieces: list[bytes] = []
        kept = 0
        try:
            while (piece := await self.piece()) is not None:
                Body.held += len(piece)
                kept += len(piece)
                if Body.held > MOST_HELD:
                    raise Refused(503, "The server is busy; try again in a moment.", Retry_After="5")
                pieces.append(piece)
        finally:
            Body.held -= kept
        return b"".join(pieces)

    async def drop(self) -> None:
        """Let the rest come in, within reason: a browser that is still sending never reads the answer."""
        self._most = self._taken + PAST
        self._left = min(self._left, PATIENCE)
        with suppress(Refused):
            while await self.piece() is not None:
                pass

    def again(self, content: bytes) -> Receive:
        """A `receive` that hands the body out once more, then waits for what else there is."""
        pieces = iter([{"type": "http.request", "body": content, "more_body": False}])

        async def receive() -> Message:
            return next(pieces, None) or await self.receive()

        return receive


def _too_large(most: int) -> Refused:
    size = f"{most // MIB} MB" if most >= MIB else f"{most >> 10} kB"
    return Refused(413, f"The request is too large; it can be up to {size}.")


async def taken(app: ASGIApp, scope: Scope, receive: Receive) -> Response:
    """The answer of `app`, held back to be looked at: only for short ones."""
    answer = Response()
    pieces: list[bytes] = []

    async def send(message: Message) -> None:
        if message["type"] == "http.response.start":
            answer.status_code, answer.raw_headers = message["status"], list(message["headers"])
        else:
            pieces.append(message.get("body", b""))

    await app(scope, receive, send)
    answer.body = b"".join(pieces)
    return answer


# ---- uploads


class Parcel:
    """The multipart body of an upload, looked at on its way: pictures only, few, and not too large."""

    def __init__(self, content_type: str, t: Tongue) -> None:
        what, options = parse_options_header(content_type)
        self.boundary = options.get(b"boundary", b"")
        spelt = options.get(b"charset", b"utf-8").lower()  # of the names, as they are read here
        if what != b"multipart/form-data" or not self.boundary or spelt != b"utf-8":
            raise Refused(415, "An upload is a form with files.")
        self._t, self._files = t, 0
        self._name, self._value = b"", b""
        self._about, self._head, self._size = b"", b"", 0
        callbacks: Mapping[str, Callable[..., None]] = {
            "on_part_begin": self._begin,
            "on_header_field": self._header_name,
            "on_header_value": self._header_value,
            "on_header_end": self._header,
            "on_headers_finished": self._headers,
            "on_part_data": self._data,
            "on_part_end": self._end,
        }
        self._parser = MultipartParser(self.boundary, callbacks)  # pyright: ignore[reportArgumentType]

    @property
    def spoilt(self) -> bytes:
        """What makes Gradio's own parser give up, wherever it stands, and remove what it has written: the end
        of a part, and a header that is none; twice, as the first may end headers and be content."""
        return (b"\r\n--" + self.boundary + b"\r\n\x01") * 2

    def look(self, piece: bytes) -> None:
        """Raise Refused for what may not come in."""
        try:
            self._parser.write(piece)
        except MultipartParseError as error:
            raise Refused(400, "The upload is damaged.") from error

    def _begin(self) -> None:
        self._about, self._head, self._size = b"", b"", 0

    def _header_name(self, data: bytes, start: int, end: int) -> None:
        self._name += data[start:end]

    def _header_value(self, data: bytes, start: int, end: int) -> None:
        self._value += data[start:end]

    def _header(self) -> None:
        if self._name.lower() == b"content-disposition":
            self._about = self._value
        self._name = self._value = b""

    def _headers(self) -> None:
        _, options = parse_options_header(self._about)
        name = options.get(b"filename", b"").decode("utf-8", "replace")
        if options.get(b"name") != b"files" or PurePosixPath(name).name in ("", "..") or "\0" in name:
            raise Refused(400, "An upload is a form with named files.")
        self._files += 1
        if self._files > FILES:
            raise Refused(413, self._t("Too many files; up to {n} can be uploaded at a time.", n=FILES))

    def _data(self, data: bytes, start: int, end: int) -> None:
        self._size += end - start
        if self._size > FILE:
            raise Refused(413, self._t("The file is too large; it can be up to {n} MB.", n=FILE // MIB))
        if len(self._head) < HEAD:
            self._head += data[start : min(end, start + HEAD - len(self._head))]
            if len(self._head) == HEAD:
                self._known()

    def _end(self) -> None:
        self._known()

    def _known(self) -> None:
        if kind(self._head) is None:
            raise Refused(415, self._t("Only PNG, JPEG and WebP pictures can be uploaded."))


# ---- calls


def read(content: bytes) -> Any:
    """The JSON of a call. Raises Refused for what is none, or far too much of it."""
    if sum(map(content.count, (b",", b"[", b"{"))) > MOST_MARKS:
        raise Refused(413, "The request has too many parts.")
    try:
        return json.loads(content)  # as Gradio will: another reader might understand it otherwise
    except (ValueError, RecursionError) as error:
        raise Refused(400, "The request is no JSON.") from error


def files(value: Any) -> Iterator[str]:
    """Every file that a call names, in whatever depth; Gradio takes them from where they are."""
    todo = [value]
    while todo:
        match todo.pop():
            case dict() as each:
                path, url = each.get("path"), each.get("url")
                if isinstance(path, str) and path:
                    yield path
                if isinstance(url, str) and ("path" in each or "meta" in each) and url.startswith("data:"):
                    yield url  # decoded without limits
                todo.extend(each.values())
            case list() as each:
                todo.extend(each)
            case _:
                pass
