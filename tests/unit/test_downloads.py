"""Downloads of checkpoints, against the small hub of test_hub: the line, pausing, resuming, removing."""

from __future__ import annotations

import hashlib
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import pytest

from backend import Hardware, Settings, Studio, downloads
from backend.downloads import DONE, FAILED, PAUSED, RUNNING, WAITING, Download, Downloads
from backend.errors import AccessError, CheckpointError, InvalidRequest
from backend.manager import LoadedPart
from backend.requests import SD15Request, StableCascadeRequest
from backend.weights import hub
from backend.weights.source import resolve
from tests.checkpoints import cascade_folder, sd3_folder
from tests.unit.test_hub import UNET, Hub, folder, server

FIXTURES = (folder, server)  # found here by pytest

SD15 = "stable-diffusion-v1-5/stable-diffusion-v1-5"
SD3 = "stabilityai/stable-diffusion-3-medium-diffusers"
HELD = 1_000_000  # bytes of a file that come before the gate is open


@pytest.fixture
def published(server: Hub, folder: Path) -> Iterator[Hub]:
    """The hub with a tiny checkpoint under the name of the published one."""
    server.folders[SD15] = folder
    yield server
    server.gate.set()


@pytest.fixture
def held(published: Hub) -> Hub:
    """It keeps back the rest of every large file."""
    published.hold_after = HELD
    return published


class Line:
    """Downloads as one run of the program has them."""

    def __init__(self, folder: Path, **settings: Any) -> None:
        given: dict[str, Any] = {"dtype": "float32", **settings}
        self.settings = Settings(home=folder / "home", models_dir=folder / "models", **given)
        self.studio = Studio(self.settings, Hardware.card(gib=24, ram_gib=64))
        self.downloads = Downloads(self.studio)

    def start(self, name: str = "sd15", family: str = "sd15") -> None:
        self.downloads.start(family, name)

    def pause(self, name: str = "sd15", family: str = "sd15") -> None:
        self.downloads.pause(family, name)

    def status(self, name: str = "sd15", family: str = "sd15") -> Download | None:
        return self.downloads.status(family, name)

    def until(self, state: str, name: str = "sd15", family: str = "sd15", least: int = 0) -> Download:
        """Wait for a state, and for so many bytes."""

        def there() -> Download | None:
            status = self.status(name, family)
            assert status is not None
            assert state == FAILED or status.state != FAILED, status.error
            return status if status.state == state and status.here_bytes >= least else None

        return wait_for(there)

    def half(self) -> int:
        """The bytes of the file that is half here."""
        (part,) = (self.settings.models_dir or Path()).rglob("*.part")
        assert part.stat().st_size > 0
        return part.stat().st_size

    def idle(self) -> None:
        wait_for(self.downloads.idle)


def wait_for(there: Callable[[], Any]) -> Any:
    end = time.monotonic() + 60
    while time.monotonic() < end:
        if found := there():
            return found
        time.sleep(0.01)
    raise AssertionError("nothing came of it")


@pytest.fixture
def line(published: Hub, tmp_path: Path) -> Iterator[Line]:
    line = Line(tmp_path)
    yield line
    published.gate.set()
    line.downloads.close()


def resumed(server: Hub) -> list[int]:
    """Where downloads began that did not at the beginning."""
    begun = [int(asked.removeprefix("bytes=").rstrip("-")) for _, _, asked in server.requests if asked]
    return [first for first in begun if first > 0]


def size_of(folder: Path, *parts: str) -> int:
    return sum(path.stat().st_size for part in parts for path in (folder / part).rglob("*") if path.is_file())


# ---- how far it is


def test_a_download_tells_how_far_it_is(held: Hub, line: Line, folder: Path) -> None:
    assert line.status() is None
    line.start()
    half = line.until(RUNNING, least=HELD)
    parts = ("unet", "vae", "text_encoder", "tokenizer", "scheduler")
    due = size_of(folder, *parts) + (folder / "model_index.json").stat().st_size
    assert half.total_bytes == due
    assert HELD <= half.here_bytes < due
    assert half.part in parts
    assert line.downloads.working()
    held.gate.set()
    done = line.until(DONE)
    assert done.here_bytes == done.total_bytes == due
    assert not line.downloads.working()
    source = resolve("sd15", "sd15", line.settings)
    assert source.present(["unet", "vae", "text_encoder", "tokenizer", "scheduler"], "float32")


