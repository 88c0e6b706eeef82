"""The demo text side of Stable Diffusion 3: two CLIP text models and a T5 encoder, each of which reads alone.

Letters: B captions, L tokens, W and V the widths of the CLIP models, D that of T5 and of the joint context.
"""

from __future__ import annotations

import random
import string
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import CLIPTextModelWithProjection, T5Config, T5EncoderModel, T5Tokenizer

from training.loop import Recipe, fit
from training.postcards import vocabulary
from training.text import COUNTS, TOKENS, caption_tokenizer, reading_losses, text_config, token_ids

WIDTHS = (48, 80)  # of the two CLIP models and of their projected pooled texts
JOINT = 128  # the width of T5, no less than both of them
ACTIVATIONS = ("quick_gelu", "gelu")
PADS = ("<|endoftext|>", "!")  # as in the published tokenizers
EMBEDDING_SCALE = 25.0
CAPITAL = 0.2  # of the captions begin with a capital, half as many have one in every word

Texts = tuple[Tensor, Tensor, Tensor]


def write_t5_tokenizer(folder: Path) -> None:
    """A Unigram tokenizer in which each caption word is one token, also with a capital or after a hyphen;
    other words in ASCII are spelled, and other characters are unknown, as they are to T5."""
    words = vocabulary()
    pieces = {"<pad>": 0.0, "</s>": 0.0, "<unk>": 0.0, "▁": -8.0}
    for forms, score in (
        ([f"▁{word}" for word in words], -4.0),
        ([f"▁{word.capitalize()}" for word in words], -5.0),
        (words, -6.0),
        (sorted({*string.printable} - {*string.whitespace}), -12.0),
    ):
        pieces |= {piece: score for piece in forms if piece not in pieces}
    T5Tokenizer(vocab=list(pieces.items()), extra_ids=0, model_max_length=TOKENS).save_pretrained(folder)


def t5_config(tokenizer: T5Tokenizer) -> T5Config:
    return T5Config(
        vocab_size=len(tokenizer),
        d_model=JOINT,
        d_kv=32,
        d_ff=2 * JOINT,
        num_layers=2,
        num_heads=4,
        feed_forward_proj="gated-gelu",
        dropout_rate=0.0,
        is_encoder_decoder=False,
        use_cache=False,
        pad_token_id=0,
        eos_token_id=1,
    )


class TextEncoders(nn.Module):
    """The three encoders with their tokenizers, written to `folder` and read back."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.clip_tokenizers = [
            caption_tokenizer(folder / name, pad=pad)
            for name, pad in zip(("tokenizer", "tokenizer_2"), PADS, strict=True)
        ]
        write_t5_tokenizer(folder / "tokenizer_3")
        self.t5_tokenizer = T5Tokenizer.from_pretrained(folder / "tokenizer_3")
        self.clips = nn.ModuleList(
            CLIPTextModelWithProjection(text_config(tokenizer, width=width, activation=activation))
            for tokenizer, width, activation in zip(self.clip_tokenizers, WIDTHS, ACTIVATIONS, strict=True)
        )
        self.t5 = T5EncoderModel(t5_config(self.t5_tokenizer))
        with torch.no_grad():  # of the size of T5's features, beside which the denoiser meets these
            for name, weight in self.clips.named_parameters():
                if "embedding" in name:
                    weight.mul_(EMBEDDING_SCALE)

    def forward(self, texts: list[str]) -> tuple[list[Texts], Tensor]:
        """→ of each CLIP model its ids, tokens (B, L, W) and pooled text (B, W); T5's tokens (B, L, D).

        As in the published pipeline the tokens are from before the last layer, and padding is attended to."""
        read: list[Texts] = []
        for tokenizer, clip in zip(self.clip_tokenizers, self.clips, strict=True):
            ids = token_ids(tokenizer, texts)
            output = clip(input_ids=ids, output_hidden_states=True)
            read.append((ids, output.hidden_states[-2], output.text_embeds))
        return read, self.t5(input_ids=token_ids(self.t5_tokenizer, texts)).last_hidden_state

    def encode(self, texts: list[str]) -> Texts:
        """Texts → what the denoiser is told: the CLIP models' tokens (B, L, D), zero-padded, T5's tokens
        (B, L, D) and the pooled text (B, W + V)."""
        read, t5 = self(texts)
        tokens = torch.cat([tokens for _, tokens, _ in read], -1)
        pooled = torch.cat([pooled for _, _, pooled in read], -1)
        return functional.pad(tokens, (0, JOINT - tokens.shape[-1])), t5, pooled


class Reader(nn.Module):
    """The encoders with a head on each output that names the attributes: only for the training."""

    def __init__(self, encoders: TextEncoders) -> None:
        super().__init__()
        self.encoders = encoders
        scores = sum(COUNTS) + 1
        self.token_heads = nn.ModuleList(nn.Linear(width, scores) for width in (*WIDTHS, JOINT))
        self.pooled_heads = nn.ModuleList(nn.Linear(width, scores) for width in WIDTHS)

    def forward(self, texts: list[str]) -> dict[str, Tensor]:
        """Texts → attribute scores, and that of clouds, (B, 30) of every output."""
        read, t5 = self.encoders(texts)
        tokens = [*(tokens for _, tokens, _ in read), t5]
        said = {
            f"tokens {number}": head(functional.layer_norm(one, one.shape[2:]).mean(1))
            for number, (head, one) in enumerate(zip(self.token_heads, tokens, strict=True), 1)
        }
        for number, (head, (_, _, pooled)) in enumerate(zip(self.pooled_heads, read, strict=True), 1):
            said[f"pooled {number}"] = head(pooled)
        return said


def teach_encoders(encoders: TextEncoders, recipe: Recipe, checkpoint: Path) -> None:
    """Teaches every encoder all that captions say, for they stay as they are while a denoiser learns."""
    reader = Reader(encoders)
    fit(reader, reading_losses(reader, capitalised), recipe, checkpoint)


def capitalised(text: str, rng: random.Random) -> str:
    """Now and then with capitals, which T5 tells from small letters, and CLIP does not."""
    draw = rng.random()
    if draw < CAPITAL / 2:
        return text.title()
    return text[:1].upper() + text[1:] if draw < CAPITAL * 1.5 else text
