"""Checkpoints: where they come from, how they load, and what is said of the ones that cannot be used."""

from __future__ import annotations

import json
import pickle
import shutil
import struct
import subprocess
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from backend.errors import CheckpointError, InvalidRequest
from backend.nn.autoencoder import Autoencoder, AutoencoderConfig
from backend.sd15 import keys
from backend.sd15.unet import UNet, UNetConfig
from backend.settings import Settings
from backend.text.encoders import load_clip_text, load_tokenizer
from backend.weights.files import open_tensors, read_json, shapes
from backend.weights.folder import FolderSource, choose_weights
from backend.weights.hub import pasted_url
from backend.weights.keymap import place
from backend.weights.load import load_module
from backend.weights.remote import HubSource
from backend.weights.single import FileSource
from backend.weights.source import resolve
from tests.checkpoints import original_unet, original_vae, sd15_folder, sd15_single_file, spoil

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return sd15_folder(tmp_path_factory.mktemp("hub-layout") / "tiny")


@pytest.fixture(scope="module")
def single(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return sd15_single_file(folder, tmp_path_factory.mktemp("single") / "tiny.safetensors")


@pytest.fixture
def broken(folder: Path, tmp_path: Path) -> Path:
    """A copy of the folder, to be spoiled."""
    return Path(shutil.copytree(folder, tmp_path / "broken"))


def settings(tmp_path: Path, **values: Any) -> Settings:
    return Settings(home=tmp_path, models_dir=tmp_path / "models", offline=True, **values)


def load_unet(source: Any) -> UNet:
    config = source.config("unet")
    return load_module(
        lambda: UNet(UNetConfig.from_dict(config)), source.tensors("unet", "float32"),
        dtype=torch.float32, device=CPU, what=f"{source.name}: unet",
    )  # fmt: skip


# --- loading -----------------------------------------------------------------------------------------------


class Toy(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 8, 3)
        self.linear = nn.Linear(8, 8)
        self.counts = nn.Buffer(torch.arange(3))
        self.places = nn.Buffer(torch.arange(5), persistent=False)


@pytest.fixture
def toy(tmp_path: Path) -> Path:
    save_file(Toy().state_dict(), tmp_path / "toy.safetensors")
    return tmp_path / "toy.safetensors"


def load_toy(path: Path, dtype: torch.dtype = torch.float32, **options: Any) -> Toy:
    buffers = {"places": torch.arange(5)}
    return load_module(
        Toy, open_tensors([path]), dtype=dtype, device=CPU, what="toy", buffers=buffers, **options
    )


def test_what_fits_is_taken_from_the_mapped_file_without_a_copy(toy: Path) -> None:
    tensors = open_tensors([toy])
    module = load_module(
        Toy, tensors, dtype=torch.float32, device=CPU, what="toy", buffers={"places": torch.arange(5)}
    )
    assert module.conv.weight.data_ptr() == tensors["conv.weight"].data_ptr()
    assert torch.equal(module.linear.bias, load_file(toy)["linear.bias"])
    assert not module.training
    assert not any(parameter.requires_grad for parameter in module.parameters())
    assert module.places.tolist() == [0, 1, 2, 3, 4]  # not in any file, and not left without values
    assert module.counts.tolist() == [0, 1, 2]


def test_dtype_and_layout_are_changed_while_loading(toy: Path) -> None:
    module = load_toy(toy, torch.bfloat16, layout=torch.channels_last)
    assert {p.dtype for p in module.parameters()} == {torch.bfloat16}
    assert module.counts.dtype == torch.int64  # numbers that count are not rounded
    assert module.conv.weight.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(module.conv.weight, load_file(toy)["conv.weight"].bfloat16())


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda t: t.pop("conv.bias"), r"of 5 tensors, 1 missing \(conv\.bias\)$"),
        (lambda t: t.update(extra=torch.zeros(1)), r"1 unexpected \(extra\)$"),
        (
            lambda t: t.update({"linear.bias": torch.zeros(9)}),
            r"1 of a wrong shape \(linear\.bias is 9, due 8\)$",
        ),
        (
            lambda t: t.update({f"x{n}": torch.zeros(1) for n in range(9)}),
            r"9 unexpected \(x0, x1, x2, x3, …\)$",
        ),
    ],
)
def test_loading_is_strict_and_names_the_tensors(toy: Path, change: Any, told: str) -> None:
    spoil(toy, change)
    with pytest.raises(CheckpointError, match=told):
        load_toy(toy)


