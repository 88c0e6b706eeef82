"""Trains the Stable Diffusion 1.5 demo checkpoint and writes it to `assets/demo/sd15/` in hub layout.

`python -m training.train_sd15` runs every stage that is not done yet, `python -m training.train_sd15 vae` one
of them; what was interrupted resumes. Stages: vae, latents, text, decoder, unet, export. The whole takes an
hour and a half on two cores, one (`OMP_NUM_THREADS=1`) for the decoder, one for the UNet, side by side. Under
glibc, `MALLOC_MMAP_THRESHOLD_=4294967296 MALLOC_TRIM_THRESHOLD_=8589934592` saves a third of the
time: without it every large tensor is given back to the kernel and faulted in anew.
"""

from __future__ import annotations

import random
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from transformers import CLIPTextModel, CLIPTokenizer

from backend.nn.autoencoder import Autoencoder, AutoencoderConfig
from backend.sd15.unet import UNet, UNetConfig
from training.data import CACHE, Postcards, box_weights, postcards
from training.hub import DEMO, colour_fit, rounded, write_component, write_json, write_settings
from training.loop import Losses, Recipe, Weights, fit, log, run_stages
from training.text import (
    attribute_head,
    attribute_loss,
    caption_tokenizer,
    text_config,
    token_ids,
    warm_up,
    words_for,
)
from training.vae import encoded, from_encoder, train_autoencoder, train_decoder

SEED = 15
PICTURES = 16_000
FOLDER = DEMO / "sd15"

VAE_CONFIG: dict[str, Any] = {
    "_class_name": "AutoencoderKL",
    "act_fn": "silu",
    "block_out_channels": [24, 48, 64, 96],
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "in_channels": 3,
    "latent_channels": 4,
    "layers_per_block": 1,
    "norm_num_groups": 8,
    "out_channels": 3,
    "sample_size": 128,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
}
UNET_CONFIG: dict[str, Any] = {
    "_class_name": "UNet2DConditionModel",
    "act_fn": "silu",
    "attention_head_dim": 3,  # the number of heads, as in the published config
    "block_out_channels": [64, 96, 96],
    "center_input_sample": False,
    "cross_attention_dim": 128,
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
    "downsample_padding": 1,
    "flip_sin_to_cos": True,
    "freq_shift": 0,
    "in_channels": 4,
    "layers_per_block": 1,
    "mid_block_scale_factor": 1,
    "norm_eps": 1e-05,
    "norm_num_groups": 16,
    "out_channels": 4,
    "sample_size": 16,
    "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
}
SCHEDULER_CONFIG: dict[str, Any] = {
    "_class_name": "PNDMScheduler",
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "clip_sample": False,
    "num_train_timesteps": 1000,
    # At the noisiest steps a small error in the noise is a large one in the picture; not so in velocity.
    "prediction_type": "v_prediction",
    "set_alpha_to_one": False,
    "skip_prk_steps": True,
    "steps_offset": 1,
    "timestep_spacing": "leading",
    "trained_betas": None,
}
MODEL_INDEX: dict[str, Any] = {
    "_class_name": "StableDiffusionPipeline",
    "feature_extractor": [None, None],
    "requires_safety_checker": False,
    "safety_checker": [None, None],
    "scheduler": ["diffusers", "PNDMScheduler"],
    "text_encoder": ["transformers", "CLIPTextModel"],
    "tokenizer": ["transformers", "CLIPTokenizer"],
    "unet": ["diffusers", "UNet2DConditionModel"],
    "vae": ["diffusers", "AutoencoderKL"],
}
DEFAULTS = {"steps": 20, "guidance_scale": 5.0, "sampler": "ddim", "width": 128, "height": 128}

VAE_RECIPE = Recipe(steps=6400, learning_rate=2e-3, average=0.997, seed=SEED)
DECODER_RECIPE = Recipe(steps=1000, learning_rate=8e-4, average=0.995, seed=SEED + 1)
TEXT_RECIPE = Recipe(steps=400, learning_rate=1e-3, warmup=50, seed=SEED)
UNET_RECIPE = Recipe(steps=8500, learning_rate=1.3e-3, warmup=200, average=0.998, seed=SEED, save_every=250)
BATCH = 24  # in each of two processes
CAPTION_DROPOUT = 0.1
SNR_CAP = 5.0
NOISY = 0.8  # half of the timesteps are above this share of 1000
READING_WEIGHT = 0.1
BOX_WEIGHT = 3.0  # how much more than the rest of the picture the subject counts


