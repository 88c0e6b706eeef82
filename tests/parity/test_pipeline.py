"""Whole pictures of tiny random checkpoints against the reference's pipeline: within 1/255 in float32."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch

from backend import SD15Request, Settings, Studio
from tests.checkpoints import sd15_folder, sd15_single_file
from tests.schedulers import REFERENCE

PROMPT, NEGATIVE = "a red house on green hills", "night"

V_PREDICTION = {"prediction_type": "v_prediction"}
CHECKPOINTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "linear": {"use_linear_projection": True, "attention_head_dim": [2, 4, 4], "scheduler": V_PREDICTION},
    "distilled": {"time_cond_proj_dim": 32},  # as the published LCM checkpoints
    "wide": {"cross_attention_dim": 128, "layers_per_block": 1, "vae": {"layers_per_block": 1}},
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("checkpoints")
    return {
        name: sd15_folder(root / name, seed=index, **overrides)
        for index, (name, overrides) in enumerate(CHECKPOINTS.items())
    }


@pytest.fixture(scope="module")
def studio(tmp_path_factory: pytest.TempPathFactory) -> Studio:
    return Studio(Settings(device="cpu", dtype="float32", home=tmp_path_factory.mktemp("home")))


def reference(
    folder: Path, sampler: str, seeds: list[int], *, adapt: Callable[[Any], None] | None = None, **call: Any
) -> np.ndarray:
    """The reference's pictures, (B, H, W, 3) in 0 to 255; `adapt` changes its pipeline before."""
    pipe = diffusers.StableDiffusionPipeline.from_pretrained(folder, safety_checker=None)
    pipe.set_progress_bar_config(disable=True)
    if adapt is not None:
        adapt(pipe)
    # the reference's clip_skip looks for an attribute that transformers 5 dropped
    object.__setattr__(pipe.text_encoder, "text_model", pipe.text_encoder)
    name, extra = REFERENCE[sampler]
    pipe.scheduler = getattr(diffusers, name).from_config(pipe.scheduler.config, **extra)
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    out: Any = pipe(num_images_per_prompt=len(seeds), generator=generators, output_type="np", **call)
    return np.asarray(out.images) * 255


def ours(studio: Studio, folder: Path, sampler: str, seeds: list[int], **call: Any) -> np.ndarray:
    request = SD15Request(
        checkpoint=str(folder), sampler=sampler, seed=seeds[0], num_images=len(seeds),
        steps=call["num_inference_steps"], guidance_scale=call["guidance_scale"], prompt=call["prompt"],
        negative_prompt=call.get("negative_prompt", ""), width=call["width"], height=call["height"],
        clip_skip=call.get("clip_skip") or 0,
    )  # fmt: skip
    result = studio.run(request)
    assert result.seeds == seeds
    return np.stack([np.asarray(image, dtype=np.float64) for image in result.images])


def assert_same(a: np.ndarray, b: np.ndarray) -> None:
    assert a.shape == b.shape
    assert a.std() > 1, "a flat picture proves nothing"
    assert np.abs(a - b).max() <= 1.0  # of 255; ours are rounded


@pytest.mark.parametrize("sampler", REFERENCE)
@pytest.mark.parametrize("checkpoint", CHECKPOINTS)
def test_every_sampler(studio: Studio, folders: dict[str, Path], checkpoint: str, sampler: str) -> None:
    call: dict[str, Any] = {
        "prompt": PROMPT, "negative_prompt": NEGATIVE, "num_inference_steps": 6, "guidance_scale": 5.0,
        "width": 96, "height": 64,
    }  # fmt: skip
    folder = folders[checkpoint]
    assert_same(ours(studio, folder, sampler, [7], **call), reference(folder, sampler, [7], **call))


@pytest.mark.parametrize(
    ("call", "seeds"),
    [
        ({"guidance_scale": 1.0}, [3]),
        ({"guidance_scale": 0.0}, [3]),
        ({"negative_prompt": NEGATIVE}, [2**32 - 1, 0, 1]),
        ({"guidance_scale": 1.0, "height": 128}, [5, 6]),
        ({"width": 104, "height": 72}, [11]),
        # the reference skips layers for the prompt alone; ours, as widely done, for the negative too
        ({"clip_skip": 1, "guidance_scale": 1.0}, [11]),
        ({"prompt": ""}, [1]),
    ],
    ids=str,
)
def test_guidance_batches_sizes_and_clip_skip(
    studio: Studio, folders: dict[str, Path], call: dict[str, Any], seeds: list[int]
) -> None:
    full: dict[str, Any] = {
        "prompt": PROMPT, "num_inference_steps": 4, "guidance_scale": 7.5, "width": 64, "height": 64, **call
    }  # fmt: skip
    pictures = ours(studio, folders["plain"], "ddim", seeds, **full)
    assert_same(pictures, reference(folders["plain"], "ddim", seeds, **full))


def test_a_batch_equals_its_images_alone(studio: Studio, folders: dict[str, Path]) -> None:
    def run(seed: int, count: int) -> np.ndarray:
        request = SD15Request(
            checkpoint=str(folders["plain"]), prompt=PROMPT, seed=seed, num_images=count, steps=4,
            sampler="euler_ancestral", width=64, height=64,
        )  # fmt: skip
        return np.stack([np.asarray(image, dtype=np.float64) for image in studio.run(request).images])

    together = run(20, 3)
    alone = np.concatenate([run(seed, 1) for seed in (20, 21, 22)])
    assert_same(together, alone)
    assert np.abs(together[0] - together[1]).max() > 10


def test_single_file_gives_the_folders_picture(
    studio: Studio, folders: dict[str, Path], tmp_path: Path
) -> None:
    single = sd15_single_file(folders["plain"], tmp_path / "single.safetensors")
    pictures = []
    for checkpoint, config_from in ((folders["plain"], None), (single, str(folders["plain"]))):
        request = SD15Request(
            checkpoint=str(checkpoint),
            config_from=config_from,
            prompt=PROMPT,
            seed=4,
            steps=3,
            width=64,
            height=64,
        )
        pictures.append(np.asarray(studio.run(request).images[0], dtype=np.float64)[None])
    assert pictures[0].std() > 1
    assert np.array_equal(*pictures)
