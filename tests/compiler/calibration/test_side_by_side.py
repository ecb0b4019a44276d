"""Things are computed at a time, in order, each with one thread of BLAS."""

import threading

import numpy as np
import pytest
from threadpoolctl import threadpool_info

from regcache.compiler.calibration.side_by_side import side_by_side


def blas_threads() -> set[int]:
    np.ones((2, 2)) @ np.ones((2, 2))
    return {found["num_threads"] for found in threadpool_info() if found["user_api"] == "blas"}


@pytest.mark.parametrize("threads", [1, 2, 5, None])
def test_results_come_in_the_order_of_the_items(threads: int | None) -> None:
    assert list(side_by_side(lambda item: 10 * item, range(20), threads)) == [
        10 * item for item in range(20)
    ]


def test_as_many_at_a_time_as_there_are_threads() -> None:
    barrier = threading.Barrier(3, timeout=30)
    assert len(set(side_by_side(lambda _: barrier.wait(), range(3), 3))) == 3


def test_blas_has_one_thread_meanwhile_and_its_own_afterwards() -> None:
    before = blas_threads()
    assert before
    assert list(side_by_side(lambda _: blas_threads(), range(2), 2)) == [{1}, {1}]
    assert blas_threads() == before


def test_an_error_is_raised_in_its_place() -> None:
    results = side_by_side(lambda item: 1 // item, [1, 0, 2], 2)
    assert next(results) == 1
    with pytest.raises(ZeroDivisionError):
        next(results)
