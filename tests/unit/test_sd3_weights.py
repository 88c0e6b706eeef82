"""Stable Diffusion 3 checkpoints: both layouts, what files lack, and what is said of misfits."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from backend import catalog
from backend.errors import CheckpointError
from backend.nn.autoencoder import Autoencoder, AutoencoderConfig
from backend.sd3 import keys
from backend.sd3.mmdit import MMDiT, MMDiTConfig
from backend.settings import Settings
from backend.text.encoders import load_projected_clip_text
from backend.weights import files
from backend.weights.base import Source
from backend.weights.load import load_module
from backend.weights.single import FileSource
from backend.weights.source import resolve
from tests.checkpoints import (
    original_mmdit,
    original_vae,
    sd3_folder,
    sd3_single_file,
    sd15_folder,
    sd15_single_file,
    spoil,
)

CPU = torch.device("cpu")
KINDS: dict[str, dict[str, Any]] = {
    "3 medium": {},
    "3.5 medium": {"qk_norm": "rms_norm", "dual_attention_layers": (0, 1)},
    "3.5 large": {"qk_norm": "rms_norm", "num_layers": 4},
}
NATIVE = ("sample_size", "tie_word_embeddings")  # which no picture of a given size depends on
ENCODERS = ("text_encoder", "text_encoder_2", "text_encoder_3")
TOKENIZERS = ("tokenizer", "tokenizer_2", "tokenizer_3")
T5 = "text_encoders.t5xxl.transformer."
CLIP_L, CLIP_G = "text_encoders.clip_l.transformer.", "text_encoders.clip_g.transformer."
X = "model.diffusion_model.joint_blocks."


@pytest.fixture(scope="module", params=KINDS)
def each(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return sd3_folder(tmp_path_factory.mktemp("hub-layout") / "tiny", **KINDS[request.param])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return sd3_folder(tmp_path_factory.mktemp("hub-layout") / "tiny", **KINDS["3.5 medium"])


@pytest.fixture
def broken(folder: Path, tmp_path: Path) -> Path:
    """A copy of the folder, to be spoiled."""
    return Path(shutil.copytree(folder, tmp_path / "broken"))


@pytest.fixture(scope="module")
def single(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The transformer, the VAE, and both CLIP models."""
    return sd3_single_file(tmp_path_factory.mktemp("single") / "tiny.safetensors", folder)


@pytest.fixture
def spoilt(single: Path, tmp_path: Path) -> Path:
    """A copy of the single file, to be spoiled."""
    return Path(shutil.copy(single, tmp_path / "spoilt.safetensors"))


def source(path: Path, config_from: Path | None = None, family: str = "sd3") -> Source:
    settings = Settings(home=path.parent, models_dir=path.parent / "none", offline=True)
    return resolve(str(path), family, settings, config_from=str(config_from) if config_from else None)


def load_transformer(source: Source, dtype: torch.dtype = torch.float32) -> MMDiT:
    config = MMDiTConfig.from_dict(source.config("transformer"))
    tensors = source.tensors("transformer", str(dtype).removeprefix("torch."))
    return load_module(
        lambda: MMDiT(config), tensors, dtype=dtype, device=CPU, what=f"{source.name}: transformer"
    )


def same(ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor]) -> bool:
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in theirs)


def remove(path: Path, *starts: str) -> None:
    """Take the tensors out of a file whose names begin so."""

    def change(tensors: dict[str, Any]) -> None:
        found = [name for name in tensors if name.startswith(starts)]
        assert found
        for name in found:
            del tensors[name]

    spoil(path, change)


# --- both layouts ------------------------------------------------------------------------------------------