def test_a_config_that_builds_nothing_is_the_checkpoints_fault(folder: Path) -> None:
    config = {**FolderSource("tiny", "sd15", folder).config("unet"), "norm_num_groups": 7}
    with pytest.raises(CheckpointError, match="unet: no network can be built from its config"):
        load_module(
            lambda: UNet(UNetConfig.from_dict(config)), {}, dtype=torch.float32, device=CPU, what="unet"
        )


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads Linux's figures")
def test_converting_never_takes_more_than_the_weights_as_run(tmp_path: Path) -> None:
    layers, width = 48, 1024  # 201 MB in float32, 101 MB as run
    save_file({f"{n}.weight": torch.ones(width, width) for n in range(layers)}, tmp_path / "w.safetensors")
    peak, done = 0, threading.Event()

    def anonymous() -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return 1024 * int(next(line.split()[1] for line in lines if line.startswith("RssAnon")))

    def watch() -> None:
        nonlocal peak
        while not done.is_set():
            peak = max(peak, anonymous())
            time.sleep(0.001)

    def build() -> nn.Module:
        return nn.Sequential(*(nn.Linear(width, width, bias=False) for _ in range(layers)))

    load_module(nn.Identity, {}, dtype=torch.bfloat16, device=CPU, what="warm-up")
    baseline = anonymous()
    watcher = threading.Thread(target=watch)
    watcher.start()
    tensors = open_tensors([tmp_path / "w.safetensors"])
    module = load_module(
        build, tensors, dtype=torch.bfloat16, device=CPU, what="w", layout=torch.channels_last
    )
    done.set()
    watcher.join()
    assert peak - baseline <= 1.15 * sum(2 * p.numel() for p in module.parameters())


# --- files -------------------------------------------------------------------------------------------------


