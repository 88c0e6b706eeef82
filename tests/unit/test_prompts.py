"""Known answers of the prompt syntax, where long prompts are cut, and Stable Cascade's encoding of them.

The encodings against the reference's are in tests/parity.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModelWithProjection, CLIPTokenizer

from backend.errors import InvalidRequest
from backend.text.prompts import BREAK, Token, chunks_of, encode_pooled_prompts, parse
from tests.checkpoints import tokenizer_files, unlike_at_start

COMMA = 7


@pytest.mark.parametrize(
    ("prompt", "runs"),
    [
        ("", []),
        ("a red house", [("a red house", 1)]),
        ("a (red) house", [("a ", 1), ("red", 1.1), (" house", 1)]),
        ("((red))", [("red", 1.21)]),
        ("[red]", [("red", 1 / 1.1)]),
        ("[[red]] house", [("red", 1 / 1.21), (" house", 1)]),
        ("(red:1.3) house", [("red", 1.3), (" house", 1)]),
        ("(red: 0.5 )", [("red", 0.5)]),
        ("(red:.5)", [("red", 0.5)]),
        ("(red:-1)", [("red", -1)]),
        ("(red:0)", [("red", 0)]),
        ("(a (red:1.5) house:2)", [("a ", 2), ("red", 3), (" house", 2)]),
        ("([red])", [("red", 1)]),
        (
            "a (((house:1.3)) [on] a (hill:0.5), sun, (((sky))).",
            [
                ("a ", 1), ("house", 1.573), (" ", 1.1), ("on", 1), (" a ", 1.1),
                ("hill", 0.55), (", sun, ", 1.1), ("sky", 1.4641), (".", 1.1),
            ],
        ),
        ("(red)(house)", [("redhouse", 1.1)]),
        (r"\(red\)", [("(red)", 1)]),
        (r"\[red\] \\ house", [(r"[red] \ house", 1)]),
        (r"(smile \:\) :1.2)", [("smile \\:) ", 1.2)]),
        (r"C:\pictures", [(r"C:\pictures", 1)]),
        ("(red", [("red", 1.1)]),
        ("a [red house", [("a ", 1), ("red house", 1 / 1.1)]),
        ("red) house]", [("red) house]", 1)]),
        ("red:1.2) house", [("red:1.2) house", 1)]),
        ("[red:1.2]", [("red:1.2", 1 / 1.1)]),
        ("(red:1.2.3)", [("red:1.2.3", 1.1)]),
        ("at 12:30, (noon)", [("at 12:30, ", 1), ("noon", 1.1)]),
        ("()", []),
        ("fünf\n(Häuser:1.2) 🏠", [("fünf\n", 1), ("Häuser", 1.2), (" 🏠", 1)]),
        ("red BREAK house", [("red", 1), BREAK, ("house", 1)]),
        ("(red\nBREAK\nhouse:1.2)", [("red", 1.2), BREAK, ("house", 1.2)]),
        ("BREAKFAST OUTBREAK break", [("BREAKFAST OUTBREAK break", 1)]),
    ],
)  # fmt: skip
def test_known_answers(prompt: str, runs: list[tuple[str, float]]) -> None:
    parsed = parse(prompt)
    assert [text for text, _ in parsed] == [text for text, _ in runs]
    assert [weight for _, weight in parsed] == pytest.approx([weight for _, weight in runs])


@pytest.mark.parametrize("prompt", ["(" * 70, "([" * 40 + "red", "(red:1" + "0" * 400 + ")", "((red:99):99)"])
def test_beyond_any_use(prompt: str) -> None:
    with pytest.raises(InvalidRequest, match="weight|deeper"):
        parse(prompt)


def chunk_sizes(ids: list[int | None], size: int = 75) -> list[int]:
    tokens = [None if number is None else Token(number) for number in ids]
    chunks = chunks_of(tokens, size, COMMA)
    assert [token for chunk in chunks for token in chunk] == [token for token in tokens if token]
    return [len(chunk) for chunk in chunks]


@pytest.mark.parametrize(
    ("ids", "sizes"),
    [
        ([], [0]),
        ([1] * 75, [75]),
        ([1] * 76, [75, 1]),
        ([1] * 200, [75, 75, 50]),
        ([1] * 60 + [COMMA] + [1] * 20, [61, 20]),  # the phrase after the comma stays whole
        ([1] * 54 + [COMMA] + [1] * 26, [75, 6]),  # that comma is too far back
        ([1] * 55 + [COMMA] + [1] * 25, [56, 25]),
        ([1] * 70 + [COMMA] + [1] * 4, [75]),  # fits: nothing to cut
        ([1] * 70 + [COMMA] + [1] * 4 + [COMMA, 1], [75, 2]),  # a comma just behind is a good place too
        ([1, None, 1, 1], [1, 2]),
        ([None, 1], [0, 1]),
        ([1, None], [1]),
    ],
)
def test_chunks(ids: list[int | None], sizes: list[int]) -> None:
    assert chunk_sizes(ids) == sizes


# Features before the final LayerNorm, and pooled ones


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> CLIPTokenizer:
    return CLIPTokenizer.from_pretrained(tokenizer_files(tmp_path_factory.mktemp("tokenizer")))


@pytest.fixture(scope="module")
def encoder(tokenizer: CLIPTokenizer) -> CLIPTextModelWithProjection:
    torch.manual_seed(0)
    ends: dict[str, Any] = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id")}
    config = CLIPTextConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=48, num_hidden_layers=3,
        num_attention_heads=2, hidden_act="gelu", projection_dim=16,
        **ends,
    )  # fmt: skip
    return unlike_at_start(CLIPTextModelWithProjection(config)).eval()


@pytest.fixture
def encode(encoder: CLIPTextModelWithProjection, tokenizer: CLIPTokenizer) -> Any:
    def run(*prompts: str, **options: Any) -> tuple[Tensor, Tensor]:
        return encode_pooled_prompts(
            encoder, tokenizer, prompts, masked=options.pop("masked", True), **options
        )

    return run


def close(ours: Tensor, theirs: Tensor) -> bool:
    return ours.shape == theirs.shape and torch.allclose(ours, theirs, atol=1e-5)


def test_pooled_prompts_have_their_shapes(encode: Any) -> None:
    features, pooled = encode("a red house", "")
    assert (features.shape, pooled.shape) == ((2, 77, 32), (2, 16))
    alone = [encode(prompt) for prompt in ("a red house", "")]
    assert close(features, torch.cat([each for each, _ in alone]))
    assert close(pooled, torch.cat([each for _, each in alone]))


def test_weights_change_the_features_and_not_the_pooled(encode: Any) -> None:
    plain, pooled = encode("a red house")
    weighted, pooled_too = encode("a (red:1.5) house")
    ratio = weighted[0, 2] / plain[0, 2]
    others = torch.cat([weighted[0, :2], weighted[0, 3:]]) / torch.cat([plain[0, :2], plain[0, 3:]])
    assert ratio.std() < 1e-3  # one factor for the whole token
    assert others.std() < 1e-3  # and one for all others, which keeps the mean
    assert (ratio.mean() / others.mean()).item() == pytest.approx(1.5, rel=1e-3)
    assert close(pooled, pooled_too)


def test_raw_pooled_prompts_take_brackets_as_they_are(encode: Any) -> None:
    assert not close(encode("a (red:1.5) house", raw=True)[1], encode("a red house")[1])
    assert close(encode("a red house", raw=True)[0], encode("a red house")[0])
    assert encode("sea " * 200, raw=True)[0].shape == (1, 77, 32)


def test_long_pooled_prompts_pool_their_first_chunk(encode: Any) -> None:
    first, then = "a red house, " * 18 + "a red house", "the blue sea at night"
    features, pooled = encode(f"{first} BREAK {then}")
    assert features.shape == (1, 154, 32)
    assert close(pooled, encode(first)[1])
    assert close(features, torch.cat([encode(first)[0], encode(then)[0]], dim=1))
    long, _ = encode("sea " * 100)
    assert long.shape == (1, 154, 32)
    both, pooled = encode("sea " * 100, "night")
    assert both.shape == (2, 154, 32)
    assert close(both[1:, 77:], encode("")[0])  # the shorter one is filled up with an empty chunk
    assert close(pooled[1:], encode("night")[1])


def test_skipped_layers_leave_the_pooled_alone(
    encode: Any, encoder: CLIPTextModelWithProjection, tokenizer: CLIPTokenizer
) -> None:
    ids = torch.tensor(tokenizer("a red house", padding="max_length", max_length=77).input_ids)[None]
    with torch.no_grad():
        states = encoder(input_ids=ids, output_hidden_states=True).hidden_states
    assert states is not None
    last = encode("a red house", masked=False)
    for skip in (0, 1, 2):
        features, pooled = encode("a red house", masked=False, clip_skip=skip)
        assert close(features, states[-1 - skip])
        assert close(pooled, last[1])
    for skip in (-1, 3):
        with pytest.raises(InvalidRequest, match=f"clip_skip is {skip}; it can be 0 to 2"):
            encode("a", clip_skip=skip)


def test_the_padding_is_seen_by_nothing(encode: Any, encoder: CLIPTextModelWithProjection) -> None:
    """Another vector at a place of the padding changes that place alone; unmasked, all that follow it."""
    positions = encoder.text_model.embeddings.position_embedding.weight
    before = {masked: encode("a red house", masked=masked) for masked in (True, False)}
    with torch.no_grad():
        kept = positions[20].clone()
        positions[20] += 3.0 * torch.randn(32, generator=torch.Generator().manual_seed(1))
    try:
        after = {masked: encode("a red house", masked=masked) for masked in (True, False)}
    finally:
        with torch.no_grad():
            positions[20] = kept

    def changed(masked: bool) -> list[int]:
        distance = (after[masked][0] - before[masked][0])[0].abs().amax(-1)
        return (distance > 1e-4).nonzero().flatten().tolist()

    assert changed(masked=True) == [20]
    assert changed(masked=False) == list(range(20, 77))
    assert close(after[True][1], before[True][1])


def test_masked_prompts_of_one_batch_do_not_touch(encode: Any) -> None:
    short, _ = encode("sea", "a red house on green hills at night")
    assert close(short[:1], encode("sea")[0])
