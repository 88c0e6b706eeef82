"""LoRA files: what they are for, what is wrong with them, and what they do to a network's weights."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

from backend import Hardware, SD15Request, Settings, Studio
from backend.errors import CheckpointError, InvalidRequest
from backend.memory.plan import MERGED_FROM
from backend.memory.quantize import quantised
from backend.nn.lowrank import Merged, Term, attached, together
from backend.weights.adapters import adapter, adapters
from backend.weights.lora import Lora, family_of, save_lora
from backend.weights.source import DEMO
from tests import loras

ENDS = ("to_q", "to_out.0", "proj_in", "ff.net.0.proj", "conv1")


def small(*names: str, width: int = 768) -> dict[str, Tensor]:
    """A file with a pair for each of these layers, in the trainers' words."""
    made: dict[str, Tensor] = {}
    for name in names:
        made[f"{name}.lora_down.weight"] = torch.zeros(4, width)
        made[f"{name}.lora_up.weight"] = torch.zeros(320, 4)
    return made


def saved(path: Path, tensors: dict[str, Tensor], **told: str) -> Lora:
    save_file(tensors, path, metadata=told)
    return Lora(path)


# ---- which family


@pytest.mark.parametrize(
    ("layer", "family"),
    [
        ("lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q", "sd15"),
        ("unet.up_blocks.1.attentions.2.proj_in", "sd15"),
        ("base_model.model.mid_block.attentions.0.transformer_blocks.0.attn2.to_k", "sd15"),
        ("lora_te_text_model_encoder_layers_0_self_attn_q_proj", "sd15"),
        ("transformer.transformer_blocks.0.attn.to_q", "sd3"),
        ("lora_unet_joint_blocks_0_x_block_attn_qkv", "sd3"),
        ("lora_te3_encoder_block_0_layer_0_SelfAttention_q", "sd3"),
        ("lora_prior_unet_down_blocks_0_2_attention_to_q", "stable_cascade"),
        ("prior.down_blocks.0.2.kv_mapper.1", "stable_cascade"),
        ("weights.0", "stable_cascade"),
        ("lora_prior_te_text_model_encoder_layers_0_mlp_fc1", "stable_cascade"),
        ("something.else", None),
    ],
)
def test_the_family_is_told_by_the_layers_names(layer: str, family: str | None) -> None:
    assert family_of([layer]) == family


@pytest.mark.parametrize(
    ("tensors", "what"),
    [
        (small("transformer.single_transformer_blocks.0.attn.to_q"), "a LoRA for Flux"),
        (small("lora_unet_double_blocks_0_img_attn_qkv"), "a LoRA for Flux"),
        (
            small("lora_unet_mid_block_attentions_0_proj_in", "lora_te2_text_model_encoder_layers_0_mlp_fc1"),
            "a LoRA for Stable Diffusion XL",
        ),
        (small("unet.mid_block.attentions.0.transformer_blocks.0.attn2.to_k", width=2048), "Diffusion XL"),
        (small("unet.mid_block.attentions.0.transformer_blocks.0.attn2.to_v", width=1024), "Diffusion 2,"),
    ],
)
def test_loras_for_other_networks_are_refused_by_name(
    tmp_path: Path, tensors: dict[str, Tensor], what: str
) -> None:
    lora = saved(tmp_path / "x.safetensors", tensors)
    with pytest.raises(CheckpointError, match=f"x.safetensors is .*{what}"):
        lora.family  # noqa: B018
    assert adapters(Settings(models_dir=tmp_path), "sd15") == adapters(Settings(), "sd15")
    (listed,) = [each for each in adapters(Settings(models_dir=tmp_path)) if each.name == "x"]
    assert what in listed.problem


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("lora_unet_a.hada_w1_a", "a LoHa adapter"),
        ("lora_unet_a.lokr_w1", "a LoKr adapter"),
        ("lora_unet_a.dora_scale", "a DoRA"),
        ("unet.a.lora_magnitude_vector", "a DoRA"),
        ("lora_unet_a.oft_diag", "an OFT adapter"),
        ("lora_unet_a.diff", "whole differences of weights"),
        ("model.weight", "is no LoRA"),
    ],
)
def test_other_kinds_are_refused_by_name(tmp_path: Path, name: str, kind: str) -> None:
    tensors = small("lora_unet_mid_block_attentions_0_proj_in") | {name: torch.zeros(4, 4)}
    with pytest.raises(CheckpointError, match=kind):
        saved(tmp_path / "x.safetensors", tensors).layers  # noqa: B018


# ---- damage


def test_a_truncated_file(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    saved(path, small("lora_unet_mid_block_attentions_0_proj_in"))
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match="truncated"):
        adapter(str(path), "sd15", Settings())


