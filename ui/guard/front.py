"""The way in and out: which requests reach Gradio, and with which headers every answer leaves."""

from __future__ import annotations

import json
import logging
import re
from typing import Any

import anyio
from gradio.utils import get_upload_folder
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from backend import Settings
from backend.gallery import Gallery
from ui.guard import bodies, programs, signin
from ui.guard.bodies import FILE, FILES, FORM, MIB, Body, Parcel
from ui.guard.calls import Call, Names, Refused
from ui.guard.files import Pictures, Tabs, Uploads, nothing, remove
from ui.guard.leave import STILL, Leave

log = logging.getLogger("triptych")

PASSED = "triptych.passed"
UNEXPECTED = "Something went wrong inside Triptych; the server's log has the details."
STRANGER = "To upload, send the cookie back that this server gives with its first answer."
LARGE = 1 << 16  # bytes: a larger call is read in a thread
NAME = r"[\w-]{1,100}"
# What is answered at all. These without a login, too: Gradio's launch asks for the last, and browsers fetch a
# manifest without cookies.
OPEN = re.compile(
    r"/(?:favicon\.ico|manifest\.json|pwa_icon|static/triptych/[\w-]+\.png|robots\.txt"
    r"|gradio_api/startup-events)",
    re.ASCII,
)
READ = re.compile(
    r"/logout|/config/?|/gradio_api/(?:(?:info|app_id|user|login_check)/?|queue/data|upload_progress"
    rf"|heartbeat/(?P<tab>[\w-]+)|call/(?:v2/)?{NAME}/(?P<event>[\w-]+))",
    re.ASCII,
)
FILES_OF_OURS = re.compile(r"/(?P<what>pictures/|thumbnails/|gradio_api/file=)(?P<name>.+)", re.DOTALL)
CALL = re.compile(
    rf"/gradio_api/(?P<what>queue/join|run/predict|cancel|reset/?|call/(?:v2/)?(?P<name>{NAME})/?)", re.ASCII
)
STREAMS = ("/gradio_api/queue/data", "/gradio_api/call/")
MCP = re.compile(r"/gradio_api/mcp(?:/[\w/-]*)?", re.ASCII)


class Rules:
    """What requests are held against; one for the whole server."""

    def __init__(self, settings: Settings, gallery: Gallery, names: Names) -> None:
        self.settings, self.names = settings, names
        self.mcp = bool(getattr(settings, "mcp", False))
        self.pictures = Pictures(settings, gallery)
        self.uploads = Uploads(settings, get_upload_folder())
        self.tabs, self.tries = Tabs(), signin.Tries()


