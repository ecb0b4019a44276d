"""A sample of output channels: which, what it says of all, and what errors it measures."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from regcache.compiler.quantization import sampled_weight
from regcache.compiler.quantization.sampled_weight import SampledWeight

Floats = NDArray[np.float32]


def draw(seed: int, *shape: int) -> Floats:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


@given(
    inputs=st.integers(1, 9),
    outputs=st.lists(st.integers(1, 9), min_size=1, max_size=3),
    most=st.integers(1, 30),
)
def test_channels_from_all_over_the_weights(inputs: int, outputs: list[int], most: int) -> None:
    weights = [draw(number, inputs, count) for number, count in enumerate(outputs)]
    whole = np.concatenate(weights, axis=1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sampled_weight, "COLUMNS", most)
        patch.setattr(sampled_weight, "_FEWER", most)
        found = SampledWeight.of(weights)
    np.testing.assert_array_equal(found.peaks, np.abs(whole).max(axis=1))
    count = min(most, whole.shape[1])
    places = [
        int(np.flatnonzero((whole == one[:, None]).all(axis=0))[0]) for one in found.columns.T
    ]
    assert places == sorted(set(places))
    assert len(places) == count
    gaps = np.diff([*places, whole.shape[1]])
    assert gaps.max() - gaps.min() <= 1
    added = draw(9, 4, inputs)
    wanted = np.square(added.astype(np.float64) @ whole[:, places]).sum()
    factors = np.linspace(0.5, 2, inputs, dtype=np.float32)
    measure = found.error_behind(factors)
    assert measure(added / factors) == pytest.approx(wanted, rel=1e-4)
