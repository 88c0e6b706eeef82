"""Flax's weight files: what is read from them, what is said of damaged ones, and the same picture as from
the checkpoint's own files."""

from __future__ import annotations

import json
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from backend import SD15Request, Settings, Studio
from backend.errors import CheckpointError
from backend.memory.placement import Streamer, homes_of
from backend.nn.autoencoder import Autoencoder, AutoencoderConfig
from backend.sd15.defaults import defaults
from backend.weights import local
from backend.weights.files import open_tensors, precision, shapes
from backend.weights.folder import FolderSource
from backend.weights.load import load_module
from backend.weights.parts import Parts
from backend.weights.source import resolve
from tests.checkpoints import sd15_folder, spoil
from tests.flax_files import FILES, extension, flax_folder, packed

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return sd15_folder(tmp_path_factory.mktemp("hub-layout") / "tiny")


@pytest.fixture(scope="module")
def flaxen(folder: Path) -> Path:
    return flax_folder(folder, folder.parent / "flax")


def written(tmp_path: Path, content: bytes) -> Path:
    path = tmp_path / "flax_model.msgpack"
    path.write_bytes(content)
    return path


# ---- the format

ARRAYS: dict[str, Tensor] = {
    "float32": torch.randn(3, 4, 5),
    "float16": torch.randn(300).half(),
    "bfloat16": torch.randn(7, 2).bfloat16(),
    "float64": torch.randn(2, 2).double(),
    "int32": torch.arange(17_000, dtype=torch.int32),
    "int8": torch.arange(9, dtype=torch.int8),
    "bool": torch.tensor([True, False]),
    "number": torch.tensor(2.5),
    "nothing": torch.zeros(0, 3),
}
OTHERS = {"step": 3, "rate": 0.5, "below": -5, "name": "x" * 300, "none": None, "sure": True, "raw": b"abc"}


@pytest.mark.parametrize("chunk", [2**30, 100])
def test_arrays_of_every_kind_are_read(tmp_path: Path, chunk: int) -> None:
    tree = {"params": {"a": ARRAYS, "others": OTHERS}, "b": {"0": {"kernel": ARRAYS["float32"]}}}
    path = written(tmp_path, packed(tree, chunk))
    expected = {
        **{f"params.a.{name}": each for name, each in ARRAYS.items()},
        "b.0.kernel": ARRAYS["float32"],
    }
    tensors = open_tensors([path])
    assert tensors.keys() == expected.keys()
    for name, tensor in expected.items():
        assert tensors[name].dtype == tensor.dtype, name
        assert torch.equal(tensors[name], tensor), name
    assert shapes(path) == {name: tuple(tensor.shape) for name, tensor in expected.items()}
    assert precision(path) == "int32"
    assert precision(path, {"params.a.bfloat16"}) == "bfloat16"


def test_a_tensor_is_a_view_of_the_mapped_file(tmp_path: Path) -> None:
    tensors = open_tensors([written(tmp_path, packed({"a": torch.ones(1000), "b": torch.zeros(1000)}))])
    assert tensors["a"].data_ptr() == tensors["a"].data_ptr()
    assert 0 < tensors["b"].data_ptr() - tensors["a"].data_ptr() - 4000 < 50


def test_shards_are_one_and_hold_nothing_twice(tmp_path: Path) -> None:
    paths = [tmp_path / f"flax_model-0000{number}-of-00002.msgpack" for number in (1, 2)]
    paths[0].write_bytes(packed({"a": {"x": torch.ones(2)}}))
    paths[1].write_bytes(packed({"a": {"y": torch.zeros(2)}}))
    assert set(open_tensors(paths)) == {"a.x", "a.y"}
    with pytest.raises(CheckpointError, match=r"repeats the tensor a\.x of another part"):
        open_tensors([paths[0], paths[0]])


def array(shape: Any, dtype: Any, numbers: Any) -> bytes:
    return extension(1, packed([shape, dtype, numbers]))


def named(value: bytes, key: bytes = packed("a")) -> bytes:
    return b"\x81" + key + value


