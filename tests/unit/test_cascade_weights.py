"""Stable Cascade checkpoints: two halves in hub layout, original files, and what completes what."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import (
    CLIPTextConfig,
    CLIPTextModelWithProjection,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
)

from backend.cascade import keys
from backend.cascade.defaults import defaults
from backend.cascade.optional import EffnetEncoder, Previewer
from backend.cascade.stage_a import StageA, StageAConfig
from backend.cascade.unet import UNet, UNetConfig
from backend.errors import CheckpointError, InvalidRequest
from backend.settings import Settings
from backend.studio import Studio
from backend.text.encoders import load_clip_vision, load_projected_clip_text, load_tokenizer
from backend.weights.base import Source
from backend.weights.joined import JoinedSource
from backend.weights.load import load_module
from backend.weights.single import FileSource
from backend.weights.source import resolve
from tests.checkpoints import (
    cascade_folder,
    cascade_single_files,
    original_stage,
    original_stage_a,
    sd15_folder,
    sd15_single_file,
    spoil,
)

CPU = torch.device("cpu")
STAGES = ("prior", "prior_lite", "decoder", "decoder_lite")
NETWORKS = (*STAGES, "vqgan", "text_encoder", "image_encoder")
PRIOR, DECODER = "stable-cascade-prior", "stable-cascade"
PLAIN = "diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return cascade_folder(tmp_path_factory.mktemp("hub-layout") / "tiny")


@pytest.fixture(scope="module")
def files(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return cascade_single_files(tmp_path_factory.mktemp("original") / "files", folder)


@pytest.fixture
def broken(folder: Path, tmp_path: Path) -> Path:
    """A copy of the folder, to be spoiled."""
    return Path(shutil.copytree(folder, tmp_path / "broken"))


@pytest.fixture
def loose(files: Path, tmp_path: Path) -> Path:
    """A copy of the original files, to be spoiled."""
    return Path(shutil.copytree(files, tmp_path / "loose"))


@pytest.fixture(scope="module")
def sd15(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return sd15_folder(tmp_path_factory.mktemp("sd15") / "tiny")


def source(path: Path, config_from: Path | None = None, family: str = "stable_cascade") -> Source:
    settings = Settings(home=path, models_dir=path / "none", offline=True)
    return resolve(str(path), family, settings, config_from=str(config_from) if config_from else None)


def load(source: Source, component: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    if component == "text_encoder":
        return load_projected_clip_text(source, component, dtype, CPU)
    if component == "image_encoder":
        return load_clip_vision(source, component, dtype, CPU)
    config = source.config(component)

    def build() -> nn.Module:
        if component == "vqgan":
            return StageA(StageAConfig.from_dict(config))
        return UNet(UNetConfig.from_dict(config))

    tensors = source.tensors(component, str(dtype).removeprefix("torch."))
    return load_module(build, tensors, dtype=dtype, device=CPU, what=f"{source.name}: {component}")


def same(ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor]) -> bool:
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in theirs)


# --- both layouts ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("component", NETWORKS)
def test_the_original_files_equal_the_folders(folder: Path, files: Path, component: str) -> None:
    hub, original = source(folder), source(files)
    assert isinstance(hub, JoinedSource)
    assert isinstance(original, FileSource)
    assert same(original.tensors(component, "float32"), hub.tensors(component, "float32"))
    assert same(load(original, component).state_dict(), load(hub, component).state_dict())
    assert original.parameter_bytes(component, "bfloat16") == hub.parameter_bytes(component, "bfloat16") > 0
    assert hub.fingerprint(component, "float32") != original.fingerprint(component, "float32")
    known, told = hub.config(component), original.config(component)
    if component in STAGES:
        assert UNetConfig.from_dict(told) == UNetConfig.from_dict(known)
    elif component == "vqgan":
        assert StageAConfig.from_dict(told) == StageAConfig.from_dict(known)
    else:
        assert {name: known.get(name, value) for name, value in told.items()} == told


def test_the_rest_of_both_layouts(folder: Path, files: Path) -> None:
    hub, original = source(folder), source(files)
    for each in (hub, original):
        assert all(each.has(name) for name in (*NETWORKS, "tokenizer", "scheduler", "prior_scheduler"))
        assert not each.has("previewer")
        assert each.present((*NETWORKS, "tokenizer", "scheduler", "prior_scheduler"), "float32")
        assert list(each.fetch(NETWORKS, "float32")) == []
        assert each.config("scheduler")["scaler"] == each.config("prior_scheduler")["scaler"] == 1.0
        assert load_tokenizer(each)("a red house").input_ids
        assert each.extras() == {}
    assert hub.tokenizer() == folder / PRIOR / "tokenizer"  # what both halves hold is the prior's
    assert hub.files("text_encoder", "float32")[0].parent == folder / PRIOR / "text_encoder"
    assert hub.config("feature_extractor")["size"] == {"shortest_edge": 28}
    assert original.config("feature_extractor") == keys.PUBLISHED["feature_extractor"]


def test_queries_keys_and_values_are_views_of_their_stack(files: Path) -> None:
    tensors = source(files).tensors("prior", "float32")
    query, key, value = (tensors[f"down_blocks.0.2.attention.to_{letter}.weight"] for letter in "qkv")
    size = query.numel() * query.element_size()
    assert key.data_ptr() - query.data_ptr() == value.data_ptr() - key.data_ptr() == size


def test_a_stack_that_is_not_three_is_refused(loose: Path) -> None:
    name = "down_blocks.0.2.attention.attn.in_proj_bias"
    spoil(loose / "stage_c.safetensors", lambda tensors: tensors.update({name: torch.zeros(100)}))
    with pytest.raises(CheckpointError, match=r"in_proj_bias has 100 rows, which are not 3 of a kind"):
        source(loose)


def networks(name: str) -> nn.Module:
    config = keys.PUBLISHED[name]
    with torch.device("meta"):
        if name in STAGES:
            return UNet(UNetConfig.from_dict(config))
        if name == "vqgan":
            return StageA(StageAConfig.from_dict(config))
        if name == "text_encoder":
            return CLIPTextModelWithProjection(CLIPTextConfig(**config))
        return CLIPVisionModelWithProjection(CLIPVisionConfig(**config))


@pytest.mark.parametrize("component", NETWORKS)
def test_the_published_files_are_told_by_their_tensors(component: str) -> None:
    tensors = networks(component).state_dict()
    if component in STAGES:
        tensors = original_stage(tensors)
    elif component == "vqgan":
        tensors = original_stage_a(tensors)
    found = keys.parts({name: tuple(tensor.shape) for name, tensor in tensors.items()})
    assert list(found) == [component]
    shapes = {name: origin.shape for name, origin in found[component].items()}
    told = keys.config(component, shapes, None)
    assert {name: told[name] for name in keys.PUBLISHED[component]} == keys.PUBLISHED[component]


@pytest.mark.parametrize("made", [{"switch_level": None}, {"switch_level": [True]}, {"kernel_size": 5}])
def test_what_shapes_tell_and_what_they_do_not(made: dict[str, Any]) -> None:
    config = {
        **keys.PUBLISHED["prior"],
        "block_out_channels": [64, 128], "num_attention_heads": [1, 2], "conditioning_dim": 96,
        "down_num_layers_per_block": [1, 3], "up_num_layers_per_block": [2, 1],
        "down_blocks_repeat_mappers": [2, 1], "up_blocks_repeat_mappers": [1, 3],
        "block_types_per_layer": [["SDCascadeResBlock", "SDCascadeTimestepBlock"], ["SDCascadeResBlock"] * 1],
        **made,
    }  # fmt: skip
    with torch.device("meta"):
        network = UNet(UNetConfig.from_dict(config))
    shapes = {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()}
    told = UNetConfig.from_dict(keys.config("prior", shapes, None))
    with torch.device("meta"):
        again = UNet(told)
    assert {name: tuple(tensor.shape) for name, tensor in again.state_dict().items()} == shapes
    assert UNetConfig.from_dict(keys.config("prior", shapes, config)) == network.config


def test_the_optional_networks_of_the_original_release(loose: Path) -> None:
    networks = {"effnet_encoder": EffnetEncoder(), "previewer": Previewer(hidden=64)}
    for name, network in networks.items():
        save_file(network.state_dict(), loose / f"{name[:3]}.safetensors")
    read = source(loose)
    for name, network in networks.items():
        assert read.has(name)
        assert same(read.tensors(name, "float32"), network.state_dict())
    assert read.config("effnet_encoder") == {"latent_channels": 16}
    assert read.config("previewer") == {"in_channels": 16, "hidden_channels": 64, "out_channels": 3}


# --- original files ----------------------------------------------------------------------------------------


def test_files_are_known_by_their_tensors_and_not_by_their_names(loose: Path) -> None:
    for number, path in enumerate(sorted(loose.glob("*.safetensors"))):
        path.rename(loose / f"{9 - number}.safetensors")
    shutil.move(loose / "text_encoder/model.safetensors", loose / "words.safetensors")
    read = source(loose)
    assert all(read.has(name) for name in NETWORKS)
    assert read.config("prior")["block_out_channels"] == [128, 128]  # the smaller of two is the lite one
    assert read.config("prior_lite")["block_out_channels"] == [64, 64]
    assert read.config("decoder_lite")["block_out_channels"][2] == 64
    assert read.config("text_encoder")["hidden_act"] == "gelu"


def test_the_file_in_the_precision_of_the_run_is_read(folder: Path, files: Path, tmp_path: Path) -> None:
    both = Path(shutil.copytree(files, tmp_path / "both"))
    cascade_single_files(tmp_path / "half", folder, dtype=torch.bfloat16)
    for path in (tmp_path / "half").glob("stage_?.safetensors"):  # names tell nothing
        shutil.copy(path, both / f"other_{path.name}")
    read = source(both)
    for component in ("prior", "decoder", "vqgan"):
        kept = {
            dtype: next(t.dtype for t in read.tensors(component, dtype).values() if t.is_floating_point())
            for dtype in ("float32", "bfloat16", "float16")
        }
        assert kept == {
            "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.bfloat16,
        }  # fmt: skip
        assert read.parameter_bytes(component, "float32") == 2 * read.parameter_bytes(component, "float16")
        assert read.precision(component, "float16") == "bfloat16"
    assert source(folder).precision("prior", "float16") == "float32"
    assert read.fingerprint("prior", "float32") != read.fingerprint("prior", "bfloat16")
    assert read.fingerprint("prior_lite", "float32") == read.fingerprint("prior_lite", "bfloat16")


def test_two_files_for_the_same_network_are_refused(loose: Path) -> None:
    shutil.copy(loose / "stage_b.safetensors", loose / "mine.safetensors")
    told = r"several files for decoder \(mine\.safetensors, stage_b\.safetensors\)"
    with pytest.raises(CheckpointError, match=told):
        source(loose)


def test_files_that_are_no_networks_of_a_family_are_passed_over(loose: Path) -> None:
    lora = {"lora_unet_down_blocks_0_attentions_0.lora_down.weight": torch.zeros(1)}
    save_file(lora, loose / "style.safetensors")
    save_file({"something": torch.zeros(1)}, loose / "other.safetensors")
    assert source(loose).has("prior")


def test_files_of_another_family_in_the_folder_are_named(loose: Path, sd15: Path) -> None:
    sd15_single_file(sd15, loose / "v1.safetensors")
    told = r"loose/v1\.safetensors is a Stable Diffusion 1\.5 checkpoint, and a Stable Cascade checkpoint is"
    with pytest.raises(CheckpointError, match=told):
        source(loose)


def test_one_file_takes_the_rest_from_config_from(folder: Path, files: Path, loose: Path) -> None:
    stage_c = files / "stage_c.safetensors"
    alone = source(stage_c)
    assert alone.has("prior")
    for component in ("prior_lite", "decoder", "text_encoder", "tokenizer"):
        assert alone.has(component) == (component == "tokenizer")  # which can be had from the hub
    with pytest.raises(CheckpointError, match="holds no decoder; set config_from"):
        alone.config("decoder")
    with pytest.raises(
        CheckpointError, match=r"holds no tokenizer.*such as stabilityai/stable-cascade-prior"
    ):
        load_tokenizer(alone)
    for rest in (folder, loose):
        whole = source(stage_c, rest)
        assert whole.files("prior", "float32") == [stage_c]
        for component in ("decoder", "decoder_lite", "vqgan", "text_encoder", "image_encoder"):
            assert same(load(whole, component).state_dict(), load(source(folder), component).state_dict())
        assert not whole.has("prior_lite")  # another checkpoint's network is no smaller form of this one
        with pytest.raises(CheckpointError, match="holds no prior_lite"):
            whole.tensors("prior_lite", "float32")
        assert load_tokenizer(whole)("a red house").input_ids
        assert whole.config("scheduler")["s"] == 0.008


def test_config_from_tells_what_shapes_do_not(broken: Path, files: Path) -> None:
    spoil(broken / PRIOR / "prior/config.json", lambda config: config.update(num_attention_heads=[4, 8]))
    spoil(broken / DECODER / "vqgan/config.json", lambda config: config.update(scale_factor=0.43))
    read = source(files / "stage_c.safetensors", broken)
    assert read.config("prior")["num_attention_heads"] == [4, 8]
    assert read.config("vqgan")["scale_factor"] == 0.43
    small = source(files / "stage_c_lite.safetensors", broken)  # told for other widths
    assert small.config("prior")["num_attention_heads"] == [1, 1]


def test_a_config_beside_the_text_encoder_is_read(loose: Path) -> None:
    spoil(loose / "text_encoder/config.json", lambda config: config.update(num_attention_heads=2))
    assert source(loose).config("text_encoder")["num_attention_heads"] == 2


def test_a_tokenizer_may_lie_beside_the_text_encoder(loose: Path) -> None:
    for path in (loose / "tokenizer").iterdir():
        path.rename(loose / "text_encoder" / path.name)
    (loose / "tokenizer").rmdir()
    read = source(loose)
    assert load_tokenizer(read)("a red house").input_ids
    assert loose / "text_encoder/model.safetensors" not in read.files("tokenizer", "float32")


def test_one_network_of_a_folder_is_a_single_file_too(folder: Path) -> None:
    whole = source(folder / PRIOR / "prior" / PLAIN, folder)
    assert same(load(whole, "prior").state_dict(), load(source(folder), "prior").state_dict())


def test_a_whole_clip_gives_its_image_encoder(folder: Path, files: Path, loose: Path) -> None:
    words = load_file(
        loose / "text_encoder/model.safetensors"
    )  # of another kind than Cascade's, as published
    spoil(
        loose / "image_encoder.safetensors", lambda t: t.update({**words, "logit_scale": torch.tensor(1.0)})
    )
    read = source(loose)
    assert same(read.tensors("image_encoder", "float32"), source(folder).tensors("image_encoder", "float32"))
    assert read.files("text_encoder", "float32") == [loose / "text_encoder/model.safetensors"]


def test_config_from_is_no_single_file(files: Path) -> None:
    with pytest.raises(InvalidRequest, match="it can be a folder or a hub repository"):
        source(files / "stage_c.safetensors", files / "stage_b.safetensors")


@pytest.mark.parametrize(
    ("file", "change", "told"),
    [
        ("stage_c", lambda t: t.pop("embedding.1.weight"), "'embedding.1.weight' is missing, so its config"),
        ("stage_b", lambda t: t.pop("clip_mapper.weight"), "decoder: the tensor .* is missing"),
        ("stage_c", lambda t: t.pop("clf.1.bias"), r"1 missing \(clf\.1\.bias\)"),
        ("stage_c", lambda t: t.update(extra=torch.zeros(1)), r"1 unexpected \(extra\)"),
        ("stage_c", lambda t: t.update({"clf.1.bias": torch.zeros(9)}), "clf.1.bias is 9, due 16"),
    ],
)  # fmt: skip
def test_original_files_load_strictly(loose: Path, file: str, change: Any, told: str) -> None:
    spoil(loose / f"{file}.safetensors", change)
    with pytest.raises(CheckpointError, match=told):
        load(source(loose), "prior")


def test_a_truncated_file_is_named(loose: Path) -> None:
    path = loose / "stage_b.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match=r"stage_b\.safetensors is truncated"):
        source(loose)


# --- halves ------------------------------------------------------------------------------------------------


def test_halves_are_known_by_their_index_and_not_by_their_names(broken: Path, folder: Path) -> None:
    (broken / PRIOR).rename(broken / "one")
    (broken / DECODER).rename(broken / "another")
    for component in NETWORKS:
        ours, theirs = (each.tensors(component, "float32") for each in (source(broken), source(folder)))
        assert same(ours, theirs)
    assert source(broken).tokenizer() == broken / "one/tokenizer"


@pytest.mark.parametrize(("half", "other"), [(PRIOR, DECODER), (DECODER, PRIOR)])
def test_half_a_checkpoint_takes_the_other_from_config_from(folder: Path, half: str, other: str) -> None:
    for rest in (folder / other, folder):
        whole = source(folder / half, rest)
        assert all(whole.has(name) for name in NETWORKS)
        assert whole.present((*NETWORKS, "tokenizer"), "float32")


@pytest.mark.parametrize(("half", "lacks"), [(PRIOR, "decoder"), (DECODER, "prior")])
def test_half_a_checkpoint_alone_says_what_is_missing(
    folder: Path, tmp_path: Path, half: str, lacks: str
) -> None:
    shutil.copytree(folder / half, tmp_path / half)
    told = f"{half} lacks the half of Stable Cascade with the {lacks}; .*set config_from to its folder or hub"
    for rest in (None, folder / half):
        with pytest.raises(CheckpointError, match=told):
            source(tmp_path / half, rest)


@pytest.mark.parametrize(("half", "other"), [(PRIOR, DECODER), (DECODER, PRIOR)])
def test_half_a_checkpoint_finds_the_other_beside_it(
    folder: Path, tmp_path: Path, half: str, other: str
) -> None:
    shutil.copytree(folder / half, tmp_path / half)
    shutil.copytree(folder / other, tmp_path / "first")
    (tmp_path / "nothing").mkdir()
    (tmp_path / "other-family").mkdir()
    (tmp_path / "other-family/model_index.json").write_text('{"_class_name": "StableDiffusionPipeline"}')
    whole = source(tmp_path / half)
    assert all(whole.has(name) for name in NETWORKS)
    shutil.copytree(folder / other, tmp_path / "second")
    with pytest.raises(CheckpointError, match="lacks the half"):  # which of the two, nobody can tell
        source(tmp_path / half)


def test_a_half_of_ones_own_is_not_mixed_with_the_other_sizes(broken: Path, folder: Path) -> None:
    shutil.rmtree(broken / PRIOR / "prior_lite")
    shutil.rmtree(broken / PRIOR / "image_encoder")
    whole = source(broken / PRIOR, folder)
    assert whole.files("prior", "float32")[0].is_relative_to(broken)
    assert not whole.has("prior_lite")
    assert whole.has("decoder_lite")
    assert whole.has("image_encoder")
    with pytest.raises(CheckpointError, match="has no prior_lite"):
        whole.config("prior_lite")


def test_two_priors_in_one_folder_are_refused(broken: Path) -> None:
    shutil.copytree(broken / PRIOR, broken / "another")
    with pytest.raises(
        CheckpointError, match=f"several folders with a prior .broken/another, broken/{PRIOR}"
    ):
        source(broken)


def test_the_combined_pipelines_folder(broken: Path, folder: Path, tmp_path: Path) -> None:
    whole = tmp_path / "whole"
    whole.mkdir()
    for part in (broken / DECODER).iterdir():
        part.rename(whole / part.name)
    for part in (broken / PRIOR).iterdir():
        part.rename(whole / (f"prior_{part.name}" if part.is_dir() else part.name))
    spoil(whole / "model_index.json", lambda index: index.update(_class_name="StableCascadeCombinedPipeline"))
    assert all(source(whole).has(name) for name in NETWORKS)
    for component in NETWORKS:
        theirs = source(folder).tensors(component, "float32")
        assert same(source(whole).tensors(component, "float32"), theirs)
    assert source(whole).config("prior_scheduler") == source(folder).config("prior_scheduler")


def test_all_in_one_folder_without_an_index(broken: Path) -> None:
    for part in ("prior", "image_encoder", "feature_extractor"):
        shutil.move(broken / PRIOR / part, broken / DECODER / part)
    (broken / DECODER / "model_index.json").unlink()
    whole = source(broken / DECODER)
    assert all(whole.has(name) for name in NETWORKS if name != "prior_lite")
    assert not whole.has("prior_lite")


def test_variants_of_folders(broken: Path) -> None:
    path = broken / PRIOR / "prior" / PLAIN
    half = {name: tensor.bfloat16() for name, tensor in load_file(path).items()}
    save_file(half, path.with_name("diffusion_pytorch_model.bf16.safetensors"))
    for dtype, kept in (("float32", "float32"), ("bfloat16", "bfloat16"), ("float16", "bfloat16")):
        tensor = source(broken).tensors("prior", dtype)["clf.1.bias"]
        assert str(tensor.dtype) == f"torch.{kept}"


def test_fingerprints_follow_the_files(broken: Path) -> None:
    before = {name: source(broken).fingerprint(name, "float32") for name in (*NETWORKS, "scheduler")}
    spoil(
        broken / PRIOR / "feature_extractor/preprocessor_config.json", lambda config: config.update(extra=1)
    )
    spoil(broken / PRIOR / "tokenizer/tokenizer_config.json", lambda config: config.update(extra=1))
    spoil(broken / DECODER / "vqgan/config.json", lambda config: config.update(extra=1))
    changed = {name for name, old in before.items() if source(broken).fingerprint(name, "float32") != old}
    assert changed == {"text_encoder", "image_encoder", "vqgan"}


# --- other families, and what is no checkpoint -------------------------------------------------------------

OURS = "a Stable Cascade checkpoint, and a Stable Diffusion 1.5 checkpoint is due here"
THEIRS = "a Stable Diffusion 1.5 checkpoint, and a Stable Cascade checkpoint is due here"


def test_the_other_family_is_named_both_ways(folder: Path, files: Path, sd15: Path, tmp_path: Path) -> None:
    for path in (folder, folder / PRIOR, files / "stage_c.safetensors", files / "stage_b_lite.safetensors",
                 files / "stage_a.safetensors"):  # fmt: skip
        with pytest.raises(CheckpointError, match=OURS):
            source(path, family="sd15")
    for path in (sd15, sd15_single_file(sd15, tmp_path / "v1.safetensors")):
        with pytest.raises(CheckpointError, match=THEIRS):
            source(path)
    mixed = tmp_path / "mixed"
    shutil.copytree(folder, mixed)
    shutil.copytree(sd15, mixed / "sd15")
    with pytest.raises(CheckpointError, match=f"mixed/sd15 is {THEIRS}"):
        source(mixed)
    settings = Settings(home=tmp_path, offline=True)
    with pytest.raises(CheckpointError, match=f"sd15 is {THEIRS}"):
        resolve("sd15", "stable_cascade", settings)
    with pytest.raises(CheckpointError, match=f"stable-cascade is {OURS}"):
        resolve("stable-cascade", "sd15", settings)


def test_a_network_of_another_kind_in_a_half_is_named(broken: Path) -> None:
    spoil(broken / PRIOR / "prior/config.json", lambda config: config.update(_class_name="WuerstchenPrior"))
    with pytest.raises(CheckpointError, match="prior is a WuerstchenPrior; it can be a StableCascadeUNet"):
        source(broken).config("prior")


def test_what_is_no_checkpoint_says_so(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"is no checkpoint: there is no model_index\.json"):
        source(tmp_path)
    save_file({"something": torch.zeros(1)}, tmp_path / "other.safetensors")
    with pytest.raises(CheckpointError, match="holds no file of a Stable Cascade checkpoint"):
        source(tmp_path)
    with pytest.raises(CheckpointError, match="is a file of an unknown kind, and a Stable Cascade"):
        source(tmp_path / "other.safetensors")
    packed = {"model.diffusion_model.clip_txt_mapper.weight": torch.zeros(1)}  # as other programs pack it
    save_file(packed, tmp_path / "packed.safetensors")
    with pytest.raises(CheckpointError, match=r"packed\.safetensors: its tensors are not those of a Stage C"):
        source(tmp_path / "packed.safetensors")


# --- what a checkpoint says of itself ----------------------------------------------------------------------

RGB = {"factors": [[1, 0, 0.5]] * 4, "bias": [0, 0, 0]}


def test_defaults_and_extras(broken: Path, files: Path) -> None:
    published = {
        "prior_steps": 20, "prior_guidance_scale": 4.0, "decoder_steps": 10, "decoder_guidance_scale": 0.0,
        "width": 1024, "height": 1024,
    }  # fmt: skip
    assert defaults(source(files)) == published
    own = {
        "defaults": {"width": 128, "height": 128, "prior_steps": 12, "steps": 3},
        "latent_rgb": {"stage_c": RGB, "stage_b": RGB},
        "examples": ["a red house"],
    }
    (broken / "triptych.json").write_text(json.dumps(own))
    assert source(broken).extras() == own
    expected = {**published, "width": 128, "height": 128, "prior_steps": 12}
    assert defaults(source(broken)) == expected
    info = Studio(Settings(home=broken, offline=True)).describe("stable_cascade", str(broken))
    assert info.defaults == expected
    assert info.examples == ["a red house"]


@pytest.mark.parametrize(
    "extras",
    [
        {"defaults": []},
        {"latent_rgb": RGB},
        {"latent_rgb": {"stage_c": {"factors": [[1, 0]], "bias": [0, 0, 0]}}},
        {"latent_rgb": {"stage_d": RGB}},
        {"latent_rgb": []},
        {"latent_rgb": None},
    ],
)
def test_extras_that_cannot_be_used_are_refused(broken: Path, extras: Any) -> None:
    (broken / "triptych.json").write_text(json.dumps(extras))
    with pytest.raises(CheckpointError, match="latent_rgb, for each of stage_c and stage_b, hold factors"):
        source(broken).extras()
