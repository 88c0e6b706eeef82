"""The README promises nothing that is not there."""

from __future__ import annotations

import re
from importlib import metadata
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement

import app
from backend import SD3Request, SD15Request, StableCascadeRequest

ROOT = Path(app.__file__).parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_front_matter_of_a_hosted_space() -> None:
    front = yaml.safe_load(README.split("---")[1])
    assert front["sdk"] == "gradio"
    assert pins("requirements.txt")["gradio"] == front["sdk_version"]
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


def test_the_examples_ask_for_what_there_is() -> None:
    """They are run by tests/app/test_programs.py."""
    blocks = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    for block, request in zip(blocks, (SD15Request, StableCascadeRequest, SD3Request), strict=False):
        for name in re.findall(r"(\w+)=", block):
            assert name == "api_name" or name in request.__dataclass_fields__


def pins(name: str) -> dict[str, str]:
    """Package → version, in the order of the file."""
    lines = (line.partition("#")[0].strip() for line in (ROOT / name).read_text().splitlines())
    found = [re.fullmatch(r"([\w.-]+)==([\w.]+)", line) for line in lines if line and line[:2] != "-r"]
    assert all(found), f"{name} has more than exact pins"
    return {each[1]: each[2] for each in found if each}


def test_runtime_pins_are_exact_and_torch_comes_first() -> None:
    runtime = pins("requirements.txt")
    assert next(iter(runtime)) == "torch"
    assert "diffusers" not in runtime
    assert list(pins("requirements-mcp.txt")) == ["mcp"]


@pytest.mark.parametrize("extra", ["", "mcp", "oauth"])
def test_the_pins_can_be_installed_beside_what_a_space_brings(extra: str) -> None:
    """It installs gradio[oauth,mcp] in the same step: it cannot be built where they contradict each other."""
    runtime, checked = pins("requirements.txt") | pins("requirements-mcp.txt"), 0
    for text in metadata.requires("gradio") or []:
        wanted = Requirement(text)
        if wanted.name in runtime and (wanted.marker is None or wanted.marker.evaluate({"extra": extra})):
            assert wanted.specifier.contains(runtime[wanted.name]), text
            checked += 1
    assert checked >= 5
