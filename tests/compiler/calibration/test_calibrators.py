"""Calibrators that look at an activation alone, against slow float64 formulas."""

import math
from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from support.examples import examples

from regcache.compiler.calibration.calibrators import (
    ScaleByValues,
    entropy_scale,
    min_max_scale,
    mse_scale,
    percentile_scale,
)
from regcache.compiler.calibration.folds import Observed
from regcache.compiler.calibration.quantizer import Quantizer
from regcache.compiler.calibration.ranges import choose_scale, output_error
from regcache.compiler.job.options import Calibrator
from regcache.compiler.job.targets import Target, TargetName
from regcache.passes.affine import Affine, IntegerType
from regcache.passes.errors import InputError

Floats = NDArray[np.float32]

BY_VALUES: dict[Calibrator, ScaleByValues] = {
    Calibrator.MIN_MAX: min_max_scale,
    Calibrator.PERCENTILE: percentile_scale,
    Calibrator.ENTROPY: entropy_scale,
    Calibrator.MSE: mse_scale,
}
CLIPPING = [percentile_scale, entropy_scale, mse_scale]
FORMATS: list[tuple[IntegerType, bool]] = [
    ("int8", True), ("uint8", False), ("int8", False), ("uint8", True)
]  # fmt: skip

drawn_format = st.sampled_from(FORMATS)
drawn_bits = st.integers(2, 8)


@st.composite
def activations(draw: st.DrawFn) -> Floats:
    """Rows [S, K] with heavy tails, of either sign or of one."""
    random = np.random.default_rng(draw(st.integers(0, 9999)))
    shape = draw(st.integers(1, 30)), draw(st.integers(1, 12))
    rows = random.standard_t(draw(st.sampled_from([1.5, 3, 30])), shape)
    rows = rows + draw(st.sampled_from([0, 0, 3, -50]))
    return (rows * draw(st.sampled_from([1e-3, 1.0, 1e3]))).astype(np.float32)


def ends(rows: Floats) -> tuple[float, float]:
    return float(rows.min()), float(rows.max())


@examples(30)
@given(rows=activations(), form=drawn_format, bits=drawn_bits, unseen=st.sampled_from([1.0, 1.5]))
@pytest.mark.parametrize("choose", BY_VALUES.values(), ids=BY_VALUES)
def test_the_range_holds_zero_and_nothing_beyond_what_was_observed(
    choose: ScaleByValues,
    rows: Floats,
    form: tuple[IntegerType, bool],
    bits: int,
    unseen: float,
) -> None:
    dtype, symmetric = form
    low, high = (end * unseen for end in ends(rows))
    scale = choose(rows, low, high, dtype, symmetric=symmetric, bits=bits)
    assert (scale.dtype, scale.bits) == (dtype, bits)
    whole = Affine.from_range(low, high, dtype, symmetric=symmetric, bits=bits)
    assert scale.scale <= whole.scale * (1 + 1e-6)
    first, last = scale.range
    assert first <= 0 <= last
    half = scale.scale * 0.501  # the zero point is rounded
    if symmetric:
        assert scale.zero_point == (0 if dtype == "int8" else 2 ** (bits - 1))
        assert last <= max(-low, high) * (1 + 1e-6)
    else:
        assert min(low, 0) - half <= first
        assert last <= max(high, 0) + half


@pytest.mark.parametrize("choose", BY_VALUES.values(), ids=BY_VALUES)
@pytest.mark.parametrize(("dtype", "symmetric"), FORMATS)
@pytest.mark.parametrize("value", [0.0, 1.5, -2.0, 1e-30, 1e-44, 1e4])
def test_a_constant_activation_comes_back(
    choose: ScaleByValues, dtype: IntegerType, symmetric: bool, value: float
) -> None:
    rows = np.full((4, 3), value, dtype=np.float32)
    for bits in (8, 3):
        scale = choose(rows, *ends(rows), dtype, symmetric=symmetric, bits=bits)
        np.testing.assert_allclose(scale.round_trip(rows), rows, rtol=1e-6, atol=1e-35)


@pytest.mark.parametrize("choose", [entropy_scale, mse_scale])
def test_of_ranges_as_good_as_each_other_the_widest_is_taken(choose: ScaleByValues) -> None:
    """A sample of zeros says nothing about the values that were observed."""
    rows = np.zeros((4, 3), dtype=np.float32)
    scale = choose(rows, -1.0, 2.0, "uint8", symmetric=False)
    assert scale == Affine.from_range(-1.0, 2.0, "uint8", symmetric=False)


