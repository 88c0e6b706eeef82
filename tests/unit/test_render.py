"""The pictures of memory: the plan's bars, the meter of a run, and what the Models tab lists."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from backend import Hardware, Settings, Studio, catalog
from backend.downloads import FAILED, PAUSED, RUNNING, WAITING, Download, Downloads
from backend.events import Result, Step
from backend.manager import LoadedPart
from backend.memory.hardware import GIB
from backend.memory.plan import TITLES, Plan, PlannedComponent, PlannedPhase
from backend.weights import local
from ui import checkpoints, memory, models, render, words

MIB = 2**20


def part(name: str, gib: float, placement: str = "resident", **facts: Any) -> PlannedComponent:
    size = int(gib * GIB)
    given: dict[str, Any] = {"precision": "bfloat16", "bytes": size, "held_bytes": size, "device": "cuda"}
    return PlannedComponent(name=name, placement=placement, **{**given, **facts})


def planned(*phases: tuple[str, float, list[PlannedComponent]], budget: float = 7.5, **facts: Any) -> Plan:
    """A plan whose phases' peaks are what is held and what the work takes."""
    named = tuple(
        PlannedPhase(name=name, work_bytes=int(work * GIB), peak_bytes=0, components=tuple(parts))
        for name, work, parts in phases
    )
    decisions = ("It fits.", "T5 runs with 8 bits a weight.")
    given: dict[str, Any] = {"device": "cuda", "fits": True, "decisions": decisions}
    plan = Plan(budget_bytes=int(budget * GIB), peak_bytes=0, phases=named, **{**given, **facts})
    peaks = [phase.work_bytes + sum(held.held_bytes for held in plan.held(phase)) for phase in named]
    summed = tuple(replace(phase, peak_bytes=peak) for phase, peak in zip(named, peaks, strict=True))
    return replace(plan, phases=summed, peak_bytes=max(peaks))


def sd3(budget: float = 7.5, **facts: Any) -> Plan:
    clips = [part("text_encoder", 0.25, "swapped"), part("text_encoder_2", 1.25, "swapped")]
    return planned(
        ("encode_clip", 0.25, clips),
        ("encode_t5", 0.5, [part("text_encoder_3", 5.5, "swapped", precision="int8")]),
        ("denoise", 1.0, [part("transformer", 4.0, "streamed", held_bytes=2 * GIB)]),
        ("decode", 2.0, [part("vae", 0.25)]),
        budget=budget,
        **facts,
    )


def tracks(html: str) -> list[str]:
    """What is within each bar."""
    return re.findall(r'<div class="track".*?</div>', html)


def widths(track: str) -> dict[str, float]:
    """Percent by class."""
    return {
        name: float(width) for name, width in re.findall(r'<i class="([^"]+)" style="width:([\d.]+)%', track)
    }


def listed(html: str) -> list[list[str]]:
    """What is said under each bar."""
    under = re.findall(r'<ul class="parts">(.*?)</ul>', html)
    return [[text(item) for item in re.findall(r"<li.*?>(.*?)</li>", each)] for each in under]


def text(html: str) -> str:
    return re.sub(r"<[^>]+>", "", html)


# ---- the plan


def test_a_bar_a_phase_on_one_scale() -> None:
    html = memory.picture(sd3())
    encode, t5, denoise, decode = map(widths, tracks(html))
    assert encode == pytest.approx(
        {"k-clip": 3.33, "k-clip-2": 16.67, "k-pixels idle": 3.33, "k-work": 3.33}, abs=0.01
    )
    assert t5 == pytest.approx({"k-t5": 73.33, "k-pixels idle": 3.33, "k-work": 6.67}, abs=0.01)
    assert denoise == pytest.approx({"k-main": 26.67, "k-pixels idle": 3.33, "k-work": 13.33}, abs=0.01)
    assert decode == pytest.approx({"k-pixels": 3.33, "k-work": 26.67}, abs=0.01)
    assert "--limit:1.0000" in html
    assert "7.5 GiB may be used" in html
    assert "too much" not in html
    assert 'data-fits="yes"' in html


def test_what_is_said_under_the_bars() -> None:
    assert listed(memory.picture(sd3())) == [
        [
            "Text encoder 256 MiB, 16 bit, in for its phase",
            "Second text encoder 1.2 GiB, 16 bit, in for its phase",
            "VAE 256 MiB",
            "Work 256 MiB",
        ],
        ["T5 5.5 GiB, 8 bit, in for its phase", "VAE 256 MiB", "Work 512 MiB"],
        ["Transformer 4.0 GiB, 16 bit, streamed: 2.0 of 4.0 GiB at once", "VAE 256 MiB", "Work 1.0 GiB"],
        ["VAE 256 MiB, 16 bit, stays", "Work 2.0 GiB"],
    ]


