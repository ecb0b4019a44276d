"""One way to run the search loops: on threads, on processes or on the workers of a Dask cluster.

    with open_workers("processes", 4) as workers:
        shared = workers.share(study)
        for result in workers.map(measure, shared, settings):
            ...

runs `measure(study, setting)` for every setting and yields the results in the order of `settings`,
whichever kind of worker made them.
"""

import multiprocessing
import os
import pickle
import re
import signal
import threading
import uuid
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack, contextmanager, suppress
from functools import lru_cache
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

from regcache.compiler.workers.dask import DaskWorkers
from regcache.compiler.workers.workers import NotBegunError, R, S, Shared, Workers, X, passed
from regcache.passes.errors import InputError, first_line
from regcache.passes.temporary import temporary_folder

__all__ = ["Shared", "Workers", "open_workers"]


@contextmanager
def open_workers(scheduler: str = "threads", count: int = 1) -> Iterator[Workers]:
    """Yield workers: `count` "threads" or "processes", or those of the Dask at "tcp://HOST:PORT".

    At "tls://HOST:PORT" it is asked for the certificates that Dask's own configuration names.

    Leaving the block waits for the tasks that have begun; Dask workers finish theirs unwatched. An
    interrupt, or a signal to end, kills processes in mid-task; a thread only ends with its task.

    Raises InputError for another scheduler, a count below 1 or a Dask scheduler that does not
    answer within seconds, and MissingExtraError where Dask is not installed.
    """
    workers = _start(scheduler, count)
    interrupted = False
    try:
        yield workers
    except (KeyboardInterrupt, SystemExit):
        interrupted = True
        raise
    finally:
        workers.close(wait=not interrupted)


def _start(scheduler: str, count: int) -> Workers:
    if re.fullmatch(r"(tcp|tls)://[^/\s]+:\d+", scheduler):
        return DaskWorkers(scheduler)
    if scheduler not in ("threads", "processes"):
        raise InputError(
            f"scheduler {scheduler!r}: must be threads, processes or a Dask tcp://HOST:PORT or tls://HOST:PORT"
        )
    if count < 1:
        raise InputError(f"{count} workers: must be at least 1")
    return _Threads(count) if scheduler == "threads" else _Processes(count)


class _Threads(Workers):
    name = "threads"

    def __init__(self, count: int) -> None:
        self._count = count
        self._pool = ThreadPoolExecutor(count, thread_name_prefix="regcache")

    def share(self, study: S) -> Shared[S]:
        return Shared(study)

    def close(self, *, wait: bool) -> None:
        self._pool.shutdown(wait=wait, cancel_futures=True)

    def _slots(self) -> int:
        return self._count

    def _submit(
        self, function: Callable[[S, X], R], shared: Shared[S], setting: X, deadline: float | None
    ) -> Future[R]:
        return self._pool.submit(_run_in_time, function, shared.handle, setting, deadline)


def _run_in_time(function: Callable[[S, X], R], study: S, setting: X, deadline: float | None) -> R:
    if passed(deadline):
        raise NotBegunError
    return function(study, setting)


class _Processes(Workers):
    name = "processes"

    def __init__(self, count: int) -> None:
        self._count = count
        self._context = multiprocessing.get_context("spawn")
        # Nothing is ever sent: workers leave when this process has closed its end, or died.
        self._lifeline, self._end = self._context.Pipe(duplex=False)
        self._open = ExitStack()
        self._folder = self._open.enter_context(temporary_folder())
        self._stops: WeakKeyDictionary[Future[Any], Path] = WeakKeyDictionary()
        self._pool = self._new_pool()

    def _new_pool(self) -> ProcessPoolExecutor:
        return ProcessPoolExecutor(
            self._count, self._context, initializer=_begin_worker, initargs=(self._lifeline,)
        )

    def share(self, study: S) -> Shared[S]:
        path = self._folder / f"{uuid.uuid4().hex}.pickle"
        try:
            with path.open("wb") as file:
                pickle.dump(study, file, pickle.HIGHEST_PROTOCOL)
        except OSError as error:
            raise InputError(f"{path}: {error.strerror or error}") from error
        return Shared(path)

    def close(self, *, wait: bool) -> None:
        self._cancel_waiting([future for future in self._stops if not future.done()])
        if not wait:
            self._end.close()
        self._pool.shutdown(cancel_futures=True)
        self._end.close()
        self._lifeline.close()
        self._open.close()

    def _slots(self) -> int:
        return self._count

    def _submit(
        self, function: Callable[[S, X], R], shared: Shared[S], setting: X, deadline: float | None
    ) -> Future[R]:
        # What a worker cannot unpickle must end the task: inside the pool it would end the worker.
        call = pickle.dumps((function, setting), pickle.HIGHEST_PROTOCOL)
        stop = self._folder / f"{uuid.uuid4().hex}.stop"
        arguments = (shared.handle, call, deadline, stop)
        try:
            future = self._pool.submit(_run_in_process, *arguments)
        except BrokenProcessPool:
            self._pool.shutdown()
            self._pool = self._new_pool()
            future = self._pool.submit(_run_in_process, *arguments)
        self._stops[future] = stop
        return future

    def _cancel_waiting(self, futures: Iterable[Future[R]]) -> None:
        # Not Future.cancel: it does not reach what the pool has queued for its workers, and when a
        # worker dies, a cancelled future ends the pool's own thread, and others wait for ever.
        with suppress(OSError):
            for future in futures:
                self._stops[future].touch()

    def _deaths(self, error: BaseException | None) -> int:
        return int(isinstance(error, BrokenProcessPool))


def _begin_worker(lifeline: Connection) -> None:
    # The terminal interrupts every process; the parent decides what that means.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_leave_with_parent, args=(lifeline,), daemon=True).start()


def _leave_with_parent(lifeline: Connection) -> None:
    with suppress(EOFError, OSError):
        lifeline.recv_bytes()
    os._exit(1)


# Two, so that a loop that shares a new study in every round does not fill the memory.
@lru_cache(maxsize=2)
def _load_study(path: Path) -> Any:
    return pickle.loads(path.read_bytes())


def _run_in_process(path: Path, call: bytes, deadline: float | None, stop: Path) -> Any:
    # The monotonic clock is the machine's, so parent and worker read the same.
    if passed(deadline) or stop.exists():
        raise NotBegunError
    try:
        function, setting = pickle.loads(call)
        return function(_load_study(path), setting)
    except Exception as error:
        try:
            pickle.loads(pickle.dumps(error))
        except Exception:
            raise RuntimeError(f"{type(error).__name__}: {first_line(error)}") from None
        raise
