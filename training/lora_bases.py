"""The base that a LoRA is trained on: of each family what it makes of pictures and of captions, and how wrong
its network is about a picture in noise.

Letters: B pictures, T captions, H W pixels, h w latent pixels, L text tokens, D features.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from backend.cascade import defaults as cascade_defaults
from backend.cascade.optional import EffnetEncoder
from backend.cascade.unet import UNet as CascadeUNet
from backend.cascade.unet import UNetConfig as CascadeConfig
from backend.errors import CheckpointError
from backend.nn.autoencoder import Autoencoder, AutoencoderConfig
from backend.sampling.flow import FlowConfig, shifted
from backend.sampling.schedules import ScheduleConfig, alpha_bars
from backend.sampling.wuerstchen import CosineSchedule
from backend.sd3 import defaults as sd3_defaults
from backend.sd3.mmdit import MMDiT, MMDiTConfig
from backend.sd3.pipeline import CLIPS, T5, check_together, joined
from backend.sd15 import defaults as sd15_defaults
from backend.sd15.unet import UNet, UNetConfig
from backend.text.encoders import load_clip_text, load_projected_clip_text, load_tokenizer
from backend.text.prompts import tokenise
from backend.text.t5 import encode_t5, load_t5, load_t5_tokenizer, t5_length
from backend.weights.parts import Parts, dtype_name
from backend.weights.source import Source
from training.loop import log
from training.wuerstchen import error_weight

T5_TOKENS = 256
T5_LEFT_OUT = (
    0.3  # of the captions are read without T5, as in Stable Diffusion 3's own training: it can be off
)
EFFNET_SHARE = 0.75  # of a picture's side is what the encoder of Stage C's latents is shown

Words = tuple[Tensor, ...]  # what a network is told of captions, T rows each


class Noised(NamedTuple):
    """Latents in noise (B, C, h, w), how much there is of it (B,), as the network is told, what it is to find
    in them (B, C, h, w), and how much an error counts."""

    latents: Tensor
    level: Tensor
    wanted: Tensor
    weight: Tensor | float = 1.0
    with_t5: Tensor | None = None  # (B,) whether it is told what T5 reads


class Reader(NamedTuple):
    """A text encoder and its tokenizer."""

    tokenizer: Any
    model: Any


class Base(ABC):
    """A checkpoint to train on, its parts loaded as they are asked for, in `dtype` on `device`."""

    network_name: str
    saved_as: str  # what LoRA files call the network
    encoder_names: tuple[str, ...]
    others: tuple[str, ...]  # the parts that it is taught with besides
    optional: tuple[str, ...] = ()
    layers: ClassVar[Mapping[str, re.Pattern[str]]]  # the network's that a LoRA may learn terms for
    side_step: int  # the sides of pictures are multiples of it
    text_prefix = ""  # of the text encoders' layers in a LoRA file

    def __init__(self, source: Source, device: torch.device, dtype: torch.dtype) -> None:
        """Downloads what is missing. Raises CheckpointError for a part that is not to be had, AccessError
        where the hub refuses."""
        self.source, self.device, self.dtype = source, device, dtype
        required = (self.network_name, *self.encoder_names, *self.others)
        lacking = [name for name in required if not source.has(name)]
        if lacking:
            raise CheckpointError(
                f"{source.name} holds no {', '.join(lacking)}, without which no LoRA can be trained on it; "
                "set --config-from to a folder or hub repository with one, or take another base"
            )
        parts = [*required, *filter(source.has, self.optional)]
        last = ""
        for loading in source.fetch(parts, dtype_name(dtype)):
            if loading.component != last:
                log(f"downloading {loading.component}")
            last = loading.component

    @property
    @abstractmethod
    def side(self) -> int:
        """The side in pixels of the pictures that the checkpoint is made for."""

    @abstractmethod
    def network(self) -> Any:
        """The denoiser, loaded."""

    @abstractmethod
    def reader(self, name: str) -> Reader:
        """A text encoder, loaded."""

    @abstractmethod
    def latents(self, pixels: Sequence[Tensor]) -> Tensor:
        """Pictures (3, H, W) in [-1, 1] → their latents (B, C, h, w) as the network has them."""

    @abstractmethod
    def words(self, readers: Mapping[str, Reader], captions: Sequence[str]) -> Words:
        """What the network is told of captions by the text encoders."""

    @abstractmethod
    def noised(self, clean: Tensor, generator: torch.Generator) -> Noised:
        """Latents (B, C, h, w) in noise of every strength."""

    @abstractmethod
    def find(self, network: Any, given: Noised, words: Words) -> Tensor:
        """What the network finds (B, C, h, w), float32."""

    def also(self, captions: Sequence[str]) -> Words:
        """What else the network is told, by encoders that are never trained."""
        return ()

    def _load(self, name: str, build: Any) -> Any:
        return (
            Parts(source=self.source, device=self.device)
            .network(name, self.dtype, build)
            .load(str(self.device))
        )

    @torch.no_grad()
    def _by_vae(self, pixels: Sequence[Tensor]) -> Tensor:
        config = AutoencoderConfig.from_dict(self.source.config("vae"))
        vae = self._load("vae", lambda: Autoencoder(config))
        raw = torch.cat([vae.encode(each[None].to(self.device, self.dtype))[0].float() for each in pixels])
        return (raw - (config.shift_factor or 0.0)) * config.scaling_factor


class SD15(Base):
    """Stable Diffusion 1.x and 2.x: noise, velocity or picture, as the scheduler's config says."""

    network_name = saved_as = "unet"
    encoder_names, others, side_step, text_prefix = ("text_encoder",), ("vae",), 64, "text_model."
    layers: ClassVar = {
        "attention": re.compile(r".*\.attn[12]\.to_(q|k|v|out\.0)"),
        "all": re.compile(r"(down_blocks|mid_block|up_blocks)\..*(?<!time_emb_proj)"),
    }

    def __init__(self, source: Source, device: torch.device, dtype: torch.dtype) -> None:
        super().__init__(source, device, dtype)
        self.config = UNetConfig.from_dict(source.config("unet"))
        self.schedule = ScheduleConfig.from_dict(source.config("scheduler"))
        self.signal = torch.from_numpy(alpha_bars(self.schedule)).float()
        taken, made = self.config.in_channels, AutoencoderConfig.from_dict(source.config("vae"))
        if taken != made.latent_channels:
            raise CheckpointError(
                f"{source.name} has a UNet with {taken} input channels; text to image takes "
                f"{made.latent_channels}"
            )

    @property
    def side(self) -> int:
        return int(sd15_defaults.defaults(self.source)["width"])

    def network(self) -> UNet:
        return self._load("unet", lambda: UNet(self.config))

    def reader(self, name: str) -> Reader:
        return Reader(load_tokenizer(self.source), load_clip_text(self.source, name, self.dtype, self.device))

    def latents(self, pixels: Sequence[Tensor]) -> Tensor:
        return self._by_vae(pixels)

    def words(self, readers: Mapping[str, Reader], captions: Sequence[str]) -> Words:
        tokenizer, encoder = readers["text_encoder"]
        ids = tokenise(tokenizer, encoder, captions, raw=True).ids
        return (encoder(input_ids=ids).last_hidden_state,)

    def noised(self, clean: Tensor, generator: torch.Generator) -> Noised:
        timesteps = (spread(len(clean), generator) * len(self.signal)).long()
        noise = torch.randn(clean.shape, generator=generator).to(clean)
        share = each_of(self.signal[timesteps], clean)
        noisy = share.sqrt() * clean + (1 - share).sqrt() * noise
        wanted = {
            "epsilon": noise,
            "v_prediction": share.sqrt() * noise - (1 - share).sqrt() * clean,
            "sample": clean,
        }
        return Noised(noisy, timesteps.to(self.device), wanted[self.schedule.prediction_type])

    def find(self, network: UNet, given: Noised, words: Words) -> Tensor:
        return network(given.latents.to(self.dtype), given.level, words[0]).float()