def test_a_bar_has_words_for_those_who_do_not_see_it() -> None:
    track = tracks(memory.picture(sd3(budget=6)))[1]
    assert 'role="img"' in track
    assert (
        'aria-label="Reading the prompt with T5: 6.2 GiB of the 6.0 GiB that may be used, 256 MiB too much. '
        'T5 5.5 GiB; VAE 256 MiB, not in use; work 512 MiB."'
    ) in track


def test_what_does_not_fit_is_marked() -> None:
    plan = sd3(budget=5, fits=False, decisions=("Does not fit a 5 GiB card.",))
    html = memory.picture(plan)
    assert 'data-fits="no"' in html
    assert re.findall(r'<li class="phase( over)?">', html) == ["", " over", "", ""]
    assert "<em>1.2 GiB too much</em>" in html
    assert "--limit:0.8000" in html
    assert '<i class="excess" style="left:80.0%;width:20.0%"></i>' in tracks(html)[1]
    assert html.index("Does not fit") < html.index("too much")


def test_a_part_on_the_cpu_has_no_bar() -> None:
    t5 = part("text_encoder_3", 8.9, "cpu", held_bytes=0, device="cpu", home="ram")
    html = memory.picture(
        planned(("encode_t5", 0, [t5]), ("denoise", 1, [part("transformer", 4, "swapped")]))
    )
    assert widths(tracks(html)[0]) == {}
    assert listed(html)[0] == ["T5 8.9 GiB, 16 bit, on the CPU, in RAM"]
    assert "Reading the prompt with T5 <span>nothing</span>" in html


def test_mapped_weights_take_nothing_on_a_cpu() -> None:
    where: Any = {"device": "cpu"}
    unet, vae = part("unet", 1.6, held_bytes=0, **where), part("vae", 0.15, held_bytes=10 * MIB, **where)
    html = memory.picture(planned(("denoise", 1, [unet]), ("decode", 2, [vae]), **where))
    assert set(widths(tracks(html)[0])) == {"k-pixels idle", "k-work"}
    assert listed(html)[0][0] == "UNet 1.6 GiB, 16 bit, read from its file"
    assert listed(html)[1][0] == "VAE 154 MiB, 16 bit, 10.0 MiB of it copied"
    assert "Weights that are read where they lie in their files take no memory" in html
    assert "take no memory" not in memory.picture(sd3())


def test_a_bar_is_of_the_card_that_its_phase_runs_on() -> None:
    there: Any = {"device": "cuda:1"}
    plan = planned(
        ("encode_t5", 1, [part("text_encoder_3", 5)]), ("denoise", 1, [part("transformer", 4, **there)])
    )
    html = memory.picture(plan)
    assert [set(widths(track)) for track in tracks(html)] == [{"k-t5", "k-work"}, {"k-main", "k-work"}]
    assert listed(html)[1][0] == "Transformer 4.0 GiB, 16 bit, stays, on cuda:1"


def test_a_budget_far_beyond_leaves_something_to_see() -> None:
    """The demo takes a thousandth of what may be used."""
    html = memory.picture(planned(("denoise", 0.01, [part("unet", 0.01)]), budget=20))
    assert "bars cut" in html
    assert sum(widths(tracks(html)[0]).values()) == pytest.approx(memory.NEAR, abs=0.1)
    assert "--limit:1.0000" in html
    assert "20.0 GiB may be used" in html


def test_every_component_has_a_colour_and_a_name() -> None:
    assert set(memory.COLOURS) | {"previewer"} == set(TITLES)
    style = (Path(__file__).parents[2] / "assets" / "style.css").read_text()
    for colour in {*memory.COLOURS.values(), "other", "work"}:
        assert f".k-{colour} {{ --k: var(--{colour}); }}" in style
    for names in (("text_encoder", "text_encoder_2", "text_encoder_3", "transformer", "vae"),):
        assert len({memory.COLOURS[name] for name in names}) == len(names)
    for name in TITLES:
        assert "_" not in words.part(name)


def test_what_comes_from_outside_is_escaped() -> None:
    strange = "<b onmouseover=alert(1)>"
    odd = part(strange, 1, strange, precision=strange, device="cuda:1")
    html = memory.picture(planned((strange, 1, [odd]), decisions=(strange, strange)))
    assert strange not in html
    assert strange not in memory.no_plan(strange)


# ---- while it runs


def test_the_meter() -> None:
    plan = sd3()
    step = Step(phase="denoise", step=3, steps=20, eta_s=2.0, memory_bytes=5 * GIB)
    html = render.step(step, plan)
    assert "memory" in html
    assert "<span>5.0 of 7.5 GiB</span>" in html
    assert 'aria-valuetext="5.0 of 7.5 GiB, at most 6.2 GiB planned"' in html
    assert '<i style="width:66.67%"></i><b style="left:83.33%"></b>' in html
    assert "meter" not in render.step(replace(step, memory_bytes=0), plan)
    assert "meter" not in render.step(step)


