"""Noise, packing, ids, schedules and samplers."""

import json
from functools import partial
from pathlib import Path

import pytest
import torch

from sampler import flow
from sampler.flow import SAMPLERS, SCHEDULES, euler, image_ids, noise, pack, text_ids, unpack

PUBLISHED = json.loads((Path(__file__).parent / "fixtures" / "schedules.json").read_text())


@pytest.mark.published
@pytest.mark.parametrize("case", PUBLISHED, ids=lambda c: f"{c['model']}-{c['steps']}-{c['width']}x{c['height']}")
def test_schedule_is_that_of_the_published_pipelines(case):
    ours = flow.flux(case["steps"], case["tokens"], shift=case["model"] == "dev")
    assert len(ours) == case["steps"] + 1
    assert max(abs(a - b) for a, b in zip(ours, case["sigmas"])) < 1e-6


@pytest.mark.parametrize("schedule", SCHEDULES.values())
def test_levels_fall_from_exactly_one_to_zero(schedule):
    """At 1 the log-SNR is infinite; a level a rounding error below would have one."""
    for tokens in 16, 256, 1024, 3840, 4096:
        for shift in True, False:
            levels = schedule(28, tokens, shift)
            assert levels[0] == 1 and levels[-1] == 0 and len(levels) == 29
            assert sorted(set(levels), reverse=True) == levels


@pytest.mark.published
def test_mu_is_not_clamped():
    """Above 4096 and below 256 tokens the line goes on: t = 1/2 becomes e^mu / (e^mu + 1)."""
    for tokens in (16, 256, 4096, 6400):
        mu = torch.tensor(0.5 + (tokens - 256) * 0.65 / 3840)
        assert flow.flux(2, tokens, shift=True)[1] == pytest.approx(torch.sigmoid(mu).item(), abs=1e-6)


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


def test_simple_takes_entries_of_comfyuis_tables():
    """sigmas[-(1 + int(x * len(sigmas) / steps))] of ModelSamplingFlux's, and for schnell of
    ModelSamplingDiscreteFlow's, in float32; the image's size has no part in it."""
    expected = [1.0, 0.949895, 0.88759, 0.808141, 0.703169, 0.558266, 0.344928, 0.0]
    assert flow.simple(7, 64, True) == flow.simple(7, 4096, True) == pytest.approx(expected, abs=1e-6)
    assert flow.simple(7, 64, False) == pytest.approx([1.0, 0.858, 0.715, 0.572, 0.429, 0.286, 0.143, 0.0])
    assert flow.simple(4, 64, False) == [1.0, 0.75, 0.5, 0.25, 0.0]


def test_beta_is_diffusers():
    """FlowMatchEulerDiscreteScheduler(use_beta_sigmas=True), a dev image of 512 x 512 and schnell; scipy's ppf."""
    dev = [1.0, 0.9106363, 0.7363176, 0.5366857, 0.362367, 0.2730033, 0.0]
    schnell = [1.0, 0.8975652, 0.6977492, 0.4689175, 0.2691015, 0.1666667, 0.0]
    assert flow.beta(6, 1024, True) == pytest.approx(dev, abs=1e-7)
    assert flow.beta(6, 1024, False) == pytest.approx(schnell, abs=1e-7)
    assert flow.beta(1, 1024, True) == [1.0, 0.0] and flow.beta(2, 64, False) == [1.0, 0.5, 0.0]
    quantiles = {
        0.0: 0.0, 1e-6: 1.8558824624053043e-10, 0.001: 1.855873851745199e-05, 0.25: 0.17568037865269498,
        0.4999: 0.49986127490549975, 0.7: 0.7659829961247643, 0.9999: 0.9999996001622842, 1.0: 1.0,
    }  # fmt: skip
    for p, x in quantiles.items():
        assert flow.beta_quantile(p) == pytest.approx(x, rel=1e-12)