class SD3(Base):
    """Stable Diffusion 3 and 3.5: the velocity of a rectified flow."""

    network_name = saved_as = "transformer"
    encoder_names, others, optional = tuple(CLIPS), ("vae",), (T5,)
    layers: ClassVar = {
        "attention": re.compile(r".*\.attn2?\.(to_(q|k|v|out\.0)|add_[qkv]_proj|to_add_out)"),
        "all": re.compile(r"transformer_blocks\.\d+\.(attn|ff).*"),
    }

    def __init__(self, source: Source, device: torch.device, dtype: torch.dtype) -> None:
        super().__init__(source, device, dtype)
        self.config = MMDiTConfig.from_dict(source.config("transformer"))
        vae = AutoencoderConfig.from_dict(source.config("vae"))
        check_together(source, self.config, vae)
        self.schedule = FlowConfig.from_dict(source.config("scheduler"))
        self.side_step = vae.scale * self.config.patch_size

    @property
    def side(self) -> int:
        return int(sd3_defaults.defaults(self.source)["width"])

    def network(self) -> MMDiT:
        return self._load("transformer", lambda: MMDiT(self.config))

    def reader(self, name: str) -> Reader:
        encoder = load_projected_clip_text(self.source, name, self.dtype, self.device)
        return Reader(load_tokenizer(self.source, CLIPS[name]), encoder)

    def latents(self, pixels: Sequence[Tensor]) -> Tensor:
        return self._by_vae(pixels)

    def words(self, readers: Mapping[str, Reader], captions: Sequence[str]) -> Words:
        """The CLIPs' features (T, L, D) side by side, and pooled ones (T, P)."""
        features, pooled = [], []
        for tokenizer, encoder in readers.values():
            ids = tokenise(tokenizer, encoder, captions, raw=True).ids
            out = encoder(input_ids=ids, output_hidden_states=True)
            features.append(out.hidden_states[-2])
            pooled.append(out.text_embeds)
        return torch.cat(features, dim=2), torch.cat(pooled, dim=1)

    @torch.no_grad()
    def also(self, captions: Sequence[str]) -> Words:
        """T5's features (T, L, D); zeros where the checkpoint has none of it."""
        tokens = t5_length(self.source, T5_TOKENS)
        if not self.source.has(T5):
            return (torch.zeros(len(captions), tokens, self.config.joint_attention_dim, device=self.device),)
        encoder = load_t5(self.source, T5, "full", self.dtype, self.device)
        tokenizer = load_t5_tokenizer(self.source)
        rows = [encode_t5(encoder, tokenizer, [caption], tokens, raw=True) for caption in captions]
        return (torch.cat(rows),)

    def noised(self, clean: Tensor, generator: torch.Generator) -> Noised:
        patches = clean.shape[-2] * clean.shape[-1] // self.config.patch_size**2
        # logit-normal (arXiv:2403.03206), then shifted as the sampler shifts them
        normal = torch.special.ndtri(spread(len(clean), generator).clamp(1e-4, 1 - 1e-4))
        sigmas = torch.from_numpy(shifted(normal.sigmoid().numpy(), self.schedule.shift_for(patches)))
        noise = torch.randn(clean.shape, generator=generator).to(clean)
        noisy = torch.lerp(clean, noise, each_of(sigmas, clean))
        with_t5 = torch.rand(len(clean), generator=generator) >= T5_LEFT_OUT
        levels = (self.schedule.num_train_timesteps * sigmas).to(self.device)
        return Noised(noisy, levels, noise - clean, with_t5=with_t5)

    def find(self, network: MMDiT, given: Noised, words: Words) -> Tensor:
        clip, pooled, t5 = words
        if given.with_t5 is not None:
            t5 = t5 * given.with_t5.to(t5).view(-1, 1, 1)
        context = joined(clip, t5, self.config.joint_attention_dim, t5.shape[1])
        return network(given.latents.to(self.dtype), given.level, context, pooled).float()