WHOLE = packed({"a": {"b": torch.ones(9)}})
FOREIGN = "is not a valid Flax file: at byte {} begins what is no part of weights"
UNFIT = "the numbers of a do not fit its shape"
DAMAGED: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "is empty"),
    "pointer": (b"version https://git-lfs.github.com/spec/v1\n", "is not a Flax file: it is the pointer"),
    "page": (b"<!doctype html><html>", "is not a Flax file: it is a web page"),
    "zip": (b"PK\x03\x04" + bytes(60), "is not a Flax file: it is a zip"),
    "a list": (packed([1, 2]), "is not a Flax file$"),
    "no arrays": (packed({"a": {"b": 1}, "c": {}}), "holds no tensors"),
    "cut": (WHOLE[:-1], f"is truncated: at least {len(WHOLE)} bytes are due, and {len(WHOLE) - 1} are there"),
    "cut early": (WHOLE[:3], "is truncated: at least 4 bytes are due, and 3 are there; download it again"),
    "too long": (WHOLE + b"\0", f"its last array ends at byte {len(WHOLE)} of {len(WHOLE) + 1}"),
    "too deep": (b"\x81\xa1a" * 40, "its maps are nested deeper than 32"),
    "too many": (b"\xdf\xff\xff\xff\xff", "it holds more than 20000 values"),
    "too large": (named(b"\xc9\xff\xff\xff\xff\x01"), "is truncated: at least 4294967304 bytes are due"),
    "a number for a key": (named(WHOLE, b"\x01"), FOREIGN.format(1)),
    "a long key": (named(WHOLE, packed("a" * 300)), FOREIGN.format(1)),
    "a key of noise": (named(WHOLE, b"\xa1\xff"), FOREIGN.format(2)),
    "a list inside": (named(packed([1])), FOREIGN.format(3)),
    "no value": (named(b"\xc1"), FOREIGN.format(3)),
    "a complex number": (named(extension(2, packed([0.5, 0.5]))), FOREIGN.format(3)),
    "no list": (named(extension(1, packed({"shape": 1}))), FOREIGN.format(3)),
    "too short a list": (named(extension(1, packed([[1], "int8"]))), FOREIGN.format(3)),
    "no shape": (named(array(1, "int8", b"x")), FOREIGN.format(3)),
    "a shape of words": (named(array(["x"], "int8", b"x")), FOREIGN.format(3)),
    "a shape below 0": (named(array([-1], "int8", b"x")), FOREIGN.format(3)),
    "too many sides": (named(array([1] * 9, "int8", b"x")), FOREIGN.format(3)),
    "no dtype": (named(array([1], 8, b"x")), FOREIGN.format(3)),
    "no numbers": (named(array([1], "int8", 5)), FOREIGN.format(3)),
    "another dtype": (named(array([1], "complex64", bytes(8))), "a is of complex64, which cannot be read"),
    "too few numbers": (named(array([3], "float32", bytes(8))), UNFIT),
    "an endless side": (named(array([0, 2**31], "float32", b"")), UNFIT),
    "more in the extension": (named(extension(1, packed([[1], "int8", b"x"]) + b"more")), UNFIT),
    "numbers beyond the extension": (
        named(extension(1, b"\x93" + packed([200]) + packed("int8") + b"\xc4\xc8")) + bytes(300),
        FOREIGN.format(17),
    ),
    "a gap in the chunks": (
        packed({"a": {"__msgpack_chunked_array__": True, "shape": {"0": 2}, "chunks": {"1": torch.ones(2)}}}),
        UNFIT,
    ),
    "chunks of a kind each": (
        packed({"a": {"__msgpack_chunked_array__": True, "shape": {"0": 2},
                      "chunks": {"0": torch.ones(1), "1": torch.ones(2).half()}}}),
        UNFIT,
    ),
    "chunks without a shape": (packed({"a": {"__msgpack_chunked_array__": True, "chunks": 3}}), UNFIT),
    "one name twice": (packed({"a": {"b": torch.ones(1)}, "a.b": torch.ones(1)}), r"it holds a\.b twice"),
    "one key twice": (b"\x82" + 2 * (packed("a") + packed(torch.ones(1))), "it holds a twice"),
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGED)
def test_damaged_files_are_told_apart(tmp_path: Path, damage: str) -> None:
    content, told = DAMAGED[damage]
    with pytest.raises(CheckpointError, match=told):
        open_tensors([written(tmp_path, content)])