class Malicious:
    """A pickle of this touches a file when it is read by a reader that runs code."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return subprocess.check_call, (["touch", str(self.path)],)


def header(entries: Any, data: bytes = b"") -> bytes:
    text = json.dumps(entries).encode()
    return struct.pack("<Q", len(text)) + text + data


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (b"", "is empty"),
        (b"abc", "is not a safetensors file"),
        (b"version https://git-lfs.github.com/spec/v1\n", "pointer that git keeps"),
        (b"<!doctype html><html>", "is a web page"),
        (b"PK\x03\x04" + bytes(60), "is a zip"),
        (b"\x80\x02}q\x00." + bytes(60), "pickled checkpoint under a wrong name"),
        (struct.pack("<Q", 1000) + b'{"a":', "is truncated: its header takes 1000 bytes, and 5 are there"),
        (
            header({"a": {"dtype": "F32", "shape": [9], "data_offsets": [0, 36]}}, bytes(20)),
            "is truncated: .* due",
        ),
        (
            header({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 36]}}, bytes(36)),
            "valid safetensors",
        ),
        (header({"a": 7}), "header cannot be read"),
        (struct.pack("<Q", 8) + b"{]   }  ", "header cannot be read"),
        (header({}), "holds no tensors"),
    ],
)
def test_damaged_files_are_told_apart(tmp_path: Path, content: bytes, told: str) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=told):
        open_tensors([path])


def test_a_pickle_that_would_run_code_does_not(tmp_path: Path) -> None:
    for name, legacy in (("new.ckpt", False), ("old.bin", True)):
        torch.save(
            {"a": torch.ones(1), "b": Malicious(tmp_path / "ran")}, tmp_path / name,
            _use_new_zipfile_serialization=not legacy,
        )  # fmt: skip
        with pytest.raises(CheckpointError, match="could run somebody's code"):
            open_tensors([tmp_path / name])
    (tmp_path / "plain.pt").write_bytes(pickle.dumps(Malicious(tmp_path / "ran")))
    with pytest.raises(CheckpointError):
        open_tensors([tmp_path / "plain.pt"])
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("legacy", [False, True])
def test_pickles_of_weights_are_read(tmp_path: Path, legacy: bool) -> None:
    content = {"state_dict": {"w": torch.ones(2, 3)}, "epoch": 3}
    torch.save(content, tmp_path / "w.ckpt", _use_new_zipfile_serialization=not legacy)
    assert shapes(tmp_path / "w.ckpt") == {"w": (2, 3)}
    assert torch.equal(open_tensors([tmp_path / "w.ckpt"])["w"], torch.ones(2, 3))


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ('{"eps": NaN}', "NaN is not a number"),
        ('{"eps": 1e999}', "1e999 is not a number"),
        ('{"eps": 1,', "is not valid JSON"),
        ("[1, 2]", "must hold a JSON object, but holds a list"),
        ("[" * 100_000, "is not valid JSON"),
    ],
)
def test_broken_configs_are_refused(tmp_path: Path, text: str, told: str) -> None:
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(CheckpointError, match=told):
        read_json(tmp_path / "config.json")


# --- which file of a folder --------------------------------------------------------------------------------

PLAIN, FP16, BF16 = (f"diffusion_pytorch_model{v}.safetensors" for v in ("", ".fp16", ".bf16"))
INDEX = "model.safetensors.index.json"


@pytest.mark.parametrize(
    ("names", "dtype", "chosen"),
    [
        ([PLAIN, FP16, BF16], "float16", FP16),
        ([PLAIN, FP16, BF16], "bfloat16", BF16),
        ([PLAIN, FP16, BF16], "float32", PLAIN),
        ([PLAIN, FP16], "bfloat16", PLAIN),
        ([FP16], "float32", FP16),
        ([FP16, "diffusion_pytorch_model.bin"], "float32", FP16),
        (["diffusion_pytorch_model.non_ema.safetensors", PLAIN], "float16", PLAIN),
        (["pytorch_model.bin", "model.safetensors"], "float32", "model.safetensors"),
        (["pytorch_model.fp16.bin", "pytorch_model.bin"], "float16", "pytorch_model.fp16.bin"),
        (["model-00001-of-00002.safetensors", INDEX], "float32", INDEX),
        ([INDEX, "model.safetensors.index.fp16.json"], "float16", "model.safetensors.index.fp16.json"),
        (["flax_model.msgpack", "pytorch_model.fp16.bin"], "float32", "pytorch_model.fp16.bin"),
        (["config.json", "flax_model.msgpack"], "float16", "flax_model.msgpack"),
        (["model.fp16-00001-of-00002.safetensors", "config.json", "model.onnx"], "float16", None),
    ],
)  # fmt: skip
def test_the_weights_that_match_the_run_are_chosen(names: list[str], dtype: str, chosen: str | None) -> None:
    assert choose_weights(names, dtype) == choose_weights(names[::-1], dtype) == chosen


def test_variant_files_are_read_when_they_match(broken: Path) -> None:
    half = {name: tensor.half() for name, tensor in load_file(broken / "unet" / PLAIN).items()}
    save_file(half, broken / "unet" / FP16)
    source = FolderSource("tiny", "sd15", broken)
    assert source.tensors("unet", "float16")["conv_in.weight"].dtype == torch.float16
    assert source.tensors("unet", "float32")["conv_in.weight"].dtype == torch.float32
    assert source.fingerprint("unet", "float16") != source.fingerprint("unet", "float32")
    assert source.parameter_bytes("unet", "float16") * 2 == source.parameter_bytes("unet", "float32")


def shard(folder: Path) -> Path:
    """Split the UNet's weights in two, as large checkpoints are → the index."""
    tensors = load_file(folder / "unet" / PLAIN)
    (folder / "unet" / PLAIN).unlink()
    names = sorted(tensors)
    weight_map = {}
    for number, part in enumerate((names[::2], names[1::2]), start=1):
        file = f"diffusion_pytorch_model-0000{number}-of-00002.safetensors"
        save_file({name: tensors[name] for name in part}, folder / "unet" / file)
        weight_map |= dict.fromkeys(part, file)
    index = folder / "unet" / f"{PLAIN}.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return index


