"""Arguments → Settings → the page. Importing this starts nothing."""

from __future__ import annotations

import argparse
import dataclasses
import logging
import os
import shutil
import signal
import socket
import sys
import tempfile
import threading
from collections.abc import Mapping, Sequence
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from types import FrameType
from typing import NoReturn

from backend import Settings, zerogpu
from backend.errors import InvalidRequest, TriptychError
from backend.memory.hardware import Hardware
from backend.settings import CHOICES

PREFIX = "TRIPTYCH_"
ON, OFF = ("1", "true", "yes", "on"), ("0", "false", "no", "off", "")
MEANINGS = {
    "device": "where to compute",
    "dtype": "in which precision",
    "offload": "what leaves the card for RAM while it waits: nothing (none), the networks of other phases "
    "(model, as in model offload), all but the layer that computes (sequential: least memory, slowest)",
    "attention": "the kernel of attention; what it cannot take is left to another",
    "attention_slicing": "attend to some of the queries at a time: less memory, slower",
    "vae_slicing": "decode one picture of a batch at a time",
    "vae_tiling": "decode a picture in overlapping tiles, where it is larger than one: less memory, slower",
    "t5": "how Stable Diffusion 3 runs T5 where a request leaves it open: whole, in 8 or 4 bits, not at all",
    "device_map": "keep all on one card (single), or spread networks over several (balanced)",
}
SIGNALS = ("SIGINT", "SIGTERM", "SIGHUP", "SIGBREAK")  # the last two where there are such


class Parser(argparse.ArgumentParser):
    """Says what is wrong in one line."""

    def error(self, message: str) -> NoReturn:
        print(f"triptych: {message}", file=sys.stderr)
        raise SystemExit(2)


def main(arguments: Sequence[str] | None = None) -> None:
    settings = parse(sys.argv[1:] if arguments is None else arguments, os.environ)
    ending = end_on_signals()
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    check_mcp(settings)
    settings = dataclasses.replace(settings, port=take_port(settings))
    copies = make_folder()
    try:
        os.environ |= {
            "GRADIO_TEMP_DIR": copies,  # of what Gradio serves; its default is shared by all users
            "GRADIO_ANALYTICS_ENABLED": "False",
            "HF_HUB_DISABLE_TELEMETRY": "1",
        }
        if not settings.compile:  # torch makes a folder for what it compiles all the same
            os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(Path(copies, "torch")))
        lent = zerogpu.present(os.environ)
        if lent:
            settings = zerogpu.prepare(settings)
        check_device(settings)
        from ui import launch  # Gradio reads the variables while it is imported

        launch.serve(settings, ending, lent=lent)
    except TriptychError as error:  # no such device; a demo checkpoint that is missing or damaged
        fail(str(error))
    finally:
        shutil.rmtree(copies, ignore_errors=True)


def end_on_signals() -> threading.Event:
    """Signals unwind the program from wherever its start, or its wait, is, and a second one from where it
    puts its things in order → what the first sets, as an import may swallow the exception."""
    ending = threading.Event()

    def end(number: int, _: FrameType | None) -> None:
        again = ending.is_set()
        ending.set()
        sys.exit(128 + number if again else 0)

    for name in SIGNALS:
        number = getattr(signal, name, None)
        if number is not None and signal.getsignal(number) is not signal.SIG_IGN:  # as `nohup` leaves it
            signal.signal(number, end)
    return ending


def parse(arguments: Sequence[str], environment: Mapping[str, str]) -> Settings:
    """Settings from flags over environment variables; a value that cannot be ends the program with code 2."""
    parser = _parser()
    hosted = "SPACE_ID" in environment
    if hosted:  # it is reached from outside its container, where its maker says
        parser.set_defaults(host="0.0.0.0", port=environment.get("GRADIO_SERVER_PORT", "7860"))
    for field in dataclasses.fields(Settings):
        text = environment.get(PREFIX + field.name.upper())
        if text is not None:
            value = _switch(parser, field.name, text) if isinstance(field.default, bool) else text
            parser.set_defaults(**{field.name: value})
    try:
        given = vars(parser.parse_args(arguments))
        given["public"] |= given["share"] or hosted
        if given["share"] and hosted:
            print("triptych: share is ignored: a Space has an address of its own", file=sys.stderr)
            given["share"] = False
        return Settings(**given)
    except InvalidRequest as error:
        parser.error(str(error))