# ------------------------------------------------------------------------------------------------------------
# The autoencoder and the latents


@cache
def shown() -> Postcards:
    return postcards(PICTURES, seed=1)


def new_vae() -> Autoencoder:
    torch.manual_seed(SEED)
    return Autoencoder(AutoencoderConfig.from_dict(VAE_CONFIG))


def train_vae() -> None:
    train_autoencoder(new_vae(), shown(), VAE_RECIPE, CACHE / "sd15-vae.pt")


def trained_vae(stage: str = "vae") -> Autoencoder:
    vae = new_vae()
    vae.load_state_dict(torch.load(CACHE / f"sd15-{stage}.pt", weights_only=True)["averaged"])
    return vae.eval()


def polish_decoder() -> None:
    """Needs the latents, and nothing needs it: it can run beside the `unet` stage."""
    vae, kept = trained_vae().train(), trained_latents()
    raw = from_encoder(kept["latents"] / kept["scaling"])
    train_decoder(vae, raw, shown(), DECODER_RECIPE, CACHE / "sd15-decoder.pt")


def make_latents() -> None:
    """Encodes every picture; finds the scaling that gives latents unit variance, and how they look in RGB."""
    if (CACHE / "sd15-latents.pt").exists():
        return
    raw, rgb = encoded(trained_vae(), shown())
    scaling = 1 / raw.std().item()
    fitted = colour_fit(raw * scaling, rgb)  # (5, 3)
    torch.save({"latents": raw * scaling, "scaling": scaling, "rgb": fitted}, CACHE / "sd15-latents.pt")
    log(f"latents: scaling factor {scaling:.4f}, channel means {(raw * scaling).mean((0, 2, 3)).tolist()}")


def trained_latents() -> dict[str, Any]:
    return torch.load(CACHE / "sd15-latents.pt", weights_only=True)


# ------------------------------------------------------------------------------------------------------------
# The text model and the UNet


@cache
def tokenizer() -> CLIPTokenizer:
    return caption_tokenizer(FOLDER / "tokenizer")


class Denoiser(nn.Module):
    """The UNet with the text model that it is trained together with."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(SEED)
        self.text_encoder = CLIPTextModel(text_config(tokenizer()))
        self.unet = UNet(UNetConfig.from_dict(UNET_CONFIG))
        self.head = attribute_head(self.text_encoder)

    def forward(self, latents: Tensor, timesteps: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Latents (B, 4, 16, 16), timesteps (B,), token ids (B, 32) → velocity (B, 4, 16, 16), and what
        the text model understood: attribute scores (B, 29)."""
        text = self.text_encoder(input_ids=ids)
        return self.unet(latents, timesteps, text.last_hidden_state), self.head(text.pooler_output)


def alphas_cumprod() -> Tensor:
    """(1000,): the share of signal that is left at each timestep."""
    start, end = SCHEDULER_CONFIG["beta_start"], SCHEDULER_CONFIG["beta_end"]
    return torch.cumprod(1 - torch.linspace(start**0.5, end**0.5, 1000) ** 2, 0)


def train_text() -> None:
    """Warms the text model up; what it learned is the UNet training's starting point."""
    warm_up(Denoiser().text_encoder, tokenizer(), TEXT_RECIPE, CACHE / "sd15-text.pt")


