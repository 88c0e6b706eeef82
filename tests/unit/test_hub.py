"""Hub repositories, against a small hub on this machine: downloads, resuming, and every refusal."""

from __future__ import annotations

import hashlib
import json
import shutil
import threading
from collections.abc import Generator, Iterator
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import huggingface_hub.constants
import pytest
import torch
from safetensors.torch import load_file, save_file

from backend.cascade import keys as cascade_keys
from backend.errors import AccessError, CheckpointError, InvalidRequest
from backend.events import Loading
from backend.sd3 import keys as sd3_keys
from backend.sd15 import keys
from backend.settings import Settings
from backend.text.encoders import load_tokenizer
from backend.weights import hub
from backend.weights.source import Source, resolve
from tests.checkpoints import (
    cascade_folder,
    cascade_single_files,
    sd3_folder,
    sd3_single_file,
    sd15_folder,
    sd15_single_file,
)
from tests.flax_files import FILES, flax_folder

NETWORKS = keys.COMPONENTS
COMMIT = "0123456789abcdef0123456789abcdef01234567"
UNET = "unet/diffusion_pytorch_model.safetensors"


class Hub(ThreadingHTTPServer):
    """Serves folders as repositories; `refusals` are (status, error code) by repository."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.folders: dict[str, Path] = {}
        self.refusals: dict[str, tuple[int, str]] = {}
        self.token: str | None = None  # the one that lifts the refusals
        self.listed = False  # whether refused repositories tell what they hold, as gated ones do
        self.message = "no"
        self.break_after: int | None = None  # bytes of a body, once
        self.corrupt = False
        self.hold_after: int | None = None  # bytes of a body, until the gate is open
        self.gate = threading.Event()
        self.requests: list[tuple[str, str, str | None]] = []  # method, path, range

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def fetched(self, file: str) -> list[str | None]:
        """The ranges of the downloads of `file` so far."""
        return [asked for method, path, asked in self.requests if method == "GET" and path.endswith(file)]


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_HEAD(self) -> None:
        self.answer(body=False)

    def do_GET(self) -> None:
        self.answer(body=True)

    @property
    def hub(self) -> Hub:
        assert isinstance(self.server, Hub)
        return self.server

    def answer(self, *, body: bool) -> None:
        path = unquote(urlsplit(self.path).path).removeprefix("/")
        self.hub.requests.append((self.command, path, self.headers.get("Range")))
        listing = path.startswith("api/models/")
        owner, name, *rest = path.removeprefix("api/models/").split("/")
        repository = f"{owner}/{name}"
        status, code = self.hub.refusals.get(repository, (0, ""))
        refused = status and not (listing and self.hub.listed)
        if refused and self.headers.get("Authorization") != f"Bearer {self.hub.token}":
            return self.send(status, {"X-Error-Code": code, "X-Error-Message": self.hub.message})
        folder = self.hub.folders.get(repository)
        if folder is None:
            return self.send(404, {"X-Error-Code": "RepoNotFound"})
        if listing and rest and rest[-1] != "main":
            return self.send(404, {"X-Error-Code": "RevisionNotFound"})
        if listing:
            files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
            siblings = [
                {
                    "rfilename": path.relative_to(folder).as_posix(),
                    "size": path.stat().st_size,
                    "lfs": {"sha256": sha256(path), "size": path.stat().st_size, "pointerSize": 130},
                }
                for path in files
            ]
            content = json.dumps({"id": repository, "sha": COMMIT, "siblings": siblings}).encode()
            return self.send(200, {"Content-Type": "application/json"}, content)
        _, revision, *file = rest  # "resolve"
        if revision not in ("main", COMMIT):
            return self.send(404, {"X-Error-Code": "RevisionNotFound"})
        if not (folder / "/".join(file)).is_file():
            return self.send(404, {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": COMMIT})
        content = (folder / "/".join(file)).read_bytes()
        headers = {"X-Repo-Commit": COMMIT, "ETag": f'"{sha256(folder / "/".join(file))}"'}
        status = 200
        if (asked := self.headers.get("Range")) and body:
            first = int(asked.removeprefix("bytes=").rstrip("-"))
            headers["Content-Range"] = f"bytes {first}-{len(content) - 1}/{len(content)}"
            content, status = content[first:], 206
        if self.hub.corrupt and len(content) > 5000:
            content = content[:-1] + bytes([content[-1] ^ 1])
        return self.send(status, headers, content, body=body)

    def send(self, status: int, headers: dict[str, str], content: bytes = b"", *, body: bool = True) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(content))}.items():
            self.send_header(name, value)
        self.end_headers()
        if body and self.hub.break_after is not None and len(content) > self.hub.break_after:
            content, self.hub.break_after = content[: self.hub.break_after], None
            self.close_connection = True
        with suppress(OSError):  # nobody waits for it any more
            if body and self.hub.hold_after is not None and len(content) > self.hub.hold_after:
                self.wfile.write(content[: self.hub.hold_after])
                content = content[self.hub.hold_after :]
                self.hub.gate.wait(60)
            if body:
                self.wfile.write(content)

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002
        pass


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return sd15_folder(tmp_path_factory.mktemp("hub-layout") / "tiny")


def use_hub(monkeypatch: pytest.MonkeyPatch, url: str) -> None:
    """What HF_ENDPOINT does before the library is imported."""
    template = url + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", url)
    monkeypatch.setattr(huggingface_hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)


@pytest.fixture
def server(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    server = Hub()
    server.folders["owner/tiny"] = folder
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    use_hub(monkeypatch, server.url)
    monkeypatch.setattr(hub, "SMALL", 100_000)  # so that weights count as large, and configs do not
    monkeypatch.setattr(hub, "INTERVAL", 0.0)
    monkeypatch.delenv("HF_TOKEN", raising=False)
    yield server
    server.shutdown()
    server.server_close()


def source(tmp_path: Path, checkpoint: str = "owner/tiny", **options: Any) -> Source:
    settings = Settings(home=tmp_path, models_dir=tmp_path / "models", offline=options.pop("offline", False))
    return resolve(checkpoint, "sd15", settings, **options)


def fetch(source: Source, *components: str) -> list[Loading]:
    return list(source.fetch(components or NETWORKS, "float32"))


def test_a_repository_is_downloaded_once_with_progress(server: Hub, folder: Path, tmp_path: Path) -> None:
    events = fetch(source(tmp_path))
    assert {event.action for event in events} == {"download"}
    assert {*NETWORKS, "tokenizer", "scheduler", "checkpoint"} == {event.component for event in events}
    last = [event for event in events if event.component == "unet"][-1]
    assert last.done_bytes == last.total_bytes == (folder / UNET).stat().st_size

    again = source(tmp_path)
    local = resolve(str(folder), "sd15", Settings(home=tmp_path))
    server.requests.clear()
    assert fetch(again) == []
    assert server.requests == []  # what is there needs no hub
    for name in NETWORKS:
        ours, theirs = again.tensors(name, "float32"), local.tensors(name, "float32")
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[key], theirs[key]) for key in theirs)
    assert load_tokenizer(again)("a red house").input_ids == load_tokenizer(local)("a red house").input_ids
    assert fetch(source(tmp_path, offline=True)) == []


def test_before_the_download_the_published_values_stand_in(server: Hub, tmp_path: Path) -> None:
    unseen = source(tmp_path, "sd15")
    assert unseen.config("unet") == keys.PUBLISHED["unet"]
    assert unseen.parameter_bytes("unet", "float16") == 2 * 859_520_000
    assert "not downloaded" in unseen.fingerprint("unet", "float16")
    assert not unseen.present(["unet"], "float16")
    assert unseen.extras() == {}
    with pytest.raises(CheckpointError, match="sd15 is not downloaded yet"):
        unseen.tensors("unet", "float16")
    assert server.requests == []
    seen = source(tmp_path)
    fetch(seen)
    assert seen.config("unet")["cross_attention_dim"] == 64
    assert seen.parameter_bytes("text_encoder", "float16") < 1_000_000


def test_only_what_is_asked_for_is_downloaded(server: Hub, tmp_path: Path) -> None:
    vae = source(tmp_path)
    fetch(vae, "vae")
    assert vae.present(["vae"], "float32")
    assert not vae.present(["unet"], "float32")
    assert not server.fetched(UNET)
    fetch(vae, "unet")
    assert vae.present(["unet", "vae"], "float32")


def test_a_download_that_was_stopped_goes_on_where_it_was(server: Hub, folder: Path, tmp_path: Path) -> None:
    size = (folder / UNET).stat().st_size
    stopped = source(tmp_path).fetch(["unet"], "float32")
    seen = 0
    assert isinstance(stopped, Generator)
    for event in stopped:
        if event.component == "unet" and event.total_bytes == size:
            seen = event.done_bytes
            break
    stopped.close()  # as the Stop button does
    assert 0 < seen < size
    whole = source(tmp_path)
    fetch(whole, "unet")
    first, second = server.fetched(UNET)
    assert first == "bytes=0-"
    assert second is not None
    assert seen <= int(second.removeprefix("bytes=").rstrip("-")) < size
    assert (whole.files("unet", "float32")[1]).read_bytes() == (folder / UNET).read_bytes()


def test_a_fetch_that_was_stopped_at_its_first_file_misses_nothing(server: Hub, tmp_path: Path) -> None:
    stopped = source(tmp_path).fetch(NETWORKS, "float32")
    assert isinstance(stopped, Generator)
    next(stopped)
    stopped.close()
    whole = source(tmp_path)
    fetch(whole)
    assert whole.present([*NETWORKS, "tokenizer", "scheduler"], "float32")
    assert all((whole.files(name, "float32")[0]).is_file() for name in (*NETWORKS, "scheduler"))


def test_a_broken_connection_is_taken_up_again(server: Hub, folder: Path, tmp_path: Path) -> None:
    server.break_after = 3_000_000
    whole = source(tmp_path)
    fetch(whole, "unet")
    assert server.fetched(UNET) == ["bytes=0-", "bytes=3000000-"]
    assert (whole.files("unet", "float32")[1]).read_bytes() == (folder / UNET).read_bytes()


def test_a_file_that_arrives_damaged_is_not_kept(server: Hub, tmp_path: Path) -> None:
    server.corrupt = True
    with pytest.raises(CheckpointError, match="arrived damaged and was removed; try again"):
        fetch(source(tmp_path), "unet")
    server.corrupt = False
    whole = source(tmp_path)
    fetch(whole, "unet")
    assert whole.present(["unet"], "float32")


def test_a_disk_without_room_is_told_before_the_download(
    server: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(hub.shutil, "disk_usage", lambda path: usage)
    with pytest.raises(CheckpointError, match=r"needs 0\.0 GB more in .* where 0\.0 GB are free"):
        fetch(source(tmp_path), "unet")
    assert not server.fetched(UNET)


@pytest.mark.parametrize("status", [401, 403])
def test_a_gated_repository_says_what_to_do(
    server: Hub, tmp_path: Path, status: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.refusals["owner/tiny"] = (status, "GatedRepo")
    with pytest.raises(AccessError) as refused:
        fetch(source(tmp_path))
    for part in ("owner/tiny is gated", f"visit {server.url}/owner/tiny", "accept its licence", "HF_TOKEN"):
        assert part in str(refused.value)
    server.token = "hf_secret"
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    assert fetch(source(tmp_path), "vae")  # and with the token it comes


@pytest.mark.parametrize(
    ("refusal", "told"),
    [
        ((404, "RepoNotFound"), "owner/tiny does not exist on .*, or is private"),
        ((401, "RepoNotFound"), "owner/tiny does not exist on .*, or is private"),
        ((401, ""), "does not exist|refused"),
        ((403, ""), r"refused \(403\): give a token"),
        ((500, ""), "answered 500 for owner/tiny; try again later"),
    ],
)
def test_other_refusals(server: Hub, tmp_path: Path, refusal: tuple[int, str], told: str) -> None:
    server.refusals["owner/tiny"] = refusal
    with pytest.raises(AccessError, match=told):
        fetch(source(tmp_path))


def test_a_hub_out_of_reach(server: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    use_hub(monkeypatch, "http://127.0.0.1:9")
    with pytest.raises(
        AccessError, match=r"cannot be reached for owner/tiny \(ConnectError\): check the network"
    ):
        fetch(source(tmp_path))


def test_offline_and_not_downloaded(server: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(
        AccessError, match=r"owner/tiny is not downloaded, and downloads are off \(--offline\)"
    ):
        fetch(source(tmp_path, offline=True))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(AccessError, match="downloads are off"):
        fetch(source(tmp_path))
    assert server.requests == []


def test_a_name_that_no_repository_can_have(server: Hub, tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest, match="a hub repository is OWNER/NAME"):
        fetch(source(tmp_path, "owner/--bad--..name"))


def test_another_family_is_refused_before_its_weights_are_downloaded(
    server: Hub, folder: Path, tmp_path: Path
) -> None:
    spoilt = shutil.copytree(folder, tmp_path / "spoilt")
    index = json.loads((spoilt / "model_index.json").read_text())
    (spoilt / "model_index.json").write_text(
        json.dumps({**index, "_class_name": "StableDiffusionXLPipeline"})
    )
    server.folders["owner/xl"] = spoilt
    with pytest.raises(CheckpointError, match="owner/xl is a Stable Diffusion XL checkpoint"):
        fetch(source(tmp_path, "owner/xl"))
    assert not any(path.endswith(".safetensors") for _, path, _ in server.requests)


def test_a_repository_of_single_files_says_which(server: Hub, folder: Path, tmp_path: Path) -> None:
    root = tmp_path / "files"
    root.mkdir()
    sd15_single_file(folder, root / "v1.safetensors")
    server.folders["owner/files"] = root
    with pytest.raises(
        CheckpointError, match=r"but paste the URL of one of its single files: v1\.safetensors"
    ):
        fetch(source(tmp_path, "owner/files"))


def test_flaxs_files_are_downloaded_where_there_are_no_others(
    server: Hub, folder: Path, tmp_path: Path
) -> None:
    only = server.folders["owner/flax"] = flax_folder(folder, tmp_path / "flax")
    both = server.folders["owner/both"] = Path(shutil.copytree(folder, tmp_path / "both"))
    for component, file in FILES.items():
        shutil.copy(only / component / file, both / component)
    for name in ("owner/flax", "owner/both"):
        assert fetch(source(tmp_path, name))
        assert source(tmp_path, name).present([*NETWORKS, "tokenizer", "scheduler"], "float32")
    asked = [path for method, path, _ in server.requests if method == "GET"]
    assert {path.split("/")[1] for path in asked if path.endswith(".msgpack")} == {"flax"}
    assert {path.split("/")[1] for path in asked if path.endswith(".safetensors")} == {"both"}


def test_flaxs_files_of_other_families_are_refused_before_they_are_downloaded(
    server: Hub, tmp_path: Path
) -> None:
    root = server.folders["owner/sd3"] = tmp_path / "sd3"
    (root / "transformer").mkdir(parents=True)
    (root / "model_index.json").write_text('{"_class_name": "StableDiffusion3Pipeline"}')
    (root / "transformer/config.json").write_text("{}")
    (root / "transformer/diffusion_flax_model.msgpack").write_bytes(bytes(9))
    mine = resolve("owner/sd3", "sd3", Settings(home=tmp_path, models_dir=tmp_path / "models"))
    with pytest.raises(CheckpointError, match="has the weights for transformer in Flax's form only"):
        fetch(mine, "transformer")
    assert not server.fetched(".msgpack")


def test_a_pasted_url_of_a_single_file(server: Hub, folder: Path, tmp_path: Path) -> None:
    root = tmp_path / "files"
    root.mkdir()
    sd15_single_file(folder, root / "v1.safetensors")
    server.folders["owner/files"] = root
    url = f"{server.url}/owner/files/blob/main/v1.safetensors"
    file = source(tmp_path, url, config_from="owner/tiny")
    assert fetch(file)
    assert file.config("unet")["cross_attention_dim"] == 64
    assert not server.fetched(UNET)  # the complement gives its configs and tokenizer alone
    assert load_tokenizer(file)("a").input_ids
    local = resolve(str(folder), "sd15", Settings(home=tmp_path))
    ours, theirs = file.tensors("unet", "float32"), local.tensors("unet", "float32")
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    server.requests.clear()
    assert fetch(source(tmp_path, url, config_from="owner/tiny")) == []
    assert server.requests == []
    with pytest.raises(CheckpointError, match=r"owner/files has no file v2\.safetensors"):
        fetch(source(tmp_path, url.replace("v1", "v2"), config_from="owner/tiny"))


def test_a_single_file_gets_the_published_tokenizer(server: Hub, folder: Path, tmp_path: Path) -> None:
    file = sd15_single_file(folder, tmp_path / "v1.safetensors")
    with pytest.raises(CheckpointError, match=r"holds no tokenizer, .*config_from.*does not exist"):
        fetch(source(tmp_path, str(file)))
    server.folders["stable-diffusion-v1-5/stable-diffusion-v1-5"] = folder
    standard = source(tmp_path, str(file))
    assert {event.component for event in fetch(standard)} == {"checkpoint", "tokenizer", "scheduler"}
    assert load_tokenizer(standard)("a red house").input_ids


def test_a_revision_that_is_not_there(server: Hub, tmp_path: Path) -> None:
    with pytest.raises(AccessError, match="owner/tiny has no revision v9"):
        fetch(source(tmp_path, f"{server.url}/owner/tiny/resolve/v9/v1.safetensors"))


def test_the_shard_index_of_a_repository_leads_nowhere_else(
    server: Hub, folder: Path, tmp_path: Path
) -> None:
    spoilt = shutil.copytree(folder, tmp_path / "spoilt")
    (spoilt / UNET).unlink()
    index = {"weight_map": {"a": "../../../../evil.safetensors"}}
    (spoilt / f"{UNET}.index.json").write_text(json.dumps(index))
    server.folders["owner/evil"] = spoilt
    with pytest.raises(CheckpointError, match="can name weight files beside it only"):
        fetch(source(tmp_path, "owner/evil"))


# --- releases in parts -------------------------------------------------------------------------------------

PRIOR, DECODER = "stabilityai/stable-cascade-prior", "stabilityai/stable-cascade"


@pytest.fixture(scope="module")
def halves(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Stable Cascade, with files in bfloat16 beside the plain ones of the stages."""
    folder = cascade_folder(tmp_path_factory.mktemp("cascade") / "tiny")
    for file in folder.rglob("*/diffusion_pytorch_model.safetensors"):
        half = {name: tensor.bfloat16() for name, tensor in load_file(file).items()}
        if file.parent.name != "vqgan":  # as published
            save_file(half, file.with_name("diffusion_pytorch_model.bf16.safetensors"))
    return folder


