"""What the trainings of the demo checkpoints take for granted."""

from __future__ import annotations

import random
from pathlib import Path

import torch
from transformers import AutoTokenizer, CLIPTextModelWithProjection

from backend.sampling.wuerstchen import CosineSchedule
from training.data import box_weights
from training.postcards import caption, random_scene
from training.text import caption_tokenizer, pooled_and_tokens, text_config, token_ids
from training.train_cascade import SCHEDULER_CONFIG, STAGE_B_CONFIG, STAGE_C_CONFIG
from training.train_sd3 import MMDIT_CONFIG, draw_sigmas, new_mmdit, told
from training.triple_text import JOINT, WIDTHS, TextEncoders
from training.wuerstchen import draw_ratios, new_unet, signal_at


def test_stable_cascade_is_trained_on_the_schedule_that_it_is_sampled_with() -> None:
    ratios = torch.linspace(0, 1, 41)
    sampled = CosineSchedule.from_dict(SCHEDULER_CONFIG).alpha_bars(ratios)
    assert torch.allclose(signal_at(ratios), sampled, atol=1e-6)


def test_half_of_the_timesteps_are_noisy_ones_and_none_is_left_out() -> None:
    ratios = draw_ratios(1000, torch.Generator().manual_seed(0))
    assert ratios[::2].min() >= 0.6
    assert ratios.max() <= 1
    assert torch.histc(ratios, 20, 0, 1).min() >= 20


@torch.no_grad()
def test_new_networks_of_both_stages_find_nearly_all_to_be_noise() -> None:
    pooled, text = torch.randn(4, 96), torch.randn(4, 8, 96)
    prior, decoder = new_unet(STAGE_C_CONFIG, 0), new_unet(STAGE_B_CONFIG, 0)
    small, large = torch.randn(4, 16, 3, 3), torch.randn(4, 4, 16, 16)
    for unet, noise, conditioning in (
        (prior, small, prior.condition(pooled, text, torch.zeros(4, 1, 96))),
        (decoder, large, decoder.condition(pooled, effnet=torch.randn(4, 16, 3, 3), size=(16, 16))),
    ):
        error = unet(noise, torch.ones(4), conditioning) - noise
        assert error.square().mean() < 0.1


@torch.no_grad()
def test_padding_changes_nothing_in_a_caption(tmp_path: Path) -> None:
    tokenizer = caption_tokenizer(tmp_path)
    model = CLIPTextModelWithProjection(text_config(tokenizer, width=32)).eval()
    ids = token_ids(tokenizer, [caption(random_scene(random.Random(1)), random.Random(1))])
    length = int((ids == ids[:, -1:]).int().argmax()) + 1
    pooled, tokens = pooled_and_tokens(model, ids)
    bare_pooled, bare_tokens = pooled_and_tokens(model, ids[:, :length])
    assert torch.allclose(pooled, bare_pooled, atol=1e-5)
    assert torch.allclose(tokens[:, :length], bare_tokens, atol=1e-5)
    mask = torch.ones_like(ids)
    mask[:, length:] = 0
    masked = model(input_ids=ids, attention_mask=mask, output_hidden_states=True)
    assert torch.equal(tokens, masked.hidden_states[-1])


def test_the_subject_weighs_more_and_the_mean_stays() -> None:
    weights = box_weights(torch.tensor([[32.0, 64.0, 64.0, 128.0]]), 16, 3.0)
    assert weights.shape == (1, 1, 16, 16)
    assert abs(float(weights.mean()) - 1) < 1e-5
    assert torch.allclose(weights[0, 0, 8:, 4:8], 4 * weights[0, 0, 0, 0])
    assert (weights[0, 0, :8] == weights[0, 0, 0, 0]).all()


def test_every_other_sigma_is_a_noisy_one_and_none_is_left_out() -> None:
    sigmas = draw_sigmas(1000, torch.Generator().manual_seed(0))
    assert sigmas[::2].min() >= 0.6
    assert ((sigmas > 0) & (sigmas <= 1)).all()
    assert torch.histc(sigmas, 5, 0, 1).min() >= 20


def test_a_t5_tokenizer_reads_any_text_and_captions_by_the_word(tmp_path: Path) -> None:
    encoders = TextEncoders(tmp_path)
    for tokenizer in (encoders.t5_tokenizer, AutoTokenizer.from_pretrained(tmp_path / "tokenizer_3")):
        assert (tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id) == (0, 1, 2)
        said = tokenizer.convert_ids_to_tokens(tokenizer("A red hot-air balloon, xy 空").input_ids)
        words = ["▁A", "▁red", "▁hot", "-", "air", "▁balloon", ",", "▁", "x", "y", "▁", "<unk>", "</s>"]
        assert said == words
        assert tokenizer("").input_ids == [1]
        padded = tokenizer("red", padding="max_length").input_ids
        assert padded[1:] == [1] + [0] * (tokenizer.model_max_length - 2)


@torch.no_grad()
def test_the_denoiser_is_told_with_and_without_t5(tmp_path: Path) -> None:
    torch.manual_seed(0)
    encoders = TextEncoders(tmp_path).eval()
    context, pooled = told(encoders, ["a red house"] * 64, torch.Generator().manual_seed(0))
    length = context.shape[1] // 2
    assert context.shape == (64, 2 * length, JOINT)
    assert pooled.shape == (64, sum(WIDTHS))
    without_t5 = (context[:, length:] == 0).all(2).all(1)
    without_clip = (context[:, :length] == 0).all(2).all(1)
    assert 12 <= without_t5.sum() <= 40
    assert 1 <= without_clip.sum() <= 16
    assert torch.equal(without_clip, (pooled == 0).all(1))


@torch.no_grad()
def test_a_new_mmdit_finds_no_velocity() -> None:
    velocity = new_mmdit()(
        torch.randn(2, 16, 16, 16),
        torch.tensor([10.0, 900.0]),
        torch.randn(2, 64, JOINT),
        torch.randn(2, MMDIT_CONFIG["pooled_projection_dim"]),
    )
    assert (velocity == 0).all()
