"""The queue and the handlers on a studio that only pretends."""

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

from backend import Settings
from backend.errors import Cancelled, CheckpointError, InvalidRequest, StorageError
from backend.events import Event, Finished, Result, Step, Waiting
from backend.memory.plan import Plan
from backend.requests import Request, SD15Request, StableCascadeRequest
from ui import controls, render
from ui.handlers import PRIVATE, Desk, Easel, explain
from ui.jobs import KEPT, MOST_OF_A_STRANGER, MOST_WAITING, UNEXPECTED, Busy, Job, Jobs, News, newest

PATIENCE = 30  # seconds: for what takes none on a machine that is not busy
PICTURE = Image.new("RGB", (16, 8), "red")
REQUEST = SD15Request(prompt="a red house")
Events = Callable[[threading.Event], Iterator[Event]]


def jobs_of(events: Events | None = None, *, public: bool = False, home: Path = Path("/nowhere")) -> Jobs:
    """A queue over a studio that yields what `events` yields."""
    made = events or (lambda stop: iter(()))

    def generate(request: Request, stop: threading.Event, owner: str) -> Iterator[Event]:
        return made(stop)

    studio: Any = SimpleNamespace(settings=Settings(home=home, public=public), generate=generate)
    return Jobs(studio)


def submitted(jobs: Jobs, client: str = "me", topic: str = "tab", **more: Any) -> Job:
    work = more.pop("work", None) or jobs.paint(REQUEST)
    return jobs.submit(work, REQUEST, topic=topic, client=client, **more)


def until(happened: Callable[[], bool]) -> None:
    end = time.monotonic() + PATIENCE
    while not happened():
        assert time.monotonic() < end
        time.sleep(0.005)


def steps(count: int, previews: tuple[Image.Image, ...] = ()) -> list[Step]:
    return [
        Step(phase="denoise", step=n + 1, steps=count, eta_s=None, previews=previews if n == 0 else ())
        for n in range(count)
    ]


def endless(stop: threading.Event) -> Iterator[Event]:
    while not stop.wait(0.01):
        yield Waiting()
    raise Cancelled("Stopped.")


def finished(files: list[Path] | None = None, **settings: Any) -> Finished:
    plan = Plan(device="cpu", budget_bytes=1, peak_bytes=0, phases=(), decisions=("It fits.",), fits=True)
    return Finished(
        result=Result(
            images=[PICTURE], files=files or [], seeds=[1], plan=plan, timings={"total": 1.0},
            settings={"prompt": "a red house", "width": 2, "height": 1, "seed": 1, **settings}, peak_bytes=0,
        )
    )  # fmt: skip


@pytest.fixture
def gate() -> Iterator[threading.Event]:
    """Work that goes on when it is opened."""
    opened = threading.Event()
    yield opened
    opened.set()


def held(gate: threading.Event, served: list[str] | None = None, name: str = "") -> Events:
    def work(stop: threading.Event) -> Iterator[Event]:
        if served is not None:
            served.append(name)
        while not gate.wait(0.01):
            if stop.is_set():
                raise Cancelled("Stopped.")
        yield finished()

    return work


# ---- the queue


def test_each_client_has_its_turn(gate: threading.Event) -> None:
    jobs, served = jobs_of(), []
    first = submitted(jobs, "a", work=held(gate, served, "a0"))
    until(lambda: first.state == "running")
    waiting = {
        name: submitted(jobs, name[0], work=held(gate, served, name))
        for name in ("a1", "a2", "a3", "b1", "b2", "c1")
    }
    order = ["a1", "b1", "c1", "a2", "b2", "a3"]
    assert [jobs.place(waiting[name]) for name in order] == [1, 2, 3, 4, 5, 6]
    gate.set()
    until(lambda: waiting["a3"].state == "done")
    assert served == ["a0", *order]
    assert jobs.waiting() == 0