def test_no_cut_of_a_file_is_taken_for_a_whole(tmp_path: Path) -> None:
    content = packed({"a": {"b": torch.ones(2)}, "c": torch.ones(3).half()})
    for size in range(1, len(content)):
        with pytest.raises(CheckpointError, match="is truncated"):
            open_tensors([written(tmp_path, content[:size])])


# ---- loading


class Toy(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(3) for _ in range(8))
        self.linear = nn.Linear(5, 3)
        self.conv = nn.Conv2d(4, 8, 3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_what_runs_lies_in_order_and_at_even_addresses(tmp_path: Path, dtype: torch.dtype) -> None:
    weights = {name: tensor.to(dtype) for name, tensor in Toy().state_dict().items()}
    there, here = {2: (1, 0), 4: (2, 3, 1, 0)}, {2: (1, 0), 4: (3, 2, 0, 1)}
    turned = {name: each.permute(there.get(each.ndim, (0,))) for name, each in weights.items()}
    mapped = open_tensors([written(tmp_path, packed(turned))])
    tensors = {name: each.permute(here.get(each.ndim, (0,))) for name, each in mapped.items()}
    assert any(tensor.data_ptr() % tensor.itemsize for tensor in tensors.values())
    module = load_module(Toy, tensors, dtype=dtype, device=CPU, what="toy")
    for name, tensor in module.state_dict().items():
        assert torch.equal(tensor, weights[name]), name
        assert tensor.is_contiguous(), name
        assert tensor.data_ptr() % tensor.itemsize == 0, name


def vae(source: Any) -> Any:
    config = AutoencoderConfig.from_dict(source.config("vae"))
    return Parts(source=source, device=CPU).network("vae", torch.float32, lambda: Autoencoder(config))


def test_all_of_it_is_counted_as_copied(folder: Path, flaxen: Path) -> None:
    own, theirs = (vae(FolderSource("tiny", "sd15", path)) for path in (folder, flaxen))
    assert own.copied_bytes == 0
    assert theirs.copied_bytes == theirs.bytes == own.bytes


@torch.no_grad()
def test_it_is_streamed_from_the_file(folder: Path, flaxen: Path) -> None:
    own, theirs = (vae(FolderSource("tiny", "sd15", path)) for path in (folder, flaxen))
    assert theirs.open is not None
    latents = torch.randn(1, 4, 2, 2)
    opened = theirs.open()
    with Streamer(opened, homes_of(opened), CPU, 0, 2):
        streamed = opened.decode(latents)
    assert torch.equal(streamed, own.load("cpu").decode(latents))


def test_the_picture_is_that_of_the_checkpoints_own_files(folder: Path, flaxen: Path, tmp_path: Path) -> None:
    studio = Studio(Settings(device="cpu", dtype="float32", home=tmp_path))
    fields: dict[str, Any] = {"prompt": "a red house", "seed": 7, "steps": 1, "width": 64, "height": 64}
    own, theirs = (
        studio.run(SD15Request(checkpoint=str(path), **fields)).images[0].tobytes()
        for path in (folder, flaxen)
    )
    assert own == theirs
    assert len(set(own)) > 50


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_files_of_16_bits_hold_the_same_weights(folder: Path, tmp_path: Path, dtype: str) -> None:
    half = FolderSource("half", "sd15", flax_folder(folder, tmp_path / "half", dtype=getattr(torch, dtype)))
    for component in FILES:
        own = FolderSource("tiny", "sd15", folder).tensors(component, dtype)
        theirs = half.tensors(component, dtype)
        assert half.precision(component, dtype) == dtype
        names = {name: theirs[f"text_model.{name}" if component == "text_encoder" else name] for name in own}
        assert len(names) == len(theirs)
        for name, tensor in names.items():
            assert torch.equal(tensor, own[name].to(tensor.dtype)), name


def test_the_settings_of_flaxs_pipelines_are_understood(flaxen: Path, tmp_path: Path) -> None:
    path = Path(shutil.copytree(flaxen, tmp_path / "flax"))
    for file in (
        "model_index.json",
        "unet/config.json",
        "vae/config.json",
        "scheduler/scheduler_config.json",
    ):
        spoil(path / file, lambda config: config.update(_class_name=f"Flax{config['_class_name']}"))
    spoil(path / "scheduler/scheduler_config.json", lambda c: c.update(_class_name="FlaxDDIMScheduler"))
    assert defaults(resolve(str(path), "sd15", Settings(home=tmp_path)))["sampler"] == "ddim"
    with pytest.raises(CheckpointError, match="flax is a Stable Diffusion 1.5 checkpoint"):
        resolve(str(path), "sd3", Settings(home=tmp_path))


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (
            lambda content: content.replace(b"conv_norm_out", b"conv_form_out"),
            r"4 missing \(decoder\.conv_norm_out\.bias, ",
        ),
        (lambda content: content[:-1], r"vae/diffusion_flax_model\.msgpack is truncated"),
    ],
)
def test_loading_is_strict(flaxen: Path, tmp_path: Path, change: Callable[[bytes], bytes], told: str) -> None:
    path = Path(shutil.copytree(flaxen, tmp_path / "flax"))
    file = path / "vae" / FILES["vae"]
    file.write_bytes(change(file.read_bytes()))
    with pytest.raises(CheckpointError, match=told):
        vae(FolderSource("flax", "sd15", path)).load("cpu")


