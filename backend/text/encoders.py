"""Text encoders and their tokenizers, out of the transformers library."""

from __future__ import annotations

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from backend.errors import CheckpointError
from backend.weights.load import load_module
from backend.weights.source import Source


def load_clip_text(source: Source, component: str, dtype: torch.dtype, device: torch.device) -> CLIPTextModel:
    """The CLIP text model of a checkpoint (arXiv:2103.00020). Raises CheckpointError if it does not fit."""
    published = source.tensors(component, str(dtype).removeprefix("torch."))
    # transformers 5 dropped the prefix; files older than transformers 4.31 hold the positions' numbers too
    tensors = {
        name.removeprefix("text_model."): name for name in published if not name.endswith(".position_ids")
    }
    config = source.config(component)

    def build() -> CLIPTextModel:
        try:
            return CLIPTextModel(CLIPTextConfig(**config))
        except StrictDataclassError as error:
            raise ValueError(error.__cause__ or error) from error

    positions = config.get("max_position_embeddings", 77)
    if not isinstance(positions, int):
        raise CheckpointError(f"{source.name}: {component}: max_position_embeddings is {positions!r}")
    return load_module(
        build,
        {name: published[theirs] for name, theirs in tensors.items()},
        dtype=dtype,
        device=device,
        what=f"{source.name}: {component}",
        buffers={"embeddings.position_ids": torch.arange(positions)[None]},
    )


def load_tokenizer(source: Source, component: str = "tokenizer") -> CLIPTokenizer:
    """The CLIP tokenizer of a checkpoint. Raises CheckpointError where it is missing or damaged."""
    folder = source.tokenizer(component)
    try:
        return CLIPTokenizer.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # the Rust reader raises no narrower one for damaged files
        raise CheckpointError(f"{source.name}: the tokenizer in {folder} cannot be read: {error}") from error