def test_a_single_file_equals_the_folder_it_was_made_from(each: Path, tmp_path: Path) -> None:
    file = sd3_single_file(tmp_path / "one.safetensors", each, t5="float32")
    hub, original, alone = source(each), source(file, each), source(file)
    assert isinstance(original, FileSource)
    for component in keys.COMPONENTS:
        ours, theirs = original.tensors(component, "float32"), hub.tensors(component, "float32")
        assert same(ours, theirs), component
        assert {name: tuple(tensor.shape) for name, tensor in theirs.items()} == original.shapes(
            component, "float32"
        )
        assert (
            original.parameter_bytes(component, "bfloat16") == hub.parameter_bytes(component, "bfloat16") > 0
        )
        assert original.files(component, "float32") == [file]
        # what shapes tell equals what the folder's configs say; with those, so does the rest
        known = hub.config(component)
        for read, passed_over in ((original, ()), (alone, NATIVE)):
            for name, value in read.config(component).items():
                if name not in passed_over:  # [] means no such layers, as None does
                    assert (value or None) == (known.get(name, value) or None), name
    assert same(load_transformer(original).state_dict(), load_transformer(hub).state_dict())
    for name in TOKENIZERS:
        assert original.tokenizer(name) == hub.tokenizer(name) == each / name
    assert original.config("scheduler")["shift"] == alone.config("scheduler")["shift"] == 3.0


def test_both_clips_load_from_either_layout(folder: Path, single: Path) -> None:
    for component in ("text_encoder", "text_encoder_2"):
        ours = load_projected_clip_text(source(single), component, torch.float32, CPU)
        theirs = load_projected_clip_text(source(folder), component, torch.float32, CPU)
        assert same(ours.state_dict(), theirs.state_dict())


def test_queries_keys_and_values_are_views_of_their_stack(single: Path) -> None:
    tensors = source(single).tensors("transformer", "float32")
    for names in ("attn.to_{}", "attn.add_{}_proj", "attn2.to_{}"):
        query, key, value = (
            tensors[f"transformer_blocks.0.{names.format(letter)}.weight"] for letter in "qkv"
        )
        size = query.numel() * query.element_size()
        assert key.data_ptr() - query.data_ptr() == value.data_ptr() - key.data_ptr() == size


def test_the_halves_of_the_last_modulations_change_places(single: Path) -> None:
    """Read off the file itself: shift before scale there, scale before shift here."""
    file, tensors = load_file(single), source(single).tensors("transformer", "float32")
    for theirs, ours in (
        ("model.diffusion_model.final_layer.adaLN_modulation.1", "norm_out.linear"),
        (f"{X}2.context_block.adaLN_modulation.1", "transformer_blocks.2.norm1_context.linear"),
    ):
        for kind in ("weight", "bias"):
            shift, scale = file[f"{theirs}.{kind}"].chunk(2)
            assert torch.equal(tensors[f"{ours}.{kind}"], torch.cat([scale, shift]))
    kept = "transformer_blocks.0.norm1_context.linear.bias"  # six kinds, in one order everywhere
    assert torch.equal(tensors[kept], file[f"{X}0.context_block.adaLN_modulation.1.bias"])


def test_known_answers_of_the_key_table() -> None:
    """Names of the published 3.5-medium file, read off its network's definition."""
    with torch.device("meta"):
        network = MMDiT(MMDiTConfig.from_dict(published("sd3.5-medium")))
        vae = Autoencoder(AutoencoderConfig.from_dict(keys.PUBLISHED["vae"]))
    original = {
        **original_mmdit(network.state_dict(), published("sd3.5-medium")),
        **original_vae(vae.state_dict(), keys.PUBLISHED["vae"]),
    }
    found = keys.parts({name: tuple(tensor.shape) for name, tensor in original.items()})
    assert list(found) == ["transformer", "vae"]
    back = {origin.name: name for name, origin in found["transformer"].items()}
    pairs = {
        "pos_embed": "pos_embed.pos_embed",
        "x_embedder.proj.weight": "pos_embed.proj.weight",
        "t_embedder.mlp.2.bias": "time_text_embed.timestep_embedder.linear_2.bias",
        "y_embedder.mlp.0.weight": "time_text_embed.text_embedder.linear_1.weight",
        "context_embedder.weight": "context_embedder.weight",
        "joint_blocks.12.x_block.adaLN_modulation.1.weight": "transformer_blocks.12.norm1.linear.weight",
        "joint_blocks.12.x_block.attn2.ln_k.weight": "transformer_blocks.12.attn2.norm_k.weight",
        "joint_blocks.3.x_block.attn.ln_q.weight": "transformer_blocks.3.attn.norm_q.weight",
        "joint_blocks.3.context_block.attn.ln_q.weight": "transformer_blocks.3.attn.norm_added_q.weight",
        "joint_blocks.22.context_block.attn.proj.bias": "transformer_blocks.22.attn.to_add_out.bias",
        "joint_blocks.22.context_block.mlp.fc2.bias": "transformer_blocks.22.ff_context.net.2.bias",
        "final_layer.linear.weight": "proj_out.weight",
    }
    assert {name: back["model.diffusion_model." + name] for name in pairs} == pairs
    assert found["transformer"]["transformer_blocks.5.attn.add_v_proj.bias"].chunk == (2, 3)
    last = found["vae"]["decoder.up_blocks.0.resnets.0.norm1.weight"]
    assert last.name == "first_stage_model.decoder.up.3.block.0.norm1.weight"
    assert "quant_conv.weight" not in found["vae"]


