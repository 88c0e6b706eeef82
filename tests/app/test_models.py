"""The Models tab in a browser: a checkpoint is downloaded, paused, resumed, painted with and removed."""

from __future__ import annotations

import re
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from playwright.sync_api import Locator, Page, expect
from safetensors.torch import save_file

from tests.app.pages import generate, no_sideways_scroll, open_tab, reload, slider
from tests.app.support import Server, serving
from tests.checkpoints import sd15_folder, sd15_single_file
from tests.unit.test_hub import Hub

TITLE = "Stable Diffusion 1.5"
REPOSITORY = "stable-diffusion-v1-5/stable-diffusion-v1-5"
HELD = 5_000_000  # bytes of a file that come before the gate is open


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint whose UNet is large enough to be worth resuming."""
    wide: dict[str, Any] = {"block_out_channels": (64, 128, 128)}
    return sd15_folder(tmp_path_factory.mktemp("published") / "tiny", **wide)


@pytest.fixture(scope="module")
def published(folder: Path) -> Iterator[Hub]:
    hub = Hub()
    hub.folders[REPOSITORY] = folder
    hub.refusals["stabilityai/stable-diffusion-3-medium-diffusers"] = (401, "GatedRepo")
    hub.hold_after = HELD
    threading.Thread(target=hub.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    yield hub
    hub.gate.set()
    hub.shutdown()
    hub.server_close()


@pytest.fixture(scope="module")
def server(published: Hub, folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    place = tmp_path_factory.mktemp("models")
    (place / "models/loras").mkdir(parents=True)
    save_file({"lora_unet.lora_down.weight": torch.zeros(4)}, place / "models/loras/ink.safetensors")
    (place / "models/broken.safetensors").write_bytes(b"")
    flags = ("--models-dir", str(place / "models"))
    with serving(place, *flags, HF_ENDPOINT=published.url, OMP_NUM_THREADS="1") as server:
        yield server


def models(page: Page) -> Locator:
    page.get_by_role("tab", name="Models").click()
    page.locator(".models .state").first.wait_for()
    return page.get_by_role("tabpanel")


def row(shown: Locator, name: str) -> Locator:
    return shown.get_by_role("row").filter(has=shown.page.get_by_text(name, exact=True))


def test_a_download_is_paused_resumed_and_painted_with(
    wide: Page, server: Server, published: Hub, folder: Path
) -> None:
    asked: list[str] = []
    wide.on("request", lambda request: asked.append(request.url) if request.method == "POST" else None)
    shown = models(wide)
    mine = row(shown, "sd15")
    expect(mine).to_contain_text("not downloaded")
    mine.get_by_role("button", name=f"Download {TITLE}").focus()
    wide.keyboard.press("Enter")
    bar = mine.get_by_role("progressbar")
    expect(bar).to_have_attribute("aria-valuenow", re.compile(r"^1[2-9]"))
    expect(mine).to_contain_text(re.compile(r"5\.\d of 37\.\d MiB"))
    expect(mine).to_contain_text("the UNet")
    pause = mine.get_by_role("button", name=f"Pause the download of {TITLE}")
    expect(pause).to_be_focused()  # the button of before, under another name

    wide.keyboard.press("Enter")
    resume = mine.get_by_role("button", name=f"Resume the download of {TITLE}")
    expect(resume).to_be_focused()
    expect(mine).to_contain_text(re.compile(r"paused at 5\.\d of 37\.\d MiB"))
    expect(shown.get_by_role("status").filter(has_text="is paused")).to_be_visible()
    wide.wait_for_timeout(1500)
    count = len(asked)
    wide.wait_for_timeout(2500)
    assert len(asked) == count, "the page asks though nothing is downloaded"

    reload(wide)  # the page comes back to its tab
    shown = models(wide)
    expect(mine).to_contain_text(re.compile(r"paused at 5\.\d of 37\.\d MiB"))
    published.gate.set()
    resume.click()
    expect(mine.locator(".state")).to_have_text("here")
    expect(mine.get_by_role("button")).to_have_text("Remove")
    for part in ("unet", "vae"):  # put together from its pieces, it is what was published
        (here,) = (server.home.parent / "models").glob(f"models--stable*/snapshots/*/{part}/*.safetensors")
        assert here.read_bytes() == (folder / part / here.name).read_bytes()

    tab = open_tab(wide, TITLE)
    tab.get_by_role("button", name="Advanced").click()
    choice = tab.get_by_role("combobox", name="Checkpoint")
    choice.fill("sd15")
    choice.press("Enter")
    slider(tab, "Steps", 2)
    for side in ("Width", "Height"):
        tab.get_by_label(side, exact=True).fill("64")
    before = len(published.requests)
    expect(generate(tab)).to_contain_text("1 picture in")
    assert len(published.requests) == before
    assert len(server.pictures) == 1

    shown = models(wide)
    expect(shown.get_by_role("row", name=re.compile("^UNet sd15"))).to_be_visible()
    mine.get_by_role("button", name="Remove").click()
    question = wide.get_by_role("dialog", name=f"Remove {TITLE} from the disk?")
    wide.keyboard.press("Escape")
    expect(question).to_be_hidden()
    mine.get_by_role("button", name="Remove").click()
    question.get_by_role("button", name="Remove").click()
    told = shown.get_by_role("status").filter(has_text=re.compile(rf"Removed {TITLE}: [\d.]+ MiB are free\."))
    expect(told).to_be_visible()
    expect(mine).to_contain_text("not downloaded")
    expect(mine.get_by_role("button", name=f"Download {TITLE}")).to_be_focused()
    expect(shown.get_by_role("row", name=re.compile("^UNet sd15"))).to_have_count(0)


def test_a_gated_checkpoint_says_what_to_do(page: Page, published: Hub) -> None:
    shown = models(page)
    expect(shown.locator(".hint").filter(has_text="These are gated")).to_be_visible()
    mine = row(shown, "sd3-medium")
    mine.get_by_role("button", name=re.compile("Download|Try again to download")).click()
    link = mine.get_by_role("link", name=re.compile("^http"))
    expect(link).to_have_attribute("href", f"{published.url}/stabilityai/stable-diffusion-3-medium-diffusers")
    expect(mine).to_contain_text("accept its licence there, and give a token")
    expect(mine.get_by_role("button")).to_have_text("Try again")
    assert no_sideways_scroll(page)


def test_files_of_ones_own_are_listed_without_a_restart(page: Page, server: Server, folder: Path) -> None:
    shown = models(page)
    own = page.locator(".models.own")
    expect(own.get_by_role("row", name=re.compile("ink.safetensors"))).to_contain_text("a LoRA")
    expect(own.get_by_role("row", name=re.compile("broken.safetensors"))).to_contain_text("it is empty")
    new = server.home.parent / "models/new.safetensors"
    sd15_single_file(folder, new)
    shown.get_by_role("button", name="Look again").click()
    expect(own.get_by_role("row", name=re.compile("^new.safetensors"))).to_contain_text(TITLE)
    assert no_sideways_scroll(page)
    new.unlink()
    shown.get_by_role("button", name="Look again").click()
    expect(own.get_by_role("row", name=re.compile("^new.safetensors"))).to_have_count(0)
