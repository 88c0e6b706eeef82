"""Grids: values as typed, cells in their order, sheets, and what is still there after a stop or a kill."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import gradio
import numpy as np
import pytest
from PIL import Image

from backend import SD15Request, Settings, StableCascadeRequest, Studio, infotext
from backend.errors import Cancelled, CheckpointError, InvalidRequest, OutOfMemory, StorageError
from backend.events import Event, Finished, GridProgress, Notice, Planned, Result, Step
from backend.gallery import Gallery
from backend.grid import Axis, Grid, fields, forget, lettering, paint, painting, unfinished
from backend.grid.kept import MOST_KEPT, Book, key_of
from backend.grid.sheet import MOST_PIXELS, MOST_SIDE, PROBLEM, Layout, Sheet, arranged, in_small, sizes_of
from backend.requests import REQUESTS, Request

PROMPT = "a red house on green hills"
BASE = SD15Request(prompt=PROMPT, seed=7, width=128, height=128)
STEPS = Axis("steps", (10, 20, 30))
GUIDANCE = Axis("guidance_scale", (3.0, 7.5))


def axis(field: str, text: str, family: str = "sd15") -> Axis:
    return Axis.parse(family, field, text)


# ---- values


@pytest.mark.parametrize(
    ("field", "text", "values"),
    [
        ("steps", "10, 20,30", (10, 20, 30)),
        ("steps", "10-30 (+5)", (10, 15, 20, 25, 30)),
        ("steps", "10-31(+5)", (10, 15, 20, 25, 30)),
        ("steps", "3-1", (3, 2, 1)),
        ("steps", "30-10 (-10)", (30, 20, 10)),
        ("steps", "1-10 [4]", (1, 4, 7, 10)),
        ("steps", "1 – 3, 2-4, 9", (1, 2, 3, 4, 9)),
        ("steps", "5-9 [1]", (5,)),
        ("steps", "1-2 [3]", (1, 2)),
        ("steps", "7.0,\n8,", (7, 8)),
        ("guidance_scale", "1-2 (+0.25)", (1.0, 1.25, 1.5, 1.75, 2.0)),
        ("guidance_scale", "0-1 [4]", (0.0, 0.333333, 0.666667, 1.0)),
        ("guidance_scale", ".5، 7，8", (0.5, 7.0, 8.0)),
        ("seed", "0, 4294967295", (0, 4294967295)),
        ("sampler", "euler A, dpm++ 2m karras, lcm", ("euler_ancestral", "dpmpp_2m_karras", "lcm")),
        ("size", "512x768, 512 × 256, 64", ((512, 768), (512, 256), (64, 64))),
        ("prompt_words", 'red, "blue, at night", "say ""hi""", red', ("red", "blue, at night", 'say "hi"')),
        ("prompt_words", 'red, “dark, blue”, 5" nail', ("red", "dark, blue", '5" nail')),
        ("negative_prompt", '"", blurry', ("", "blurry")),
        ("prompt_words", 'red, ""', ("red", "")),
        ("prefer", "Quality, auto", ("quality", "auto")),
    ],
)
def test_values_as_people_type_them(field: str, text: str, values: tuple[Any, ...]) -> None:
    read = axis(field, text)
    assert read.values == values
    assert [type(value) for value in read.values] == [type(value) for value in values]
    assert axis(field, read.text) == read  # and as they are written


@pytest.mark.parametrize(
    ("field", "text", "told"),
    [
        ("steps", "", "steps has no values yet; they can be 10-30"),
        ("steps", " , ,", "steps has no values"),
        (
            "steps",
            "0, 20, x, 151",
            "steps is 0, steps is 'x', steps is 151; it can be a whole number from 1 to 150",
        ),
        ("steps", "1.5", "steps is 1.5; it can be a whole number"),
        ("steps", "10-30 (+2.5)", "steps is 12.5, steps is 17.5"),
        ("steps", "1-150", "steps 1-150 has 150 values; a side of a grid can have 1 to 20"),
        ("steps", "1-999999999999", "has 999999999999 values"),
        ("steps", "1-5 [0]", "has 0 values"),
        ("steps", "1-5 [900000]", "has 900000 values"),
        ("steps", "1-15, 30-40", "steps has 26 values"),
        ("steps", "1-5 (-1)", "steps is 1-5 \\(-1\\), which never arrives"),
        ("steps", "1-5 (+0)", "which never arrives"),
        ("steps", '"1-3"', "steps is '1-3'"),
        ("steps", "9" * 5000, "steps is '999"),
        ("guidance_scale", "nan, 3", "guidance_scale is 'nan'; it can be a number from 0 to 30"),
        ("guidance_scale", "0.1-0.9", "say in which steps, as in 0.1-0.9 \\(\\+0.2\\)"),
        ("seed", "-1, 3", "seed is -1; in a grid it can be a whole number from 0"),
        ("seed", "-2", "seed is -2; it can be"),
        ("sampler", "euler, eular", "sampler is 'eular'; it can be pndm, ddim"),
        (
            "size",
            "512x, 100x64, 9000",
            "size is '512x'; it can be width x height.*width is 100.*width is 9000",
        ),
        ("prompt_words", 'red, "blue', "prompt_words has '\"blue'; quotes can only be around a whole value"),
        ("prompt_words", '"a" b, c', "quotes can only be around"),
        ("t5", "full", "an axis is 't5'; it can be seed, prompt_words"),
        ("num_images", "1, 2", "an axis is 'num_images'"),
        ("checkpoint", "half \ud800", r"half of a character at place 6: 'half \\ud800'$"),
    ],
)
def test_every_bad_value_is_named(field: str, text: str, told: str) -> None:
    with pytest.raises(InvalidRequest, match=told):
        axis(field, text)