def published(name: str) -> dict[str, Any]:
    entry = catalog.entry("sd3", name)
    assert entry is not None
    return {**keys.PUBLISHED["transformer"], **entry.configs.get("transformer", {})}


@pytest.mark.parametrize("name", ["sd3-medium", "sd3.5-medium", "sd3.5-large", "sd3.5-large-turbo"])
@pytest.mark.parametrize("prefix", ["model.diffusion_model.", ""])
def test_the_published_files_are_told_by_their_tensors(name: str, prefix: str) -> None:
    config = MMDiTConfig.from_dict(published(name))
    with torch.device("meta"):
        tensors = original_mmdit(MMDiT(config).state_dict(), published(name))
    shapes = {
        prefix + key.removeprefix("model.diffusion_model."): tuple(tensor.shape)
        for key, tensor in tensors.items()
    }
    found = keys.parts(shapes)["transformer"]
    told = keys.config("transformer", {key: origin.shape for key, origin in found.items()}, None)
    assert MMDiTConfig.from_dict(told) == config


@pytest.mark.parametrize(
    ("made", "heads"), [({"qk_norm": "rms_norm"}, 4), ({}, 2)], ids=["told by the norms", "as published"]
)
def test_the_width_of_heads(made: dict[str, Any], heads: int) -> None:
    config = {
        **keys.PUBLISHED["transformer"],
        "num_layers": 1, "attention_head_dim": 32, "num_attention_heads": 4, "caption_projection_dim": 128,
        **made,
    }  # fmt: skip
    with torch.device("meta"):
        shapes = {
            name: tuple(t.shape) for name, t in MMDiT(MMDiTConfig.from_dict(config)).state_dict().items()
        }
    assert keys.config("transformer", shapes, None)["num_attention_heads"] == heads
    assert keys.config("transformer", shapes, config)["num_attention_heads"] == 4  # where a config says so


@pytest.mark.parametrize("activation", ["gated-gelu", "relu"])
def test_t5_is_told_by_its_tensors(activation: str) -> None:
    from transformers import T5Config, T5EncoderModel

    config: dict[str, Any] = {
        **keys.PUBLISHED["text_encoder_3"],
        "d_kv": 32,
        "num_heads": 12,
        "feed_forward_proj": activation,
    }
    with torch.device("meta"):
        network = T5EncoderModel(T5Config(**config))
    shapes = {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()}
    once = {name: origin.shape for name, origin in keys.hub_names("text_encoder_3", shapes).items()}
    assert shapes.keys() - once.keys() == {"encoder.embed_tokens.weight"}
    assert keys.config("text_encoder_3", once, None) == config


# --- T5 and its precisions ---------------------------------------------------------------------------------