def test_a_pickle_that_would_run_code(tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> Any:
            return (print, ("run",))

    path = tmp_path / "x.pt"
    torch.save({"lora_unet_mid_block_a.lora_down.weight": Evil()}, path)
    with pytest.raises(CheckpointError, match="could run somebody's code"):
        adapter(str(path), "sd15", Settings())
    assert [each.name for each in adapters(Settings(models_dir=tmp_path)) if each.name == "x"] == []


def test_half_a_pair_and_ranks_that_do_not_fit(tmp_path: Path) -> None:
    layer = "lora_unet_mid_block_attentions_0_proj_in"
    half = small(layer)
    del half[f"{layer}.lora_up.weight"]
    with pytest.raises(CheckpointError, match=f"damaged: {layer} lacks one of its two matrices"):
        saved(tmp_path / "half.safetensors", half).layers  # noqa: B018
    odd = small(layer) | {f"{layer}.lora_up.weight": torch.zeros(320, 8)}
    with pytest.raises(CheckpointError, match=rf"the ranks of {layer} do not fit \(4×768 and 320×8\)"):
        saved(tmp_path / "odd.safetensors", odd).layers  # noqa: B018


@pytest.mark.parametrize("half", ["lora_down", "lora_up"])
def test_matrices_that_are_no_numbers(tmp_path: Path, half: str) -> None:
    layer = "lora_unet_mid_block_attentions_0_proj_in"
    tensors = small(layer)
    tensors[f"{layer}.{half}.weight"][2, 3] = float("nan")
    lora = saved(tmp_path / "burnt.safetensors", tensors)
    places = lora.places("sd15", "unet", {"mid_block.attentions.0.proj_in.weight": (320, 768, 1, 1)})
    with pytest.raises(CheckpointError, match=f"burnt.* damaged: the matrices of {layer} are not all of"):
        lora.terms(places, 1.0)


def test_layers_of_another_checkpoint(tmp_path: Path) -> None:
    base = {"mid_block.attentions.0.proj_in.weight": (320, 320, 1, 1)}
    wide = saved(tmp_path / "wide.safetensors", small("lora_unet_mid_block_attentions_0_proj_in"))
    with pytest.raises(
        InvalidRequest, match="wide.safetensors is for another checkpoint: .* 320×768, .* 320×320"
    ):
        wide.places("sd15", "unet", base)
    more = saved(tmp_path / "more.safetensors", small("lora_unet_mid_block_attentions_1_proj_in"))
    with pytest.raises(InvalidRequest, match="has 1 layers that the checkpoint's unet lacks"):
        more.places("sd15", "unet", base)
    with pytest.raises(CheckpointError, match="Stable Diffusion 1.5 .*Stable Diffusion 3"):
        more.places("sd3", "transformer", base)


# ---- files in a folder


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "deep").mkdir()
    layer = "lora_unet_mid_block_attentions_0_proj_in"
    for name in ("ink", "deep/ink", "inkwash", "LCM_4step"):
        saved(tmp_path / f"{name}.safetensors", small(layer))
    saved(tmp_path / "for-sd3.safetensors", small("transformer.transformer_blocks.0.attn.to_q"))
    return tmp_path


def test_two_of_one_name_are_called_by_their_folders(folder: Path) -> None:
    settings = Settings(models_dir=folder)
    with pytest.raises(InvalidRequest, match=r"name of two files \(\./ink and deep/ink\)"):
        adapter("ink", "sd15", settings)
    assert adapter("deep/ink", "sd15", settings).path == folder / "deep/ink.safetensors"
    assert adapter("./ink", "sd15", settings).path == folder / "ink.safetensors"
    (folder / "ink.safetensors").unlink()  # what pictures were made with is still called so
    assert adapter("deep/ink", "sd15", settings) == adapter("ink", "sd15", settings)
    assert adapter("INKWASH.safetensors", "sd15", settings).name == "inkwash"


def test_an_unknown_name_lists_near_ones(folder: Path) -> None:
    settings = Settings(models_dir=folder)
    with pytest.raises(InvalidRequest, match="no LoRA called 'inkwahs'; it can be inkwash"):
        adapter("inkwahs", "sd15", settings)
    with pytest.raises(
        InvalidRequest, match="for-sd3 is a LoRA for Stable Diffusion 3, and Stable Diffusion 1.5"
    ):
        adapter("for-sd3", "sd15", settings)
    strangers = replace(settings, public=True)
    with pytest.raises(InvalidRequest, match="no LoRA called"):
        adapter(str(folder / "ink.safetensors"), "sd15", strangers)
    assert adapter("inkwash", "sd15", strangers).name == "inkwash"  # the host put it there


