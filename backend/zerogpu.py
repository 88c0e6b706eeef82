"""Hosted Spaces that lend a GPU for seconds (ZeroGPU): the package `spaces` is there, SPACES_ZERO_GPU is set.

There is no GPU in this process. What `spaces.GPU` decorates runs in a forked one that has it for the seconds
that were asked for; arguments and results are pickled, and of an error that it raises only the name comes
back. Networks that are loaded before the page is launched, on the thread that imported `spaces`, are moved to
the GPU when it is lent; here they cannot run, nor be looked at after the launch. Seen in, and tried with,
spaces 0.51.3.
"""

from __future__ import annotations

import importlib
import logging
import math
import tempfile
import threading
from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from backend import catalog
from backend.errors import AccessError, TriptychError
from backend.events import Event, Waiting
from backend.requests import Request, SD3Request, SD15Request, StableCascadeRequest
from backend.sampling.catalog import FLOW_SAMPLER_INFO, SAMPLER_INFO
from backend.settings import Settings

if TYPE_CHECKING:
    from backend.studio import Studio

log = logging.getLogger("triptych")

LEAST, MOST = 10, 120  # seconds to ask for: below, nothing is saved; above, visitors may not
POLL = 0.1  # seconds between looks at what ends a request

# TFLOP of one forward as published: SD1.5 at 512 × 512, the others at 1024 × 1024
UNET, MMDIT_MEDIUM, MMDIT_LARGE = 0.803, 8.9, 31.0
STAGE_C, STAGE_B, STAGE_A = 4.08, 6.17, 2.17
VAE_512, VAE_1024 = 2.51, 10.47
SPEED = 150.0  # TFLOP/s that half an H200 reaches in 16 bits, a third of what it is sold with
FLOAT32_SLOWER = 5.0
LEAST_FORWARD = 0.03  # seconds: launching its kernels takes that, however small the picture
LOADING = {"sd15": 8.0, "stable_cascade": 20.0, "sd3": 25.0}  # seconds, from a disk of 1 GB/s, with T5


def present(environ: Mapping[str, str]) -> bool:
    """Whether this process runs in a Space that lends GPUs."""
    asked = environ.get("SPACES_ZERO_GPU", "").lower() in ("1", "t", "true")  # as `spaces` itself reads it
    return asked and find_spec("spaces") is not None


def prepare(settings: Settings) -> Settings:
    """Import `spaces`, on the main thread, before anything looks for a GPU → the settings that hold here."""
    importlib.import_module("spaces")
    if settings.compile:
        log.warning("compile is ignored: what is compiled here would be lost with each process of the GPU")
    return replace(settings, compile=False)


def duration(request: Request) -> int:
    """Seconds of the GPU to ask for: loading, forwards and decoding by their published cost, 10 to 120."""
    if request.checkpoint == "demo":
        return LEAST
    slower = FLOAT32_SLOWER if request.dtype == "float32" else 1.0
    forwards = sum(count * max(cost * slower / SPEED, LEAST_FORWARD) for count, cost in _forwards(request))
    return math.ceil(min(max(LOADING[request.family] + request.num_images * forwards, LEAST), MOST))


def _forwards(request: Request) -> list[tuple[float, float]]:
    """How many forwards of what TFLOP one picture takes, part by part."""
    entry = catalog.entry(request.family, request.checkpoint) or catalog.published(request.family)

    def value(name: str) -> Any:
        given = getattr(request, name)
        return entry.defaults[name] if given is None else given

    def passes(scale: str) -> int:
        return 2 if value(scale) > 1 else 1

    pixels = value("width") * value("height")
    small, large = pixels / 512**2, pixels / 1024**2
    match request:
        case SD15Request():
            steps = value("steps") * SAMPLER_INFO[value("sampler")].cost
            return [(steps * passes("guidance_scale"), UNET * small), (1, VAE_512 * small)]
        case SD3Request():
            steps = value("steps") * FLOW_SAMPLER_INFO[value("sampler")].cost
            shares = request.skip_layer_guidance_stop - request.skip_layer_guidance_start
            skipping = shares if request.skip_layer_guidance_scale > 0 else 0.0
            cost = MMDIT_LARGE if "large" in request.checkpoint.lower() else MMDIT_MEDIUM
            return [(steps * (passes("guidance_scale") + skipping), cost * large), (1, VAE_1024 * large)]
        case StableCascadeRequest():
            return [
                (value("prior_steps") * passes("prior_guidance_scale"), STAGE_C * large),
                (value("decoder_steps") * passes("decoder_guidance_scale"), STAGE_B * large),
                (1, STAGE_A * large),
            ]
    raise AssertionError(f"no cost is known of {type(request).__name__}")


Paint = Callable[[Request, threading.Event, str], Iterator[Event]]  # the last: whose the pictures are


def painting(studio: Studio, environ: Mapping[str, str]) -> Paint:
    """`studio.generate`, on ZeroGPU in the process that has the GPU; call it before the page is launched.

    Raises what `generate` raises, and AccessError where no GPU is lent or it is taken away.
    """
    if not present(environ):
        return studio.generate
    spaces: Any = importlib.import_module("spaces")

    @spaces.GPU(duration=lambda request, flag, owner: duration(request))
    def on_gpu(request: Request, flag: str, owner: str) -> Generator[Event | _Failed, None, None]:
        stop = threading.Event()
        try:
            with _watching(Path(flag).exists, stop.set):
                yield from studio.generate(request, stop, owner)
        except TriptychError as error:
            yield _Failed(error)
        except Exception as error:
            log.exception("unexpected error in the process of the GPU")
            yield _Failed(RuntimeError(f"in the process of the GPU: {type(error).__name__}: {error}"))

    def paint(request: Request, stop: threading.Event, owner: str = "") -> Iterator[Event]:
        yield Waiting()
        yield from studio.fetch(request)  # here: a GPU is lent for seconds, and downloads take minutes
        with tempfile.TemporaryDirectory(prefix="triptych-stop-") as folder:
            flag = Path(folder) / "stop"
            try:
                with _watching(stop.is_set, flag.touch), closing(on_gpu(request, str(flag), owner)) as events:
                    try:
                        for event in events:
                            if isinstance(event, _Failed):
                                raise event.error
                            yield event
                    finally:
                        flag.touch()  # closing waits for the other process, which may be in the middle
            except Exception as error:
                if (refusal := _refusal(error)) is not None:
                    raise refusal from error
                raise

    return paint


@dataclass(frozen=True)
class _Failed:
    """An error on its way between processes."""

    error: Exception


@contextmanager
def _watching(happened: Callable[[], bool], act: Callable[[], object]) -> Generator[None, None, None]:
    """Meanwhile a thread waits until it `happened`, and then does `act`. An event cannot cross to another
    process; a file can be seen from both."""
    over = threading.Event()

    def watch() -> None:
        while not happened():
            if over.wait(POLL):
                return
        act()

    thread = threading.Thread(target=watch, daemon=True, name="stop")
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def _refusal(error: Exception) -> AccessError | None:
    """What `spaces` itself refuses with (a quota is used up, a GPU taken away) are errors of the page's, with
    a `title` and a `message` for the visitor; `str` gives the text of one that holds markup."""
    message = getattr(error, "message", None)
    if not isinstance(message, str):
        return None
    return AccessError(f"{getattr(error, 'title', 'ZeroGPU')}: {str(message).strip()}")
