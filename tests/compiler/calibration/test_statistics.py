"""Streaming statistics against numpy over everything at once."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from regcache.compiler.calibration.folds import Folded, Observed
from regcache.compiler.calibration.observe import HalvedStatistics, SiteStatistics
from regcache.compiler.calibration.statistics import (
    ChannelRange,
    NormHistogram,
    RowSample,
    TokenNorms,
    tokens_per_image,
)


def draw(seed: int, images: int, tokens: int, width: int) -> NDArray[np.float32]:
    random = np.random.default_rng(seed)
    scale = np.exp(random.normal(size=(images, tokens, 1)))
    return (random.standard_normal((images, tokens, width)) * scale).astype(np.float32)


SHAPES = st.tuples(st.integers(0, 99), st.integers(1, 9), st.integers(1, 12), st.integers(1, 8))


@given(shape=SHAPES, split=st.integers(1, 9))
def test_channel_range_equals_numpy(shape: tuple[int, int, int, int], split: int) -> None:
    activations = draw(*shape)
    seen = ChannelRange()
    for start in range(0, len(activations), split):
        seen.update(activations[start : start + split])
    np.testing.assert_array_equal(seen.low, activations.min(axis=(0, 1)))
    np.testing.assert_array_equal(seen.high, activations.max(axis=(0, 1)))


@given(shape=SHAPES, split=st.integers(1, 9))
def test_token_norms_find_the_largest_values(shape: tuple[int, int, int, int], split: int) -> None:
    activations = draw(*shape)
    seen = TokenNorms(kept=3)
    for start in range(0, len(activations), split):
        seen.update(activations[start : start + split])
    peaks = np.abs(activations).max(axis=-1)
    wanted = np.sort(peaks.ravel())[::-1][:3]
    np.testing.assert_allclose([abs(item.value) for item in seen.outliers], wanted)
    for item in seen.outliers:
        assert activations[item.image, item.token, item.channel] == np.float32(item.value)
    assert seen.linf.maximum == pytest.approx(peaks.max())
    assert seen.l2.maximum == pytest.approx(np.linalg.norm(activations, axis=-1).max(), rel=1e-5)


@given(seed=st.integers(0, 999), count=st.integers(200, 2000), spread=st.floats(0.1, 4))
def test_percentiles_within_a_bin(seed: int, count: int, spread: float) -> None:
    norms = np.exp(np.random.default_rng(seed).normal(0, spread, count)).astype(np.float32)
    histogram = NormHistogram()
    for part in np.array_split(norms, 7):
        histogram.update(part)
    assert histogram.maximum == norms.max()
    for share in (50, 99):
        exact = np.percentile(norms, share, method="inverted_cdf")
        assert histogram.percentile(share) == pytest.approx(exact, rel=0.025)


def test_norms_of_zero_and_of_nothing() -> None:
    histogram = NormHistogram()
    assert histogram.percentile(50) == 0
    histogram.update(np.zeros(5, dtype=np.float32))
    assert histogram.percentile(99) == 0


@settings(max_examples=30)
@given(images=st.integers(1, 3000), tokens=st.integers(1, 40))
def test_the_sample_stays_small(images: int, tokens: int) -> None:
    sample = RowSample.of(images, seed=0)
    # Growing peaks are the worst case: every image breaks the record.
    for index in range(images):
        sample.update(np.full((1, tokens, 2), 0.0 if index % 2 else -1.0, dtype=np.float32))
    assert len(sample.rows) <= 1024
    assert sample.images == images


def test_the_sample_holds_class_token_and_outliers() -> None:
    activations = draw(3, images=2000, tokens=9, width=4)
    activations[1234, 5] = 1e4  # one massive token in an image that the stride passes over
    sample = RowSample.of(len(activations), seed=0)
    assert sample.stride > 1
    for start in range(0, len(activations), 7):
        sample.update(activations[start : start + 7])
    rows = sample.rows
    assert (rows == activations[1234, 5]).all(axis=1).any()
    for index in range(0, len(activations), sample.stride):
        largest = activations[index, np.abs(activations[index]).max(axis=1).argmax()]
        assert (rows == activations[index, 0]).all(axis=1).any()
        assert (rows == largest).all(axis=1).any()


def test_the_sample_is_seeded() -> None:
    activations = draw(4, images=6, tokens=30, width=3)
    samples = [RowSample.of(6, seed) for seed in (1, 1, 2)]
    for sample in samples:
        sample.update(activations)
    np.testing.assert_array_equal(samples[0].rows, samples[1].rows)
    assert not np.array_equal(samples[0].rows, samples[2].rows)


def test_layouts_of_other_exporters() -> None:
    activations = draw(5, images=3, tokens=7, width=4)
    for spelled in (
        activations,
        activations.reshape(21, 4),
        np.ascontiguousarray(activations.swapaxes(0, 1)),
    ):
        np.testing.assert_array_equal(tokens_per_image(spelled, 3), activations)
    for shape in ((3,), (5, 4), (2, 3, 4, 5), (4, 5, 6)):
        with pytest.raises(ValueError, match="holds no 3 sequences"):
            tokens_per_image(np.zeros(shape, np.float32), 3)


def empty_halves(images: int) -> HalvedStatistics:
    one, other = (
        SiteStatistics(ChannelRange(), RowSample.of(-(-images // 2), seed)) for seed in (0, 1)
    )
    return HalvedStatistics((one, other))


@given(shape=SHAPES, cuts=st.lists(st.integers(1, 4), min_size=1, max_size=9))
def test_halves_see_every_other_image_however_they_come(
    shape: tuple[int, int, int, int], cuts: list[int]
) -> None:
    activations = draw(*shape)
    seen, images, start = empty_halves(len(activations)), len(activations), 0
    while start < images:
        size = cuts[start % len(cuts)]
        seen.update(activations[start : start + size])
        start += size
    assert seen.images == images
    assert len(seen.observed) == min(images, 2)
    for half, found in enumerate(seen.observed):
        part = activations[half::2]
        np.testing.assert_array_equal(found.lows, part.min(axis=(0, 1)))
        np.testing.assert_array_equal(found.highs, part.max(axis=(0, 1)))
        alone = RowSample.of(-(-images // 2), seed=half)
        alone.update(part)
        np.testing.assert_array_equal(found.rows, alone.rows)
        for image in part:  # few images: each is in the sample
            assert (found.rows == image[0]).all(axis=1).any()


@given(shape=SHAPES)
def test_the_whole_is_both_halves(shape: tuple[int, int, int, int]) -> None:
    activations = draw(*shape)
    seen = empty_halves(len(activations))
    seen.update(activations)
    whole = seen.whole
    np.testing.assert_array_equal(whole.lows, activations.min(axis=(0, 1)))
    np.testing.assert_array_equal(whole.highs, activations.max(axis=(0, 1)))
    np.testing.assert_array_equal(whole.rows, np.concatenate([half.rows for half in seen.observed]))
    assert (whole.low, whole.high) == (activations.min(), activations.max())


@given(shape=SHAPES)
def test_dividing_the_channels_of_what_was_observed(shape: tuple[int, int, int, int]) -> None:
    rows = draw(*shape).reshape(-1, shape[-1])
    factors = np.exp(np.random.default_rng(shape[0]).normal(size=shape[-1])).astype(np.float32)
    seen = Observed(rows.min(axis=0), rows.max(axis=0), rows)
    before, divided = rows.copy(), seen.divided(factors)
    np.testing.assert_array_equal(divided.rows, rows / factors)
    np.testing.assert_array_equal(divided.lows, (rows / factors).min(axis=0))
    np.testing.assert_array_equal(divided.highs, (rows / factors).max(axis=0))
    assert (divided.low, divided.high) == (divided.rows.min(), divided.rows.max())
    np.testing.assert_array_equal(seen.rows, before)


def test_a_single_image_is_held_out_of_nothing() -> None:
    activations = draw(0, 1, 3, 4)
    seen = empty_halves(1)
    seen.update(activations)
    found = Folded.of(seen)
    assert found.folds == ()
    assert found.held_out is found.whole


@given(shape=SHAPES)
def test_halves_are_tried_on_each_other(shape: tuple[int, int, int, int]) -> None:
    activations = draw(*shape)
    seen = empty_halves(len(activations))
    seen.update(activations)
    assert len(seen.folds) == (0 if len(activations) == 1 else 2)
    for fold, half in zip(seen.folds, seen.observed, strict=False):
        np.testing.assert_array_equal(fold.fit.rows, half.rows)
    for fold, half in zip(seen.folds, reversed(seen.observed), strict=False):
        np.testing.assert_array_equal(fold.other.rows, half.rows)