def test_new_files_are_seen_and_few_step_ones_told(folder: Path) -> None:
    settings = Settings(models_dir=folder)
    known = {each.name: each for each in adapters(settings, "sd15")}
    assert known["LCM_4step"].offers == {"sampler": "lcm", "steps": 4, "guidance_scale": 1.0}
    assert not known["inkwash"].offers
    assert known["inkwash"].rank == "4"
    (folder / "inkwash.json").write_text(json.dumps({"activation text": "ink wash, brush"}))
    saved(folder / "new.safetensors", small("lora_unet_mid_block_attentions_0_proj_in"),
          ss_tag_frequency=json.dumps({"set": {"a cat": 3, "a dog": 7}}))  # fmt: skip
    known = {each.name: each for each in adapters(settings, "sd15")}
    assert known["inkwash"].words == ("ink wash", "brush")
    assert known["new"].words == ("a dog", "a cat")


# ---- saved


def test_what_is_saved_is_read_as_it_was(tmp_path: Path) -> None:
    terms = {"unet": {"mid_block.attentions.0.proj_in": Term(torch.randn(3, 8), torch.randn(6, 3))}}
    path = tmp_path / "own.safetensors"
    save_lora(path, terms, family="sd15", base="demo", alpha=6, words=["a robot", "tin"], licence="MIT",
              title="Robots", dtype="float32")  # fmt: skip
    lora = Lora(path)
    places = lora.places("sd15", "unet", {"mid_block.attentions.0.proj_in.weight": (6, 8)})
    (again,) = lora.terms(places, 1.0).values()
    assert torch.allclose(again.down, terms["unet"]["mid_block.attentions.0.proj_in"].down)
    assert torch.allclose(again.up, terms["unet"]["mid_block.attentions.0.proj_in"].up, rtol=1e-6)
    told = adapter("own", "sd15", Settings(models_dir=tmp_path))
    assert (told.words, told.licence, told.base, told.title, told.rank) == (
        ("a robot", "tin"), "MIT", "demo", "Robots", "3",
    )  # fmt: skip


# ---- on layers


@pytest.mark.parametrize("made", ["linear", "pointwise", "convolution"])
def test_beside_the_weights_is_as_in_them(made: str) -> None:
    layers: dict[str, tuple[nn.Module, Tensor, Tensor]] = {
        "linear": (nn.Linear(6, 8), torch.randn(2, 5, 6), torch.randn(3, 6)),
        "pointwise": (nn.Conv2d(6, 8, 1), torch.randn(2, 6, 5, 4), torch.randn(3, 6)),
        "convolution": (
            nn.Conv2d(6, 8, 3, stride=2, padding=1),
            torch.randn(2, 6, 5, 4),
            torch.randn(3, 6, 3, 3),
        ),
    }
    layer, x, down = layers[made]
    network = nn.Sequential(layer)
    before = layer.get_parameter("weight").clone()
    term = together([Term(down, torch.randn(8, 3)), Term(torch.randn_like(down[:2]), torch.randn(8, 2))])
    with torch.no_grad():
        plain = network(x)
        with attached(network, {"0": term}, torch.device("cpu"), torch.float32):
            beside = network(x)
        merged = Merged(network)
        merged.set({"0": term})
        within = network(x)
        merged.set({"0": Term(term.down, term.up * 0.5)})
        merged.undo()
    assert torch.allclose(beside, within, atol=1e-5)
    assert (beside - plain).abs().max() > 0.1
    assert torch.equal(layer.get_parameter("weight"), before)
    assert torch.equal(network(x), plain)


@pytest.mark.parametrize("precision", ["int8", "nf4"])
def test_beside_quantised_weights(precision: str) -> None:
    layer = quantised(precision, (32, 64), torch.device("cpu"))
    layer.read(torch.randn(32, 64))
    network, x = nn.Sequential(layer), torch.randn(2, 5, 64)
    term = Term(torch.randn(4, 64), torch.randn(32, 4))
    plain = network(x)
    with attached(network, {"0": term}, torch.device("cpu"), torch.float32):
        beside = network(x)
    assert torch.allclose(beside - plain, F.linear(F.linear(x, term.down), term.up), atol=1e-3)
    assert torch.equal(network(x), plain)


# ---- under every placement