@pytest.fixture
def cascade_hub(server: Hub, halves: Path) -> Hub:
    for name in (PRIOR, DECODER):
        server.folders[name] = halves / name.partition("/")[2]
    return server


def cascade(tmp_path: Path, checkpoint: str = "stable-cascade", config_from: str | None = None) -> Source:
    settings = Settings(home=tmp_path, models_dir=tmp_path / "models")
    return resolve(checkpoint, "stable_cascade", settings, config_from)


def weights(server: Hub) -> set[str]:
    """The folders whose weights were downloaded, and which variant."""
    paths = (path for method, path, _ in server.requests if method == "GET" and path.endswith(".safetensors"))
    return {f"{Path(path).parent.name}{'.bf16' if 'bf16' in path else ''}" for path in paths}


def test_both_halves_of_a_release_are_downloaded(cascade_hub: Hub, halves: Path, tmp_path: Path) -> None:
    unseen = cascade(tmp_path)
    assert unseen.config("prior_lite")["block_out_channels"] == [1536, 1536]
    assert unseen.parameter_bytes("decoder", "bfloat16") == 2 * 1_562_900_000
    assert all(
        unseen.has(name) for name in cascade_keys.PUBLISHED if name not in ("effnet_encoder", "previewer")
    )
    assert not unseen.has("previewer")
    assert not unseen.present(["prior"], "bfloat16")
    assert cascade_hub.requests == []

    wanted = ("prior_lite", "text_encoder", "decoder", "vqgan")
    events = list(unseen.fetch(wanted, "bfloat16"))
    assert {event.component for event in events} == {
        *wanted, "checkpoint", "tokenizer", "scheduler", "prior_scheduler",
    }  # fmt: skip
    assert weights(cascade_hub) == {"prior_lite.bf16", "text_encoder", "decoder.bf16", "vqgan"}

    seen, local = cascade(tmp_path), resolve(str(halves), "stable_cascade", Settings(home=tmp_path))
    assert seen.present([*wanted, "tokenizer", "scheduler", "prior_scheduler"], "bfloat16")
    assert not seen.present(["prior"], "bfloat16")
    for name in wanted:
        ours, theirs = seen.tensors(name, "bfloat16"), local.tensors(name, "bfloat16")
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[key], theirs[key]) for key in theirs)
        assert seen.parameter_bytes(name, "float32") == local.parameter_bytes(name, "float32")
    assert seen.config("prior")["block_out_channels"] == [128, 128]  # small files come for all
    assert load_tokenizer(seen)("a red house").input_ids == load_tokenizer(local)("a red house").input_ids
    cascade_hub.requests.clear()
    assert list(cascade(tmp_path).fetch(wanted, "bfloat16")) == []
    assert cascade_hub.requests == []
    assert list(seen.fetch(["image_encoder"], "bfloat16"))
    assert weights(cascade_hub) == {"image_encoder"}
    assert seen.config("feature_extractor")["size"] == {"shortest_edge": 28}


