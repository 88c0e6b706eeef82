"""T5 at its prices: what is loaded, how large it is, how near to the whole, and how prompts reach it."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import T5Config, T5EncoderModel, T5Tokenizer

from backend.errors import CheckpointError, InvalidRequest
from backend.memory import quantize
from backend.sd3.keys import PUBLISHED
from backend.settings import Settings
from backend.text.prompts import weighted
from backend.text.t5 import (
    QUANTISED,
    TABLE,
    TABLE_AGAIN,
    encode_t5,
    load_t5,
    load_t5_tokenizer,
    t5_available,
    t5_bytes,
    t5_is_float8,
    t5_length,
    t5_work,
)
from backend.weights.source import Source, resolve
from benchmarks.sd3_checkpoint import build

CPU = torch.device("cpu")
LAYERS = 5  # of a T5 that is large enough to be weighed
T5 = "text_encoder_3"
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
PRECISIONS = ("full", "int8", "nf4")
WORDS = ("a", "red", "house", "on", "green", "hills", "at", "night", "the", "sea", "Red", "light")
PROMPTS = ["a red house on green hills", "", "the sea at night, " * 200]
DEMO = Path(__file__).parents[2] / "assets" / "demo" / "sd3"


def tokenizer_folder(folder: Path, *, length: int = 512) -> None:
    pieces = {"<pad>": 0.0, "</s>": 0.0, "<unk>": 0.0, "▁": -8.0}
    pieces |= {f"▁{word}": -4.0 for word in WORDS}
    pieces |= dict.fromkeys((*"abcdefghijklmnopqrstuvwxyz,.:!()[]", "light", "house"), -12.0)
    T5Tokenizer(vocab=list(pieces.items()), extra_ids=0, model_max_length=length).save_pretrained(folder)


def t5_folder(folder: Path, **changes: Any) -> Path:
    """A checkpoint of no more than T5, wide enough that rounding evens out, in several files."""
    torch.manual_seed(0)
    settings: dict[str, Any] = {
        "vocab_size": 96, "d_model": 512, "d_kv": 64, "d_ff": 1024, "num_layers": 3, "num_heads": 8,
        "feed_forward_proj": "gated-gelu", "tie_word_embeddings": False, **changes,
    }  # fmt: skip
    encoder = T5EncoderModel(T5Config(**settings))
    with torch.no_grad():
        for name, weight in encoder.named_parameters():
            if "layer_norm" in name:
                weight += 0.1 * torch.randn_like(weight)
    encoder.save_pretrained(folder / T5, max_shard_size="12MB")
    tokenizer_folder(folder / "tokenizer_3")
    (folder / "model_index.json").write_text('{"_class_name": "StableDiffusion3Pipeline"}')
    return folder


def opened(folder: Path) -> Source:
    return resolve(str(folder), "sd3", Settings())


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return t5_folder(tmp_path_factory.mktemp("t5"))


@pytest.fixture(scope="module")
def source(folder: Path) -> Source:
    return opened(folder)


@pytest.fixture
def copy(folder: Path, tmp_path: Path) -> Path:
    """To be spoiled: T5 in one file."""
    shutil.copytree(folder, tmp_path / "copy")
    target = tmp_path / "copy" / T5
    tensors = {}
    for shard in sorted(target.glob("*.safetensors")):
        tensors |= load_file(shard)
        shard.unlink()
    (target / "model.safetensors.index.json").unlink()
    save_file(tensors, target / "model.safetensors")
    return tmp_path / "copy"


def stored(module: nn.Module) -> dict[str, Tensor]:
    return {**dict(module.named_parameters()), **dict(module.named_buffers())}


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_whole_equals_the_reference(folder: Path, source: Source, dtype: torch.dtype) -> None:
    ids = torch.randint(0, 96, (2, 77))
    reference = T5EncoderModel.from_pretrained(folder / T5, dtype=dtype)
    encoder = load_t5(source, T5, "full", dtype, CPU)
    with torch.no_grad():
        features = encoder(input_ids=ids).last_hidden_state
        assert torch.equal(features, reference(input_ids=ids).last_hidden_state)
    assert features.isfinite().all()
    assert not encoder.training
    assert not any(weight.requires_grad for weight in encoder.parameters())
    assert encoder.encoder.embed_tokens is encoder.shared


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("precision", PRECISIONS)
def test_every_tensor_has_its_precision(source: Source, precision: str, dtype: torch.dtype) -> None:
    encoder = load_t5(source, T5, precision, dtype, CPU)
    tensors = stored(encoder)
    integers = {"int8": torch.int8, "nf4": torch.uint8}
    for name, tensor in tensors.items():
        *_, layer, kind = name.split(".")
        if layer in QUANTISED and precision in integers:
            assert tensor.dtype == (torch.float32 if kind == "scale" else integers[precision]), name
        elif layer == "wo" and dtype == torch.float16:
            assert tensor.dtype == torch.float32, name
        else:
            assert tensor.dtype == dtype, name
    shapes = source.shapes(T5, "float32")
    assert t5_bytes(shapes, precision, dtype) == sum(t.nbytes for t in tensors.values())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("precision", "least"), [("int8", 0.99), ("nf4", 0.97)])
@pytest.mark.parametrize("checkpoint", ["random", *(["demo"] if (DEMO / T5).is_dir() else [])])
def test_few_bits_are_near_the_whole(
    source: Source, checkpoint: str, precision: str, least: float, dtype: torch.dtype
) -> None:
    if checkpoint == "demo":
        source = resolve("demo", "sd3", Settings())
    tokenizer = load_t5_tokenizer(source)
    length = t5_length(source, 256)
    prompts = ["a red lighthouse on green hills at sunset, full moon", *PROMPTS]
    whole, few = (
        encode_t5(load_t5(source, T5, each, dtype, CPU), tokenizer, prompts, length, raw=False).double()
        for each in ("full", precision)
    )
    assert F.cosine_similarity(whole.flatten(), few.flatten(), dim=0) >= least
    assert F.cosine_similarity(whole, few, dim=2).mean() >= least


def layer(weight: Tensor, precision: str) -> nn.Module:
    made = quantize.quantised(precision, tuple(weight.shape), CPU)
    made.read(weight)
    return made


def test_quantised_layers_are_those_of_bitsandbytes() -> None:
    bnb: Any = quantize.bitsandbytes()
    weight = torch.randn(320, 448, dtype=torch.bfloat16)  # not a whole number of pieces
    x = torch.randn(2, 9, 448, dtype=torch.float16)
    x[0, 3, 5] = 40.0  # an outlier
    ours = layer(weight, "int8")
    theirs = bnb.nn.Linear8bitLt(448, 320, bias=False, has_fp16_weights=False, threshold=6.0)
    theirs.weight = bnb.nn.Int8Params(weight.clone(), requires_grad=False, has_fp16_weights=False).to("cpu")
    with torch.no_grad():
        assert torch.equal(ours(x), theirs.eval()(x))
    x = x.bfloat16()
    ours = layer(weight, "nf4")
    theirs = bnb.nn.Linear4bit(
        448, 320, bias=False, compute_dtype=x.dtype, compress_statistics=False, quant_type="nf4"
    )
    theirs.weight = bnb.nn.Params4bit(
        weight.clone(), requires_grad=False, compress_statistics=False, quant_type="nf4"
    ).to("cpu")
    theirs.support_avx512bf16_for_cpu = False
    with torch.no_grad():
        assert torch.equal(ours(x), theirs.eval()(x))
    assert torch.equal(ours.get_buffer("weight"), theirs.weight.flatten())


def test_pieces_and_bands_make_no_difference(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, x = torch.randn(96, 128), torch.randn(5, 128)
    for precision in quantize.PRECISIONS:
        at_once = layer(weight, precision)
        whole = at_once(x)
        with monkeypatch.context() as small:
            small.setattr(quantize, "PIECE", 640)
            small.setattr(quantize, "BAND", 1280)
            in_pieces = layer(weight, precision)
            assert all(torch.equal(a, b) for a, b in zip(at_once.buffers(), in_pieces.buffers(), strict=True))
            torch.testing.assert_close(in_pieces(x), whole)


def test_what_rows_of_half_blocks_would_make_stays_whole(tmp_path: Path) -> None:
    source = opened(t5_folder(tmp_path, d_model=96, d_kv=32, d_ff=192, num_heads=2))
    encoder = load_t5(source, T5, "nf4", torch.bfloat16, CPU)
    tensors = stored(encoder)
    assert tensors["encoder.block.0.layer.0.SelfAttention.q.weight"].dtype == torch.bfloat16  # rows of 96
    assert tensors["encoder.block.0.layer.0.SelfAttention.o.weight"].dtype == torch.uint8  # rows of 64
    shapes = source.shapes(T5, "float32")
    expected = t5_bytes(shapes, "nf4", torch.bfloat16)
    assert expected == sum(t.nbytes for t in tensors.values())


def test_published_sizes() -> None:
    with torch.device("meta"):
        encoder = T5EncoderModel(T5Config(**PUBLISHED[T5]))
    shapes = {name: tuple(meta.shape) for name, meta in encoder.state_dict().items()}
    for dtype, sizes in ((torch.bfloat16, (9.53, 5.90, 4.31)), (torch.float16, (11.54, 7.91, 6.33))):
        for precision, size in zip(PRECISIONS, sizes, strict=True):
            assert t5_bytes(shapes, precision, dtype) == pytest.approx(size * 1e9, rel=0.01)
    work = t5_work(PUBLISHED[T5], 2, 256, torch.bfloat16)
    assert 290e6 <= work <= 350e6  # measured: int8 290 MB, whole 121, nf4 78


@pytest.mark.parametrize("names", [(TABLE,), (TABLE_AGAIN,), (TABLE, TABLE_AGAIN)])
def test_the_table_of_tokens_goes_by_two_names(copy: Path, source: Source, names: tuple[str, ...]) -> None:
    path = copy / T5 / "model.safetensors"
    tensors = load_file(path)
    table = tensors.pop(TABLE)
    save_file({**tensors, **{name: table.clone() for name in names}}, path)
    tokenizer = load_t5_tokenizer(source)
    renamed, plain = (
        encode_t5(load_t5(each, T5, "full", torch.float32, CPU), tokenizer, PROMPTS, 9, raw=True)
        for each in (opened(copy), source)
    )
    assert torch.equal(renamed, plain)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_tensors_that_do_not_fit_are_listed(copy: Path, precision: str) -> None:
    path = copy / T5 / "model.safetensors"
    tensors = load_file(path)
    del tensors["encoder.block.1.layer.1.DenseReluDense.wo.weight"]
    tensors["encoder.block.7.layer_norm.weight"] = torch.ones(512)
    tensors["encoder.block.0.layer.0.SelfAttention.k.weight"] = torch.ones(512, 64)
    save_file(tensors, path)
    with pytest.raises(CheckpointError) as raised:
        load_t5(opened(copy), T5, precision, torch.float32, CPU)
    for part in (
        "block.1.layer.1.DenseReluDense.wo",
        "block.7.layer_norm",
        "k.weight is 512×64, due 512×512",
    ):
        assert part in str(raised.value)


def test_a_config_of_no_network(copy: Path) -> None:
    config = json.loads((copy / T5 / "config.json").read_text())
    (copy / T5 / "config.json").write_text(json.dumps({**config, "num_heads": "many"}))
    source = opened(copy)
    with pytest.raises(CheckpointError, match="no config of a T5 encoder.*num_heads"):
        load_t5(source, T5, "full", torch.float32, CPU)
    with pytest.raises(CheckpointError, match="no config of a T5 encoder.*num_heads"):
        t5_work(source.config(T5), 1, 77, torch.float32)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("narrow", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_float8_files(copy: Path, precision: str, dtype: torch.dtype, narrow: torch.dtype) -> None:
    path = copy / T5 / "model.safetensors"
    tensors = {name: tensor.to(narrow) for name, tensor in load_file(path).items()}
    save_file(tensors, path)
    source = opened(copy)
    tokenizer = load_t5_tokenizer(source)
    assert t5_is_float8(source, T5, dtype)
    encoder = load_t5(source, T5, precision, dtype, CPU)
    kept = stored(encoder)
    size = t5_bytes(source.shapes(T5, "float32"), precision, dtype, float8=True)
    assert size == sum(tensor.nbytes for tensor in kept.values())
    assert kept["encoder.block.0.layer.1.DenseReluDense.wo.stored"].dtype == narrow
    features = encode_t5(encoder, tokenizer, PROMPTS, 77, raw=False)
    # the same numbers in a wider file
    save_file({name: tensor.to(dtype) for name, tensor in tensors.items()}, path)
    source = opened(copy)
    assert not t5_is_float8(source, T5, dtype)
    wide = encode_t5(load_t5(source, T5, precision, dtype, CPU), tokenizer, PROMPTS, 77, raw=False)
    torch.testing.assert_close(features, wide)


def test_widening_float8_equals_torchs() -> None:
    every = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn)
    numbers = every[~every.float().isnan()]
    for dtype in DTYPES:
        assert torch.equal(quantize.widened(numbers, dtype), numbers.to(dtype))


PEAK = """
import json, os, sys
import torch
from backend.memory.hardware import PeakMeter, anonymous_bytes
from backend.memory.quantize import bitsandbytes, quantised
from backend.settings import Settings
from backend.text.t5 import load_t5
from backend.weights.source import resolve

