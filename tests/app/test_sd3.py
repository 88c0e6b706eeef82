"""Stable Diffusion 3's endpoint and its tab: T5 at its prices, shift, skip-layer guidance."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gradio as gr
import pytest
from gradio_client import Client
from gradio_client.exceptions import AppError
from PIL import Image
from playwright.sync_api import Browser, Locator, Page, expect

from backend import Hardware, Settings, Studio
from backend.events import Step
from backend.requests import SD3Request
from tests.app.pages import (
    SEEN,
    WATCH,
    WIDE,
    generate,
    no_sideways_scroll,
    open_tab,
    opened,
    prompt,
    slider,
    status,
)
from tests.app.support import Server
from tests.checkpoints import sd3_folder, sd3_single_file
from ui import prices, render, words

QUICK: Any = {"prompt": "a red house on green hills", "steps": 2}
SD3, T5 = "Stable Diffusion 3", "text_encoder_3"


def paint(client: Client, **asked: Any) -> tuple[list[str], dict[str, Any]]:
    return client.predict(**QUICK | asked, api_name="/sd3")


def plan(client: Client, **asked: Any) -> dict[str, Any]:
    return client.predict("sd3", asked, api_name="/plan")


def parts(told: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {part["name"]: part for phase in told["phases"] for part in phase["components"]}


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return sd3_folder(tmp_path_factory.mktemp("sd3") / "tiny")


@pytest.fixture(scope="session")
def without_t5(folder: Path) -> str:
    """A single file of the original release that holds both CLIPs."""
    return str(sd3_single_file(folder.parent / "incl_clips.safetensors", folder))


# ---- the endpoint


def test_all_phases_are_told(server: Server, client: Client) -> None:
    prompt = "a red house on green hills, told apart"  # read by nobody yet
    job = client.submit(**QUICK | {"prompt": prompt, "seed": 7, "num_images": 2}, api_name="/sd3")
    *progress, (files, facts) = list(job)
    assert all(not pictures for pictures, _ in progress)
    assert all(set(said) == {"phase", "step", "steps", "eta_s"} for _, said in progress)
    told = {(said["phase"], said["step"], said["steps"]) for _, said in progress}
    assert {("encode_clip", 2, 2), ("encode_t5", 1, 1), ("denoise", 2, 2)} <= told
    assert [phase["name"] for phase in facts["plan"]["phases"]] == [
        *("encode_clip", "encode_t5", "denoise", "decode")
    ]
    assert facts["seeds"] == [7, 8]
    settings = facts["settings"]
    assert (settings["t5"], settings["ran"], settings["steps"]) == ("auto", {"t5": "full"}, 2)
    assert settings["shift"] > 0
    first, second = (Image.open(file) for file in files)
    assert first.size == (128, 128)
    assert first.tobytes() != second.tobytes()
    text = str(first.info["parameters"])
    assert "Seed: 7," in text
    assert ", T5: full, " in text
    assert {Path(file).read_bytes() for file in files} <= {path.read_bytes() for path in server.pictures}


def test_t5_is_read_or_left_out(client: Client) -> None:
    pixels: set[bytes] = set()
    for t5 in ("full", "int8", "nf4", "off"):
        files, facts = paint(client, seed=3, t5=t5)
        assert facts["settings"]["ran"] == {"t5": t5}
        assert (T5 in parts(facts["plan"])) == (t5 != "off")
        picture = Image.open(files[0])
        assert f"T5: {t5}" in str(picture.info["parameters"])
        pixels.add(picture.tobytes())
    assert len(pixels) == 4


def test_every_field_counts(client: Client) -> None:
    changes: list[dict[str, Any]] = [
        {},
        {"shift": 5.0},
        {"sampler": "dpmpp_2m"},
        {"skip_layer_guidance_scale": 2.8, "skip_layer_guidance_stop": 1.0, "skip_guidance_layers": [1, 2]},
    ]
    pixels = {Image.open(paint(client, seed=3, steps=3, **change)[0][0]).tobytes() for change in changes}
    assert len(pixels) == len(changes)


@pytest.mark.parametrize("t5", ["auto", "full", "int8", "nf4", "off"])
def test_the_plan(client: Client, t5: str) -> None:
    told = plan(client, t5=t5)
    assert set(told) == {"device", "budget_bytes", "peak_bytes", "phases", "decisions"}
    assert ("encode_t5" in [phase["name"] for phase in told["phases"]]) == (t5 != "off")
    assert any(decision.startswith("T5 ") for decision in told["decisions"])
    sizes = parts(told)
    assert {"text_encoder", "text_encoder_2", "transformer", "vae"} <= set(sizes)
    if t5 in ("int8", "nf4"):
        assert sizes[T5]["precision"] == t5
        assert sizes[T5]["bytes"] < parts(plan(client, t5="full"))[T5]["bytes"]


def test_the_plan_of_what_is_not_downloaded(client: Client) -> None:
    there = {"checkpoint": "sd3-medium", "dtype": "bfloat16"}
    for t5, size in (("full", 9.5e9), ("int8", 5.9e9), ("nf4", 4.3e9)):
        sizes = parts(plan(client, **there, t5=t5))
        assert sizes[T5]["bytes"] == pytest.approx(size, rel=0.01)
        assert sizes["transformer"]["bytes"] == pytest.approx(4.2e9, rel=0.01)
    assert T5 not in parts(plan(client, **there, t5="off"))


BAD_VALUES: list[tuple[dict[str, Any], str]] = [
    ({"t5": "fp4"}, r"t5 is 'fp4'; it can be auto, full, int8, nf4, off"),
    ({"t5": None}, r"t5 is None; it can be auto"),
    ({"max_sequence_length": 0}, r"max_sequence_length is 0; it can be a whole number from 77 to 512"),
    ({"max_sequence_length": 10000}, r"max_sequence_length is 10000; "),
    ({"shift": 0}, r"shift is 0; it can be a number from 0\.1 to 20"),
    ({"sampler": "lcm"}, r"sampler is 'lcm'; it can be euler, heun, dpmpp_2m"),
    ({"width": 136}, r"width is 136; .* in multiples of 16"),
    ({"skip_layer_guidance_scale": 11}, r"skip_layer_guidance_scale is 11; .* from 0 to 10"),
    ({"skip_layer_guidance_stop": 2}, r"skip_layer_guidance_stop is 2; "),
    ({"skip_guidance_layers": [1, 99]}, r"skip_guidance_layers holds 99; .* layers 0 to \d"),
    ({"skip_guidance_layers": [-1]}, r"skip_guidance_layers is .*; it can be a list of whole numbers from 0"),
    ({"checkpoint": "gated/model"}, r"gated/model is gated: .* accept its licence"),
]


@pytest.mark.parametrize(("asked", "message"), BAD_VALUES, ids=lambda value: str(value)[:40])
def test_bad_values_are_named(client: Client, asked: dict[str, Any], message: str) -> None:
    with pytest.raises(AppError, match=message) as caught:
        paint(client, **asked)
    assert "Traceback" not in str(caught.value)


def test_a_file_without_t5(client: Client, folder: Path, without_t5: str) -> None:
    there: dict[str, Any] = {"checkpoint": without_t5, "width": 64, "height": 64}
    clips = str(folder)
    for t5 in ("full", "int8", "nf4"):
        message = rf"t5 is '{t5}', and .*holds no text_encoder_3; set t5 to 'off', or, .* config_from"
        with pytest.raises(AppError, match=message):
            plan(client, **there, t5=t5)
    assert T5 not in parts(plan(client, **there))
    _, facts = paint(client, **there, config_from=clips, t5="full")
    assert facts["settings"]["ran"] == {"t5": "full"}


# ---- what T5 costs, in words


def costs(request: SD3Request, hardware: Hardware | None = None) -> tuple[dict[str, str], str]:
    choices, info = prices.shown(prices.prices(Studio(Settings(device="cpu"), hardware), request))
    return {t5: text for text, t5 in choices}, info


def test_costs_of_the_demo() -> None:
    said, info = costs(SD3Request())
    assert list(said) == ["auto", "full", "int8", "nf4", "off"]
    assert said["auto"] == "automatic: whole"
    assert said["off"] == "off · nothing"
    for t5, name in (("full", "whole"), ("int8", "8 bits"), ("nf4", "4 bits")):
        assert re.fullmatch(rf"{name} · [\d.]+ [KM]iB", said[t5])
    assert len(set(said.values())) == 5
    assert info == prices.ABOUT


def test_costs_where_memory_is_short() -> None:
    request = SD3Request(checkpoint="sd3-medium", dtype="bfloat16")
    said, _ = costs(request, Hardware.card(gib=8))
    assert said == {
        "auto": "automatic: 8 bits",
        "full": "whole · 8.9 GiB · streamed",
        "int8": "8 bits · 5.5 GiB",
        "nf4": "4 bits · 4.0 GiB",
        "off": "off · nothing",
    }
    said, _ = costs(request, Hardware.card(gib=8, ram_gib=2))
    assert said["off"] == "off · nothing"
    assert re.fullmatch(r"whole · 8\.9 GiB · does not fit: .*", said["full"])


def test_choices_that_cannot_be_had(without_t5: str) -> None:
    said, info = costs(SD3Request(checkpoint=without_t5, width=64, height=64))
    assert said["auto"] == "automatic: off"
    assert said["full"] == "whole · not here"
    assert info.endswith(
        "set t5 to 'off', or, for a single file, config_from to a folder or hub repository with one."
    )
    assert " Not whole, 8 bits, 4 bits: " in info


def test_the_choices_stay_where_there_is_no_plan() -> None:
    def request(_: Any) -> SD3Request:
        return SD3Request(checkpoint="no such thing")

    told = prices.teller(Studio(Settings(device="cpu")), request)(gr.Request())
    assert (told["choices"], told["info"]) == (prices.CHOICES, prices.ABOUT)


def test_phases_in_plain_words() -> None:
    for phase, said in (("encode_clip", "Reading the prompt"), ("encode_t5", "Reading the prompt with T5")):
        assert f"<p>{said} · step 1 of 2" in render.step(Step(phase=phase, step=1, steps=2, eta_s=None))


# ---- the tab


@pytest.fixture
def tab(browser: Browser, server: Server) -> Iterator[Locator]:
    for page in opened(browser, server, viewport=WIDE):
        tab = open_tab(page, SD3)
        tab.get_by_role("button", name="Advanced").click()
        yield tab


def price(tab: Locator, name: str) -> Locator:
    return tab.locator(".prices label", has_text=re.compile(rf"^\s*{name}"))


def choose(tab: Locator, checkpoint: str) -> None:
    choice = tab.get_by_role("combobox", name="Checkpoint")
    choice.fill(checkpoint)
    choice.press("Enter")


def test_a_prompt_becomes_a_picture(page: Page) -> None:
    tab = open_tab(page, SD3)
    page.evaluate(WATCH)
    slider(tab, "Steps", 60)
    prompt(tab).fill("a red house on green hills at night")
    page.keyboard.press("Control+Enter")
    expect(status(tab, "done")).to_contain_text("1 picture in")
    seen = page.evaluate(SEEN)
    assert "Painting · step" in seen["said"]
    assert seen["previews"] >= 2, seen
    assert len(seen["heights"]) == 1, "the page jumped"
    assert not seen["sideways"]
    assert (
        tab.locator(".canvas img").evaluate("image => image.decode().then(() => image.naturalWidth)") == 128
    )
    tab.get_by_role("button", name="Advanced").click()
    expect(price(tab, "whole")).to_contain_text("iB")
    assert no_sideways_scroll(page)


def test_what_t5_costs_here(tab: Locator, client: Client) -> None:
    for name, t5 in (("whole", "full"), ("8 bits", "int8"), ("4 bits", "nf4")):
        expect(price(tab, name)).to_contain_text(words.size(parts(plan(client, t5=t5))[T5]["bytes"]))
    expect(price(tab, "off")).to_contain_text("nothing")
    expect(price(tab, "automatic")).to_contain_text("automatic: whole")
    price(tab, "off").click()
    expect(tab.locator(".plan")).to_contain_text("T5 does not run: as asked for.")
    expect(tab.locator(".plan .parts").filter(has_text="T5")).to_have_count(0)
    choose(tab, "sd3-medium")
    size = words.size(parts(plan(client, checkpoint="sd3-medium", t5="full"))[T5]["bytes"])
    expect(price(tab, "whole")).to_contain_text(f"whole · {size}")
    expect(tab.locator(".prices input:checked")).to_have_value("off")  # what is chosen stays
    expect(tab.get_by_label("number input for Shift")).to_have_value("3")
    expect(tab.get_by_label("Width", exact=True)).to_have_value("1024")
    expect(tab.locator(".note")).to_contain_text("Gated: accept it on its page")
    expect(tab.locator(".note a")).to_have_attribute("href", re.compile("stable-diffusion-3-medium"))
    tab.get_by_label("Precision").click()
    tab.get_by_role("option", name="32 bit").click()
    expect(price(tab, "whole")).to_contain_text("17.7 GiB")


def test_settings_are_reused(tab: Locator) -> None:
    fields = {"Steps": 2, "Shift": 5, "Prompt length for T5": 99, "Skip-layer guidance": 2}
    for name, value in fields.items():
        slider(tab, name, value)
    price(tab, "4 bits").click()
    generate(tab)
    for name in fields:
        slider(tab, name, 80 if "length" in name else 1)
    price(tab, "off").click()
    tab.get_by_role("button", name="Reuse these settings").click()
    expect(tab.locator(".prices input:checked")).to_have_value("nf4")
    for name, value in fields.items():
        expect(tab.get_by_label(f"number input for {name}")).to_have_value(str(value))
    expect(tab.locator(".plan")).to_contain_text("T5 runs with 4 bits a weight")
    seed = tab.get_by_label("Seed", exact=True)
    expect(seed).not_to_have_value("")
    expect(tab.locator(".files a")).to_contain_text(f"seed {seed.input_value()}")


def test_an_error_is_told_and_the_picture_stays(tab: Locator, without_t5: str) -> None:
    slider(tab, "Steps", 2)
    generate(tab)
    shown = tab.locator(".canvas img").get_attribute("src") or ""
    tab.get_by_label("Width", exact=True).fill("136")
    expect(generate(tab, "failed")).to_contain_text("width is 136")
    price(tab, "whole").click()
    choose(tab, without_t5)
    expect(tab.get_by_label("Width", exact=True)).to_have_value("1024")  # what a single file does not tell
    for side in ("Width", "Height"):
        tab.get_by_label(side, exact=True).fill("128")
    expect(price(tab, "whole")).to_contain_text("not here")
    expect(tab.locator(".prices")).to_contain_text("holds no text_encoder_3")
    expect(tab.locator(".plan .problem")).to_contain_text("t5 is 'full', and ")
    expect(generate(tab, "failed")).to_contain_text("t5 is 'full', and ")
    expect(tab.locator(".canvas img")).to_have_attribute("src", shown)
    choose(tab, "demo")
    expect(price(tab, "whole")).to_contain_text("iB")
    slider(tab, "Steps", 2)
    generate(tab)
    expect(tab.locator(".canvas img")).not_to_have_attribute("src", shown)


def test_samplers_are_those_of_flow(tab: Locator) -> None:
    tab.get_by_label("Sampler").click()
    expect(tab.get_by_role("option")).to_contain_text(["Euler", "Heun", "DPM++ 2M"])
    tab.get_by_role("option", name="Heun").click()
    expect(tab.get_by_text("2 passes through the network each")).to_be_visible()