@pytest.mark.parametrize("kept", ["float16", "float8_e4m3fn", "float8_e5m2"])
def test_t5_in_the_precision_of_the_file(folder: Path, tmp_path: Path, kept: str) -> None:
    file = sd3_single_file(tmp_path / "one.safetensors", folder, t5=kept, dtype=torch.float16)
    read, whole = source(file), source(folder)
    assert read.has("text_encoder_3")
    tensors, full = read.tensors("text_encoder_3", "bfloat16"), whole.tensors("text_encoder_3", "bfloat16")
    assert tensors.keys() == full.keys()
    dtype = getattr(torch, kept)
    assert {tensor.dtype for tensor in tensors.values()} == {dtype}
    assert all(torch.equal(tensors[name].float(), full[name].to(dtype).float()) for name in full)
    assert read.parameter_bytes("text_encoder_3", "bfloat16") == whole.parameter_bytes(
        "text_encoder_3", "bfloat16"
    )
    assert read.tensors("transformer", "bfloat16")["proj_out.bias"].dtype == torch.float16
    assert read.precision("text_encoder_3", "bfloat16") == kept  # of this network, not of the whole file
    assert read.precision("transformer", "bfloat16") == "float16"
    assert whole.precision("text_encoder_3", "bfloat16") == "float32"


@pytest.mark.parametrize("kept", [torch.float8_e4m3fn, torch.float8_e5m2])
@pytest.mark.parametrize("run", [torch.float32, torch.bfloat16, torch.float16])
def test_a_file_in_float8_is_run_in_more(
    folder: Path, tmp_path: Path, kept: torch.dtype, run: torch.dtype
) -> None:
    file = sd3_single_file(tmp_path / "one.safetensors", folder, dtype=kept)
    assert files.precision(file) == str(kept).removeprefix("torch.")
    loaded = load_transformer(source(file), run).state_dict()
    exact = source(folder).tensors("transformer", "float32")
    assert {tensor.dtype for tensor in loaded.values()} == {run}
    assert all(torch.equal(loaded[name], exact[name].to(kept).to(run)) for name in exact)
    config = AutoencoderConfig.from_dict(source(file).config("vae"))
    vae = load_module(
        lambda: Autoencoder(config), source(file).tensors("vae", "bfloat16"),
        dtype=run, device=CPU, what="vae", layout=torch.channels_last,
    )  # fmt: skip
    assert all(parameter.dtype == run for parameter in vae.parameters())


@pytest.mark.parametrize(
    "name",
    [
        "scaled_fp8",
        "model.diffusion_model.joint_blocks.0.x_block.attn.qkv.scale_weight",
        "model.diffusion_model.joint_blocks.0.x_block.attn.qkv.weight_scale",
        "model.diffusion_model.joint_blocks.0.x_block.attn.qkv.comfy_quant",
        "model.diffusion_model.joint_blocks.0.x_block.attn.qkv.weight.absmax",
        "text_encoders.t5xxl.transformer.encoder.block.0.layer.0.SelfAttention.q.scale_input",
    ],
)
def test_weights_with_scales_beside_them_are_refused_by_name(spoilt: Path, name: str) -> None:
    spoil(spoilt, lambda tensors: tensors.update({name: torch.ones(1)}))
    with pytest.raises(CheckpointError) as refused:
        source(spoilt)
    assert str(refused.value).startswith(
        "spoilt.safetensors: its weights were quantised with scales of their own"
    )
    assert f"(1 tensors: {name})" in str(refused.value)


def test_a_folder_quantised_beforehand_is_refused_by_name(broken: Path) -> None:
    spoil(
        broken / "text_encoder_3/config.json",
        lambda config: config.update(quantization_config={"quant_method": "bitsandbytes"}),
    )
    with pytest.raises(CheckpointError, match=r"text_encoder_3 was quantised beforehand \(bitsandbytes\)"):
        source(broken).config("text_encoder_3")


@pytest.mark.parametrize("names", [("shared.weight",), ("encoder.embed_tokens.weight",)])
def test_t5s_tokens_go_by_either_name(folder: Path, tmp_path: Path, names: tuple[str, ...]) -> None:
    file = sd3_single_file(tmp_path / "one.safetensors", folder, t5="float32")
    others = {"shared.weight", "encoder.embed_tokens.weight"} - {*names}
    remove(file, *(T5 + name for name in others))
    tensors = source(file).tensors("text_encoder_3", "float32")
    assert same(tensors, source(folder).tensors("text_encoder_3", "float32"))


