"""Embeddings of textual inversion: their files, their names in prompts, and where their vectors go.

Features and pictures against the reference's are in tests/parity.
"""

from __future__ import annotations

import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModelWithProjection, CLIPTokenizer

from backend import SD15Request, Settings, adapting
from backend.errors import CheckpointError, InvalidRequest
from backend.memory.placement import Streamer, tensors_of
from backend.text import inversion
from backend.text.inversion import check_fits, fitting, look, names_in, read_embedding, without_names
from backend.text.prompts import (
    BREAK,
    Token,
    chunks_of,
    count_chunks,
    encode_pooled_prompts,
    encode_prompts,
    parse,
)
from tests.checkpoints import tokenizer_files, unlike_at_start

COMMA = 7


def numbers(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# ---- files


def trained(params: Any) -> dict[str, Any]:
    """What the popular trainers write."""
    return {
        "string_to_token": {"*": 265},
        "string_to_param": params,
        "name": "trained-as",
        "step": 500,
        "sd_checkpoint": "4bdfc29c",
        "sd_checkpoint_name": None,
    }


def legacy(content: Any, path: Path) -> None:
    torch.save(content, path, _use_new_zipfile_serialization=False)


LAYOUTS: dict[str, tuple[str, Callable[[Tensor, Path], object], str]] = {
    "hub": ("mine.safetensors", lambda x, path: save_file({"<cat-toy>": x}, path), "<cat-toy>"),
    "hub, pickled": ("mine.bin", lambda x, path: torch.save({"<cat-toy>": x}, path), "<cat-toy>"),
    "trainers'": ("mine.pt", lambda x, path: torch.save(trained({"*": x}), path), ""),
    "trainers', before torch 1.6": ("mine.pt", lambda x, path: legacy(trained({"*": x}), path), ""),
    "a parameter": ("mine.pt", lambda x, path: torch.save(trained({"*": nn.Parameter(x)}), path), ""),
    "parameters of a module": (
        "mine.pt",
        lambda x, path: torch.save(trained(nn.ParameterDict({"*": nn.Parameter(x)})), path),
        "",
    ),
    "trainers', safetensors": ("mine.safetensors", lambda x, path: save_file({"emb_params": x}, path), ""),
    "one of two": ("mine.safetensors", lambda x, path: save_file({"clip_l": x}, path), ""),
    "nothing but numbers": ("mine.pt", torch.save, ""),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_is_read(layout: str, tmp_path: Path) -> None:
    file, write, token = LAYOUTS[layout]
    vectors = numbers(3, 768)
    write(vectors, tmp_path / file)
    seen, embedding = look(tmp_path / file), read_embedding(tmp_path / file)
    assert (seen.name, seen.token, seen.count) == ("mine", token, 3)
    assert seen.sizes == embedding.sizes == {"clip_l": (3, 768)}
    assert (embedding.name, embedding.token) == (seen.name, seen.token)
    assert embedding.vectors.keys() == {"clip_l"}
    assert torch.equal(embedding.vectors["clip_l"], vectors)
    assert not embedding.vectors["clip_l"].requires_grad


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_one_vector_of_any_precision(dtype: torch.dtype, tmp_path: Path) -> None:
    vector = numbers(1280).to(dtype)
    for path in (tmp_path / "a.safetensors", tmp_path / "a.bin"):
        (save_file if path.suffix == ".safetensors" else torch.save)({"word": vector}, path)
        assert look(path).sizes == {"clip_g": (1, 1280)}
        read = read_embedding(path).vectors["clip_g"]
        assert read.dtype == torch.float32
        assert torch.equal(read, vector.float()[None])


def test_a_file_for_two_encoders(tmp_path: Path) -> None:
    both = {"clip_l": numbers(2, 768), "clip_g": numbers(2, 1280)}
    save_file({**both, "t5": numbers(2, 4096)}, tmp_path / "a.safetensors")  # T5's are not used
    torch.save(both, tmp_path / "a.pt")
    for name in ("a.safetensors", "a.pt"):
        embedding = read_embedding(tmp_path / name)
        assert embedding.sizes == look(tmp_path / name).sizes == {"clip_l": (2, 768), "clip_g": (2, 1280)}
        assert all(torch.equal(embedding.vectors[kind], both[kind]) for kind in both)
        assert embedding.families == ("sd3",)


@pytest.mark.parametrize(
    ("width", "families"),
    [(768, ("sd15", "sd3")), (1280, ("sd3", "stable_cascade")), (1024, ()), (96, inversion.ANY_FAMILY)],
)
def test_families_by_the_width(width: int, families: tuple[str, ...], tmp_path: Path) -> None:
    save_file({"emb_params": numbers(1, width)}, tmp_path / "a.safetensors")
    assert look(tmp_path / "a.safetensors").families == families


def test_what_prompts_may_call_it(tmp_path: Path) -> None:
    folder = tmp_path / "cat-toy"
    folder.mkdir()
    for path, token in (
        (folder / "learned_embeds.bin", "<cat>"),
        (folder / "learned_embeds-steps-500.bin", "*"),
        (folder / "mine.bin", "<cat>"),
    ):
        torch.save({token: numbers(768)}, path)
    words = {path.stem: look(path).words for path in folder.iterdir()}
    assert words == {
        "learned_embeds": ("<cat>",),
        "learned_embeds-steps-500": ("cat-toy",),
        "mine": ("mine", "<cat>"),
    }


def test_a_look_takes_no_torch(tmp_path: Path) -> None:
    torch.save(trained({"*": numbers(2, 768)}), tmp_path / "a.pt")
    save_file({"word": numbers(768)}, tmp_path / "a.safetensors")
    code = (
        "import sys; from pathlib import Path; from backend.text import inversion as i; "
        "print([i.look(Path(each)).count for each in sys.argv[1:]], 'torch' in sys.modules)"
    )
    files = [str(tmp_path / name) for name in ("a.pt", "a.safetensors")]
    said = subprocess.run([sys.executable, "-c", code, *files], capture_output=True, text=True, check=True)
    assert said.stdout.split() == ["[2,", "1]", "False"]


# ---- files that are none

NONE: dict[str, tuple[str, Any, str]] = {
    "two words": ("a.bin", {"<a>": numbers(768), "<b>": numbers(768)}, r"holds 2 words \(<a>, <b>\)"),
    "two trained": ("a.pt", trained({"*": numbers(1, 768), "x": numbers(1, 768)}), "holds 2 words"),
    "two words, safetensors": ("a.safetensors", {"<a>": numbers(8), "<b>": numbers(8)}, "holds 2 words"),
    "a layer": ("a.safetensors", {"conv.weight": numbers(3, 3)}, "no embedding of textual inversion"),
    "no numbers": ("a.pt", {"a": "b"}, "no embedding of textual inversion"),
    "a list": ("a.pt", [1, 2], "no embedding of textual inversion"),
    "nothing trained": ("a.pt", trained({}), "no embedding of textual inversion"),
    "trained what": ("a.pt", trained(3), "no embedding of textual inversion"),
    "a picture": ("a.safetensors", {"a": numbers(3, 8, 8)}, r"have the shape \(3, 8, 8\)"),
    "a number": ("a.pt", {"a": torch.tensor(3.0)}, r"have the shape \(\)"),
    "no vectors": ("a.safetensors", {"a": numbers(0, 768)}, r"have the shape \(0, 768\)"),
    "too many": ("a.safetensors", {"a": torch.zeros(49408, 8)}, r"have the shape \(49408, 8\)"),
    "too wide": ("a.safetensors", {"a": torch.zeros(1, 10_000)}, r"have the shape \(1, 10000\)"),
}


@pytest.mark.parametrize("kind", NONE)
def test_files_that_hold_no_embedding(kind: str, tmp_path: Path) -> None:
    name, content, words = NONE[kind]
    (save_file if name.endswith("safetensors") else torch.save)(content, tmp_path / name)
    for read in (look, read_embedding):
        with pytest.raises(CheckpointError, match=words):
            read(tmp_path / name)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, 1])
