"""Threads that work some items ahead of whoever takes the results."""

from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")
R = TypeVar("R")


def map_ahead(
    compute: Callable[[T], R], items: Iterable[T], *, ahead: int, workers: int
) -> Generator[R]:
    """What `compute` makes of each item, in order, computed by threads before it is asked for.

    `items` is read in the thread that takes the results, at most `ahead` items before these. An
    error of `compute` is raised where the item's result would be; once the iterator is closed,
    nothing more is begun.
    """
    with ThreadPoolExecutor(workers, thread_name_prefix="regcache ahead") as pool:
        running: deque[Future[R]] = deque()
        try:
            for item in items:
                if len(running) >= ahead:
                    yield running.popleft().result()
                running.append(pool.submit(compute, item))
            while running:
                yield running.popleft().result()
        finally:
            for future in running:
                future.cancel()
