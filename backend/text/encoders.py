"""Text encoders and their tokenizers, out of the transformers library."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import nn
from transformers import (
    CLIPImageProcessorPil,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
)

from backend.errors import CheckpointError
from backend.weights.load import load_module
from backend.weights.source import Source

M = TypeVar("M", bound=nn.Module)
CLIP_WIDTH = 512  # what a CLIP config that does not tell means, in transformers


def load_clip_text(source: Source, component: str, dtype: torch.dtype, device: torch.device) -> CLIPTextModel:
    """The CLIP text model of a checkpoint (arXiv:2103.00020). Raises CheckpointError if it does not fit."""
    # transformers 5 dropped the prefix
    return _load(
        source, component, dtype, device, CLIPTextConfig, CLIPTextModel, "embeddings", prefix="text_model."
    )


def load_projected_clip_text(
    source: Source, component: str, dtype: torch.dtype, device: torch.device
) -> CLIPTextModelWithProjection:
    """A CLIP text model that also projects its pooled features. Raises CheckpointError if it does not fit."""
    return _load(
        source, component, dtype, device, CLIPTextConfig, CLIPTextModelWithProjection, "text_model.embeddings"
    )


def load_clip_vision(
    source: Source, component: str, dtype: torch.dtype, device: torch.device
) -> CLIPVisionModelWithProjection:
    """The CLIP image model of a checkpoint. Raises CheckpointError if it does not fit."""
    return _load(
        source,
        component,
        dtype,
        device,
        CLIPVisionConfig,
        CLIPVisionModelWithProjection,
        "vision_model.embeddings",
    )


def load_image_processor(source: Source, image_size: int) -> CLIPImageProcessorPil:
    """What makes a CLIP image model's input of pictures, `image_size` pixels a side.

    Raises CheckpointError for settings that are none.
    """
    component = "feature_extractor"
    try:
        processor = CLIPImageProcessorPil(**source.config(component))
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"{source.name}: {component} cannot be used: {error}") from error
    wanted: Any = {"height": image_size, "width": image_size}
    if dict(processor.crop_size or {}) != wanted:  # another network's, where a file cannot tell
        processor.size, processor.crop_size = {"shortest_edge": image_size}, wanted
    return processor


def _load(
    source: Source,
    component: str,
    dtype: torch.dtype,
    device: torch.device,
    config_class: Any,
    model_class: Callable[[Any], M],
    embeddings: str,
    *,
    prefix: str = "",
) -> M:
    """`embeddings` is where the module keeps its positions' numbers, which newer files leave out."""
    published = source.tensors(component, str(dtype).removeprefix("torch."))
    tensors = {name.removeprefix(prefix): name for name in published if not name.endswith(".position_ids")}
    settings = source.config(component)

    def build() -> M:
        try:
            return model_class(config_class(**settings))
        except StrictDataclassError as error:
            raise ValueError(error.__cause__ or error) from error

    positions = f"{embeddings}.position_embedding.weight".removeprefix(prefix)
    if positions not in tensors:
        raise CheckpointError(f"{source.name}: {component} does not fit its config: {positions} is missing")
    count = len(published[tensors[positions]])
    return load_module(
        build,
        {name: published[theirs] for name, theirs in tensors.items()},
        dtype=dtype,
        device=device,
        what=f"{source.name}: {component}",
        buffers={f"{embeddings}.position_ids": torch.arange(count)[None]},
    )


def load_tokenizer(source: Source, component: str = "tokenizer") -> CLIPTokenizer:
    """The CLIP tokenizer of a checkpoint. Raises CheckpointError where it is missing or damaged."""
    folder = source.tokenizer(component)
    try:
        return CLIPTokenizer.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # the Rust reader raises no narrower one for damaged files
        raise CheckpointError(f"{source.name}: the tokenizer in {folder} cannot be read: {error}") from error