@pytest.mark.parametrize("family", REQUESTS)
def test_what_can_vary_in_a_family(family: str) -> None:
    known = fields(family)
    base = REQUESTS[family](prompt="red hills", seed=1)
    for name, field in known.items():
        read = axis(name, field.example, family)
        grid = Grid(base, read)
        changed = {cell.request for cell in grid.cells()}
        assert len(changed) == len(read.values) == len(set(read.labels)), name
    assert ("t5" in known, "stages" in known, "sampler" in known) == {
        "sd15": (False, False, True),
        "sd3": (True, False, True),
        "stable_cascade": (False, True, False),
    }[family]


def test_a_label_tells_no_folder() -> None:
    assert Axis("checkpoint", ("/home/me/mine.safetensors", "owner/model", "demo")).labels == [
        "mine.safetensors",
        "owner/model",
        "demo",
    ]


# ---- cells


def test_a_random_seed_is_drawn_once() -> None:
    grid = Grid(SD15Request(prompt=PROMPT, num_images=4), STEPS, GUIDANCE)
    seeds = {cell.request.seed for cell in grid.cells()}
    assert len(seeds) == 1
    assert seeds.pop() >= 0
    assert {cell.request.num_images for cell in grid.cells()} == {1}
    assert grid.cells() == grid.cells()


def test_along_seeds_none_is_drawn() -> None:
    base = SD15Request(prompt=PROMPT)
    grid = Grid(base, axis("seed", "3, 4"))
    assert [cell.request.seed for cell in grid.cells()] == [3, 4]
    assert Grid(base, axis("seed", "3, 4")) == grid


def test_each_cell_is_what_its_place_says() -> None:
    grid = Grid(BASE, STEPS, axis("size", "64x128, 128"))
    told = {cell.spot: cell.request for cell in grid.cells()}
    assert len(told) == 6
    for (column, row), request in told.items():
        assert request == replace(BASE, steps=STEPS.values[column], width=(64, 128)[row])


ORDERS = [
    ("steps", "1, 2", "checkpoint", "demo, other", "row by row"),
    ("checkpoint", "demo, other", "steps", "1, 2", "column by column"),
    ("prompt_words", "red, blue", "seed", "1, 2", "column by column"),
    ("seed", "1, 2", "negative_prompt", "a, b", "row by row"),
    ("steps", "1, 2", "guidance_scale", "1, 2", "row by row"),
]


@pytest.mark.parametrize(("x", "x_text", "y", "y_text", "order"), ORDERS)
def test_what_costs_more_changes_less_often(x: str, x_text: str, y: str, y_text: str, order: str) -> None:
    spots = [cell.spot for cell in Grid(BASE, axis(x, x_text), axis(y, y_text)).cells()]
    by_rows = [(0, 0), (1, 0), (0, 1), (1, 1)]
    assert spots == (by_rows if order == "row by row" else sorted(by_rows))


def test_the_last_stage_changes_most_often() -> None:
    base = StableCascadeRequest(prompt=PROMPT, seed=1)
    parts = [axis(f"{stage}_steps", "1, 2", "stable_cascade") for stage in ("prior", "decoder")]
    prior = [cell.request.prior_steps for cell in Grid(base, *parts).cells()]  # pyright: ignore
    assert prior == [1, 1, 2, 2]
    prior = [cell.request.prior_steps for cell in Grid(base, *parts[::-1]).cells()]  # pyright: ignore
    assert prior == [1, 1, 2, 2]


def test_words_of_the_prompt_are_replaced() -> None:
    base = replace(BASE, prompt="a red house, red hills", negative_prompt="red sky, blue")
    first = Grid(base, axis("prompt_words", "red, blue, green")).request((1, 0))
    assert (first.prompt, first.negative_prompt) == ("a blue house, blue hills", "blue sky, blue")
    swapped = Grid(base, axis("prompt_words", "red, house"), axis("prompt_words", "house, red")).request(
        (1, 1)
    )
    assert swapped.prompt == "a house red, house hills"  # what one puts in is not the other's to replace


def test_one_size_of_both_stages_overrules_each() -> None:
    base = StableCascadeRequest(prompt=PROMPT, seed=1, stages="full", stage_c="lite")
    grid = Grid(base, axis("stages", "full, lite", "stable_cascade"))
    wishes = [[cell.request.wish(stage) for stage in ("stage_c", "stage_b")] for cell in grid.cells()]  # pyright: ignore
    assert wishes == [["full", "full"], ["lite", "lite"]]


