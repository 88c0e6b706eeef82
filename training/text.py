"""The demo text side: a byte-level BPE tokenizer, a token per caption word, and small CLIP text models."""

from __future__ import annotations

import json
import random
from collections import Counter
from collections.abc import Callable, Mapping
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    PreTrainedTokenizerBase,
)

from training.loop import Losses, Recipe, fit
from training.postcards import ATTRIBUTES, WORDS_LEFT_OUT, Scene, caption, random_scene, vocabulary

TOKENS = 32
COUNTS = [len(values) for values in ATTRIBUTES.values()]
START, END = "<|startoftext|>", "<|endoftext|>"
WORD_END = "</w>"


def byte_letters() -> list[str]:
    """A printable letter for each byte, those that print as themselves first: the alphabet of byte-level BPE
    (Radford et al. 2019), in the order in which CLIP's vocabulary lists it."""
    plain = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in plain]
    return [chr(byte) for byte in plain] + [chr(256 + index) for index in range(len(others))]


def learn_merges(words: list[str]) -> list[tuple[str, str]]:
    """Byte-pair merges, the most frequent pair first, until each of `words` is one token."""
    spelled = [[*word[:-1], word[-1] + WORD_END] for word in words]
    merges: list[tuple[str, str]] = []
    while True:
        pairs = Counter(pair for pieces in spelled for pair in pairwise(pieces))
        if not pairs:
            return merges
        best = min(pairs, key=lambda pair: (-pairs[pair], pair))
        merges.append(best)
        spelled = [merge(pieces, best) for pieces in spelled]


def merge(pieces: list[str], pair: tuple[str, str]) -> list[str]:
    merged: list[str] = []
    for piece in pieces:
        if merged and (merged[-1], piece) == pair:
            merged[-1] += piece
        else:
            merged.append(piece)
    return merged


def write_tokenizer(folder: Path, words: list[str], *, pad: str = END) -> None:
    """A CLIP tokenizer for any text, in which each of `words` (lower case) is one token."""
    letters, merges = byte_letters(), learn_merges(words)
    tokens = [*letters, *(letter + WORD_END for letter in letters), *(a + b for a, b in merges), START, END]
    ids = {token: index for index, token in enumerate(tokens)}
    config = {
        "tokenizer_class": "CLIPTokenizer",
        "model_max_length": TOKENS,
        "bos_token": START,
        "eos_token": END,
        "unk_token": END,
        "pad_token": pad,
        "do_lower_case": True,
        "errors": "replace",
        "add_prefix_space": False,
    }
    special = {name: config[name] for name in ("bos_token", "eos_token", "unk_token", "pad_token")}
    folder.mkdir(parents=True, exist_ok=True)
    lines = ["#version: 0.2", *(f"{a} {b}" for a, b in merges)]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    for name, content in (
        ("vocab.json", ids),
        ("tokenizer_config.json", config),
        ("special_tokens_map.json", special),
    ):
        (folder / name).write_text(json.dumps(content, ensure_ascii=False, indent=0) + "\n", encoding="utf-8")


def caption_tokenizer(folder: Path, *, pad: str = END) -> CLIPTokenizer:
    """The tokenizer of the caption words, written to `folder` and read back as any user of it reads it."""
    write_tokenizer(folder, vocabulary(), pad=pad)
    return CLIPTokenizer.from_pretrained(folder)


def text_config(
    tokenizer: CLIPTokenizer,
    *,
    width: int = 128,
    layers: int = 2,
    heads: int = 4,
    activation: str = "quick_gelu",
) -> CLIPTextConfig:
    ids = tokenizer.get_vocab()
    return CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=4 * width,
        projection_dim=width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        max_position_embeddings=TOKENS,
        hidden_act=activation,
        bos_token_id=ids[START],
        eos_token_id=ids[END],
        pad_token_id=ids[str(tokenizer.pad_token)],
    )


