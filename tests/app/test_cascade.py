"""Stable Cascade's endpoint and its tab: two stages, image prompts, and the other tab beside it."""

from __future__ import annotations

import base64
import json
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
from gradio_client import Client, handle_file
from gradio_client.exceptions import AppError
from PIL import Image
from playwright.sync_api import Browser, Locator, Page, expect

from backend.errors import InvalidRequest
from backend.requests import StableCascadeRequest
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
from tests.app.support import ROOT, Server
from ui import forms

QUICK: Any = {"prompt": "a red house on green hills", "prior_steps": 3, "decoder_steps": 2}
CASCADE, SD15 = "Stable Cascade", "Stable Diffusion 1.5"
PROMPTS = ".image-prompts .thumbnail-item img"


def paint(client: Client, **asked: Any) -> tuple[list[str], dict[str, Any]]:
    return client.predict(**QUICK | asked, api_name="/stable_cascade")


@pytest.fixture(scope="session")
def red(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("prompts") / "red.png"
    Image.new("RGB", (40, 30), "red").save(file)
    return file


@pytest.fixture(scope="session")
def fake(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What begins like a picture."""
    file = tmp_path_factory.mktemp("prompts") / "fake.png"
    file.write_bytes(b"\x89PNG\r\n\x1a\n" + b"no picture")
    return file


# ---- the endpoint


def test_both_stages_are_told(server: Server, client: Client) -> None:
    job = client.submit(**QUICK | {"seed": 7, "num_images": 2}, api_name="/stable_cascade")
    *progress, (files, facts) = list(job)
    told = {(said["phase"], said["step"], said["steps"]) for _, said in progress}
    assert {("stage_c", 3, 3), ("stage_b", 2, 2)} <= told
    assert [phase["name"] for phase in facts["plan"]["phases"]] == ["encode", "stage_c", "stage_b", "stage_a"]
    assert facts["seeds"] == [7, 8]
    assert facts["settings"]["decoder_steps"] == 2
    assert facts["settings"]["images"] == []
    first, second = (Image.open(file) for file in files)
    assert first.size == (128, 128)
    assert first.tobytes() != second.tobytes()
    assert "Seed: 7," in str(first.info["parameters"])
    assert {Path(file).read_bytes() for file in files} <= {path.read_bytes() for path in server.pictures}


def test_image_prompts(client: Client, red: Path) -> None:
    data = "data:image/png;base64," + base64.b64encode(red.read_bytes()).decode()
    plain = paint(client, seed=3)[0][0]
    uploaded, facts = paint(client, seed=3, images=[handle_file(str(red))])
    parts = {part["name"] for phase in facts["plan"]["phases"] for part in phase["components"]}
    assert "image_encoder" in parts
    assert facts["settings"]["images"] == ["red.png"]
    pixels = [Image.open(file).tobytes() for file in (plain, uploaded[0])]
    assert pixels[0] != pixels[1]
    for same in (data, str(red)):
        assert Image.open(paint(client, seed=3, images=[same])[0][0]).tobytes() == pixels[1]


BAD_IMAGES: list[tuple[list[Any], str]] = [
    (["red"] * 5, r"images holds 5; it can be a list of 0 to 4 pictures"),
    (["red", "fake"], r"images\[1\] is .*which cannot be read: it is damaged"),
    ([{"path": 7}], r"images\[0\] is "),
    (["/nowhere/red.png"], r"images\[0\] is .*No such file"),
    ([7], r"images\[0\] is 7"),
]


@pytest.mark.parametrize(("images", "message"), BAD_IMAGES, ids=lambda value: str(value)[:40])
def test_bad_image_prompts_are_named(
    client: Client, red: Path, fake: Path, images: list[Any], message: str
) -> None:
    files = {"red": handle_file(str(red)), "fake": handle_file(str(fake))}
    given = [files.get(image, image) if isinstance(image, str) else image for image in images]
    with pytest.raises(AppError, match=message) as caught:
        paint(client, images=given)
    assert "Traceback" not in str(caught.value)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("path", ["/etc/passwd", "/etc/../etc/passwd", "app.py"])
def test_files_of_the_server_are_no_uploads(server: Server, path: str, stream: bool) -> None:
    """By plain HTTP: `gradio_client` would upload the file of that name."""
    file = {"path": path, "is_stream": stream, "meta": {"_type": "gradio.FileData"}}
    given = {field.name: field.default for field in fields(StableCascadeRequest)} | {"images": [file]}
    call = f"{server.url}gradio_api/call/stable_cascade"
    body = json.dumps({"data": list(given.values())}).encode()
    request = urllib.request.Request(call, body, {"Content-Type": "application/json"})
    with pytest.raises(urllib.error.HTTPError, match="400") as refused:
        urllib.request.urlopen(request)
    assert "is no file that you uploaded here" in refused.value.read().decode()
    with pytest.raises(InvalidRequest, match="which is no file that was uploaded here"):
        forms.build(StableCascadeRequest, {"images": [file]})


def test_strangers_name_no_files_of_the_server() -> None:
    for path in (ROOT / "assets" / "screenshot.png", "/etc/passwd", "~/x.png"):
        with pytest.raises(InvalidRequest, match=r"images\[0\] is .* on this public server it can be"):
            forms.build(StableCascadeRequest, {"images": [str(path)]}, public=True)
    with pytest.raises(InvalidRequest, match="no picture"):
        forms.build(StableCascadeRequest, {"images": ["data:,"]}, public=True)


@pytest.mark.parametrize("family", ["stable_cascade", "stable-cascade"])
def test_the_plan(client: Client, red: Path, family: str) -> None:
    plan = client.predict(family, {"stages": "full", "images": [handle_file(str(red))]}, api_name="/plan")
    names = {part["name"] for phase in plan["phases"] for part in phase["components"]}
    assert names == {"text_encoder", "image_encoder", "prior", "decoder", "vqgan"}
    plan = client.predict(family, {"checkpoint": "stable-cascade", "stages": "lite"}, api_name="/plan")
    sizes = {part["name"]: part["bytes"] for phase in plan["phases"] for part in phase["components"]}
    assert set(sizes) == {"text_encoder", "prior_lite", "decoder_lite", "vqgan"}
    assert sizes["prior_lite"] > 2e9


# ---- the tab


@pytest.fixture
def tab(browser: Browser, server: Server) -> Iterator[Locator]:
    for page in opened(browser, server, viewport=WIDE):
        yield open_tab(page, CASCADE)


def quick(tab: Locator) -> None:
    slider(tab, "Composition steps", 3)
    slider(tab, "Detail steps", 2)


def drop(tab: Locator, *files: Path) -> None:
    tab.locator(".image-prompts input[type=file]").set_input_files([str(file) for file in files])


def test_a_prompt_becomes_a_picture(page: Page, red: Path) -> None:
    tab = open_tab(page, CASCADE)
    page.evaluate(WATCH)
    slider(tab, "Composition steps", 60)
    slider(tab, "Detail steps", 30)
    shown = tab.locator(PROMPTS)
    drop(tab, red)
    expect(shown).to_have_count(1)
    expect(tab.locator(".plan")).to_contain_text("Image encoder")
    drop(tab, red)
    expect(shown).to_have_count(2)  # beside the one that was there
    tab.get_by_label("Delete image").first.click()
    expect(shown).to_have_count(1)
    prompt(tab).fill("a red house on green hills at night")
    page.keyboard.press("Control+Enter")
    expect(status(tab, "done")).to_contain_text("1 picture in")
    seen = page.evaluate(SEEN)
    assert "Stage C: composition · step" in seen["said"]
    assert "Stage B: detail · step" in seen["said"]
    assert seen["previews"] >= 2, seen
    assert len(seen["heights"]) == 1, "the page jumped"
    image = tab.locator(".canvas img")
    assert image.evaluate("image => image.decode().then(() => image.naturalWidth)") == 128
    assert no_sideways_scroll(page)


def test_pictures_are_dropped_beside_those_that_are_there(tab: Locator, red: Path) -> None:
    shown = tab.locator(PROMPTS)
    drop(tab, red)
    expect(shown).to_have_count(1)
    tab.locator(".image-prompts .grid-wrap").evaluate(
        """async (there) => {
          const files = new DataTransfer(), picture = document.querySelector('.image-prompts img');
          files.items.add(new File([await (await fetch(picture.src)).blob()], 'b.png', {type: 'image/png'}));
          there.dispatchEvent(new DragEvent('drop', {dataTransfer: files, bubbles: true, cancelable: true}));
        }"""
    )
    expect(shown).to_have_count(2)


def test_bad_image_prompts_are_told(tab: Locator, red: Path, fake: Path) -> None:
    quick(tab)
    drop(tab, red, fake)
    expect(tab.locator(".plan .problem")).to_contain_text("images[1] is ")
    expect(generate(tab, "failed")).to_contain_text("which cannot be read: it is damaged")
    tab.get_by_label("Delete image").last.click()
    drop(tab, *[red] * 4)
    expect(tab.locator(PROMPTS)).to_have_count(5)
    expect(generate(tab, "failed")).to_contain_text("images holds 5; it can be a list of 0 to 4 pictures")
    tab.locator(".image-prompts").get_by_label("Clear").click()
    generate(tab)


def test_settings_are_reused_with_their_pictures(tab: Locator, red: Path) -> None:
    quick(tab)
    drop(tab, red)
    expect(tab.locator(PROMPTS)).to_have_count(1)
    tab.get_by_text("3:2", exact=True).click()
    expect(tab.get_by_label("Width", exact=True)).to_have_value("192")
    generate(tab)
    tab.get_by_label("Width", exact=True).fill("130")
    expect(generate(tab, "failed")).to_contain_text("width is 130")
    expect(tab.locator(".files a")).to_be_visible()  # as the picture is, and the way back to its settings
    tab.locator(".image-prompts").get_by_label("Clear").click()
    expect(tab.locator(PROMPTS)).to_have_count(0)
    slider(tab, "Composition steps", 9)
    slider(tab, "Detail guidance", 2)
    tab.get_by_role("button", name="Reuse these settings").click()
    expect(tab.locator(PROMPTS)).to_have_count(1)
    expect(tab.get_by_label("number input for Composition steps")).to_have_value("3")
    expect(tab.get_by_label("number input for Detail guidance")).to_have_value("0")
    seed = tab.get_by_label("Seed", exact=True)
    expect(seed).not_to_have_value("")
    expect(tab.locator(".files a")).to_contain_text(f"seed {seed.input_value()}")
    expect(tab.get_by_label("Width", exact=True)).to_have_value("192")
    tab.get_by_role("button", name="Advanced").click()
    for size in ("Size of Stage C", "Size of Stage B"):
        expect(tab.locator(".segmented", has_text=size).locator(".selected")).to_have_text("automatic")
    first = tab.locator(".canvas img").get_attribute("src")
    generate(tab)
    expect(tab.locator(".canvas img")).not_to_have_attribute("src", first or "")


def test_sizes_of_stages_and_terms(tab: Locator) -> None:
    expect(tab.locator(".note")).to_contain_text("built-in demo")
    expect(tab.locator(".note")).to_contain_text("Non-Commercial Research")
    tab.get_by_role("button", name="Advanced").click()
    expect(tab.locator(".plan")).to_contain_text("Stage C full and Stage B full.")
    tab.locator(".segmented", has_text="Size of Stage C").get_by_text("lite", exact=True).click()
    expect(tab.locator(".plan")).to_contain_text("Stage C lite 1")
    tab.locator(".segmented", has_text="Size of Stage B").get_by_text("lite", exact=True).click()
    expect(tab.locator(".plan")).to_contain_text("has no lite Stage B: the full one runs.")
    expect(tab.locator(".plan h3").nth(1)).to_contain_text("Stage C: composition")
    quick(tab)
    generate(tab)
    choice = tab.get_by_role("combobox", name="Checkpoint")
    choice.fill("stable-cascade")
    choice.press("Enter")
    expect(tab.get_by_label("number input for Composition steps")).to_have_value("20")
    expect(tab.get_by_label("number input for Detail steps")).to_have_value("10")
    expect(tab.get_by_label("Width", exact=True)).to_have_value("1024")
    expect(tab.locator(".note")).to_contain_text("for research, not for commercial use")
    expect(tab.locator(".plan .parts").nth(1)).to_contain_text("GiB, ")


def test_tabs_in_turn(browser: Browser, server: Server) -> None:
    for page in opened(browser, server, viewport=WIDE):
        cascade = open_tab(page, CASCADE)
        quick(cascade)
        prompt(cascade).fill("a blue tent")
        generate(cascade)
        kept = cascade.locator(".canvas img").get_attribute("src")
        first = open_tab(page, SD15)
        expect(prompt(first)).to_have_value("")
        expect(first.locator(".canvas")).to_have_attribute("data-state", "idle")
        slider(first, "Steps", 2)
        generate(first)
        assert "UNet" in first.locator(".plan").inner_text()
        again = open_tab(page, CASCADE)
        expect(prompt(again)).to_have_value("a blue tent")
        expect(again.locator(".canvas img")).to_have_attribute("src", kept or "")
        assert "Stage A" in again.locator(".plan").inner_text()
        generate(again)
        expect(again.locator(".canvas img")).not_to_have_attribute("src", kept or "")