@pytest.mark.parametrize(
    ("axes", "told"),
    [
        ((Axis("steps", ()),), "steps has 0 values; a side of a grid can have 1 to 20"),
        ((Axis("steps", tuple(range(1, 22))),), "steps has 21 values"),
        ((axis("seed", "1-20"), axis("steps", "1-6")), "20 x 6 pictures; it can have up to 100"),
        ((STEPS, Axis("steps", (1,))), "x and y are both steps"),
        ((Axis("shift", (1.0,)),), "an axis is 'shift'; it can be seed"),
        ((Axis("steps", (0,)),), "steps is 0"),
        ((Axis("size", (7,)),), "size is 7; it can be width x height"),
        ((Axis("prompt_words", ("purple", "blue")),), "begins with 'purple', which the prompt does not have"),
        ((Axis("prompt_words", ("", "blue")),), "begins with ''"),
        ((axis("prompt_words", "red, blue"), axis("prompt_words", "red, green")), "'red' on both sides"),
    ],
)
def test_what_no_grid_can_be(axes: tuple[Axis, ...], told: str) -> None:
    x, *others = axes
    with pytest.raises(InvalidRequest, match=told):
        Grid(BASE, x, next(iter(others), None))


def test_strangers_get_small_grids_only() -> None:
    Grid(BASE, axis("steps", "1-3"), axis("seed", "1-3")).check_public()
    with pytest.raises(InvalidRequest, match="5 x 2 pictures; on this public server it can have up to 9"):
        Grid(BASE, axis("steps", "1-5"), axis("seed", "1, 2")).check_public()
    with pytest.raises(InvalidRequest, match="steps is 51; on this public server"):
        Grid(BASE, axis("steps", "5, 51")).check_public()
    with pytest.raises(InvalidRequest, match="checkpoint is 'other/model'; on this public server"):
        Grid(BASE, axis("checkpoint", "demo, other/model")).check_public()
    with pytest.raises(InvalidRequest, match="prompt has 1[0-9]{3} characters"):
        Grid(BASE, axis("prompt_words", f"red, {'x' * 1200}")).check_public()


# ---- the sheet


def noise(spot: tuple[int, int], size: tuple[int, int]) -> Image.Image:
    """A picture that is like no other."""
    random = np.random.default_rng(hash(spot) % 2**32)
    return Image.fromarray(random.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8))


def filled(grid: Grid) -> Sheet:
    sheet = Sheet(arranged(grid, sizes_of(grid, {})))
    for spot, size in sheet.layout.sizes.items():
        sheet.put(spot, noise(spot, size))
    return sheet


LONG = "a very long description of a colour that nobody has seen, Donaudampfschifffahrtsgesellschaft"
WORDY = axis("prompt_words", f'red, "{LONG}", "{LONG * 3}"')
GRIDS = {
    "plain": Grid(BASE, STEPS, GUIDANCE),
    "one row": Grid(BASE, axis("seed", "1-20")),
    "one column": Grid(BASE, axis("prompt_words", "red"), axis("seed", "1-20")),
    "a single one": Grid(BASE, axis("steps", "10")),
    "long words": Grid(BASE, WORDY, axis("sampler", "euler, DPM++ 2M SDE Karras")),
    "long words below": Grid(BASE, axis("sampler", "euler, DPM++ 2M SDE Karras"), WORDY),
    "tiny": Grid(replace(BASE, width=64, height=64), WORDY, axis("steps", "1-20 [20]")),
    "flat": Grid(replace(BASE, width=2048, height=64), STEPS, WORDY),
    "narrow": Grid(replace(BASE, width=64, height=2048), axis("steps", "1-20")),
    "mixed": Grid(BASE, axis("size", "128, 256x64, 64x256"), axis("seed", "1, 2")),
    "mixed below": Grid(BASE, axis("seed", "1, 2"), axis("size", "128, 256x64, 64x256")),
    "untitled": Grid(BASE, STEPS, GUIDANCE, titled=False),
    "no prompt": Grid(SD15Request(seed=1, width=128, height=128), STEPS),
    "a long prompt": Grid(replace(BASE, prompt=f"red {LONG * 9}"), STEPS, GUIDANCE),
}


def boxes(layout: Layout) -> list[tuple[float, float, float, float]]:
    """The ink of every line of text."""
    found = []
    for line in layout.lines():
        if line.text:
            x0, y0, x1, y1 = line.font.getbbox(line.text, anchor=f"{line.anchor}a")
            found.append((line.x + x0, line.y + y0, line.x + x1, line.y + y1))
    return found


def apart(one: tuple[float, ...], other: tuple[float, ...]) -> bool:
    return one[2] <= other[0] or other[2] <= one[0] or one[3] <= other[1] or other[3] <= one[1]


@pytest.mark.parametrize("name", GRIDS)
def test_every_picture_at_its_place(name: str) -> None:
    sheet = filled(GRIDS[name])
    layout = sheet.layout
    assert layout.scale == 1.0
    for spot, size in layout.sizes.items():
        place, slot = layout.place(spot), layout.slot(spot)
        box = (place.x, place.y, place.x + place.width, place.y + place.height)
        assert sheet.image.crop(box).tobytes() == noise(spot, size).tobytes()
        assert slot.x <= box[0] < box[2] <= slot.x + slot.width
        assert slot.y <= box[1] < box[3] <= slot.y + slot.height
    assert len(layout.sizes) == GRIDS[name].count


@pytest.mark.parametrize("name", GRIDS)
def test_nothing_overlaps(name: str) -> None:
    layout = arranged(GRIDS[name], sizes_of(GRIDS[name], {}))
    width, height = layout.size
    slots = [layout.slot(spot) for spot in layout.sizes]
    taken = [*boxes(layout), *((each.x, each.y, each.x + each.width, each.y + each.height) for each in slots)]
    for index, box in enumerate(taken):
        assert 0 <= box[0] < box[2] <= width
        assert 0 <= box[1] < box[3] <= height
        assert all(apart(box, other) for other in taken[:index]), (index, box)


