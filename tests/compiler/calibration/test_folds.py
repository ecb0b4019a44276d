"""Halves of the images, and what the one looks like as the other would have it."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from regcache.compiler.calibration.algebra import Algebra, Array
from regcache.compiler.calibration.folds import Fold, Folded, Observed, Suggested, join

Floats = NDArray[np.float32]


def draw_halves(seed: int, channels: int) -> tuple[Floats, Floats]:
    random = np.random.default_rng(seed)
    one, other = (random.normal(size=(count, channels)).astype(np.float32) for count in (4, 7))
    return one, other


def see(rows: Floats) -> Observed:
    return Observed(rows.min(axis=0), rows.max(axis=0), rows)


def assert_seen(found: Observed, rows: Floats) -> None:
    np.testing.assert_array_equal(found.rows, rows)
    np.testing.assert_array_equal(found.lows, rows.min(axis=0))
    np.testing.assert_array_equal(found.highs, rows.max(axis=0))


@given(seed=st.integers(0, 999), channels=st.integers(1, 9))
def test_held_out_is_each_half_as_the_other_would_have_it(seed: int, channels: int) -> None:
    one, other = draw_halves(seed, channels)
    folds = (Fold(see(one), see(other)), Fold(see(other), see(one)))
    seen = Folded(join([see(one), see(other)]), folds)
    assert_seen(seen.held_out, np.concatenate([other, one]))
    shifts = Suggested.by(lambda half: half.highs, seen)
    sizes = Suggested.by(lambda half: np.abs(half.rows).max(axis=0), seen)
    found = seen.shifted(shifts).divided(sizes)

    def fitted(rows: Floats, to: Floats) -> Floats:
        return np.asarray((rows - to.max(axis=0)) / np.abs(to).max(axis=0), np.float32)

    both = np.concatenate([one, other])
    assert_seen(found.whole, fitted(both, both))
    assert (found.whole.highs == 0).all()
    assert_seen(found.held_out, np.concatenate([fitted(other, one), fitted(one, other)]))
    assert (found.held_out.highs > 0).all()  # what was fitted to the one is too small for the other
    assert_seen(seen.held_out, np.concatenate([other, one]))  # nothing was written to


class Elsewhere(Algebra):
    """Marks what it is given by a copy of its own."""

    def __init__(self) -> None:
        self.given: list[Floats] = []

    def put(self, values: Array) -> Array:
        self.given.append(values)
        return values.copy()


def test_rows_go_to_a_device_once() -> None:
    one, other = (see(rows) for rows in draw_halves(0, 3))
    seen, algebra = Folded(join([one, other]), (Fold(one, other), Fold(other, one))), Elsewhere()
    there = seen.on(algebra)
    assert len(algebra.given) == 3
    assert there.folds[0].fit is there.folds[1].other
    assert there.folds[0].other is there.folds[1].fit
    for found, wanted in ((there.whole, seen.whole), (there.folds[0].fit, one)):
        assert found.rows is not wanted.rows
        assert_seen(found, wanted.rows)