source = resolve(sys.argv[1], "sd3", Settings())
bitsandbytes()
for precision in sys.argv[2:]:
    if os.fork():  # each in a process of its own, which has nothing to import
        assert os.wait()[1] == 0
        continue
    if precision != "full":
        layer = quantised(precision, (64, 64), torch.device("cpu"))
        layer.read(torch.ones(64, 64))
        layer(torch.ones(2, 64))
    before = anonymous_bytes()
    with PeakMeter("cpu") as meter:
        encoder = load_t5(source, "text_encoder_3", precision, torch.bfloat16, torch.device("cpu"))
    print(json.dumps([meter.peak - before, anonymous_bytes() - before]), flush=True)
    os._exit(0)
"""


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """180 MB of bfloat16 in files of 30 MB."""
    folder = tmp_path_factory.mktemp("large")
    settings: dict[str, Any] = {
        "vocab_size": 512, "d_model": 1024, "d_kv": 64, "d_ff": 4096, "num_layers": LAYERS, "num_heads": 16,
        "feed_forward_proj": "gated-gelu", "tie_word_embeddings": False,
    }  # fmt: skip
    config = T5Config(**settings)
    with torch.device("meta"):
        shapes = {name: meta.shape for name, meta in T5EncoderModel(config).state_dict().items()}
    del shapes[TABLE_AGAIN]
    (folder / T5).mkdir()
    config.save_pretrained(folder / T5)
    pattern = torch.randn(1024, 4096, dtype=torch.bfloat16)
    where: dict[str, str] = {}
    shard: dict[str, Tensor] = {}
    for number, (name, shape) in enumerate(shapes.items()):
        shard[name] = pattern.flatten()[: shape.numel()].view(shape).clone()
        if sum(tensor.nbytes for tensor in shard.values()) > 25e6 or number == len(shapes) - 1:
            file = f"model-{len(set(where.values())):05}.safetensors"
            save_file(shard, folder / T5 / file)
            where |= dict.fromkeys(shard, file)
            shard = {}
    (folder / T5 / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))
    tokenizer_folder(folder / "tokenizer_3")
    (folder / "model_index.json").write_text('{"_class_name": "StableDiffusion3Pipeline"}')
    return folder


@pytest.fixture(scope="module")
def peaks(large: Path) -> dict[str, tuple[int, int]]:
    """Of each precision: the most that was taken while it was read, and what is kept, in bytes."""
    command = [sys.executable, "-c", PEAK, str(large), *PRECISIONS]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stderr == ""
    return dict(zip(PRECISIONS, map(json.loads, done.stdout.splitlines()), strict=True))


@pytest.mark.parametrize("precision", PRECISIONS)
def test_peak_memory_while_it_is_read(large: Path, peaks: dict[str, tuple[int, int]], precision: str) -> None:
    size = t5_bytes(opened(large).shapes(T5, "bfloat16"), precision, torch.bfloat16)
    peak, after = peaks[precision]
    largest = max(path.stat().st_size for path in (large / T5).glob("*.safetensors"))
    assert largest < 40e6
    assert peak <= size + largest
    # what the files have in it stays mapped: all that is whole, and `wo` in any precision
    copied = 0 if precision == "full" else size - LAYERS * 4096 * 1024 * 2
    assert after > copied - 10e6
    if precision == "full":
        assert peak < size / 2


IMPORT = """
from backend.memory.quantize import bitsandbytes
bitsandbytes()
import kernels
assert not kernels.ASKED
"""


def test_bitsandbytes_downloads_and_says_nothing(tmp_path: Path) -> None:
    (tmp_path / "kernels.py").write_text(
        "ASKED = []\ndef get_kernel(*args, **rest):\n    ASKED.append(args)\n"
    )
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-c", f"import sys\nsys.path += [{str(root)!r}, {str(tmp_path)!r}]\n{IMPORT}"],
        capture_output=True, text=True, check=False, cwd=tmp_path,
    )  # fmt: skip
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_without_bitsandbytes(source: Source, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    for precision in ("int8", "nf4"):
        reason = t5_available(precision, "cpu")
        assert reason is not None
        assert "bitsandbytes, which is not installed" in reason
        with pytest.raises(InvalidRequest, match=f"t5 is '{precision}'.*bitsandbytes.*full or off"):
            load_t5(source, T5, precision, torch.float32, CPU)
    assert t5_available("full", "cpu") is None
    load_t5(source, T5, "full", torch.float32, CPU)


@pytest.mark.parametrize("error", ["OSError", "TypeError"])
def test_with_a_bitsandbytes_that_cannot_be_loaded(
    source: Source, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: str
) -> None:
    (tmp_path / "bitsandbytes.py").write_text(
        f"raise {error}('libcudart.so: cannot open shared object file')"
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "bitsandbytes", raising=False)
    quantize.bitsandbytes.cache_clear()
    before: Any = object()
    monkeypatch.setitem(sys.modules, "kernels", before)
    told = r"t5 is 'int8', .*bitsandbytes, which cannot be loaded: libcudart\.so.*; set t5 to full or off"
    with pytest.raises(InvalidRequest, match=told):
        load_t5(source, T5, "int8", torch.float32, CPU)
    assert sys.modules["kernels"] is before
    monkeypatch.undo()
    assert quantize.bitsandbytes().__file__ is not None


def test_where_it_can_run() -> None:
    for device in ("cpu", "cuda"):
        assert [t5_available(precision, device) for precision in PRECISIONS] == [None] * 3
    assert t5_available("full", "mps") is None
    for precision in ("int8", "nf4"):
        assert "not on mps; it can be full or off" in (t5_available(precision, "mps") or "")


def test_an_unknown_price(source: Source) -> None:
    with pytest.raises(InvalidRequest, match="t5 is 'int4'.*full, int8, nf4"):
        load_t5(source, T5, "int4", torch.float32, CPU)


@pytest.mark.parametrize("length", [77, 256, 512])
def test_prompts_are_read_as_by_the_reference(folder: Path, source: Source, length: int) -> None:
    tokenizer = load_t5_tokenizer(source)
    encoder = load_t5(source, T5, "full", torch.float32, CPU)
    reference = T5EncoderModel.from_pretrained(folder / T5)
    prompts = [*PROMPTS, "  a   red\thouse \n on hills ", "Red lighthouse,on  hills!!", r"a \\ b", "日本 🏠"]
    ids = tokenizer(
        prompts, padding="max_length", max_length=length, truncation=True, return_tensors="pt"
    ).input_ids
    assert ids[2, -1] == tokenizer.eos_token_id  # cut, and still ended
    with torch.no_grad():
        expected = reference(input_ids=ids).last_hidden_state
    for raw in (True, False):
        features = encode_t5(encoder, tokenizer, prompts, length, raw=raw)
        assert features.shape == (len(prompts), length, 512)
        assert torch.equal(features, expected) or not raw
    plain = encode_t5(encoder, tokenizer, prompts[:5], length, raw=False)
    torch.testing.assert_close(plain, expected[:5])


def test_weights_scale_the_features_of_their_tokens(source: Source) -> None:
    tokenizer = load_t5_tokenizer(source)
    encoder = load_t5(source, T5, "full", torch.float32, CPU)
    plain = encode_t5(encoder, tokenizer, ["a red light house at night"], 12, raw=True)
    weights = torch.ones(1, 12)
    weights[0, 1] = 1.5
    weights[0, 3:5] = 1 / 1.1
    features = encode_t5(encoder, tokenizer, ["a (red:1.5) light [house at] night"], 12, raw=False)
    torch.testing.assert_close(features, weighted(plain, weights))
    # brackets inside a word do not change where it is cut
    plain = encode_t5(encoder, tokenizer, ["a lighthouse"], 12, raw=True)
    weights = torch.ones(1, 12)
    weights[0, 2] = 1.3
    features = encode_t5(encoder, tokenizer, ["a light(house:1.3)"], 12, raw=False)
    torch.testing.assert_close(features, weighted(plain, weights))


def test_break_is_no_word(source: Source) -> None:
    tokenizer = load_t5_tokenizer(source)
    encoder = load_t5(source, T5, "full", torch.float32, CPU)
    with_break, without = (
        encode_t5(encoder, tokenizer, [text], 9, raw=False)
        for text in ("a red house BREAK at night", "a red house at night")
    )
    assert torch.equal(with_break, without)


def test_a_tokenizer_of_another_encoder(tmp_path: Path) -> None:
    source = opened(t5_folder(tmp_path, vocab_size=8, d_model=64, d_ff=64, num_heads=1, num_layers=1))
    encoder = load_t5(source, T5, "full", torch.float32, CPU)
    with pytest.raises(CheckpointError, match="does not belong to the text encoder"):
        encode_t5(encoder, load_t5_tokenizer(source), ["the sea"], 9, raw=True)


@pytest.mark.parametrize("content", ["", "{}", '{"version": "1.0"', '{"model": {"type": "Unigram"}}'])
def test_a_damaged_tokenizer(copy: Path, content: str) -> None:
    (copy / "tokenizer_3" / "tokenizer.json").write_text(content)
    with pytest.raises(CheckpointError, match=r"the tokenizer in .*tokenizer_3 cannot be read"):
        load_t5_tokenizer(opened(copy))


def test_of_a_tokenizer_in_both_forms_the_fast_one_is_read(copy: Path, source: Source) -> None:
    (copy / "tokenizer_3" / "spiece.model").write_bytes(b"what only another package could read")
    both, one = load_t5_tokenizer(opened(copy)), load_t5_tokenizer(source)
    assert both("a red house").input_ids == one("a red house").input_ids
    (copy / "tokenizer_3" / "tokenizer.json").unlink()
    with pytest.raises(CheckpointError, match="tokenizer_3 cannot be read"):
        load_t5_tokenizer(opened(copy))


@pytest.mark.parametrize(
    ("stated", "expected"),
    [(24, 24), (512, 256), (1e30, 256), (0, 256), (-1, 256), ("many", 256), (None, 256), (True, 256)],
)
def test_no_more_tokens_than_the_tokenizer_states(copy: Path, stated: Any, expected: int) -> None:
    (copy / "tokenizer_3" / "tokenizer_config.json").write_text(json.dumps({"model_max_length": stated}))
    assert t5_length(opened(copy), 256) == expected


def test_as_many_tokens_as_wanted_until_the_tokenizer_is_there(copy: Path) -> None:
    (copy / "tokenizer_3" / "tokenizer_config.json").write_text("[damaged")
    assert t5_length(opened(copy), 77) == 77
    shutil.rmtree(copy / "tokenizer_3")
    assert t5_length(opened(copy), 77) == 77


def test_the_checkpoint_of_the_benchmarks(tmp_path: Path) -> None:
    source = opened(build(tmp_path / "tiny", tiny=True))
    encoder = load_t5(source, T5, "nf4", torch.bfloat16, CPU)
    features = encode_t5(encoder, load_t5_tokenizer(source), PROMPTS, t5_length(source, 256), raw=False)
    assert features.shape == (3, 256, 128)
    assert features.isfinite().all()
    assert source.has("transformer")
