"""The README promises nothing that is not there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

import app
from backend import SD3Request, SD15Request, StableCascadeRequest

ROOT = Path(app.__file__).parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_front_matter_of_a_hosted_space() -> None:
    front = yaml.safe_load(README.split("---")[1])
    assert front["sdk"] == "gradio"
    assert f"gradio=={front['sdk_version']}\n" in (ROOT / "requirements.txt").read_text()
    assert (ROOT / front["app_file"]).is_file()
    assert len(front["short_description"]) <= 60
    colours = {"red", "yellow", "green", "blue", "indigo", "purple", "pink", "gray"}
    assert {front["colorFrom"], front["colorTo"]} <= colours


def test_every_flag_is_explained(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        app.main(["--help"])
    flags = set(re.findall(r"--[a-z][a-z0-9-]+", capsys.readouterr().out)) - {"--help"}
    assert (
        set(re.findall(r"--[a-z][a-z0-9-]+", README.split("## Command line")[1].split("## From")[0])) == flags
    )


def test_python_blocks_are_python() -> None:
    blocks = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert len(blocks) == 4
    for block in blocks:
        compile(block, "README.md", "exec")
    for block, request in zip(blocks, (SD15Request, StableCascadeRequest, SD3Request), strict=False):
        for name in re.findall(r"(\w+)=", block):
            assert name == "api_name" or name in request.__dataclass_fields__


def test_runtime_pins_are_exact_and_torch_comes_first() -> None:
    lines = (ROOT / "requirements.txt").read_text().splitlines()
    pins = [line for line in lines if line and not line.startswith("#")]
    assert pins[0].startswith("torch==")
    assert all(re.fullmatch(r"[\w.-]+==[\w.]+", pin) for pin in pins)
    assert not any(pin.startswith("diffusers") for pin in pins)