@pytest.mark.parametrize(("dtype", "kept"), [("float16", ".bf16"), ("float32", "")])
def test_the_variant_that_suits_the_run_is_downloaded(
    cascade_hub: Hub, tmp_path: Path, dtype: str, kept: str
) -> None:
    assert list(cascade(tmp_path).fetch(["decoder_lite"], dtype))
    assert weights(cascade_hub) == {f"decoder_lite{kept}"}
    assert not any(path.startswith(f"api/models/{PRIOR}") for _, path, _ in cascade_hub.requests)


@pytest.mark.parametrize("name", ["owner/my-prior", "owner/mine"])  # the second looks like a decoder at first
def test_a_half_of_somebodys_is_completed_by_the_published_one(
    cascade_hub: Hub, halves: Path, tmp_path: Path, name: str
) -> None:
    mine = shutil.copytree(halves / "stable-cascade-prior", tmp_path / "mine")
    shutil.rmtree(mine / "prior_lite")
    shutil.rmtree(mine / "text_encoder")
    cascade_hub.folders[name] = mine
    wanted = ("prior", "text_encoder", "decoder_lite", "vqgan")
    assert all(map(cascade(tmp_path, name).has, ("prior", "decoder", "vqgan", "text_encoder")))
    assert list(cascade(tmp_path, name).fetch(wanted, "float32"))
    whole = cascade(tmp_path, name)
    assert whole.present(wanted, "float32")
    assert f"models--{name.replace('/', '--')}" in str(whole.files("prior", "float32")[1])
    assert "models--stabilityai--stable-cascade" in str(whole.files("decoder_lite", "float32")[1])
    assert "models--stabilityai--stable-cascade" in str(whole.files("text_encoder", "float32")[1])
    assert not whole.has("prior_lite")  # the published one is no smaller form of somebody's
    assert whole.has("decoder")
    assert load_tokenizer(whole)("a").input_ids