def token_ids(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> Tensor:
    """(B, 32) token ids, padded with the tokenizer's pad token."""
    padded = tokenizer(texts, padding="max_length", max_length=TOKENS, truncation=True, return_tensors="pt")
    return padded["input_ids"]


def words_for(scene: Scene, rng: random.Random, dropout: float) -> str:
    """A caption, or now and then none: what guidance leads away from."""
    return "" if rng.random() < dropout else caption(scene, rng)


def attribute_head(text_model: CLIPTextModel) -> nn.Linear:
    """From the pooled text to a score for each value of each attribute: (B, D) → (B, 29)."""
    return nn.Linear(text_model.config.hidden_size, sum(COUNTS))


def attribute_loss(scores: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy summed over the attributes: scores (B, 29), labels (B, 6)."""
    parts = scores.split(COUNTS, 1)
    wrong = [functional.cross_entropy(part, labels[:, index]) for index, part in enumerate(parts)]
    return torch.stack(wrong).sum()


class CaptionReader(nn.Module):
    """The text model with a head that names the attributes at the end token: only for the warm-up."""

    def __init__(self, text_model: CLIPTextModel) -> None:
        super().__init__()
        self.text_model = text_model
        self.head = attribute_head(text_model)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.text_model(input_ids=ids).pooler_output)


def warm_up(
    text_model: CLIPTextModel, tokenizer: CLIPTokenizer, recipe: Recipe, checkpoint: Path
) -> CLIPTextModel:
    """Teaches the text model what captions say, so that the UNet never learns to ignore it."""
    reader = CaptionReader(text_model)

    def losses_at(step: int, _: torch.Generator) -> Losses:
        rng = random.Random(step)
        scenes = [random_scene(rng) for _ in range(64)]
        labels = torch.tensor([scene.labels() for scene in scenes])
        scores = reader(token_ids(tokenizer, [caption(scene, rng, left_out=0) for scene in scenes]))
        best = torch.stack([part.argmax(1) for part in scores.split(COUNTS, 1)], 1)
        return {"loss": attribute_loss(scores, labels), "right": (best == labels).float().mean()}

    fit(reader, losses_at, recipe, checkpoint)
    return text_model


class ProjectedReader(nn.Module):
    """The text model as Stable Cascade reads it, with heads that name the attributes: one from the projected
    pooled text, one from the tokens before the final norm. Only for the training."""

    def __init__(self, text_model: CLIPTextModelWithProjection) -> None:
        super().__init__()
        self.text_model = text_model
        width, projected = text_model.config.hidden_size, text_model.text_projection.out_features
        self.pooled_head = nn.Linear(projected, sum(COUNTS) + 1)
        self.token_head = nn.Linear(width, sum(COUNTS) + 1)

    def forward(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Token ids (B, 32) → attribute scores (B, 29), and that of clouds, from both: (B, 30) twice."""
        pooled, tokens = pooled_and_tokens(self.text_model, ids)
        return self.pooled_head(pooled), self.token_head(
            functional.layer_norm(tokens, tokens.shape[2:]).mean(1)
        )


def pooled_and_tokens(text_model: CLIPTextModelWithProjection, ids: Tensor) -> tuple[Tensor, Tensor]:
    """The projected pooled text (B, D) and the tokens before the final norm (B, 32, W).

    As in the published pipelines no token attends to the padding, which is end tokens after the first.
    """
    is_end = (ids == ids[:, -1:]).int()  # every row ends with one
    mask = (is_end.cumsum(1) - is_end == 0).int()  # 1 up to the first end token
    output = text_model(input_ids=ids, attention_mask=mask, output_hidden_states=True)
    return output.text_embeds, output.hidden_states[-1]


def teach_reading(
    text_model: CLIPTextModelWithProjection, tokenizer: CLIPTokenizer, recipe: Recipe, checkpoint: Path
) -> CLIPTextModelWithProjection:
    """Teaches the text model all that captions say, for it stays as it is while denoisers learn from it.

    Half of the captions say everything: how many attributes are read right is measured on them.
    """
    reader = ProjectedReader(text_model)

    def read(texts: list[str]) -> dict[str, Tensor]:
        pooled, tokens = reader(token_ids(tokenizer, texts))
        return {"pooled": pooled, "tokens": tokens}

    fit(reader, reading_losses(read), recipe, checkpoint)
    return text_model.eval()


def as_said(text: str, _: random.Random) -> str:
    return text


def reading_losses(
    read: Callable[[list[str]], Mapping[str, Tensor]],
    rewrite: Callable[[str, random.Random], str] = as_said,
) -> Callable[[int, torch.Generator], Losses]:
    """What `fit` minimises where `read` makes attribute scores, and that of clouds, of captions: (B, 30) for
    each of some named features. `rewrite` has the last word on every caption."""

    def losses_at(_: int, generator: torch.Generator) -> Losses:
        rng = random.Random(int(torch.randint(2**31, (), generator=generator)))
        scenes = [random_scene(rng) for _ in range(64)]
        texts = [
            rewrite(caption(scene, rng, left_out=WORDS_LEFT_OUT * (index % 2)), rng)
            for index, scene in enumerate(scenes)
        ]
        labels = torch.tensor([scene.labels() for scene in scenes])
        clouds = torch.tensor([float(scene.clouds) for scene in scenes])
        losses, right = [], {}
        for name, scores in read(texts).items():
            losses.append(attribute_loss(scores[:, :-1], labels))
            losses.append(functional.binary_cross_entropy_with_logits(scores[:, -1], clouds))
            best = torch.stack([part.argmax(1) for part in scores[:, :-1].split(COUNTS, 1)], 1)
            right[name] = (best == labels)[::2].float().mean()
        return {"loss": torch.stack(losses).sum(), **right}

    return losses_at