def test_shards_are_one(folder: Path, broken: Path) -> None:
    shard(broken)
    whole, parts = FolderSource("a", "sd15", folder), FolderSource("b", "sd15", broken)
    assert parts.shapes("unet", "float32") == whole.shapes("unet", "float32")
    load_unet(parts)


ELSEWHERE = "can name weight files beside it only"


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda i: i["weight_map"].update(x="../../../etc/passwd.safetensors"), ELSEWHERE),
        (lambda i: i["weight_map"].update(x="/etc/hosts.safetensors"), ELSEWHERE),
        (lambda i: i["weight_map"].update(x="config.json"), ELSEWHERE),
        (lambda i: i["weight_map"].update(x="diffusion_pytorch_model-3.safetensors"), "which is not there"),
        (lambda i: i.update(weight_map={}), "lists no files"),
        (lambda i: i.update(weight_map=[1]), "lists no files"),
    ],
)  # fmt: skip
def test_a_shard_index_leads_nowhere_else(broken: Path, change: Any, told: str) -> None:
    spoil(shard(broken), change)
    with pytest.raises(CheckpointError, match=told):
        FolderSource("tiny", "sd15", broken).tensors("unet", "float32")


# --- names -------------------------------------------------------------------------------------------------


def test_known_answers_of_the_key_table() -> None:
    """Names of the published v1-5 file, read off its networks' definition."""
    unet, vae = full_size()
    original = {
        **original_unet(unet, keys.PUBLISHED["unet"]),
        **original_vae(vae, keys.PUBLISHED["vae"]),
    }
    ours = keys.parts({name: tuple(tensor.shape) for name, tensor in original.items()})
    known = {
        "unet": {
            "input_blocks.4.0.in_layers.0.weight": "down_blocks.1.resnets.0.norm1.weight",
            "input_blocks.3.0.op.weight": "down_blocks.0.downsamplers.0.conv.weight",
            "input_blocks.11.0.out_layers.3.bias": "down_blocks.3.resnets.1.conv2.bias",
            "output_blocks.2.1.conv.weight": "up_blocks.0.upsamplers.0.conv.weight",
            "output_blocks.5.2.conv.weight": "up_blocks.1.upsamplers.0.conv.weight",
            "output_blocks.11.1.proj_in.weight": "up_blocks.3.attentions.2.proj_in.weight",
            "middle_block.2.emb_layers.1.bias": "mid_block.resnets.1.time_emb_proj.bias",
        },
        "vae": {
            "decoder.up.3.block.0.norm1.weight": "decoder.up_blocks.0.resnets.0.norm1.weight",
            "decoder.up.1.block.0.nin_shortcut.weight": "decoder.up_blocks.2.resnets.0.conv_shortcut.weight",
            "encoder.down.0.downsample.conv.bias": "encoder.down_blocks.0.downsamplers.0.conv.bias",
            "encoder.mid.attn_1.proj_out.weight": "encoder.mid_block.attentions.0.to_out.0.weight",
            "post_quant_conv.weight": "post_quant_conv.weight",
        },
    }
    prefix = {"unet": "model.diffusion_model.", "vae": "first_stage_model."}
    for component, pairs in known.items():
        back = {origin.name: name for name, origin in ours[component].items()}
        assert {name: back[prefix[component] + name] for name in pairs} == pairs