def test_labels_stand_by_their_pictures() -> None:
    layout = arranged(GRIDS["plain"], sizes_of(GRIDS["plain"], {}))
    lines = {line.text: line for line in layout.lines()}
    assert list(lines) == [
        PROMPT, "Stable Diffusion 1.5 · demo · seed 7", "Steps", "10", "20", "30", "Guidance", "3", "7.5",
    ]  # fmt: skip
    for column, text in enumerate(("10", "20", "30")):
        slot = layout.slot((column, 0))
        assert lines[text].x == slot.x + slot.width / 2
        assert slot.y - 2 * layout.em <= lines[text].y < slot.y
    for row, text in enumerate(("3", "7.5")):
        slot = layout.slot((0, row))
        assert slot.y < lines[text].y < slot.y + slot.height
        assert slot.x - 2 * layout.em <= lines[text].x < slot.x


@pytest.mark.parametrize(
    ("x", "y"),
    [("1-10", "1-10"), ("1-20", "1-5"), ("1-5", "1-20"), ("1-20", "1"), ("1", "1-20"), ("1-2", "1-2")],
)
@pytest.mark.parametrize("size", [(2048, 2048), (2048, 1024), (64, 2048)])
def test_a_sheet_stays_within_its_limits(x: str, y: str, size: tuple[int, int]) -> None:
    base = replace(BASE, width=size[0], height=size[1])
    grid = Grid(base, axis("seed", x), axis("steps", y))
    layout = arranged(grid, sizes_of(grid, {}))
    width, height = layout.size
    assert max(width, height) <= MOST_SIDE
    assert width * height <= MOST_PIXELS
    tight = max(width / MOST_SIDE, height / MOST_SIDE, (width * height / MOST_PIXELS) ** 0.5)
    assert layout.scale == 1.0 or tight > 0.95  # no smaller than need be
    assert all(layout.place(spot).height >= 20 for spot in layout.sizes)
    if min(size) > 64:
        assert layout.em >= max(width, height) / 200  # to be read with the whole sheet on a screen
    assert max(in_small(layout).size) <= 820


def test_a_cell_that_failed_says_why_within_its_room() -> None:
    grid = GRIDS["plain"]
    sheet = filled(grid)
    before = sheet.image.copy()
    sheet.fail((1, 0), f"Out of memory. {LONG}")
    slot = sheet.layout.slot((1, 0))
    changed = np.any(np.asarray(before) != np.asarray(sheet.image), axis=2)
    inside = np.zeros_like(changed)
    inside[slot.y : slot.y + slot.height, slot.x : slot.x + slot.width] = True
    assert changed[inside].mean() > 0.9
    assert not changed[~inside].any()
    written = np.all(np.asarray(sheet.image) == tuple(bytes.fromhex(PROBLEM[1:])), axis=2)
    assert written.sum() > 50


def test_letters_that_the_own_font_lacks_are_found_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    greek = next(Path(gradio.__file__).parent.rglob("KaTeX_Main-Regular*.ttf"))  # Gradio brings it
    damaged = Path(__file__)
    monkeypatch.setattr(lettering, "_system_fonts", lambda: (str(damaged), str(greek)))
    assert lettering.font_for("red", 20).getname()[0] == "Aileron"
    assert lettering.font_for("ΓΔ red", 20).getname()[0] == "KaTeX_Main"
    assert lettering.font_for("漢", 20).getname()[0] == "Aileron"  # nobody has it


def test_accents_that_no_font_has_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lettering, "_system_fonts", lambda: ())
    font = lettering.font_for("café", 20)
    assert lettering.written("a  café\n×", font) == "a cafe ×"


def test_the_fonts_of_the_system_open_in_their_order() -> None:
    files = lettering._system_fonts()
    assert len(files) == len(set(files)) <= lettering.MOST_FONTS
    assert all(Path(file).suffix.lower() in (".ttf", ".ttc", ".otf") for file in files)
    plain = [any(odd in Path(file).stem.lower() for odd in lettering.ODD) for file in files]
    assert plain == sorted(plain)  # bold and the like come last


def test_lines_are_cut_where_they_are_too_many() -> None:
    font = lettering.font_for("x", 16)
    for width, most in ((100, 3), (300, 1), (60, 2)):
        lines = lettering.wrapped(LONG, font, width, most)
        assert len(lines) == most
        assert lines[-1].endswith("…")
        assert all(font.getlength(line) <= width for line in lines)
    assert lettering.wrapped("ab cd", font, 400, 1) == ["ab cd"]
    assert lettering.wrapped("", font, 400, 1) == []


# ---- painting


