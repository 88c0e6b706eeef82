"""LoRAs of every layout against the reference with peft, on tiny random bases: within 1/255 in float32."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from peft import LoraConfig, inject_adapter_in_model
from torch import nn

from backend import SD3Request, SD15Request, Settings, StableCascadeRequest, Studio
from backend.memory import plan
from backend.weights.lora import Lora, save_lora
from tests import loras
from tests.checkpoints import cascade_folder, sd3_folder, sd15_folder
from tests.loras import Layers, Pair
from tests.parity import test_cascade_pipeline, test_pipeline, test_sd3_pipeline

PROMPT, NEGATIVE = "a red house on green hills", "night"
SIDE = 64
ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")

# Weights of the two adapters, 0 for one that is left out.
WEIGHTS = [(0.3, 0.0), (1.0, 0.0), (-0.5, 0.0), (0.3, 1.0), (1.0, -0.5)]
Loras = tuple[tuple[str, float], ...]


@dataclass(frozen=True, kw_only=True)
class Family:
    """`ends` are those of the layers that the two adapters are for, by the folder of their component;
    `writers` write a layout of them."""

    build: Callable[[Path], Path]
    ends: tuple[Mapping[str, tuple[str, ...]], Mapping[str, tuple[str, ...]]]
    folders: Mapping[str, str]
    writers: Mapping[str, Callable[[Path, Layers], Path]]
    original: Callable[[Path, Layers], Path] | None = None  # that has a layout of its own for some layers
    own: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    ours: Callable[[Studio, Path, Loras, int], np.ndarray]
    reference: Callable[[Path, Callable[[Any], None], int], np.ndarray]


def _sd15(studio: Studio, folder: Path, chosen: Loras, steps: int) -> np.ndarray:
    request = SD15Request(
        checkpoint=str(folder), prompt=PROMPT, negative_prompt=NEGATIVE, seed=7, steps=steps,
        guidance_scale=5.0, sampler="ddim", width=SIDE, height=SIDE, loras=chosen,
    )  # fmt: skip
    return _shown(studio, request)


def _sd15_reference(folder: Path, adapt: Callable[[Any], None], steps: int) -> np.ndarray:
    call = {"num_inference_steps": steps, "guidance_scale": 5.0, "width": SIDE, "height": SIDE}
    return test_pipeline.reference(
        folder, "ddim", [7], adapt=adapt, prompt=PROMPT, negative_prompt=NEGATIVE, **call
    )


def _sd3(studio: Studio, folder: Path, chosen: Loras, steps: int) -> np.ndarray:
    request = SD3Request(
        checkpoint=str(folder), prompt=PROMPT, negative_prompt=NEGATIVE, seed=7, steps=steps,
        guidance_scale=5.0, width=SIDE, height=SIDE, t5="full", max_sequence_length=77, loras=chosen,
    )  # fmt: skip
    return _shown(studio, request)


def _sd3_reference(folder: Path, adapt: Callable[[Any], None], steps: int) -> np.ndarray:
    call: dict[str, Any] = {
        "num_inference_steps": steps,
        "guidance_scale": 5.0,
        "width": SIDE,
        "height": SIDE,
    }
    return test_sd3_pipeline.reference(
        folder, [7], adapt=adapt, prompt=PROMPT, negative_prompt=NEGATIVE, max_sequence_length=77, **call
    )


def _cascade(studio: Studio, folder: Path, chosen: Loras, steps: int) -> np.ndarray:
    request = StableCascadeRequest(
        checkpoint=str(folder), prompt=PROMPT, seed=7, prior_steps=steps, prior_guidance_scale=4.0,
        decoder_steps=2, decoder_guidance_scale=0.0, width=128, height=128, stages="full", loras=chosen,
    )  # fmt: skip
    return _shown(studio, request)


def _cascade_reference(folder: Path, adapt: Callable[[Any], None], steps: int) -> np.ndarray:
    prior = {"num_inference_steps": steps, "guidance_scale": 4.0}
    decoder = {"num_inference_steps": 2, "guidance_scale": 0.0}
    return test_cascade_pipeline.reference(
        folder, [7], prior=prior, decoder=decoder, adapt=adapt, prompt=PROMPT, width=128, height=128
    )


def _shown(studio: Studio, request: Any) -> np.ndarray:
    return np.stack([np.asarray(image, np.float32) for image in studio.run(request).images])


SD3_PREFIXES = {
    "transformer": "lora_transformer_", "text_encoder": "lora_te1_", "text_encoder_2": "lora_te2_",
    "text_encoder_3": "lora_te3_",
}  # fmt: skip
FAMILIES = {
    "sd15": Family(
        build=sd15_folder,
        ends=(
            {"unet": ("attn1.to_q", "attn2.to_k", "to_out.0"), "text_encoder": ("q_proj", "fc1")},
            {"unet": ("proj_in", "ff.net.0.proj", "ff.net.2", "conv1", "conv_shortcut", "attn2.to_k")},
        ),
        folders={"unet": "unet", "text_encoder": "text_encoder"},
        writers={
            "hub": loras.hub,
            "trainers": loras.trainers,
            "three convolutions": lambda path, layers: loras.trainers(path, layers, mid=True),
        },
        ours=_sd15,
        reference=_sd15_reference,
    ),
    "sd3": Family(
        build=sd3_folder,
        ends=(
            {
                "transformer": ("to_q", "to_k", "to_v", "add_q_proj", "add_k_proj", "add_v_proj",
                                "attn.to_out.0", "to_add_out", "norm1.linear"),
                "text_encoder": ("v_proj",), "text_encoder_2": ("fc2",),
                "text_encoder_3": ("SelfAttention.q", "DenseReluDense.wo"),
            },
            {"transformer": ("ff.net.0.proj", "ff_context.net.2", "attn.to_out.0")},
        ),
        folders={name: name for name in ("transformer", "text_encoder", "text_encoder_2", "text_encoder_3")},
        writers={
            "hub": loras.hub,
            "trainers": lambda path, layers: loras.trainers(path, layers, SD3_PREFIXES),
        },
        original=loras.original_sd3,
        own={
            "transformer": ("to_q", "to_k", "to_v", "add_q_proj", "add_k_proj", "add_v_proj", "attn.to_out.0",
                            "to_add_out", "ff.net.0.proj", "ff_context.net.2", "norm1.linear"),
        },
        ours=_sd3,
        reference=_sd3_reference,
    ),
    "stable_cascade": Family(
        build=cascade_folder,
        ends=(
            {"prior": ("to_q", "to_k", "to_v", "to_out.0"), "text_encoder": ("out_proj",)},
            {"prior": ("kv_mapper.1", "channelwise.0", "attention.to_v")},
        ),
        folders={"prior": "stable-cascade-prior/prior", "text_encoder": "stable-cascade-prior/text_encoder"},
        writers={
            "hub": loras.hub,
            "trainers": lambda path, layers: loras.trainers(
                path, layers, {"prior": "lora_prior_unet_", "text_encoder": "lora_prior_te_"}
            ),
        },
        original=loras.original_cascade,
        own={"prior": ("attention.to_q", "attention.to_k", "attention.to_v", "attention.to_out.0")},
        ours=_cascade,
        reference=_cascade_reference,
    ),
}  # fmt: skip


def with_peft(network: nn.Module, adapters: Mapping[str, tuple[Mapping[str, Pair], float]]) -> None:
    """Have peft add these pairs, by the layers' paths, each adapter with a weight."""
    for name, (pairs, weight) in adapters.items():
        own = {path if _has(network, path) else path.removeprefix("text_model."): pair
               for path, pair in pairs.items()}  # fmt: skip
        config = LoraConfig(
            r=1, lora_alpha=1, target_modules=list(own), use_rslora=False,
            rank_pattern={path: pair.rank for path, pair in own.items()},
            alpha_pattern={path: pair.alpha for path, pair in own.items()},
        )  # fmt: skip
        inject_adapter_in_model(config, network, adapter_name=name)
        for path, pair in own.items():
            layer: Any = network.get_submodule(path)
            layer.lora_A[name].weight.data = pair.down.clone()
            up = pair.up.view(layer.lora_B[name].weight.shape)
            layer.lora_B[name].weight.data = up.clone()
            assert layer.scaling[name] == pytest.approx(pair.alpha / pair.rank)
            layer.set_scale(name, weight)
    for module in network.modules():
        if hasattr(module, "lora_A"):
            there: Any = module
            there.set_adapter([name for name in adapters if name in there.lora_A])


