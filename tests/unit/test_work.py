"""The formulas of what phases take at their widest, held against forwards on the accounting device."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModelWithProjection, T5Config, T5EncoderModel

from backend.cascade import work as cascade_work
from backend.cascade.keys import PUBLISHED as CASCADE
from backend.cascade.stage_a import StageA, StageAConfig
from backend.cascade.unet import UNet as CascadeUNet
from backend.cascade.unet import UNetConfig as CascadeConfig
from backend.nn import work as nn_work
from backend.nn.autoencoder import Autoencoder, AutoencoderConfig
from backend.sd3 import work as sd3_work
from backend.sd3.keys import PUBLISHED as SD3
from backend.sd3.mmdit import MMDiT, MMDiTConfig
from backend.sd15 import work as sd15_work
from backend.sd15.unet import UNet, UNetConfig
from backend.text.t5 import t5_work
from backend.weights.parts import layout_of
from benchmarks.checkpoint import UNET, VAE
from tests.ledger import Ledger, placed, work_of

DEMO = Path(__file__).parents[2] / "assets" / "demo"
MEDIUM_35 = {
    **SD3["transformer"], "qk_norm": "rms_norm", "dual_attention_layers": list(range(13)),
    "pos_embed_max_size": 384,
}  # fmt: skip
LARGE_35 = {
    **SD3["transformer"], "qk_norm": "rms_norm", "num_layers": 38, "num_attention_heads": 38,
    "caption_projection_dim": 2432,
}  # fmt: skip
WHOLE = ("sd15", "sd35-medium", "vae", "sd3-vae")  # what test_accounting walks through whole, is so there
T5_TOKENS = 256
Size = tuple[int, int]  # height and width, of pictures in pixels, of latents in theirs
Both = tuple[int, int]  # bytes as predicted, and as counted


CLIP: dict[str, dict[str, Any]] = {
    "sd3-clip-l": {**SD3["text_encoder"], "num_hidden_layers": 6},
    "sd3-clip-g": {**SD3["text_encoder_2"], "num_hidden_layers": 6},
}


def demo(name: str) -> dict[str, Any]:
    return json.loads((DEMO / name / "config.json").read_text("utf-8"))


def stepping(
    device: str, latents: Size, channels: int, batch: int, dtype: torch.dtype
) -> Callable[[Callable[[Tensor], Tensor]], None]:
    """A step of sampling as the pipelines make it: latents and an estimate kept, guidance in halves."""
    halves = min(batch, 2)

    def step(predict: Callable[[Tensor], Tensor]) -> None:
        shape = (batch // halves, channels, *latents)
        y, _before = (torch.empty(shape, device=device) for _ in range(2))
        x = y * 0.5
        out = predict(x.to(dtype).repeat(halves, 1, 1, 1).to(memory_format=layout_of(dtype))).float()
        without, with_prompt = out.chunk(2) if halves == 2 else (out, out)
        _estimate = x - (without + 2.0 * (with_prompt - without))

    return step


def sd15(config: dict[str, Any], size: Size, batch: int, dtype: torch.dtype, device: str = "cuda") -> Both:
    made, latents = UNetConfig.from_dict(config), (size[0] // 8, size[1] // 8)
    with Ledger(device) as ledger:
        unet = placed(lambda: UNet(made), dtype, device, layout_of(dtype))
        step = stepping(device, latents, made.in_channels, batch, dtype)
        with work_of(ledger) as work:
            context = torch.empty(batch, 77, made.cross_attention_dim, dtype=dtype, device=device)
            time = torch.empty((), device=device)
            step(lambda x: unet(x, time.expand(len(x)), context))
    return sd15_work.denoise(made, batch, latents, dtype.itemsize, device=device), work[0]


def sd3(config: dict[str, Any], size: Size, batch: int, dtype: torch.dtype, device: str = "cuda") -> Both:
    made, latents = MMDiTConfig.from_dict(config), (size[0] // 8, size[1] // 8)
    with Ledger(device) as ledger:
        network = placed(lambda: MMDiT(made), dtype, device, layout_of(dtype))
        step = stepping(device, latents, made.in_channels, batch, dtype)
        with work_of(ledger) as work:
            text = (77 + T5_TOKENS, made.joint_attention_dim)
            features = torch.empty(min(batch, 2), *text, dtype=dtype, device=device)
            context = features.repeat_interleave(batch // len(features), dim=0)
            pooled = torch.empty(batch, made.pooled_projection_dim, dtype=dtype, device=device)
            time = torch.empty((), device=device)
            step(lambda x: network(x, time.expand(len(x)), context, pooled))
    item = dtype.itemsize
    return sd3_work.denoise(made, batch, latents, T5_TOKENS, item, device=device), work[0]


def stage(config: dict[str, Any], size: Size, batch: int, dtype: torch.dtype, device: str = "cuda") -> Both:
    """Stage B or C."""
    made, prompts = CascadeConfig.from_dict(config), min(batch, 2)
    c_size = (math.ceil(size[0] / 42.67), math.ceil(size[1] / 42.67))
    composes = made.effnet_in_channels is None
    latents = c_size if composes else (size[0] // 4, size[1] // 4)
    with Ledger(device) as ledger:
        unet = placed(lambda: CascadeUNet(made), dtype, device, layout_of(dtype))
        step = stepping(device, latents, made.in_channels, batch, dtype)
        with work_of(ledger) as work:

            def made_of(*shape: int | None) -> Tensor:
                return torch.empty([side or 0 for side in shape], dtype=dtype, device=device)

            pooled = made_of(prompts, made.clip_text_pooled_in_channels)
            if composes:
                text = made_of(prompts, 77, made.clip_text_in_channels)
                images = made_of(prompts, 1, made.clip_image_in_channels)
                conditioning = unet.condition(pooled, text, images)
            else:
                effnet = made_of(batch, made.effnet_in_channels, *c_size)
                conditioning = unet.condition(pooled, effnet=effnet, size=latents)
            ratio = torch.empty((), device=device)
            step(lambda x: unet(x, ratio.expand(len(x)), conditioning))
    return cascade_work.unet(made, batch, latents, dtype.itemsize, device=device), work[0]


def stage_a(config: dict[str, Any], size: Size, batch: int, dtype: torch.dtype, device: str = "cuda") -> Both:
    made, latents = StageAConfig.from_dict(config), (size[0] // 4, size[1] // 4)
    with Ledger(device) as ledger:
        network = placed(lambda: StageA(made), dtype, device, layout_of(dtype))
        with work_of(ledger) as work:
            whole = torch.empty(batch, made.latent_channels, *latents, device=device)
            network.decode(whole[:1].to(dtype).to(memory_format=layout_of(dtype))).float()
    return cascade_work.stage_a(made, latents, dtype.itemsize, device=device), work[0]


def decoder(config: dict[str, Any], size: Size, batch: int, dtype: torch.dtype, device: str = "cuda") -> Both:
    made, latents = AutoencoderConfig.from_dict(config), (size[0] // 8, size[1] // 8)
    with Ledger(device) as ledger:
        vae = placed(lambda: Autoencoder(made), dtype, device, layout_of(dtype))
        with work_of(ledger) as work:
            whole = torch.empty(batch, made.latent_channels, *latents, device=device)
            vae.decode(whole[:1].to(dtype).to(memory_format=layout_of(dtype))).float()
    return nn_work.decode(made, latents, dtype.itemsize, device=device), work[0]


Run = Callable[..., Both]  # of a config, the pictures' size, the batch, dtype and device
NETWORKS: dict[str, tuple[Run, dict[str, Any]]] = {
    "sd15": (sd15, UNET),
    "sd3-medium": (sd3, SD3["transformer"]),
    "sd35-medium": (sd3, MEDIUM_35),
    "sd35-large": (sd3, LARGE_35),
    "stage-c": (stage, CASCADE["prior"]),
    "stage-c-lite": (stage, CASCADE["prior_lite"]),
    "stage-b": (stage, CASCADE["decoder"]),
    "stage-b-lite": (stage, CASCADE["decoder_lite"]),
    "stage-a": (stage_a, CASCADE["vqgan"]),
    "vae": (decoder, VAE),
    "sd3-vae": (decoder, SD3["vae"]),
}
TINY: dict[str, tuple[Run, dict[str, Any]]] = {
    "sd15": (sd15, demo("sd15/unet")),
    "sd3": (sd3, demo("sd3/transformer")),
    "stage-c": (stage, demo("stable-cascade/stable-cascade-prior/prior")),
    "stage-b": (stage, demo("stable-cascade/stable-cascade/decoder")),
    "stage-a": (stage_a, demo("stable-cascade/stable-cascade/vqgan")),
    "vae": (decoder, demo("sd15/vae")),
    "sd3-vae": (decoder, demo("sd3/vae")),
}
CASES = [
    ((512, 512), 1, torch.bfloat16),
    ((1024, 576), 8, torch.float32),
    ((1536, 1536), 2, torch.float16),
]


def thinned(config: dict[str, Any]) -> dict[str, Any]:
    """With few of the layers, which are alike: a second of walking less."""
    few: dict[str, Any] = {}
    if "num_layers" in config:
        few = {"num_layers": 2, "dual_attention_layers": [0] if config["dual_attention_layers"] else []}
    elif "down_num_layers_per_block" in config:
        one = [1] * len(config["down_num_layers_per_block"])
        few = {"down_num_layers_per_block": one, "up_num_layers_per_block": one}
    elif "cross_attention_dim" in config:
        few = {"layers_per_block": 1}
    return config | few


@pytest.mark.parametrize("name", NETWORKS)
def test_what_a_card_allocates(name: str) -> None:
    run, config = NETWORKS[name]
    config = config if name in WHOLE else thinned(config)
    predicted, counted = run(config, (1024, 1024), 2, torch.bfloat16)
    assert predicted == pytest.approx(counted, rel=0.1)


@pytest.mark.parametrize(("size", "batch", "dtype"), CASES, ids=str)
@pytest.mark.parametrize("name", [name for name in NETWORKS if not name.endswith("-lite")])
def test_other_sizes_batches_and_precisions(name: str, size: Size, batch: int, dtype: torch.dtype) -> None:
    run, config = NETWORKS[name]
    predicted, counted = run(thinned(config), size, batch, dtype)
    assert predicted == pytest.approx(counted, rel=0.1)


@pytest.mark.parametrize("name", ["sd15", "sd3-medium", "stage-c", "stage-b", "stage-a", "vae"])
def test_a_cpu_holds_its_tensors_and_more(name: str) -> None:
    """What oneDNN copies and glibc keeps is in no ledger: measured, not tested."""
    run, config = NETWORKS[name]
    predicted, counted = run(thinned(config), (512, 512), 2, torch.bfloat16, "cpu")
    assert counted <= predicted <= 2.6 * counted + 80 * 2**20


@pytest.mark.parametrize("name", TINY)
def test_small_networks_take_little_more_than_predicted(name: str) -> None:
    run, config = TINY[name]
    predicted, counted = run(config, (128, 128), 2, torch.float16)
    assert 0.6 * counted <= predicted <= 2 * counted


@pytest.mark.parametrize("states", [True, False])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("name", CLIP)
def test_text_encoders(name: str, dtype: torch.dtype, states: bool) -> None:
    with Ledger() as ledger:
        encoder = placed(lambda: CLIPTextModelWithProjection(CLIPTextConfig(**CLIP[name])), dtype)
        with work_of(ledger) as work:
            encoder(
                input_ids=torch.zeros(2, 77, dtype=torch.long, device="cuda"), output_hidden_states=states
            )
    predicted = nn_work.clip(CLIP[name], 2, dtype.itemsize, states=states)
    assert predicted == pytest.approx(work[0], rel=0.1)


@pytest.mark.parametrize("prompts", [1, 2])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_t5(dtype: torch.dtype, prompts: int) -> None:
    config: dict[str, Any] = {**SD3["text_encoder_3"], "num_layers": 2}
    with Ledger() as ledger:
        encoder = placed(lambda: T5EncoderModel(T5Config(**config)), dtype)
        with work_of(ledger) as work:
            encoder(input_ids=torch.zeros(prompts, T5_TOKENS, dtype=torch.long, device="cuda"))
    predicted = t5_work(config, prompts, T5_TOKENS, dtype, device="cuda", precision="full")
    assert predicted == pytest.approx(work[0], rel=0.1)