def test_the_name_of_either_half_means_the_whole(cascade_hub: Hub, tmp_path: Path) -> None:
    for name in (PRIOR, DECODER, f"{cascade_hub.url}/{DECODER}"):
        assert all(map(cascade(tmp_path, name).has, ("prior_lite", "decoder_lite", "vqgan", "image_encoder")))
    assert list(cascade(tmp_path, DECODER).fetch(["prior_lite", "vqgan"], "float32"))
    assert cascade(tmp_path, PRIOR).present(["prior_lite", "vqgan"], "float32")


def test_half_a_folder_takes_the_other_half_from_the_hub(
    cascade_hub: Hub, halves: Path, tmp_path: Path
) -> None:
    whole = cascade(tmp_path, str(halves / "stable-cascade-prior"), config_from=DECODER)
    assert list(whole.fetch(["prior", "text_encoder", "decoder", "vqgan"], "bfloat16"))
    assert weights(cascade_hub) == {"decoder.bf16", "vqgan"}


def test_a_pasted_url_of_an_original_file(cascade_hub: Hub, halves: Path, tmp_path: Path) -> None:
    cascade_single_files(tmp_path / "original", halves)
    cascade_hub.folders["owner/files"] = tmp_path / "original"
    url = f"{cascade_hub.url}/owner/files/blob/main/stage_c.safetensors"
    unseen = cascade(tmp_path, url)
    assert all(map(unseen.has, ("prior", "decoder", "text_encoder")))
    assert unseen.parameter_bytes("prior", "float16") == 2 * 3_589_100_000
    assert list(unseen.fetch(["prior", "text_encoder", "decoder_lite", "vqgan"], "float32"))
    assert weights(cascade_hub) == {COMMIT, "text_encoder", "decoder_lite", "vqgan"}
    seen, local = cascade(tmp_path, url), resolve(str(halves), "stable_cascade", Settings(home=tmp_path))
    ours, theirs = seen.tensors("prior", "float32"), local.tensors("prior", "float32")
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)
    assert seen.present(["text_encoder", "decoder_lite", "vqgan", "tokenizer"], "float32")
    assert not seen.has("prior_lite")


