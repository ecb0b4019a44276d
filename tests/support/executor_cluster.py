"""Dask clusters, processes and kinds of workers for the tests of workers."""

import importlib
import logging
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support import executor_tasks as tasks
from support.executor_tasks import begun

KINDS = ["threads", "processes", "dask"]


def start_cluster(folder: Path, workers: int) -> Any:
    return importlib.import_module("distributed").LocalCluster(
        n_workers=workers,
        threads_per_worker=1,
        processes=True,
        dashboard_address=":0",
        local_directory=str(folder),
        silence_logs=logging.CRITICAL,
    )


def up(nanny: Any) -> bool:
    """Whether the worker of a nanny runs, again if need be, and the scheduler knows it."""
    process = nanny.process
    return process is not None and process.status.name == "running" and alive(process.pid)


every_kind = pytest.mark.parametrize("scheduler", KINDS, indirect=True)
process_kinds = pytest.mark.parametrize("scheduler", KINDS[1:], indirect=True)


def wait_until(holds: Callable[[], object]) -> None:
    end = time.monotonic() + tasks.PATIENCE
    while not holds():
        assert time.monotonic() < end
        time.sleep(0.01)


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
        state = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[0]
    except (ProcessLookupError, FileNotFoundError):
        return False
    return state != "Z"  # an orphan whose exit nobody has collected


def behind_the_gate(folder: Path) -> list[int]:
    """The processes that are in the middle of a task."""
    return [pid for setting, pid in begun(folder).items() if setting >= 2]
