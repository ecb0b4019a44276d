"""The range search against a float64 formula of the output error."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from support.examples import examples

from regcache.compiler.calibration.ranges import choose_scale, output_error, search_range
from regcache.passes.affine import Affine, IntegerType


def error_of(affine: Affine, rows: NDArray[np.float32], weight: NDArray[np.float32]) -> float:
    """||(Q(X) - X) W||^2, spelled anew in float64."""
    limits = np.iinfo(affine.dtype)
    x = rows.astype(np.float64)
    integers = np.clip(np.rint(x / affine.scale) + affine.zero_point, limits.min, limits.max)
    restored = (integers - affine.zero_point) * affine.scale
    return float((((restored - x) @ weight.astype(np.float64)) ** 2).sum())


@examples(40)
@given(
    seed=st.integers(0, 999),
    rows=st.integers(2, 30),
    inner=st.integers(1, 20),
    columns=st.lists(st.integers(1, 20), min_size=1, max_size=3),
    dtype=st.sampled_from(["int8", "uint8"]),
    symmetric=st.booleans(),
)
def test_never_worse_than_the_whole_range(
    seed: int, rows: int, inner: int, columns: list[int], dtype: IntegerType, symmetric: bool
) -> None:
    random = np.random.default_rng(seed)
    x = random.standard_t(2, (rows, inner)).astype(np.float32)
    weights = [random.standard_normal((inner, n)).astype(np.float32) for n in columns]
    low, high = float(x.min()), float(x.max())
    chosen = choose_scale(x, output_error(weights), low, high, dtype, symmetric=symmetric)
    whole = Affine.from_range(low, high, dtype, symmetric=symmetric)
    weight = np.concatenate(weights, axis=1)
    found, bound = error_of(chosen, x, weight), error_of(whole, x, weight)
    assert found <= bound * 1.001 + 1e-9
    assert chosen.dtype == dtype


def test_a_channel_that_no_weight_reads_is_clipped() -> None:
    random = np.random.default_rng(0)
    x = random.standard_normal((64, 8)).astype(np.float32)
    x[:, 3] *= 8
    weight = random.standard_normal((8, 4)).astype(np.float32)
    weight[3] = 0
    low, high = float(x.min()), float(x.max())
    chosen = choose_scale(x, output_error([weight]), low, high, "uint8", symmetric=False)
    assert chosen.scale < 0.5 * (high - low) / 255


def test_an_outlier_that_matters_is_kept() -> None:
    random = np.random.default_rng(0)
    x = random.standard_normal((64, 8)).astype(np.float32)
    x[0, 3] = 40.0
    weight = random.standard_normal((8, 4)).astype(np.float32)
    chosen = choose_scale(x, output_error([weight]), float(x.min()), 40.0, "uint8", symmetric=False)
    assert chosen.range[1] == pytest.approx(40.0, rel=0.12)


def test_a_constant_activation_has_a_scale() -> None:
    x = np.zeros((4, 3), dtype=np.float32)
    chosen = choose_scale(
        x, output_error([np.ones((3, 2), np.float32)]), 0.0, 0.0, "uint8", symmetric=False
    )
    np.testing.assert_array_equal(chosen.round_trip(x), x)


@examples(60)
@given(
    seed=st.integers(0, 999),
    spread=st.floats(0, 2),
    tail=st.sampled_from([2, 4, 30]),
    symmetric=st.booleans(),
)
def test_ranges_that_are_left_out_would_not_have_been_chosen(
    seed: int, spread: float, tail: int, symmetric: bool
) -> None:
    random = np.random.default_rng(seed)
    x = random.standard_t(tail, (40, 24)) * np.exp(spread * random.standard_normal(24))
    rows = x.astype(np.float32)
    error = output_error([random.standard_normal((24, 16)).astype(np.float32)])
    tried: list[list[float]] = [[], []]

    def measure(bounds: tuple[float, float], fine: bool) -> float:
        affine = Affine.from_range(*bounds, "int8", symmetric=symmetric)
        found = error(affine.round_trip(rows) - rows)
        tried[fine].append(found)
        return found

    low, high = float(rows.min()), float(rows.max())
    all_of_them, fewer = (
        search_range(
            lambda bounds, fine=fine: measure(bounds, fine),  # type: ignore[misc]
            low,
            high,
            symmetric=symmetric,
            fine=fine,
        )
        for fine in (False, True)
    )
    assert len(tried[True]) <= len(tried[False])
    assert measure(fewer, True) <= 1.05 * measure(all_of_them, False)
