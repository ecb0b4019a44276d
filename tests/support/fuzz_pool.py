"""Forked workers that try hostile files one by one: what dies, hangs or grows is replaced.

Linux only: memory is read from /proc.
"""

import faulthandler
import multiprocessing
import os
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

from support.fuzz_outcome import FRAME, GOOD, Outcome, place_of, short_name

Task = Callable[[int, Path], Outcome]
"""A seed and a folder of the worker's own -> what came of the file with that seed.

What it writes to standard output and error goes to the files `out` and `err` in that folder.
"""

_RECYCLED = 200  # files; then what leaked is given back
_PACE = 0.02


@dataclass(frozen=True)
class Limits:
    """What one file may take: seconds, and megabytes of the whole process."""

    seconds: float = 60
    megabytes: float = 1024


def work(connection: Connection, folder: Path, task: Task) -> None:
    """Take seeds and send outcomes until the connection ends."""
    # what hangs, and what is killed for its memory, leaves its stack here
    with (folder / "stack").open("w") as stack:
        faulthandler.enable(stack, all_threads=False)
        faulthandler.register(signal.SIGUSR1, stack, all_threads=False)
        tempfile.tempdir = str(folder)
        for number, descriptor in (("out", 1), ("err", 2)):
            os.dup2(os.open(folder / number, os.O_RDWR | os.O_CREAT | os.O_APPEND), descriptor)
        sys.stdout = open(1, "w", closefd=False)  # noqa: SIM115
        sys.stderr = open(2, "w", closefd=False)  # noqa: SIM115
        while True:
            try:
                seed = connection.recv()
            except EOFError:
                return
            os.truncate(folder / "stack", 0)
            connection.send(task(seed, folder))


@dataclass
class Worker:
    """A forked process, the seed that it is busy with, and since when."""

    folder: Path
    task: Task
    context: Any = field(default_factory=lambda: multiprocessing.get_context("fork"))
    seed: int | None = None
    done: int = 0

    def start(self) -> None:
        """Fork, in an empty folder."""
        shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir(parents=True)
        self.connection, theirs = self.context.Pipe()
        self.process = self.context.Process(
            target=work, args=(theirs, self.folder, self.task), daemon=True
        )
        self.process.start()
        theirs.close()
        self.done = 0

    def give(self, seed: int) -> None:
        """Let it work on the file of that seed."""
        if self.done >= _RECYCLED:
            self.stop()
            self.start()
        self.seed, self.since = seed, time.monotonic()
        self.connection.send(seed)

    def look(self, limits: Limits) -> Outcome | None:
        """The outcome, where there is one."""
        seed = self.seed
        assert seed is not None
        if self.connection.poll():
            try:
                outcome: Outcome = self.connection.recv()
            except EOFError:
                return self._ended(seed, "crash")
            self.done, self.seed = self.done + 1, None
            if outcome.kind not in GOOD or outcome.megabytes <= limits.megabytes:
                return outcome
            cause = f"peak, then {outcome.kind}"
            return Outcome(seed, "memory", cause, outcome.message, outcome.megabytes)
        if not self.process.is_alive():
            return self._ended(seed, "crash")
        if self._megabytes() > limits.megabytes:
            return self._ended(seed, "memory")
        if time.monotonic() - self.since > limits.seconds:
            return self._ended(seed, "hang")
        return None

    def stop(self) -> None:
        """End the process and what it left."""
        self.connection.close()
        self.process.kill()
        self.process.join()
        shutil.rmtree(self.folder, ignore_errors=True)

    def _ended(self, seed: int, kind: str) -> Outcome:
        size = self._megabytes()
        if self.process.is_alive() and self.process.pid is not None:
            os.kill(self.process.pid, signal.SIGUSR1)
            time.sleep(0.1)
        frames = FRAME.findall((self.folder / "stack").read_text(errors="replace"))
        place = place_of([(short_name(file), line, name) for file, line, name in frames])
        self.stop()
        code = self.process.exitcode if kind == "crash" else None
        cause = place if code is None else f"exit code {code} {place}"
        self.start()
        self.seed = None
        return Outcome(seed, kind, cause, "", size)

    def _megabytes(self) -> float:
        try:
            pages = Path(f"/proc/{self.process.pid}/statm").read_text().split()[1]
        except (OSError, IndexError):
            return 0.0
        return int(pages) * os.sysconf("SC_PAGE_SIZE") / 2**20


def run_all(
    task: Task, seeds: Iterable[int], scratch: Path, workers: int, limits: Limits
) -> Iterator[Outcome]:
    """The outcomes of all seeds, as they come."""
    pool = [Worker(scratch / f"worker-{number}", task) for number in range(workers)]
    for worker in pool:
        worker.start()
    waiting = iter(seeds)
    try:
        while True:
            for worker in pool:
                if worker.seed is None and (seed := next(waiting, None)) is not None:
                    worker.give(seed)
            busy = [worker for worker in pool if worker.seed is not None]
            if not busy:
                return
            wait([worker.connection for worker in busy], _PACE)
            for worker in busy:
                outcome = worker.look(limits)
                if outcome is not None:
                    yield outcome
    finally:
        for worker in pool:
            worker.stop()
