"""Embeddings of textual inversion against the reference's `load_textual_inversion`, on a tiny checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline
from safetensors.torch import save_file
from torch import Tensor
from transformers import CLIPTextModel, CLIPTokenizer

from backend import SD15Request, Settings, Studio
from backend.text.inversion import fitting, read_embedding
from backend.text.prompts import encode_prompts
from tests.checkpoints import sd15_folder

WIDTH = 64
TOKENS = {"plush.safetensors": "<plush>", "sketch.pt": "sketch", "worst.bin": "worst"}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return sd15_folder(tmp_path_factory.mktemp("sd15"))


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One, four and two vectors, in the layouts that the reference knows."""
    folder, noise = tmp_path_factory.mktemp("embeddings"), torch.Generator().manual_seed(3)

    def vectors(*shape: int) -> Tensor:
        return 0.05 * torch.randn(*shape, generator=noise)

    save_file({"<plush>": vectors(WIDTH)}, folder / "plush.safetensors")
    trained = {"string_to_token": {"*": 265}, "string_to_param": {"*": vectors(4, WIDTH)}, "name": "sketch"}
    torch.save(trained, folder / "sketch.pt")
    torch.save({"worst": vectors(2, WIDTH)}, folder / "worst.bin")
    return folder


@pytest.fixture(scope="module")
def reference(checkpoint: Path, files: Path) -> StableDiffusionPipeline:
    pipe = StableDiffusionPipeline.from_pretrained(checkpoint, safety_checker=None)
    for file, token in TOKENS.items():
        pipe.load_textual_inversion(str(files), weight_name=file, token=token)
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def encoder(checkpoint: Path) -> CLIPTextModel:
    return CLIPTextModel.from_pretrained(checkpoint / "text_encoder")


@pytest.fixture(scope="module")
def tokenizer(checkpoint: Path) -> CLIPTokenizer:
    return CLIPTokenizer.from_pretrained(checkpoint / "tokenizer")


@pytest.fixture(scope="module")
def vectors(files: Path) -> Mapping[str, Tensor]:
    return fitting(
        {token: read_embedding(files / file) for file, token in TOKENS.items()}, {"clip_l": WIDTH}
    )["clip_l"]


def close(ours: Tensor, theirs: Tensor) -> bool:
    return ours.shape == theirs.shape and bool((ours - theirs).abs().max() <= 1e-5 * theirs.abs().max())


@pytest.mark.parametrize(
    ("prompt", "negative"),
    [
        ("a red <plush> house", ""),
        ("a house, sketch", "worst, a sea"),
        ("sketch", "worst"),
        ("<plush> <plush> on green hills, sketch at night", "the photo of a <plush>, worst worst"),
    ],
)
def test_features_equal_the_reference(
    reference: StableDiffusionPipeline,
    encoder: CLIPTextModel,
    tokenizer: CLIPTokenizer,
    vectors: Mapping[str, Tensor],
    prompt: str,
    negative: str,
) -> None:
    theirs, theirs_negative = reference.encode_prompt(prompt, "cpu", 1, True, negative)
    assert theirs_negative is not None
    ours = encode_prompts(encoder, tokenizer, [negative, prompt], embeddings=vectors)
    assert close(ours, torch.cat([theirs_negative, theirs]))
    assert not close(encode_prompts(encoder, tokenizer, [negative, prompt]), ours)


def test_pictures_equal_the_reference(
    reference: StableDiffusionPipeline, checkpoint: Path, files: Path, tmp_path: Path
) -> None:
    call: dict[str, Any] = {"guidance_scale": 5.0, "width": 64, "height": 64}
    written = {"prompt": "a red <plush> house, sketch", "negative_prompt": "worst, night"}
    generator = torch.Generator().manual_seed(7)
    out: Any = reference(**written, **call, num_inference_steps=4, generator=generator, output_type="np")
    studio = Studio(Settings(device="cpu", dtype="float32", home=tmp_path, models_dir=files))

    def ours(**prompts: Any) -> np.ndarray:
        request = SD15Request(checkpoint=str(checkpoint), sampler="ddim", steps=4, seed=7, **call, **prompts)
        return np.asarray(studio.run(request).images[0], dtype=np.float64)

    picture = ours(**written)
    assert picture.std() > 1, "a flat picture proves nothing"
    assert np.abs(picture - np.asarray(out.images)[0] * 255).max() <= 1.0  # of 255; ours are rounded
    assert np.abs(picture - ours(prompt="a red house", negative_prompt="night")).max() > 10