def full_size() -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    with torch.device("meta"):
        unet = UNet(UNetConfig.from_dict(keys.PUBLISHED["unet"]))
        vae = Autoencoder(AutoencoderConfig.from_dict(keys.PUBLISHED["vae"]))
    return unet.state_dict(), vae.state_dict()


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"layers_per_block": 1},
        {"use_linear_projection": True, "cross_attention_dim": 1024, "attention_head_dim": [5, 10, 20, 20]},
        {
            "block_out_channels": [64, 128, 128],
            "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
            "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
        },
    ],
)
def test_the_config_is_told_from_the_shapes(changes: dict[str, Any]) -> None:
    config = {**keys.PUBLISHED["unet"], **changes}
    with torch.device("meta"):
        unet = UNet(UNetConfig.from_dict(config))
    original = {
        name: tuple(tensor.shape) for name, tensor in original_unet(unet.state_dict(), config).items()
    }
    told = keys.config("unet", {n: o.shape for n, o in keys.parts(original)["unet"].items()}, None)
    assert UNetConfig.from_dict(told) == unet.config


def test_the_longest_row_of_a_table_wins_and_none_drops() -> None:
    table = {"a.": "x.", "a.b.": "y.", "a.c.": None}
    assert [place(name, table) for name in ("a.1", "a.b.1", "a.c.1")] == ["x.1", "y.1", None]
    with pytest.raises(KeyError):
        place("b.1", table)


# --- single files ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", [".safetensors", ".ckpt"])
def test_a_single_file_equals_the_folder_it_was_made_from(folder: Path, tmp_path: Path, suffix: str) -> None:
    path = sd15_single_file(folder, tmp_path / f"tiny{suffix}")
    one = resolve(str(path), "sd15", settings(tmp_path), config_from=str(folder))
    many = resolve(str(folder), "sd15", settings(tmp_path))
    for component in keys.COMPONENTS:
        ours, theirs = (
            {
                name.removeprefix("text_model."): tensor
                for name, tensor in source.tensors(component, "float32").items()
            }
            for source in (one, many)
        )
        ours.pop("embeddings.position_ids", None)
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
        known = many.config(component)
        assert {k: v for k, v in one.config(component).items() if known.get(k, v) != v} == {}
    assert one.config("scheduler") == many.config("scheduler")
    assert one.tokenizer() == many.tokenizer()
    assert list(one.fetch(keys.COMPONENTS, "float32")) == []


def test_a_file_in_half_precision_alone_loads(folder: Path, tmp_path: Path) -> None:
    path = sd15_single_file(folder, tmp_path / "half.safetensors", dtype=torch.float16)
    unet = load_unet(resolve(str(path), "sd15", settings(tmp_path)))
    assert unet.conv_in.weight.dtype == torch.float32


def test_without_any_config_the_published_values_hold(single: Path, tmp_path: Path) -> None:
    source = resolve(str(single), "sd15", settings(tmp_path))
    assert source.config("scheduler")["_class_name"] == "PNDMScheduler"
    assert source.config("unet")["attention_head_dim"] == 8
    assert source.config("vae")["scaling_factor"] == 0.18215
    with pytest.raises(
        CheckpointError, match=r"holds no tokenizer.*set config_from to a folder with a tokenizer/"
    ):
        load_tokenizer(source)
    with pytest.raises(CheckpointError, match="holds no tokenizer"):
        list(source.fetch(["text_encoder"], "float32"))


def test_networks_that_a_file_lacks_come_from_config_from(folder: Path, single: Path, tmp_path: Path) -> None:
    unet = {
        name: tensor
        for name, tensor in load_file(single).items()
        if name.startswith("model.diffusion_model.")
    }
    save_file(unet, tmp_path / "unet.safetensors")
    alone = resolve(str(tmp_path / "unet.safetensors"), "sd15", settings(tmp_path))
    with pytest.raises(CheckpointError, match="holds no vae, text_encoder; set config_from"):
        alone.tensors("vae", "float32")
    source = resolve(str(tmp_path / "unet.safetensors"), "sd15", settings(tmp_path), config_from=str(folder))
    assert "decoder.conv_in.weight" in source.tensors("vae", "float32")
    assert source.fingerprint("vae", "float32") == FolderSource("tiny", "sd15", folder).fingerprint(
        "vae", "float32"
    )