@pytest.mark.parametrize("choose", BY_VALUES.values(), ids=BY_VALUES)
@pytest.mark.parametrize("bits", [1, 9])
def test_bits_that_are_no_quantization(choose: ScaleByValues, bits: int) -> None:
    rows = np.ones((2, 2), dtype=np.float32)
    with pytest.raises(InputError, match=f"2 to 8 bits, not {bits}"):
        choose(rows, 0.0, 1.0, "int8", symmetric=True, bits=bits)


@pytest.mark.parametrize("choose", CLIPPING)
@pytest.mark.parametrize(("dtype", "symmetric"), FORMATS)
@pytest.mark.parametrize("sign", [1, -1])
def test_a_single_outlier_is_clipped(
    choose: ScaleByValues, dtype: IntegerType, symmetric: bool, sign: int
) -> None:
    """Among 40,000 values near 0; the bulk is not."""
    random = np.random.default_rng(0)
    rows = random.standard_normal((200, 200)).astype(np.float32)
    rows[7, 9] = 20 * sign
    bits = 6 if choose is mse_scale else 8  # squared, one value of 20 outweighs fine steps
    scale = choose(rows, *ends(rows), dtype, symmetric=symmetric, bits=bits)
    first, last = scale.range
    assert max(-first, last) < 15
    assert first < -2
    assert last > 2


def percentile(values: Floats, percent: float) -> float:
    """Between the two nearest of the sorted values, linearly."""
    ordered = sorted(float(value) for value in values.ravel())
    place = (len(ordered) - 1) * percent / 100
    below = math.floor(place)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (place - below) * (ordered[above] - ordered[below])


@examples(40)
@given(rows=activations(), form=drawn_format, bits=drawn_bits, many=st.booleans())
def test_percentile_against_a_sorted_list(
    rows: Floats, form: tuple[IntegerType, bool], bits: int, many: bool
) -> None:
    dtype, symmetric = form
    if many:  # so that whole values are cut, not parts of the last gap
        others = np.random.default_rng(0).standard_t(2, (200, 150)) * np.abs(rows).mean()
        rows = np.concatenate([rows.ravel(), others.ravel()]).astype(np.float32)[:, None]
    low, high = ends(rows)
    if symmetric:
        last = percentile(np.abs(rows), 99.99)
        wanted = Affine.from_range(-last, last, dtype, symmetric=True, bits=bits)
    else:
        first, last = percentile(rows, 0.005), percentile(rows, 99.995)
        wanted = Affine.from_range(first, last, dtype, symmetric=False, bits=bits)
    found = percentile_scale(rows, low, high, dtype, symmetric=symmetric, bits=bits)
    assert found.scale == pytest.approx(wanted.scale, rel=1e-5)
    assert abs(found.zero_point - wanted.zero_point) <= 1  # may round either way


@pytest.mark.parametrize(("channels", "kept"), [(384, True), (2048, False)])
def test_percentile_of_one_channel_in_one_of_ten_rows(channels: int, kept: bool) -> None:
    random = np.random.default_rng(0)
    rows = random.standard_normal((100, channels)).astype(np.float32)
    rows[::10, 5] = 80.0
    scale = percentile_scale(rows, *ends(rows), "int8", symmetric=True)
    assert (scale.range[1] > 79) == kept
    assert scale.range[1] > 3


def squared_error(scale: Affine, rows: Floats) -> float:
    values = rows.astype(np.float64)
    integers = np.clip(np.rint(values / scale.scale) + scale.zero_point, *scale.limits)
    return float((((integers - scale.zero_point) * scale.scale - values) ** 2).sum())


@examples(60)
@given(rows=activations(), form=drawn_format, bits=drawn_bits)
def test_mse_is_no_worse_than_any_share_of_the_range(
    rows: Floats, form: tuple[IntegerType, bool], bits: int
) -> None:
    dtype, symmetric = form
    low, high = ends(rows)

    def error(first: float, last: float) -> float:
        tried = Affine.from_range(first, last, dtype, symmetric=symmetric, bits=bits)
        return squared_error(tried, rows)

    found = squared_error(mse_scale(rows, low, high, dtype, symmetric=symmetric, bits=bits), rows)
    for share in range(25, 101, 5):
        assert found <= error(max(low * share / 100, low), min(high * share / 100, high)) * 1.001


def test_mse_stays_inside_where_a_wider_range_would_fit_better() -> None:
    rows = np.array([[0.0, 1.0, *[1.1 / 3] * 10, *[2.2 / 3] * 10]], dtype=np.float32)
    scale = mse_scale(rows, 0.0, 1.0, "uint8", symmetric=False, bits=2)
    assert scale.range[1] <= 1 + 1e-6


def test_mse_clips_each_end_apart() -> None:
    random = np.random.default_rng(0)
    rows = random.uniform(-1, 1, (100, 100)).astype(np.float32)
    rows[0, 0] = 2.0  # at 5 bits not worth a step half as large again for all others
    scale = mse_scale(rows, -1.0, 2.0, "uint8", symmetric=False, bits=5)
    assert scale.range[0] == pytest.approx(-1.0, abs=0.1)
    assert scale.range[1] < 1.5


