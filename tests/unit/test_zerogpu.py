"""ZeroGPU with a package in the place of `spaces`: what crosses between processes, what is asked for."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

from backend import SD3Request, SD15Request, Settings, StableCascadeRequest, Studio, zerogpu
from backend.requests import Request
from tests import spaces_package

ROOT = Path(__file__).parents[2]
SMALL = "prompt='a red house', seed=7, width=64, height=64"
PRELUDE = """
import json, os, sys, threading, time
from pathlib import Path
from PIL import Image
from backend import *
from backend import zerogpu
from backend.events import Finished, Planned, Step, Waiting
settings = Settings(device="cpu", dtype="float32", home=Path(sys.argv[1]))
studio = Studio(settings)
paint = zerogpu.painting(studio, os.environ)
"""


def ran(tmp_path: Path, code: str, **extra: str) -> Any:
    """What a program in a Space prints as JSON."""
    variables = os.environ | spaces_package.write(tmp_path / "packages") | extra
    command = [sys.executable, "-c", PRELUDE + code, str(tmp_path / "home")]
    done = subprocess.run(command, cwd=ROOT, env=variables, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize(
    "request_code",
    [
        f"SD15Request({SMALL}, steps=2)",
        f"SD3Request({SMALL}, steps=2)",
        f"StableCascadeRequest({SMALL}, prior_steps=2, decoder_steps=1, images=(Image.new('RGB', (8, 8)),))",
    ],
)
def test_pictures_come_back_from_the_other_process(tmp_path: Path, request_code: str) -> None:
    code = f"""
import spaces
events = list(paint({request_code}, threading.Event()))
result = events[-1].result
print(json.dumps({{
    "kinds": list(dict.fromkeys(type(event).__name__ for event in events)),
    "files": [str(file) for file in result.files], "size": result.images[0].size, "seeds": result.seeds,
    "fits": result.plan.fits, "plan": result.plan.to_dict() == events[1].plan.to_dict(),
    "here": [part.name for part in studio.loaded()], "asked": spaces.asked,
}}))
"""
    said = ran(tmp_path, code)
    assert said["kinds"][:2] == ["Waiting", "Planned"]
    assert said["kinds"][-1] == "Finished"
    assert "Step" in said["kinds"]
    assert (said["size"], said["seeds"], said["fits"], said["plan"]) == ([64, 64], [7], True, True)
    assert all(Path(file).is_file() for file in said["files"])
    assert said["here"] == []  # nothing was loaded in the process that has no GPU
    assert said["asked"] == [zerogpu.LEAST]


def test_stopping_and_closing_reach_the_other_process(tmp_path: Path) -> None:
    code = f"""
request = SD15Request({SMALL}, steps=150, num_images=8)
stop = threading.Event()
said = []
try:
    for event in paint(request, stop):
        if isinstance(event, Step):
            stop.set()
except Cancelled as error:
    said.append(str(error))
begin = time.monotonic()
events = paint(request, threading.Event())
next(event for event in events if isinstance(event, Step))
events.close()
said.append(time.monotonic() - begin)
said.append(len(list(Path(os.environ["TMPDIR"]).glob("triptych-stop-*"))))
said.append([thread.name for thread in threading.enumerate() if thread.name == "stop"])
print(json.dumps(said))
"""
    (tmp_path / "tmp").mkdir()
    stopped, seconds, folders, threads = ran(tmp_path, code, TMPDIR=str(tmp_path / "tmp"))
    assert stopped == "Stopped."
    assert seconds < 20
    assert (folders, threads) == (0, [])
    assert not list((tmp_path / "home").rglob("*.png"))


def test_errors_come_back_as_they_are(tmp_path: Path) -> None:
    code = f"""
def told(request):
    try:
        list(paint(request, threading.Event()))
    except Exception as error:
        return [type(error).__name__, str(error)]
