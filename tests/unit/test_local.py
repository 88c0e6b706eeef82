"""What lies in --models-dir, told by headers: what each file is, under which name a request takes it."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import pytest
import torch
from safetensors.torch import load_file, save_file

from backend import Settings
from backend.errors import CheckpointError
from backend.weights import local, pickles
from backend.weights.source import resolve
from tests.checkpoints import (
    cascade_folder,
    cascade_single_files,
    sd3_folder,
    sd3_single_file,
    sd15_folder,
    sd15_single_file,
    spoil,
)
from tests.flax_files import flax_folder

SD15, SD3, CASCADE = (
    f"a {title} checkpoint" for title in ("Stable Diffusion 1.5", "Stable Diffusion 3", "Stable Cascade")
)
WEIGHTS = "diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tiny checkpoints of all families, as folders and as single files."""
    made = tmp_path_factory.mktemp("made")
    sd15_single_file(sd15_folder(made / "v1"), made / "v1.safetensors")
    sd3_single_file(made / "v3.safetensors", sd3_folder(made / "v3"))
    sd3_single_file(made / "bare.safetensors", made / "v3", clips=False)
    cascade_single_files(made / "stages", cascade_folder(made / "cascade"))
    return made


@pytest.fixture
def models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty --models-dir, apart from where the program runs."""
    (tmp_path / "cwd").mkdir()
    monkeypatch.chdir(tmp_path / "cwd")
    (tmp_path / "models").mkdir()
    return tmp_path / "models"


def settings(models: Path, **given: Any) -> Settings:
    return Settings(models_dir=models, home=models.parent / "home", **given)


def listed(models: Path, **given: Any) -> dict[str, local.Local]:
    """By name; each that can be used is found by a request that says that name."""
    found = local.found(settings(models, **given)).entries
    for each in found:
        if each.family is not None:
            resolve(each.name, each.family, settings(models))
    assert len({each.name for each in found}) == len(found)
    return {each.name: each for each in found}


def tensors(*names: str) -> dict[str, torch.Tensor]:
    return {name: torch.zeros(1) for name in names}


# ---- what a file is


def test_every_family_by_folder_and_by_file(made: Path, models: Path) -> None:
    shutil.copytree(made, models / "mine")
    found = listed(models)
    assert {name: (each.family, each.what) for name, each in found.items()} == {
        "mine/v1": ("sd15", SD15),
        "mine/v1.safetensors": ("sd15", SD15),
        "mine/v3": ("sd3", SD3),
        "mine/v3.safetensors": ("sd3", SD3),
        "mine/bare.safetensors": ("sd3", SD3),
        "mine/cascade": ("stable_cascade", CASCADE),
        "mine/stages": ("stable_cascade", CASCADE),
    }
    assert not any(each.problem for each in found.values())
    notes = {name: each.note for name, each in found.items() if each.note}
    assert set(notes) == {"mine/bare.safetensors"}
    assert "without the text encoder, the second text encoder" in notes["mine/bare.safetensors"]
    assert found["mine/v1.safetensors"].bytes == (made / "v1.safetensors").stat().st_size
    whole = sum(path.stat().st_size for path in (made / "v1").rglob("*") if path.is_file())
    assert found["mine/v1"].bytes == whole


def test_stages_apart_say_what_they_lack(made: Path, models: Path) -> None:
    for stage in ("stage_c", "stage_a"):
        shutil.copy(made / "stages" / f"{stage}.safetensors", models)
    found = listed(models)
    assert {each.family for each in found.values()} == {"stable_cascade"}
    assert "without Stage B" in found["stage_c.safetensors"].note
    assert "without Stage C" in found["stage_a.safetensors"].note


def test_a_half_is_whole_beside_the_other_half(made: Path, models: Path) -> None:
    shutil.copytree(made / "cascade/stable-cascade-prior", models / "a")
    alone = listed(models)["a"]
    assert alone.family is None
    assert alone.what == CASCADE
    assert alone.problem.startswith("it lacks the half of Stable Cascade with the decoder")
    shutil.copytree(made / "cascade/stable-cascade", models / "b")
    assert [each.family for each in listed(models).values()] == ["stable_cascade"] * 2


@pytest.mark.parametrize(
    ("names", "what"),
    [
        (("lora_unet_down_blocks_0.lora_down.weight",), "a LoRA"),
        (("transformer.transformer_blocks.0.attn.to_q.lora.down.weight",), "a LoRA"),
        (("emb_params",), "a textual inversion"),
        (("control_model.input_blocks.0.0.weight",), "a ControlNet"),
        (("conditioner.embedders.0.x", "model.diffusion_model.input_blocks.0.0.weight"),
         "a Stable Diffusion XL checkpoint"),
        (("double_blocks.0.img_attn.qkv.weight",), "a Flux checkpoint"),
        (("first_stage_model.decoder.conv_in.weight",), "a VAE alone"),
        (("text_model.embeddings.token_embedding.weight",), "a text encoder alone"),
    ],
)  # fmt: skip
def test_other_kinds_of_files(models: Path, names: tuple[str, ...], what: str) -> None:
    save_file(tensors(*names), models / "x.safetensors")
    torch.save(tensors(*names), models / "x.pt")
    for each in listed(models).values():
        assert (each.family, each.what, each.problem) == (None, what, "")


def test_folders_of_other_kinds(models: Path) -> None:
    for name, pipeline in (("xl", "StableDiffusionXLPipeline"), ("odd", "SomebodysPipeline")):
        (models / name).mkdir()
        (models / name / "model_index.json").write_text(json.dumps({"_class_name": pipeline}))
    found = listed(models)
    assert (found["xl"].what, found["xl"].problem) == ("a Stable Diffusion XL checkpoint", "")
    assert found["odd"].problem == "its pipeline is 'SomebodysPipeline', which is not known"


def test_an_inpainting_unet_under_a_usual_name(made: Path, models: Path) -> None:
    shutil.copytree(made / "v1", models / "inpaint")
    spoil(models / "inpaint/unet/config.json", lambda config: config.update(in_channels=9))
    assert "this is an inpainting model" in listed(models)["inpaint"].problem


def test_a_folder_without_an_index(made: Path, models: Path) -> None:
    for name in ("v1", "v3"):
        shutil.copytree(made / name, models / name)
        (models / name / "model_index.json").unlink()
    assert {name: each.family for name, each in listed(models).items()} == {"v1": "sd15", "v3": "sd3"}


# ---- what is wrong with one


def test_damaged_files_are_listed_with_the_reason(made: Path, models: Path) -> None:
    whole = (made / "v1.safetensors").read_bytes()
    contents = {
        "empty.safetensors": (b"", "it is empty"),
        "cut.safetensors": (whole[:-100], "it is truncated"),
        "head.safetensors": (whole[:100], "it is truncated"),
        "page.safetensors": (b"<html>", "it is a web page; download the file itself"),
        "pointer.safetensors": (b"version https://git-lfs", "it is the pointer that git keeps"),
        "noise.safetensors": (bytes(range(256)) * 8, "it is not a safetensors file"),
        "empty.ckpt": (b"", "it is empty"),
        "noise.ckpt": (bytes(range(1, 256)) * 8, "it is damaged, or no checkpoint"),
        "zip.ckpt": (b"PK\x03\x04" + bytes(200), "it is damaged, or no checkpoint"),
    }
    for name, (content, _) in contents.items():
        (models / name).write_bytes(content)
    save_file(tensors("something.weight"), models / "strange.safetensors")
    (models / "nothing.safetensors").symlink_to(models / "gone")
    found = listed(models)
    assert set(found) == {*contents, "strange.safetensors", "nothing.safetensors"}
    for name, (_, problem) in contents.items():
        assert problem in found[name].problem, name
        assert found[name].family is None
    strange = found["strange.safetensors"].problem
    assert strange == "it is of an unknown kind; its first tensors are called something.weight"
    assert found["nothing.safetensors"].problem.startswith("it cannot be read")


@pytest.mark.parametrize(
    ("spoilt", "problem"),
    [
        (lambda folder: (folder / "unet" / WEIGHTS).unlink(), "it is incomplete: the UNet cannot be found"),
        (lambda folder: (folder / "vae" / WEIGHTS).write_bytes(b"x" * 9), f"{WEIGHTS} is not a safetensors"),
        (lambda folder: (folder / "model_index.json").write_text("{"), "model_index.json is not valid JSON"),
        (lambda folder: (folder / "model_index.json").write_text("[]"), "must hold a JSON object"),
        (lambda folder: (folder / "unet/config.json").write_text("{"), "config.json is not valid JSON"),
    ],
)
def test_damaged_folders(made: Path, models: Path, spoilt: Callable[[Path], Any], problem: str) -> None:
    spoilt(shutil.copytree(made / "v1", models / "v1"))
    (found,) = listed(models).values()
    assert problem in found.problem
    assert str(models) not in found.problem
    assert found.family is None


class Evil:
    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> Any:
        return Path.touch, (self.file,)


@pytest.mark.parametrize("zipped", [True, False])
def test_no_code_of_a_pickle_is_run(made: Path, models: Path, zipped: bool) -> None:
    weights = load_file(made / "v1.safetensors")
    content = {"state_dict": weights, "callbacks": Evil(models / "ran")}
    torch.save(content, models / "evil.ckpt", _use_new_zipfile_serialization=zipped)
    torch.save({"state_dict": weights}, models / "good.ckpt", _use_new_zipfile_serialization=zipped)
    found = listed(models)
    assert "holds more than weights" in found["evil.ckpt"].problem
    assert "pathlib" in found["evil.ckpt"].problem
    assert found["evil.ckpt"].what == SD15
    assert found["evil.ckpt"].family is None
    assert (found["good.ckpt"].family, found["good.ckpt"].problem) == ("sd15", "")
    assert not (models / "ran").exists()


def test_a_pickle_that_swells_when_it_is_unpacked(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pickles, "MOST", 2**16)
    with zipfile.ZipFile(models / "bomb.ckpt", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", b"(" * 2**24)
    with pytest.raises(CheckpointError, match="damaged, or no checkpoint"):
        pickles.look(models / "bomb.ckpt")


# ---- looking


def test_a_new_file_is_there_at_the_next_look(made: Path, models: Path) -> None:
    assert listed(models) == {}
    shutil.copy(made / "v1.safetensors", models / "x.safetensors")
    assert listed(models)["x.safetensors"].family == "sd15"
    shutil.copy(made / "v3.safetensors", models / "x.safetensors")
    assert listed(models)["x.safetensors"].family == "sd3"
    (models / "x.safetensors").unlink()
    assert listed(models) == {}


def test_a_file_is_read_once(models: Path, made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copy(made / "v1.safetensors", models / "once.safetensors")
    first = listed(models)
    monkeypatch.setattr(local.files, "shapes", lambda path: pytest.fail("read again"))
    assert local.found(settings(models)).entries == list(first.values())


def test_links_in_circles_depth_and_number(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (models / "a/b/c/d").mkdir(parents=True)
    for place in (".", "a", "a/b", "a/b/c", ".hidden", "models--x--y"):
        (models / place).mkdir(exist_ok=True)
        save_file(tensors("emb_params"), models / place / "x.pt.safetensors")
    (models / "a/loop").symlink_to(models)
    (models / "a/b/self").symlink_to(models / "a/b")
    (models / "elsewhere").symlink_to(models.parent / "other")
    (models.parent / "other").mkdir()
    save_file(tensors("emb_params"), models.parent / "other/y.safetensors")
    assert set(listed(models)) == {
        "x.pt.safetensors", "a/x.pt.safetensors", "a/b/x.pt.safetensors", "elsewhere/y.safetensors",
    }  # fmt: skip
    assert not local.found(settings(models)).cut
    monkeypatch.setattr(local, "MOST", 3)
    assert local.found(settings(models)).cut
    assert len(local.found(settings(models)).entries) <= 3


def test_a_folder_that_may_not_be_read(made: Path, models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (models / "closed").mkdir()
    shutil.copy(made / "v1.safetensors", models)
    scandir = os.scandir

    def guarded(path: Path) -> Any:
        if path.name == "closed":
            raise PermissionError("closed")
        return scandir(path)

    monkeypatch.setattr(local.os, "scandir", guarded)
    assert set(listed(models)) == {"v1.safetensors"}


def test_no_folder_at_all(models: Path) -> None:
    assert local.found(settings(models / "gone")).entries == []
    assert local.found(Settings(home=models)).entries == []


def test_names_that_mean_something_else(made: Path, models: Path) -> None:
    shutil.copytree(made / "v1", models / "sd15")  # a name of the catalogue
    shutil.copytree(made / "v1", models / "taken")
    shutil.copy(made / "v1.safetensors", models / " blank.safetensors")
    Path("taken").mkdir()  # where the program runs
    assert set(listed(models)) == {"./sd15", str(models / "taken"), "./ blank.safetensors"}


def test_no_torch_is_needed(made: Path, models: Path) -> None:
    shutil.copytree(made / "v1", models / "v1")
    (models / "v1/unet" / WEIGHTS).rename(models / "v1/unet/diffusion_pytorch_model.bin")
    torch.save(load_file(made / "v1.safetensors"), models / "v1.ckpt")
    shutil.copy(made / "v3.safetensors", models)
    flax_folder(made / "v1", models / "flax")
    code = (
        "import sys; from backend import Settings; from backend.weights import local; "
        f"found = local.found(Settings(models_dir={str(models)!r})).entries; "
        "assert len(found) == 4 and all(each.family for each in found), found; "
        "assert 'torch' not in sys.modules"
    )
    root = Path(__file__).parents[2]
    subprocess.run([sys.executable, "-c", code], cwd=root, check=True, timeout=120)


# ---- choices


def test_the_choices_of_a_tab(made: Path, models: Path) -> None:
    shutil.copy(made / "v1.safetensors", models / "mine.safetensors")
    shutil.copy(made / "bare.safetensors", models)
    (models / "broken.safetensors").write_bytes(b"")
    assert local.choices(settings(models), "sd15") == ["demo", "sd15", "mine.safetensors"]
    assert local.choices(settings(models), "sd3")[-2:] == ["sd3.5-large-turbo", "bare.safetensors"]
    assert local.choices(settings(models), "stable_cascade") == ["demo", "stable-cascade"]


def test_strangers_choose_of_what_is_here(made: Path, models: Path) -> None:
    shutil.copy(made / "v1.safetensors", models / "mine.safetensors")
    assert local.choices(settings(models, public=True), "sd15") == ["demo"]
    assert local.found(settings(models, public=True)).entries == []
    cached(models, "stable-diffusion-v1-5/stable-diffusion-v1-5", made / "v1")
    assert local.choices(settings(models, public=True), "sd15") == ["demo", "sd15"]
    assert local.choices(settings(models, public=True), "sd3") == ["demo"]


def cached(models: Path, name: str, folder: Path) -> Path:
    """A repository in the hub's cache → its snapshot."""
    root = models / f"models--{name.replace('/', '--')}"
    (root / "refs").mkdir(parents=True)
    (root / "refs/main").write_text("abc")
    return Path(shutil.copytree(folder, root / "snapshots/abc"))


def test_what_else_is_in_the_cache(made: Path, models: Path) -> None:
    cached(models, "owner/tiny", made / "v1")
    cached(models, "owner/part", made / "v3")
    shutil.rmtree(models / "models--owner--part/snapshots/abc/text_encoder_2")
    (models / "file").mkdir()
    shutil.copy(made / "v1.safetensors", models / "file")
    cached(models, "owner/files", models / "file")
    shutil.rmtree(models / "file")
    (models / "words").mkdir()
    save_file(tensors("model.layers.0.weight"), models / "words/model.safetensors")
    cached(models, "owner/language", models / "words")
    shutil.rmtree(models / "words")
    (models / "models--owner--nothing/blobs").mkdir(parents=True)
    found = listed(models)
    page = f"{huggingface_hub.constants.ENDPOINT}/owner/files/blob/main/v1.safetensors"
    assert {name: each.family for name, each in found.items()} == {
        "owner/tiny": "sd15", page: "sd15", "owner/part": "sd3",
    }  # fmt: skip
    assert found["owner/part"].note.startswith("here in part")
    assert "it is incomplete: the second text encoder" in listed(models, offline=True)["owner/part"].problem
    assert local.choices(settings(models), "sd15") == ["demo", "sd15", page, "owner/tiny"]
