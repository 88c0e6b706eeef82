"""Whole Stable Diffusion 3 pictures of tiny random checkpoints against the reference's: within 1/255."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import (
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    StableDiffusion3Pipeline,
)

from backend import SD3Request, Settings, Studio
from tests.checkpoints import sd3_folder, sd3_single_file

PROMPT, NEGATIVE = "a red house on green hills", "night"
CHECKPOINTS: dict[str, dict[str, Any]] = {
    "medium": {},
    "3.5-medium": {"qk_norm": "rms_norm", "dual_attention_layers": (0, 1), "pos_embed_max_size": 24},
    "3.5-large": {"qk_norm": "rms_norm", "num_layers": 4, "num_attention_heads": 3, "attention_head_dim": 32,
                  "caption_projection_dim": 96},
    "other": {"sample_size": 8, "text": {"projection_dim": 48}, "scheduler": {"shift": 1.5}},
}  # fmt: skip


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("checkpoints")
    return {
        name: sd3_folder(root / name, seed=index, **overrides)
        for index, (name, overrides) in enumerate(CHECKPOINTS.items())
    }


@pytest.fixture(scope="module")
def studio(tmp_path_factory: pytest.TempPathFactory) -> Studio:
    return Studio(Settings(device="cpu", dtype="float32", home=tmp_path_factory.mktemp("home")))


def reference(
    folder: Path,
    seeds: list[int],
    *,
    t5: bool = True,
    scheduler: Any = None,
    adapt: Callable[[Any], None] | None = None,
    **call: Any,
) -> np.ndarray:
    """The reference's pictures, (B, H, W, 3) in 0 to 255; `adapt` changes its pipeline before."""
    left_out: dict[str, Any] = {} if t5 else {"text_encoder_3": None, "tokenizer_3": None}
    pipe = StableDiffusion3Pipeline.from_pretrained(folder, torch_dtype=torch.float32, **left_out)
    pipe.scheduler = scheduler or pipe.scheduler
    pipe.set_progress_bar_config(disable=True)
    if adapt is not None:
        adapt(pipe)
    pictures: Any = pipe(
        num_images_per_prompt=len(seeds),
        generator=[torch.Generator().manual_seed(seed) for seed in seeds],
        output_type="np",
        **call,
    )
    return np.asarray(pictures.images) * 255


def ours(studio: Studio, folder: Path, seeds: list[int], **asked: Any) -> np.ndarray:
    request = SD3Request(
        checkpoint=str(folder), seed=seeds[0], num_images=len(seeds), raw_prompt=True, **asked
    )
    return np.stack([np.asarray(image, np.float32) for image in studio.run(request).images])


def agree(one: np.ndarray, other: np.ndarray) -> None:
    assert one.shape == other.shape
    assert other.std() > 1, "a picture of one colour proves nothing"
    assert np.abs(one - other).max() <= 1.01  # ours are rounded to whole numbers


@pytest.mark.parametrize("t5", ["full", "off"])
@pytest.mark.parametrize("checkpoint", list(CHECKPOINTS))
def test_pictures_agree(folders: dict[str, Path], studio: Studio, checkpoint: str, t5: str) -> None:
    folder = folders[checkpoint]
    for guidance, extra in ((5.0, {"negative_prompt": NEGATIVE}), (1.0, {})):
        call: dict[str, Any] = {"prompt": PROMPT, "guidance_scale": guidance, **extra}
        theirs = reference(folder, [7], t5=t5 == "full", num_inference_steps=3, height=64, width=96, **call)
        agree(ours(studio, folder, [7], t5=t5, steps=3, height=64, width=96, **call), theirs)


def test_a_batch_agrees(folders: dict[str, Path], studio: Studio) -> None:
    """Seeds wrap around at 2³²."""
    seeds = [2**32 - 2, 2**32 - 1, 0]
    call: dict[str, Any] = {"prompt": PROMPT, "guidance_scale": 7.0}
    theirs = reference(folders["medium"], seeds, num_inference_steps=2, height=64, width=64, **call)
    agree(ours(studio, folders["medium"], seeds, steps=2, height=64, width=64, **call), theirs)