def shard(folder: Path) -> list[Path]:
    """Split T5 in two, as it is published → the shards."""
    whole = folder / "text_encoder_3/model.safetensors"
    tensors = load_file(whole)
    whole.unlink()
    names = sorted(tensors)
    shards = {
        whole.with_name(f"model-0000{number}-of-00002.safetensors"): part
        for number, part in enumerate((names[::2], names[1::2]), start=1)
    }
    for path, part in shards.items():
        save_file({name: tensors[name] for name in part}, path)
    index = {
        "metadata": {},
        "weight_map": {name: path.name for path, part in shards.items() for name in part},
    }
    whole.with_name("model.safetensors.index.json").write_text(json.dumps(index))
    return list(shards)


def test_t5_in_two_shards(folder: Path, broken: Path) -> None:
    shards = shard(broken)
    whole, parts = source(folder), source(broken)
    assert parts.files("text_encoder_3", "bfloat16") == [broken / "text_encoder_3/config.json", *shards]
    assert same(parts.tensors("text_encoder_3", "float32"), whole.tensors("text_encoder_3", "float32"))
    assert parts.parameter_bytes("text_encoder_3", "float16") == whole.parameter_bytes(
        "text_encoder_3", "float16"
    )
    shards[1].unlink()
    with pytest.raises(CheckpointError, match=r"lists model-00002-of-00002\.safetensors, which is not there"):
        source(broken).tensors("text_encoder_3", "float32")


@pytest.mark.parametrize(
    ("component", "start", "due"),
    [
        ("text_encoder", f"{CLIP_L}text_model.encoder.layers.", 3),
        ("text_encoder_2", f"{CLIP_G}text_model.encoder.layers.", 3),
        ("text_encoder_3", f"{T5}encoder.block.", 2),
    ],
)
def test_encoders_that_lack_layers_are_refused(
    folder: Path, tmp_path: Path, component: str, start: str, due: int
) -> None:
    file = sd3_single_file(tmp_path / "one.safetensors", folder, t5="float32")
    remove(file, f"{start}{due - 1}.")
    told = f"one.safetensors: {component} has {due - 1} layers, and {due} are due, as its settings say"
    with pytest.raises(CheckpointError, match=told):
        source(file, folder)