class Pretence:
    """A studio that fills each picture with a colour of its request, and remembers what was asked."""

    def __init__(self, home: Path, *, public: bool = False) -> None:
        self.settings = Settings(home=home, public=public)
        self.gallery = Gallery(home)
        self.asked: list[Request] = []
        self.before: Callable[[Request, threading.Event], None] = lambda request, stop: None
        self.own: dict[str, Any] = {
            "steps": 25,
            "guidance_scale": 7.5,
            "sampler": "ddim",
            "width": 64,
            "height": 64,
        }

    def plan(self, request: Request) -> Any:
        return ("a plan of", request)

    def generate(self, request: Request, stop: threading.Event, owner: str = "") -> Iterator[Event]:
        plan: Any = self.plan(request)
        yield Planned(plan=plan)
        yield Notice(text="Something to know.")
        self.before(request, stop)
        if stop.is_set():
            raise Cancelled("Stopped.")
        settings = asdict(request)
        settings |= {name: value for name, value in self.own.items() if settings.get(name) is None}
        picture = Image.new("RGB", (settings["width"], settings["height"]), colour(request))
        yield Step(phase="denoise", step=1, steps=1, eta_s=0.0, previews=(picture.resize((8, 8)),))
        text = infotext.describe(settings, request.seed)
        facts = {**settings, "family": request.family, "timings": {"total": 1.0}}
        file = self.gallery.save(picture, text, facts, owner=owner)
        self.asked.append(request)
        yield Finished(
            result=Result(
                images=[picture],
                files=[file],
                seeds=[request.seed],
                plan=plan,
                timings={"denoise": 0.5, "total": 1.0},
                settings=settings,
                peak_bytes=1000 + len(self.asked),
            )
        )


def colour(request: Request) -> tuple[int, ...]:
    return tuple(key_of(Grid(request, Axis("seed", (request.seed,))), "").encode()[:3])


@pytest.fixture
def studio(tmp_path: Path) -> Any:
    return Pretence(tmp_path / "home")


def painted(studio: Any, grid: Grid, **more: Any) -> tuple[Result, list[Event]]:
    events = list(paint(studio, grid, **more))
    assert isinstance(events[-1], Finished)
    return events[-1].result, events


