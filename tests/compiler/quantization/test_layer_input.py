"""Moments of what layers read, shifted, equalized and rounded, against float64 over the rows."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from support.examples import examples

from regcache.compiler.calibration.algebra import NUMPY
from regcache.compiler.calibration.number_format import EVENLY, Emphasis
from regcache.compiler.calibration.placing import algebra_of, algebra_on
from regcache.compiler.calibration.stored_rows import StoredRows
from regcache.compiler.quantization.layer_input import LayerInput
from regcache.passes.affine import Affine
from regcache.runtime.device import Device

Floats = NDArray[np.float32]


def stored(folder: Path, shape: tuple[int, int, int], seed: int = 0) -> StoredRows:
    store = StoredRows.of(folder, shape[0], seed)
    store.update(np.random.default_rng(seed).normal(0, 3, shape).astype(np.float32))
    return store


@examples(40)
@given(
    seed=st.integers(0, 999),
    shape=st.tuples(st.integers(1, 6), st.integers(1, 9), st.integers(1, 5)),
    scaled=st.booleans(),
    shifted=st.booleans(),
    divided=st.booleans(),
    emphasis=st.sampled_from([EVENLY, Emphasis(20.0), Emphasis(3.0, 0.5)]),
)
def test_moments_are_those_of_all_rows(
    tmp_path_factory: pytest.TempPathFactory,
    seed: int,
    shape: tuple[int, int, int],
    scaled: bool,
    shifted: bool,
    divided: bool,
    emphasis: Emphasis,
) -> None:
    store, channels = stored(tmp_path_factory.getbasetemp(), shape, seed), shape[-1]
    random = np.random.default_rng(seed + 1)
    shifts = random.normal(size=channels).astype(np.float32) if shifted else None
    factors = random.uniform(0.5, 2, channels).astype(np.float32) if divided else None
    scale = Affine(0.05, 100, "uint8") if scaled else None
    plain: Floats = np.concatenate(list(store.chunks()))
    if shifts is not None:
        plain = plain - shifts
    if factors is not None:
        plain = plain / factors
    rounded = (plain if scale is None else scale.round_trip(plain)).astype(np.float64)
    read = LayerInput(store, scale, shifts, factors, emphasis)
    found = read.moments(NUMPY)
    assert found.rows == len(plain)
    kept = len(plain) // shape[0]
    counts = np.where(np.arange(len(plain)) % kept == 0, emphasis.first, 1.0)[:, None]
    gram, lost = rounded.T @ (counts * rounded), rounded.T @ (counts * (plain - rounded))
    if kept > 1:
        images = [each.reshape(shape[0], kept, -1)[:, 1:] for each in (rounded, plain - rounded)]
        mean, less = (
            each.mean(axis=1) * np.sqrt(emphasis.together * (kept - 1)) for each in images
        )
        gram, lost = gram + mean.T @ mean, lost + mean.T @ less
    np.testing.assert_allclose(found.gram, gram, rtol=1e-4, atol=1e-3)
    np.testing.assert_allclose(found.total, rounded.sum(axis=0), rtol=1e-5, atol=1e-5)
    wanted = plain.sum(axis=0, dtype=np.float64)
    np.testing.assert_allclose(found.float_total, wanted, rtol=1e-5, atol=1e-5)
    assert found.lost.shape == (0, 0)
    found_lost = read.moments(NUMPY, with_lost=True).lost
    np.testing.assert_allclose(found_lost, lost, rtol=1e-3, atol=1e-2)
    without = read.moments(NUMPY, with_gram=False)
    assert without.gram.shape == (0, 0)
    np.testing.assert_array_equal(without.total, found.total)


@pytest.mark.torch
def test_gram_matrices_live_on_the_device(tmp_path: Path) -> None:
    algebra = algebra_on(Device(arrays="cpu"))
    read = LayerInput(stored(tmp_path, (5, 9, 6)))
    here, there = (read.moments(where, with_lost=True) for where in (NUMPY, algebra))
    assert algebra_of(there.lost) is algebra
    assert algebra_of(there.gram) is algebra
    np.testing.assert_allclose(algebra.get(there.gram), here.gram, rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(there.total, here.total)