def test_speed_and_time_left(monkeypatch: pytest.MonkeyPatch) -> None:
    job = downloads._Job(downloads.catalog.entries("sd15")[1], RUNNING)
    now = [100.0]
    monkeypatch.setattr(downloads.time, "monotonic", lambda: now[0])
    assert job.told.seconds_left is None
    for second in range(30):
        now[0] = 100.0 + second
        job.measure = partial(downloads.Amount, 1000 * second, 50_000)
        job.look()
    assert job.told.speed == 1000
    assert job.told.seconds_left == 21
    now[0] += 2 * downloads.STALLED
    assert job.told.speed == 0  # a line that hangs has no time left to tell


def test_done_already(published: Hub, line: Line) -> None:
    line.start()
    line.until(DONE)
    published.requests.clear()
    line.start()
    line.idle()
    assert line.until(DONE)
    assert published.requests == []


# ---- pausing and going on


def test_a_paused_download_goes_on_where_it_stopped(held: Hub, line: Line, folder: Path) -> None:
    line.start()
    line.until(RUNNING, least=HELD)
    line.pause()
    paused = line.until(PAUSED)
    assert paused.here_bytes >= HELD
    assert paused.speed == 0
    held.gate.set()
    line.idle()
    half = line.half()
    line.start()
    line.until(DONE)
    assert resumed(held) == [half]
    local = resolve("sd15", "sd15", line.settings)
    for name in ("unet", "vae", "text_encoder"):
        for path in local.files(name, "float32"):
            assert path.read_bytes() == (folder / name / path.name).read_bytes()


