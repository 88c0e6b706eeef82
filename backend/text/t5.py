"""The T5 encoder of Stable Diffusion 3 at its prices: whole, with 8 bits a weight, or with 4.

Source: Raffel et al., arXiv:1910.10683; the network and its tokenizer are those of the transformers library.
Letters: B prompts, L tokens, D features.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast, T5Config, T5EncoderModel, T5Tokenizer

from backend.errors import CheckpointError, InvalidRequest, TriptychError
from backend.memory.quantize import BAND, Float8Linear, fits, quantised, quantised_bytes, unavailable, widened
from backend.text.prompts import BREAK, parse, weighted
from backend.weights.files import Shapes
from backend.weights.load import assign, build_on_meta, check_tensors
from backend.weights.source import Source

PRECISIONS = ("full", "int8", "nf4")
TOKENIZER = "tokenizer_3"

# The table of tokens, and its other name: some files have it under one, some under both.
TABLE, TABLE_AGAIN = "shared.weight", "encoder.embed_tokens.weight"

# The layers whose weights are quantised. `wo` never is: its features overflow float16, and T5 casts them to
# the dtype of its weight, which gives nonsense where that is made of integers.
QUANTISED = frozenset({"q", "k", "v", "o", "wi", "wi_0", "wi_1"})
LAYERS = QUANTISED | {"wo"}
FLOAT8 = (torch.float8_e4m3fn, torch.float8_e5m2)


def t5_available(precision: str, device: str) -> str | None:
    """Why T5 cannot run so on a device of this type ("cpu", "cuda", "mps"); None where it can."""
    if precision not in PRECISIONS:
        return f"T5 can be {', '.join(PRECISIONS)}"
    reason = unavailable(precision, device)
    return f"{reason}; it can be full or off" if reason else None


def load_t5(
    source: Source, component: str, precision: str, dtype: torch.dtype, device: torch.device
) -> T5EncoderModel:
    """The T5 encoder of a checkpoint, computing in `dtype`, its weights whole ("full"), "int8" or "nf4".

    Tensors are read one at a time straight into the form they are kept in; what the file has in it stays
    mapped. Layers that a file has in float8 stay so too, unless they are quantised: T5 reads its prompts once
    and leaves, so that widening them as they run takes no longer than at load, and half the memory. Raises
    InvalidRequest for a precision that cannot be had here, CheckpointError for tensors that are not just
    those of the network.
    """
    if refused := t5_available(precision, device.type):
        raise InvalidRequest(f"t5 is {precision!r}, which cannot run here: {refused}")
    what = f"{source.name}: {component}"
    tensors = source.tensors(component, str(dtype).removeprefix("torch."))
    names = {name: name for name in tensors if name != TABLE_AGAIN}
    if TABLE_AGAIN in tensors:
        names.setdefault(TABLE, TABLE_AGAIN)
    settings = _settings(source.config(component))
    module = build_on_meta(lambda: T5EncoderModel(settings), what)
    expected = {name: meta for name, meta in module.state_dict().items() if name != TABLE_AGAIN}
    check_tensors(expected, {name: tensors[theirs] for name, theirs in names.items()}, what)
    try:
        few = {
            name: quantised(precision, tuple(meta.shape), device)
            for name, meta in expected.items()
            if _is_quantised(name, tuple(meta.shape), precision)
        }
    except InvalidRequest as error:  # bitsandbytes is there and does not work: set by hand, "auto" took it
        raise InvalidRequest(
            f"t5 is {precision!r}, which cannot run here: {error}; set t5 to full or off"
        ) from error
    for name in expected:
        tensor = tensors[names[name]]
        if name in few:
            few[name].read(tensor)
            module.set_submodule(name.removesuffix(".weight"), few[name])
        else:
            _place(module, name, tensor, _dtype(name, dtype), device)
    module.set_input_embeddings(module.shared)
    assert not any(weight.is_meta for weight in (*module.parameters(), *module.buffers()))
    return module.eval()


def _settings(config: Mapping[str, Any]) -> T5Config:
    changed: dict[str, Any] = {**config, "is_decoder": False}
    try:
        return T5Config(**changed)
    except (StrictDataclassError, TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(f"this is no config of a T5 encoder: {error.__cause__ or error}") from error


def _place(module: nn.Module, name: str, tensor: Tensor, dtype: torch.dtype, device: torch.device) -> None:
    if tensor.dtype in FLOAT8 and _layer(name) in LAYERS and device.type in ("cpu", "cuda"):
        module.set_submodule(name.removesuffix(".weight"), Float8Linear(tensor.to(device), dtype))
    else:
        assign(module, name, nn.Parameter(widened(tensor.to(device), dtype), requires_grad=False))


def _is_quantised(name: str, shape: tuple[int, ...], precision: str) -> bool:
    return _layer(name) in QUANTISED and fits(precision, shape)


def _layer(name: str) -> str:
    """encoder.block.0.layer.0.SelfAttention.q.weight → q"""
    return name.removesuffix(".weight").rpartition(".")[2]


def _dtype(name: str, dtype: torch.dtype) -> torch.dtype:
    """What a weight is kept in that is not quantised: in float16 the network's own class keeps some wider."""
    wide = set(T5EncoderModel._keep_in_fp32_modules or ()) & set(name.split("."))
    return torch.float32 if wide and dtype == torch.float16 else dtype