def test_the_peak_beside_the_planned_one(tmp_path: Path) -> None:
    result = Result(
        images=[], files=[tmp_path / "1.png"], seeds=[1], plan=sd3(), timings={"total": 2.0}, settings={},
        peak_bytes=int(5.1 * GIB),
    )  # fmt: skip
    assert "1 picture in 2.0 s · peak memory 5.1 GiB, planned 6.2 GiB" in render.done(result)
    assert "planned" not in render.done(replace(result, peak_bytes=0))


# ---- words


@pytest.mark.parametrize(
    ("some", "whole", "said"),
    [
        (int(2.1 * GIB), int(3.9 * GIB), "2.1 of 3.9 GiB"),
        (922 * MIB, int(1.3 * GIB), "922 MiB of 1.3 GiB"),
        (0, GIB, "0 KiB of 1.0 GiB"),
    ],
)
def test_shares(some: int, whole: int, said: str) -> None:
    assert words.share(some, whole) == said


# ---- models


class Machine(Studio):
    """A studio with parts in memory that are not there."""

    def __init__(self, *parts: LoadedPart, public: bool = False) -> None:
        super().__init__(Settings(device="cpu", public=public, offline=True), Hardware.card(8, count=2))
        self.parts = list(parts)

    def loaded(self) -> list[LoadedPart]:
        return self.parts

    def free(self, key: str | None = None) -> bool:
        before = len(self.parts)
        self.parts = [part for part in self.parts if part.lent or (key is not None and part.key != key)]
        return len(self.parts) < before


def in_memory(name: str, **facts: Any) -> LoadedPart:
    given: dict[str, Any] = {
        "checkpoint": "sd3-medium", "family": "sd3", "precision": "int8", "placement": "resident",
        "where": "cuda", "key": f"{name}!", "bytes": GIB, "lent": False,
    }  # fmt: skip
    return LoadedPart(name=name, **{**given, **facts})


def test_the_machine_and_what_is_loaded() -> None:
    html = models.shown(Machine(in_memory("text_encoder_3", where="RAM", placement="swapped")))
    for said in (
        "an 8 GiB card",
        "8.0 of 8.0 GiB free",
        "16 bit (bfloat16)",
        "cuda:1",
        "7.5 GiB may be used now",
    ):
        assert said in html
    for cell in ("T5", "sd3-medium", "8 bit", "in RAM, waiting", "1.0 GiB"):
        assert f"{cell}</td>" in html
    assert 'data-key="text_encoder_3!"' in html
    assert "Nothing" in models.shown(Machine())


def test_parts_are_freed() -> None:
    studio = Machine(in_memory("unet"), in_memory("vae"), in_memory("text_encoder", lent=True))
    assert models.freed(studio, "unet!") == "Freed the UNet: 1.0 GiB."
    assert models.freed(studio, "unet!") == "That is no longer loaded."
    assert (
        models.freed(studio, "text_encoder!") == "Not freed: a picture is being made with the text encoder."
    )
    assert models.freed(studio, models.EVERYTHING) == "Freed what was not in use."
    assert [part.name for part in studio.parts] == ["text_encoder"]
    assert models.freed(studio, None) == "That is no longer loaded."
    assert "in use" in models.shown(studio)


NOBODY = models.gr.Request()


@pytest.mark.parametrize("data", [None, 5, [], "x", {"key": None}, {"key": 5}, {"other": ""}])
def test_whatever_is_posted_to_the_handlers(data: Any) -> None:
    studio = Machine(in_memory("unet"))
    event = models.gr.EventData(None, data)
    assert "no longer loaded" in models.freeing(studio)(event, NOBODY)
    assert "nothing that can be done" in models.acting(studio, Downloads(studio))(event, NOBODY)[1]
    assert studio.parts


def test_strangers_free_nothing_and_see_what_is_there() -> None:
    studio = Machine(in_memory("unet"), public=True)
    for key in ("unet!", models.EVERYTHING):
        assert "public server" in models.freed(studio, key)
    assert studio.parts
    assert models.shown(studio) == checkpoints.own(studio.settings) == ""
    html = checkpoints.shelf(studio, Downloads(studio))
    assert html.count("Postcards, the built-in demo") == 3
    assert "<button" not in html
    assert "sd3-medium" not in html
    for act in ("start", "remove"):
        assert "public server" in models.acted(Downloads(studio), act, "sd15/sd15")


def test_what_is_loaded_is_escaped() -> None:
    strange = '"><script>'
    html = models.shown(Machine(in_memory(strange, key=strange, checkpoint=strange, where=strange)))
    assert strange not in html