def test_a_waiting_job_is_cancelled_and_the_others_move_up(gate: threading.Event) -> None:
    jobs, served = jobs_of(), []
    first = submitted(jobs, work=held(gate))
    until(lambda: first.state == "running")
    second, third = (submitted(jobs, work=held(gate, served, name)) for name in ("second", "third"))
    jobs.stop(second)
    assert second.state == "stopped"
    assert isinstance(second.error, Cancelled)
    assert jobs.place(third) == 1
    gate.set()
    until(lambda: third.state == "done")
    assert served == ["third"]


def test_a_running_job_is_stopped_and_the_next_one_runs(gate: threading.Event) -> None:
    jobs = jobs_of()
    first, second = (submitted(jobs, work=held(gate)) for _ in range(2))
    until(lambda: first.state == "running")
    jobs.stop(first)
    until(lambda: second.state == "running")
    assert first.state == "stopped"


def test_a_full_queue_refuses(gate: threading.Event) -> None:
    jobs = jobs_of()
    first = submitted(jobs, work=held(gate))
    until(lambda: first.state == "running")
    for n in range(MOST_WAITING):
        submitted(jobs, f"{n}")
    with pytest.raises(Busy, match=f"The queue is full: {MOST_WAITING} requests wait"):
        submitted(jobs)
    jobs.close()


def test_a_stranger_has_a_few_at_a_time(gate: threading.Event) -> None:
    jobs = jobs_of(public=True)
    mine = [submitted(jobs, work=held(gate)) for _ in range(MOST_OF_A_STRANGER)]
    with pytest.raises(Busy, match=f"it can be {MOST_OF_A_STRANGER} at a time"):
        submitted(jobs)
    assert submitted(jobs, "another").active
    gate.set()
    until(lambda: mine[0].state == "done")
    assert submitted(jobs).active
    jobs.close()


