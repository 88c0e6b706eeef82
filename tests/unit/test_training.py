"""What the trainings of the demo checkpoints take for granted."""

from __future__ import annotations

import random
from pathlib import Path

import torch
from transformers import CLIPTextModelWithProjection

from backend.sampling.wuerstchen import CosineSchedule
from training.data import box_weights
from training.postcards import caption, random_scene
from training.text import caption_tokenizer, pooled_and_tokens, text_config, token_ids
from training.train_cascade import SCHEDULER_CONFIG, STAGE_B_CONFIG, STAGE_C_CONFIG
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
