"""The fold of adapters in a browser, on a public server: what the host has there, what the prompt names."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from PIL import Image
from playwright.sync_api import Browser, Locator, Page, expect
from safetensors.torch import load_file, save_file

from tests.app.pages import NARROW, WIDE, generate, no_sideways_scroll, opened, prompt, slider
from tests.app.support import DEMO, Server, serving
from tests.app.test_looks import violations
from tests.loras import pairs, trainers, weights_of

PAPER = "Paper & cut-out (v2) [x]"


def lora(path: Path, **told: str) -> None:
    """A small one for the demo, in the trainers' layout; `told` is its metadata."""
    trainers(path, {"unet": pairs(weights_of(DEMO / "unet"), ("attn2.to_k",))})
    save_file(load_file(path), path, metadata={f"modelspec.{key}": value for key, value in told.items()})


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("adapters") / "models"
    (folder / "loras").mkdir(parents=True)
    lora(folder / "loras/ink.safetensors", title="Ink drawings", trigger_phrase="ink drawing, black lines")
    lora(folder / f"{PAPER}.safetensors", title="<b>bold</b>")
    lora(folder / "lcm-lora.safetensors")
    save_file({"emb_params": torch.zeros(2, 768)}, folder / "bad-hands.safetensors")
    (folder / "damaged.safetensors").write_bytes(b"")
    return folder