def test_config_from_is_no_single_file(single: Path, tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest, match="config_from is .*; it can be a folder or a hub repository"):
        resolve(str(single), "sd15", settings(tmp_path), config_from=str(single))


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (
            lambda t: t.update({"something.else": torch.zeros(1)}),
            r"1 belong to no part .* \(something\.else\)",
        ),
        (lambda t: t.update({"model.diffusion_model.extra": torch.zeros(1)}), r"unexpected \(extra\)"),
        (
            lambda t: t.pop("model.diffusion_model.input_blocks.1.0.in_layers.2.weight"),
            "is missing, so its config",
        ),
        (
            lambda t: t.pop("model.diffusion_model.middle_block.0.in_layers.2.bias"),
            r"missing \(mid_block\.resnets\.0",
        ),
        (
            lambda t: t.update({"model.diffusion_model.out.2.bias": torch.zeros(9)}),
            r"wrong shape \(conv_out.bias is 9, due 4\)",
        ),
    ],
)
def test_single_files_load_strictly(single: Path, tmp_path: Path, change: Any, told: str) -> None:
    path = Path(shutil.copy(single, tmp_path / "spoilt.safetensors"))
    spoil(path, change)
    with pytest.raises(CheckpointError, match=told):
        load_unet(resolve(str(path), "sd15", settings(tmp_path)))


# --- other kinds -------------------------------------------------------------------------------------------

OTHERS = {
    "a Stable Diffusion XL checkpoint": "conditioner.embedders.0.transformer.final_layer_norm.weight",
    "a Stable Diffusion 3 checkpoint": "model.diffusion_model.joint_blocks.0.x_block.attn.qkv.weight",
    "a Stable Cascade checkpoint": "clip_txt_mapper.weight",
    "a Flux checkpoint": "double_blocks.0.img_attn.qkv.weight",
    "a LoRA": "lora_unet_down_blocks_0_attentions_0_proj_in.lora_down.weight",
    "a ControlNet": "control_model.input_blocks.0.0.weight",
    "a textual inversion": "emb_params",
    "a VAE alone": "first_stage_model.decoder.conv_in.weight",
    "one component of a hub-layout checkpoint": "down_blocks.0.resnets.0.conv1.weight",
    "a file of an unknown kind": "something",
}  # fmt: skip


@pytest.mark.parametrize("kind", OTHERS)
def test_single_files_of_another_kind_are_named(tmp_path: Path, kind: str) -> None:
    save_file({OTHERS[kind]: torch.zeros(2, 2)}, tmp_path / "other.safetensors")
    with pytest.raises(
        CheckpointError, match=f"other.safetensors is {kind}.*a Stable Diffusion 1.5 checkpoint is due"
    ):
        resolve(str(tmp_path / "other.safetensors"), "sd15", settings(tmp_path))


@pytest.mark.parametrize(
    ("pipeline", "kind"),
    [
        ("StableDiffusionXLPipeline", "a Stable Diffusion XL checkpoint"),
        ("StableDiffusion3Pipeline", "a Stable Diffusion 3 checkpoint"),
        ("StableCascadePriorPipeline", "a Stable Cascade checkpoint"),
        ("FluxPipeline", "a Flux checkpoint"),
        ("StableDiffusionInpaintPipeline", "a Stable Diffusion inpainting model"),
        ("StableDiffusionInstructPix2PixPipeline", "a Stable Diffusion editing model"),
    ],
)
def test_folders_of_another_kind_are_named(broken: Path, tmp_path: Path, pipeline: str, kind: str) -> None:
    spoil(broken / "model_index.json", lambda index: index.update(_class_name=pipeline))
    with pytest.raises(CheckpointError, match=kind):
        resolve(str(broken), "sd15", settings(tmp_path))


