"""Trains the Stable Diffusion 3 demo checkpoint and writes it to `assets/demo/sd3/` in hub layout.

`python -m training.train_sd3` runs every stage that is not done yet, `python -m training.train_sd3 vae` one
of them; what was interrupted resumes. Stages: vae and text; latents; decoder and mmdit; polish; export. Those
between two semicolons can run side by side, each on one core (`OMP_NUM_THREADS=1`); mmdit takes the most time
by far. Under glibc, `MALLOC_MMAP_THRESHOLD_=4294967296 MALLOC_TRIM_THRESHOLD_=8589934592` saves a third of
it: without it every large tensor is given back to the kernel and faulted in anew. Not for latents: with it,
that stage would take 17 GB.
"""

from __future__ import annotations

import random
from functools import cache
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from backend.nn.autoencoder import Autoencoder, AutoencoderConfig
from backend.sd3.mmdit import MMDiT, MMDiTConfig, Modulation
from training.data import CACHE, Postcards, box_weights, postcards
from training.hub import DEMO, colour_fit, rounded, write_component, write_json, write_settings
from training.loop import Losses, Recipe, Weights, averaged_weights, fit, log, run_stages
from training.postcards import caption
from training.text import words_for
from training.triple_text import (
    JOINT,
    WIDTHS,
    TextEncoders,
    capitalised,
    teach_encoders,
)
from training.vae import encoded, from_encoder, train_autoencoder, train_decoder

SEED = 3
PICTURES = 16_000
FOLDER = DEMO / "sd3"

VAE_CONFIG: dict[str, Any] = {
    "_class_name": "AutoencoderKL",
    "act_fn": "silu",
    "block_out_channels": [16, 32, 64, 64],
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "in_channels": 3,
    "latent_channels": 16,
    "layers_per_block": 1,
    "norm_num_groups": 8,
    "out_channels": 3,
    "sample_size": 128,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
    "use_post_quant_conv": False,
    "use_quant_conv": False,
}
MMDIT_CONFIG: dict[str, Any] = {
    "_class_name": "SD3Transformer2DModel",
    "attention_head_dim": 26,
    "caption_projection_dim": 104,
    "dual_attention_layers": [],
    "in_channels": 16,
    "joint_attention_dim": JOINT,
    "num_attention_heads": 4,
    "num_layers": 6,
    "out_channels": 16,
    "patch_size": 2,
    "pooled_projection_dim": sum(WIDTHS),
    "pos_embed_max_size": 16,
    "qk_norm": "rms_norm",
    "sample_size": 16,
}
SCHEDULER_CONFIG: dict[str, Any] = {
    "_class_name": "FlowMatchEulerDiscreteScheduler",
    "num_train_timesteps": 1000,
    "shift": 1.0,
}
MODEL_INDEX: dict[str, Any] = {
    "_class_name": "StableDiffusion3Pipeline",
    "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
    "text_encoder": ["transformers", "CLIPTextModelWithProjection"],
    "text_encoder_2": ["transformers", "CLIPTextModelWithProjection"],
    "text_encoder_3": ["transformers", "T5EncoderModel"],
    "tokenizer": ["transformers", "CLIPTokenizer"],
    "tokenizer_2": ["transformers", "CLIPTokenizer"],
    "tokenizer_3": ["transformers", "T5TokenizerFast"],
    "transformer": ["diffusers", "SD3Transformer2DModel"],
    "vae": ["diffusers", "AutoencoderKL"],
}
DEFAULTS = {"steps": 16, "guidance_scale": 3.5, "sampler": "euler", "width": 128, "height": 128}

VAE_RECIPE = Recipe(steps=6000, learning_rate=2.5e-3, average=0.997, seed=SEED)
TEXT_RECIPE = Recipe(steps=2000, learning_rate=1.5e-3, average=0.99, seed=SEED)
DECODER_RECIPE = Recipe(steps=7500, learning_rate=1.5e-3, average=0.997, seed=SEED + 1)
MMDIT_RECIPE = Recipe(steps=8600, learning_rate=2e-3, warmup=200, average=0.998, seed=SEED)
POLISH_RECIPE = Recipe(steps=1500, learning_rate=8e-4, average=0.995, seed=SEED + 2)
BATCH = 64
TIED = "encoder.embed_tokens.weight"  # T5's embedding by its other name
CAPTION_DROPOUT, T5_DROPOUT, CLIP_DROPOUT = 0.1, 0.4, 0.1
NOISY = 0.6  # half of the sigmas are above this
POLISHED_FROM = 0.5  # the noisiest sigma that the decoder sees the MMDiT undo
BOX_WEIGHT = 3.0  # how much more than the rest of the picture the subject counts


# ------------------------------------------------------------------------------------------------------------
# The autoencoder, the latents and the text encoders