def t5_bytes(shapes: Shapes, precision: str, dtype: torch.dtype, *, float8: bool = False) -> int:
    """The size of the encoder's weights as they run; see `t5_sizes`."""
    return sum(t5_sizes(shapes, precision, dtype, float8=float8).values())


def t5_sizes(shapes: Shapes, precision: str, dtype: torch.dtype, *, float8: bool = False) -> dict[str, int]:
    """The bytes of the encoder's weights as they run, by tensor, from their shapes; nothing is loaded.

    `float8` says that the file has them so, as `t5_is_float8` tells, and the device is none that widens them.
    """
    sizes: dict[str, int] = {}
    for name, shape in shapes.items():
        if name == TABLE_AGAIN and TABLE in shapes:
            continue
        if _is_quantised(name, shape, precision):
            sizes[name] = quantised_bytes(precision, shape)
        else:
            item = 1 if float8 and _layer(name) in LAYERS else _dtype(name, dtype).itemsize
            sizes[name] = math.prod(shape) * item
    return sizes


def t5_mapped(sizes: Mapping[str, int], precision: str, dtype: torch.dtype, stored: str) -> int:
    """How much of the encoder in RAM is a view of its file, which has it as `stored`."""
    kept = {
        name: size for name, size in sizes.items() if _layer(name) not in QUANTISED or precision == "full"
    }
    if stored.startswith("float8"):
        return sum(size for name, size in kept.items() if _layer(name) in LAYERS)
    return sum(
        size for name, size in kept.items() if str(_dtype(name, dtype)).removeprefix("torch.") == stored
    )


def t5_is_float8(source: Source, component: str, dtype: torch.dtype) -> bool:
    """Whether the files of the encoder keep most of their numbers in 8 bits; False until they are there."""
    name = str(dtype).removeprefix("torch.")
    return source.present([component], name) and source.precision(component, name).startswith("float8")


def t5_shapes(config: Mapping[str, Any]) -> Shapes:
    """The shapes of an encoder's tensors by its config alone, before there are files of it."""
    settings = T5Config(**config)
    width, inner, hidden = settings.d_model, settings.num_heads * settings.d_kv, settings.d_ff
    shapes: Shapes = {TABLE: (settings.vocab_size, width), "encoder.final_layer_norm.weight": (width,)}
    inwards = ("wi_0", "wi_1") if settings.is_gated_act else ("wi",)
    for index in range(settings.num_layers):
        attention, feed_forward = (f"encoder.block.{index}.layer.{place}" for place in (0, 1))
        shapes |= {f"{attention}.SelfAttention.{name}.weight": (inner, width) for name in "qkv"}
        shapes[f"{attention}.SelfAttention.o.weight"] = (width, inner)
        shapes |= {f"{feed_forward}.DenseReluDense.{name}.weight": (hidden, width) for name in inwards}
        shapes[f"{feed_forward}.DenseReluDense.wo.weight"] = (width, hidden)
        shapes |= {f"{layer}.layer_norm.weight": (width,) for layer in (attention, feed_forward)}
    bias = "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
    return shapes | {bias: (settings.relative_attention_num_buckets, settings.num_heads)}


