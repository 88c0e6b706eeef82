"""LoRAs named in a prompt, and in a request."""

from __future__ import annotations

from typing import Any

import pytest

from backend import SD15Request
from backend.errors import InvalidRequest
from backend.infotext import describe, understand
from backend.text.tags import Named, extract, read, with_tags
from tests.unit.test_infotext import SETTINGS


@pytest.mark.parametrize(
    ("prompt", "plain", "named"),
    [
        ("a red house", "a red house", ()),
        ("a <lora:ink> house", "a house", (Named("ink", 1.0, 1.0),)),
        ("<lora:ink:0.8> a house", "a house", (Named("ink", 0.8, 0.8),)),
        ("a house<lora:ink:0.5:0.8>", "a house", (Named("ink", 0.8, 0.5),)),
        ("a <LORA:Ink (v2):te=0.2:unet=.3>", "a", (Named("Ink (v2)", 0.3, 0.2),)),
        ("<lyco:a:-1> x <lora:b:2>", "x", (Named("a", -1.0, -1.0), Named("b", 2.0, 2.0))),
        ("a <b> house, 1 < 2 > 0", "a <b> house, 1 < 2 > 0", ()),
    ],
)
def test_tags_are_taken_out(prompt: str, plain: str, named: tuple[Named, ...]) -> None:
    assert extract(prompt) == (plain, named)
    assert extract(with_tags(plain, named)) == (plain, named)


@pytest.mark.parametrize(
    ("prompt", "told"),
    [
        ("a house <lora:style:1e9>", "prompt has '1e9' for the weight of 'style'; it can be a number"),
        ("a house <lora:style:nan>", "'nan' for the weight of 'style'"),
        ("a house <lora:style:>", "'' for the weight of 'style'"),
        ("a house <lora::1>", "'<lora::1>', which names nothing; a name comes after the colon"),
        ("a house <hypernet:style:1>", "hypernetworks cannot be used, LoRAs can be"),
    ],
)
def test_tags_that_mean_nothing(prompt: str, told: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        SD15Request(prompt=prompt)
    assert told in str(caught.value)
    assert SD15Request(prompt=prompt, raw_prompt=True).prompt == prompt  # there it is text


def test_a_negative_prompt_names_none() -> None:
    with pytest.raises(InvalidRequest, match="negative_prompt names a LoRA; .*name them in the prompt"):
        SD15Request(negative_prompt="night <lora:style:1>")


@pytest.mark.parametrize("weights", [(-11,), (float("nan"),), (True,), ("much",), (0.5, float("inf"))])
def test_weights_are_numbers(weights: tuple[Any, ...]) -> None:
    with pytest.raises(InvalidRequest, match="for the weight of 'ink'; it can be a number from -10 to 10"):
        read(("ink", *weights))
    with pytest.raises(InvalidRequest, match="for the weight of 'ink'"):
        SD15Request(loras=(("ink", *weights),))


def test_a_request_keeps_them_as_numbers() -> None:
    given: Any = [["ink", "0.5"], ["paper", 1, 0.25], ["glue", 2, 2]]
    assert SD15Request(loras=given).loras == (("ink", 0.5), ("paper", 1.0, 0.25), ("glue", 2.0))


def test_they_go_into_the_text_of_a_picture_and_come_back() -> None:
    loras = (("models/ink.safetensors", 0.5), ("paper", 1.0, 0.25))
    settings = {**SETTINGS, "loras": loras, "lora_hashes": {"ink": "0123456789ab"}}
    text = describe(settings, 7)
    assert "<lora:ink:0.5> <lora:paper:0.25:1>\n" in text
    assert 'Lora hashes: "ink: 0123456789ab"' in text
    restored = understand(text)
    assert restored.unknown == restored.refused == ()
    plain, named = extract(restored.settings["prompt"])
    assert plain == SETTINGS["prompt"]
    assert named == (Named("ink", 0.5, 0.5), Named("paper", 1.0, 0.25))


def test_beside_a_raw_prompt_they_have_a_field_of_their_own() -> None:
    settings = {**SETTINGS, "raw_prompt": True, "prompt": "a <lora:ink:1>", "loras": (("paper", 1.0, 0.25),)}
    restored = understand(describe(settings, 7)).settings
    assert restored["prompt"] == "a <lora:ink:1>"
    assert restored["loras"] == (("paper", 1.0, 0.25),)