def test_a_sampler_forgets_between_calls():
    """ "Regional for the first T steps" rests on it. Euler and Heun have no memory, so two slices are one;
    the multistep method begins the second slice as Euler does."""
    levels = flow.flux(6, 64, shift=True)
    img = torch.randn(1, 4, 64)

    def velocity(img, t, step):
        assert t in levels[step : step + 2]
        return torch.sin(3 * img) * t

    for sampler in SAMPLERS.values():
        *first, whole = sampler(velocity, img, levels, range(6))
        *_, half = sampler(velocity, img, levels, range(3))
        assert torch.equal(half, first[2])
        second = list(sampler(velocity, half, levels, range(3, 6)))
        assert torch.equal(second[-1], whole) == (sampler is not flow.dpmpp_2m)
        begins_as_euler = torch.equal(second[0], next(euler(velocity, half, levels, range(3, 6))))
        assert begins_as_euler == (sampler is not flow.heun)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_a_straight_flow_is_followed_exactly(sampler):
    eps, data = torch.randn(1, 4, 64), torch.randn(1, 4, 64)
    for schedule in SCHEDULES.values():
        levels = schedule(5, 64, True)
        seen = list(SAMPLERS[sampler](lambda img, t, step: eps - data, eps, levels, range(5)))
        assert len(seen) == 5 and torch.allclose(seen[-1], data, atol=1e-5)


def by_diffusers(name: str, velocity, img: torch.Tensor, levels: list[float]) -> torch.Tensor:
    """diffusers' counterpart, with these levels."""
    diffusers = pytest.importorskip("diffusers", reason="compares with diffusers, which is not installed")
    multistep = {"use_flow_sigmas": True, "prediction_type": "flow_prediction", "algorithm_type": "dpmsolver++"}
    solver = {
        "euler": diffusers.FlowMatchEulerDiscreteScheduler,
        "heun": diffusers.FlowMatchHeunDiscreteScheduler,
        "dpmpp_2m": partial(diffusers.DPMSolverMultistepScheduler, **multistep, solver_order=2),
    }[name]()
    solver.set_timesteps(len(levels) - 1)
    if name == "heun":
        levels = levels[:1] + [t for t in levels[1:-1] for _ in range(2)] + levels[-1:]
    solver.sigmas = torch.tensor(levels)
    solver.set_begin_index(0)
    for t, theirs in zip(levels[:-1], solver.timesteps, strict=True):
        img = solver.step(velocity(img, t, 0), theirs, img, return_dict=False)[0]
    return img


@pytest.mark.filterwarnings("ignore:__array__")
@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.parametrize("steps", [1, 2, 3, 8, 20])
def test_samplers_are_diffusers(name, steps):
    start = torch.randn(1, 4, 64, dtype=torch.float64, generator=torch.Generator().manual_seed(1))

    def velocity(img, t, step):
        return torch.cos(img + 3 * t)

    for schedule in SCHEDULES.values():
        levels = schedule(steps, 1024, True)
        *_, end = SAMPLERS[name](velocity, start, levels, range(steps))
        theirs = by_diffusers(name, velocity, start, levels)
        assert (end - theirs).abs().max() < 2e-6  # diffusers computes in float32
        *_, other = euler(velocity, start, levels, range(steps))
        is_euler = name == "euler" or steps == 1 or (name == "dpmpp_2m" and steps <= 3)
        assert torch.equal(end, other) == is_euler


@pytest.mark.parametrize("sampler", SAMPLERS.values())
def test_latents_accumulate_in_float32(sampler):
    """Steps of 1/1000 of a bfloat16 velocity would be lost if the sum were bfloat16 too."""
    start, levels = torch.full((1, 4, 64), 8.0), flow.flux(1000, 64, False)
    *_, end = sampler(lambda img, t, step: torch.ones_like(img).bfloat16(), start, levels, range(1000))
    assert end.dtype == torch.float32 and torch.allclose(end, torch.tensor(7.0), atol=1e-3)


def test_more_steps_than_a_table_has_levels_are_finite():
    """Of ComfyUI's 1,000 levels some come twice."""
    levels = flow.simple(1500, 64, False)
    assert len(set(levels)) == 1001
    for sampler in SAMPLERS.values():
        *_, end = sampler(lambda img, t, step: img.sin(), torch.ones(1, 4, 64), levels, range(1500))
        assert end.isfinite().all()
