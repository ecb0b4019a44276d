"""Results come in order, whatever is computed ahead."""

import threading
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from regcache.runtime.map_ahead import map_ahead


@given(st.lists(st.integers()), st.integers(1, 5), st.integers(1, 3))
def test_results_come_in_order(items: list[int], ahead: int, workers: int) -> None:
    found = map_ahead(lambda item: item * 2, iter(items), ahead=ahead, workers=workers)
    assert list(found) == [item * 2 for item in items]


def test_no_more_is_read_than_ahead() -> None:
    taken: list[int] = []

    def items() -> Iterator[int]:
        for item in range(100):
            taken.append(item)
            yield item

    found = map_ahead(str, items(), ahead=3, workers=2)
    assert next(found) == "0"
    assert len(taken) == 4
    found.close()
    assert len(taken) == 4


def test_the_next_is_computed_while_the_last_is_used() -> None:
    began = threading.Event()

    def compute(item: int) -> int:
        if item == 1:
            began.set()
        return item

    found = map_ahead(compute, range(3), ahead=2, workers=1)
    assert next(found) == 0
    assert began.wait(10)


def test_an_error_stands_in_the_place_of_its_result() -> None:
    found = map_ahead(lambda item: 1 // item, [1, 1, 0, 1], ahead=4, workers=2)
    assert [next(found), next(found)] == [1, 1]
    with pytest.raises(ZeroDivisionError):
        next(found)