@pytest.mark.parametrize("name", ["a.pt", "a.safetensors"])
def test_numbers_that_are_none(value: float, name: str, tmp_path: Path) -> None:
    vectors = torch.ones(2, 768, dtype=torch.int64) if value == 1 else numbers(2, 768)
    vectors[1, 3] = value
    (save_file if name.endswith("safetensors") else torch.save)({"a": vectors}, tmp_path / name)
    assert look(tmp_path / name).count == 2
    with pytest.raises(CheckpointError, match="not all of finite numbers"):
        read_embedding(tmp_path / name)


@pytest.mark.parametrize("layout", ["hub", "hub, pickled", "trainers', before torch 1.6"])
@pytest.mark.parametrize("share", [0, 0.1, 0.5, 0.98])
def test_files_that_arrived_in_part(layout: str, share: float, tmp_path: Path) -> None:
    file, write, _ = LAYOUTS[layout]
    write(numbers(3, 768), tmp_path / file)
    whole = (tmp_path / file).read_bytes()
    (tmp_path / file).write_bytes(whole[: int(share * len(whole))])
    with pytest.raises(CheckpointError, match="empty|truncated|damaged|not a safetensors|Flax"):
        read_embedding(tmp_path / file)


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    for name in ("a.pt", "a.safetensors"):
        with pytest.raises(CheckpointError, match="cannot be read"):
            look(tmp_path / name)