@pytest.mark.parametrize(("channels", "kind"), [(9, "an inpainting model"), (8, "an editing model")])
def test_unets_that_want_a_picture_are_refused_by_name(
    broken: Path, single: Path, tmp_path: Path, channels: int, kind: str
) -> None:
    spoil(broken / "unet/config.json", lambda config: config.update(in_channels=channels))
    with pytest.raises(CheckpointError, match=kind):
        resolve(str(broken), "sd15", settings(tmp_path)).config("unet")
    path = Path(shutil.copy(single, tmp_path / "spoilt.safetensors"))
    first = "model.diffusion_model.input_blocks.0.0.weight"
    spoil(path, lambda tensors: tensors.update({first: torch.zeros(32, channels, 3, 3)}))
    with pytest.raises(CheckpointError, match=kind):
        resolve(str(path), "sd15", settings(tmp_path))


# --- what a name means -------------------------------------------------------------------------------------


def test_names_are_resolved(folder: Path, single: Path, tmp_path: Path) -> None:
    models = tmp_path / "models"
    shutil.copytree(folder, models / "mine")
    shutil.copy(single, models / "mine.safetensors")
    for text, kind in (
        ("mine", FolderSource),
        ("mine.safetensors", FileSource),
        (str(folder), FolderSource),
        (str(single), FileSource),
        (" sd15 ", HubSource),
        ("somebody/some-model.v2", HubSource),
        ("https://huggingface.co/somebody/some-model/blob/main/a.safetensors", HubSource),
    ):
        assert type(resolve(text, "sd15", settings(tmp_path))) is kind


@pytest.mark.parametrize(
    ("url", "meaning"),
    [
        ("https://huggingface.co/o/n", ("o/n", "main", None)),
        ("https://hf.co/o/n/", ("o/n", "main", None)),
        ("https://huggingface.co/o/n/tree/refs%2Fpr%2F1", ("o/n", "refs/pr/1", None)),
        ("https://huggingface.co/o/n/blob/main/a.safetensors", ("o/n", "main", "a.safetensors")),
        ("http://huggingface.co/o/n/resolve/v2/d/a%20b.ckpt?download=true", ("o/n", "v2", "d/a b.ckpt")),
        ("https://huggingface.co/o/n/blob/main/model_index.json", ("o/n", "main", None)),
        ("o/n", None),
    ],
)
def test_pasted_urls(url: str, meaning: tuple[str, str, str | None] | None) -> None:
    assert pasted_url(url) == meaning


@pytest.mark.parametrize(
    "url",
    [
        "https://example.com/o/n",
        "https://huggingface.co.evil.com/o/n",
        "https://huggingface.co/o",
        "https://huggingface.co/datasets/o/n",
        "https://huggingface.co/o/n/resolve/main/../../x/y/z",
        "https://huggingface.co/o/n/resolve/main/%2e%2e/%2e%2e/x",
        "https://huggingface.co/o/n/tree/..%2f..%2fx",
        "https://user@example.com\\@huggingface.co/o/n",
        "http://[broken/o/n",
    ],
)
def test_other_urls_are_refused(url: str) -> None:
    with pytest.raises(InvalidRequest, match="a URL can be that of a hub repository"):
        pasted_url(url)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("no-such-thing", "there is no such file or folder; it can be demo, sd15, a hub repository"),
        ("./nowhere/tiny.safetensors", "there is no such file or folder"),
        ("nowhere/tiny.safetensors", "there is no such file or folder"),
        ("x" * 5000, "checkpoint is 'xxx"),
        ("zero\0byte", "checkpoint is 'zero"),
    ],
)
def test_what_is_not_there_is_named(tmp_path: Path, text: str, told: str) -> None:
    with pytest.raises(CheckpointError, match=told):
        resolve(text, "sd15", settings(tmp_path))


def test_paths_that_hold_no_checkpoint_say_so(
    folder: Path, broken: Path, single: Path, tmp_path: Path
) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "notes.txt").write_text("hello")
    files = tmp_path / "files"
    files.mkdir()
    shutil.copy(single, files / "a.safetensors")
    (broken / "unet" / PLAIN).unlink()
    for path, told in (
        (tmp_path / "empty", r"no checkpoint in hub layout: it has no model_index\.json$"),
        (tmp_path / "notes.txt", "a single file ends in .safetensors"),
        (files, r"but name one of its single files: a\.safetensors"),
    ):
        with pytest.raises(CheckpointError, match=told):
            resolve(str(path), "sd15", settings(tmp_path))
    source = resolve(str(broken), "sd15", settings(tmp_path))
    with pytest.raises(CheckpointError, match=r"has no weights for unet: .* holds no \.safetensors file"):
        source.tensors("unet", "float32")
    assert not source.present(["unet"], "float32")
    shutil.rmtree(broken / "tokenizer")
    with pytest.raises(CheckpointError, match="has no tokenizer"):
        load_tokenizer(source)


