"""`--compile`: the same pictures in every size from one compiled block, and a word without a compiler."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch._dynamo.utils import counters

from backend import SD3Request, Settings, Studio
from backend.nn import compiled
from tests.checkpoints import sd3_folder

SIZES = ((80, 64), (64, 80))
# So few channels that torch convolves them in one way at each of the decoder's levels.
VAE = {"block_out_channels": (4,) * 4, "norm_num_groups": 2}


def test_pictures_stay_the_same_across_sizes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = sd3_folder(tmp_path / "tiny", vae=VAE, qk_norm="rms_norm")
    # neither ten programs that try what the processor can do, nor processes that compile beside this one
    monkeypatch.setattr("torch._inductor.config.cpp.vec_isa_ok", True)
    monkeypatch.setattr("torch._inductor.config.compile_threads", 1)

    def pictures(on: bool) -> list[np.ndarray]:
        studio = Studio(Settings(device="cpu", dtype="float32", compile=on, home=tmp_path / "home"))
        made = []
        for width, height in SIZES:
            request = SD3Request(
                checkpoint=str(folder), prompt="a red house", seed=1, steps=2, width=width, height=height
            )
            result = studio.run(request)
            assert not [text for text in result.notices if "compile" in text]
            made.append(np.asarray(result.images[0], np.float32))
        return made

    if reason := compiled.no_compiler("cpu"):
        pytest.fail(f"the tests need a C++ compiler: {reason}")
    plain = pictures(on=False)
    torch._dynamo.reset()
    counters.clear()
    for one, other in zip(plain, pictures(on=True), strict=True):
        assert np.abs(one - other).max() <= 1
    graphs = counters["stats"]["unique_graphs"]
    # the blocks, the last block, the decoder's; and what depends on a size after all
    assert 3 <= graphs <= 6, counters["stats"]
    assert not counters["unimplemented"], counters["unimplemented"]


def test_without_a_compiler_it_says_so_and_paints(tmp_path: Path) -> None:
    folder = sd3_folder(tmp_path / "tiny")
    code = f"""
from pathlib import Path
from backend import SD3Request, Settings, Studio
studio = Studio(Settings(device="cpu", dtype="float32", compile=True, home=Path({str(tmp_path)!r}) / "home"))
request = SD3Request(checkpoint={str(folder)!r}, prompt="a red house", seed=1, steps=1, width=64, height=64)
result = studio.run(request)
print(len(result.images), *result.notices, sep="\\n")
"""
    there = dict(os.environ, CXX="/nowhere/c++", TORCHINDUCTOR_CACHE_DIR=str(tmp_path / "cache"))
    done = subprocess.run(
        [sys.executable, "-c", code], env=there, capture_output=True, text=True, check=False,
        cwd=Path(__file__).parents[2],
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    count, *notices = done.stdout.splitlines()
    assert count == "1"
    assert notices[0].startswith("Nothing is compiled: this machine has no compiler that works (")


def test_what_is_loaded_beforehand_is_compiled_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []
    monkeypatch.setattr(
        "backend.weights.parts.compile_parts", lambda network: seen.append(type(network).__name__)
    )
    monkeypatch.setattr(compiled, "no_compiler", lambda device: None)
    Studio(Settings(device="cpu", compile=True, home=tmp_path)).warm()
    assert "Autoencoder" in seen


def test_what_has_no_parts_to_compile_is_left_as_it_is() -> None:
    network = torch.nn.Linear(2, 2)
    compiled.compile_parts(network)
    assert network._compiled_call_impl is None
