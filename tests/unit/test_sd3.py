"""Stable Diffusion 3's phases: what is loaded when, how T5 is chosen, what is refused."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from backend import CheckpointError, Hardware, InvalidRequest, OutOfMemory, SD3Request, Settings, Studio
from backend.events import Loading, Step
from backend.memory.hardware import GIB
from backend.memory.plan import RESERVE_BYTES, Plan
from backend.sd3 import pipeline as sd3
from backend.sd3.mmdit import MMDiT, MMDiTConfig
from tests.checkpoints import sd3_folder, sd3_single_file

T5 = "text_encoder_3"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return sd3_folder(tmp_path_factory.mktemp("checkpoint") / "tiny")


@pytest.fixture(scope="module")
def without_t5(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return sd3_folder(tmp_path_factory.mktemp("checkpoint") / "small", t5=False)


@pytest.fixture
def studio(tmp_path: Path) -> Studio:
    return Studio(Settings(device="cpu", dtype="float32", home=tmp_path / "home"))


def request(folder: Path, **fields: Any) -> SD3Request:
    values: dict[str, Any] = {"prompt": "a red house", "seed": 1, "steps": 3, "width": 64, "height": 64}
    return SD3Request(checkpoint=str(folder), **values | fields)


@pytest.fixture
def forwards(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, tuple[int, ...]]]:
    """The batch size of every forward of the transformer, and the blocks that it left out."""
    seen: list[tuple[int, tuple[int, ...]]] = []
    forward = MMDiT.forward

    def counted(self: MMDiT, latents: Any, *rest: Any) -> Any:
        seen.append((len(latents), rest[3] if len(rest) > 3 else ()))
        return forward(self, latents, *rest)

    monkeypatch.setattr(MMDiT, "forward", counted)
    return seen


def loaded(studio: Studio, asked: SD3Request) -> list[str]:
    """What a request loads, in order."""
    names = [event.component for event in studio.generate(asked) if isinstance(event, Loading)]
    return list(dict.fromkeys(names))


# ---- what is loaded when


def test_each_phase_loads_its_own_and_t5_leaves_before_denoising(studio: Studio, folder: Path) -> None:
    held: dict[str, list[str]] = {}
    for event in studio.generate(request(folder)):
        if isinstance(event, Step):
            held[event.phase] = [part.name for part in reversed(studio.loaded())]
    assert list(held) == ["encode_clip", "encode_t5", "denoise", "decode"]
    assert held["encode_clip"] == ["text_encoder", "text_encoder_2"]
    assert T5 in held["encode_t5"]
    assert "transformer" not in held["encode_t5"]
    assert T5 not in held["denoise"]


def test_the_same_prompt_loads_no_encoder_again(studio: Studio, folder: Path) -> None:
    assert loaded(studio, request(folder))[-2:] == ["transformer", "vae"]
    assert loaded(studio, request(folder, seed=2, steps=4, guidance_scale=3.0, width=96)) == []
    assert loaded(studio, request(folder, prompt="a blue house")) == [T5]
    assert loaded(studio, request(folder, prompt="a blue house", max_sequence_length=100)) == [T5]
    assert loaded(studio, request(folder, prompt="a green house", t5="off")) == []


def test_t5_is_read_at_each_price(studio: Studio, folder: Path) -> None:
    pictures = {t5: np.asarray(studio.run(request(folder, t5=t5)).images[0], np.float32) for t5 in sd3.RUNS}
    for one, other in (("full", "int8"), ("int8", "nf4"), ("nf4", "off")):
        assert not np.array_equal(pictures[one], pictures[other]), (one, other)
    assert (
        np.abs(pictures["int8"] - pictures["full"]).mean() < np.abs(pictures["off"] - pictures["full"]).mean()
    )


def test_settings_tell_what_ran(studio: Studio, folder: Path) -> None:
    settings = studio.run(request(folder)).settings
    assert settings["t5"] == "auto"
    assert settings["ran"] == {"t5": "full"}
    assert (settings["sampler"], settings["shift"], settings["guidance_scale"]) == ("euler", 3.0, 7.0)


# ---- how T5 is chosen


def test_auto_goes_down_the_prices_as_memory_gets_short(studio: Studio, tmp_path: Path) -> None:
    t5 = {"d_kv": 64, "d_ff": 2048, "num_layers": 16}  # what the networks take besides is little
    folder = sd3_folder(tmp_path / "wide", t5=t5, joint_attention_dim=256)

    def plan_with(budget: int, t5: str) -> Plan:
        # in bfloat16, which the files are not in: mapped, the whole of it would take no memory
        free = budget + RESERVE_BYTES["cpu"]
        here = dataclasses.replace(Hardware.card(64), device="cpu", free_bytes=free)
        return studio.plan(request(folder, t5=t5, dtype="bfloat16", max_sequence_length=77), here)

    def streams(plan: Plan) -> bool:
        return any(part.placement == "streamed" for part in plan.components.values())

    peaks = [plan_with(64 * GIB, t5).peak_bytes for t5 in sd3.RUNS]
    assert len(set(peaks)) == 4
    assert peaks == sorted(peaks, reverse=True)
    chosen: set[str] = set()
    for budget in {*peaks, *(peak - 1 for peak in peaks), *range(peaks[-1] // 2, peaks[0], peaks[0] // 30)}:
        by_hand = {t5: plan_with(budget, t5) for t5 in sd3.RUNS}
        fitting = [
            t5 for t5, plan in by_hand.items() if plan.fits and (not streams(plan) or t5 in ("nf4", "off"))
        ]
        plan = plan_with(budget, "auto")
        assert plan.fits == bool(fitting)
        if fitting:
            assert sd3.RUNS[fitting[0]] in plan.decisions[1]
            assert plan.peak_bytes == by_hand[fitting[0]].peak_bytes
            said = "otherwise reading the prompt with T5 would take" in plan.decisions[1]
            assert said == (fitting[0] != "full")
            chosen.add(fitting[0])
    assert chosen == set(sd3.RUNS)


@pytest.mark.parametrize(
    ("gib", "ram", "price"),
    [(24, 32, "full"), (12, 32, "full"), (11, 32, "int8"), (8, 32, "nf4"), (4, 32, "nf4"), (6, 6, "off")],
)
def test_published_weights_on_a_card(studio: Studio, gib: float, ram: float, price: str) -> None:
    """T5 is left out only where RAM cannot hold it either."""
    plan = studio.plan(SD3Request(checkpoint="sd3-medium", dtype="float16"), Hardware.card(gib, ram_gib=ram))
    assert plan.fits
    said = {"full": "T5 runs whole", "int8": "8 bits", "nf4": "4 bits", "off": "T5 does not run"}[price]
    assert said in plan.decisions[1]


def test_prices_of_the_published_t5(studio: Studio) -> None:
    """Gigabytes in bfloat16 and float16, as published; `wo` is never quantised, and float32 in float16."""
    here = Hardware.card(80)
    for dtype, sizes in (("bfloat16", (9.53, 5.90, 4.31)), ("float16", (11.54, 7.91, 6.33))):
        for price, due in zip(sd3.RUNS, sizes, strict=False):
            plan = studio.plan(SD3Request(checkpoint="sd3-medium", dtype=dtype, t5=price), here)
            (phase,) = (phase for phase in plan.phases if phase.name == "encode_t5")
            (part,) = phase.components
            assert (part.placement, part.precision) == ("resident", dtype if price == "full" else price)
            assert part.bytes / 1e9 == pytest.approx(due, rel=0.01)


def test_a_checkpoint_without_t5_runs_without(studio: Studio, without_t5: Path) -> None:
    result = studio.run(request(without_t5))
    assert result.settings["ran"] == {"t5": "off"}
    assert "holds no text_encoder_3" in result.plan.decisions[1]
    for t5 in ("full", "int8", "nf4"):
        with pytest.raises(
            CheckpointError, match=f"t5 is '{t5}', and .* holds no text_encoder_3; set t5 to .off."
        ):
            studio.run(request(without_t5, t5=t5))


def test_a_price_that_a_device_cannot_pay_is_refused(studio: Studio, folder: Path) -> None:
    apple = dataclasses.replace(Hardware.card(16), device="mps")
    for t5 in ("int8", "nf4"):
        with pytest.raises(InvalidRequest, match=f"t5 is '{t5}', which cannot run here"):
            studio.plan(request(folder, t5=t5), apple)
    assert "T5 runs whole" in studio.plan(request(folder), apple).decisions[1]


def test_a_tokenizer_that_gives_fewer_tokens_is_told(studio: Studio) -> None:
    plan = studio.plan(SD3Request(t5="full", max_sequence_length=200))
    assert "T5 reads 32 tokens of the prompt" in plan.decisions[2]
    assert not any("tokens" in text for text in studio.plan(SD3Request(t5="off")).decisions)


@pytest.mark.parametrize(
    ("gib", "bf16", "dtype", "said"),
    [
        (10, True, "bfloat16", "T5 runs whole"),
        (10, False, "float16", "8 bits"),
        (8, True, "bfloat16", "8 bits"),
        (8, False, "float16", "4 bits"),
    ],
)
def test_auto_precision_leaves_room_for_t5(
    studio: Studio, gib: float, bf16: bool, dtype: str, said: str
) -> None:
    studio.settings = dataclasses.replace(studio.settings, dtype="auto")
    card = dataclasses.replace(Hardware.card(gib), bf16=bf16)
    plan = studio.plan(SD3Request(checkpoint="sd3-medium"), card)
    assert plan.phases[0].components[0].precision == dtype
    assert said in plan.decisions[1]


def test_what_does_not_fit_for_t5_alone_says_so(studio: Studio) -> None:
    wanted = SD3Request(checkpoint="sd3-medium", dtype="bfloat16", t5="full")
    here = Hardware.card(6, ram_gib=6)
    plan = studio.plan(wanted, here)
    assert not plan.fits
    assert "Does not fit this machine: RAM lacks" in plan.decisions[0]
    with pytest.raises(OutOfMemory, match=r"It would fit with t5 'auto'\."):
        Studio(studio.settings, here).run(wanted)


def test_a_prompt_that_t5_cuts_is_told(studio: Studio, folder: Path) -> None:
    long = "red house " * 60
    (notice,) = studio.run(request(folder, prompt=long, max_sequence_length=77)).notices
    assert notice == "T5 reads 77 tokens, and the prompt has 121: the rest was cut."
    assert studio.run(request(folder, prompt=long, max_sequence_length=121)).notices == []


# ---- guidance


def test_guidance_runs_in_one_batch_and_is_skipped_at_one(
    studio: Studio, folder: Path, forwards: list[Any]
) -> None:
    studio.run(request(folder, num_images=2))
    assert forwards == [(4, ())] * 3
    forwards.clear()
    studio.run(request(folder, guidance_scale=1.0))
    assert forwards == [(1, ())] * 3


def test_skip_layer_guidance_runs_in_its_share_of_the_steps(
    studio: Studio, folder: Path, forwards: list[Any]
) -> None:
    asked = {"steps": 10, "skip_layer_guidance_scale": 2.0, "skip_layer_guidance_stop": 0.35}
    studio.run(request(folder, **asked))
    weaker = (1, (1,))  # of the prompt alone, without the one block of three that is as deep as 7 to 9 of 24
    assert forwards == [(2, ()), *[(2, ()), weaker] * 3, *[(2, ())] * 6]
    forwards.clear()
    studio.run(request(folder, **asked, guidance_scale=1.0))  # nothing to lead away from
    assert forwards == [(1, ())] * 10


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ({"guidance_scale": 1.0}, "there is nothing to guide"),
        ({"skip_guidance_layers": ()}, "there is nothing to guide"),
        ({"steps": 4}, "no step of these is in its share"),
        ({}, None),
        ({"skip_layer_guidance_scale": 0}, None),
    ],
)
def test_skip_layer_guidance_that_does_nothing_says_so(
    studio: Studio, folder: Path, asked: dict[str, Any], said: str | None
) -> None:
    fields = {"skip_layer_guidance_scale": 2.0, "steps": 20, **asked}
    told = [text for text in studio.plan(request(folder, **fields)).decisions if "Skip-layer" in text]
    assert told == ([f"Skip-layer guidance does nothing: {said}."] if said else [])


@pytest.mark.parametrize(("layers", "due"), [(24, (7, 8, 9)), (38, (11, 13, 14)), (3, (1,)), (1, (0,))])
def test_skipped_layers_lie_as_deep_in_other_networks(
    folder: Path, layers: int, due: tuple[int, ...]
) -> None:
    from backend.weights.source import resolve

    job = sd3.complete(request(folder), resolve(str(folder), "sd3", Settings()), (0,), layers)
    assert job.skipped == due


# ---- defaults


@pytest.mark.parametrize(
    ("name", "transformer", "due"),
    [
        ("mine", {}, (28, 7.0)),
        ("mine", {"dual_attention_layers": (0,)}, (40, 4.5)),
        ("stable-diffusion-3.5-large", {}, (28, 3.5)),
        ("stable-diffusion-3.5-large-turbo", {}, (4, 0.0)),
    ],
)
def test_defaults_are_those_of_the_published_one_that_it_is(
    tmp_path: Path,
    studio: Studio,
    folder: Path,
    name: str,
    transformer: dict[str, Any],
    due: tuple[int, float],
) -> None:
    shutil.copytree(folder, tmp_path / name)
    file = tmp_path / name / "transformer" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | transformer))
    scheduler = tmp_path / name / "scheduler" / "scheduler_config.json"
    scheduler.write_text(json.dumps(json.loads(scheduler.read_text()) | {"shift": 2.5}))
    defaults = studio.describe("sd3", str(tmp_path / name)).defaults
    assert (defaults["steps"], defaults["guidance_scale"]) == due
    assert (defaults["width"], defaults["height"]) == (128, 128)
    assert (defaults["shift"], defaults["sampler"]) == (2.5, "euler")


# ---- what is refused


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"t5": "int4"}, r"t5 is 'int4'; it can be auto, full, int8, nf4, off"),
        ({"max_sequence_length": 0}, "max_sequence_length is 0; it can be a whole number from 77 to 512"),
        ({"max_sequence_length": 10_000}, "max_sequence_length is 10000; it can be .* from 77 to 512"),
        ({"shift": 0}, r"shift is 0; it can be a number from 0.1 to 20"),
        ({"shift": float("nan")}, "shift is nan"),
        ({"sampler": "pndm"}, "sampler is 'pndm'; it can be euler, heun, dpmpp_2m"),
        ({"width": 72}, "width is 72; it can be a whole number from 64 to 2048 in multiples of 16"),
        (
            {"skip_layer_guidance_scale": 11},
            "skip_layer_guidance_scale is 11; it can be a number from 0 to 10",
        ),
        (
            {"skip_layer_guidance_stop": 1.5},
            "skip_layer_guidance_stop is 1.5; it can be a number from 0 to 1",
        ),
        ({"skip_layer_guidance_start": 0.5}, "skip_layer_guidance_start is 0.5; it can be up to .*stop, 0.2"),
        ({"skip_guidance_layers": 7}, "skip_guidance_layers is 7; it can be a list of whole numbers from 0"),
        ({"skip_guidance_layers": [1.5]}, r"skip_guidance_layers is \[1.5\]"),
        ({"skip_guidance_layers": [True]}, r"skip_guidance_layers is \[True\]"),
    ],
)
def test_a_request_names_the_value_and_what_is_allowed(asked: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidRequest, match=message):
        SD3Request(**asked)


def test_layers_that_are_not_there_are_refused(studio: Studio, folder: Path) -> None:
    with pytest.raises(InvalidRequest, match="skip_guidance_layers holds 7; .* has the layers 0 to 2"):
        studio.plan(request(folder, skip_guidance_layers=(1, 7)))


def test_more_layers_than_there_are_cannot_be_left_out(studio: Studio, folder: Path) -> None:
    assert studio.plan(request(folder, clip_skip=1)).phases
    with pytest.raises(InvalidRequest, match="clip_skip is 2; it can be 0 to 1: .* has 3 layers"):
        studio.plan(request(folder, clip_skip=2))


def test_a_picture_beyond_the_table_of_positions_is_refused(studio: Studio, folder: Path) -> None:
    with pytest.raises(InvalidRequest, match="width is 272; with this checkpoint it can be up to 256"):
        studio.plan(request(folder, width=272))
    assert studio.plan(request(folder, width=256, height=256)).phases


@pytest.mark.parametrize(
    ("component", "settings", "message"),
    [
        ("transformer", {"qk_norm": "layer_norm"}, "qk_norm is 'layer_norm'; it can be None or 'rms_norm'"),
        ("transformer", {"caption_projection_dim": 64}, "caption_projection_dim is 64; it can be 128"),
        ("transformer", {"pooled_projection_dim": 100}, "give pooled features of 96 channels, .* takes 100"),
        (
            "transformer",
            {"joint_attention_dim": 120},
            "of 128 channels together, .* up to 120|of 160 channels",
        ),
        ("vae", {"latent_channels": 4}, "transformer makes latents of 16 channels, and the vae takes 4"),
        ("scheduler", {"shift": -1.0}, "shift is -1.0"),
        ("scheduler", {"_class_name": "PNDMScheduler"}, "PNDMScheduler"),
    ],
)
def test_parts_that_do_not_fit_are_told(
    tmp_path: Path, studio: Studio, folder: Path, component: str, settings: dict[str, Any], message: str
) -> None:
    shutil.copytree(folder, tmp_path / "wrong")
    name = "scheduler_config.json" if component == "scheduler" else "config.json"
    file = tmp_path / "wrong" / component / name
    file.write_text(json.dumps(json.loads(file.read_text()) | settings))
    with pytest.raises(CheckpointError, match=message):
        studio.plan(request(tmp_path / "wrong"))


def test_values_that_are_no_numbers_never_become_a_picture(
    studio: Studio, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from backend import TriptychError

    monkeypatch.setattr(MMDiT, "forward", lambda self, x, *rest: x * float("nan"))
    with pytest.raises(TriptychError, match="Painting in float32 gave values that are not numbers"):
        studio.run(request(folder))


def test_a_file_without_encoders_says_what_it_lacks(studio: Studio, folder: Path, tmp_path: Path) -> None:
    file = sd3_single_file(tmp_path / "bare.safetensors", folder, clips=False)
    with pytest.raises(CheckpointError, match=r"text_encoder, text_encoder_2.*config_from"):
        studio.run(request(file))
    assert studio.run(request(file, config_from=str(folder))).images


# ---- the network


def test_a_bfloat16_network_stays_near_its_float32(folder: Path) -> None:
    settings = json.loads((folder / "transformer" / "config.json").read_text())
    config = MMDiTConfig.from_dict(settings | {"pos_embed_max_size": 24})
    torch.manual_seed(0)
    network = MMDiT(config).eval()
    given = torch.randn(1, 16, 48, 48), torch.tensor([500.0]), torch.randn(1, 9, 160), torch.randn(1, 96)
    with torch.no_grad():
        due = network(*given)  # 576 tokens: in bfloat16 on a CPU, attention takes the way of its own
        out = network.bfloat16()(*(x.bfloat16() if x.ndim > 1 else x for x in given)).float()
    assert (out - due).abs().max() / due.abs().max() < 0.03
