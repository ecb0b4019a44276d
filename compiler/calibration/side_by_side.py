"""Compute many things at a time with NumPy, so that their number changes no result."""

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import TypeVar

from threadpoolctl import threadpool_limits

from regcache.runtime.session import available_cpus


@contextmanager
def one_blas_thread() -> Iterator[None]:
    """While it is open, NumPy's products take one thread each.

    More would add in another order, and spin against one another on a busy machine.
    """
    with threadpool_limits(1, "blas"):
        yield


X = TypeVar("X")
R = TypeVar("R")


def side_by_side(
    function: Callable[[X], R], items: Iterable[X], threads: int | None = None
) -> Iterator[R]:
    """`function` of every item, in order; `threads` of them at a time, all CPUs by default.

    Each is computed by one thread of BLAS (see one_blas_thread).
    """
    with one_blas_thread(), ThreadPoolExecutor(threads or available_cpus()) as pool:
        yield from pool.map(function, items)