class StableCascade(Base):
    """Stable Cascade's Stage C: the noise in its latents, which its own encoder makes of pictures."""

    network_name = saved_as = "prior"
    encoder_names, others, side_step = ("text_encoder",), ("effnet_encoder",), 64
    layers: ClassVar = {
        "attention": re.compile(r".*\.attention\.to_(q|k|v|out\.0)"),
        "all": re.compile(r"(down|up)_blocks\..*\.(attention|kv_mapper|channelwise)\..*"),
    }

    def __init__(self, source: Source, device: torch.device, dtype: torch.dtype) -> None:
        if source.has("prior_lite") and not source.has("prior"):
            self.network_name = "prior_lite"
        super().__init__(source, device, dtype)
        self.config = CascadeConfig.from_dict(source.config(self.network_name))
        self.schedule = CosineSchedule.from_dict(source.config("prior_scheduler"))

    @property
    def side(self) -> int:
        return int(cascade_defaults.defaults(self.source)["width"])

    def network(self) -> CascadeUNet:
        return self._load(self.network_name, lambda: CascadeUNet(self.config))

    def reader(self, name: str) -> Reader:
        encoder = load_projected_clip_text(self.source, name, self.dtype, self.device)
        return Reader(load_tokenizer(self.source), encoder)

    @torch.no_grad()
    def latents(self, pixels: Sequence[Tensor]) -> Tensor:
        encoder = self._load("effnet_encoder", EffnetEncoder)
        small = [
            functional.interpolate(each[None], scale_factor=EFFNET_SHARE, mode="bilinear", antialias=True)
            for each in pixels
        ]
        return torch.cat([encoder((each / 2 + 0.5).to(self.device, self.dtype)).float() for each in small])

    def words(self, readers: Mapping[str, Reader], captions: Sequence[str]) -> Words:
        """Pooled text (T, P) and tokens (T, L, D)."""
        tokenizer, encoder = readers["text_encoder"]
        tokens = tokenise(tokenizer, encoder, captions, raw=True)
        out = encoder(input_ids=tokens.ids, attention_mask=tokens.mask, output_hidden_states=True)
        return out.text_embeds, out.hidden_states[-1]

    def noised(self, clean: Tensor, generator: torch.Generator) -> Noised:
        ratios = spread(len(clean), generator)
        signal = each_of(self.schedule.alpha_bars(ratios), clean)
        noise = torch.randn(clean.shape, generator=generator).to(clean)
        noisy = signal.sqrt() * clean + (1 - signal).sqrt() * noise
        return Noised(noisy, ratios.to(self.device), noise, error_weight(signal))

    def find(self, network: CascadeUNet, given: Noised, words: Words) -> Tensor:
        pooled, text = words
        images = pooled.new_zeros(len(pooled), 1, self.config.clip_image_in_channels or 1)
        conditioning = network.condition(pooled, text, images)
        return network(given.latents.to(self.dtype), given.level, conditioning).float()


BASES: dict[str, type[Base]] = {"sd15": SD15, "sd3": SD3, "stable_cascade": StableCascade}
TEXT_ATTENTION = re.compile(r".*\.self_attn\.(q|k|v|out)_proj")


def spread(count: int, generator: torch.Generator) -> Tensor:
    """(count,) numbers in [0, 1), stratified, for less noise in the loss."""
    return ((torch.arange(count) + torch.rand(count, generator=generator)) / count).clamp(max=1 - 1e-6)


def each_of(values: Tensor, like: Tensor) -> Tensor:
    """(B,) → (B, 1, 1, 1), where and as `like` is."""
    return values.to(like).view(-1, 1, 1, 1)


def layers_of(network: nn.Module, pattern: re.Pattern[str]) -> dict[str, nn.Linear | nn.Conv2d]:
    """The layers whose whole path the pattern matches, but for convolutions of each channel apart."""
    return {
        path: layer
        for path, layer in network.named_modules()
        if (isinstance(layer, nn.Linear) or (isinstance(layer, nn.Conv2d) and layer.groups == 1))
        and pattern.fullmatch(path)
    }