def test_a_half_of_another_family_is_refused_before_its_weights_are_downloaded(
    cascade_hub: Hub, tmp_path: Path
) -> None:
    with pytest.raises(
        CheckpointError, match="owner/tiny is a Stable Diffusion 1.5 checkpoint, and a Stable C"
    ):
        list(cascade(tmp_path, "owner/tiny").fetch(["prior", "vqgan"], "float32"))
    assert weights(cascade_hub) == set()


# --- gated releases, and large encoders in shards ----------------------------------------------------------

GATED = "stabilityai/stable-diffusion-3-medium-diffusers"
SHARDS = tuple(f"model-0000{number}-of-00002.safetensors" for number in (1, 2))
WITHOUT_T5 = sd3_keys.REQUIRED


@pytest.fixture(scope="module")
def sd3_files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Stable Diffusion 3: T5 in two shards, the CLIP models also in float16, as published."""
    folder = sd3_folder(tmp_path_factory.mktemp("sd3") / "tiny")
    whole = folder / "text_encoder_3/model.safetensors"
    tensors = load_file(whole)
    whole.unlink()
    weight_map = {name: SHARDS[number % 2] for number, name in enumerate(sorted(tensors))}
    for shard in SHARDS:
        part = {name: tensor for name, tensor in tensors.items() if weight_map[name] == shard}
        save_file(part, whole.with_name(shard))
    index = {"metadata": {}, "weight_map": weight_map}
    whole.with_name("model.safetensors.index.json").write_text(json.dumps(index))
    for encoder in ("text_encoder", "text_encoder_2"):
        half = {
            name: tensor.half() for name, tensor in load_file(folder / encoder / "model.safetensors").items()
        }
        save_file(half, folder / encoder / "model.fp16.safetensors")
    return folder


@pytest.fixture
def gated(server: Hub, sd3_files: Path) -> Hub:
    """Its repository shows what it holds to everybody, and gives it to those with the token."""
    server.folders[GATED] = sd3_files
    server.refusals[GATED] = (401, "GatedRepo")
    server.listed = True
    server.token = "hf_secret"
    return server


@pytest.fixture
def opened(gated: Hub, monkeypatch: pytest.MonkeyPatch) -> Hub:
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    return gated


def sd3(tmp_path: Path, checkpoint: str = "sd3-medium", config_from: str | None = None) -> Source:
    settings = Settings(home=tmp_path, models_dir=tmp_path / "models")
    return resolve(checkpoint, "sd3", settings, config_from)


@pytest.mark.parametrize("listed", [True, False])
@pytest.mark.parametrize("status", [401, 403])
def test_without_access_the_error_says_what_to_do(
    gated: Hub, tmp_path: Path, listed: bool, status: int
) -> None:
    gated.refusals[GATED] = (status, "GatedRepo")
    gated.listed = listed
    with pytest.raises(AccessError) as refused:
        list(sd3(tmp_path).fetch(WITHOUT_T5, "float32"))
    assert str(refused.value) == (
        f"{GATED} is gated: visit {gated.url}/{GATED}, accept its licence there, and give a token in the "
        "environment variable HF_TOKEN, or by `hf auth login` that may read gated repositories"
    )
    assert weights(gated) == set()


MESSAGE = "Please enable access to public gated repositories in your fine-grained token settings"
LACKING = (
    "is gated, and the token given may not read it: visit .*, accept its licence there with the account that "
    "the token is of, and if it is a fine-grained token, allow it to read gated repositories$"
)
REFUSED = rf"refused \(403\): give a token in .*, or check what the one given may read; it says: {MESSAGE}$"


@pytest.mark.parametrize("listed", [True, False])
@pytest.mark.parametrize(("code", "told"), [("GatedRepo", LACKING), ("", REFUSED)])
def test_a_token_that_lacks_permission(
    gated: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: str, told: str, listed: bool
) -> None:
    gated.refusals[GATED] = (403, code)
    gated.listed = listed
    gated.message = MESSAGE
    monkeypatch.setenv("HF_TOKEN", "hf_another")
    with pytest.raises(AccessError, match=told):
        list(sd3(tmp_path).fetch(WITHOUT_T5, "float32"))


def test_a_permission_that_ends_at_the_weights(opened: Hub, tmp_path: Path) -> None:
    """Large files go another way than small ones; what is refused is told alike."""
    first = sd3(tmp_path)
    list(first.fetch(WITHOUT_T5, "float32", weights=False))
    opened.token = "hf_renewed"
    opened.refusals[GATED] = (403, "")
    with pytest.raises(AccessError, match=r"refused \(403\): give a token"):
        list(sd3(tmp_path).fetch(["transformer"], "float32"))
    assert weights(opened) == set()


def test_with_a_token_it_is_downloaded_and_t5_only_when_it_is_to_run(
    opened: Hub, sd3_files: Path, tmp_path: Path
) -> None:
    events = list(sd3(tmp_path).fetch(WITHOUT_T5, "float32"))
    assert {event.component for event in events} == {
        *WITHOUT_T5, "checkpoint", "tokenizer", "tokenizer_2", "scheduler",
    }  # fmt: skip
    assert weights(opened) == {*WITHOUT_T5}
    seen, local = sd3(tmp_path), resolve(str(sd3_files), "sd3", Settings(home=tmp_path))
    assert seen.present([*WITHOUT_T5, "tokenizer", "tokenizer_2", "scheduler"], "float32")
    assert seen.has("text_encoder_3")  # which is there to be downloaded
    assert not seen.present(["text_encoder_3"], "float32")
    assert seen.config("text_encoder_3")["d_model"] == 160  # small files come for all
    assert seen.parameter_bytes("text_encoder_3", "float16") == 2 * 4_762_300_000  # as published

    events = [event for event in seen.fetch(sd3_keys.COMPONENTS, "float32") if event.action == "download"]
    size = sum((sd3_files / "text_encoder_3" / shard).stat().st_size for shard in SHARDS)
    progress = [event.done_bytes for event in events if event.total_bytes == size]
    assert progress == sorted(progress)
    assert progress[-1] == size
    assert {event.component for event in events} == {"checkpoint", "text_encoder_3", "tokenizer_3"}
    for name in sd3_keys.COMPONENTS:
        ours, theirs = seen.tensors(name, "float32"), local.tensors(name, "float32")
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[key], theirs[key]) for key in theirs)
        assert seen.parameter_bytes(name, "float16") == local.parameter_bytes(name, "float16")
    assert seen.tokenizer("tokenizer_3").name == "tokenizer_3"
    assert seen.precision("text_encoder_3", "float32") == "float32"
    opened.requests.clear()
    assert list(sd3(tmp_path).fetch(sd3_keys.COMPONENTS, "float32")) == []
    assert opened.requests == []


def test_a_shard_that_was_broken_off_is_resumed(opened: Hub, sd3_files: Path, tmp_path: Path) -> None:
    size = sum((sd3_files / "text_encoder_3" / shard).stat().st_size for shard in SHARDS)
    first = (sd3_files / "text_encoder_3" / SHARDS[0]).stat().st_size
    stopped = sd3(tmp_path).fetch(["text_encoder_3"], "float32")
    assert isinstance(stopped, Generator)
    for event in stopped:
        if event.total_bytes == size and event.done_bytes > first:
            break
    stopped.close()  # as the Stop button does, in the second
    whole = sd3(tmp_path)
    assert not whole.present(["text_encoder_3"], "float32")
    list(whole.fetch(["text_encoder_3"], "float32"))
    assert opened.fetched(SHARDS[0]) == ["bytes=0-"]
    begun, resumed = opened.fetched(SHARDS[1])
    assert begun == "bytes=0-"
    assert resumed is not None
    assert 0 < int(resumed.removeprefix("bytes=").rstrip("-")) < size - first
    local = resolve(str(sd3_files), "sd3", Settings(home=tmp_path))
    ours, theirs = whole.tensors("text_encoder_3", "float32"), local.tensors("text_encoder_3", "float32")
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)


def test_clips_are_downloaded_in_float16_where_the_run_is(opened: Hub, tmp_path: Path) -> None:
    assert list(sd3(tmp_path).fetch(["text_encoder", "text_encoder_2", "vae"], "float16"))
    assert sd3(tmp_path).precision("text_encoder", "float16") == "float16"
    fetched = [
        path for method, path, _ in opened.requests if method == "GET" and path.endswith("safetensors")
    ]
    assert sorted(Path(path).name for path in fetched) == [
        "diffusion_pytorch_model.safetensors", "model.fp16.safetensors", "model.fp16.safetensors",
    ]  # fmt: skip


def test_a_single_file_gets_the_tokenizers_that_its_encoders_need(
    opened: Hub, sd3_files: Path, tmp_path: Path
) -> None:
    whole = sd3_folder(tmp_path / "whole")
    file = sd3_single_file(tmp_path / "one.safetensors", whole, t5="float16")
    read = sd3(tmp_path, str(file))
    asked = {event.component for event in read.fetch(WITHOUT_T5, "float32")}
    assert asked == {"checkpoint", "tokenizer", "tokenizer_2", "scheduler"}
    asked = {event.component for event in read.fetch(["text_encoder_3"], "float32")}
    assert asked == {"checkpoint", "tokenizer_3"}
    for name in ("tokenizer", "tokenizer_2", "tokenizer_3"):
        assert [path.name for path in read.files(name, "float32")] == [
            path.name for path in sorted((sd3_files / name).iterdir())
        ]
    assert weights(opened) == set()


def test_a_single_file_without_access_says_what_it_lacks(gated: Hub, tmp_path: Path) -> None:
    file = sd3_single_file(tmp_path / "one.safetensors", sd3_folder(tmp_path / "whole"))
    with pytest.raises(
        CheckpointError, match=rf"holds no tokenizer, .*set config_from to .* \({GATED} is gated"
    ):
        list(sd3(tmp_path, str(file)).fetch(WITHOUT_T5, "float32"))


def test_a_bare_file_is_completed_by_a_repository(opened: Hub, sd3_files: Path, tmp_path: Path) -> None:
    bare = sd3_single_file(tmp_path / "bare.safetensors", sd3_folder(tmp_path / "whole"), clips=False)
    assert not sd3(tmp_path, str(bare)).has("text_encoder")
    read = sd3(tmp_path, str(bare), config_from=GATED)
    assert all(map(read.has, sd3_keys.COMPONENTS))
    list(read.fetch(WITHOUT_T5, "float32"))
    assert weights(opened) == {"text_encoder", "text_encoder_2"}  # and not the networks that the file holds
    list(read.fetch(sd3_keys.COMPONENTS, "float32"))
    assert weights(opened) == {"text_encoder", "text_encoder_2", "text_encoder_3"}
    local = resolve(str(sd3_files), "sd3", Settings(home=tmp_path))
    for name in ("text_encoder", "text_encoder_2", "text_encoder_3"):
        ours, theirs = read.tensors(name, "float32"), local.tensors(name, "float32")
        assert all(torch.equal(ours[key], theirs[key]) for key in theirs)


def test_a_repository_without_t5_shows_when_its_index_is_there(server: Hub, tmp_path: Path) -> None:
    server.folders["owner/small"] = sd3_folder(tmp_path / "small", t5=False)
    unseen = sd3(tmp_path, "owner/small")
    assert unseen.has("text_encoder_3")  # as most have
    list(unseen.fetch(sd3_keys.COMPONENTS, "float32"))
    seen = sd3(tmp_path, "owner/small")
    assert not seen.has("text_encoder_3")
    assert seen.present([*WITHOUT_T5, "tokenizer", "tokenizer_2", "scheduler"], "float32")


def test_what_config_from_lacks_comes_from_the_published_one(
    opened: Hub, sd3_files: Path, tmp_path: Path
) -> None:
    file = sd3_single_file(tmp_path / "one.safetensors", sd3_folder(tmp_path / "whole"), t5="float16")
    without_t5 = sd3_folder(tmp_path / "without", t5=False)
    read = sd3(tmp_path, str(file), config_from=str(without_t5))
    list(read.fetch(sd3_keys.COMPONENTS, "float32"))
    assert read.tokenizer("tokenizer") == without_t5 / "tokenizer"
    assert (
        read.files("tokenizer_3", "float32")[0].read_bytes()
        == (sd3_files / "tokenizer_3/tokenizer.json").read_bytes()
    )
    assert weights(opened) == set()


def test_a_pasted_url_of_a_file_shows_what_it_lacks_when_it_is_there(
    opened: Hub, sd3_files: Path, tmp_path: Path
) -> None:
    (tmp_path / "files").mkdir()
    sd3_single_file(tmp_path / "files/one.safetensors", sd3_folder(tmp_path / "whole", t5=False))
    opened.folders["owner/files"] = tmp_path / "files"
    url = f"{opened.url}/owner/files/blob/main/one.safetensors"
    unseen = sd3(tmp_path, url)
    assert unseen.has("text_encoder_3")  # as the largest of the published files
    list(unseen.fetch(sd3_keys.COMPONENTS, "float32"))
    seen = sd3(tmp_path, url)
    assert not seen.has("text_encoder_3")
    assert seen.config("transformer")["num_layers"] == 3
    assert seen.present([*WITHOUT_T5, "tokenizer", "tokenizer_2"], "float32")
    completed = sd3(tmp_path, url, config_from="sd3-medium")
    list(completed.fetch(sd3_keys.COMPONENTS, "float32"))
    assert completed.present(["text_encoder_3", "tokenizer_3"], "float32")
    assert weights(opened) == {COMMIT, "text_encoder_3"}
