"""Start and stop: what flags and variables become, what is said of those that cannot be, how it ends."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NoReturn

import pytest
from gradio_client.exceptions import AppError
from playwright.sync_api import Browser

import app
from app import parse
from backend import Settings
from backend.settings import CHOICES
from tests import spaces_package
from tests.app.support import LONG, ROOT, Server, called_by, connected, environment, hub, serving

PATIENCE = 60.0  # seconds, for what takes one on a machine that is not busy
HOSTED = {  # as a Space sets them
    "SYSTEM": "spaces",
    "SPACE_ID": "me/triptych",
    "SPACE_HOST": "me-triptych.hf.space",
    "SPACE_AUTHOR_NAME": "me",
    "SPACE_REPO_NAME": "triptych",
    "ACCELERATOR": "none",
    "GRADIO_SERVER_NAME": "0.0.0.0",
    "GRADIO_NUM_PORTS": "1",
    "GRADIO_THEME": "huggingface",
    "GRADIO_SSR_MODE": "True",
    "GRADIO_ALLOW_FLAGGING": "never",
    "PYTHONUNBUFFERED": "1",
}


def wait_for(true: Callable[[], object], what: str) -> None:
    end = time.monotonic() + PATIENCE
    while not true():
        assert time.monotonic() < end, what
        time.sleep(0.02)


def test_flags_become_settings() -> None:
    flags = ["--port", "0", "--vram", "6", "--auth", "me:a:b", "--offline", "--models-dir", "/models"]
    settings = parse(flags, {})
    assert (settings.port, settings.vram, settings.auth) == (0, 6.0, "me:a:b")
    assert settings.offline
    assert not settings.share
    assert not settings.public
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


def test_names_are_lists() -> None:
    settings = parse(["--hosts", "studio.example.org, other.lan"], {"TRIPTYCH_FETCH": "sd15,sd3-medium,"})
    assert settings.hosts == ("studio.example.org", "other.lan")
    assert settings.fetch == ("sd15", "sd3-medium")


def test_strangers_are_expected_where_they_can_come() -> None:
    assert parse(["--public"], {}).public
    assert parse(["--share"], {}).public
    assert parse([], HOSTED).public
    assert not parse(["--auth", "me:secret", "--host", "0.0.0.0"], {}).public


def test_a_hosted_space_listens_everywhere_unless_told() -> None:
    settings = parse([], HOSTED)
    assert (settings.host, settings.port) == ("0.0.0.0", 7860)
    assert parse([], HOSTED | {"GRADIO_SERVER_PORT": "7861"}).port == 7861
    assert not parse(["--share"], HOSTED).share
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
        (["--hosts", "http://here/"], {}, "hosts has 'http://here/'; it can be names such as studio"),
        (["--fetch", "sdxl"], {}, "fetch has 'sdxl'; it can be sd15, sd3-medium, "),
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


def test_tools_without_their_package_are_told(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(app, "find_spec", lambda _: None)
    app.check_mcp(Settings())
    with pytest.raises(SystemExit):
        app.check_mcp(Settings(mcp=True))
    assert "pip install -r requirements-mcp.txt" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("host", "reason"),
    [("203.0.113.1", "Cannot assign requested address"), ("nobody.invalid", "not known|resolution")],
)
def test_an_address_that_is_not_ours_is_told(
    host: str, reason: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        app.take_port(Settings(host=host, port=0))
    assert re.search(rf"cannot listen on {host} port 0 \(.*({reason})", capsys.readouterr().err)


def test_a_port_that_only_the_system_may_take_is_told(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(*_: object) -> NoReturn:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(app, "probe", refuse)
    with pytest.raises(SystemExit):
        app.take_port(Settings(port=80))
    assert "cannot listen on 127.0.0.1 port 80 (Permission denied); choose" in capsys.readouterr().err


def test_a_machine_without_room_for_temporary_files_is_told(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "absent"))
    with pytest.raises(SystemExit):
        app.make_folder()
    said = capsys.readouterr().err
    assert "cannot make a temporary folder: " in said
    assert "TMPDIR" in said


def test_the_help_is_shown_on_any_console(tmp_path: Path) -> None:
    variables = environment(tmp_path, PYTHONIOENCODING="ascii", HOME=str(tmp_path / "Köln"))
    command = [sys.executable, "app.py", "--help"]
    done = subprocess.run(command, cwd=ROOT, env=variables, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr
    assert b"K\\xf6ln" in done.stdout


def refusal(folder: Path, *flags: str, **extra: str) -> str:
    """The one line that the program ends with."""
    command, variables = [sys.executable, "app.py", *flags], environment(folder, **extra)
    ended = subprocess.run(command, cwd=ROOT, env=variables, capture_output=True, text=True, check=False)
    assert ended.returncode == 1
    assert ended.stderr.count("\n") == 1
    return ended.stderr


def test_the_page_does_not_import_torch() -> None:
    program = "import sys, app; from ui import launch; sys.exit('torch' in sys.modules)"
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


# ---- installed as an app


def test_the_page_can_be_installed(server: Server, browser: Browser) -> None:
    page = browser.new_page()
    page.goto(server.url)
    tools = page.context.new_cdp_session(page)
    problems = tools.send("Page.getInstallabilityErrors")["installabilityErrors"]
    assert [each["errorId"] for each in problems] == ["in-incognito"]  # as every page of these tests
    with urllib.request.urlopen(f"{server.url}manifest.json") as answer:
        manifest = json.load(answer)
        assert answer.headers["Content-Type"] == "application/manifest+json"
    assert manifest["name"] == "Triptych"
    assert {each["purpose"] for each in manifest["icons"]} == {"any", "maskable"}
    for icon in manifest["icons"]:
        shown = page.request.get(server.url + icon["src"])
        assert shown.headers["content-type"] == "image/png"
        size = page.evaluate(
            "async (address) => { const image = new Image(); image.src = address; await image.decode();"
            " return `${image.naturalWidth}x${image.naturalHeight}`; }",
            icon["src"],
        )
        assert size == icon["sizes"]
    page.context.close()


# ---- on a Space


@pytest.fixture(scope="module")
def space(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server under a Space's variables, told to fetch what its hub lacks; a proxy leads nowhere."""
    nowhere = "http://127.0.0.1:9"
    with hub() as endpoint:
        variables: dict[str, Any] = HOSTED | {
            "HF_ENDPOINT": endpoint,
            "HTTP_PROXY": nowhere,
            "http_proxy": nowhere,
            "OMP_NUM_THREADS": "1",
            "TRIPTYCH_FETCH": "sd15",
            "TRIPTYCH_HOSTS": "studio.example.org",
        }
        with serving(tmp_path_factory.mktemp("space"), **variables) as server:
            yield server


