"""The endpoints of a running server, by `gradio_client` and by plain HTTP."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
from gradio_client import Client
from gradio_client.exceptions import AppError
from PIL import Image
from safetensors.torch import load_file, save_file

from backend.requests import REQUESTS
from tests.app.support import DEMO, LONG, ROOT, Server, connected
from training import judge

QUICK: Any = {"prompt": "a red house on green hills", "steps": 2}


def paint(client: Client, **asked: Any) -> tuple[list[str], dict[str, Any]]:
    return client.predict(**QUICK | asked, api_name="/sd15")


def texts(files: list[str]) -> list[str]:
    return [Image.open(file).text["parameters"] for file in files]  # pyright: ignore[reportAttributeAccessIssue]


def test_a_picture_and_what_is_said_of_it(server: Server, client: Client) -> None:
    paint(client)  # the first may have to wait: the server loads the demo beforehand
    job = client.submit(**QUICK | {"steps": 4, "seed": 7, "num_images": 2}, api_name="/sd15")
    *progress, (files, facts) = list(job)
    assert all(not pictures for pictures, _ in progress)
    told = [said for _, said in progress]
    assert "waiting" not in {said["phase"] for said in told}
    assert all(set(said) == {"phase", "step", "steps", "eta_s"} for said in told)
    denoising = [(said["step"], said["steps"]) for said in told if said["phase"] == "denoise"]
    assert denoising[-1] == (4, 4)
    assert facts["seeds"] == [7, 8]
    assert facts["timings"]["total"] > 0
    assert facts["settings"]["steps"] == 4
    assert [phase["name"] for phase in facts["plan"]["phases"]] == ["encode", "denoise", "decode"]
    first, second = texts(files)
    assert first.startswith("a red house on green hills\n")
    assert "Seed: 7," in first
    assert "Seed: 8," in second
    kept = {path.read_bytes() for path in server.pictures}
    assert {Path(file).read_bytes() for file in files} <= kept


def test_one_seed_one_picture(client: Client) -> None:
    first, again, other = (paint(client, seed=seed)[0][0] for seed in (5, 5, 6))
    assert pixels(first) == pixels(again) != pixels(other)


def pixels(file: str) -> bytes:
    return Image.open(file).tobytes()


def test_a_random_seed_is_told(client: Client) -> None:
    seeds = {paint(client)[1]["seeds"][0] for _ in range(2)}
    assert len(seeds) == 2


def test_the_judge_sees_a_red_house_at_night(client: Client) -> None:
    files, _ = paint(client, prompt="a red house at night", seed=11, num_images=4, steps=None)
    verdicts = judge.look(judge.load(), [Image.open(file) for file in files])
    right = [(seen.colour, seen.subject, seen.time) == ("red", "house", "night") for seen in verdicts]
    assert sum(right) >= 3, verdicts


def test_two_clients_at_once_get_their_own(server: Server, tmp_path: Path) -> None:
    def ask(seed: int) -> tuple[list[int], str]:
        client = connected(server, tmp_path / str(seed))
        files, facts = paint(client, seed=seed, steps=10)
        return facts["seeds"], texts(files)[0]

    with ThreadPoolExecutor(2) as pool:
        answers = list(pool.map(ask, (21, 22)))
    for seed, (seeds, text) in zip((21, 22), answers, strict=True):
        assert seeds == [seed]
        assert f"Seed: {seed}," in text


def test_cancel_stops_within_a_step(server: Server, client: Client) -> None:
    before = len(server.pictures)
    job = client.submit(**LONG, api_name="/sd15")
    left = eta_of_a_step(job)
    begin = time.monotonic()
    job.cancel()
    paint(client)
    assert time.monotonic() - begin < left / 2
    assert len(server.pictures) == before + 1


def eta_of_a_step(job: Any) -> float:
    for _, said in job:
        if said["phase"] == "denoise" and said["step"] >= 2:
            return said["eta_s"]
    raise AssertionError("the job ended before its second step")


def test_a_killed_client_frees_the_queue(server: Server, client: Client) -> None:
    before = len(server.pictures)
    program = (
        "from gradio_client import Client\n"
        f"job = Client({server.url!r}, verbose=False).submit(**{LONG!r}, api_name='/sd15')\n"
        "for _, said in job:\n"
        "    if said['phase'] == 'denoise': print(said['eta_s'], flush=True)\n"
    )
    child = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None
    left = [float(child.stdout.readline()) for _ in range(2)][-1]
    begin = time.monotonic()
    child.kill()
    child.wait()
    child.stdout.close()
    paint(client)
    assert time.monotonic() - begin < left / 2
    assert len(server.pictures) == before + 1


def test_the_plan_loads_nothing_and_knows_the_published_sizes(client: Client) -> None:
    plan = client.predict("sd15", {"checkpoint": "sd15", "num_images": 2}, api_name="/plan")
    assert set(plan) == {"device", "budget_bytes", "peak_bytes", "phases", "decisions"}
    components = {part["name"]: part for phase in plan["phases"] for part in phase["components"]}
    assert set(components) == {"text_encoder", "unet", "vae"}
    assert components["unet"]["bytes"] > 1.7e9
    assert plan["decisions"]


@pytest.mark.parametrize("family", REQUESTS)
def test_the_parameters_are_the_fields(client: Client, family: str) -> None:
    info: Any = client.view_api(return_format="dict", print_info=False)
    assert set(info["named_endpoints"]) == {"/plan", *(f"/{name}" for name in REQUESTS)}
    parameters = info["named_endpoints"][f"/{family}"]["parameters"]
    assert all(each["parameter_has_default"] for each in parameters)
    names = {field.name for field in fields(REQUESTS[family])}
    assert {each["parameter_name"] for each in parameters} == names


# ---- bad input


BAD_VALUES = [
    ({"steps": 0}, r"steps is 0; it can be a whole number from 1 to 150"),
    ({"steps": 1000}, r"steps is 1000; "),
    ({"width": 130}, r"width is 130; .* in multiples of 8"),
    ({"height": 4096}, r"height is 4096; .* to 2048"),
    ({"guidance_scale": 99}, r"guidance_scale is 99; it can be a number from 0 to 30"),
    ({"guidance_scale": "much"}, r"guidance_scale is 'much'; "),
    ({"seed": 2**32}, r"seed is 4294967296; "),
    ({"seed": -2}, r"seed is -2; .*-1 draws one at random"),
    ({"num_images": 0}, r"num_images is 0; .* from 1 to 8"),
    ({"num_images": 100}, r"num_images is 100; "),
    ({"sampler": "magic"}, r"sampler is 'magic'; it can be pndm, ddim, "),
    ({"dtype": "float8"}, r"dtype is 'float8'; "),
    ({"prefer": "luck"}, r"prefer is 'luck'; "),
    ({"clip_skip": 40}, r"clip_skip is 40; "),
    ({"raw_prompt": "no"}, r"raw_prompt is 'no'; "),
    ({"loras": [["nobody", 1.0]]}, r"there is no LoRA called 'nobody'; "),
    ({"prompt": None}, r"prompt is None; it must be text"),
    ({"checkpoint": ""}, r"checkpoint is empty; "),
    ({"checkpoint": "nobody/nothing"}, r"nobody/nothing does not exist on "),
    ({"checkpoint": "gated/model"}, r"gated/model is gated: .* accept its licence"),
    ({"checkpoint": "down/model"}, r"cannot be reached for down/model"),
]


@pytest.mark.parametrize(("asked", "message"), BAD_VALUES, ids=lambda value: str(value)[:40])
def test_bad_values_are_named_and_the_server_goes_on(
    client: Client, asked: dict[str, Any], message: str
) -> None:
    with pytest.raises(AppError, match=message) as caught:
        paint(client, **asked)
    assert "Traceback" not in str(caught.value)
    assert paint(client)[0]


def test_nan_guidance_by_plain_http(server: Server, client: Client) -> None:
    """`gradio_client` refuses to send NaN; other programs do not."""
    data = '["a house", "", "demo", -1, 1, null, null, "auto", "auto", [], false, 0, null, 2, NaN, null]'
    call = f"{server.url}gradio_api/call/sd15"
    request = urllib.request.Request(
        call, f'{{"data": {data}}}'.encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request) as answer:
        event = json.load(answer)["event_id"]
    with urllib.request.urlopen(f"{call}/{event}") as answer:
        assert "guidance_scale is nan; it can be a number from 0 to 30" in answer.read().decode()
    assert paint(client)[0]


@pytest.mark.parametrize(
    ("family", "request_fields", "message"),
    [
        ("sd9", {}, "family is 'sd9'; it can be sd15"),
        (["sd15"], {}, r"family is \['sd15'\]; it can be sd15"),
        ("sd15", {"stepz": 3}, "request has no field 'stepz'"),
        ("sd15", {"steps": 0}, "steps is 0"),
        ("sd15", [], "must be an object"),
    ],
)
def test_bad_plans(client: Client, family: Any, request_fields: Any, message: str) -> None:
    with pytest.raises(AppError, match=message):
        client.predict(family, request_fields, api_name="/plan")


# ---- damaged checkpoints

WEIGHTS = Path("unet") / "diffusion_pytorch_model.safetensors"


def with_tensors(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS)


def another_family(folder: Path) -> None:
    index = {"_class_name": "StableDiffusion3Pipeline"}
    (folder / "model_index.json").write_text(json.dumps(index))


def odd_one_more(tensors: dict[str, Any]) -> None:
    tensors["odd"] = tensors["conv_in.bias"] + 1


def one_too_short(tensors: dict[str, Any]) -> None:
    tensors["conv_in.bias"] = tensors["conv_in.bias"][:-1].clone()


DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "missing": (shutil.rmtree, r"there is no such file or folder"),
    "empty": (lambda folder: (folder / WEIGHTS).write_bytes(b""), r"model.safetensors is empty"),
    "truncated": (lambda folder: os.truncate(folder / WEIGHTS, 1_000_000), r"is truncated"),
    "other": (another_family, r"Stable Diffusion 3"),
    "lacking": (lambda folder: with_tensors(folder, lambda t: t.pop("conv_in.weight")), r"conv_in\.weight"),
    "extra": (lambda folder: with_tensors(folder, odd_one_more), r"\bodd\b"),
    "wrong_shape": (lambda folder: with_tensors(folder, one_too_short), r"conv_in\.bias"),
    "no_weights": (lambda folder: (folder / WEIGHTS).unlink(), r"has no weights for unet"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_checkpoints_are_told_apart(client: Client, tmp_path: Path, damage: str) -> None:
    hurt, message = DAMAGE[damage]
    folder = tmp_path / "checkpoint"
    shutil.copytree(DEMO, folder)
    hurt(folder)
    with pytest.raises(AppError, match=message):
        paint(client, checkpoint=str(folder))
    assert paint(client)[0]


class Trap:
    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.mark),)


def test_a_pickle_that_would_run_code_does_not(client: Client, tmp_path: Path) -> None:
    mark, file = tmp_path / "ran", tmp_path / "model.ckpt"
    file.write_bytes(pickle.dumps({"state_dict": Trap(mark)}))
    with pytest.raises(AppError, match=r"model\.ckpt"):
        paint(client, checkpoint=str(file))
    assert not mark.exists()
    assert paint(client)[0]


def test_nothing_but_pictures_is_served(server: Server) -> None:
    for path in (ROOT / "app.py", server.home / "history.sqlite", Path("/etc/passwd")):
        assert path.exists()
        with pytest.raises(urllib.error.HTTPError, match="403|404"):
            urllib.request.urlopen(f"{server.url}gradio_api/file={path}")