def test_sources_say_what_they_have(folder: Path, single: Path, tmp_path: Path) -> None:
    for text in (str(folder), str(single), "sd15", "somebody/some-model"):
        source = resolve(text, "sd15", settings(tmp_path), config_from=str(folder))
        assert all(map(source.has, (*keys.COMPONENTS, "tokenizer", "scheduler")))
        assert not source.has("image_encoder")


def test_an_unknown_family_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest, match="family is 'sd9'; it can be sd15"):
        resolve("demo", "sd9", settings(tmp_path))


def test_the_index_cannot_lead_elsewhere(broken: Path, tmp_path: Path) -> None:
    """Its entries name libraries and classes; none is used as a path or imported."""
    spoil(
        broken / "model_index.json",
        lambda index: index.update({"../../unet": ["os", "system"], "vae": ["os", "x"]}),
    )
    load_unet(resolve(str(broken), "sd15", settings(tmp_path)))


def test_fingerprints_follow_the_files(broken: Path) -> None:
    source = FolderSource("tiny", "sd15", broken)
    before = {name: source.fingerprint(name, "float32") for name in (*keys.COMPONENTS, "scheduler")}
    assert before == {name: source.fingerprint(name, "float32") for name in before}
    spoil(broken / "tokenizer/tokenizer_config.json", lambda config: config.update(extra=1))
    spoil(broken / "unet/config.json", lambda config: config.update(extra=1))
    changed = {name for name, old in before.items() if source.fingerprint(name, "float32") != old}
    assert changed == {"unet", "text_encoder"}  # the tokens are part of what an encoder makes


def test_extras_are_those_of_triptych_json(broken: Path) -> None:
    assert FolderSource("tiny", "sd15", broken).extras() == {}
    (broken / "triptych.json").write_text('{"defaults": {"steps": 20}}')
    assert FolderSource("tiny", "sd15", broken).extras() == {"defaults": {"steps": 20}}


# --- text --------------------------------------------------------------------------------------------------


def test_the_text_encoder_reads_old_and_new_names(folder: Path, broken: Path) -> None:
    def add_prefix(tensors: dict[str, Any]) -> None:
        for name in list(tensors):
            tensors["text_model." + name.removeprefix("text_model.")] = tensors.pop(name)
        tensors["text_model.embeddings.position_ids"] = torch.arange(77)[None]

    spoil(broken / "text_encoder/model.safetensors", add_prefix)
    old, new = (
        load_clip_text(FolderSource("tiny", "sd15", path), "text_encoder", torch.float32, CPU)
        for path in (broken, folder)
    )
    ids = torch.tensor([load_tokenizer(FolderSource("tiny", "sd15", folder))("a red house").input_ids])
    assert torch.equal(old(ids).last_hidden_state, new(ids).last_hidden_state)


def test_a_damaged_tokenizer_is_the_checkpoints_fault(broken: Path) -> None:
    for file in ("vocab.json", "tokenizer.json"):
        (broken / "tokenizer" / file).write_text("{")
    with pytest.raises(CheckpointError, match="the tokenizer in .* cannot be read"):
        load_tokenizer(FolderSource("tiny", "sd15", broken))


def test_a_text_config_of_wrong_kinds_is_the_checkpoints_fault(broken: Path) -> None:
    spoil(broken / "text_encoder/config.json", lambda config: config.update(hidden_size="wide"))
    with pytest.raises(CheckpointError, match="text_encoder: no network can be built"):
        load_clip_text(FolderSource("tiny", "sd15", broken), "text_encoder", torch.float32, CPU)
