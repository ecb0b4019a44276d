"""The workers of a Dask cluster, as a search loop sees them."""

import asyncio
import importlib
import logging
import pickle
import time
import uuid
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from typing import Any
from weakref import WeakKeyDictionary

from regcache.compiler.workers.workers import R, S, Shared, Workers, X
from regcache.passes.errors import InputError, MissingExtraError, first_line

_CONNECT = 8.0  # seconds in which a scheduler has to answer
_NO_WORKERS = 60.0  # seconds that a cluster may be without any worker
_REFRESH = 5.0  # seconds for which the size of a cluster is believed
_STARTED = "regcache-started"  # topic on which Dask tasks say that they have begun
_COPIES = "regcache_copies"  # attribute of a Dask worker: the copies of studies that it keeps
_MOST_COPIES = 2  # where a search was killed, nobody frees its copies
_DASK_LOGS = ("distributed", "distributed.client", "distributed.gc", "tornado.application")


class _Scattered:
    """A study on a Dask cluster, and the object to send again when its holders have died.

    `name`: what workers keep their copy under (see _kept_copy).
    """

    def __init__(self, study: Any, future: Any) -> None:
        self.study = study
        self.future = future
        self.name = uuid.uuid4().hex


class DaskWorkers(Workers):
    """Workers behind the scheduler at `address`; others may use the cluster at the same time.

    Raises InputError where no scheduler answers, MissingExtraError where Dask is not installed.
    """

    def __init__(self, address: str) -> None:
        self.name = address
        try:
            # By name: Dask's types say too little for strict checking.
            self._dask: Any = importlib.import_module("distributed")
        except ModuleNotFoundError as error:
            what = f"the scheduler {address}"
            raise MissingExtraError(what, extra="scale", module="distributed") from error
        self._begun: set[str] = set()
        self._names: list[str] = []
        self._remote: WeakKeyDictionary[Future[Any], tuple[str, Any]] = WeakKeyDictionary()
        self._threads, self._seen = 0, float("-inf")
        self._empty_since: float | None = None
        with ExitStack() as stack:
            stack.enter_context(_quiet())
            try:
                _find_scheduler(self._dask, address)
                self._client = self._dask.Client(address, timeout=_CONNECT, set_as_default=False)
            except Exception as error:
                reason = first_line(error)
                raise InputError(f"{address}: no Dask scheduler answers: {reason}") from error
            stack.callback(self._client.close)
            self._stack = stack.pop_all()

    def share(self, study: S) -> Shared[S]:
        scattered = _Scattered(study, self._scatter(study))
        self._names.append(scattered.name)
        return Shared(scattered)

    def _scatter(self, study: Any) -> Any:
        # Subscribed anew each time, as a scheduler that was restarted has forgotten it.
        self._ask(self._client.subscribe_topic, _STARTED, lambda event: self._begun.add(event[1]))
        return self._ask(
            self._client.scatter, [study], broadcast=True, hash=False, timeout=_NO_WORKERS
        )[0]

    def close(self, *, wait: bool) -> None:
        # Of a scheduler that is gone there is nothing to release.
        with suppress(Exception):
            self._cancel_waiting([future for future in self._remote if not future.done()])
            if self._names:
                self._client.run(_free_copies, self._names, on_error="ignore")
        self._stack.close()

    def _ask(self, call: Callable[..., Any], *arguments: Any, **keywords: Any) -> Any:
        """The result of `call`; every error of the cluster becomes an InputError."""
        try:
            return call(*arguments, **keywords)
        except Exception as error:
            reason = first_line(error)
            raise InputError(f"{self.name}: the Dask cluster fails: {reason}") from error

    def _slots(self) -> int:
        if time.monotonic() - self._seen > _REFRESH:
            self._threads = sum(self._ask(self._client.nthreads).values())
            self._seen = time.monotonic()
        return max(1, self._threads)

    def _submit(
        self, function: Callable[[S, X], R], shared: Shared[S], setting: X, deadline: float | None
    ) -> Future[R]:
        scattered = shared.handle
        if scattered.future.status != "finished":
            scattered.future = self._scatter(scattered.study)
        token = uuid.uuid4().hex
        call = pickle.dumps((function, setting), pickle.HIGHEST_PROTOCOL)
        noted = token if deadline is not None else None
        arguments = (scattered.future, scattered.name, call, noted)
        remote = self._ask(self._client.submit, _run_on_dask, *arguments, pure=False)
        future: Future[R] = Future()
        self._remote[future] = token, remote
        self._client.loop.add_callback(self._pass_on, remote, future)
        return future

    async def _pass_on(self, remote: Any, future: Future[R]) -> None:
        """Do what Dask's own executor does, which never ends a future whose result gets lost."""
        try:
            future.set_result(await self._client.gather(remote, asynchronous=True))
        except Exception as error:
            lost = isinstance(error, OSError) and remote.status != "error"
            future.set_exception(CancelledError(str(error)) if lost else error)

    def _deaths(self, error: BaseException | None) -> int:
        if isinstance(error, self._dask.KilledWorker):
            return int(error.allowed_failures) + 1
        return int(isinstance(error, CancelledError))

    def _cancel_waiting(self, futures: Iterable[Future[R]]) -> None:
        remote = [self._remote[future] for future in futures]
        waiting = [task for token, task in remote if token not in self._begun]
        if waiting:
            self._ask(self._client.cancel, waiting)

    def _why_stuck(self) -> str | None:
        now = time.monotonic()
        if self._ask(self._client.nthreads):
            self._empty_since = None
        elif self._empty_since is None:
            self._empty_since = now
        elif now - self._empty_since > _NO_WORKERS:
            return f"the cluster has had no workers for {_NO_WORKERS:.0f} s"
        return None


def _find_scheduler(dask: Any, address: str) -> None:
    """Raise an error where no Dask scheduler answers: a Client waits for other servers forever."""

    async def identify() -> None:
        given = dask.Security().get_connection_args("client")  # by Dask's own configuration
        async with dask.rpc(address, timeout=_CONNECT, connection_args=given) as server:
            kind = (await server.identity())["type"]
        if kind != "Scheduler":
            raise ValueError(f"it is a {kind}")

    # In a thread of its own, since the caller's may run an event loop already, as in a notebook.
    with ThreadPoolExecutor(1) as pool:
        pool.submit(asyncio.run, asyncio.wait_for(identify(), _CONNECT)).result()


def _run_on_dask(study: Any, name: str, call: bytes, token: str | None) -> Any:
    worker = importlib.import_module("distributed").get_worker()
    if token is not None:
        worker.log_event(_STARTED, token)
    function, setting = pickle.loads(call)
    return function(_kept_copy(worker, name, study), setting)


def _kept_copy(worker: Any, name: str, study: Any) -> Any:
    """The copy of a study that a Dask worker holds: the first that one of its tasks was given.

    Dask itself drops the copies of idle workers and fetches new ones later; what tasks had computed
    and left in a copy would be lost with it.
    """
    copies: dict[str, Any] = worker.__dict__.setdefault(_COPIES, {})
    kept = copies.setdefault(name, study)
    for old in list(copies)[:-_MOST_COPIES]:
        copies.pop(old, None)
    return kept


def _free_copies(names: Iterable[str], dask_worker: Any) -> None:
    for name in names:
        getattr(dask_worker, _COPIES, {}).pop(name, None)


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep Dask's log off the terminal; errors that matter are raised all the same."""
    loggers = [logging.getLogger(name) for name in _DASK_LOGS]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