@pytest.mark.parametrize("public", [True, False])
def test_what_a_stranger_left_is_given_up(
    gate: threading.Event, public: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ui.jobs.ABANDONED", 0.0)
    jobs = jobs_of(endless, public=public)
    running, waiting = submitted(jobs), submitted(jobs)
    if public:
        until(lambda: running.state == "stopped" and waiting.state == "stopped")
    else:
        until(lambda: running.now is not None)
        time.sleep(0.1)
        assert (running.state, waiting.state) == ("running", "waiting")
    jobs.close()


def test_what_was_made_is_found_again_without_its_pixels() -> None:
    jobs = jobs_of(lambda stop: iter([finished()]))
    made = [submitted(jobs) for _ in range(KEPT + 3)]
    until(lambda: made[-1].state == "done")
    found = jobs.of("tab")
    assert found == made[-KEPT:]
    assert all(job.finished and job.finished.result.images == [] for job in found)
    assert jobs.of("another tab") == []
    assert jobs.find("another tab", made[-1].id) is None
    assert jobs.find("tab", made[-1].id) is made[-1]


def test_what_ended_long_ago_is_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ui.jobs.KEPT_SECONDS", 0.0)
    jobs = jobs_of()
    job = submitted(jobs)
    until(lambda: job.state == "done")
    assert jobs.of("tab") == []


def test_an_error_that_is_kept_holds_no_frames() -> None:
    def fails(stop: threading.Event) -> Iterator[Event]:
        try:
            raise MemoryError
        except MemoryError:
            raise InvalidRequest("steps is 0") from None
        yield

    jobs = jobs_of(fails)
    job = submitted(jobs)
    until(lambda: job.state == "failed")
    assert str(job.error) == "steps is 0"
    assert job.error
    assert job.error.__traceback__ is job.error.__context__ is None


def test_closing_stops_all(gate: threading.Event) -> None:
    jobs = jobs_of(endless)
    running, waiting = submitted(jobs), submitted(jobs)
    until(lambda: running.state == "running")
    jobs.close()
    assert (running.state, waiting.state) == ("stopped", "stopped")
    with pytest.raises(Busy):
        submitted(jobs)


def test_steps_that_pile_up_are_merged_and_keep_the_newest_previews() -> None:
    job, other, shown = Any, Any, (PICTURE,)
    job, other = (SimpleNamespace(), SimpleNamespace())
    last = Step(phase="decode", step=1, steps=1, eta_s=None)
    told = [Waiting(), Waiting(), *steps(3, shown), last]
    merged = newest([News(job, event) for event in told] + [News(other, last), News(other)])  # pyright: ignore
    assert [news.event for news in merged] == [
        Waiting(),
        Step(phase="denoise", step=3, steps=3, eta_s=None, previews=shown),
        last,
        last,
        None,
    ]


# ---- a call of the API


def test_a_call_hears_all_that_comes_and_nothing_is_lost() -> None:
    async def collect() -> list[Event]:
        jobs = jobs_of(lambda stop: iter([*steps(3), finished()]))
        return [
            news.event
            async for news in jobs.events(jobs.paint(REQUEST), REQUEST, client="me")
            if news.event is not None
        ]

    *told, last = asyncio.run(collect())
    assert told[-1] == steps(3)[-1]
    assert isinstance(last, Finished)
    assert last.result.images == [PICTURE]


def test_a_closed_call_stops_its_job_and_frees_the_thread(gate: threading.Event) -> None:
    jobs = jobs_of(endless)

    async def leave() -> Job:
        async with aclosing(jobs.events(jobs.paint(REQUEST), REQUEST, client="me")) as events:
            async for news in events:
                if news.event is not None:
                    return news.job
        raise AssertionError

    job = asyncio.run(leave())
    until(lambda: job.state == "stopped")
    assert jobs.waiting() == 0


def test_a_call_that_is_closed_while_it_waits_leaves_the_queue(gate: threading.Event) -> None:
    jobs = jobs_of()
    first = submitted(jobs, work=held(gate))

    async def leave() -> None:
        async with aclosing(jobs.events(jobs.paint(REQUEST), REQUEST, client="me")) as events:
            async for _ in events:
                return

    until(lambda: first.state == "running")
    asyncio.run(leave())
    assert jobs.waiting() == 1


def test_a_quiet_call_ticks(gate: threading.Event) -> None:
    async def collect() -> list[Event | None]:
        jobs = jobs_of(held(gate))
        told: list[Event | None] = []
        async for news in jobs.events(jobs.paint(REQUEST), REQUEST, client="me"):
            told.append(news.event)
            if len(told) == 5:
                gate.set()
        return told

    *quiet, last, _ = asyncio.run(collect())
    assert set(quiet) == {None}
    assert isinstance(last, Finished)


def test_a_cancelled_call_stops_although_an_event_arrives_at_that_moment() -> None:
    """A lost cancellation leaves the device to a job that nobody waits for."""
    go = threading.Event()

    def one_then_many(stop: threading.Event) -> Iterator[Event]:
        go.wait(PATIENCE)
        yield from endless(stop)

    async def collect(jobs: Jobs) -> None:
        async for _ in jobs.events(jobs.paint(REQUEST), REQUEST, client="me"):
            pass

    async def cancel() -> bool:
        jobs = jobs_of(one_then_many)
        work = asyncio.create_task(collect(jobs))
        await asyncio.sleep(0.1)
        go.set()
        time.sleep(0.1)  # the loop is busy, and sees all that happens now in one turn
        asyncio.get_running_loop().call_soon(work.cancel)
        await asyncio.wait([work], timeout=PATIENCE)
        until(lambda: jobs.waiting() == 0)
        return work.cancelled()

    assert asyncio.run(cancel())


# ---- a tab


def desk(jobs: Jobs, family: type[Request] = SD15Request) -> Desk:
    with gr.Blocks():
        return Desk(jobs, family, Easel(*(gr.HTML() for _ in range(5)), gr.State()))  # pyright: ignore


def page(name: str = "page") -> gr.Request:
    return gr.Request(session_hash=name)


async def painted(on: Desk, request: Request = REQUEST) -> tuple[list[dict[Any, Any]], Exception | None]:
    updates: list[dict[Any, Any]] = []
    try:
        async for update in on.paint(page(), lambda owner: (on.jobs.paint(request, owner), request)):
            updates.append(update)  # noqa: PERF401 (what came before the error counts)
    except gr.Error as error:
        return updates, error
    return updates, None


def said(updates: list[dict[Any, Any]], component: Any) -> list[str]:
    """What was written to a component."""
    return [each[component] for each in updates if isinstance(each.get(component), str)]


def test_a_tab_stops_its_own_jobs_alone() -> None:
    jobs = jobs_of(endless)
    on, other = desk(jobs), desk(jobs, StableCascadeRequest)

    async def run() -> tuple[list[dict[Any, Any]], Exception | None]:
        work = asyncio.create_task(painted(on))
        while not jobs.waiting():
            await asyncio.sleep(0.01)
        await asyncio.gather(on.stop(page("another page")), other.stop(page()))
        assert jobs.waiting() == 1
        await on.stop(page())
        return await work

    updates, error = asyncio.run(run())
    assert error is None
    assert said(updates, on.easel.status)[-1] == render.stopped()


def test_a_stop_that_overtakes_its_request_holds() -> None:
    jobs = jobs_of(endless)
    on = desk(jobs)

    async def run() -> list[dict[Any, Any]]:
        stopping = asyncio.create_task(on.stop(page()))
        await asyncio.sleep(0.2)
        updates, _ = await painted(on)
        await stopping
        return updates

    assert said(asyncio.run(run()), on.easel.status)[-1] == render.stopped()


def test_several_are_queued_and_each_shows_its_place(gate: threading.Event) -> None:
    jobs = jobs_of(held(gate))
    on = desk(jobs)

    async def run() -> list[dict[Any, Any]]:
        works = [asyncio.create_task(painted(on)) for _ in range(3)]
        while jobs.waiting() < 3:
            await asyncio.sleep(0.01)
        await asyncio.sleep(0.1)
        waiting = jobs.of(on.topic(page()))[-1]
        on.clicked(gr.EventData(None, {"cancel": waiting.id}), page())
        gate.set()
        return [update for work in works for update in (await work)[0]]

    updates = asyncio.run(run())
    lists = said(updates, on.easel.jobs)
    assert any("place 2" in text and "place 3" in text and ">now<" in text for text in lists)
    assert said(updates, on.easel.status)[-1].startswith(render.done(finished().result)[:30])


def test_a_page_that_comes_back_finds_its_job(gate: threading.Event, tmp_path: Path) -> None:
    """And one that comes when all is done finds what was made."""
    picture = tmp_path / "outputs" / "day" / "a b.png"

    def work(stop: threading.Event) -> Iterator[Event]:
        yield steps(2, (PICTURE,))[0]
        gate.wait(PATIENCE)
        yield finished([picture])

    jobs = jobs_of(work, home=tmp_path)
    on = desk(jobs)

    async def leave_and_come_back() -> list[dict[Any, Any]]:
        leaving = asyncio.create_task(painted(on))
        while not any(job.now for job in jobs.of(on.topic(page()))):
            await asyncio.sleep(0.01)
        leaving.cancel()
        await asyncio.wait([leaving])
        assert jobs.waiting() == 1, "what runs goes on"
        updates: list[dict[Any, Any]] = []
        async for update in on.watch(page()):
            updates.append(update)
            gate.set()
        return updates

    async def look(name: str) -> list[dict[Any, Any]]:
        return [update async for update in on.watch(page(name))]

    back = asyncio.run(leave_and_come_back())
    assert "step 1 of 2" in back[0][on.easel.status]
    assert "data:image/jpeg" in back[0][on.easel.canvas]
    assert "pictures/day/a%20b.png" in said(back, on.easel.canvas)[-1]
    late = asyncio.run(look("page"))
    assert "pictures/day/a%20b.png" in late[0][on.easel.canvas]
    assert late[0][on.easel.last]["prompt"] == "a red house"
    assert not said(asyncio.run(look("another page")), on.easel.canvas)


def test_the_newest_listener_of_a_page_is_the_only_one(gate: threading.Event) -> None:
    jobs = jobs_of(held(gate))
    on = desk(jobs)

    async def run() -> None:
        first = asyncio.create_task(painted(on))
        while not jobs.waiting():
            await asyncio.sleep(0.01)
        second = asyncio.create_task(painted(on))
        await asyncio.wait([first], timeout=PATIENCE)
        assert first.done()
        assert not second.done()
        gate.set()
        await second

    asyncio.run(run())
    assert on.watching == {}


@pytest.mark.parametrize("data", [None, 5, [], {"cancel": 5}, {"cancel": "0"}, {"show": []}, {"other": ""}])
def test_whatever_is_posted_to_the_list_of_jobs(data: Any) -> None:
    on = desk(jobs_of())
    assert on.clicked(gr.EventData(None, data), page()) == {on.easel.jobs: ""}


def test_an_error_of_ours_reaches_the_page_and_leaves_the_picture() -> None:
    def fails(stop: threading.Event) -> Iterator[Event]:
        yield steps(2)[0]
        raise InvalidRequest("steps is <b>0</b>")

    on = desk(jobs_of(fails))
    updates, error = asyncio.run(painted(on))
    assert "steps is &lt;b&gt;0&lt;/b&gt;" in said(updates, on.easel.status)[-1]
    assert not said(updates, on.easel.canvas)
    assert isinstance(error, gr.Error)
    assert error.message == "steps is &lt;b&gt;0&lt;/b&gt;"


def test_an_unforeseen_error_tells_nothing_but_the_log(caplog: pytest.LogCaptureFixture) -> None:
    def breaks(stop: threading.Event) -> Iterator[Event]:
        raise ZeroDivisionError("a secret path")
        yield

    on = desk(jobs_of(breaks))
    updates, error = asyncio.run(painted(on))
    assert "a secret path" not in str(updates) + str(error)
    assert said(updates, on.easel.status)[-1] == render.failed(UNEXPECTED)
    assert "a secret path" in caplog.text


def test_strangers_are_not_told_of_folders(caplog: pytest.LogCaptureFixture) -> None:
    error = CheckpointError("/home/somebody/unet is truncated")
    assert explain(error, Settings()) == str(error)
    assert explain(error, Settings(public=True)) == PRIVATE
    assert str(error) in caplog.text
    assert explain(InvalidRequest("steps is 0"), Settings(public=True)) == "steps is 0"


def test_pictures_that_could_not_be_written_are_shown() -> None:
    def full(stop: threading.Event) -> Iterator[Event]:
        raise StorageError("the disk is full", (PICTURE, PICTURE))
        yield

    on = desk(jobs_of(full))
    updates, _ = asyncio.run(painted(on))
    assert said(updates, on.easel.canvas)[-1].count("data:image/png;base64,") == 2
    assert "the disk is full" in said(updates, on.easel.status)[-1]


def test_a_picture_outside_the_outputs_travels_in_the_page(tmp_path: Path) -> None:
    inside, outside = tmp_path / "outputs" / "day" / "a b.png", tmp_path / "elsewhere.png"
    outside.write_bytes(b"png")
    assert render.file_url(inside, tmp_path / "outputs") == "pictures/day/a%20b.png"
    assert render.file_url(outside, tmp_path / "outputs") == "data:image/png;base64,cG5n"


def test_what_people_type_is_escaped() -> None:
    result: Any = SimpleNamespace(
        files=[Path("/o/x.png")], settings={"prompt": '"><script>', "width": 2, "height": 1}
    )
    assert "<script>" not in render.pictures(result, Path("/o"))
    job: Any = SimpleNamespace(active=True, state="waiting", title='"><script>', id="0", finished=None)
    assert "<script>" not in render.jobs([(job, 1), (job, 2)], Path("/o"))


# ---- controls


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