def _parser() -> Parser:
    default = Settings()
    parser = Parser(
        prog="app.py",
        description="Triptych, a text-to-image studio in the browser.",
        epilog=f"Each flag is an environment variable too: --models-dir is {PREFIX}MODELS_DIR.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--host", default=default.host, metavar="H", help="address to listen on")
    add("--port", default=default.port, type=int, metavar="P", help="port to listen on; 0 takes a free one")
    add("--share", action="store_true", help="make a share link for strangers, with a login of its own")
    add("--auth", metavar="USER:PASSWORD", help="ask for this user and password")
    add(
        "--hosts",
        default=(),
        type=_names,
        metavar="NAMES",
        help="what else the page is called by, behind a proxy",
    )
    add("--no-browser", action="store_true", help="do not open the page in the browser")
    add("--mcp", action="store_true", help="serve the endpoints as tools, too, for programs that speak MCP")
    for name, meaning in MEANINGS.items():
        flag, words = f"--{name.replace('_', '-')}", ", ".join(CHOICES[name])
        add(flag, default=getattr(default, name), metavar="X", help=f"{meaning}: {words}")
    add("--vram", type=float, metavar="GIB", help="use at most this much memory of the device")
    add("--models-dir", type=Path, metavar="DIR", help="where checkpoints are kept and looked for")
    add("--home", default=default.home, type=Path, metavar="DIR", help="where pictures and history go")
    add(
        "--fetch",
        default=(),
        type=_names,
        metavar="NAMES",
        help="catalogued checkpoints to download at the start, as sd15,sd3-medium",
    )
    add("--offline", action="store_true", help="never use the network")
    add(
        "--compile",
        action="store_true",
        help="compile what networks repeat: a slower first picture, faster others",
    )
    add(
        "--public",
        action="store_true",
        help="strangers may come: catalogued checkpoints only, within limits, to each their own pictures",
    )
    return parser


def _names(text: str) -> tuple[str, ...]:
    return tuple(name.strip() for name in text.split(",") if name.strip())


def _switch(parser: Parser, name: str, text: str) -> bool:
    word = text.strip().lower()
    if word not in ON + OFF:
        parser.error(f"{PREFIX}{name.upper()} is {text!r}; it can be 1 or 0")
    return word in ON


def fail(message: str) -> NoReturn:
    print(f"triptych: {message}", file=sys.stderr)
    raise SystemExit(1)


def make_folder() -> str:
    """A temporary folder, of this run only."""
    try:
        return tempfile.mkdtemp(prefix="triptych-")
    except OSError as error:
        fail(f"cannot make a temporary folder: {error}; name one that can be written to in TMPDIR")


def check_mcp(settings: Settings) -> None:
    if settings.mcp and find_spec("mcp") is None:
        fail("--mcp needs another package; it comes with: pip install -r requirements-mcp.txt (or: make mcp)")


def take_port(settings: Settings) -> int:
    """The port to listen on. Ends with a clear line when the address cannot be had; Gradio wants the port on
    the loopback too."""
    port = settings.port
    for host in (settings.host, "127.0.0.1"):
        try:
            port = probe(host, port)
        except OSError as error:
            fail(
                f"cannot listen on {host} port {port} ({error.strerror or error}); "
                "choose another with --port, 0 takes a free one"
            )
    return port


def check_device(settings: Settings) -> None:
    """Raise InvalidRequest for a device that is not here. Looking imports torch: only for one asked for."""
    if settings.device not in ("auto", "cpu"):
        Hardware.detect(settings.device)


def probe(host: str, port: int) -> int:
    """Take the port for a moment, 0 for any free one → the port. Raises OSError."""
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as attempt:
        # elsewhere it means a port that was let go a moment ago, on Windows one that another program has
        option = getattr(socket, "SO_EXCLUSIVEADDRUSE", socket.SO_REUSEADDR)
        attempt.setsockopt(socket.SOL_SOCKET, option, 1)
        attempt.bind((host, port))
        return attempt.getsockname()[1]


if __name__ == "__main__":
    for stream in (sys.stdout, sys.stderr):
        with suppress(AttributeError):  # a program without a console has none
            stream.reconfigure(errors="backslashreplace")  # pyright: ignore[reportAttributeAccessIssue]
    try:
        main()
    except SystemExit as end:
        # At once: an orderly end waits for open pages, and aborts on a thread that is still inside torch.
        with suppress(AttributeError, OSError):  # nobody reads it any more
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(end.code if isinstance(end.code, int) else 1)