@pytest.mark.parametrize("count", [20_000, 200_000, 500_000])
def test_mse_weighs_an_outlier_against_the_rounding_of_all_others(count: int) -> None:
    """count * step^2 / 12 + (outlier - clip)^2 is least at this share of the outlier."""
    random = np.random.default_rng(0)
    rows = random.standard_normal((count // 100, 100)).astype(np.float32)
    rows[0, 0] = 100.0
    share = 1 / (1 + count / (12 * 127**2))
    scale = mse_scale(rows, *ends(rows), "int8", symmetric=True)
    assert scale.range[1] / 100 == pytest.approx(share, abs=0.051)  # the shares lie 0.05 apart


def divergence(values: Floats, clip: int, width: np.float32, scale: Affine) -> float:
    """KL of a histogram cut to `clip` bins a side from its quantized form, value by value."""
    kept: Counter[int] = Counter()
    clipped: Counter[int] = Counter()
    for place in np.rint(values.ravel() / width).astype(int).tolist():
        kept[place] += abs(place) <= clip
        clipped[max(-clip, min(clip, place))] += 1
    total = sum(kept.values())
    if not total:
        return math.inf
    integers = scale.quantize(np.array(list(clipped), np.float32) * width).tolist()
    sharing = Counter(integers)
    spread = dict.fromkeys(integers, 0.0)
    for place, integer in zip(clipped, integers, strict=True):
        spread[integer] += kept[place] / sharing[integer]
    result = 0.0
    for (_, count), integer in zip(clipped.items(), integers, strict=True):
        share = count / values.size
        result += share * math.log(share * total / max(spread[integer], 1e-4))
    return result


@examples(20)
@given(rows=activations(), form=drawn_format, bits=drawn_bits)
def test_entropy_against_every_clip(
    rows: Floats, form: tuple[IntegerType, bool], bits: int
) -> None:
    dtype, symmetric = form
    rows = rows[:8]
    low, high = ends(rows)
    limit = max(-low, high)
    found = entropy_scale(rows, low, high, dtype, symmetric=symmetric, bits=bits)
    tried: dict[Affine, float] = {}
    for clip in range(2048, 127, -8):
        bound = clip * limit / 2048
        scale = Affine.from_range(
            max(low, -bound), min(high, bound), dtype, symmetric=symmetric, bits=bits
        )
        lost = divergence(rows, clip, np.float32(limit / 2048), scale)
        tried[scale] = min(lost, tried.get(scale, math.inf))
    assert tried[found] <= min(tried.values()) + 1e-9


def test_entropy_clips_nothing_where_nothing_is_lost() -> None:
    rows = np.array([[-1.0, 1.0]], dtype=np.float32)
    scale = entropy_scale(rows, -1.0, 1.0, "int8", symmetric=True, bits=3)
    assert scale == Affine(1 / 3, 0, "int8", 3)


def test_entropy_keeps_the_levels_where_the_values_are() -> None:
    """Values evenly over [-1, 1] and one at 4: a clip near 1 keeps the histogram's shape."""
    rows = np.linspace(-1, 1, 30_000, dtype=np.float32).reshape(-1, 100)
    rows[0, 0] = 4.0
    scale = entropy_scale(rows, *ends(rows), "int8", symmetric=True)
    assert scale.range[1] == pytest.approx(1.0, abs=0.06)


@pytest.mark.parametrize(("dtype", "symmetric"), FORMATS)
@pytest.mark.parametrize("bits", [8, 4])
def test_the_quantizer_uses_its_calibrator(dtype: IntegerType, symmetric: bool, bits: int) -> None:
    random = np.random.default_rng(0)
    rows = random.standard_t(3, (300, 64)).astype(np.float32)
    weight = random.standard_normal((64, 8)).astype(np.float32)
    seen = Observed(rows.min(axis=0), rows.max(axis=0), rows)
    target = Target(TargetName.ORT_CPU, dtype, symmetric, "int8", "", bits, bits)
    found = {one: Quantizer(target, one).scale([weight], seen) for one in Calibrator}
    arguments = (seen.low, seen.high, dtype)
    wanted = {
        name: choose(rows, *arguments, symmetric=symmetric, bits=bits)
        for name, choose in BY_VALUES.items()
    }
    wanted[Calibrator.OUTPUT_ERROR] = choose_scale(
        rows, output_error([weight]), *arguments, symmetric=symmetric, bits=bits
    )
    assert found == wanted
    assert found[Calibrator.MIN_MAX] == Affine.from_range(
        *arguments, symmetric=symmetric, bits=bits
    )
    assert len(set(found.values())) > 3
