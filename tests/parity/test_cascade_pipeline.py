"""Whole Stable Cascade pictures of tiny random checkpoints against the reference's: within 1/255."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDPMWuerstchenScheduler, StableCascadeDecoderPipeline, StableCascadePriorPipeline
from diffusers.models.unets.unet_stable_cascade import StableCascadeUNet
from diffusers.pipelines.deprecated.wuerstchen import PaellaVQModel
from PIL import Image
from transformers import (
    CLIPImageProcessorPil,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    CLIPVisionModelWithProjection,
)

from backend import Settings, StableCascadeRequest, Studio
from tests.checkpoints import cascade_folder, cascade_single_files

PROMPT, NEGATIVE = "a red house on green hills", "night"
CHECKPOINTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "switching": {"prior": {"switch_level": (True,)}, "vqgan": {"scale_factor": 0.43}},
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("checkpoints")
    return {
        name: cascade_folder(root / name, seed=index, **overrides)
        for index, (name, overrides) in enumerate(CHECKPOINTS.items())
    }


@pytest.fixture(scope="module")
def studio(tmp_path_factory: pytest.TempPathFactory) -> Studio:
    return Studio(Settings(device="cpu", dtype="float32", home=tmp_path_factory.mktemp("home")))


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    with warnings.catch_warnings():  # the reference says in every call that it is deprecated
        warnings.simplefilter("ignore", FutureWarning)
        yield


def reference(
    folder: Path,
    seeds: list[int],
    *,
    prior: dict[str, Any],
    decoder: dict[str, Any],
    variants: tuple[str, str] = ("", ""),
    adapt: Callable[[Any], None] | None = None,
    **call: Any,
) -> np.ndarray:
    """The reference's pictures, (B, H, W, 3) in 0 to 255: built of its parts, as it loads no decoder. `adapt`
    changes the prior's pipeline before, whose text encoder is the decoder's, too."""
    first, second = folder / "stable-cascade-prior", folder / "stable-cascade"
    text: Any = {
        "tokenizer": CLIPTokenizer.from_pretrained(first / "tokenizer"),
        "text_encoder": CLIPTextModelWithProjection.from_pretrained(first / "text_encoder"),
    }
    # the constructor is annotated with the processor that works on torchvision, which is not installed
    processor: Any = CLIPImageProcessorPil.from_pretrained(first / "feature_extractor")
    priors = StableCascadePriorPipeline(
        prior=StableCascadeUNet.from_pretrained(first / f"prior{variants[0]}"),
        scheduler=DDPMWuerstchenScheduler(),
        image_encoder=CLIPVisionModelWithProjection.from_pretrained(first / "image_encoder"),
        feature_extractor=processor,
        **text,
    )
    decoders = StableCascadeDecoderPipeline(
        decoder=StableCascadeUNet.from_pretrained(second / f"decoder{variants[1]}"),
        scheduler=DDPMWuerstchenScheduler(),
        vqgan=PaellaVQModel.from_pretrained(second / "vqgan"),
        **text,
    )
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    prompts = {name: call[name] for name in ("prompt", "negative_prompt") if name in call}
    for pipe in (priors, decoders):
        pipe.set_progress_bar_config(disable=True)
    if adapt is not None:
        adapt(priors)
    sizes = {name: call[name] for name in ("height", "width", "images") if name in call}
    composed: Any = priors(
        num_images_per_prompt=len(seeds), generator=generators, **prompts, **sizes, **prior
    )
    pictures: Any = decoders(
        composed.image_embeddings, generator=generators, output_type="np", **prompts, **decoder
    )
    return np.asarray(pictures.images) * 255


def ours(
    studio: Studio,
    folder: Path,
    seeds: list[int],
    *,
    prior: dict[str, Any],
    decoder: dict[str, Any],
    **call: Any,
) -> np.ndarray:
    request = StableCascadeRequest(
        checkpoint=str(folder), seed=seeds[0], num_images=len(seeds),
        prior_steps=prior["num_inference_steps"], prior_guidance_scale=prior["guidance_scale"],
        decoder_steps=decoder["num_inference_steps"], decoder_guidance_scale=decoder["guidance_scale"],
        raw_prompt=True, **call,
    )  # fmt: skip
    return np.stack([np.asarray(image, np.float32) for image in studio.run(request).images])


def steps(count: int, guidance: float) -> dict[str, Any]:
    return {"num_inference_steps": count, "guidance_scale": guidance}


PLAIN: dict[str, Any] = {
    "prior": steps(3, 4.0), "decoder": steps(2, 0.0), "prompt": PROMPT, "width": 128, "height": 128,
}  # fmt: skip
CALLS: dict[str, dict[str, Any]] = {
    "as recommended": {},
    "negative prompt": {"negative_prompt": NEGATIVE},
    "no guidance": {"prior": steps(3, 1.0)},
    "guidance on both stages": {"decoder": steps(3, 2.5), "negative_prompt": NEGATIVE},
    "guidance on Stage B alone": {"prior": steps(2, 0.0), "decoder": steps(3, 1.5)},
    "one step each": {"prior": steps(1, 4.0), "decoder": steps(1, 0.0)},
    "wide": {"width": 384, "height": 128},
    "tall": {"width": 128, "height": 256},
    "no prompt": {"prompt": ""},
}


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("checkpoint", CHECKPOINTS)
def test_pictures(studio: Studio, folders: dict[str, Path], checkpoint: str, call: str) -> None:
    arguments, folder = PLAIN | CALLS[call], folders[checkpoint]
    expected = reference(folder, [7], **arguments)
    assert expected.std() > 3, "a picture of nothing proves nothing"
    assert np.abs(ours(studio, folder, [7], **arguments) - expected).max() <= 1.0


@pytest.mark.parametrize("variants", [("_lite", ""), ("", "_lite"), ("_lite", "_lite")], ids=str)
def test_lite_stages_in_any_mix(studio: Studio, folders: dict[str, Path], variants: tuple[str, str]) -> None:
    chosen: dict[str, Any] = {
        stage: "lite" if variant else "full"
        for stage, variant in zip(("stage_c", "stage_b"), variants, strict=True)
    }
    expected = reference(folders["plain"], [7], variants=variants, **PLAIN)
    assert np.abs(ours(studio, folders["plain"], [7], **PLAIN, **chosen) - expected).max() <= 1.0


@pytest.mark.parametrize("prompt", [PROMPT, ""], ids=["with a prompt", "alone"])
@pytest.mark.parametrize("count", [1, 2])
def test_image_prompts(studio: Studio, folders: dict[str, Path], count: int, prompt: str) -> None:
    rng = np.random.default_rng(0)
    images = [Image.fromarray(rng.integers(0, 255, (40, 60, 3), np.uint8)) for _ in range(count)]
    arguments: dict[str, Any] = PLAIN | {"prompt": prompt}
    expected = reference(folders["plain"], [7], images=images, **arguments)
    pictures = ours(studio, folders["plain"], [7], images=images, **arguments)
    assert np.abs(pictures - expected).max() <= 1.0
    without = ours(studio, folders["plain"], [7], **arguments)
    assert np.abs(pictures - without).max() > 3, "the picture must matter"


def test_a_batch_from_one_prompt(studio: Studio, folders: dict[str, Path]) -> None:
    """Seeds wrap at 2³²; image i equals the picture of seed + i alone."""
    seeds = [2**32 - 1, 0, 1]
    arguments: dict[str, Any] = PLAIN | {"decoder": steps(2, 1.5), "negative_prompt": NEGATIVE}
    expected = reference(folders["plain"], seeds, **arguments)
    batch = ours(studio, folders["plain"], seeds, **arguments)
    assert np.abs(batch - expected).max() <= 1.0
    for seed, picture in zip(seeds, batch, strict=True):
        alone = ours(studio, folders["plain"], [seed], **arguments)
        assert np.abs(alone[0] - picture).max() <= 1.0


def test_hub_and_original_layout_give_the_same_picture(
    studio: Studio, folders: dict[str, Path], tmp_path: Path
) -> None:
    original = cascade_single_files(tmp_path / "original", folders["plain"])
    image = Image.new("RGB", (50, 50), "red")
    arguments: dict[str, Any] = PLAIN | {"images": [image]}
    expected = ours(studio, folders["plain"], [7], **arguments)
    assert np.array_equal(ours(studio, original, [7], **arguments), expected)