# ---- checkpoints


class Line(Downloads):
    """Downloads that are as they are said to be."""

    def __init__(self, studio: Studio, *said: Download) -> None:
        super().__init__(studio)
        self.said = {(each.family, each.name): each for each in said}

    def status(self, family: str, name: str) -> Download | None:
        return self.said.get((family, name))

    def working(self) -> bool:
        return any(each.state == RUNNING for each in self.said.values())


def shelf(*said: Download, **settings: Any) -> str:
    studio = Machine()
    given: dict[str, Any] = {"offline": False, "models_dir": Path("/nowhere"), **settings}
    studio.settings = replace(studio.settings, **given)
    return checkpoints.shelf(studio, Line(studio, *said))


def download(state: str, **facts: Any) -> Download:
    given: dict[str, Any] = {"here_bytes": int(1.2 * GIB), "total_bytes": int(3.4 * GIB), **facts}
    return Download(family="sd15", name="sd15", state=state, **given)


def test_checkpoints_with_size_and_terms() -> None:
    html = shelf()
    for entry in catalog.CATALOGUE:
        assert entry.title in html
    for said in ("14.4 GiB", "11.5 GiB", "comes with Triptych", "Open RAIL-M", "not downloaded"):
        assert said in html
    assert html.count(">Download</button>") == 6
    assert "data-busy" not in html
    assert ">Download</button>" not in shelf(offline=True)


def test_a_running_download() -> None:
    html = shelf(download(RUNNING, part="unet", speed=12.0 * MIB))
    assert 'aria-valuenow="35.3"><i style="width:35.3%"></i>' in html
    assert "1.2 of 3.4 GiB<small>the UNet · 12.0 MiB a second · 3 min 08 s left</small>" in html
    assert (
        'data-do="pause" data-key="sd15/sd15" aria-label="Pause the download of Stable Diffusion 1.5"' in html
    )
    assert "data-busy" in html
    assert "popovertarget" not in html  # what is on its way is not removed
    unknown = shelf(download(RUNNING, total_bytes=0))
    assert "asking the hub…" in unknown
    assert "aria-valuenow" not in unknown


def test_a_paused_a_waiting_and_a_failed_one() -> None:
    html = shelf(download(PAUSED))
    assert "paused at 1.2 of 3.4 GiB" in html
    assert 'aria-label="Resume the download of Stable Diffusion 1.5"' in html
    assert 'popovertarget="remove-sd15-sd15"' in html
    assert "paused</div>" in shelf(download(PAUSED, total_bytes=0))
    assert "waits for its turn" in shelf(download(WAITING))
    error = "it is gated: visit https://hub.example/a/b, accept <its> licence"
    html = shelf(download(FAILED, error=error))
    assert (
        'visit <a href="https://hub.example/a/b" target="_blank" rel="noopener">https://hub.example/a/b</a>,'
        in html
    )
    assert "accept &lt;its&gt; licence" in html
    assert ">Try again</button>" in html


def test_what_came_of_a_click() -> None:
    studio = Machine()
    line = Line(studio)
    assert "downloads are off (--offline)" in models.acted(line, "start", "sd15/sd15")
    assert "what can be downloaded of" in models.acted(line, "start", "sd15/<b>")
    assert "is paused; it goes on from there" in models.acted(line, "pause", "sd15/sd15")
    html = checkpoints.shelf(studio, line, told="<b>", about='"x')
    assert 'data-about="&quot;x">&lt;b&gt;</p>' in html


# ---- of one's own


def test_how_to_have_files_of_ones_own_listed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(local, "found", lambda settings: local.Found([], cut=False))
    assert "Start Triptych with --models-dir DIR" in checkpoints.own(Settings(home=tmp_path))
    empty = checkpoints.own(Settings(home=tmp_path, models_dir=tmp_path / "<mine>"))
    assert f"Nothing in {tmp_path}/&lt;mine&gt; yet." in empty


def test_files_of_ones_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    strange = '<b title="x">.safetensors'
    listed = [
        local.Local(name=strange, what="a LoRA", bytes=3 * GIB),
        local.Local(name="a.ckpt", what="", bytes=0, problem="<it> is empty"),
        local.Local(name="b", what="", bytes=5, family="sd3", note="without T5"),
    ]
    monkeypatch.setattr(local, "found", lambda settings: local.Found(listed, cut=True))
    html = checkpoints.own(Settings(home=tmp_path, models_dir=tmp_path))
    assert strange not in html
    assert "&lt;b title=&quot;x&quot;&gt;.safetensors</bdi>" in html
    assert "3.0 GiB" in html
    assert '<span class="problem">&lt;it&gt; is empty</span>' in html
    assert "<span>Stable Diffusion 3</span><small>without T5</small>" in html
    assert "only the first 5000 files and folders were looked at" in html
