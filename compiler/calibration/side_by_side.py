"""Compute many things at a time with NumPy, so that their number changes no result."""

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from threadpoolctl import threadpool_limits

from regcache.runtime.session import available_cpus

X = TypeVar("X")
R = TypeVar("R")


def side_by_side(
    function: Callable[[X], R], items: Iterable[X], threads: int | None = None
) -> Iterator[R]:
    """`function` of every item, in order; `threads` of them at a time, all CPUs by default.

    Each is computed by one thread of BLAS: more would add in another order, and spin against one
    another.
    """
    with threadpool_limits(1, "blas"), ThreadPoolExecutor(threads or available_cpus()) as pool:
        yield from pool.map(function, items)
