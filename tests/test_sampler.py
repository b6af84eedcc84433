"""Noise, packing, ids, schedule and the Euler loop."""

import json
from pathlib import Path

import pytest
import torch

from sampler.flow import denoise, image_ids, noise, pack, sigmas, text_ids, unpack

SCHEDULES = json.loads((Path(__file__).parent / "fixtures" / "schedules.json").read_text())


@pytest.mark.published
@pytest.mark.parametrize("case", SCHEDULES, ids=lambda c: f"{c['model']}-{c['steps']}-{c['width']}x{c['height']}")
def test_schedule_is_that_of_the_published_pipelines(case):
    ours = sigmas(case["steps"], case["tokens"], shift=case["model"] == "dev")
    assert len(ours) == case["steps"] + 1
    assert max(abs(a - b) for a, b in zip(ours, case["sigmas"])) < 1e-6


@pytest.mark.published
def test_mu_is_not_clamped():
    """Above 4096 and below 256 tokens the line goes on: t = 1/2 becomes e^mu / (e^mu + 1)."""
    for tokens in (16, 256, 4096, 6400):
        mu = torch.tensor(0.5 + (tokens - 256) * 0.65 / 3840)
        assert sigmas(2, tokens, shift=True)[1] == pytest.approx(torch.sigmoid(mu).item(), abs=1e-6)


def test_noise_depends_on_the_seed_alone():
    a = noise(160, 96, 7)
    torch.manual_seed(123)
    assert a.shape == (1, 16, 12, 20) and a.dtype == torch.float32
    assert torch.equal(a, noise(160, 96, 7)) and not torch.equal(a, noise(160, 96, 8))


def test_a_token_holds_two_by_two_latents_channel_first():
    latents = torch.arange(16 * 4 * 6).float().reshape(1, 16, 4, 6)
    tokens = pack(latents)
    assert tokens.shape == (1, 6, 64)
    second_row_third_column = tokens[0, 1 * 3 + 2]
    for c in (0, 5, 15):
        expected = latents[0, c, 2:4, 4:6].flatten()
        assert torch.equal(second_row_third_column[4 * c : 4 * c + 4], expected)
    assert torch.equal(unpack(tokens, 48, 32), latents)


def test_image_ids_are_row_and_column():
    ids = image_ids(48, 32)
    assert ids.tolist() == [[[0, 0, 0], [0, 0, 1], [0, 0, 2], [0, 1, 0], [0, 1, 1], [0, 1, 2]]]
    assert not text_ids(5).any() and text_ids(5).shape == (1, 5, 3)


def test_euler_in_two_slices_is_euler_in_one():
    """ "Regional for the first T steps" rests on it: Euler keeps no memory between steps."""
    levels = sigmas(6, 64, shift=True)
    img = torch.randn(1, 4, 64)

    def velocity(img, t, step):
        assert t == levels[step]
        return torch.sin(3 * img) * t

    whole = denoise(velocity, img, levels, range(6))
    first = denoise(velocity, img, levels, range(2))
    assert torch.equal(whole, denoise(velocity, first, levels, range(2, 6)))


def test_euler_follows_a_straight_flow_exactly():
    eps, data = torch.randn(1, 4, 64), torch.randn(1, 4, 64)
    seen = []
    levels = sigmas(5, 64, shift=True)
    end = denoise(lambda img, t, step: eps - data, eps, levels, range(5), seen.append)
    assert torch.allclose(end, data, atol=1e-5)
    assert len(seen) == 5 and torch.equal(seen[-1], end)


def test_latents_accumulate_in_float32():
    """Steps of 1/1000 of a bfloat16 velocity would be lost if the sum were bfloat16 too."""
    start, levels = torch.full((1, 4, 64), 8.0), sigmas(1000, 64, False)
    end = denoise(lambda img, t, step: torch.ones_like(img).bfloat16(), start, levels, range(1000))
    assert end.dtype == torch.float32 and torch.allclose(end, torch.tensor(7.0), atol=1e-3)