class Guard:
    """The middleware. Gradio puts some of its own before it, so when the server starts it takes its place in
    front of all."""

    def __init__(self, app: ASGIApp, rules: Rules) -> None:
        self._app, self.rules = app, rules

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            app = scope["app"]
            if not isinstance(app.middleware_stack, Guard):
                app.middleware_stack = Guard(app.middleware_stack, self.rules)
            await self._app(scope, receive, send)
        elif scope["type"] == "websocket":  # nothing here speaks it
            await send({"type": "websocket.close", "code": 1008})
        elif PASSED in scope:
            await self._app(scope, receive, send)
        else:
            await self._guard({**scope, PASSED: True}, receive, send)

    async def _guard(self, scope: Scope, receive: Receive, send: Send) -> None:
        call = Call(scope, self.rules.settings, self.rules.names)
        body, leave = Body(receive, call.headers), Leave(call, self.rules.uploads, send)
        try:
            answer = await self._answer(call, body, leave)
        except Refused as refused:
            await body.drop()
            answer = _refusal(call, refused.status, str(refused), refused.headers)
        except Exception as error:  # the log has it; whoever asked need not know
            log.error("unexpected error at %s", call.path, exc_info=error)
            answer = _refusal(call, 500, UNEXPECTED)
        if answer is not None and not leave.begun:
            await answer(scope, receive, leave)

    async def _answer(self, call: Call, body: Body, leave: Leave) -> Response | None:
        """An answer of ours; None where Gradio has given one."""
        call.check_origin()
        leave.welcome = not STILL.fullmatch(call.path)
        reads, auth = call.method in ("GET", "HEAD"), call.scope["app"].auth is not None
        if auth and call.method == "POST" and call.path in ("/login", "/login/"):
            return await signin.sign_in(call, body, self.rules.tries, self._app)
        if reads and call.path == "/robots.txt" and not self.rules.names.hosted:
            return PlainTextResponse("User-agent: *\nDisallow: /\n")
        if reads and OPEN.fullmatch(call.path):
            return await self._pass(call, body.receive, leave)
        if not call.logged_in and not (self._is_mcp(call) and programs.signed_in(call, self.rules.tries)):
            if reads and call.path == "/":
                return signin.page(call)
            raise Refused(401, "Not authenticated")
        return await (self._read if reads else self._write)(call, body, leave)

    async def _pass(self, call: Call, receive: Receive, leave: Leave) -> None:
        await self._app(call.inner(), receive, leave)

    async def _read(self, call: Call, body: Body, leave: Leave) -> Response | None:
        if found := FILES_OF_OURS.fullmatch(call.path):
            return await self._file(call, found["what"], found["name"])
        if found := READ.fullmatch(call.path):
            tab = found["tab"] or call.request.query_params.get("session_hash")
            if tab is not None:
                self.rules.tabs.check(tab, call.session)
            if found["event"]:  # it may be the name of a tab
                self.rules.tabs.check(found["event"], call.session, claim=False)
            leave.watched = call.path.startswith(STREAMS)
        elif not (call.path == "/" or STILL.fullmatch(call.path) or self._is_mcp(call)):
            raise nothing()
        return await self._pass(call, body.receive, leave)

    async def _file(self, call: Call, what: str, name: str) -> Response:
        rules = self.rules
        if what == "thumbnails/":
            return await rules.pictures.small(name, call)
        if what == "pictures/":
            return await rules.pictures.full(name, call)
        picture = rules.pictures.name(name)
        if picture is not None:
            return await rules.pictures.full(picture, call)
        return await rules.uploads.file(name, call.session)

    async def _write(self, call: Call, body: Body, leave: Leave) -> Response | None:
        if call.method == "POST" and call.path == "/gradio_api/upload":
            return await self._upload(call, body)
        found = CALL.fullmatch(call.path)
        if not (found and call.method == "POST") and not self._is_mcp(call):
            raise nothing()
        short = found and found["what"].startswith(("cancel", "reset"))
        body.limit(FORM if short else bodies.most_of_a_call(call.settings.public))
        content = await body.whole()
        if content:
            given, files = await _understood(content)
            if found:
                self._check_call(call, given, found["what"], found["name"])
            self._check_files(call, files)
        return await self._pass(call, body.again(content), leave)

    def _is_mcp(self, call: Call) -> bool:
        known = call.method in ("GET", "POST", "DELETE") and MCP.fullmatch(call.path)
        return self.rules.mcp and bool(known)

    def _check_call(self, call: Call, given: Any, what: str, name: str | None) -> None:
        """Raise Refused for a call of what is not there, or in the name of another's page."""
        if not isinstance(given, dict):
            raise Refused(400, "The request is no JSON object.")
        app, tab = call.scope["app"], given.get("session_hash")
        if tab is not None:
            self.rules.tabs.check(tab, call.session)
        if given.get("batched"):
            raise Refused(400, "Calls are not taken in batches.")
        functions = app.get_blocks().fns
        if what in ("queue/join", "run/predict"):  # the page asks so for events without a queue
            if tab in app.state_holder:
                functions = app.state_holder[tab].blocks_config.fns
            index = given.get("fn_index")
            if type(index) is not int or index not in functions:
                raise Refused(404, f"fn_index is {index!r:.80}; there is no such event.")
        elif name is not None:
            function = next((each for each in functions.values() if each.api_name == name), None)
            if function is None or function.api_visibility == "private":
                raise Refused(404, f"There is no endpoint /{name}.")

    def _check_files(self, call: Call, files: list[str]) -> None:
        """Raise Refused for a call that names a file which is not the caller's: Gradio would read it."""
        for path in files:
            if not self.rules.uploads.has(path, call.session):
                raise Refused(400, f"{path!r:.80} is no file that you uploaded here.")

    async def _upload(self, call: Call, body: Body) -> Response:
        """Gradio keeps the files as long as they are pictures and few; what else comes in is not kept."""
        if call.settings.public and not call.session:
            raise Refused(403, STRANGER)
        body.limit(FILES * FILE + MIB)
        parcel = Parcel(call.headers.get("content-type", ""), call.t)
        refused: list[Refused] = []

        async def relay() -> Message:
            try:
                piece = None if refused else await body.piece()
                if piece is None:
                    return {"type": "http.disconnect"}
                parcel.look(piece)
            except Refused as why:
                refused.append(why)
                return {"type": "http.request", "body": parcel.spoilt, "more_body": False}
            return {"type": "http.request", "body": piece, "more_body": not body.ended}

        answer = await bodies.taken(self._app, call.inner(), relay)
        paths: list[str] = json.loads(bytes(answer.body)) if answer.status_code == 200 else []
        if refused:
            remove(path for path in paths if not self.rules.uploads.knows(path))
            raise refused[0]
        self.rules.uploads.uploaded(paths, call.session)
        return answer


async def _understood(content: bytes) -> tuple[Any, list[str]]:
    """A call, and the files that it names."""

    def understand() -> tuple[Any, list[str]]:
        given = bodies.read(content)
        return given, list(bodies.files(given))

    return understand() if len(content) < LARGE else await anyio.to_thread.run_sync(understand)


def _refusal(call: Call, status: int, text: str, headers: dict[str, str] | None = None) -> Response:
    """As whoever asks can read it: Gradio's page wants `detail`, but of an upload the text itself."""
    if call.path.startswith(("/gradio_api/", "/config", "/login")) and call.path != "/gradio_api/upload":
        return JSONResponse({"detail": text}, status, headers)
    return PlainTextResponse(text, status, headers)
