"""Jobs and handlers on a studio that only pretends."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import aclosing
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gradio as gr
import pytest
from PIL import Image

from backend.errors import Cancelled, InvalidRequest, StorageError
from backend.events import Event, Step, Waiting
from backend.requests import SD15Request, StableCascadeRequest
from ui import controls, render
from ui.handlers import UNEXPECTED, Easel, painter
from ui.jobs import Jobs, newest

PATIENCE = 30  # seconds: for what takes none on a machine that is not busy
PICTURE = Image.new("RGB", (16, 8), "red")


class Pretence:
    """A studio that yields what `events` yields and remembers how it ended."""

    def __init__(self, events: Callable[[threading.Event], Iterator[Event]]) -> None:
        self.events = events
        self.settings = SimpleNamespace(home=Path("/nowhere"))
        self.ended = threading.Event()

    def generate(self, request: Any, stop: threading.Event) -> Iterator[Event]:
        try:
            yield from self.events(stop)
        finally:
            self.ended.set()


def steps(count: int, previews: tuple[Image.Image, ...] = ()) -> list[Step]:
    return [
        Step(phase="denoise", step=n + 1, steps=count, eta_s=None, previews=previews if n == 0 else ())
        for n in range(count)
    ]


def endless(stop: threading.Event) -> Iterator[Event]:
    while not stop.wait(0.01):
        yield Waiting()
    raise Cancelled("stopped")


def jobs_of(events: Callable[[threading.Event], Iterator[Event]]) -> tuple[Jobs, Pretence]:
    studio: Any = Pretence(events)
    return Jobs(studio), studio


def easel() -> Easel:
    with gr.Blocks():
        return Easel(gr.HTML(), gr.HTML(), gr.HTML(), gr.HTML(), gr.State())


async def painted(jobs: Jobs, on: Easel) -> tuple[list[dict[Any, Any]], Exception | None]:
    updates: list[dict[Any, Any]] = []
    handler = painter(jobs, on, lambda _: SD15Request())
    try:
        async for update in handler(gr.Request(session_hash="page")):
            updates.append(update)  # noqa: PERF401 (what came before the error counts)
    except gr.Error as error:
        return updates, error
    return updates, None


def test_steps_that_pile_up_are_merged_and_keep_the_newest_previews() -> None:
    shown = (PICTURE,)
    last = Step(phase="decode", step=1, steps=1, eta_s=None)
    assert newest([Waiting(), Waiting(), *steps(3, shown), last]) == [
        Waiting(),
        Step(phase="denoise", step=3, steps=3, eta_s=None, previews=shown),
        last,
    ]


def test_a_closed_job_stops_and_frees_its_thread() -> None:
    jobs, studio = jobs_of(endless)

    async def leave() -> None:
        async with aclosing(jobs.events(SD15Request())) as events:
            async for _ in events:
                return

    asyncio.run(leave())
    assert studio.ended.wait(PATIENCE)


def test_a_quiet_job_ticks() -> None:
    ticked = threading.Event()

    def slow(stop: threading.Event) -> Iterator[Event]:
        ticked.wait(PATIENCE)
        yield Waiting()

    async def collect() -> list[Event | None]:
        jobs, _ = jobs_of(slow)
        told: list[Event | None] = []
        async for event in jobs.events(SD15Request()):
            told.append(event)
            ticked.set()
        return told

    first, *_, last = asyncio.run(collect())
    assert (first, last) == (None, Waiting())


def test_a_cancelled_job_stops_although_an_event_arrives_at_that_moment() -> None:
    """A lost cancellation leaves the device to a job that nobody waits for."""
    go = threading.Event()

    def one_then_many(stop: threading.Event) -> Iterator[Event]:
        go.wait(PATIENCE)
        yield from endless(stop)

    async def collect(jobs: Jobs) -> None:
        async for _ in jobs.events(SD15Request()):
            pass

    async def cancel() -> bool:
        jobs, studio = jobs_of(one_then_many)
        work = asyncio.create_task(collect(jobs))
        await asyncio.sleep(0.1)
        go.set()
        time.sleep(0.1)  # the loop is busy, and sees all that happens now in one turn
        asyncio.get_running_loop().call_soon(work.cancel)
        await asyncio.wait([work], timeout=PATIENCE)
        ended = work.cancelled() and studio.ended.wait(PATIENCE)
        jobs.close()
        return ended

    assert asyncio.run(cancel())


def test_closing_stops_whatever_runs() -> None:
    jobs, studio = jobs_of(endless)

    async def run() -> None:
        async for _ in jobs.events(SD15Request()):
            jobs.close()

    with pytest.raises(Cancelled):
        asyncio.run(run())
    assert studio.ended.is_set()


def test_a_tab_stops_its_own_jobs_alone() -> None:
    jobs, studio = jobs_of(endless)

    async def run() -> tuple[list[dict[Any, Any]], Exception | None]:
        work = asyncio.create_task(painted(jobs, on))
        await asyncio.sleep(0.1)
        await jobs.stop("another page", SD15Request)
        await jobs.stop("page", StableCascadeRequest)  # the other tab's
        assert not studio.ended.is_set()
        await jobs.stop("page", SD15Request)
        assert studio.ended.is_set()
        return await work

    on = easel()
    updates, error = asyncio.run(run())
    assert error is None
    assert updates[-1] == {on.status: render.stopped()}


def test_an_error_of_ours_reaches_the_page_and_leaves_the_picture() -> None:
    def fails(stop: threading.Event) -> Iterator[Event]:
        yield steps(2, (PICTURE,))[0]
        raise InvalidRequest("steps is <b>0</b>")

    on = easel()
    updates, error = asyncio.run(painted(jobs_of(fails)[0], on))
    assert "steps is &lt;b&gt;0&lt;/b&gt;" in updates[-1][on.status]
    assert on.canvas not in updates[-1]
    assert isinstance(error, gr.Error)
    assert error.message == "steps is &lt;b&gt;0&lt;/b&gt;"


def test_an_unforeseen_error_tells_nothing_but_the_log(caplog: pytest.LogCaptureFixture) -> None:
    def breaks(stop: threading.Event) -> Iterator[Event]:
        raise ZeroDivisionError("a secret path")
        yield

    on = easel()
    updates, error = asyncio.run(painted(jobs_of(breaks)[0], on))
    assert "a secret path" not in str(updates) + str(error)
    assert updates[-1] == {on.status: render.failed(UNEXPECTED)}
    assert "a secret path" in caplog.text


def test_pictures_that_could_not_be_written_are_shown() -> None:
    def full(stop: threading.Event) -> Iterator[Event]:
        raise StorageError("the disk is full", (PICTURE, PICTURE))
        yield

    on = easel()
    updates, _ = asyncio.run(painted(jobs_of(full)[0], on))
    assert updates[-1][on.canvas].count("data:image/png;base64,") == 2
    assert "the disk is full" in updates[-1][on.status]


def test_a_picture_outside_the_outputs_travels_in_the_page(tmp_path: Path) -> None:
    inside, outside = tmp_path / "outputs" / "a b.png", tmp_path / "elsewhere.png"
    outside.write_bytes(b"png")
    assert render.file_url(inside, tmp_path / "outputs").endswith("/outputs/a%20b.png")
    assert render.file_url(outside, tmp_path / "outputs") == "data:image/png;base64,cG5n"


def test_what_people_type_is_escaped() -> None:
    result: Any = SimpleNamespace(
        files=[Path("/o/x.png")], settings={"prompt": '"><script>', "width": 2, "height": 1}
    )
    assert "<script>" not in render.pictures(result, Path("/o"))


@pytest.mark.parametrize("native", [(128, 128), (512, 512), (1024, 1024)])
@pytest.mark.parametrize("multiple", [8, 16, 64])
def test_shapes_keep_the_area(native: tuple[int, int], multiple: int) -> None:
    for shape, ratio in controls.SHAPES.items():
        width, height = controls.fit(shape, native, multiple)
        assert width % multiple == height % multiple == 0
        if multiple == 8:
            assert width / height == pytest.approx(ratio, rel=0.1)
            assert width * height == pytest.approx(native[0] * native[1], rel=0.1)


KNOWN = [
    (128, 64, [(128, 128), (192, 128), (128, 192), (256, 128), (128, 256)]),
    (1024, 64, [(1024, 1024), (1280, 832), (832, 1280), (1344, 768), (768, 1344)]),
    (512, 8, [(512, 512), (624, 416), (416, 624), (680, 384), (384, 680)]),
    (128, 8, [(128, 128), (160, 104), (104, 160), (168, 96), (96, 168)]),
    (64, 8, [(64, 64), (96, 64), (64, 96), (112, 64), (64, 112)]),
    (2048, 64, [(2048, 2048), (2048, 1408), (1408, 2048), (2048, 1152), (1152, 2048)]),
]


@pytest.mark.parametrize(("native", "multiple", "sizes"), KNOWN)
def test_shapes_differ(native: int, multiple: int, sizes: list[tuple[int, int]]) -> None:
    assert [controls.fit(shape, (native, native), multiple) for shape in controls.SHAPES] == sizes


SIZES = [
    ("auto", "auto", {"stages": "auto", "stage_c": None, "stage_b": None}),
    ("auto", "lite", {"stages": "lite", "stage_c": "auto", "stage_b": None}),
    ("full", "auto", {"stages": "full", "stage_c": None, "stage_b": "auto"}),
    ("full", "lite", {"stages": "lite", "stage_c": "full", "stage_b": None}),
    ("lite", "lite", {"stages": "lite", "stage_c": None, "stage_b": None}),
]


@pytest.mark.parametrize(("stage_c", "stage_b", "asked"), SIZES)
def test_sizes_of_stages_are_wishes(stage_c: str, stage_b: str, asked: dict[str, str | None]) -> None:
    fields: dict[str, Any] = {name: gr.Textbox(render=False) for name in ("stage_c", "stage_b")}
    both = controls.Controls(fields)
    assert both.fields([stage_c, stage_b]) == asked
    assert both.filled(asked) == [stage_c, stage_b]


@pytest.mark.parametrize(
    ("text", "seed"), [("", -1), (None, -1), (" 7 ", 7), ("-1", -1), ("seven", "seven"), ("1.5", "1.5")]
)
def test_seeds_as_typed(text: str | None, seed: object) -> None:
    fields: dict[str, Any] = {"seed": gr.Textbox(render=False)}
    assert controls.Controls(fields).fields([text]) == {"seed": seed}