def holds(result: Result, grid: Grid, lacking: frozenset[tuple[int, int]] = frozenset()) -> bool:
    """Whether the sheet shows the colour of each cell's request in the middle of its place."""
    with Image.open(result.files[0]) as sheet:
        layout = arranged(grid, sizes_of(grid, {}))
        assert sheet.size == layout.size
        for cell in grid.cells():
            place = layout.place(cell.spot)
            pixel = sheet.getpixel((place.x + place.width // 2, place.y + place.height // 2))
            if (pixel == colour(cell.request)) == (cell.spot in lacking):
                return False
    return True


def stop_before(number: int) -> Callable[[Request, threading.Event], None]:
    count = iter(range(1, 10_000))

    def before(request: Request, stop: threading.Event) -> None:
        if next(count) == number:
            stop.set()

    return before


def test_a_grid_is_painted(studio: Any) -> None:
    grid = Grid(BASE, STEPS, GUIDANCE)
    result, events = painted(studio, grid)
    assert studio.asked == [cell.request for cell in grid.cells()]
    assert holds(result, grid)
    entries = studio.gallery.entries()
    assert len(entries) == 7  # the sheet, and every cell as a picture of its own
    assert entries[0].file == result.files[0]
    assert entries[0].prompt == PROMPT
    assert result.images[0].size == (entries[0].facts["grid"]["width"], entries[0].facts["grid"]["height"])
    assert entries[0].facts["grid"]["y"] == {
        "field": "guidance_scale",
        "values": [3.0, 7.5],
        "text": "3, 7.5",
    }
    progress = [event for event in events if isinstance(event, GridProgress)]
    assert [event.done for event in progress if event.preview is None] == sorted(
        event.done for event in progress if event.preview is None
    )
    assert (progress[0].done, progress[-1].done, progress[-1].cells) == (0, 6, 6)
    assert progress[0].eta_s is None
    assert progress[-1].eta_s == 0
    assert result.timings["denoise"] == 3.0
    assert result.peak_bytes == 1006
    assert result.seeds == [7]
    assert result.notices == ["Something to know."]
    assert sum(isinstance(event, Notice) for event in events) == 1  # said once, not six times
    assert sum(isinstance(event, Finished) for event in events) == 1
    assert unfinished(studio.settings.home, "sd15") == []


def test_time_left_goes_by_the_work_that_is_left(studio: Any) -> None:
    _, events = painted(studio, Grid(BASE, axis("steps", "10, 20, 40")))
    told = [event.eta_s for event in events if isinstance(event, GridProgress) and event.preview is None]
    assert told[-1] == 0
    assert 3.0 in told  # half a second for 10 steps: three for 60


def test_previews_fill_the_sheet(studio: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(painting, "PREVIEW_SECONDS", 0.0)
    grid = Grid(BASE, STEPS)
    _, events = painted(studio, grid)
    layout = in_small(arranged(grid, sizes_of(grid, {})))
    seen = []
    for event in events:
        if isinstance(event, Step):
            assert event.previews == ()
        if isinstance(event, GridProgress) and event.preview is not None:
            assert event.preview.size == layout.size
            middles = [(place.x + 20, place.y + 20) for place in map(layout.place, layout.sizes)]
            pixels = [event.preview.getpixel(middle) for middle in middles]
            known = [pixel == colour(cell.request) for pixel, cell in zip(pixels, grid.cells(), strict=True)]
            seen.append((event.done, sum(known)))
    # while a cell is painted, its preview is there before it is done
    assert seen == [(0, 1), (1, 1), (1, 2), (2, 2), (2, 3), (3, 3)]


def test_previews_come_a_few_times_only(studio: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(painting, "PREVIEW_SECONDS", 3600.0)
    _, events = painted(studio, Grid(BASE, STEPS, GUIDANCE))
    assert sum(isinstance(event, GridProgress) and event.preview is not None for event in events) == 1


def test_the_text_of_a_sheet(studio: Any) -> None:
    base = replace(BASE, negative_prompt="blurry", sampler=None, width=None, height=None, steps=25)
    grid = Grid(base, STEPS, axis("prompt_words", 'red, "blue, dark"'))
    result, _ = painted(studio, grid)
    with Image.open(result.files[0]) as sheet:
        text = sheet.info["parameters"]
    read = infotext.parse(text)
    assert (read.prompt, read.negative_prompt) == (PROMPT, "blurry")
    told = {name: read.fields[name] for name in ("X Type", "X Values", "Y Type", "Y Values")}
    assert told == {
        "X Type": "Steps",
        "X Values": "10, 20, 30",
        "Y Type": "Prompt words",
        "Y Values": 'red, "blue, dark"',
    }
    assert axis("prompt_words", read.fields["Y Values"]) == grid.y
    restored = infotext.restore(text)  # as it was asked for, and what the checkpoint filled in
    assert (restored["steps"], restored["sampler"], restored["width"], restored["seed"]) == (
        25,
        "ddim",
        64,
        7,
    )
    assert (result.settings["steps"], result.settings["sampler"], result.settings["width"]) == (
        25,
        "ddim",
        64,
    )


RAN = {
    "sd3": ({"shift": 3.0}, {"t5": "nf4"}),
    "stable_cascade": (
        {"prior_steps": 20, "prior_guidance_scale": 4.0, "decoder_steps": 10, "decoder_guidance_scale": 0.0},
        {"stage_c": "lite", "stage_b": "full"},
    ),
}


@pytest.mark.parametrize("family", RAN)
def test_the_text_tells_how_other_families_ran(family: str, studio: Any) -> None:
    own, ran = RAN[family]
    studio.own |= {**own, "ran": ran}
    result, _ = painted(studio, Grid(REQUESTS[family](prompt=PROMPT, seed=7), axis("seed", "1, 2", family)))
    assert result.settings["ran"] == ran
    assert {name: result.settings[name] for name in own} == own
    with Image.open(result.files[0]) as sheet:
        restored = infotext.restore(sheet.info["parameters"])
    assert restored.items() >= (own | ran).items()


# ---- stopping and going on


@pytest.mark.parametrize("number", range(1, 7))
def test_after_a_stop_only_what_lacks_is_painted(number: int, studio: Any) -> None:
    grid = Grid(BASE, STEPS, GUIDANCE)
    studio.before = stop_before(number)
    with pytest.raises(Cancelled):
        painted(studio, grid)
    assert len(studio.asked) == number - 1
    left = unfinished(studio.settings.home, "sd15")
    assert [(each.done, each.cells, each.prompt) for each in left] == [(number - 1, 6, PROMPT)][: number - 1]
    again = Pretence(studio.settings.home)
    result, events = painted(again, left[0].grid() if left else grid)
    assert [*studio.asked, *again.asked] == [cell.request for cell in grid.cells()]
    first = next(event for event in events if isinstance(event, GridProgress))
    assert first.done == number - 1
    assert holds(result, grid)
    assert unfinished(studio.settings.home, "sd15") == []
    assert len(studio.gallery.entries()) == 7


def test_a_closed_grid_loses_only_the_cell_that_ran(studio: Any) -> None:
    events: Any = paint(studio, Grid(BASE, STEPS))
    for event in events:
        if isinstance(event, GridProgress) and event.done == 1:
            break
    events.close()
    assert [each.done for each in unfinished(studio.settings.home, "sd15")] == [1]


def test_a_random_seed_is_kept_for_going_on(studio: Any) -> None:
    grid = Grid(SD15Request(prompt=PROMPT, width=64, height=64), STEPS)
    studio.before = stop_before(2)
    with pytest.raises(Cancelled):
        painted(studio, grid)
    (left,) = unfinished(studio.settings.home, "sd15")
    assert left.grid() == grid
    assert left.axes == ("steps",)


def test_all_that_was_there_already_needs_no_painting(studio: Any) -> None:
    grid = Grid(BASE, STEPS)
    for cell in grid.cells():
        result = list(studio.generate(cell.request, threading.Event()))[-1].result
        Book(studio.settings.home, grid, "").note(cell.spot, result.files[0])
    again = Pretence(studio.settings.home)
    result, _ = painted(again, grid)
    assert again.asked == []
    assert holds(result, grid)
    assert result.plan == again.plan(grid.cells()[0].request)


@pytest.mark.parametrize("harm", ["gone", "cut short", "no picture", "empty"])
def test_a_picture_that_does_not_open_is_painted_again(harm: str, studio: Any) -> None:
    grid = Grid(BASE, STEPS)
    studio.before = stop_before(3)
    with pytest.raises(Cancelled):
        painted(studio, grid)
    file = studio.gallery.entries()[-1].file
    content = file.read_bytes()
    file.unlink()
    if harm != "gone":
        file.write_bytes({"cut short": content[:-30], "no picture": b"picture" * 99, "empty": b""}[harm])
    again = Pretence(studio.settings.home)
    result, _ = painted(again, grid)
    assert again.asked == [grid.request((0, 0)), grid.request((2, 0))]
    assert holds(result, grid)


@pytest.mark.parametrize("file", ["grid.json", "cells.json"])
@pytest.mark.parametrize(
    "content", [b"", b"{", b"[]", b'{"family": "sd15"}', b'{"0,0": 7, "x": "y", "1,0": "../../x.png"}']
)
def test_a_damaged_state_is_no_obstacle(file: str, content: bytes, studio: Any) -> None:
    grid = Grid(BASE, STEPS)
    studio.before = stop_before(3)
    with pytest.raises(Cancelled):
        painted(studio, grid)
    (folder,) = (studio.settings.home / "grids").iterdir()
    (folder / file).write_bytes(content)
    for left in unfinished(studio.settings.home, "sd15"):
        assert left.done in (0, 2)
        assert left.grid() == grid
    again = Pretence(studio.settings.home)
    result, _ = painted(again, grid)
    assert len(again.asked) in (1, 3)
    assert holds(result, grid)


def test_a_state_of_another_version_says_so(studio: Any) -> None:
    studio.before = stop_before(2)
    with pytest.raises(Cancelled):
        painted(studio, Grid(BASE, STEPS))
    (folder,) = (studio.settings.home / "grids").iterdir()
    told = json.loads((folder / "grid.json").read_text())
    told["base"]["colour"] = "red"
    (folder / "grid.json").write_text(json.dumps(told))
    (left,) = unfinished(studio.settings.home, "sd15")
    with pytest.raises(InvalidRequest, match="cannot be read .*colour.*; it can be started anew"):
        left.grid()
    assert forget(studio.settings.home, left.key)


def test_where_no_state_can_be_kept_pictures_are_painted_all_the_same(
    studio: Any, caplog: pytest.LogCaptureFixture
) -> None:
    studio.settings.home.mkdir()
    (studio.settings.home / "grids").write_text("a file in the way")
    grid = Grid(BASE, STEPS)
    result, _ = painted(studio, grid)
    assert holds(result, grid)
    assert "could not be kept" in caplog.text
    assert unfinished(studio.settings.home, "sd15") == []


def test_image_prompts_are_kept_with_the_grid(studio: Any, tmp_path: Path) -> None:
    own, ran = RAN["stable_cascade"]
    studio.own |= {**own, "ran": ran}
    noise((1, 2), (40, 30)).save(tmp_path / "upload.png")
    base = StableCascadeRequest(seed=1, images=(str(tmp_path / "upload.png"), noise((3, 4), (9, 9))))
    grid = Grid(base, axis("decoder_steps", "1, 2", "stable_cascade"))
    studio.before = stop_before(2)
    with pytest.raises(Cancelled):
        painted(studio, grid)
    (tmp_path / "upload.png").unlink()
    (left,) = unfinished(studio.settings.home, "stable_cascade")
    again = left.grid()
    assert again == grid
    assert key_of(again, "") == left.key
    pictures: Any = again.base.images  # pyright: ignore
    assert pictures[0].picture.tobytes() == noise((1, 2), (40, 30)).tobytes()


def test_owners_see_their_own_grids_only(studio: Any) -> None:
    grid = Grid(BASE, STEPS)
    for owner in ("one", "other"):
        studio.before = stop_before(2)
        with pytest.raises(Cancelled):
            painted(studio, grid, owner=owner)
    home = studio.settings.home
    assert unfinished(home, "sd15") == unfinished(home, "sd15", "") == []
    (mine,) = unfinished(home, "sd15", "one")
    assert unfinished(home, "sd3", "one") == []
    assert not forget(home, mine.key, "other")
    assert not forget(home, "../../outputs", "one")
    assert forget(home, mine.key, "one")
    assert not forget(home, mine.key, "one")
    assert unfinished(home, "sd15", "one") == []
    assert len(unfinished(home, "sd15", "other")) == 1
    assert len(studio.gallery.entries()) == 2  # pictures stay
    assert {entry.owner for entry in studio.gallery.entries()} == {"one", "other"}


def test_old_unfinished_grids_go_one_day(studio: Any) -> None:
    grids = studio.settings.home / "grids"
    for number in range(MOST_KEPT + 5):
        folder = grids / f"{number:032x}"
        folder.mkdir(parents=True)
        os.utime(folder, (number, number))
    studio.before = stop_before(2)
    with pytest.raises(Cancelled):
        painted(studio, Grid(BASE, STEPS))
    names = sorted(folder.name for folder in grids.iterdir())
    assert len(names) == MOST_KEPT
    assert f"{5:032x}" not in names
    assert f"{6:032x}" in names
    assert len(unfinished(studio.settings.home, "sd15")) == 1


# ---- failing


def failing(*steps: int, error: Exception) -> Callable[[Request, threading.Event], None]:
    def before(request: Any, stop: threading.Event) -> None:
        if request.steps in steps:
            raise error

    return before


@pytest.mark.parametrize("error", [OutOfMemory("It does not fit."), CheckpointError("It is damaged.")])
def test_one_cell_that_fails_is_empty_and_tried_again(error: Exception, studio: Any) -> None:
    grid = Grid(BASE, STEPS, GUIDANCE)
    studio.before = failing(20, error=error)
    result, events = painted(studio, grid)
    assert len(studio.asked) == 4
    assert holds(result, grid, lacking=frozenset({(1, 0), (1, 1)}))
    assert result.notices[-1].startswith("2 of 6 pictures could not be painted; their cells say why.")
    last = [event for event in events if isinstance(event, GridProgress)][-1]
    assert (last.done, last.failed, last.cells) == (6, 2, 6)
    (left,) = unfinished(studio.settings.home, "sd15")
    assert (left.done, left.cells) == (4, 6)
    again = Pretence(studio.settings.home)
    result, _ = painted(again, left.grid())
    assert again.asked == [grid.request((1, 0)), grid.request((1, 1))]
    assert holds(result, grid)
    assert unfinished(studio.settings.home, "sd15") == []


def test_where_nothing_can_be_painted_the_reason_is_raised(studio: Any) -> None:
    studio.before = failing(10, 20, 30, error=OutOfMemory("It does not fit."))
    with pytest.raises(OutOfMemory, match="It does not fit"):
        painted(studio, Grid(BASE, STEPS))
    assert studio.gallery.entries() == []
    assert unfinished(studio.settings.home, "sd15") == []


@pytest.mark.parametrize("error", [StorageError("The disk is full."), ZeroDivisionError("a bug")])
def test_what_concerns_more_than_a_cell_ends_the_grid(error: Exception, studio: Any) -> None:
    studio.before = failing(20, error=error)
    with pytest.raises(type(error)):
        painted(studio, Grid(BASE, STEPS))
    assert len(studio.asked) == 1
    assert [each.done for each in unfinished(studio.settings.home, "sd15")] == [1]


def test_a_failure_keeps_no_tensors(studio: Any) -> None:
    raised = OutOfMemory("It does not fit.")
    raised.__cause__ = MemoryError()
    studio.before = failing(20, error=raised)
    painted(studio, Grid(BASE, STEPS))
    assert raised.__traceback__ is raised.__cause__ is raised.__context__ is None


def test_a_picture_that_had_to_go_elsewhere_is_on_the_sheet(studio: Any, tmp_path: Path) -> None:
    grid = Grid(BASE, STEPS)
    usual, studio.gallery = studio.gallery, Gallery(tmp_path / "spare")
    studio.before = stop_before(3)
    with pytest.raises(Cancelled):
        painted(studio, grid)
    assert unfinished(studio.settings.home, "sd15") == []  # the temporary folder may be gone by then
    studio.before, studio.gallery = stop_before(99), usual
    result, _ = painted(studio, grid)
    assert holds(result, grid)


def test_a_public_server_paints_no_more_than_it_may(tmp_path: Path) -> None:
    studio: Any = Pretence(tmp_path, public=True)
    with pytest.raises(InvalidRequest, match="on this public server it can have up to 9"):
        painted(studio, Grid(BASE, axis("seed", "1-10")), owner="one")
    assert studio.asked == []
    result, _ = painted(studio, Grid(BASE, axis("seed", "1-9")), owner="one")
    assert studio.gallery.owner(result.files[0].relative_to(studio.gallery.outputs).as_posix()) == "one"


# ---- the real thing

DEMO = Grid(
    SD15Request(prompt=PROMPT, seed=7, steps=2, width=64, height=64),
    Axis("prompt_words", ("red", "blue")),
    Axis("guidance_scale", (1.0, 5.0)),
)
CHILD = """
import sys
from pathlib import Path
from backend import Settings, Studio
from backend.grid import paint
from backend.events import GridProgress
from tests.unit.test_grid import DEMO
studio = Studio(Settings(device="cpu", dtype="float32", home=Path(sys.argv[1])))
for event in paint(studio, DEMO):
    if isinstance(event, GridProgress):
        print(event.done, flush=True)
"""


def real(home: Path) -> Studio:
    return Studio(Settings(device="cpu", dtype="float32", home=home))


def test_every_cell_is_the_single_picture(tmp_path: Path) -> None:
    result, _ = painted(real(tmp_path / "grid"), DEMO)
    alone = real(tmp_path / "alone")
    sheet, layout = result.images[0], arranged(DEMO, sizes_of(DEMO, {}))
    seen = set()
    for cell in DEMO.cells():
        alone.unload()  # nothing is kept from one to the next
        single = alone.run(cell.request).images[0]
        place = layout.place(cell.spot)
        shown = sheet.crop((place.x, place.y, place.x + place.width, place.y + place.height))
        assert shown.tobytes() == single.tobytes()
        seen.add(single.tobytes())
    assert len(seen) == 4
    files = {entry.file for entry in Gallery(tmp_path / "grid").entries()} - set(result.files)
    kept = set()
    for file in files:
        with Image.open(file) as picture:
            kept.add(picture.tobytes())
    assert kept == seen


def test_a_killed_grid_is_taken_up_again(tmp_path: Path) -> None:
    child = subprocess.Popen(
        [sys.executable, "-c", CHILD, str(tmp_path / "home")],
        cwd=Path(__file__).parents[2],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        text=True,
    )
    assert child.stdout is not None
    for line in child.stdout:
        if int(line) >= 1:
            child.send_signal(signal.SIGKILL)
    child.wait()
    (left,) = unfinished(tmp_path / "home", "sd15")
    assert 1 <= left.done < 4
    studio = real(tmp_path / "home")
    asked: list[Request] = []

    def counted(request: Request, stop: threading.Event, owner: str) -> Iterator[Event]:
        asked.append(request)
        yield from studio.generate(request, stop, owner)

    result, _ = painted(studio, left.grid(), generate=counted)
    assert asked == [cell.request for cell in DEMO.cells()][left.done :]
    again, _ = painted(real(tmp_path / "other"), DEMO)
    assert result.images[0].tobytes() == again.images[0].tobytes()