@cache
def shown() -> Postcards:
    return postcards(PICTURES, seed=1)


def new_vae() -> Autoencoder:
    torch.manual_seed(SEED)
    return Autoencoder(AutoencoderConfig.from_dict(VAE_CONFIG))


def new_encoders() -> TextEncoders:
    torch.manual_seed(SEED)
    return TextEncoders(FOLDER)


def averaged(stage: str, prefix: str = "") -> Weights | None:
    return averaged_weights(CACHE / f"sd3-{stage}.pt", prefix)


def train_vae() -> None:
    train_autoencoder(new_vae(), shown(), VAE_RECIPE, CACHE / "sd3-vae.pt")


def train_text() -> None:
    teach_encoders(new_encoders(), TEXT_RECIPE, CACHE / "sd3-text.pt")


def trained_encoders() -> TextEncoders:
    encoders = new_encoders()
    encoders.load_state_dict(averaged("text", "encoders.") or {})
    return encoders.eval().requires_grad_(False)


def trained_vae() -> Autoencoder:
    vae = new_vae()
    vae.load_state_dict(averaged("vae") or {})
    return vae.eval()


def make_latents() -> None:
    """Encodes every picture; finds the mean and the scaling that give latents unit variance."""
    if (CACHE / "sd3-latents.pt").exists():
        return
    raw, rgb = encoded(trained_vae(), shown())
    shift, scaling = raw.mean().item(), 1 / raw.std().item()
    latents = (raw - shift) * scaling
    kept = {"latents": latents, "shift": shift, "scaling": scaling, "rgb": colour_fit(latents, rgb)}
    torch.save(kept, CACHE / "sd3-latents.pt")
    log(f"latents: shift {shift:.4f}, scaling factor {scaling:.4f}")
    log(f"channels: means {latents.mean((0, 2, 3)).tolist()}, spreads {latents.std((0, 2, 3)).tolist()}")


def trained_latents() -> dict[str, Any]:
    return torch.load(CACHE / "sd3-latents.pt", weights_only=True)


def train_decoder_longer() -> None:
    """Needs the latents, and only `polish` needs it: it can run beside the `mmdit` stage."""
    kept = trained_latents()
    raw = from_encoder(kept["latents"] / kept["scaling"] + kept["shift"])
    train_decoder(trained_vae().train(), raw, shown(), DECODER_RECIPE, CACHE / "sd3-decoder.pt")


# ------------------------------------------------------------------------------------------------------------
# The MMDiT


@torch.no_grad()
def new_mmdit() -> MMDiT:
    """A network whose blocks at first change nothing and whose velocity is nil (adaLN-Zero,
    arXiv:2212.09748)."""
    torch.manual_seed(SEED)
    mmdit = MMDiT(MMDiTConfig.from_dict(MMDIT_CONFIG))
    for layer in (*(part.linear for part in mmdit.modules() if isinstance(part, Modulation)), mmdit.proj_out):
        for parameter in layer.parameters():
            parameter.zero_()
    return mmdit


def draw_sigmas(count: int, generator: torch.Generator) -> Tensor:
    """Sigmas (count,): stratified, for less noise in the loss. Every other one is logit-normal
    (arXiv:2403.03206), the rest are noisy ones: only there is it still open what is where."""
    spread = (torch.arange(count) + torch.rand(count, generator=generator)) / count
    sigmas = torch.special.ndtri(spread.clamp(1e-4, 1 - 1e-4)).sigmoid()
    sigmas[::2] = NOISY + (1 - NOISY) * spread[::2]
    return sigmas


def kept_at_random(share: float, generator: torch.Generator, *shape: int) -> Tensor:
    """Ones, and zeros for the `share` of a batch that is left out."""
    return (torch.rand(shape, generator=generator) >= share).float()


