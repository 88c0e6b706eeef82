"""Checkpoints against the reference's own loaders: the same weights from either layout, the same text."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import diffusers
import pytest
import torch
from diffusers.models.unets.unet_stable_cascade import StableCascadeUNet
from diffusers.pipelines.deprecated.wuerstchen import PaellaVQModel
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import CLIPTextModelWithProjection, CLIPVisionModelWithProjection

from backend.cascade import unet as stages
from backend.cascade.stage_a import StageA, StageAConfig
from backend.nn.autoencoder import Autoencoder, AutoencoderConfig
from backend.sd3.mmdit import MMDiT, MMDiTConfig
from backend.sd15.unet import UNet, UNetConfig
from backend.settings import Settings
from backend.text.encoders import (
    load_clip_text,
    load_clip_vision,
    load_projected_clip_text,
    load_tokenizer,
)
from backend.text.t5 import load_t5, load_t5_tokenizer
from backend.weights.load import load_module
from backend.weights.source import Source, resolve
from tests.checkpoints import (
    cascade_folder,
    cascade_single_files,
    sd3_folder,
    sd3_single_file,
    sd15_folder,
    sd15_single_file,
)
from tests.flax_files import FILES, flax_folder

CPU = torch.device("cpu")
CHECKPOINTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "one layer": {"layers_per_block": 1, "cross_attention_dim": 128, "vae": {"layers_per_block": 2}},
    "like SD2": {
        "use_linear_projection": True,
        "attention_head_dim": [2, 4, 4],
        "scheduler": {"prediction_type": "v_prediction"},
        "text": {"hidden_act": "gelu"},
    },
    "attention inside": {
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    },
}


@pytest.fixture(scope="module", params=CHECKPOINTS)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return sd15_folder(tmp_path_factory.mktemp("checkpoint") / "tiny", **CHECKPOINTS[request.param])


def load(source: Source, dtype: torch.dtype = torch.float32) -> dict[str, nn.Module]:
    def network(name: str, build: Callable[[], nn.Module]) -> nn.Module:
        tensors = source.tensors(name, str(dtype).removeprefix("torch."))
        return load_module(build, tensors, dtype=dtype, device=CPU, what=name)

    return {
        "unet": network("unet", lambda: UNet(UNetConfig.from_dict(source.config("unet")))),
        "vae": network("vae", lambda: Autoencoder(AutoencoderConfig.from_dict(source.config("vae")))),
        "text_encoder": load_clip_text(source, "text_encoder", dtype, CPU),
    }


def compare(ours: dict[str, nn.Module], reference: Any) -> None:
    for name, module in ours.items():
        theirs: dict[str, Tensor] = getattr(reference, name).state_dict()
        state = module.state_dict()
        assert state.keys() == theirs.keys()
        assert all(torch.equal(state[key], theirs[key]) for key in theirs), name


def test_the_folder_loads_as_the_reference_loads_it(folder: Path, tmp_path: Path) -> None:
    source = resolve(str(folder), "sd15", Settings(home=tmp_path))
    reference = diffusers.StableDiffusionPipeline.from_pretrained(folder, safety_checker=None)
    ours = load(source)
    compare(ours, reference)
    texts = ["a red house on green hills", "", "Unknown wörds 42 🙂 " * 30]
    tokens = load_tokenizer(source)(texts, padding="max_length", max_length=77, truncation=True)
    theirs = reference.tokenizer(texts, padding="max_length", max_length=77, truncation=True)
    assert tokens.input_ids == theirs.input_ids
    ids = torch.tensor(tokens.input_ids)
    with torch.no_grad():
        text = ours["text_encoder"](ids).last_hidden_state
        torch.testing.assert_close(text, reference.text_encoder(ids).last_hidden_state, rtol=0, atol=0)


def test_the_single_file_loads_as_the_reference_loads_it(folder: Path, tmp_path: Path) -> None:
    file = sd15_single_file(folder, tmp_path / "one.safetensors")
    source = resolve(str(file), "sd15", Settings(home=tmp_path), config_from=str(folder))
    reference = diffusers.StableDiffusionPipeline.from_single_file(
        file, config=str(folder), safety_checker=None
    )
    compare(load(source), reference)
    assert UNetConfig.from_dict(source.config("unet")) == UNetConfig.from_dict(reference.unet.config)
    assert AutoencoderConfig.from_dict(source.config("vae")) == AutoencoderConfig.from_dict(
        reference.vae.config
    )


def test_flaxs_files_hold_what_the_folder_does(folder: Path, tmp_path: Path) -> None:
    """The reference no longer reads them."""
    flax = flax_folder(folder, tmp_path / "flax")
    own, theirs = (resolve(str(path), "sd15", Settings(home=tmp_path)) for path in (folder, flax))
    for name in FILES:
        ours, mapped = own.tensors(name, "float32"), theirs.tensors(name, "float32")
        prefix = "text_model." if name == "text_encoder" else ""  # which transformers 5 dropped
        assert mapped.keys() == {prefix + key.removeprefix(prefix) for key in ours}
        assert all(torch.equal(mapped[prefix + key.removeprefix(prefix)], ours[key]) for key in ours), name


def test_half_precision_variants_load_as_the_reference_loads_them(tmp_path: Path) -> None:
    folder = sd15_folder(tmp_path / "tiny")
    for file in folder.rglob("*.safetensors"):  # other numbers, so that reading the plain file would show
        tensors = {name: (2 * tensor).half() for name, tensor in load_file(file).items()}
        save_file(tensors, file.with_suffix(".fp16.safetensors"), {"format": "pt"})
    source = resolve(str(folder), "sd15", Settings(home=tmp_path))
    reference = diffusers.StableDiffusionPipeline.from_pretrained(
        folder, variant="fp16", torch_dtype=torch.float16, safety_checker=None
    )
    compare(load(source, torch.float16), reference)


def test_old_names_of_the_vae_load_as_the_reference_loads_them(tmp_path: Path) -> None:
    """The published SD1.5 folders still hold them."""
    folder = sd15_folder(tmp_path / "tiny")
    names = {".to_q.": ".query.", ".to_k.": ".key.", ".to_v.": ".value.", ".to_out.0.": ".proj_attn."}
    file = folder / "vae/diffusion_pytorch_model.safetensors"
    tensors = load_file(file)
    for new, old in names.items():
        tensors = {name.replace(new, old): tensor for name, tensor in tensors.items()}
    assert sum(".proj_attn." in name for name in tensors) == 4  # encoder and decoder, weight and bias
    save_file(tensors, file, {"format": "pt"})
    reference = diffusers.StableDiffusionPipeline.from_pretrained(folder, safety_checker=None)
    compare(load(resolve(str(folder), "sd15", Settings(home=tmp_path))), reference)


def test_pickled_folders_load_as_the_reference_loads_them(tmp_path: Path) -> None:
    folder = sd15_folder(tmp_path / "tiny")
    for file in folder.rglob("*.safetensors"):
        stem = "pytorch_model" if file.parent.name == "text_encoder" else file.stem
        torch.save(dict(load_file(file)), file.with_name(f"{stem}.bin"))
        file.unlink()
    shutil.rmtree(folder / "scheduler")  # the reference needs it, the networks do not
    ours = load(resolve(str(folder), "sd15", Settings(home=tmp_path)))
    reference = diffusers.UNet2DConditionModel.from_pretrained(
        folder, subfolder="unet", use_safetensors=False
    )
    assert all(
        torch.equal(ours["unet"].state_dict()[key], value) for key, value in reference.state_dict().items()
    )


SD3: dict[str, dict[str, Any]] = {
    "3 medium": {},
    "3.5 medium": {"qk_norm": "rms_norm", "dual_attention_layers": (0, 1)},
    "3.5 large": {"qk_norm": "rms_norm", "num_layers": 4},
}


@pytest.fixture(scope="module", params=SD3)
def sd3(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return sd3_folder(tmp_path_factory.mktemp("sd3") / "tiny", **SD3[request.param])


def load_sd3(source: Source) -> dict[str, nn.Module]:
    def network(name: str, build: Callable[[], nn.Module]) -> nn.Module:
        return load_module(build, source.tensors(name, "float32"), dtype=torch.float32, device=CPU, what=name)

    return {
        "transformer": network(
            "transformer", lambda: MMDiT(MMDiTConfig.from_dict(source.config("transformer")))
        ),
        "vae": network("vae", lambda: Autoencoder(AutoencoderConfig.from_dict(source.config("vae")))),
        "text_encoder": load_projected_clip_text(source, "text_encoder", torch.float32, CPU),
        "text_encoder_2": load_projected_clip_text(source, "text_encoder_2", torch.float32, CPU),
        "text_encoder_3": load_t5(source, "text_encoder_3", "full", torch.float32, CPU),
    }


def test_sd3s_folders_load_as_the_reference_loads_them(sd3: Path, tmp_path: Path) -> None:
    source = resolve(str(sd3), "sd3", Settings(home=tmp_path))
    reference = diffusers.StableDiffusion3Pipeline.from_pretrained(sd3)
    compare(load_sd3(source), reference)
    texts = ["a red house on green hills", "", "Unknown words: 42, x_y " * 30]
    tokenizers = {
        "tokenizer": load_tokenizer(source, "tokenizer"),
        "tokenizer_2": load_tokenizer(source, "tokenizer_2"),
        "tokenizer_3": load_t5_tokenizer(source),
    }
    for name, tokenizer in tokenizers.items():
        ours = tokenizer(texts, padding="max_length", max_length=77, truncation=True)
        theirs = getattr(reference, name)(texts, padding="max_length", max_length=77, truncation=True)
        assert ours.input_ids == theirs.input_ids


@pytest.mark.parametrize("t5", ["float32", "float16", "float8_e4m3fn"])
def test_sd3s_single_files_load_as_the_reference_loads_them(sd3: Path, tmp_path: Path, t5: str) -> None:
    file = sd3_single_file(tmp_path / "one.safetensors", sd3, t5=t5)
    source = resolve(str(file), "sd3", Settings(home=tmp_path), config_from=str(sd3))
    reference = diffusers.StableDiffusion3Pipeline.from_single_file(
        file, config=str(sd3), torch_dtype=torch.float32
    )
    ours = load_sd3(source)
    encoder = ours.pop("text_encoder_3")  # which may keep float8 as it is
    compare(ours, reference)
    kept, theirs = source.tensors("text_encoder_3", "float32"), reference.text_encoder_3.state_dict()
    assert theirs.keys() - kept.keys() == {"encoder.embed_tokens.weight"}  # shared.weight under another name
    assert {tensor.dtype for tensor in kept.values()} == {getattr(torch, t5)}
    assert all(torch.equal(kept[name].float(), theirs[name]) for name in kept)
    ids = torch.tensor(load_t5_tokenizer(source)(["a red house"]).input_ids)
    reference.text_encoder_3.eval()  # it comes with the dropout of its training switched on
    with torch.no_grad():
        torch.testing.assert_close(encoder(ids)[0], reference.text_encoder_3(ids)[0])
    assert MMDiTConfig.from_dict(source.config("transformer")) == MMDiTConfig.from_dict(
        reference.transformer.config
    )


@pytest.fixture(scope="module")
def cascade(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return cascade_folder(tmp_path_factory.mktemp("cascade") / "tiny")


CASCADE = {
    "prior": "stable-cascade-prior",
    "prior_lite": "stable-cascade-prior",
    "decoder": "stable-cascade",
    "decoder_lite": "stable-cascade",
}


@pytest.mark.parametrize("name", CASCADE)
def test_cascades_folders_load_as_the_reference_loads_them(cascade: Path, tmp_path: Path, name: str) -> None:
    source = resolve(str(cascade), "stable_cascade", Settings(home=tmp_path))
    reference = StableCascadeUNet.from_pretrained(cascade / CASCADE[name], subfolder=name)
    compare({name: load_stage(source, name)}, SimpleNamespace(**{name: reference}))


@pytest.mark.parametrize("name", CASCADE)
def test_cascades_original_files_load_as_the_reference_loads_them(
    cascade: Path, tmp_path: Path, name: str
) -> None:
    files = cascade_single_files(tmp_path / "files", cascade)
    source = resolve(str(files), "stable_cascade", Settings(home=tmp_path))
    stage = name.replace("prior", "stage_c").replace("decoder", "stage_b")
    reference = StableCascadeUNet.from_single_file(
        str(files / f"{stage}.safetensors"), config=str(cascade / CASCADE[name]), subfolder=name
    )
    compare({name: load_stage(source, name)}, SimpleNamespace(**{name: reference}))


def load_stage(source: Source, name: str) -> nn.Module:
    config = stages.UNetConfig.from_dict(source.config(name))
    return load_module(
        lambda: stages.UNet(config), source.tensors(name, "float32"),
        dtype=torch.float32, device=CPU, what=name,
    )  # fmt: skip


def test_cascades_other_networks_load_as_the_reference_loads_them(cascade: Path, tmp_path: Path) -> None:
    source = resolve(str(cascade), "stable_cascade", Settings(home=tmp_path))
    prior, decoder = cascade / "stable-cascade-prior", cascade / "stable-cascade"
    config = StageAConfig.from_dict(source.config("vqgan"))
    ours: dict[str, nn.Module] = {
        "vqgan": load_module(
            lambda: StageA(config), source.tensors("vqgan", "float32"),
            dtype=torch.float32, device=CPU, what="vqgan",
        ),
        "text_encoder": load_projected_clip_text(source, "text_encoder", torch.float32, CPU),
        "image_encoder": load_clip_vision(source, "image_encoder", torch.float32, CPU),
    }  # fmt: skip
    reference = SimpleNamespace(
        vqgan=PaellaVQModel.from_pretrained(decoder, subfolder="vqgan"),
        text_encoder=CLIPTextModelWithProjection.from_pretrained(prior, subfolder="text_encoder"),
        image_encoder=CLIPVisionModelWithProjection.from_pretrained(prior, subfolder="image_encoder"),
    )
    compare(ours, reference)
    texts = ["a red house on green hills", ""]
    tokens = load_tokenizer(source)(texts, padding="max_length", max_length=77, truncation=True)
    ids = torch.tensor(tokens.input_ids)
    with torch.no_grad():
        mine, theirs = ours["text_encoder"](ids), reference.text_encoder(ids)
    torch.testing.assert_close(mine.text_embeds, theirs.text_embeds, rtol=0, atol=0)
