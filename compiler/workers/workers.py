"""The base of all workers: results in order, deadlines, tasks of lost workers run again."""

import time
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import FIRST_COMPLETED, CancelledError, Future, wait
from dataclasses import dataclass
from itertools import islice
from typing import Any, Generic, TypeVar

from regcache.passes.errors import InputError

S = TypeVar("S")
X = TypeVar("X")
R = TypeVar("R")

_LIVES = 3  # worker processes that may die over one task before it is blamed
_POLL = 5.0  # seconds between two looks at the cluster


class NotBegunError(Exception):
    """A task did not begin: the deadline passed, or the loop ended. Never leaves `Workers.map`."""


class Shared(Generic[S]):
    """A handle on a study that workers hold; made by `Workers.share`, for their `map`."""

    def __init__(self, handle: Any) -> None:
        self.handle = handle


@dataclass
class _Task(Generic[X, R]):
    setting: X
    future: Future[R]
    deaths: int = 0


class Workers(ABC):
    """Where a search loop runs; made by `open_workers` and usable inside its block only."""

    name: str

    @abstractmethod
    def share(self, study: S) -> Shared[S]:
        """Hand `study` to the workers once, not with every task; tasks must not change it.

        Threads get the object itself, processes and Dask workers one pickled copy each. Raises
        InputError where the disk refuses the copy or the cluster has no workers.
        """

    def map(
        self,
        function: Callable[[S, X], R],
        shared: Shared[S],
        settings: Iterable[X],
        *,
        deadline: float | None = None,
    ) -> Generator[R, None, None]:
        """Yield `function(study, setting)` for each setting, in order, as soon as the next is done.

        `function` is a module's function that the workers can import. `settings` is read as
        workers become free. At `deadline`, a value of time.monotonic(), what has begun is
        finished, nothing else begins, and the iterator ends early: the results are those of the
        first settings, possibly of none. What `function` raises is raised here at its place, and
        tasks that have not begun are cancelled, as they are when the iterator is closed.

        A task whose worker process dies runs again. Raises InputError when that has happened to
        the same task three times or when the cluster is lost.
        """

        def submit(setting: X) -> Future[R]:
            return self._submit(function, shared, setting, deadline)

        waiting = iter(settings)
        tasks: deque[_Task[X, R]] = deque()
        try:
            while True:
                over = passed(deadline)
                if over:
                    self._cancel_waiting(_unfinished(tasks))
                else:
                    room = max(0, 2 * self._slots() - len(_unfinished(tasks)))
                    tasks.extend(_Task(item, submit(item)) for item in islice(waiting, room))
                if not tasks:
                    return
                if not tasks[0].future.done():
                    self._wait_for_any(tasks, None if over else deadline)
                    continue
                error = _error(tasks[0].future)
                if error is None:
                    yield tasks.popleft().future.result()
                elif self._never_ran(error, over):
                    return
                elif self._deaths(error):
                    self._resubmit_lost(tasks, submit)
                else:
                    raise error
        finally:
            self._cancel_waiting(_unfinished(tasks))

    def _never_ran(self, error: BaseException, over: bool) -> bool:
        """Whether `error` means that the deadline kept the task from running."""
        if isinstance(error, NotBegunError):
            return True
        return over and (isinstance(error, CancelledError) or self._deaths(error) > 0)

    def _wait_for_any(self, tasks: Iterable[_Task[X, R]], deadline: float | None) -> None:
        left = _POLL if deadline is None else max(0.0, deadline - time.monotonic())
        if not wait(_unfinished(tasks), min(_POLL, left), FIRST_COMPLETED).done:
            reason = self._why_stuck()
            if reason:
                raise InputError(f"{self.name}: {reason}")

    def _resubmit_lost(
        self, tasks: Iterable[_Task[X, R]], submit: Callable[[X], Future[R]]
    ) -> None:
        for task in tasks:
            deaths = self._deaths(_error(task.future)) if task.future.done() else 0
            task.deaths += deaths
            if task.deaths >= _LIVES:
                raise InputError(
                    f"{self.name}: a worker process was killed (out of memory?), "
                    f"{task.deaths} times at the same task"
                )
            if deaths:
                task.future = submit(task.setting)

    @abstractmethod
    def close(self, *, wait: bool) -> None:
        """Cancel what has not begun; `wait` for the rest or leave it."""

    @abstractmethod
    def _slots(self) -> int:
        """How many tasks can run at the same time."""

    @abstractmethod
    def _submit(
        self,
        function: Callable[[S, X], R],
        shared: Shared[S],
        setting: X,
        deadline: float | None,
    ) -> Future[R]: ...

    def _deaths(self, error: BaseException | None) -> int:
        """How many worker processes died over a task that ended with `error`."""
        return 0

    def _cancel_waiting(self, futures: Iterable[Future[R]]) -> None:
        """Cancel what has not begun."""
        for future in futures:
            future.cancel()

    def _why_stuck(self) -> str | None:
        """A reason why no result can come any more; asked when none has come for a while."""
        return None


def passed(deadline: float | None) -> bool:
    """Whether the clock is past a value of time.monotonic()."""
    return deadline is not None and time.monotonic() >= deadline


def _unfinished(tasks: Iterable[_Task[X, R]]) -> list[Future[R]]:
    return [task.future for task in tasks if not task.future.done()]


def _error(future: Future[R]) -> BaseException | None:
    try:
        return future.exception()
    except CancelledError as error:
        return error