def _has(network: nn.Module, path: str) -> bool:
    try:
        network.get_submodule(path)
    except AttributeError:
        return False
    return True


@dataclass(frozen=True)
class Base:
    """A family's checkpoint, its two adapters, and each layout's files of them."""

    family: Family
    folder: Path
    adapters: tuple[Layers, Layers]
    files: Mapping[str, tuple[Path, ...]]

    def expected(self, chosen: list[tuple[Layers, float]], steps: int) -> np.ndarray:
        def adapt(pipe: Any) -> None:
            for component in self.family.folders:
                own = {
                    f"adapter_{n}": (layers[component], weight)
                    for n, (layers, weight) in enumerate(chosen)
                    if weight and component in layers
                }
                if own:
                    with_peft(getattr(pipe, component), own)

        return self.family.reference(self.folder, adapt, steps)

    def pairs(self, ends: Mapping[str, tuple[str, ...]], seed: int) -> Layers:
        folders = self.family.folders
        return {
            component: loras.pairs(loras.weights_of(self.folder / folders[component]), own, seed=seed)
            for component, own in ends.items()
        }


@pytest.fixture(scope="module")
def studio(tmp_path_factory: pytest.TempPathFactory) -> Studio:
    return Studio(Settings(device="cpu", dtype="float32", home=tmp_path_factory.mktemp("home")))


