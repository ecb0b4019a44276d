"""The rows nearest to others, in order, without those that are no direction."""

import numpy as np
import pytest

from regcache.runtime.similarity import nearest_rows


def test_the_nearest_come_first_and_the_row_itself_is_none_of_them() -> None:
    angles = np.radians([0, 50, 10, 180, 100])
    lengths = np.array([1, 5, 0.5, 2, 3])
    vectors = lengths[:, None] * np.stack([np.cos(angles), np.sin(angles)], axis=1)
    first, last = nearest_rows(vectors, [0, 4], 3)
    assert [index for index, _ in first] == [2, 1, 4]
    assert [value for _, value in first] == pytest.approx(np.cos(np.radians([10, 50, 100])))
    assert [index for index, _ in last] == [1, 3, 2]


def test_rows_that_are_not_finite_are_left_out() -> None:
    vectors = np.array([[1.0, 0.0], [np.nan, 1.0], [0.0, 1.0], [np.inf, 0.0]])
    assert nearest_rows(vectors, [0], 5) == [[(2, 0.0)]]
    assert nearest_rows(vectors[:1], [0], 5) == [[]]
