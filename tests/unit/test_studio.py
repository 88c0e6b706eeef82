"""The front door: the order of events, cancelling, kept results, what is written, what fails safely."""

from __future__ import annotations

import json
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from backend import (
    Cancelled,
    CheckpointError,
    Hardware,
    InvalidRequest,
    OutOfMemory,
    SD15Request,
    Settings,
    StorageError,
    Studio,
)
from backend.events import Finished, Loading, Planned, Step, Waiting
from backend.memory.hardware import GIB
from backend.memory.plan import RESERVE_BYTES, PlannedComponent
from backend.phases import Component
from backend.sd15 import pipeline as sd15
from backend.sd15.unet import UNet
from backend.weights.source import FolderSource
from tests.checkpoints import sd15_folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return sd15_folder(tmp_path_factory.mktemp("checkpoint") / "tiny")


@pytest.fixture
def studio(tmp_path: Path) -> Studio:
    return Studio(Settings(device="cpu", dtype="float32", home=tmp_path / "home"))


def request(folder: Path, **fields: Any) -> SD15Request:
    values: dict[str, Any] = {"prompt": "a red house", "seed": 1, "steps": 3, "width": 64, "height": 64}
    return SD15Request(checkpoint=str(folder), **values | fields)


@pytest.fixture
def forwards(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The batch size of every UNet forward."""
    seen: list[int] = []
    forward = UNet.forward

    def counted(self: UNet, latents: Any, *rest: Any) -> Any:
        seen.append(len(latents))
        return forward(self, latents, *rest)

    monkeypatch.setattr(UNet, "forward", counted)
    return seen


def test_events_come_in_order_and_tell_it_all(studio: Studio, folder: Path) -> None:
    events = list(studio.generate(request(folder, num_images=2)))
    assert isinstance(events[0], Planned)
    assert {e.component for e in events if isinstance(e, Loading)} == {"text_encoder", "unet", "vae"}
    steps = [(e.phase, e.step, e.steps) for e in events if isinstance(e, Step)]
    assert steps == [
        ("encode", 1, 1),
        *(("denoise", i, 3) for i in (1, 2, 3)),
        ("decode", 1, 2),
        ("decode", 2, 2),
    ]
    previews = [e.previews for e in events if isinstance(e, Step) and e.previews]
    assert previews
    assert all(len(pictures) == 2 for pictures in previews)
    assert isinstance(events[-1], Finished)
    result = events[-1].result
    assert result.seeds == [1, 2]
    assert set(result.timings) == {"encode", "denoise", "decode", "total"}
    assert result.settings["sampler"] == "pndm"
    assert result.peak_bytes > 0
    assert result.plan.to_dict()["phases"][1]["components"][0]["name"] == "unet"


def test_files_are_png_with_parameters(studio: Studio, folder: Path) -> None:
    result = studio.run(
        request(folder, prompt="a red house, (night:1.2)", negative_prompt="sea", clip_skip=1)
    )
    assert [path.suffix for path in result.files] == [".png"]
    with Image.open(result.files[0]) as picture:
        text = picture.info["parameters"]
        assert np.array_equal(np.asarray(picture), np.asarray(result.images[0]))
    assert text.startswith("a red house, (night:1.2)\nNegative prompt: sea\nSteps: 3, Sampler: PLMS, ")
    for part in (
        "CFG scale: 7.5",
        "Seed: 1",
        "Size: 64x64",
        "Model: tiny",
        "Clip skip: 2",
        "Version: Triptych",
    ):
        assert part in text


def test_random_seed_is_reported_and_gives_the_picture_again(studio: Studio, folder: Path) -> None:
    first = studio.run(request(folder, seed=-1))
    again = studio.run(request(folder, seed=first.seeds[0]))
    other = studio.run(request(folder, seed=(first.seeds[0] + 1) % 2**32))
    assert np.array_equal(np.asarray(first.images[0]), np.asarray(again.images[0]))
    assert not np.array_equal(np.asarray(first.images[0]), np.asarray(other.images[0]))


def test_guidance_runs_in_one_batch_and_is_skipped_at_one(
    studio: Studio, folder: Path, forwards: list[int]
) -> None:
    studio.run(request(folder, sampler="ddim", num_images=3))
    assert forwards == [6, 6, 6]
    forwards.clear()
    studio.run(request(folder, sampler="ddim", guidance_scale=1.0))
    assert forwards == [1, 1, 1]


def test_kept_results_are_not_computed_again(
    studio: Studio, folder: Path, forwards: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    encodes: list[Any] = []
    encode = sd15.encode_prompts
    monkeypatch.setattr(sd15, "encode_prompts", lambda *a, **k: encodes.append(a) or encode(*a, **k))
    first = studio.run(request(folder, sampler="ddim"))
    again = studio.run(request(folder, sampler="ddim"))
    assert (len(encodes), len(forwards)) == (1, 3)
    assert np.array_equal(np.asarray(first.images[0]), np.asarray(again.images[0]))
    studio.run(request(folder, sampler="ddim", seed=2))  # the same prompt, another picture
    assert (len(encodes), len(forwards)) == (1, 6)
    studio.run(request(folder, sampler="ddim", prompt="a blue house"))
    assert (len(encodes), len(forwards)) == (2, 9)


def test_stop_ends_within_a_step_and_the_next_request_works(
    studio: Studio, folder: Path, forwards: list[int]
) -> None:
    stop = threading.Event()
    events = studio.generate(request(folder, steps=50, sampler="ddim"), stop)
    for event in events:
        if isinstance(event, Step) and event.phase == "denoise" and event.step == 2:
            break
    stop.set()
    with pytest.raises(Cancelled):
        next(events)
    assert len(forwards) == 2
    assert studio.run(request(folder)).images


def test_closing_the_generator_frees_the_device(studio: Studio, folder: Path) -> None:
    events = studio.generate(request(folder, steps=50))
    for event in events:
        if isinstance(event, Step):
            break
    events.close()  # type: ignore[attr-defined]
    assert studio.run(request(folder)).images


def test_a_second_request_waits_for_the_first(studio: Studio, folder: Path) -> None:
    first = studio.generate(request(folder))
    next(first)
    second = studio.generate(request(folder, seed=9))
    assert isinstance(next(second), Waiting)
    assert isinstance(list(first)[-1], Finished)
    assert isinstance(list(second)[-1], Finished)


def test_plan_loads_nothing(studio: Studio, folder: Path) -> None:
    plan = studio.plan(request(folder, width=512, height=512), hardware=Hardware.card(gib=6, ram_gib=32))
    assert plan.device == "cuda"
    assert plan.fits
    assert [phase.name for phase in plan.phases] == ["encode", "denoise", "decode"]
    assert plan.phases[2].work_bytes > 0
    assert studio.plan(request(folder), hardware=Hardware.card(gib=6)).peak_bytes < plan.peak_bytes
    assert not studio.loaded()


def test_published_checkpoint_is_planned_unseen(tmp_path: Path) -> None:
    studio = Studio(Settings(device="cpu", home=tmp_path, models_dir=tmp_path, offline=True))
    plan = studio.plan(SD15Request(checkpoint="sd15"), hardware=Hardware.card(gib=8))
    sizes = {part.name: part.bytes for phase in plan.phases for part in phase.components}
    assert sizes["unet"] == pytest.approx(1.719e9, rel=0.01)  # the published size in 16 bits
    assert plan.fits
    assert studio.plan(SD15Request(checkpoint="sd15"), hardware=Hardware.card(gib=2)).fits  # streamed
    assert not studio.plan(SD15Request(checkpoint="sd15"), hardware=Hardware.card(gib=0.6)).fits


def test_what_does_not_fit_is_refused_before_it_loads(folder: Path, tmp_path: Path) -> None:
    studio = Studio(Settings(device="cpu", dtype="float32", home=tmp_path, vram=0.51))
    events = studio.generate(request(folder, width=2048, height=2048))
    assert isinstance(next(events), Planned)
    with pytest.raises(OutOfMemory, match="needs .* MiB of it weights, and 10 MiB is at hand"):
        next(events)
    assert not studio.loaded()


def test_unwritable_home_is_said_before_the_work(folder: Path, tmp_path: Path, forwards: list[int]) -> None:
    (tmp_path / "home").write_text("a file where the folder should be")
    studio = Studio(Settings(device="cpu", dtype="float32", home=tmp_path / "home"))
    with pytest.raises(StorageError, match="home"):
        studio.run(request(folder))
    assert not forwards


def test_full_disk_loses_no_picture(studio: Studio, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any, **__: Any) -> Path:
        raise StorageError("the disk is full")

    monkeypatch.setattr(studio.gallery, "save", full)
    result = studio.run(request(folder, num_images=2))
    assert len(result.files) == 2
    assert all(path.is_file() for path in result.files)  # in a temporary folder
    assert "the disk is full" in result.notices[-1]

    monkeypatch.setattr(Image.Image, "save", full)
    with pytest.raises(StorageError) as caught:
        studio.run(request(folder, num_images=2))
    assert len(caught.value.images) == 2


def test_failed_request_frees_the_device(studio: Studio, folder: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError):
        studio.run(request(tmp_path / "nowhere"))
    with pytest.raises(InvalidRequest):
        studio.run(request(folder, steps=0))
    assert studio.run(request(folder)).images


def test_unload_forgets_everything(studio: Studio, folder: Path, forwards: list[int]) -> None:
    studio.run(request(folder, sampler="ddim"))
    studio.unload()
    assert not studio._manager.bytes_on("cpu")
    studio.run(request(folder, sampler="ddim"))
    assert len(forwards) == 6


def test_unet_of_nine_channels_is_refused_by_name(studio: Studio, tmp_path: Path) -> None:
    inpainting = sd15_folder(tmp_path / "inpainting", in_channels=9)
    with pytest.raises(CheckpointError, match="inpainting"):
        studio.run(request(inpainting))


def test_decoder_works_in_tiles_only_where_the_whole_does_not_fit(tmp_path: Path, folder: Path) -> None:
    studio = Studio(Settings(home=tmp_path))
    assert len(studio.plan(request(folder), hardware=Hardware.card(gib=0.51)).decisions) == 1
    large = request(folder, width=2048, height=2048)
    whole = studio.plan(large, hardware=Hardware.card(gib=24))
    tiled = studio.plan(large, hardware=Hardware.card(gib=1.5))
    assert len(whole.decisions) == 1
    assert "tiles" in tiled.decisions[1]
    assert tiled.phases[2].work_bytes < whole.phases[2].work_bytes / 4


def test_defaults_of_a_checkpoint_are_checked(studio: Studio, tmp_path: Path) -> None:
    wrong = sd15_folder(tmp_path / "wrong")
    (wrong / "triptych.json").write_text(json.dumps({"defaults": {"steps": 5000, "colour": "red"}}))
    with pytest.raises(CheckpointError, match="5000"):
        studio.run(request(wrong, steps=None))
    assert studio.run(request(wrong)).images


@pytest.mark.parametrize("fields", [{}, {"checkpoint": "sd15", "config_from": "/etc"}, {"checkpoint": "a/b"}])
def test_public_mode_reads_no_paths_of_strangers(
    tmp_path: Path, folder: Path, fields: dict[str, str]
) -> None:
    studio = Studio(Settings(device="cpu", home=tmp_path, public=True))
    with pytest.raises(InvalidRequest, match="on this public server it can be"):
        studio.run(replace(request(folder), **fields))
    with pytest.raises(InvalidRequest, match="public server"):
        studio.describe("sd15", str(folder))
    assert studio.plan(SD15Request(checkpoint="demo")).phases


def test_another_checkpoint_makes_room_for_itself(tmp_path: Path, folder: Path) -> None:
    other = sd15_folder(tmp_path / "other", seed=1)
    # in bfloat16, which their files are not in: what is mapped takes no memory, and need not leave
    roomy = Studio(Settings(device="cpu", dtype="bfloat16", home=tmp_path))
    peak = roomy.plan(request(folder)).peak_bytes
    cap = (RESERVE_BYTES["cpu"] + peak + 4096) / GIB
    tight = Studio(Settings(device="cpu", dtype="bfloat16", home=tmp_path, vram=cap))
    for studio, components in ((roomy, 6), (tight, 3)):
        studio.run(request(folder))
        studio.run(request(other))
        assert len(studio.loaded()) == components


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory"),
        MemoryError(),
    ],
)
def test_running_out_of_memory_is_said_and_survived(
    studio: Studio, folder: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def fail(*_: Any) -> None:
        raise error

    with monkeypatch.context() as patched:
        patched.setattr(UNet, "forward", fail)
        with pytest.raises(OutOfMemory, match="fewer images"):
            studio.run(request(folder))
    assert studio.run(request(folder)).images


def test_one_shortage_at_a_small_size_refuses_no_larger_picture(
    studio: Studio, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    large = request(folder, width=1024, height=1024)
    before = studio.plan(large)
    forward, failed = UNet.forward, []

    def once(self: UNet, *given: Any) -> Any:
        if not failed:
            failed.append(True)
            raise MemoryError
        return forward(self, *given)

    monkeypatch.setattr(UNet, "forward", once)
    (notice,) = studio.run(request(folder)).notices
    assert notice.startswith("Painting ran out of memory and is repeated with a leaner plan.")
    assert studio._lessons  # of 64×64 pixels, in a machine of many GiB
    assert before.fits
    assert studio.plan(large).fits


def test_describe_tells_the_defaults_of_any_checkpoint(studio: Studio, folder: Path, tmp_path: Path) -> None:
    told = studio.describe("sd15", str(folder)).defaults
    assert told == {"steps": 50, "guidance_scale": 7.5, "sampler": "pndm", "width": 64, "height": 64}
    assert studio.describe("sd15", "demo").defaults["width"] == 128
    assert studio.describe("sd15", "sd15").defaults["width"] == 512
    euler = sd15_folder(tmp_path / "euler")
    config = json.loads((euler / "scheduler" / "scheduler_config.json").read_text())
    config["_class_name"] = "EulerDiscreteScheduler"
    (euler / "scheduler" / "scheduler_config.json").write_text(json.dumps(config))
    assert studio.describe("sd15", str(euler)).defaults["sampler"] == "euler"


@pytest.mark.parametrize(
    "extras",
    [{"defaults": [1]}, {"latent_rgb": {"factors": [[1, 2, 3]]}}, {"latent_rgb": [[1, 2, 3]]}],
    ids=str,
)
def test_notes_of_a_checkpoint_are_checked(studio: Studio, tmp_path: Path, extras: dict[str, Any]) -> None:
    wrong = sd15_folder(tmp_path / "wrong")
    (wrong / "triptych.json").write_text(json.dumps(extras))
    with pytest.raises(CheckpointError, match=r"triptych\.json cannot be used"):
        studio.run(request(wrong))


def test_tokenizer_of_another_model_is_told(studio: Studio, tmp_path: Path) -> None:
    mixed = sd15_folder(tmp_path / "mixed")
    vocabulary = mixed / "tokenizer" / "vocab.json"
    ids = json.loads(vocabulary.read_text())
    vocabulary.write_text(json.dumps({token: index + 5000 for token, index in ids.items()}))
    for extra in ("tokenizer.json",):
        (mixed / "tokenizer" / extra).unlink(missing_ok=True)
    with pytest.raises(CheckpointError, match="does not belong"):
        studio.run(request(mixed))


def test_a_download_is_planned_again_by_what_came(
    studio: Studio, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loading = Loading(component="unet", action="download", done_bytes=1, total_bytes=1)
    monkeypatch.setattr(FolderSource, "fetch", lambda *_: iter([loading]))
    plans = [event for event in studio.generate(request(folder)) if isinstance(event, Planned)]
    assert len(plans) == 2


def test_the_plan_can_be_asked_for_while_components_come_and_go(studio: Studio, folder: Path) -> None:
    part = Component(
        name="unet", identity=0, bytes=1, precision="float32", dtype="float32", load=lambda device: object()
    )
    planned = PlannedComponent(
        name="unet", placement="resident", precision="float32", bytes=1, held_bytes=1, device="cpu"
    )
    done = threading.Event()

    def churn() -> None:
        try:
            for identity in range(300):
                with studio._manager.use(replace(part, identity=identity), planned):
                    pass
        finally:
            done.set()  # else a failure would keep the test waiting for ever

    thread = threading.Thread(target=churn)
    thread.start()
    while not done.is_set():
        assert studio._manager.bytes_on("cpu") >= 0
    thread.join()
    assert studio._manager.bytes_on("cpu") == 300
