"""Pictures and uploads by their address: to whom they belong, and to nobody else."""

from __future__ import annotations

import json
import logging
import os
import re
import threading
from collections import OrderedDict
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import anyio
from starlette.responses import FileResponse, Response

from backend import Settings
from backend.errors import StorageError
from backend.gallery import Gallery
from ui.guard.bodies import HEAD, MIB, kind
from ui.guard.calls import Call, Refused

# A picture's name below the outputs, as `Gallery` lists it: a folder and a file, neither hidden.
WORD = r'[^./\\:*?"<>|\x00-\x1f\x7f][^/\\:*?"<>|\x00-\x1f\x7f]{0,200}'
NAME = re.compile(rf"{WORD}/{WORD}\.png")
FOREVER = "private, max-age=31536000, immutable"  # a picture never changes
MOST_FILES, MOST_BYTES = 4000, 2048 * MIB  # that are kept of uploads and of what was made for clients, in all
MOST_TABS = 20_000
TAB = re.compile(r"[\w-]{1,64}", re.ASCII)

log = logging.getLogger("triptych")


def nothing() -> Refused:
    return Refused(404, "There is nothing at this address.")


class Pictures:
    """The gallery's pictures, in full and in small."""

    def __init__(self, settings: Settings, gallery: Gallery) -> None:
        self._public, self._gallery = settings.public, gallery
        self._outputs = Path(gallery.outputs)

    def name(self, path: str) -> str | None:
        """The name of the picture with that file, spelt as the server itself does."""
        before, name = f"{self._outputs}{os.sep}", path.removeprefix(f"{self._outputs}{os.sep}")
        return name.replace(os.sep, "/") if path.startswith(before) else None

    async def full(self, name: str, call: Call) -> Response:
        """The PNG file."""
        file = await anyio.to_thread.run_sync(self._file, name, call.session)
        place = "attachment" if "download" in call.request.query_params else "inline"
        return FileResponse(
            file,
            media_type="image/png",
            filename=file.name,
            content_disposition_type=place,
            headers={"Cache-Control": FOREVER, "Vary": "Cookie"},
        )

    async def small(self, name: str, call: Call) -> Response:
        """The thumbnail."""
        await anyio.to_thread.run_sync(self._file, name, call.session)
        try:
            image = await anyio.to_thread.run_sync(self._gallery.thumbnail, name)
        except StorageError as error:
            raise nothing() from error
        headers = {"Cache-Control": FOREVER, "Vary": "Cookie", "Content-Disposition": "inline"}
        return Response(image, media_type=kind(image[:HEAD]), headers=headers)

    def _file(self, name: str, session: str) -> Path:
        """The file of a picture of theirs. Raises Refused for every other."""
        if not session or not NAME.fullmatch(name) or not self._is_theirs(name, session):
            raise nothing()
        file = self._outputs / name
        real = Path(os.path.realpath(self._outputs), name)
        if not file.is_file() or os.path.realpath(file) != str(real):  # a link leads elsewhere
            raise nothing()
        return file

    def _is_theirs(self, name: str, session: str) -> bool:
        if not self._public:
            return True
        try:
            return self._gallery.owner(name) == session
        except StorageError as error:
            log.warning("nobody's picture is shown: %s", error)
            return False


@dataclass
class _Kept:
    size: int
    sessions: set[str] = field(default_factory=set)


class Uploads:
    """Files in Gradio's folder: who uploaded them, or was told of them. Only the newest are kept.

    Nobody guesses their paths, which hold a checksum; but Gradio gives a file to whoever knows its path.
    """

    def __init__(self, settings: Settings, folder: str) -> None:
        self._public = settings.public
        self._files: OrderedDict[str, _Kept] = OrderedDict()
        self._bytes = 0
        self._lock = threading.Lock()
        beginning = str(Path(folder)) + os.sep
        spelt = {json.dumps(beginning, ensure_ascii=ascii_only)[1:-1] for ascii_only in (True, False)}
        either = b"|".join(re.escape(each.encode()) for each in spelt)
        self._told = re.compile(rb'"path": ?("(?:' + either + rb')(?:[^"\\]|\\.)+")')

    def uploaded(self, paths: Iterable[str], session: str) -> None:
        """Remember whose they are. One picture may be several visitors': whoever uploads it has it."""
        for path in paths:
            self._keep(path, session, shared=True)

    def told(self, answer: bytes, session: str) -> None:
        """Remember the files that an answer to them names: Gradio made these copies for them. What is
        somebody's already is not given away: an answer may repeat what was asked."""
        for found in self._told.findall(answer):
            with suppress(ValueError):
                self._keep(json.loads(found), session, shared=False)

    def has(self, path: str, session: str) -> bool:
        """Whether the file is the visitor's. On a public server nothing is without a cookie."""
        with self._lock:
            kept = self._files.get(path)
            return kept is not None and session in kept.sessions and bool(session or not self._public)

    def knows(self, path: str) -> bool:
        """Whether the file is anybody's."""
        with self._lock:
            return path in self._files

    async def file(self, path: str, session: str) -> Response:
        """The file, if it is the visitor's: a picture is shown, anything else is downloaded."""
        if not self.has(path, session):
            raise nothing()
        return await anyio.to_thread.run_sync(_served, Path(path))

    def _keep(self, path: str, session: str, *, shared: bool) -> None:
        with self._lock:
            kept = self._files.get(path)
            if kept is None:
                try:
                    kept = self._files[path] = _Kept(Path(path).stat().st_size)
                except (OSError, ValueError):
                    return
                self._bytes += kept.size
                kept.sessions.add(session)
            elif shared:
                kept.sessions.add(session)
            self._files.move_to_end(path)
            while len(self._files) > MOST_FILES or self._bytes > MOST_BYTES:
                oldest, gone = self._files.popitem(last=False)
                self._bytes -= gone.size
                remove([oldest])


def remove(paths: Iterable[str]) -> None:
    """Delete files of Gradio's, and their folders if these are empty now."""
    for path in map(Path, paths):
        with suppress(OSError):
            path.unlink()
            path.parent.rmdir()


def _served(file: Path) -> Response:
    try:
        with file.open("rb") as content:
            image = kind(content.read(HEAD))
    except OSError as error:  # too old, and removed
        raise nothing() from error
    return FileResponse(
        file,
        media_type=image or "application/octet-stream",
        filename=file.name,
        content_disposition_type="inline" if image else "attachment",
        headers={"Cache-Control": "private, max-age=3600", "Vary": "Cookie"},
    )


class Tabs:
    """Gradio's name of each open page: whoever uses it first is the only one who may. With it one hears all
    that is told to that page, and can stop what it runs."""

    def __init__(self) -> None:
        self._sessions: OrderedDict[str, str] = OrderedDict()

    def check(self, tab: object, session: str, *, claim: bool = True) -> None:
        """Raise Refused for one that is somebody else's."""
        if not isinstance(tab, str) or not TAB.fullmatch(tab):
            raise Refused(400, f"session_hash is {tab!r:.80}; it can be up to 64 letters and digits.")
        if self._sessions.get(tab, session) != session:
            raise Refused(404, "This page is not known here any more; load it again.")
        if claim:
            self._sessions[tab] = session
            self._sessions.move_to_end(tab)
            if len(self._sessions) > MOST_TABS:
                self._sessions.popitem(last=False)