@pytest.mark.parametrize(
    ("component", "width", "due"), [("text_encoder", "hidden_size", 12), ("text_encoder_3", "d_model", 24)]
)
def test_without_settings_published_encoders_have_all_their_layers(
    component: str, width: str, due: int
) -> None:
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection, T5Config, T5EncoderModel

    _, count, _ = keys.LAYERS[component]

    def shapes(size: int, layers: int) -> dict[str, tuple[int, ...]]:
        config: dict[str, Any] = {**keys.PUBLISHED[component], width: size, count: layers}
        with torch.device("meta"):
            if component == "text_encoder":
                network: nn.Module = CLIPTextModelWithProjection(CLIPTextConfig(**config))
            else:
                network = T5EncoderModel(T5Config(**config))
        return {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()}

    published = keys.PUBLISHED[component][width]
    assert keys.config(component, shapes(published, due), None)[count] == due
    assert keys.config(component, shapes(published // 2, 4), None)[count] == 4  # another network
    told = f"{component} has {due // 2} layers, and {due} are due, as published"
    with pytest.raises(CheckpointError, match=told):
        keys.config(component, shapes(published, due // 2), None)
    start = "encoder.block.2." if component == "text_encoder_3" else "text_model.encoder.layers.2."
    gap = {name: shape for name, shape in shapes(published // 2, 4).items() if not name.startswith(start)}
    with pytest.raises(CheckpointError, match=rf"{component} lacks layers in between \(2\)"):
        keys.config(component, gap, None)


# --- what a file lacks -------------------------------------------------------------------------------------


def test_without_t5_it_says_so(folder: Path, single: Path, tmp_path: Path) -> None:
    assert not source(single).has("text_encoder_3")
    with pytest.raises(CheckpointError, match="holds no text_encoder_3; set config_from to a folder or hub"):
        source(single).config("text_encoder_3")
    completed = source(single, folder)
    assert completed.has("text_encoder_3")
    assert same(
        completed.tensors("text_encoder_3", "float32"), source(folder).tensors("text_encoder_3", "float32")
    )
    none = sd3_folder(tmp_path / "none", t5=False)
    for read in (source(none), source(single, none)):
        assert not read.has("text_encoder_3")
        assert all(map(read.has, keys.REQUIRED))
    assert not source(none).has("tokenizer_3")


def test_without_clips_they_come_from_config_from(folder: Path, tmp_path: Path) -> None:
    file = sd3_single_file(tmp_path / "bare.safetensors", folder, clips=False)
    bare = source(file)
    assert [name for name in keys.COMPONENTS if bare.has(name)] == ["transformer", "vae"]
    told = "bare.safetensors holds no text_encoder, text_encoder_2; set config_from to a folder or hub"
    for ask in (bare.config, lambda name: bare.tensors(name, "float32")):
        with pytest.raises(CheckpointError, match=told):
            ask("text_encoder")
    whole = source(file, folder)
    for component in ENCODERS:
        assert whole.precision(component, "bfloat16") == "float32"
        assert same(whole.tensors(component, "float32"), source(folder).tensors(component, "float32"))
        assert whole.fingerprint(component, "float32") == source(folder).fingerprint(component, "float32")


@pytest.mark.parametrize(("half", "other"), [(CLIP_L, "text_encoder"), (CLIP_G, "text_encoder_2")])
def test_a_file_with_half_its_encoders_names_the_other(
    folder: Path, spoilt: Path, half: str, other: str
) -> None:
    remove(spoilt, half)
    with pytest.raises(
        CheckpointError, match=f"spoilt.safetensors holds no {other}; set config_from to a folder"
    ):
        source(spoilt).config(other)
    whole = source(spoilt, folder)
    assert same(whole.tensors(other, "float32"), source(folder).tensors(other, "float32"))


def test_every_tokenizer_is_asked_for_by_its_name(folder: Path, tmp_path: Path) -> None:
    file = sd3_single_file(tmp_path / "one.safetensors", folder, t5="float16")
    for name, content in (
        ("tokenizer", "vocab.json and merges.txt"),
        ("tokenizer_2", "vocab.json and merges.txt"),
        ("tokenizer_3", r"tokenizer.json or spiece.model"),
    ):
        told = (
            rf"holds no {name}, .*config_from to a folder with a {name}/ \({content}\), or to a hub "
            "repository such as stabilityai/stable-diffusion-3-medium-diffusers"
        )
        with pytest.raises(CheckpointError, match=told):
            source(file).tokenizer(name)
        with pytest.raises(CheckpointError, match=told):
            list(source(file).fetch([name.replace("tokenizer", "text_encoder")], "float32"))
        assert source(file, folder).files(name, "float32") == sorted((folder / name).iterdir())
    assert list(source(file, folder).fetch(keys.COMPONENTS, "float32")) == []


def test_a_sentencepiece_model_is_a_tokenizer(broken: Path) -> None:
    for path in (broken / "tokenizer_3").iterdir():
        path.unlink()
    assert not source(broken).has("tokenizer_3")
    with pytest.raises(
        CheckpointError, match=r"no tokenizer_3: .* holds no tokenizer\.json or spiece\.model"
    ):
        source(broken).tokenizer("tokenizer_3")
    (broken / "tokenizer_3/spiece.model").write_bytes(b"pieces")
    assert source(broken).tokenizer("tokenizer_3") == broken / "tokenizer_3"


def test_a_projection_of_clip_l_in_a_file_is_not_applied(spoilt: Path) -> None:
    """Nor is it by the release's code, whatever the file holds."""
    spoil(spoilt, lambda tensors: tensors.update({f"{CLIP_L}text_projection.weight": torch.randn(64, 64)}))
    projection = source(spoilt).tensors("text_encoder", "float32")["text_projection.weight"]
    assert torch.equal(projection, torch.eye(64))


def test_what_training_left_behind_is_dropped(single: Path, spoilt: Path) -> None:
    extra = ("clip_l.logit_scale", "clip_g.transformer.logit_scale", "t5xxl.logit_scale")
    left = {f"text_encoders.{name}": torch.zeros(()) for name in extra}
    left[f"{CLIP_G}text_model.embeddings.position_ids"] = torch.arange(77)[None]
    spoil(spoilt, lambda tensors: tensors.update(left))
    for component in ("text_encoder", "text_encoder_2"):
        assert source(spoilt).shapes(component, "float32") == source(single).shapes(component, "float32")
    assert not source(spoilt).has("text_encoder_3")


# --- what does not fit -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (
            lambda t: t.update({"something.else": torch.zeros(1)}),
            r"1 belong to no part of a Stable Diffusion 3 checkpoint \(something\.else\)",
        ),
        (
            lambda t: t.update({f"{X}0.x_block.extra": torch.zeros(1)}),
            r"1 unexpected \(transformer_blocks\.0\.x_block\.extra\)",
        ),
        (
            lambda t: t.pop(f"{X}1.context_block.attn.qkv.weight"),
            r"3 missing \(transformer_blocks\.1\.attn\.add_k_proj\.weight, .*add_q_proj.*, .*add_v_proj",
        ),
        (
            lambda t: t.update({f"{X}1.x_block.attn.proj.bias": torch.zeros(9)}),
            r"wrong shape \(transformer_blocks\.1\.attn\.to_out\.0\.bias is 9, due 128\)",
        ),
        (
            lambda t: t.update({f"{X}1.x_block.attn.qkv.bias": torch.zeros(100)}),
            r"x_block\.attn\.qkv\.bias has 100 rows, which are not 3 of a kind",
        ),
        (
            lambda t: t.pop("model.diffusion_model.pos_embed"),
            r"transformer: the tensor 'pos_embed\.pos_embed' is missing, so its config cannot be told",
        ),
        (
            lambda t: t.update({"model.diffusion_model.x_embedder.proj.weight": torch.zeros(9)}),
            "transformer: its tensors' shapes are not those of such a network",
        ),
        (
            lambda t: t.pop(f"{CLIP_G}text_projection.weight"),
            r"text_encoder_2: the tensor 'text_projection\.weight' is missing",
        ),
        (
            lambda t: t.update({"model.diffusion_model.x_embedder.proj.weight": torch.zeros(128, 33, 2, 2)}),
            r"an inpainting or editing model \(its transformer takes 33 channels and gives 16\)",
        ),
    ],
)  # fmt: skip
def test_single_files_load_strictly(spoilt: Path, change: Callable[[dict[str, Any]], Any], told: str) -> None:
    spoil(spoilt, change)
    with pytest.raises(CheckpointError, match=told):
        load_transformer(source(spoilt))


def test_a_file_that_was_cut_off_says_so(spoilt: Path) -> None:
    spoilt.write_bytes(spoilt.read_bytes()[:-1000])
    with pytest.raises(
        CheckpointError, match="is truncated: .* bytes are due, and .* are there; download it again"
    ):
        source(spoilt)


@pytest.mark.parametrize(
    ("component", "changed", "told"),
    [
        (
            "transformer",
            {"_class_name": "FluxTransformer2DModel"},
            "transformer is a FluxTransformer2DModel; it can",
        ),
        ("transformer", {"in_channels": 33}, "an inpainting or editing model"),
        ("vae", {"_class_name": "AutoencoderTiny"}, "vae is a AutoencoderTiny; it can be a AutoencoderKL"),
        ("text_encoder_3", {"model_type": "umt5"}, "text_encoder_3 is of the type 'umt5'; it can be 't5'"),
    ],
)
def test_networks_of_another_kind_are_named(
    broken: Path, component: str, changed: dict[str, Any], told: str
) -> None:
    spoil(broken / component / "config.json", lambda config: config.update(changed))
    with pytest.raises(CheckpointError, match=told):
        source(broken).config(component)


OURS = "a Stable Diffusion 3 checkpoint, and a Stable Diffusion 1.5 checkpoint is due here"
THEIRS = "a Stable Diffusion 1.5 checkpoint, and a Stable Diffusion 3 checkpoint is due here"


def test_the_other_family_is_named_both_ways(folder: Path, single: Path, tmp_path: Path) -> None:
    for path in (folder, single):
        with pytest.raises(CheckpointError, match=OURS):
            source(path, family="sd15")
        with pytest.raises(CheckpointError, match="a Stable Diffusion 3 checkpoint, and a Stable Cascade"):
            source(path, family="stable_cascade")
    other = sd15_folder(tmp_path / "sd15")
    for path in (other, sd15_single_file(other, tmp_path / "v1.safetensors")):
        with pytest.raises(CheckpointError, match=THEIRS):
            source(path)
    settings = Settings(home=tmp_path, offline=True)
    with pytest.raises(CheckpointError, match=f"sd3.5-large is {OURS}"):
        resolve("sd3.5-large", "sd15", settings)


@pytest.mark.parametrize(
    ("pipeline", "kind"),
    [
        ("StableDiffusion3InpaintPipeline", "a Stable Diffusion 3 inpainting model"),
        ("StableDiffusion3ControlNetPipeline", "a Stable Diffusion 3 checkpoint with a ControlNet"),
        ("FluxPipeline", "a Flux checkpoint"),
    ],
)
def test_folders_of_another_kind_are_named(broken: Path, pipeline: str, kind: str) -> None:
    spoil(broken / "model_index.json", lambda index: index.update(_class_name=pipeline))
    with pytest.raises(
        CheckpointError, match=f"broken is {kind}, and a Stable Diffusion 3 checkpoint is due"
    ):
        source(broken)


def test_a_folder_of_the_same_networks_is_taken(broken: Path) -> None:
    spoil(
        broken / "model_index.json", lambda index: index.update(_class_name="StableDiffusion3Img2ImgPipeline")
    )
    assert source(broken).has("transformer")
    (broken / "model_index.json").unlink()
    assert source(broken).has("text_encoder_3")


def test_components_alone_are_named(folder: Path, tmp_path: Path) -> None:
    for component, file, kind in (
        ("transformer", "diffusion_pytorch_model", "one component of a hub-layout checkpoint"),
        ("text_encoder", "model", "a text encoder alone"),
        ("text_encoder_3", "model", "a T5 text encoder alone"),
    ):
        with pytest.raises(CheckpointError, match=f"is {kind}"):
            source(folder / component / f"{file}.safetensors")


# --- the catalogue -----------------------------------------------------------------------------------------


def test_what_is_planned_before_a_download_is_each_checkpoints_own(tmp_path: Path) -> None:
    settings = Settings(home=tmp_path, models_dir=tmp_path / "none", offline=True)
    layers = {"sd3-medium": 24, "sd3.5-medium": 24, "sd3.5-large": 38, "sd3.5-large-turbo": 38}
    assert catalog.names("sd3") == ["demo", *layers]
    for name, count in layers.items():
        entry = catalog.entry("sd3", name)
        assert entry is not None
        for text in (name, entry.repositories[0], f"https://huggingface.co/{entry.repositories[0]}"):
            unseen = resolve(text, "sd3", settings)
            assert unseen.config("transformer")["num_layers"] == count
            config = MMDiTConfig.from_dict(unseen.config("transformer"))
            size = unseen.parameter_bytes("transformer", "bfloat16")
            assert size == round(entry.parameters["transformer"] * 1e6) * 2
            assert size == pytest.approx(2 * numel(lambda config=config: MMDiT(config)), rel=1e-5)
            assert all(map(unseen.has, (*keys.COMPONENTS, *TOKENIZERS, "scheduler")))
            assert not unseen.present(["text_encoder_3"], "bfloat16")
        assert "Gated: accept it on its page" in entry.licence
        assert entry.defaults["shift"] == 3.0
    somebodys = resolve("somebody/finetune", "sd3", settings)
    assert somebodys.config("transformer") == keys.PUBLISHED["transformer"]


def numel(build: Callable[[], nn.Module]) -> int:
    """The numbers in what a network's weight file holds."""
    with torch.device("meta"):
        return sum(tensor.numel() for tensor in build().state_dict().values())