studio.generate, generate = lambda request, stop, owner: iter([1 // 0]), studio.generate
unexpected = told(SD15Request({SMALL}))
studio.generate = generate
missing = told(SD15Request({SMALL}, steps=1, checkpoint="/nowhere/at-all.safetensors"))
os.environ["SECONDS_LEFT"] = "5"
print(json.dumps([unexpected, missing, told(SD15Request({SMALL}))]))
"""
    unexpected, missing, refused = ran(tmp_path, code)
    what = "ZeroDivisionError: integer division or modulo by zero"
    assert unexpected == ["RuntimeError", f"in the process of the GPU: {what}"]
    assert missing[0] == "CheckpointError"
    assert "/nowhere/at-all.safetensors" in missing[1]
    said = "ZeroGPU quota exceeded: You have exceeded your quota (10s requested)"
    assert refused == ["AccessError", said]


def test_elsewhere_the_studio_paints_itself(tmp_path: Path) -> None:
    studio = Studio(Settings(home=tmp_path))
    assert zerogpu.painting(studio, {"SPACE_ID": "me/triptych"}) == studio.generate


@pytest.mark.parametrize(
    ("value", "there", "expected"),
    [
        ("true", True, True),
        ("1", True, True),
        ("0", True, False),
        ("true", False, False),
        (None, True, False),
    ],
)
def test_where_gpus_are_lent(
    value: str | None, there: bool, expected: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if there:
        spaces_package.write(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    assert zerogpu.present({"SPACES_ZERO_GPU": value} if value else {}) is expected


def test_nothing_is_compiled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    spaces_package.write(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    with caplog.at_level(logging.WARNING):
        assert not zerogpu.prepare(Settings(compile=True)).compile
    assert "compile is ignored" in caplog.text
    monkeypatch.delitem(sys.modules, "spaces")


def seconds(family: type[Request], checkpoint: str, **fields: Any) -> int:
    return zerogpu.duration(family(checkpoint=checkpoint, **fields))


def test_seconds_to_ask_for() -> None:
    assert seconds(SD15Request, "demo", steps=150, num_images=8) == zerogpu.LEAST
    assert seconds(SD15Request, "sd15") == 12  # 8 s of loading, 100 forwards that take their least
    # 25 s of loading, 2 × 28 forwards of 8.9 TFLOP, or 31, at 150 TFLOP/s
    assert seconds(SD3Request, "sd3-medium") == 29
    assert seconds(SD3Request, "sd3.5-large") == 37
    assert seconds(SD3Request, "sd3.5-large-turbo") == 26
    assert seconds(StableCascadeRequest, "stable-cascade") == 22
    assert seconds(SD3Request, "sd3.5-large", num_images=8, dtype="float32") == zerogpu.MOST
    assert seconds(SD3Request, "someone/fine-tune", steps=28, guidance_scale=1.0) == 27


@pytest.mark.parametrize(
    ("more", "than"),
    [
        ({"num_images": 4}, {}),
        ({"steps": 60}, {}),
        ({"sampler": "heun"}, {}),
        ({"width": 2048}, {}),
        ({"dtype": "float32"}, {}),
        ({}, {"guidance_scale": 1.0}),
        ({"skip_layer_guidance_scale": 2.8, "skip_layer_guidance_stop": 1.0}, {}),
    ],
)
def test_more_work_asks_for_more(more: dict[str, Any], than: dict[str, Any]) -> None:
    assert seconds(SD3Request, "sd3.5-large", **more) > seconds(SD3Request, "sd3.5-large", **than)


def test_it_imports_without_torch_or_spaces() -> None:
    code = "import sys, backend.zerogpu; sys.exit('torch' in sys.modules or 'spaces' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def test_the_threads_that_watch_end() -> None:
    stop, seen = threading.Event(), threading.Event()
    with zerogpu._watching(stop.is_set, seen.set):
        stop.set()
        assert seen.wait(5)
    with zerogpu._watching(lambda: False, seen.set):
        pass
    assert not [thread for thread in threading.enumerate() if thread.name == "stop"]