def test_paused_and_resumed_at_once(held: Hub, line: Line, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before the thread goes on."""
    line.start()
    line.until(RUNNING, least=HELD)
    following = line.downloads._next
    monkeypatch.setattr(line.downloads, "_next", lambda: following() if held.gate.wait(60) else None)
    line.pause()
    line.start()
    status = line.status()
    assert status is not None
    assert status.state == WAITING
    held.gate.set()
    line.until(DONE)


def test_a_restart_begins_nothing_and_knows_what_is_half_here(
    held: Hub,
    tmp_path: Path,
    folder: Path,
) -> None:
    before = Line(tmp_path)
    before.start()
    before.until(RUNNING, least=HELD)
    held.gate.set()
    before.pause()
    before.idle()
    began, half = before.until(PAUSED), before.half()
    held.requests.clear()

    after = Line(tmp_path)
    found = after.until(PAUSED)
    assert HELD <= found.here_bytes < found.total_bytes == began.total_bytes
    assert not after.downloads.working()
    assert held.requests == []  # it is told without the hub
    after.start()
    assert after.until(DONE).here_bytes == found.total_bytes
    assert resumed(held) == [half]


def test_closing_stops_within_a_second(held: Hub, line: Line) -> None:
    line.start()
    line.until(RUNNING, least=HELD)
    begin = threading.Thread(target=line.downloads.close)
    begin.start()
    begin.join(30)
    assert not begin.is_alive()
    held.gate.set()
    line.idle()
    assert not resolve("sd15", "sd15", line.settings).present(["unet", "vae", "text_encoder"], "float32")
    line.start()  # a click that comes too late
    line.until(PAUSED)
    assert not line.downloads.working()


# ---- one after the other


def test_one_at_a_time_in_the_order_of_asking(held: Hub, line: Line, sd3: Path) -> None:
    held.folders[SD3] = sd3
    line.start()
    line.until(RUNNING, least=HELD)
    line.start("sd3-medium", "sd3")
    second = line.status("sd3-medium", "sd3")
    assert second is not None
    assert second.state == WAITING
    assert not any(SD3 in path for _, path, _ in held.requests)
    held.gate.set()
    line.until(DONE)
    line.until(DONE, "sd3-medium", "sd3")
    assert resolve("sd3-medium", "sd3", line.settings).present(["transformer", "text_encoder_3"], "float32")


def test_what_waits_can_leave_the_line(held: Hub, line: Line, sd3: Path) -> None:
    held.folders[SD3] = sd3
    line.start()
    line.until(RUNNING, least=HELD)
    line.start("sd3-medium", "sd3")
    line.pause("sd3-medium", "sd3")
    line.until(PAUSED, "sd3-medium", "sd3")
    held.gate.set()
    line.until(DONE)
    line.idle()
    assert not any(SD3 in path for _, path, _ in held.requests)


@pytest.fixture(scope="module")
def sd3(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return sd3_folder(tmp_path_factory.mktemp("sd3") / "tiny")


def test_lite_stages_are_left_out_where_the_full_ones_fit(published: Hub, tmp_path: Path) -> None:
    halves = cascade_folder(tmp_path / "cascade")
    for name in ("stable-cascade-prior", "stable-cascade"):
        published.folders[f"stabilityai/{name}"] = halves / name
    for gib, full in ((24, True), (3, False)):
        line = Line(tmp_path / str(gib), dtype="auto")
        line.studio = Studio(line.settings, Hardware.card(gib=gib, ram_gib=16))
        line.downloads = Downloads(line.studio)
        line.start("stable-cascade", "stable_cascade")
        done = line.until(DONE, "stable-cascade", "stable_cascade")
        assert done.here_bytes == done.total_bytes
        source = resolve("stable-cascade", "stable_cascade", line.settings)
        assert source.present(["vqgan", "text_encoder", "tokenizer"], "bfloat16")
        for name in ("prior", "decoder"):
            assert source.present([name], "bfloat16") is full
            assert source.present([f"{name}_lite"], "bfloat16") is not full


# ---- what goes wrong


def test_a_damaged_file_is_removed_and_told(published: Hub, line: Line) -> None:
    published.corrupt = True
    line.start()
    failed = line.until(FAILED)
    assert "arrived damaged and was removed; try again" in failed.error
    published.corrupt = False
    line.start()
    assert line.until(DONE).error == ""


def test_small_files_are_checked_by_the_sum_that_git_has(tmp_path: Path) -> None:
    content = b'{"a": 1}'
    blobs = tmp_path / "blobs"
    blobs.mkdir()
    names = (
        hashlib.sha1(b"blob 8\0" + content).hexdigest(),
        hashlib.sha1(content).hexdigest(),
        hashlib.sha256(content).hexdigest(),
        "no-sum-that-is-known",
    )
    for name in names:
        (blobs / name).write_bytes(content)
        link = tmp_path / "config.json"
        link.symlink_to(blobs / name)
        hub._check_small(link, "config.json")
        assert link.is_file()
        if name == names[-1]:
            break
        (blobs / name).write_bytes(content.replace(b"1", b"2"))
        with pytest.raises(CheckpointError, match="config.json arrived damaged and was removed"):
            hub._check_small(link, "config.json")
        assert not link.is_symlink()
        assert not (blobs / name).exists()


def test_a_refusal_is_told_in_words(published: Hub, line: Line) -> None:
    published.refusals[SD15] = (401, "GatedRepo")
    line.start()
    error = line.until(FAILED).error
    assert f"is gated: visit {published.url}/{SD15}, accept its licence there, and give a token" in error
    assert not line.downloads.working()


def test_a_failure_lets_the_next_one_go_on(published: Hub, line: Line, sd3: Path) -> None:
    published.folders[SD3] = sd3
    published.refusals[SD15] = (500, "")
    line.start()
    line.start("sd3-medium", "sd3")
    assert "answered 500" in line.until(FAILED).error
    line.until(DONE, "sd3-medium", "sd3")


def test_a_full_disk_is_told_before_the_first_large_file(
    published: Hub, line: Line, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage("/")._replace(free=1_000_000)
    monkeypatch.setattr(downloads.shutil, "disk_usage", lambda path: usage)
    line.start()
    assert "sd15 needs 0.0 GB more in" in line.until(FAILED).error
    assert not published.fetched(UNET)


def test_nothing_is_downloaded_offline(
    published: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(AccessError, match=r"sd15 is not downloaded: downloads are off \(--offline\)"):
        Line(tmp_path, offline=True).start()
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(AccessError, match="downloads are off"):
        Line(tmp_path).start()
    assert published.requests == []


@pytest.mark.parametrize("what", ["sd15/demo", "sd15/sd3-medium", "x/y", "sd3/../x"])
def test_only_the_catalogue_is_downloaded(line: Line, what: str) -> None:
    family, _, name = what.partition("/")
    for act in (line.downloads.start, line.downloads.remove):
        with pytest.raises(InvalidRequest, match=r"what can be downloaded of .* is"):
            act(family, name)
    assert line.downloads.status(family, name) is None
    line.downloads.pause(family, name)


# ---- removing


def test_a_checkpoint_is_removed_from_the_disk(published: Hub, line: Line, folder: Path) -> None:
    line.start()
    line.until(DONE)
    line.idle()
    assert line.downloads.remove("sd15", "sd15") >= size_of(folder, "unet", "vae", "text_encoder")
    assert line.status() is None
    assert not resolve("sd15", "sd15", line.settings).present(["unet"], "float32")
    assert not list((line.settings.models_dir or Path()).glob("models--stable-*"))


def test_what_is_half_downloaded_is_removed_too(held: Hub, line: Line) -> None:
    line.start()
    line.until(RUNNING, least=HELD)
    with pytest.raises(InvalidRequest, match="sd15 is not removed: it is being downloaded"):
        line.downloads.remove("sd15", "sd15")
    line.pause()
    held.gate.set()
    line.idle()
    assert line.downloads.remove("sd15", "sd15") >= HELD
    assert line.status() is None


def test_what_is_in_use_is_not_removed(published: Hub, line: Line, monkeypatch: pytest.MonkeyPatch) -> None:
    line.start()
    line.until(DONE)
    line.idle()
    freed: list[str | None] = []
    facts: dict[str, Any] = {"precision": "float32", "placement": "resident", "where": "cpu", "bytes": 1}
    loaded = [
        LoadedPart(key=f"{name}{number}", name=name, checkpoint=checkpoint, family="sd15", lent=lent, **facts)
        for number, (name, checkpoint, lent) in enumerate(
            (("unet", "sd15", True), ("vae", "sd15", False), ("unet", "demo", False))
        )
    ]
    monkeypatch.setattr(line.studio, "loaded", lambda: loaded)
    monkeypatch.setattr(line.studio, "free", freed.append)
    with pytest.raises(InvalidRequest, match="sd15 is not removed: a picture is being made with it"):
        line.downloads.remove("sd15", "sd15")
    assert freed == []
    del loaded[0]
    assert line.downloads.remove("sd15", "sd15")
    assert freed == ["vae1"]


# ---- strangers


def test_strangers_download_and_remove_nothing(published: Hub, tmp_path: Path) -> None:
    line = Line(tmp_path, public=True)
    for act in (line.downloads.start, line.downloads.remove):
        with pytest.raises(InvalidRequest, match="public server"):
            act("sd15", "sd15")
    assert published.requests == []


def test_a_request_of_a_stranger_downloads_nothing(published: Hub, tmp_path: Path) -> None:
    studio = Line(tmp_path, public=True).studio
    with pytest.raises(InvalidRequest) as refused:
        list(studio.fetch(SD15Request(checkpoint="sd15")))
    assert str(refused.value) == (
        "checkpoint is 'sd15', which is not on this public server, and nothing is downloaded here; "
        "it can be demo"
    )
    with pytest.raises(InvalidRequest, match="checkpoint is 'stable-cascade', which is not on this public"):
        list(studio.fetch(StableCascadeRequest(checkpoint="stable-cascade")))
    assert published.requests == []
    assert list(studio.fetch(SD15Request())) == []


def test_what_is_here_in_part_is_named(published: Hub, tmp_path: Path) -> None:
    list(resolve("sd15", "sd15", Line(tmp_path).settings).fetch(["unet", "text_encoder"], "float32"))
    published.requests.clear()
    with pytest.raises(InvalidRequest, match="checkpoint is 'sd15', of which the VAE is not on this public"):
        list(Line(tmp_path, public=True).studio.fetch(SD15Request(checkpoint="sd15")))
    list(resolve("sd15", "sd15", Line(tmp_path).settings).fetch(["vae"], "float32"))
    published.requests.clear()
    assert list(Line(tmp_path, public=True).studio.fetch(SD15Request(checkpoint="sd15"))) == []
    assert published.requests == []