@pytest.fixture(scope="module")
def server(models: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    flags = ("--public", "--models-dir", str(models))
    with serving(tmp_path_factory.mktemp("app"), *flags, OMP_NUM_THREADS="1") as server:
        yield server


def unfold(page: Page) -> Locator:
    """Open the fold → it, with what lies there."""
    fold = page.locator(".adapters-fold:visible")
    fold.locator("button.label-wrap").click()
    fold.locator(".hint").wait_for(state="attached")
    return fold


def names(rows: Locator) -> list[str]:
    return [each for each in rows.locator(".name").all_inner_texts() if each]


def button(on: Locator, name: str) -> Locator:
    return on.get_by_role("button", name=name, exact=True)


def test_the_prompt_says_which_adapters_are_used(browser: Browser, server: Server, models: Path) -> None:
    for page in opened(browser, server, viewport=WIDE):
        text, plan, fold = prompt(page), page.locator(".plan:visible"), unfold(page)
        used, there = fold.locator(".used .row"), fold.locator(".there li")
        expect(there.filter(has_text="Ink drawings")).to_be_visible()
        assert {"ink", PAPER, "lcm-lora", "bad-hands"} <= set(names(there))
        assert "damaged" not in fold.inner_text()
        expect(there.filter(has_text=PAPER)).to_contain_text("<b>bold</b>")

        # added, weighed while the slider moves, with its trigger word
        text.fill("a red house")
        button(fold, "Add ink").click()
        expect(text).to_have_value("a red house <lora:ink:1>")
        expect(plan).to_contain_text("The UNet has a LoRA")
        weight = used.get_by_role("slider", name="Weight")
        weight.focus()
        for _ in range(4):
            page.keyboard.press("ArrowLeft")
        expect(text).to_have_value("a red house <lora:ink:0.8>")
        expect(weight).to_be_focused()
        expect(used.get_by_role("spinbutton")).to_have_value("0.8")
        used.get_by_role("spinbutton").fill("-0.5")
        button(used, "ink drawing").click()
        button(used, "black lines").focus()
        page.keyboard.press("Enter")
        expect(text).to_have_value("a red house, ink drawing, black lines <lora:ink:-0.5>")
        expect(button(used, "ink drawing")).to_be_disabled()  # it is there already
        button(fold, f"Add {PAPER}").click()
        expect(text).to_have_value(f"a red house, ink drawing, black lines <lora:ink:-0.5> <lora:{PAPER}:1>")
        expect(plan).to_contain_text("The UNet has 2 LoRAs")
        button(there, f"Remove {PAPER}").click()
        expect(plan).to_contain_text("The UNet has a LoRA")

        # typed: two weights stay two, what is not there is said to be so
        text.fill("a red house <lora:INK.safetensors:0.5:te=0.25:unet=0.75>, <lora:lcm-lora> <lora:nobody:2>")
        expect(used).to_have_count(3)
        expect(plan).to_contain_text("there is no LoRA called 'nobody'")
        expect(used.nth(2)).to_contain_text("not found here")
        expect(used.nth(0)).not_to_contain_text("not found here")
        expect(used.nth(0).get_by_role("slider", name="Text weight")).to_have_value("0.25")
        used.nth(0).get_by_role("slider", name="Network weight").press("ArrowRight")
        expect(text).to_have_value(
            "a red house <lora:INK.safetensors:0.5:te=0.25:unet=0.8>, <lora:lcm-lora> <lora:nobody:2>"
        )
        button(used.nth(2), "Remove").click()
        expect(plan).to_contain_text("The UNet has 2 LoRAs")
        assert no_sideways_scroll(page)

        # made for few steps
        expect(used.nth(1)).to_contain_text("Made for few steps: LCM, 4 steps, guidance 1")
        button(used.nth(1), "Use these settings").click()
        expect(page.get_by_label("number input for Steps")).to_have_value("4")
        expect(page.get_by_label("number input for Guidance")).to_have_value("1")

        # an embedding is its name, in either prompt
        negative = page.get_by_label("Negative prompt")
        button(there, "Add to negative bad-hands").click()
        button(there, "Add bad-hands").click()
        expect(negative).to_have_value("bad-hands")
        expect(text).to_have_value(
            "a red house <lora:INK.safetensors:0.5:te=0.25:unet=0.8>, bad-hands <lora:lcm-lora>"
        )
        button(there, "Remove from negative bad-hands").click()
        button(there, "Remove bad-hands").click()
        expect(negative).to_have_value("")

        # what is put there now is found without a restart
        lora(models / "later.safetensors")
        fold.locator("button.label-wrap").click()
        unfold(page)
        expect(button(there, "Add later")).to_be_visible()
        fold.get_by_role("searchbox").fill("LAT")
        expect(there.filter(visible=True)).to_have_count(1)

        # a picture's text has the tags, and its settings bring them back
        tags = "a red house <lora:ink:0.5:0.8> <lora:later:-1>"
        text.fill(tags)
        slider(page, "Steps", 2)
        generate(page)
        with Image.open(server.pictures[-1]) as picture:
            assert picture.info["parameters"].startswith(tags)
        text.fill("")
        expect(used).to_have_count(0)
        page.get_by_role("button", name="Reuse these settings").click()
        expect(text).to_have_value(tags)
        expect(used).to_have_count(2)
        said = fold.get_by_role("status").filter(has_text="Raw prompt is on")
        page.get_by_role("button", name="Advanced").click()
        page.get_by_label("Raw prompt").check()
        expect(said).to_be_visible()
        expect(plan).not_to_contain_text("LoRA")
        for _ in range(2):  # made anew, it still knows
            fold.locator("button.label-wrap").click()
        expect(said).to_be_visible()
        page.get_by_label("Raw prompt").uncheck()
        expect(said).to_be_hidden()
        text.fill("a red house <lora:ink:much>")
        generate(page, "failed")
        expect(page.locator(".status:visible")).to_contain_text("the weight of 'ink'")


def test_it_fits_a_telephone_in_arabic(browser: Browser, server: Server, models: Path) -> None:
    for page in opened(browser, server, viewport=NARROW, locale="ar"):
        fold = unfold(page)
        fold.locator(".there li").first.wait_for()
        page.locator(".ask textarea").first.fill(f"<lora:{PAPER}:0.5:1> <lora:nobody:1>")
        expect(fold.locator(".used .row")).to_have_count(2)
        assert fold.locator(".used").evaluate("each => getComputedStyle(each).direction") == "rtl"
        assert no_sideways_scroll(page)
        assert violations(page) == []
        assert str(models) not in page.content()
        fold.scroll_into_view_if_needed()