def test_a_space_answers_from_outside_by_its_names(space: Server) -> None:
    assert called_by(space, "me-triptych.hf.space") == 200
    assert called_by(space, "studio.example.org") == 200
    assert called_by(space, "rebound.example.org") == 400
    with urllib.request.urlopen(space.url.replace("127.0.0.1", "127.0.0.2")) as answer:  # on all addresses
        assert "https://huggingface.co" in answer.headers["Content-Security-Policy"]
        assert "SameSite=None; Secure; Partitioned" in answer.headers["Set-Cookie"]


def test_a_space_is_for_strangers(space: Server, tmp_path: Path) -> None:
    client = connected(space, tmp_path)
    with pytest.raises(AppError, match="on this public server it can be demo"):
        client.predict(prompt="a red house", checkpoint="someone/else", api_name="/sd15")
    files, facts = client.predict(prompt="a red house", steps=2, seed=7, api_name="/sd15")
    assert Path(files[0]).read_bytes() == space.pictures[0].read_bytes()
    assert facts["seeds"] == [7]


def test_what_a_space_cannot_fetch_is_told(space: Server) -> None:
    wait_for(lambda: "triptych: " in space.log.read_text(), "nothing was told")
    assert "stable-diffusion-v1-5/stable-diffusion-v1-5 does not exist" in space.log.read_text()


# ---- the end


def left(folder: Path) -> list[Path]:
    return [*(folder / "tmp").iterdir(), *folder.rglob("*.part")]


def test_a_picture_that_is_being_painted_is_given_up(tmp_path: Path) -> None:
    with serving(tmp_path, OMP_NUM_THREADS="1") as server:
        client = connected(server, tmp_path / "downloads")
        job = client.submit(**LONG, api_name="/sd15")
        next(told for _, told in job if told["phase"] == "denoise")
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(PATIENCE) == 0, server.log.read_text()
        assert server.log.read_text() == f"Triptych is at {server.url}\n"
        assert not server.pictures
    assert not left(tmp_path)


@pytest.fixture
def terminal() -> Iterator[None]:
    """Signals are heard as in one: a program that was started in the background ignores some, and so would
    those that it starts."""
    heard = {signal.SIGINT: signal.default_int_handler, signal.SIGHUP: signal.SIG_DFL}
    before = {number: signal.signal(number, handler) for number, handler in heard.items()}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.usefixtures("terminal")
def test_a_start_that_is_interrupted_leaves_nothing_behind(tmp_path: Path) -> None:
    variables = environment(tmp_path, OMP_NUM_THREADS="1")
    started = subprocess.Popen(
        [sys.executable, "app.py", "--port", "0", "--home", str(tmp_path / "home")],
        cwd=ROOT,
        env=variables,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    wait_for(lambda: left(tmp_path), "it did not start")
    started.send_signal(signal.SIGINT)
    said, _ = started.communicate(timeout=PATIENCE)
    assert (started.returncode, said) == (0, b"")
    assert not left(tmp_path)


ENDING = """
import sys, time, app
ending = app.end_on_signals()
try:
    {first}
finally:
    {then}
"""
WAIT = "print('a line', flush=True); time.sleep(600)"


def ended(first: str, then: str, *numbers: signal.Signals) -> int:
    """The code that a program ends with which gets a signal at each line that it says."""
    code = ENDING.format(first=first, then=then)
    command: Any = [sys.executable, "-c", code]
    program = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert program.stdout is not None
    for number in numbers:
        assert program.stdout.readline()
        program.send_signal(number)
    _, said = program.communicate(timeout=PATIENCE)
    assert not said
    return program.returncode


@pytest.mark.usefixtures("terminal")
def test_one_signal_ends_it_in_order_and_two_at_once() -> None:
    assert ended(WAIT, "pass", signal.SIGINT) == 0
    assert ended(WAIT, "pass", signal.SIGHUP) == 0  # the terminal is closed
    assert ended(WAIT, WAIT, signal.SIGINT, signal.SIGINT) == 128 + signal.SIGINT
    assert ended(WAIT, WAIT, signal.SIGTERM, signal.SIGTERM) == 128 + signal.SIGTERM


@pytest.mark.usefixtures("terminal")
def test_an_end_that_somebody_swallows_is_remembered() -> None:
    swallowed = f"""
    try:
        {WAIT}
    except SystemExit:
        pass
    sys.exit(3 if ending.is_set() else 4)"""
    assert ended(swallowed.strip(), "pass", signal.SIGINT) == 3