class Code:
    """What a pickle may hold: a call that leaves a trace."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> Any:
        return Path.touch, (self.trace,)


@pytest.mark.parametrize("zipped", [True, False])
def test_a_pickle_that_would_run_code(zipped: bool, tmp_path: Path) -> None:
    content = {**trained({"*": numbers(1, 768)}), "extra": Code(tmp_path / "ran")}
    torch.save(content, tmp_path / "a.pt", _use_new_zipfile_serialization=zipped)
    for read in (look, read_embedding):
        with pytest.raises(CheckpointError, match="holds more than weights, so reading it could run"):
            read(tmp_path / "a.pt")
    assert not (tmp_path / "ran").exists()


HOSTILE = {
    "a memo without end": b"\x80\x02}r\xff\xff\xff\x7fr\xff\xff\xff\xff.",
    "a call of a text": b"\x80\x02X\x01\x00\x00\x00a)R.",
    "nothing": b"\x80\x02.",
    "itself": b"\x80\x02}q\x00X\x01\x00\x00\x00ah\x00s.",
    "deep": b"\x80\x02" + b"(" * 5000 + b"t" * 5000 + b".",
    "deep keys": b"\x80\x02}" + b")" + b"\x85" * 5000 + b"Ks.",
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_pickles_made_to_harm(kind: str, tmp_path: Path) -> None:
    (tmp_path / "a.pt").write_bytes(pickle.dumps(0) * 3 + HOSTILE[kind])
    with pytest.raises(CheckpointError, match="damaged|no embedding"):
        look(tmp_path / "a.pt")


# ---- names in prompts

KNOWN = ["EasyNegative", "bad", "bad-hands-5", "my style", "<cat-toy>", "cat-toy", "neg (v2)", "21"]


@pytest.mark.parametrize(
    ("prompt", "names", "left"),
    [
        ("a red house", [], "a red house"),
        ("easynegative", ["EasyNegative"], ""),
        ("sea, EASYNEGATIVE, bad", ["EasyNegative", "bad"], "sea, , "),
        ("easynegatives xeasynegative easynegative_2", [], "easynegatives xeasynegative easynegative_2"),
        ("bad-hands-5", ["bad-hands-5"], ""),
        ("bad-hands-4", ["bad"], "-hands-4"),
        ("in my  style.", ["my style"], "in ."),
        ("a <cat-toy>, a cat-toy", ["<cat-toy>", "cat-toy"], "a , a "),
        ("a<CAT-TOY>b", ["<cat-toy>"], "ab"),
        (r"neg \(v2\), neg (v2)", ["neg (v2)"], ", "),
        ("(bad:1.2) [bad] ((bad))", ["bad"], "(:1.2) [] (())"),
        ("(house:21) 21 (21:1.5)", ["21"], "(house:21)  (:1.5)"),
        ("embedding:bad", ["bad"], ""),
        ("sea, Embedding:EasyNegative.pt, night", ["EasyNegative"], "sea, , night"),
        ("(embedding:bad.safetensors:1.3)", ["bad"], "(:1.3)"),
        ("see embedding:my style. embedding:bad; embedding:21", ["my style", "bad", "21"], "see . ; "),
        ("an embedding: bad", ["bad"], "an embedding: "),
        ("embedding:<cat-toy>", ["<cat-toy>"], ""),
        ("", [], ""),
    ],
)
def test_names_are_found_as_words(prompt: str, names: list[str], left: str) -> None:
    assert names_in(prompt, KNOWN) == names
    assert without_names(prompt, KNOWN) == left


@pytest.mark.parametrize(
    ("prompt", "said"),
    [
        ("embedding:easynegativ, sea", "no embedding is called 'easynegativ'; near are 'EasyNegative'"),
        ("(embedding:bad-hands-4:1.2)", "no embedding is called 'bad-hands-4'; near are 'bad-hands-5'"),
        ("embedding:bads", "no embedding is called 'bads'; near are 'bad'"),
        ("embedding:qqq.pt", "no embedding is called 'qqq'; some that are there: 'EasyNegative', 'bad'"),
    ],
)
def test_a_name_that_nothing_has(prompt: str, said: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        names_in(prompt, KNOWN)
    assert str(caught.value).startswith(said)


def test_a_name_that_is_for_another_family(tmp_path: Path) -> None:
    content = {
        "anime": {"emb_params": numbers(1, 1024)},
        "bad": {"clip_g": numbers(2, 1280)},
        "my style xl": {"clip_l": numbers(2, 768), "clip_g": numbers(2, 1280)},
    }
    away = {name: tmp_path / f"{name}.safetensors" for name in content}
    for name, path in away.items():
        save_file(content[name], path)
    assert names_in("anime, embedding:bad", KNOWN, away) == ["bad"]  # a word, and one that is here too
    with pytest.raises(InvalidRequest, match=r"^the embedding 'anime' is for Stable Diffusion 2.x, and not"):
        names_in("bad, (embedding:Anime.pt:1.2)", KNOWN, away)
    with pytest.raises(InvalidRequest, match=r"'my style xl' is for Stable Diffusion 3 or SDXL \(CLIP-L"):
        names_in("embedding:my style xl, sea", KNOWN, away)
    with pytest.raises(InvalidRequest, match="no embedding is called 'anima'"):
        names_in("embedding:anima", KNOWN, away)


def test_where_there_are_no_embeddings() -> None:
    assert names_in("easynegative", []) == []
    with pytest.raises(InvalidRequest, match="no embedding is called 'bad': there is none"):
        names_in("embedding:bad", [])


@pytest.mark.parametrize(
    ("prompt", "runs"),
    [
        ("a bad house", [("a ", 1), ("bad", 1), (" house", 1)]),
        ("(a BAD house:1.2)", [("a ", 1.2), ("bad", 1.2), (" house", 1.2)]),
        ("(bad:1.2), [[bad]]", [("bad", 1.2), (", ", 1), ("bad", 1 / 1.21)]),
        ("bad BREAK bad", [("bad", 1), BREAK, ("bad", 1)]),
        ("bad bad", [("bad", 1), (" ", 1), ("bad", 1)]),
        (r"\(neg \(v2\)\)", [("(", 1), ("neg (v2)", 1), (")", 1)]),
        ("(embedding:21:21)", [("21", 21)]),
    ],
)
def test_names_are_runs_of_their_own(prompt: str, runs: list[tuple[str, float]]) -> None:
    parsed = parse(prompt, KNOWN)
    assert [str(text) for text, _ in parsed] == [text for text, _ in runs]
    assert [weight for _, weight in parsed] == pytest.approx([weight for _, weight in runs])
    assert [isinstance(text, inversion.Name) for text, _ in parsed] == [text in KNOWN for text, _ in parsed]


def test_without_names_to_look_for_a_prompt_is_text() -> None:
    assert parse("(embedding:bad:1.2)") == [("embedding:bad", 1.2)]


def test_which_embeddings_a_request_asks_for(tmp_path: Path) -> None:
    models, home = tmp_path / "models", tmp_path / "home"
    for name, width in {"one": 768, "Two": 768, "a/three": 768, "b/Three": 768, "Large": 1280}.items():
        (models / name).parent.mkdir(parents=True, exist_ok=True)
        save_file({"emb_params": numbers(1, width)}, models / f"{name}.safetensors")
    settings = Settings(home=home, models_dir=models)

    def found(prompt: str, **fields: Any) -> list[tuple[str, str]]:
        used = adapting.plain(SD15Request(prompt=prompt, **fields), settings)[1].embeddings
        return [(each.name, each.path.relative_to(models).as_posix()) for each in used]

    assert found("ONE, large", negative_prompt="two, one") == [
        ("one", "one.safetensors"), ("two", "Two.safetensors"),
    ]  # fmt: skip
    assert found("one", raw_prompt=True) == []
    assert found("b/three house") == [("b/three", "b/Three.safetensors")]
    with pytest.raises(InvalidRequest, match=r"'three' is the name of two files \(a/three and b/Three\)"):
        found("a three")
    with pytest.raises(InvalidRequest, match=r"'large' is for Stable Cascade.*not for this family"):
        found("embedding:Large")
    with pytest.raises(InvalidRequest, match="no embedding is called 'ones'; near are 'one'"):
        found("a sea", negative_prompt="embedding:ones")


# ---- where long prompts are cut

W, C = "w", ","


@pytest.mark.parametrize(
    ("tokens", "sizes"),
    [
        ([W] * 70 + [5], [75]),
        ([W] * 71 + [5], [71, 5]),
        ([W] * 60 + [C] + [W] * 10 + [5], [61, 15]),  # the phrase before it stays whole, too
        ([W] * 40 + [C] + [W] * 29 + [6], [70, 6]),  # that comma is too far back
        ([W] * 40 + [75], [40, 75]),
        ([75, 75], [75, 75]),
        ([W, 100], [1, 75, 25]),  # more than a chunk holds
        ([100], [75, 25]),
        ([30, 30, 30], [60, 30]),
        ([W] * 45 + [C] + [W] * 15 + [14, C, 3], [75, 4]),
        ([W] * 59 + [C] + [W] * 15 + [60], [60, 75]),
        ([5, None, 5], [5, 5]),
    ],
)
def test_vectors_of_one_word_stay_together(tokens: list[Any], sizes: list[int]) -> None:
    whole: list[Token | None] = []
    for each in tokens:
        if isinstance(each, int):
            whole += [Token(0, 1.0, torch.zeros(4), nth) for nth in range(each)]
        else:
            whole.append(None if each is None else Token(COMMA if each == C else 1))
    assert [len(chunk) for chunk in chunks_of(whole, 75, COMMA)] == sizes


# ---- for an encoder


def embedding(**vectors: Tensor) -> inversion.Embedding:
    sizes = {name: (len(each), each.shape[1]) for name, each in vectors.items()}
    return inversion.Embedding(name="x", token="", sizes=sizes, vectors=vectors)


SD15, SD3, CASCADE = {"clip_l": 768}, {"clip_l": 768, "clip_g": 1280}, {"clip_g": 1280}


def test_vectors_go_to_the_encoder_that_they_are_for() -> None:
    small, large = numbers(2, 768), numbers(3, 1280)
    known = {"l": embedding(clip_l=small), "g": embedding(clip_g=large)}
    both = fitting({**known, "both": embedding(clip_l=small, clip_g=large)}, SD3)
    assert list(both) == ["clip_l", "clip_g"]
    assert {name: tuple(each.shape) for name, each in both["clip_l"].items()} == {
        "l": (2, 768), "g": (0, 768), "both": (2, 768),
    }  # fmt: skip
    assert {name: tuple(each.shape) for name, each in both["clip_g"].items()} == {
        "l": (0, 1280), "g": (3, 1280), "both": (3, 1280),
    }  # fmt: skip
    assert both["clip_g"]["both"] is large
    assert fitting({"l": known["l"]}, SD15)["clip_l"]["l"] is small
    assert fitting({"g": known["g"]}, CASCADE)["clip_g"]["g"] is large
    odd = numbers(1, 96)
    assert fitting({"odd": embedding(**{"96": odd})}, {"clip_g": 96})["clip_g"]["odd"] is odd


@pytest.mark.parametrize(
    ("vectors", "widths", "said"),
    [
        (
            {"clip_g": (1, 1280)},
            SD15,
            "Stable Cascade, SDXL or Stable Diffusion 3.*have 1280.*checkpoint 768",
        ),
        ({"clip_l": (1, 768)}, CASCADE, r"for Stable Diffusion 1.x \(CLIP-L\).*have 768.*checkpoint 1280"),
        ({"1024": (1, 1024)}, SD15, "is for Stable Diffusion 2.x: its vectors have 1024 numbers"),
        ({"1024": (1, 1024)}, SD3, r"Stable Diffusion 2.x.*checkpoint 768 \+ 1280"),
        ({"clip_l": (1, 768), "clip_g": (1, 1280)}, SD15, r"3 or SDXL.*have 768 \+ 1280"),
        ({"clip_l": (1, 768), "clip_g": (1, 1280)}, CASCADE, "is for Stable Diffusion 3 or SDXL"),
        ({"clip_l": (1, 768)}, {"clip_l": 128}, r"is for Stable Diffusion 1.x .*of this checkpoint 128"),
        ({"77": (1, 77)}, SD15, "is for another text encoder"),
    ],
)
def test_vectors_that_no_encoder_takes(
    vectors: dict[str, tuple[int, int]], widths: dict[str, int], said: str
) -> None:
    with pytest.raises(InvalidRequest, match=f"^the embedding 'bad' .*{said}"):
        check_fits("bad", vectors, widths)
    with pytest.raises(InvalidRequest, match=said):
        fitting({"bad": embedding(**{kind: numbers(*size) for kind, size in vectors.items()})}, widths)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> CLIPTokenizer:
    return CLIPTokenizer.from_pretrained(tokenizer_files(tmp_path_factory.mktemp("tokenizer")))


@pytest.fixture
def encoder(tokenizer: CLIPTokenizer) -> CLIPTextModelWithProjection:
    torch.manual_seed(0)
    ends: dict[str, Any] = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id")}
    config = CLIPTextConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=2, hidden_act="gelu", projection_dim=16,
        **ends,
    )  # fmt: skip
    return unlike_at_start(CLIPTextModelWithProjection(config)).eval()


VECTORS = {"bad": numbers(3, 32), "one": numbers(1, 32, seed=1), "none": numbers(0, 32)}


@pytest.fixture
def encode(encoder: CLIPTextModelWithProjection, tokenizer: CLIPTokenizer) -> Any:
    def run(*prompts: str, embeddings: Any = VECTORS, **options: Any) -> tuple[Tensor, Tensor]:
        return encode_pooled_prompts(encoder, tokenizer, prompts, embeddings=embeddings, **options)

    return run


def close(ours: Tensor, theirs: Tensor) -> bool:
    return ours.shape == theirs.shape and torch.allclose(ours, theirs, atol=1e-5)


def table_of(encoder: Any) -> nn.Embedding:
    return encoder.get_input_embeddings()


def by_hand(encoder: CLIPTextModelWithProjection, tokens: Tensor, end: int) -> tuple[Tensor, Tensor]:
    """Features before the last norm, and pooled ones of the place `end`, of vectors (L, D) that are read."""
    model = encoder.text_model
    x = (tokens + model.embeddings.position_embedding.weight[: len(tokens)])[None]
    ahead = torch.full((len(tokens), len(tokens)), -torch.inf).triu(1)
    for layer in model.encoder.layers:
        x = layer(x, ahead[None, None])
    return x, encoder.text_projection(model.final_layer_norm(x)[:, end])


@torch.no_grad()
def test_vectors_are_read_in_place_of_tokens(
    encode: Any, encoder: CLIPTextModelWithProjection, tokenizer: CLIPTokenizer
) -> None:
    ids = tokenizer("a red house", padding="max_length", max_length=77, return_tensors="pt").input_ids
    plain = table_of(encoder)(ids)[0]  # begin, a, red, house, end, and the padding
    written = torch.cat([plain[:2], VECTORS["bad"], plain[2:3], VECTORS["one"], plain[3:]])[:77]
    features, pooled = encode("a bad red ONE house")
    expected, summary = by_hand(encoder, written, end=8)
    assert close(features, expected)
    assert close(pooled, summary)  # of the true end: no id is beyond it
    assert close(encode("a none red house")[0], encode("a red house")[0])
    assert close(encode("a (bad:1) red embedding:one house")[0], features)


def test_each_prompt_has_its_own(encode: Any) -> None:
    both, pooled = encode("bad red", "red one")
    alone = [encode(prompt) for prompt in ("bad red", "red one")]
    assert close(both, torch.cat([each for each, _ in alone]))
    assert close(pooled, torch.cat([each for _, each in alone]))


def test_a_weight_is_that_of_all_vectors(encode: Any) -> None:
    plain, heavy = encode("a bad house")[0][0], encode("a (bad:1.5) house")[0][0]
    ratio = heavy / plain
    factors = torch.cat([ratio[:2], ratio[5:]]).mean()
    assert ratio[2:5].std() < 1e-3
    assert (ratio[2:5].mean() / factors).item() == pytest.approx(1.5, rel=1e-3)


def test_raw_prompts_have_no_names(encode: Any) -> None:
    assert close(
        encode("bad embedding:bad", raw=True)[0], encode("bad embedding:bad", raw=True, embeddings={})[0]
    )
    assert not close(encode("bad")[0], encode("bad", raw=True)[0])


def test_vectors_stay_together_where_a_prompt_is_cut(
    encode: Any, encoder: CLIPTextModelWithProjection, tokenizer: CLIPTokenizer
) -> None:
    words = "sea " * 73
    features, _ = encode(f"{words} bad")
    assert close(features, encode(f"{words} BREAK bad")[0])
    prompts = [f"{words} bad", "none"]
    assert count_chunks(tokenizer, encoder, prompts, embeddings=VECTORS) == 2
    assert count_chunks(tokenizer, encoder, prompts, embeddings={**VECTORS, "bad": VECTORS["none"]}) == 1
    assert encode("sea", chunks=2)[0].shape == (1, 154, 32)
    assert close(encode("sea", chunks=2)[0], torch.cat([encode("sea")[0], encode("")[0]], dim=1))


def break_off(encoder: CLIPTextModelWithProjection) -> None:
    with inversion.put_in(encoder, {(0, 1): VECTORS["one"][0]}):
        assert len(table_of(encoder)._forward_hooks) == 1
        encoder(input_ids=torch.tensor([[0]]))  # no such place


def test_nothing_is_left_in_the_encoder(
    encode: Any, encoder: CLIPTextModelWithProjection, tokenizer: CLIPTokenizer
) -> None:
    table = table_of(encoder)
    before, weights = encode("a red house"), table.weight.detach().clone()
    encode("a bad house")
    assert not table._forward_hooks
    with pytest.raises(IndexError):
        break_off(encoder)
    assert not table._forward_hooks
    assert torch.equal(table.weight, weights)
    assert torch.equal(encode("a red house")[0], before[0])
    assert tokenizer.get_vocab().keys().isdisjoint({"bad", "bad</w>"})


def test_vectors_of_another_width(encode: Any) -> None:
    with pytest.raises(InvalidRequest, match="'bad' is for Stable Diffusion 2.x: .* of this checkpoint 32"):
        encode("bad", embeddings={"bad": numbers(1, 1024)})
    with pytest.raises(InvalidRequest, match=r"'bad' is for Stable Diffusion 1.x \(CLIP-L\)"):
        encode("bad", embeddings={"bad": numbers(2, 768)})


def test_a_streamed_encoder_in_bfloat16(encoder: Any, tokenizer: CLIPTokenizer) -> None:
    module = encoder.text_model.to(torch.bfloat16)
    without = encode_prompts(module, tokenizer, ["a bad house"])
    whole = encode_prompts(module, tokenizer, ["a bad house"], embeddings=VECTORS)
    assert not torch.equal(whole, without)
    homes = {name: tensor.clone() for name, tensor in tensors_of(module).items()}
    with Streamer(module, homes, torch.device("cpu"), held=0, slots=1):
        streamed = encode_prompts(module, tokenizer, ["a bad house"], embeddings=VECTORS)
    assert whole.dtype == torch.bfloat16
    assert torch.equal(streamed, whole)