def train_unet() -> None:
    """Velocity prediction, weighted after min-SNR (arXiv:2303.09556) and towards the subject's box."""
    model = Denoiser()
    reader = torch.load(CACHE / "sd15-text.pt", weights_only=True)["averaged"]
    prefix = "text_model."
    model.text_encoder.load_state_dict(
        {name.removeprefix(prefix): value for name, value in reader.items() if name.startswith(prefix)}
    )
    model.head.load_state_dict({name: reader[f"head.{name}"] for name in ("weight", "bias")})
    latents, weights = (
        trained_latents()["latents"],
        box_weights(torch.from_numpy(shown().boxes), 16, BOX_WEIGHT),
    )
    scenes, labels, signal = shown().scenes, shown().labels(), alphas_cumprod()

    def losses_at(_: int, generator: torch.Generator) -> Losses:
        rng = random.Random(int(torch.randint(2**31, (), generator=generator)))
        indices = torch.randint(len(scenes), (BATCH,), generator=generator)
        ids = token_ids(
            tokenizer(), [words_for(scenes[index], rng, CAPTION_DROPOUT) for index in indices.tolist()]
        )
        # Stratified, for less noise in the loss. Every other one is from the noisiest fifth: only there is it
        # still open where things are, for the text to decide.
        spread = (torch.arange(BATCH) + torch.rand(BATCH, generator=generator)) / BATCH
        spread[::2] = NOISY + (1 - NOISY) * spread[::2]
        timesteps = (spread * 1000).long().clamp(max=999)
        clean, noise = latents[indices], torch.randn((BATCH, *latents.shape[1:]), generator=generator)
        share = signal[timesteps].view(-1, 1, 1, 1)
        noisy = share.sqrt() * clean + (1 - share).sqrt() * noise
        velocity = share.sqrt() * noise - (1 - share).sqrt() * clean
        with torch.autocast("cpu", torch.bfloat16):
            predicted, understood = model(noisy, timesteps, ids)
        error = (predicted.float() - velocity).square()
        snr = share / (1 - share)
        # Min-SNR weighs the picture's error by min(snr, 5), which is nothing where noise hides all but the
        # composition: places were hardly learned. By one more than that, they are.
        weighted = error * weights[indices] * ((snr.clamp(max=SNR_CAP) + 1) / (snr + 1))
        # Left to the UNet, the text model forgets whatever the UNet does not use yet: left became right.
        reading = attribute_loss(understood.float(), labels[indices])
        loss = weighted.mean() + READING_WEIGHT * reading
        return {"loss": loss, "reading": reading, "error": error[1::2].mean(), "noisiest": error[::2].mean()}

    fit(
        model,
        losses_at,
        UNET_RECIPE,
        CACHE / "sd15-unet.pt",
        on_save=lambda _, averaged: write_networks(averaged),
    )


# ------------------------------------------------------------------------------------------------------------
# The checkpoint


def write_networks(averaged: Weights) -> None:
    """The UNet and the text model, from a `Denoiser`'s weights."""

    def part(prefix: str) -> Weights:
        return {
            name.removeprefix(prefix): value for name, value in averaged.items() if name.startswith(prefix)
        }

    write_component(FOLDER / "unet", UNET_CONFIG, part("unet."), "diffusion_pytorch_model.safetensors")
    config = text_config(tokenizer()).to_diff_dict() | {
        "architectures": ["CLIPTextModel"],
        "model_type": "clip_text_model",
    }
    write_component(
        FOLDER / "text_encoder",
        config,
        {f"text_model.{name}": value for name, value in part("text_encoder.").items()},
        "model.safetensors",
    )


def export() -> None:
    """Everything that was trained so far, and the small files around it."""
    latents_file, unet_file = CACHE / "sd15-latents.pt", CACHE / "sd15-unet.pt"
    trained_stages = [stage for stage in ("decoder", "vae") if (CACHE / f"sd15-{stage}.pt").exists()]
    vae = trained_vae(trained_stages[0]) if trained_stages else new_vae()
    untrained: dict[str, Any] = {"scaling": 0.18215, "rgb": torch.zeros(5, 3)}
    fitted = trained_latents() if latents_file.exists() else untrained
    config = VAE_CONFIG | {"scaling_factor": round(fitted["scaling"], 6)}
    write_component(FOLDER / "vae", config, vae.state_dict(), "diffusion_pytorch_model.safetensors")
    trained = (
        torch.load(unet_file, weights_only=True)["averaged"]
        if unet_file.exists()
        else Denoiser().state_dict()
    )
    write_networks(trained)
    write_json(FOLDER / "scheduler" / "scheduler_config.json", SCHEDULER_CONFIG)
    write_json(FOLDER / "model_index.json", MODEL_INDEX)
    write_settings(FOLDER, DEFAULTS, rounded(fitted["rgb"]))


STAGES = {
    "vae": train_vae,
    "latents": make_latents,
    "text": train_text,
    "decoder": polish_decoder,
    "unet": train_unet,
    "export": export,
}

if __name__ == "__main__":
    run_stages(STAGES, __doc__)
