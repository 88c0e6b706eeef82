"""Arguments → Settings → Studio → the page. Importing this starts nothing."""

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
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NoReturn

from backend import Settings, Studio, catalog, zerogpu
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


class Parser(argparse.ArgumentParser):
    """Says what is wrong in one line."""

    def error(self, message: str) -> NoReturn:
        print(f"triptych: {message}", file=sys.stderr)
        raise SystemExit(2)


def main(arguments: Sequence[str] | None = None) -> None:
    settings = parse(sys.argv[1:] if arguments is None else arguments, os.environ)
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    check_port(settings)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: sys.exit(0))  # unwinds from wherever the start, or the wait, is
    copies = tempfile.mkdtemp(prefix="triptych-")  # Gradio's copies of what it serves; its default is shared
    os.environ["GRADIO_TEMP_DIR"] = copies
    try:
        lent = zerogpu.present(os.environ)
        if lent:
            settings = zerogpu.prepare(settings)
        check_device(settings)
        serve(settings, lent=lent)
    except TriptychError as error:  # no such device; a demo checkpoint that is missing or damaged
        print(f"triptych: {error}", file=sys.stderr)
        raise SystemExit(1) from None
    finally:
        shutil.rmtree(copies, ignore_errors=True)


def parse(arguments: Sequence[str], environment: Mapping[str, str]) -> Settings:
    """Settings from flags over environment variables; a value that cannot be ends the program with code 2."""
    parser = _parser()
    if "SPACE_ID" in environment:  # a hosted Space reaches the app from outside its container
        parser.set_defaults(host="0.0.0.0")
    for field in dataclasses.fields(Settings):
        text = environment.get(PREFIX + field.name.upper())
        if text is not None:
            value = _switch(parser, field.name, text) if isinstance(field.default, bool) else text
            parser.set_defaults(**{field.name: value})
    try:
        return Settings(**vars(parser.parse_args(arguments)))
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
    add("--share", action="store_true", help="make a public share link")
    add("--auth", metavar="USER:PASSWORD", help="ask for this user and password")
    for name, meaning in MEANINGS.items():
        flag, words = f"--{name.replace('_', '-')}", ", ".join(CHOICES[name])
        add(flag, default=getattr(default, name), metavar="X", help=f"{meaning}: {words}")
    add("--vram", type=float, metavar="GIB", help="use at most this much memory of the device")
    add("--models-dir", type=Path, metavar="DIR", help="where checkpoints are kept and looked for")
    add("--home", default=default.home, type=Path, metavar="DIR", help="where pictures and history go")
    add("--offline", action="store_true", help="never use the network")
    add(
        "--compile",
        action="store_true",
        help="compile what networks repeat: a slower first picture, faster others",
    )
    add("--public", action="store_true", help="strangers may come: only checkpoints of the catalogue")
    return parser


def _switch(parser: Parser, name: str, text: str) -> bool:
    word = text.strip().lower()
    if word not in ON + OFF:
        parser.error(f"{PREFIX}{name.upper()} is {text!r}; it can be 1 or 0")
    return word in ON


def check_port(settings: Settings) -> None:
    """End with a clear line when the address cannot be had; Gradio wants the port on the loopback too."""
    for host in (settings.host, "127.0.0.1"):
        try:
            probe(host, settings.port)
        except OSError as error:
            print(
                f"triptych: cannot listen on {host} port {settings.port} ({error.strerror or error}); "
                "choose another with --port, 0 takes a free one",
                file=sys.stderr,
            )
            raise SystemExit(1) from None


def check_device(settings: Settings) -> None:
    """Raise InvalidRequest for a device that is not here. Looking imports torch: only for one asked for."""
    if settings.device not in ("auto", "cpu"):
        Hardware.detect(settings.device)


def probe(host: str, port: int) -> int:
    """Take the port for a moment, 0 for any free one → the port. Raises OSError."""
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as attempt:
        attempt.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        attempt.bind((host, port))
        return attempt.getsockname()[1]


def serve(settings: Settings, *, lent: bool = False) -> None:
    """Run until a signal ends the program. Where the GPU is only `lent`, the demos are loaded first: what
    is there before the launch is on the GPU whenever it comes."""
    from gradio.tunneling import CURRENT_TUNNELS  # Gradio reads GRADIO_TEMP_DIR

    from ui import blocks, theme
    from ui.jobs import Jobs

    studio = Studio(settings)
    jobs = Jobs(studio)
    if lent:
        warm(studio, *catalog.FAMILIES, run=False)
    demo = blocks.build(jobs)
    demo.launch(
        server_name=settings.host,
        server_port=settings.port or probe(settings.host, 0),
        share=settings.share,
        auth=_login(settings.auth),
        allowed_paths=[str(settings.home / "outputs")],
        theme=theme.theme(),
        css_paths=[theme.STYLE],
        js=theme.PAGE.read_text(encoding="utf-8"),
        favicon_path=theme.ICON,
        footer_links=["api"],
        run_history=False,
        ssr_mode=False,
        quiet=not settings.share,  # with a share link Gradio prints the local address before it asks for one
        prevent_thread_lock=True,
    )
    if not settings.share:
        print(f"Triptych is at {demo.local_url}", flush=True)
    if not lent:
        threading.Thread(target=warm, args=(studio, "sd15"), daemon=True, name="warm").start()
    try:
        while True:
            time.sleep(3600)
    finally:
        jobs.close()
        for tunnel in CURRENT_TUNNELS:
            tunnel.kill()


def warm(studio: Studio, *families: str, run: bool = True) -> None:
    """Import torch and load the demos, of sd15 while the page is already up."""
    for family in families:
        try:
            studio.warm(family, run=run)
        # RuntimeError: what ZeroGPU shows as CUDA holds networks, but does not run all of them
        except (TriptychError, RuntimeError) as error:
            logging.getLogger("triptych").warning("the demo of %s could not be prepared: %s", family, error)


def _login(auth: str | None) -> tuple[str, str] | None:
    user, _, password = (auth or "").partition(":")
    return (user, password) if auth else None


if __name__ == "__main__":
    try:
        main()
    except SystemExit as end:
        # At once: an orderly end waits for open pages, and aborts on a thread that is still inside torch.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(end.code if isinstance(end.code, int) else 1)
