"""The command line: what flags and variables become, and what is said of those that cannot be."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from app import parse
from backend.settings import CHOICES
from tests import spaces_package
from tests.app.support import ROOT, Server, connected, environment, serving


def test_flags_become_settings() -> None:
    flags = ["--port", "0", "--vram", "6", "--auth", "me:a:b", "--offline", "--models-dir", "/models"]
    settings = parse(flags, {})
    assert (settings.port, settings.vram, settings.auth) == (0, 6.0, "me:a:b")
    assert settings.offline
    assert not settings.share
    assert settings.models_dir == Path("/models")


def test_each_flag_is_a_variable_and_the_flag_wins() -> None:
    variables = {
        "TRIPTYCH_PORT": "81",
        "TRIPTYCH_HOME": "/there",
        "TRIPTYCH_SHARE": "true",
        "TRIPTYCH_OFFLINE": "0",
    }
    settings = parse(["--port", "82"], variables)
    assert (settings.port, settings.home, settings.share, settings.offline) == (
        82,
        Path("/there"),
        True,
        False,
    )


@pytest.mark.parametrize("name", CHOICES)
def test_what_the_plan_decides_can_be_said_by_flag_and_variable(name: str) -> None:
    assert getattr(parse([], {}), name) == "auto"
    for choice in CHOICES[name]:
        assert getattr(parse([f"--{name.replace('_', '-')}", choice], {}), name) == choice
        assert getattr(parse([], {f"TRIPTYCH_{name.upper()}": choice}), name) == choice


def test_a_hosted_space_listens_everywhere_unless_told() -> None:
    assert parse([], {"SPACE_ID": "me/triptych"}).host == "0.0.0.0"
    assert parse([], {"SPACE_ID": "me/triptych", "TRIPTYCH_HOST": "127.0.0.2"}).host == "127.0.0.2"
    assert parse(["--host", "127.0.0.3"], {"SPACE_ID": "me/triptych"}).host == "127.0.0.3"
    assert parse([], {}).host == "127.0.0.1"


@pytest.mark.parametrize(
    ("flags", "variables", "message"),
    [
        (["--port", "many"], {}, "--port"),
        (["--port", "70000"], {}, "port is 70000; it can be 0 to 65535"),
        (["--device", "tpu"], {}, "device is 'tpu'; it can be auto, cpu, cuda, mps"),
        (["--dtype", "int4"], {}, "dtype is 'int4'"),
        (["--offload", "disk"], {}, "offload is 'disk'; it can be auto, none, model, sequential"),
        (
            ["--attention", "slow"],
            {},
            "attention is 'slow'; it can be auto, flash, efficient, cudnn, math, xfo",
        ),
        (["--attention-slicing", "1"], {}, "attention_slicing is '1'; it can be auto, on, off"),
        (["--vae-slicing", "no"], {}, "vae_slicing is 'no'; it can be auto, on, off"),
        ([], {"TRIPTYCH_VAE_TILING": "512"}, "vae_tiling is '512'; it can be auto, on, off"),
        (["--t5", "int4"], {}, "t5 is 'int4'; it can be auto, full, int8, nf4, off"),
        (["--device-map", "two"], {}, "device_map is 'two'; it can be auto, single, balanced"),
        (["--vram", "0"], {}, "vram is 0.0"),
        (["--auth", "me"], {}, "auth must be USER:PASSWORD"),
        (["--colour"], {}, "--colour"),
        ([], {"TRIPTYCH_SHARE": "perhaps"}, "TRIPTYCH_SHARE is 'perhaps'; it can be 1 or 0"),
        ([], {"TRIPTYCH_PORT": "x"}, "'x'"),
    ],
)
def test_bad_values_end_with_one_line(
    flags: list[str], variables: dict[str, str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as end:
        parse(flags, variables)
    said = capsys.readouterr().err
    assert end.value.code == 2
    assert message in said
    assert said.count("\n") == 1


def test_a_busy_port_is_told(server: Server, tmp_path: Path) -> None:
    port = server.url.rsplit(":", 1)[1].strip("/")
    said = refusal(tmp_path, "--port", port)
    assert f"port {port}" in said
    assert "--port" in said


def test_a_device_that_is_not_here_is_told(tmp_path: Path) -> None:
    said = refusal(tmp_path, "--port", "0", "--device", "cuda", CUDA_VISIBLE_DEVICES="")
    assert "device is 'cuda', which this machine lacks" in said


def refusal(folder: Path, *flags: str, **extra: str) -> str:
    """The one line that the program ends with."""
    command, variables = [sys.executable, "app.py", *flags], environment(folder, **extra)
    ended = subprocess.run(command, cwd=ROOT, env=variables, capture_output=True, text=True, check=False)
    assert ended.returncode == 1
    assert ended.stderr.count("\n") == 1
    return ended.stderr


def test_the_page_does_not_import_torch() -> None:
    program = "import sys, app; from ui import blocks, theme; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=True)


def test_where_gpus_are_lent_the_demos_are_loaded_first(tmp_path: Path) -> None:
    lent = spaces_package.write(tmp_path / "packages")
    with serving(tmp_path, "--compile", **lent) as server:
        client = connected(server, tmp_path)
        files, facts = client.predict(prompt="a red house", seed=7, steps=2, api_name="/sd15")
        assert len(files) == len(server.pictures) == 1
        assert facts["seeds"] == [7]
        said = server.log.read_text()
    assert "compile is ignored" in said
    assert "could not be prepared" not in said
