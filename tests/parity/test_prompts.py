"""Encoded prompts against the reference pipeline's, on a tiny CLIP."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from diffusers import StableDiffusionPipeline
from torch import Tensor
from transformers import CLIPTextModel, CLIPTokenizer

from backend.errors import InvalidRequest
from backend.text.prompts import encode_prompts
from tests.checkpoints import sd15_folder

PROMPTS = ["", "a red house on green hills", "the photo of a blue tree at night, the sea", "zebra 🦓 ünïcode"]
LONG = "a red house on a blue sea, " * 20  # 8 tokens each


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> StableDiffusionPipeline:
    folder = sd15_folder(tmp_path_factory.mktemp("sd15"))
    return StableDiffusionPipeline.from_pretrained(folder)


@pytest.fixture(scope="module")
def encoder(reference: StableDiffusionPipeline) -> CLIPTextModel:
    return reference.text_encoder


@pytest.fixture(scope="module")
def tokenizer(reference: StableDiffusionPipeline) -> CLIPTokenizer:
    return reference.tokenizer


def close(ours: Tensor, theirs: Tensor) -> bool:
    return ours.shape == theirs.shape and bool((ours - theirs).abs().max() <= 1e-5 * theirs.abs().max())


@pytest.mark.parametrize("raw", [False, True])
@pytest.mark.parametrize("prompt", PROMPTS)
def test_plain_prompts_equal_the_reference(
    reference: StableDiffusionPipeline,
    encoder: CLIPTextModel,
    tokenizer: CLIPTokenizer,
    prompt: str,
    raw: bool,
) -> None:
    positive, negative = reference.encode_prompt(prompt, "cpu", 1, True, "a sea")
    assert negative is not None
    ours = encode_prompts(encoder, tokenizer, ["a sea", prompt], raw=raw)
    assert close(ours, torch.cat([negative, positive]))


@pytest.mark.parametrize("prompt", [LONG, "a (red:1.5) [house] BREAK \\(tree\\)"])
def test_raw_is_cut_and_unweighted_as_in_the_reference(
    reference: StableDiffusionPipeline, encoder: CLIPTextModel, tokenizer: CLIPTokenizer, prompt: str
) -> None:
    positive, _ = reference.encode_prompt(prompt, "cpu", 1, False)
    assert close(encode_prompts(encoder, tokenizer, [prompt], raw=True), positive)
    assert not close(encode_prompts(encoder, tokenizer, [prompt]), positive)


@pytest.mark.parametrize("clip_skip", [0, 1, 2])
def test_clip_skip_counts_as_the_reference_does(
    reference: StableDiffusionPipeline,
    encoder: CLIPTextModel,
    tokenizer: CLIPTokenizer,
    clip_skip: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # the reference still looks where transformers 4 kept the LayerNorm
    home = SimpleNamespace(final_layer_norm=encoder.final_layer_norm)
    monkeypatch.setattr(encoder, "text_model", home, raising=False)
    positive, _ = reference.encode_prompt(PROMPTS[1], "cpu", 1, False, clip_skip=clip_skip)
    assert close(encode_prompts(encoder, tokenizer, [PROMPTS[1]], clip_skip=clip_skip), positive)


@pytest.mark.parametrize("clip_skip", [-1, 3, 11])
def test_clip_skip_beyond_the_layers(
    encoder: CLIPTextModel, tokenizer: CLIPTokenizer, clip_skip: int
) -> None:
    with pytest.raises(InvalidRequest, match=f"clip_skip is {clip_skip}; it can be 0 to 2"):
        encode_prompts(encoder, tokenizer, ["a"], clip_skip=clip_skip)


def test_long_prompts_are_encoded_in_chunks(encoder: CLIPTextModel, tokenizer: CLIPTokenizer) -> None:
    both = encode_prompts(encoder, tokenizer, ["a sea", LONG])
    assert both.shape == (2, 3 * 77, encoder.config.hidden_size)
    empty = encode_prompts(encoder, tokenizer, [""])
    assert close(both[:1, -77:], empty)  # the shorter one is filled up with empty chunks
    whole = "a red house on a blue sea, " * 9  # 72 tokens; the tenth phrase would be cut
    assert close(both[1:, :77], encode_prompts(encoder, tokenizer, [whole]))


def test_break_begins_a_chunk(encoder: CLIPTextModel, tokenizer: CLIPTokenizer) -> None:
    apart = encode_prompts(encoder, tokenizer, ["a red house", "green hills"])
    joined = encode_prompts(encoder, tokenizer, ["a red house BREAK green hills"])
    assert close(joined, torch.cat([apart[:1], apart[1:]], dim=1))


def test_weights_scale_tokens_and_keep_the_mean(
    encoder: CLIPTextModel, tokenizer: CLIPTokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    bias = encoder.final_layer_norm.bias
    monkeypatch.setitem(
        encoder.final_layer_norm._parameters, "bias", torch.nn.Parameter(bias - 0.1)
    )  # about CLIP-L's
    plain = encode_prompts(encoder, tokenizer, ["a red house"])
    weighted = encode_prompts(encoder, tokenizer, ["a (red:1.5) house"])
    expected = plain.clone()
    expected[:, 2] *= 1.5
    expected *= plain.mean() / expected.mean()
    assert close(weighted, expected)


def test_a_mean_of_nothing_is_not_restored(
    encoder: CLIPTextModel, tokenizer: CLIPTokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Features around zero, as of encoders without a bias in the last LayerNorm, must not blow up."""
    monkeypatch.setitem(encoder.final_layer_norm._parameters, "weight", torch.nn.Parameter(torch.ones(64)))
    monkeypatch.setitem(encoder.final_layer_norm._parameters, "bias", torch.nn.Parameter(torch.zeros(64)))
    plain = encode_prompts(encoder, tokenizer, ["a red house"])
    weighted = encode_prompts(encoder, tokenizer, ["a (red:1.5) house"])
    assert close(weighted[:, 3:], plain[:, 3:])
    assert close(weighted[:, 2], 1.5 * plain[:, 2])


def test_a_prompt_beyond_reason(encoder: CLIPTextModel, tokenizer: CLIPTokenizer) -> None:
    with pytest.raises(InvalidRequest, match=r"chunks of 75 tokens; it can take up to 32"):
        encode_prompts(encoder, tokenizer, ["sea " * 3000])