@pytest.fixture(scope="module")
def ink(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LoRA for the demo."""
    folder = tmp_path_factory.mktemp("models")
    unet, text = (loras.weights_of(DEMO / "sd15" / name) for name in ("unet", "text_encoder"))
    layers = {"unet": loras.pairs(unet, ENDS), "text_encoder": loras.pairs(text, ("q_proj", "fc1"))}
    return loras.hub(folder / "ink.safetensors", layers)


def pixels(studio: Studio, steps: int, **asked: Any) -> np.ndarray[Any, Any]:
    request = SD15Request(prompt="a red house", seed=3, width=64, height=64, steps=steps, **asked)
    return np.asarray(studio.run(request).images[0], dtype=int)


Pictures = dict[int, tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]]


@pytest.fixture(scope="module")
def by_hand(ink: Path, tmp_path_factory: pytest.TempPathFactory) -> Pictures:
    """By steps: the demo's picture, and that of the demo with the pairs added to its files."""
    folder = tmp_path_factory.mktemp("by hand") / "sd15"
    shutil.copytree(DEMO / "sd15", folder)
    for component, ends in (("unet", ENDS), ("text_encoder", ("q_proj", "fc1"))):
        (path,) = (folder / component).glob("*.safetensors")
        tensors = {name: tensor.float() for name, tensor in load_file(path).items()}
        for name, pair in loras.pairs(tensors, ends).items():
            delta = pair.up @ pair.down.flatten(1) * (0.7 * pair.alpha / pair.rank)
            tensors[f"{name}.weight"] += delta.view(tensors[f"{name}.weight"].shape)
        save_file(tensors, path)
    home = tmp_path_factory.mktemp("home")
    studio = Studio(Settings(device="cpu", dtype="float32", home=home))
    return {
        steps: (pixels(studio, steps), pixels(studio, steps, checkpoint=str(folder)))
        for steps in (MERGED_FROM - 1, MERGED_FROM)
    }


PLACES: dict[str, tuple[Hardware | None, dict[str, Any]]] = {
    "in memory": (Hardware.card(gib=8), {}),
    "swapped": (Hardware.card(gib=8), {"offload": "model"}),
    "streamed": (Hardware.card(gib=8), {"offload": "sequential"}),
    "on the CPU": (None, {}),
    "mapped": (None, {"offload": "sequential"}),
}


@pytest.fixture(params=PLACES)
def studio(request: pytest.FixtureRequest, tmp_path: Path, ink: Path) -> Studio:
    hardware, settings = PLACES[request.param]
    if hardware is not None:
        hardware = replace(hardware, stand_in="cpu")
    own: dict[str, Any] = {"device": "cpu", "dtype": "float32", "home": tmp_path, "models_dir": ink.parent}
    return Studio(Settings(**own, **settings), hardware)


def test_every_placement_paints_the_same_and_forgets_it_again(studio: Studio, by_hand: Pictures) -> None:
    for steps, (plain, expected) in by_hand.items():
        painted = pixels(studio, steps, loras=(("ink", 0.7),))
        assert np.abs(painted - expected).max() <= 1
        assert np.abs(painted - plain).max() > 20
        assert np.abs(pixels(studio, steps) - plain).max() <= 1
    with_it, without = (
        studio.plan(SD15Request(steps=1, loras=(("ink", 0.7),))),
        studio.plan(SD15Request(steps=1)),
    )
    assert with_it.components["unet"].held_bytes > without.components["unet"].held_bytes


def test_taken_out_it_leaves_no_trace(ink: Path, tmp_path: Path) -> None:
    studio = Studio(Settings(device="cpu", dtype="float32", home=tmp_path, models_dir=ink.parent))
    few, many = MERGED_FROM - 1, MERGED_FROM
    before = [pixels(studio, steps) for steps in (few, many)]
    painted = [pixels(studio, many, loras=(("ink", weight),)) for weight in (0.7, -0.7, 0.7)]
    apart = pixels(studio, many, loras=(("ink", 0.7, 0.0),))  # the network alone
    studio._cache.clear()  # so that nothing kept stands in for what is painted
    assert all((pixels(studio, n) == old).all() for n, old in zip((few, many), before, strict=True))
    assert (painted[0] == painted[2]).all()
    assert np.abs(painted[0] - painted[1]).max() > 20
    assert np.abs(painted[0] - apart).max() > 1


def test_the_plan_counts_them_and_says_how(ink: Path, tmp_path: Path) -> None:
    studio = Studio(Settings(device="cpu", dtype="float32", home=tmp_path, models_dir=ink.parent))

    def planned(steps: int, **asked: Any) -> Any:
        return studio.plan(SD15Request(prompt="a red house", steps=steps, **asked))

    plain, few = planned(1), planned(1, loras=(("ink", 0.7),))
    many = planned(20, loras=(("ink", 0.7),))
    assert few.peak_bytes > plain.peak_bytes
    assert any("a LoRA beside its weights" in text for text in few.decisions)
    assert any("The UNet has a LoRA merged into" in text for text in many.decisions)
    assert many.components["unet"].merged
    assert not few.components["unet"].merged
    assert many.components["unet"].held_bytes > few.components["unet"].held_bytes


def test_named_twice(ink: Path, tmp_path: Path) -> None:
    studio = Studio(Settings(device="cpu", home=tmp_path, models_dir=ink.parent))
    with pytest.raises(InvalidRequest, match="'ink' is named twice; name it once"):
        studio.plan(SD15Request(prompt="a house <lora:ink:0.3>", loras=((str(ink), 0.7),)))