# ---- which file, and whose


def test_a_checkpoints_own_files_come_first(folder: Path, flaxen: Path, tmp_path: Path) -> None:
    both = Path(shutil.copytree(folder, tmp_path / "both"))
    for component, file in FILES.items():
        shutil.copy(flaxen / component / file, both / component)
    source = FolderSource("both", "sd15", both)
    assert {source.files(name, "float32")[1].suffix for name in FILES} == {".safetensors"}
    next((both / "unet").glob("*.safetensors")).unlink()
    assert source.files("unet", "float32")[1].name == FILES["unet"]


@pytest.mark.parametrize(
    ("family", "pipeline", "component"),
    [
        ("sd3", "StableDiffusion3Pipeline", "transformer"),
        ("stable_cascade", "StableCascadePriorPipeline", "prior"),
    ],
)
def test_other_families_say_that_they_have_none(
    tmp_path: Path, family: str, pipeline: str, component: str
) -> None:
    (tmp_path / component).mkdir()
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": pipeline}))
    (tmp_path / component / "config.json").write_text("{}")
    (tmp_path / component / FILES["unet"]).write_bytes(WHOLE)
    source = FolderSource("mine", family, tmp_path)
    with pytest.raises(
        CheckpointError,
        match=rf"mine has the weights for {component} in Flax's form only \(diffusion_flax_model\.msgpack\)",
    ):
        source.shapes(component, "float32")
    assert not source.present([component], "float32")


def test_folders_are_listed_and_a_file_alone_says_what_it_is(flaxen: Path, tmp_path: Path) -> None:
    models = tmp_path / "models"
    shutil.copytree(flaxen, models / "mine")
    shutil.copy(flaxen / "unet" / FILES["unet"], models / "unet.msgpack")
    shutil.copy(flaxen / "text_encoder" / FILES["text_encoder"], models / "text.msgpack")
    (models / "cut.msgpack").write_bytes((models / "unet.msgpack").read_bytes()[:-9])
    settings = Settings(models_dir=models, home=tmp_path)
    found = {each.name: each for each in local.found(settings).entries}
    assert found["mine"].family == "sd15"
    assert not found["mine"].problem
    part = "one component of a hub-layout checkpoint (give its folder or repository)"
    assert [(found[name].family, found[name].what) for name in ("unet.msgpack", "text.msgpack")] == [
        (None, part), (None, "a text encoder alone"),
    ]  # fmt: skip
    assert "it is truncated: at least" in found["cut.msgpack"].problem
    with pytest.raises(CheckpointError, match=r"unet\.msgpack is one component of a hub-layout checkpoint"):
        resolve("unet.msgpack", "sd15", settings)
    file = models / "mine/vae" / FILES["vae"]
    file.write_bytes(struct.pack(">B", 0x81))
    assert "is truncated" in {each.name: each for each in local.found(settings).entries}["mine"].problem