@pytest.mark.parametrize("length", [77, 130, 512])
def test_sequence_lengths_agree(folders: dict[str, Path], studio: Studio, length: int) -> None:
    prompt = " ".join(["red house on green hills,"] * 40)  # longer than all but the longest
    call: dict[str, Any] = {
        "prompt": prompt,
        "max_sequence_length": length,
        "guidance_scale": 4.0,
        "height": 64,
        "width": 64,
    }
    for t5 in ("full", "off"):
        theirs = reference(folders["medium"], [3], t5=t5 == "full", num_inference_steps=2, **call)
        agree(ours(studio, folders["medium"], [3], t5=t5, steps=2, **call), theirs)


def test_native_size_and_clip_skip_agree(folders: dict[str, Path], studio: Studio) -> None:
    """Without guidance: for the negative prompt the reference leaves no layers out, others do."""
    call: dict[str, Any] = {"prompt": PROMPT, "clip_skip": 1, "guidance_scale": 1.0}
    theirs = reference(folders["other"], [5], num_inference_steps=2, **call)
    agree(ours(studio, folders["other"], [5], steps=2, **call), theirs)


@pytest.mark.parametrize("shift", [1.0, 6.0])
def test_a_shift_agrees(folders: dict[str, Path], studio: Studio, shift: float) -> None:
    call: dict[str, Any] = {"prompt": PROMPT, "guidance_scale": 5.0, "height": 64, "width": 64}
    scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
    theirs = reference(folders["medium"], [9], scheduler=scheduler, num_inference_steps=4, **call)
    agree(ours(studio, folders["medium"], [9], steps=4, shift=shift, **call), theirs)


def test_dpmpp_2m_agrees(folders: dict[str, Path], studio: Studio) -> None:
    call: dict[str, Any] = {"prompt": PROMPT, "guidance_scale": 5.0, "height": 64, "width": 64}
    scheduler = DPMSolverMultistepScheduler(
        use_flow_sigmas=True, prediction_type="flow_prediction", flow_shift=3.0
    )
    theirs = reference(folders["medium"], [9], scheduler=scheduler, num_inference_steps=6, **call)
    agree(ours(studio, folders["medium"], [9], steps=6, sampler="dpmpp_2m", **call), theirs)


def test_skip_layer_guidance_agrees(folders: dict[str, Path], studio: Studio) -> None:
    folder = folders["3.5-medium"]
    call: dict[str, Any] = {"prompt": PROMPT, "guidance_scale": 4.5, "height": 64, "width": 64}
    theirs = reference(
        folder, [1, 2], num_inference_steps=5, skip_guidance_layers=[1], skip_layer_guidance_scale=2.8,
        skip_layer_guidance_start=0.01, skip_layer_guidance_stop=0.7, **call,
    )  # fmt: skip
    skipping: dict[str, Any] = {
        "skip_layer_guidance_scale": 2.8,
        "skip_guidance_layers": (1,),
        "skip_layer_guidance_stop": 0.7,
    }
    painted = ours(studio, folder, [1, 2], steps=5, **call, **skipping)
    agree(painted, theirs)
    assert np.abs(painted - ours(studio, folder, [1, 2], steps=5, **call)).max() > 1.5  # it does something


@pytest.mark.parametrize("checkpoint", ["medium", "3.5-medium"])
def test_a_single_file_paints_the_same_picture(
    folders: dict[str, Path], studio: Studio, tmp_path: Path, checkpoint: str
) -> None:
    folder = folders[checkpoint]
    asked: dict[str, Any] = {"prompt": PROMPT, "steps": 2, "guidance_scale": 5.0, "height": 64, "width": 64}
    whole = {t5: ours(studio, folder, [4], t5=t5, **asked) for t5 in ("full", "off")}
    for clips, t5 in ((False, None), (True, None), (True, "float32")):
        file = sd3_single_file(tmp_path / f"{clips}-{t5}.safetensors", folder, clips=clips, t5=t5)
        for price, due in whole.items():
            painted = ours(studio, file, [4], t5=price, config_from=str(folder), **asked)
            assert np.array_equal(painted, due), (clips, t5, price)