@pytest.fixture(scope="module", params=list(FAMILIES))
def base(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Base:
    family = FAMILIES[request.param]
    root = tmp_path_factory.mktemp(request.param)
    folder = family.build(root / "base")
    bare = Base(family, folder, ({}, {}), {})
    first, second = (bare.pairs(ends, seed) for seed, ends in enumerate(family.ends))
    files = {
        name: (write(root / f"{name}-0.safetensors", first), write(root / f"{name}-1.safetensors", second))
        for name, write in family.writers.items()
    }
    return Base(family, folder, (first, second), files)


def agree(one: np.ndarray, other: np.ndarray) -> None:
    assert one.shape == other.shape
    assert other.std() > 1, "a picture of one colour proves nothing"
    assert np.abs(one - other).max() <= 1.01  # ours are rounded to whole numbers


@pytest.mark.parametrize("weights", WEIGHTS, ids=str)
def test_every_layout_paints_as_the_reference_with_peft(
    base: Base, studio: Studio, weights: tuple[float, float]
) -> None:
    merged, beside = plan.MERGED_FROM, plan.MERGED_FROM - 1
    for steps in (beside, *([merged] if weights == WEIGHTS[-1] else [])):
        expected = base.expected(list(zip(base.adapters, weights, strict=True)), steps)
        plain = base.family.ours(studio, base.folder, (), steps)
        assert np.abs(plain - expected).max() > 5, "adapters that change nothing prove nothing"
        for files in base.files.values():
            chosen = tuple((str(file), weight) for file, weight in zip(files, weights, strict=True) if weight)
            agree(base.family.ours(studio, base.folder, chosen, steps), expected)
        again = base.family.ours(studio, base.folder, (), steps)
        assert (again == plain).all()


def test_the_original_releases_layouts(base: Base, studio: Studio, tmp_path: Path) -> None:
    if base.family.original is None:  # Stable Diffusion 1.5 has none
        return
    pairs = base.pairs(base.family.own, 3)
    file = base.family.original(tmp_path / "original.safetensors", pairs)
    expected = base.expected([(pairs, 0.6)], 3)
    agree(base.family.ours(studio, base.folder, ((str(file), 0.6),), 3), expected)
    assert Lora(file).tokens == (2 if base.family.original is loras.original_cascade else 0)


def test_the_reference_reads_what_is_saved(tmp_path: Path, studio: Studio) -> None:
    folder = sd15_folder(tmp_path / "base")
    weights = loras.weights_of(folder / "unet")
    file = loras.hub(tmp_path / "hub.safetensors", {"unet": loras.pairs(weights, ATTENTION)})
    lora = Lora(file)
    base = {name: tuple(tensor.shape) for name, tensor in weights.items()}
    terms = {"unet": lora.terms(lora.places("sd15", "unet", base), 1.0)}
    own = tmp_path / "own.safetensors"
    save_lora(own, terms, family="sd15", base="tiny", alpha=3.0, dtype="float32")

    def adapt(pipe: Any) -> None:
        pipe.load_lora_weights(own, adapter_name="own")
        pipe.set_adapters(["own"], [0.7])

    agree(_sd15(studio, folder, ((str(own), 0.7),), 3), _sd15_reference(folder, adapt, 3))
