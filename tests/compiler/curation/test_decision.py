"""The interval of a gain: against a bootstrap in plain Python, the normal law, and by sense."""

import random
import statistics
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from support.examples import examples

from regcache.compiler.curation.decision import Improvement, measure_improvement

ERRORS = st.floats(0, 2, width=32)
PAIRS = st.lists(st.tuples(ERRORS, ERRORS), min_size=1, max_size=20)


def improvement(gains: NDArray[np.float64] | list[float], seed: int = 0) -> Improvement:
    """Of gains below 1, on top of random errors."""
    without = np.random.default_rng(seed).uniform(1, 2, len(gains))
    return measure_improvement(without.tolist(), (without - np.asarray(gains)).tolist(), seed)


def bootstrap(gains: list[float], resamples: int) -> tuple[float, float]:
    """The 2.5th and 97.5th percentile of the mean of resampled gains."""
    draw = random.Random(1)
    means = sorted(statistics.fmean(draw.choices(gains, k=len(gains))) for _ in range(resamples))
    return means[round(0.025 * resamples)], means[round(0.975 * resamples) - 1]


@pytest.mark.parametrize(("n", "seed"), [(3, 0), (8, 1), (16, 2), (16, 3)])
def test_the_interval_of_a_bootstrap_in_plain_python(n: int, seed: int) -> None:
    gains = np.random.default_rng(seed).standard_t(3, n) * 1e-2
    seen = improvement(gains, seed)
    low, high = bootstrap(gains.tolist(), resamples=4000)
    # Of 2000 resamples an end is known to 1.5 % of the width, for the normal law.
    assert seen.gain_low == pytest.approx(low, abs=0.08 * (high - low))
    assert seen.gain_high == pytest.approx(high, abs=0.08 * (high - low))
    assert seen.gain == pytest.approx(statistics.fmean(gains))
    assert seen.n_images == n


@pytest.mark.parametrize("mean", [-0.01, 0.0, 0.004, 0.01])
def test_many_images_follow_the_normal_law(mean: float) -> None:
    gains = np.random.default_rng(5).normal(mean, 0.02, 400)
    seen = improvement(gains)
    half = 1.96 * gains.std(ddof=1) / 400**0.5
    assert seen.gain_low == pytest.approx(gains.mean() - half, abs=0.15 * half)
    assert seen.gain_high == pytest.approx(gains.mean() + half, abs=0.15 * half)
    assert seen.certain is (mean > 0.003)


@examples(50)
@given(pairs=PAIRS, seed=st.integers(0, 2**31))
def test_exchange_turns_the_sign(pairs: list[tuple[float, float]], seed: int) -> None:
    without, with_setting = zip(*pairs, strict=True)
    one = measure_improvement(without, with_setting, seed)
    other = measure_improvement(with_setting, without, seed)
    close = pytest.approx([-one.gain_high, -one.gain, -one.gain_low], abs=1e-12)
    assert [other.gain_low, other.gain, other.gain_high] == close
    assert (other.without, other.with_setting) == (one.with_setting, one.without)
    assert not (one.certain and other.certain)


@examples(50)
@given(pairs=PAIRS, seed=st.integers(0, 2**31))
def test_the_interval_lies_within_the_gains(pairs: list[tuple[float, float]], seed: int) -> None:
    without, with_setting = zip(*pairs, strict=True)
    seen = measure_improvement(without, with_setting, seed)
    gains = [one - other for one, other in pairs]
    bounds = [min(gains), seen.gain_low, seen.gain_high, max(gains)]
    assert all(low <= high + 1e-12 for low, high in pairwise(bounds))
    assert seen.without - seen.with_setting == pytest.approx(seen.gain, abs=1e-12)
    assert seen == measure_improvement(without, with_setting, seed)


@examples(50)
@given(errors=st.lists(ERRORS, min_size=1, max_size=20))
def test_equal_errors_are_never_certain(errors: list[float]) -> None:
    seen = measure_improvement(errors, errors, 0)
    assert (seen.gain_low, seen.gain, seen.gain_high) == (0, 0, 0)
    assert not seen.certain


@pytest.mark.parametrize("gain", [1e-6, 0.3])
@pytest.mark.parametrize("n", [2, 16])
def test_a_constant_gain_is_certain(gain: float, n: int) -> None:
    seen = improvement([gain] * n)
    assert seen.certain
    assert [seen.gain_low, seen.gain_high] == pytest.approx([gain, gain])
    assert not improvement([-gain] * n).certain


@pytest.mark.parametrize("n", [2, 6, 16, 48])
def test_one_bad_image_among_small_gains_is_not_certain(n: int) -> None:
    """Even where the mean is a gain."""
    small = [1e-3] * (n - 1)
    for loss in (0.999e-3 * (n - 1), 0.5):
        seen = improvement([-loss, *small])
        assert not seen.certain
        assert (seen.gain > 0) is (loss < 0.5)
    assert improvement([1e-3, *small]).certain


def test_gains_of_both_signs_are_not_certain() -> None:
    assert not improvement([0.1, -0.1] * 8).certain
    assert not improvement([0.1, -0.08] * 8).certain


@pytest.mark.parametrize("n", [8, 16])
def test_chance_alone_is_seldom_certain(n: int) -> None:
    """With no true gain: 2.5 % in theory, a few more for so few images."""
    chance = np.random.default_rng(7)
    found = [improvement(chance.normal(0, 1e-2, n), seed).certain for seed in range(200)]
    assert 0 < sum(found) < 20