def told(encoders: TextEncoders, texts: list[str], generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Context (B, 2L, D) and pooled text (B, P), now and then without T5 or without CLIP."""
    with torch.no_grad():
        clip, t5, pooled = encoders.encode(texts)
    with_t5 = kept_at_random(T5_DROPOUT, generator, len(texts), 1, 1)
    with_clip = kept_at_random(CLIP_DROPOUT, generator, len(texts), 1, 1)
    return torch.cat([clip * with_clip, t5 * with_t5], 1).float(), (pooled * with_clip[:, 0]).float()


def train_mmdit() -> None:
    """The velocity of a rectified flow (arXiv:2209.03003), weighted towards the subject's box."""
    latents, scenes = trained_latents()["latents"], shown().scenes
    weights = box_weights(torch.from_numpy(shown().boxes), latents.shape[-1], BOX_WEIGHT)
    encoders, mmdit = trained_encoders(), new_mmdit()
    for block in mmdit.transformer_blocks:  # a minute of compiling, which a quarter less a step repays
        block.compile(dynamic=False)

    def losses_at(_: int, generator: torch.Generator) -> Losses:
        rng = random.Random(int(torch.randint(2**31, (), generator=generator)))
        indices = torch.randint(len(scenes), (BATCH,), generator=generator)
        texts = [
            capitalised(words_for(scenes[index], rng, CAPTION_DROPOUT), rng) for index in indices.tolist()
        ]
        sigmas = draw_sigmas(BATCH, generator)
        clean = latents[indices]
        noise, sigma = torch.randn(clean.shape, generator=generator), sigmas.view(-1, 1, 1, 1)
        with torch.autocast("cpu", torch.bfloat16):
            context, pooled = told(encoders, texts, generator)
            velocity = mmdit((1 - sigma) * clean + sigma * noise, 1000 * sigmas, context, pooled)
        error = (velocity.float() - (noise - clean)).square()
        return {
            "loss": (error * weights[indices]).mean(),
            "error": error[1::2].mean(),
            "noisy": error[::2].mean(),
        }

    fit(
        mmdit,
        losses_at,
        MMDIT_RECIPE,
        CACHE / "sd3-mmdit.pt",
        on_save=lambda _, weights: write_mmdit(weights),
    )


def polish() -> None:
    """The decoder learns from what the MMDiT makes of pictures that are a little, or quite, noisy."""
    kept, scenes = trained_latents(), shown().scenes
    vae, encoders, mmdit = new_vae(), trained_encoders(), new_mmdit()
    vae.load_state_dict(averaged("decoder") or averaged("vae") or {})
    mmdit.eval().load_state_dict(averaged("mmdit") or {})

    @torch.no_grad()
    def painted(indices: Tensor, generator: torch.Generator) -> Tensor:
        rng = random.Random(int(torch.randint(2**31, (), generator=generator)))
        texts = [caption(scenes[index], rng) for index in indices.tolist()]
        clean = kept["latents"][indices]
        sigmas = POLISHED_FROM * torch.rand(len(clean), generator=generator)
        noise, sigma = torch.randn(clean.shape, generator=generator), sigmas.view(-1, 1, 1, 1)
        noisy = (1 - sigma) * clean + sigma * noise
        with torch.autocast("cpu", torch.bfloat16):
            velocity = mmdit(noisy, 1000 * sigmas, *told(encoders, texts, generator)).float()
        return (noisy - sigma * velocity) / kept["scaling"] + kept["shift"]

    train_decoder(vae, painted, shown(), POLISH_RECIPE, CACHE / "sd3-polish.pt")


# ------------------------------------------------------------------------------------------------------------
# The checkpoint


def write_mmdit(weights: Weights) -> None:
    write_component(FOLDER / "transformer", MMDIT_CONFIG, weights, "diffusion_pytorch_model.safetensors")


def write_encoders() -> None:
    encoders = trained_encoders() if averaged("text") else new_encoders()
    for number, model in enumerate((*encoders.clips, encoders.t5), 1):
        assert isinstance(model, PreTrainedModel)
        config = model.config.to_diff_dict() | {"architectures": [type(model).__name__]}
        weights = {name: value for name, value in model.state_dict().items() if name != TIED}
        folder = FOLDER / ("text_encoder" + f"_{number}" * (number > 1))
        write_component(folder, config, weights, "model.safetensors")


def export() -> None:
    """Everything that was trained so far, and the small files around it."""
    untrained: dict[str, Any] = {"shift": 0.0, "scaling": 1.0, "rgb": torch.zeros(17, 3)}
    fitted = trained_latents() if (CACHE / "sd3-latents.pt").exists() else untrained
    vae = averaged("polish") or averaged("decoder") or averaged("vae") or new_vae().state_dict()
    config = VAE_CONFIG | {
        "scaling_factor": round(fitted["scaling"], 6),
        "shift_factor": round(fitted["shift"], 6),
    }
    write_component(FOLDER / "vae", config, vae, "diffusion_pytorch_model.safetensors")
    write_encoders()
    write_mmdit(averaged("mmdit") or new_mmdit().state_dict())
    write_json(FOLDER / "scheduler" / "scheduler_config.json", SCHEDULER_CONFIG)
    write_json(FOLDER / "model_index.json", MODEL_INDEX)
    write_settings(FOLDER, DEFAULTS, rounded(fitted["rgb"]))


STAGES = {
    "vae": train_vae,
    "text": train_text,
    "latents": make_latents,
    "decoder": train_decoder_longer,
    "mmdit": train_mmdit,
    "polish": polish,
    "export": export,
}

if __name__ == "__main__":
    run_stages(STAGES, __doc__)