def t5_work(
    config: Mapping[str, Any],
    batch: int,
    length: int,
    dtype: torch.dtype,
    *,
    device: str = "cpu",
    precision: str = "int8",
    float8: bool = False,
) -> int:
    """Bytes of activations while `batch` prompts of `length` tokens are read, by how the weights are kept, as
    `t5_bytes` has it; 8 bits a weight take the most.

    The whole encoder's are what fake tensors count on a card, to 1%; two prompts of 256 tokens in bfloat16
    on a CPU are 124 MiB for 115 measured, nf4 72 for 74, int8 282 for 277.
    """
    settings = _settings(config)
    tokens, item = batch * length, dtype.itemsize
    width, inner, hidden = settings.d_model, settings.num_heads * settings.d_kv, settings.d_ff
    one, band = width * hidden * item, min(BAND, width * hidden) * item
    if precision == "int8":
        # its layers give int32, and make float32 of it several times on the way to their result
        attention = tokens * (2 * width + 5 * inner) * item
        attention += batch * settings.num_heads * length**2 * (item + 4)
        return max(attention, tokens * (3 * width * item + hidden * (3 * item + 32))) + one
    wide = 4 if dtype == torch.float16 else item  # of the residual, which then is float32, and before `wo`
    places = settings.num_heads * length**2 * item  # of each token to each, from the first layer to the last
    residual = tokens * width * 2 * (item + wide)  # and the tokens as they came, and normalised
    work = places + residual + tokens * max(4 * inner * item, hidden * (3 * item + wide))
    if precision == "nf4" or float8:  # a weight, widened; on a CPU a band of it
        return work + (band if device == "cpu" else one)
    if device == "cpu" and item == 2:  # oneDNN copies each weight, while there are two of four
        return max(work, places + residual + tokens * 2 * hidden * item + one)
    return work


def load_t5_tokenizer(source: Source, component: str = TOKENIZER) -> PreTrainedTokenizerFast:
    """The T5 tokenizer of a checkpoint. Raises CheckpointError where it is missing or damaged."""
    folder = source.tokenizer(component)
    try:
        return T5Tokenizer.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # the Rust reader raises no narrower one for damaged files
        raise CheckpointError(f"{source.name}: the tokenizer in {folder} cannot be read: {error}") from error


def t5_length(source: Source, wanted: int) -> int:
    """How many tokens of a prompt are read: `wanted`, or as many as the checkpoint's tokenizer states."""
    try:
        settings = json.loads((source.tokenizer(TOKENIZER) / "tokenizer_config.json").read_text("utf-8"))
        stated = settings.get("model_max_length")
    except (TriptychError, OSError, ValueError, AttributeError):  # not there yet, or loading it will tell
        return wanted
    return min(wanted, stated) if type(stated) is int and stated > 0 else wanted


@torch.no_grad()
def encode_t5(
    encoder: T5EncoderModel,
    tokenizer: PreTrainedTokenizerFast,
    prompts: Sequence[str],
    length: int,
    *,
    raw: bool,
) -> Tensor:
    """Prompts → features (B, L, D), L being `length`: what is longer is cut, what is shorter is padded.

    The padding is read too, as in the published pipeline. `raw` takes each prompt as plain text; else weights
    in brackets scale the features of their tokens. Raises CheckpointError for a tokenizer of another encoder.
    """
    rows = [_tokens(tokenizer, prompt, length, raw=raw) for prompt in prompts]
    ids = torch.tensor([numbers for numbers, _ in rows], device=encoder.device)
    if ids.max() >= encoder.config.vocab_size:
        raise CheckpointError(
            f"the tokenizer does not belong to the text encoder: it gives token {int(ids.max())}, "
            f"and the encoder knows {encoder.config.vocab_size}"
        )
    features = encoder(input_ids=ids).last_hidden_state
    return weighted(features, torch.tensor([weights for _, weights in rows], device=features.device))


def _tokens(
    tokenizer: PreTrainedTokenizerFast, prompt: str, length: int, *, raw: bool
) -> tuple[list[int], list[float]]:
    """The ids and weights of `length` tokens.

    Brackets are taken out before the text is cut into tokens, so that they never change where it is cut; a
    token weighs what its last character does.
    """
    runs = _runs(prompt, raw=raw)
    text = "".join(text for text, _ in runs)
    weight_at = [weight for text, weight in runs for _ in text]
    read = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    ids, spans = read["input_ids"][: length - 1], read["offset_mapping"][: length - 1]
    weights = [weight_at[stop - 1] if stop else 1.0 for _, stop in spans]
    end, pad = tokenizer.eos_token_id, tokenizer.pad_token_id
    assert isinstance(end, int)
    assert isinstance(pad, int)
    filled = length - len(ids) - 1
    return [*ids, end, *[pad] * filled], [*weights, *[1.0] * (filled + 1)]


def count_t5(tokenizer: PreTrainedTokenizerFast, prompt: str, *, raw: bool) -> int:
    """How many tokens a prompt has, the one that ends it included."""
    text = "".join(text for text, _ in _runs(prompt, raw=raw))
    return len(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]) + 1


def _runs(prompt: str, *, raw: bool) -> list[tuple[str, float]]:
    """The prompt as runs of text of one weight."""
    return [(prompt, 1.0)] if raw else [(" ", 1.0) if run == BREAK else run for run in parse(prompt)]
