"""The judge of the pocket model's images: clean objects, deformed ones, and the intervals of its measures."""

import numpy as np
import pytest

from benchmarks.intervals import mean_of, wilson
from benchmarks.judge import DEFORMED
from pocket.detect import LEAST_FIT, shape_fits
from pocket.judge import drawn, judge, random_case
from pocket.scenes import SHAPES


def test_sixteen_drawn_objects_are_read_and_clean():
    measures = [judge(drawn(case), case) for case in (random_case(seed, 16) for seed in range(4))]
    for name, least in ("shape", 0.98), ("all", 0.98), ("strict", 0.95):
        assert np.mean([each[name] for each in measures]) >= least, name


@pytest.mark.parametrize("name", SHAPES)
def test_an_outline_fits_its_own_shape_alone(name):
    for radius in 16, 40:
        fits = shape_fits(DEFORMED["as drawn"](np.random.default_rng(0), name, radius))
        assert fits[name] > LEAST_FIT > max(fit for other, fit in fits.items() if other != name)


@pytest.mark.parametrize("kind", ["cut by 30 %", "bent (.3)", "halfway to another shape"])
def test_deformed_outlines_are_not_clean(kind):
    rng = np.random.default_rng(1)
    for name in "star", "triangle", "heart":
        fits = [shape_fits(DEFORMED[kind](rng, name, 40)) for _ in range(8)]
        assert np.mean([fit[name] >= LEAST_FIT for fit in fits]) <= 0.5, name


def test_intervals():
    assert wilson(1, 50) == pytest.approx((1, 0.9287, 1), abs=1e-3)  # Wilson's for 50 of 50
    assert mean_of([1.0] * 50) == wilson(1.0, 50)
    assert mean_of([2.0, 2.0], is_fraction=False) == (2, 2, 2)
    values = np.random.default_rng(0).random(400)
    mean = mean_of([*values, np.nan])
    half = 1.96 * values.std(ddof=1) / 20
    assert mean == pytest.approx((values.mean(), values.mean() - half, values.mean() + half), abs=0.005)
    assert np.isnan(mean_of([np.nan]).value)
    assert mean_of([0.5]).value == 0.5 and np.isnan(mean_of([0.5]).low)
