"""Prompts as they are widely written: weights in brackets, and texts longer than the encoder reads at once.

    (word)       attend 1.1 times as much; brackets nest: ((word)) 1.21 times
    [word]       attend 1.1 times less
    (word:1.3)   attend 1.3 times as much
    \\( \\) \\[ \\] \\\\   the characters themselves
    BREAK        what follows begins a new chunk
    name, embedding:name   the vectors of an embedding (`backend.text.inversion`)

A bracket that is never closed reaches to the end of the prompt; one that was never opened is a character.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from backend.errors import CheckpointError, InvalidRequest
from backend.text.inversion import Name, check_width, pieces, put_in

if TYPE_CHECKING:
    from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer, PreTrainedModel

BREAK = ("BREAK", -1.0)
ROUND, SQUARE = 1.1, 1 / 1.1
COMMA_REACH = 20  # how many tokens back from a chunk's end a comma may cut it, so that phrases stay whole
MAX_DEPTH, MAX_WEIGHT, MAX_CHUNKS = 64, 1000.0, 32

SYNTAX = re.compile(
    r"""
    \\(?P<escaped>[()\[\]\\])
  | (?P<open>[(\[])
  | :\s*(?P<weight>[+-]?(?:\d+\.?\d*|\.\d+))\s*\)
  | (?P<close>[)\]])
  | (?P<text>[^\\()\[\]:]+|.)
    """,
    re.VERBOSE | re.DOTALL,
)

NO_EMBEDDINGS: Mapping[str, Tensor] = {}


class Token(NamedTuple):
    """`vector` (D,) is what stands there instead of the vocabulary's, the `nth` of an embedding's."""

    id: int
    weight: float = 1.0
    vector: Tensor | None = None
    nth: int = 0


def parse(prompt: str, names: Sequence[str] | None = None) -> list[tuple[str, float]]:
    """The prompt as runs of text of one weight, with `BREAK` between chunks, and a `Name` for each of the
    `names` of embeddings in it, if they are looked for.

    Raises InvalidRequest for brackets nested, or weights multiplied, beyond any use, and for an embedding
    that is not known.
    """
    runs: list[tuple[str, float]] = []
    opened: dict[str, list[int]] = {"(": [], "[": []}  # the runs at which brackets still open began

    def weigh(start: int, factor: float) -> None:
        runs[start:] = [(text, weight * factor) for text, weight in runs[start:]]

    for match in _marks(prompt, names):
        if isinstance(match, Name):
            runs.append((match, 1.0))
        elif bracket := match["open"]:
            opened[bracket].append(len(runs))
            if len(opened["("]) + len(opened["["]) > MAX_DEPTH:
                raise InvalidRequest(f"the prompt nests its brackets deeper than {MAX_DEPTH}")
        elif match["weight"] and opened["("]:
            weigh(opened["("].pop(), float(match["weight"]))
        elif match["close"] == ")" and opened["("]:
            weigh(opened["("].pop(), ROUND)
        elif match["close"] == "]" and opened["["]:
            weigh(opened["["].pop(), SQUARE)
        else:
            runs.append((match["escaped"] or match[0], 1.0))
    for bracket, factor in (("(", ROUND), ("[", SQUARE)):
        for start in opened[bracket]:
            weigh(start, factor)
    return _with_breaks(_joined(runs))


def _marks(prompt: str, names: Sequence[str] | None) -> Iterator[re.Match[str] | Name]:
    for piece in [prompt] if names is None else pieces(prompt, names):
        if isinstance(piece, Name):
            yield piece
        else:
            yield from SYNTAX.finditer(piece)


def _joined(runs: list[tuple[str, float]]) -> list[tuple[str, float]]:
    """Neighbours of one weight as one run; names stay apart."""
    joined: list[tuple[str, float]] = []
    for text, weight in runs:
        if not abs(weight) <= MAX_WEIGHT:
            raise InvalidRequest(f"the weight of {text[:40]!r} is {weight:g}; it can be up to {MAX_WEIGHT:g}")
        if joined and joined[-1][1] == weight and not isinstance(text, Name):
            before = joined[-1][0]
            text = text if isinstance(before, Name) else joined.pop()[0] + text
        joined.append((text, weight))
    return joined


def _with_breaks(runs: list[tuple[str, float]]) -> list[tuple[str, float]]:
    out: list[tuple[str, float]] = []
    for text, weight in runs:
        split = [text] if isinstance(text, Name) else re.split(r"\s*\bBREAK\b\s*", text)
        for index, piece in enumerate(split):
            out += [BREAK] * (index > 0) + [(piece, weight)] * bool(piece)
    return out


def chunks_of(tokens: Sequence[Token | None], size: int, comma: int | None) -> list[list[Token]]:
    """Cut tokens into chunks of at most `size`, at None, and where possible after the token `comma`.

    The vectors of an embedding are cut apart only if there are more than `size` of them.
    """
    chunks: list[list[Token]] = []
    chunk: list[Token] = []
    for token in tokens:
        if token is None:
            chunks.append(chunk)
            chunk = []
            continue
        if len(chunk) == size:
            whole = size - token.nth  # where the embedding begins that goes on here
            cut = size if token.id == comma else _cut(chunk[:whole] if whole > 0 else chunk, comma)
            chunks.append(chunk[:cut])
            chunk = chunk[cut:]
        chunk.append(token)
    return [*chunks, chunk] if chunk or not chunks else chunks


def _cut(chunk: list[Token], comma: int | None) -> int:
    for index in range(len(chunk) - 1, max(len(chunk) - COMMA_REACH, 0) - 1, -1):
        if chunk[index].id == comma:
            return index + 1
    return len(chunk)


@dataclass(frozen=True, kw_only=True)
class Tokens:
    """Prompts as token ids (B·n, L): n chunks a prompt, as the longest needs, of L tokens each.

    `weights` are those of the tokens, `mask` is 1 for all but the padding. Shorter prompts are filled up
    with the chunks of an empty one. `vectors` (D,) are what embeddings have at a (row, place).
    """

    prompts: int
    ids: Tensor
    weights: Tensor
    mask: Tensor
    vectors: Mapping[tuple[int, int], Tensor]

    def joined(self, features: Tensor) -> Tensor:
        """Features (B·n, L, D) weighted and put one chunk behind the other → (B, n·L, D)."""
        scaled = weighted(features, self.weights.to(features.device))
        return scaled.reshape(self.prompts, -1, features.shape[-1])


def tokenise(
    tokenizer: CLIPTokenizer,
    encoder: PreTrainedModel,
    prompts: Sequence[str],
    *,
    raw: bool = False,
    embeddings: Mapping[str, Tensor] = NO_EMBEDDINGS,
    chunks: int = 1,
) -> Tokens:
    """`raw` takes each prompt as plain text and cuts it at L; else `embeddings` are those that prompts may
    name: their vectors (n, D) for this encoder, (0, D) for a name that is left out. There are `chunks` of
    each prompt, or as many as the longest takes.

    Raises InvalidRequest for a prompt beyond reason, for an embedding that is not known or of another width,
    and CheckpointError for a tokenizer of another encoder.
    """
    length = _length(tokenizer, encoder)
    for name, vectors in embeddings.items():
        check_width(name, vectors.shape, encoder.config.hidden_size)
    chunked = _chunked(tokenizer, prompts, length, raw=raw, embeddings=embeddings)
    count = max(chunks, *map(len, chunked))
    if count > MAX_CHUNKS:
        raise InvalidRequest(
            f"the prompt takes {count} chunks of {length - 2} tokens; it can take up to {MAX_CHUNKS}"
        )
    rows = [row for chunks in chunked for row in (*chunks, *[[]] * (count - len(chunks)))]
    ids = torch.tensor([_padded(tokenizer, row, length) for row in rows], device=encoder.device)
    if ids.max() >= encoder.config.vocab_size:
        raise CheckpointError(
            f"the tokenizer does not belong to the text encoder: it gives token {int(ids.max())}, "
            f"and the encoder knows {encoder.config.vocab_size}"
        )
    weights, mask = torch.ones(ids.shape), torch.zeros_like(ids)
    for index, row in enumerate(rows):
        weights[index, 1 : len(row) + 1] = torch.tensor([token.weight for token in row])
        mask[index, : len(row) + 2] = 1
    vectors = {
        (index, place): token.vector
        for index, row in enumerate(rows)
        for place, token in enumerate(row, start=1)
        if token.vector is not None
    }
    return Tokens(prompts=len(prompts), ids=ids, weights=weights, mask=mask, vectors=vectors)


def count_chunks(
    tokenizer: CLIPTokenizer,
    encoder: PreTrainedModel,
    prompts: Sequence[str],
    *,
    raw: bool = False,
    embeddings: Mapping[str, Tensor] = NO_EMBEDDINGS,
) -> int:
    """How many the longest prompt takes; of two encoders, one may have more vectors for a name in it."""
    length = _length(tokenizer, encoder)
    return max(map(len, _chunked(tokenizer, prompts, length, raw=raw, embeddings=embeddings)))


@torch.no_grad()
def encode_prompts(
    encoder: CLIPTextModel,
    tokenizer: CLIPTokenizer,
    prompts: Sequence[str],
    *,
    raw: bool = False,
    clip_skip: int = 0,
    embeddings: Mapping[str, Tensor] = NO_EMBEDDINGS,
) -> Tensor:
    """Prompts → features (B, n·L, D) of the last layer and the final LayerNorm, for n chunks of L tokens.

    `clip_skip` leaves out that many of the last layers. Raises what `tokenise` does, and InvalidRequest for
    a `clip_skip` that the encoder has no layers for.
    """
    check_clip_skip(encoder.config.num_hidden_layers, clip_skip)
    tokens = tokenise(tokenizer, encoder, prompts, raw=raw, embeddings=embeddings)
    with put_in(encoder, tokens.vectors):
        out = encoder(input_ids=tokens.ids, output_hidden_states=clip_skip > 0)
    if clip_skip:
        features = encoder.final_layer_norm(out.hidden_states[-(clip_skip + 1)])
    else:
        features = out.last_hidden_state  # (B·n, L, D)
    return tokens.joined(features)


@torch.no_grad()
def encode_pooled_prompts(
    encoder: CLIPTextModelWithProjection,
    tokenizer: CLIPTokenizer,
    prompts: Sequence[str],
    *,
    raw: bool = False,
    clip_skip: int = 0,
    early: int = 0,
    masked: bool = False,
    embeddings: Mapping[str, Tensor] = NO_EMBEDDINGS,
    chunks: int = 1,
) -> tuple[Tensor, Tensor]:
    """Prompts → features (B, n·L, D) before the final LayerNorm, and pooled and projected ones (B, D_pooled).

    The features leave out `early` of the last layers, and `clip_skip` more; the pooled ones, of each prompt's
    first chunk, are of the last. `masked` hides the padding. Raises what `encode_prompts` does.
    """
    check_clip_skip(encoder.config.num_hidden_layers, clip_skip, early)
    tokens = tokenise(tokenizer, encoder, prompts, raw=raw, embeddings=embeddings, chunks=chunks)
    mask = tokens.mask if masked else None
    with put_in(encoder, tokens.vectors):
        out = encoder(input_ids=tokens.ids, attention_mask=mask, output_hidden_states=True)
    pooled = out.text_embeds.unflatten(0, (len(prompts), -1))[:, 0]
    return tokens.joined(out.hidden_states[-(clip_skip + early + 1)]), pooled


def check_clip_skip(layers: int, clip_skip: int, early: int = 0) -> None:
    """Raises InvalidRequest for more than an encoder has, `early` of whose layers are left out anyway."""
    most = max(layers - early - 1, 0)
    if not 0 <= clip_skip <= most:
        raise InvalidRequest(
            f"clip_skip is {clip_skip}; it can be 0 to {most}: this text encoder has {layers} layers"
        )


def _length(tokenizer: CLIPTokenizer, encoder: PreTrainedModel) -> int:
    return min(tokenizer.model_max_length, encoder.config.max_position_embeddings)


def _chunked(
    tokenizer: CLIPTokenizer,
    prompts: Sequence[str],
    length: int,
    *,
    raw: bool,
    embeddings: Mapping[str, Tensor],
) -> list[list[list[Token]]]:
    if raw:
        return [[_plain(tokenizer, text)[: length - 2]] for text in prompts]
    return [_chunks(tokenizer, text, length, embeddings) for text in prompts]


def _plain(tokenizer: CLIPTokenizer, text: str, weight: float = 1.0) -> list[Token]:
    ids = tokenizer(text, add_special_tokens=False, verbose=False).input_ids
    return [Token(each, weight) for each in ids]


def _chunks(
    tokenizer: CLIPTokenizer, prompt: str, length: int, embeddings: Mapping[str, Tensor]
) -> list[list[Token]]:
    comma = tokenizer.get_vocab().get(",</w>")
    special = {comma, *tokenizer.all_special_ids}
    ordinary = next(each for each in range(len(special) + 1) if each not in special)
    tokens: list[Token | None] = []
    for run in parse(prompt, tuple(embeddings)):
        text, weight = run
        if run == BREAK:
            tokens.append(None)
        elif isinstance(text, Name):
            tokens += [Token(ordinary, weight, vector, n) for n, vector in enumerate(embeddings[text])]
        else:
            tokens += _plain(tokenizer, text, weight)
    return chunks_of(tokens, length - 2, comma)


def _padded(tokenizer: CLIPTokenizer, row: list[Token], length: int) -> list[int]:
    begin, end, pad = tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id
    assert isinstance(begin, int)
    assert isinstance(end, int)
    assert isinstance(pad, int)
    return [begin, *(token.id for token in row), end, *[pad] * (length - len(row) - 2)]


def weighted(features: Tensor, weights: Tensor) -> Tensor:
    """Multiply each token's features (N, L, D) by its weight (N, L), then restore each chunk's mean.

    Everybody restores it so, and pictures agree. But where an encoder's features lie around zero, the means'
    ratio is noise that would blow them up: one far from what the weights alone explain is not applied.
    """
    if (weights == 1).all():
        return features
    before = features.float()
    after = before * weights[..., None]
    old, new = before.mean((1, 2)), after.mean((1, 2))  # (N,)
    explained = old / new * weights.mean(1)  # 1 where every token's features have one mean
    telling = (old.abs() > 0.01 * before.std((1, 2))) & (explained > 0.5) & (explained < 2)
    return (after * torch.where(telling, old / new, 1.0)[:, None, None]).to(features.dtype)
