"""Search loops give the same on threads, on processes and on Dask, also when workers die."""

import os
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support import executor_tasks as tasks
from support.executor_cluster import (
    KINDS,
    alive,
    behind_the_gate,
    every_kind,
    process_kinds,
    wait_until,
)
from support.executor_tasks import GATE, Study, begun

from regcache.compiler.workers.open_workers import open_workers
from regcache.passes.errors import InputError, MissingExtraError
from regcache.runtime.similarity import row_cosines

pytestmark = [pytest.mark.xdist_group("executor"), pytest.mark.slow]
KILLED = r"a worker process was killed \(out of memory\?\)"


@every_kind
def test_results_come_in_order(scheduler: str, tmp_path: Path) -> None:
    with open_workers(scheduler, 2) as workers:
        shared = workers.share(Study(tmp_path))
        expected = [2 * setting for setting in range(20)]
        assert list(workers.map(tasks.scale, shared, range(20))) == expected
        assert list(workers.map(tasks.scale_in_order_of_need, shared, range(4))) == expected[:4]
        assert list(workers.map(tasks.scale, shared, [])) == []


@every_kind
def test_a_result_comes_before_later_ones_are_done(scheduler: str, tmp_path: Path) -> None:
    with open_workers(scheduler, 2) as workers:
        shared = workers.share(Study(tmp_path))
        results = workers.map(tasks.scale_from_two_on_behind_the_gate, shared, range(6))
        assert [next(results), next(results)] == [0, 2]
        (tmp_path / GATE).touch()
        assert list(results) == [4, 6, 8, 10]


@every_kind
def test_a_function_of_the_package_is_a_task(scheduler: str) -> None:
    rows = np.random.default_rng(0).normal(size=(3, 4, 8)).astype(np.float32)
    with open_workers(scheduler, 2) as workers:
        found = list(workers.map(row_cosines, workers.share(rows[0]), rows))
    for one, row in zip(found, rows, strict=True):
        np.testing.assert_array_equal(one, row_cosines(rows[0], row))


@every_kind
def test_a_list_is_one_study(scheduler: str) -> None:
    with open_workers(scheduler, 2) as workers:
        shared = workers.share([3, 4, 5])
        assert list(workers.map(list.index, shared, [5, 3])) == [2, 0]


@process_kinds
def test_a_study_is_sent_once(scheduler: str, tmp_path: Path) -> None:
    with open_workers(scheduler, 2) as workers:
        shared = workers.share(Study(tmp_path))
        for _ in range(2):
            assert len(list(workers.map(tasks.scale, shared, range(20)))) == 20
    loads = Counter(path.name.split("-")[1] for path in tmp_path.glob("loaded-*"))
    assert 1 <= len(loads) <= 2
    # Dask may drop the copy of an idle worker and fetch it again.
    assert loads.total() <= (2 if scheduler == "processes" else 10)


@every_kind
def test_an_error_of_a_task_is_raised_at_its_place(scheduler: str, tmp_path: Path) -> None:
    with open_workers(scheduler, 2) as workers:
        results = workers.map(tasks.fail_at_three, workers.share(Study(tmp_path)), range(1000))
        assert [next(results) for _ in range(3)] == [0, 1, 2]
        with pytest.raises(MissingExtraError, match=r"^three needs four: ") as caught:
            next(results)
        assert (caught.value.extra, caught.value.module) == ("scale", "four")
        assert len(begun(tmp_path)) < 100
        with pytest.raises(InputError, match=r"^7: refused$"):
            list(workers.map(tasks.refuse, workers.share(Study(tmp_path)), [7]))


@pytest.mark.parametrize("scheduler", KINDS[:2])
def test_closing_the_iterator_cancels_what_waits(scheduler: str, tmp_path: Path) -> None:
    with open_workers(scheduler, 2) as workers:
        shared = workers.share(Study(tmp_path))
        results = workers.map(tasks.scale_from_two_on_behind_the_gate, shared, range(100))
        assert [next(results), next(results), len(begun(tmp_path, 5))] == [0, 2, 0]
        results.close()
        (tmp_path / GATE).touch()
    assert not {4, 5} & set(begun(tmp_path))


@process_kinds
def test_an_error_that_cannot_travel_is_told(scheduler: str, tmp_path: Path) -> None:
    with (
        open_workers(scheduler, 2) as workers,
        pytest.raises(Exception, match="clumsy"),
    ):
        list(workers.map(tasks.fail_clumsily, workers.share(Study(tmp_path)), [0]))


@process_kinds
def test_what_workers_cannot_unpickle_is_an_error(scheduler: str, tmp_path: Path) -> None:
    with (
        open_workers(scheduler, 2) as workers,
        pytest.raises(ValueError, match="cannot be loaded"),
    ):
        list(workers.map(tasks.ignore, workers.share(Study(tmp_path)), [tasks.Unloadable()]))


@every_kind
def test_nothing_begins_after_the_deadline(scheduler: str, tmp_path: Path) -> None:
    with open_workers(scheduler, 2) as workers:
        shared = workers.share(Study(tmp_path))
        assert len(list(workers.map(tasks.ignore, shared, range(8)))) == 8  # all are up now
        deadline = time.monotonic() + 1.5
        settings = [(index, time.time() + 2.0) for index in range(100)]
        results = list(workers.map(tasks.take_until, shared, settings, deadline=deadline))
        # Both workers were busy when it passed, whichever tasks they had.
        assert len(begun(tmp_path)) <= 4
        assert 1 <= len(results) <= 4
        assert results == list(range(len(results)))
        assert set(results) <= set(begun(tmp_path))
        late = workers.map(tasks.scale, shared, never(), deadline=time.monotonic())
        assert list(late) == []


def never() -> Iterator[int]:
    raise AssertionError("a setting was read")
    yield 0


@process_kinds
def test_a_killed_process_loses_nothing(scheduler: str, tmp_path: Path) -> None:
    task = tasks.scale_from_two_on_behind_the_gate
    with open_workers(scheduler, 2) as workers:
        results = workers.map(task, workers.share(Study(tmp_path)), range(12))
        first = [next(results), next(results)]
        wait_until(lambda: behind_the_gate(tmp_path))
        victim = behind_the_gate(tmp_path)[0]
        os.kill(victim, signal.SIGKILL)
        wait_until(lambda: not alive(victim))
        (tmp_path / GATE).touch()
        found = [*first, *results]
    with open_workers("threads", 2) as workers:
        assert found == list(workers.map(task, workers.share(Study(tmp_path)), range(12)))


def test_a_task_that_kills_its_process_is_blamed(tmp_path: Path) -> None:
    with open_workers("processes", 1) as workers:
        shared = workers.share(Study(tmp_path))
        with pytest.raises(InputError, match=rf"^processes: {KILLED}, 3 times at the same task$"):
            list(workers.map(tasks.kill_the_process, shared, [0]))
        assert list(workers.map(tasks.scale, shared, range(3))) == [0, 2, 4]


@pytest.mark.parametrize(
    "scheduler",
    [
        "",
        "thread",
        "processes:4",
        "tcp://",
        "tcp://host",
        "tcp://host:port",
        "tls://host",
        "ws://h:1",
    ],
)
def test_another_scheduler_is_refused(scheduler: str) -> None:
    reason = f"scheduler {scheduler!r}: must be threads, processes or a Dask "
    reason += "tcp://HOST:PORT or tls://HOST:PORT"
    with pytest.raises(InputError, match=f"^{re.escape(reason)}$"), open_workers(scheduler):
        pass


def test_no_workers_are_refused() -> None:
    with pytest.raises(InputError, match=r"^0 workers: must be at least 1$"), open_workers(count=0):
        pass


USE = """
import signal
import sys
from pathlib import Path
from support.executor_tasks import Study, hang, scale
from regcache.compiler.workers.open_workers import open_workers

signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored where the tests run by nohup
folder = Path(sys.argv[2])
with open_workers(sys.argv[1], 2) as workers:
    shared = workers.share(Study(folder))
    begun = workers.map(scale, shared, range(100))
    next(begun)
    {body}
"""


def start_use(body: str, scheduler: str, folder: Path) -> subprocess.Popen[str]:
    """A process of its own, as of a command in a terminal, that uses the executor."""
    code = USE.replace("{body}", body)
    path = os.pathsep.join(
        [str(Path(__file__).parents[3] / "tests"), os.environ.get("PYTHONPATH", "")]
    )
    return subprocess.Popen(
        [sys.executable, "-W", "error", "-c", code, scheduler, str(folder)],
        env={**os.environ, "PYTHONPATH": path, "TMPDIR": str(folder)},
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


@every_kind
def test_closing_leaves_nothing_and_says_nothing(scheduler: str, tmp_path: Path) -> None:
    use = start_use("pass", scheduler, tmp_path)
    _, said = use.communicate(timeout=tasks.PATIENCE)
    assert (use.returncode, said) == (0, "")
    assert not [path for path in tmp_path.iterdir() if path.name.startswith("regcache-")]
    if scheduler == "processes":
        assert not [pid for pid in begun(tmp_path).values() if alive(pid)]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_processes_do_not_outlive_the_command(number: signal.Signals, tmp_path: Path) -> None:
    use = start_use("list(workers.map(hang, shared, range(100, 110)))", "processes", tmp_path)
    wait_until(lambda: {100, 101} <= set(begun(tmp_path)))
    if number == signal.SIGINT:
        os.killpg(use.pid, number)  # as the terminal does
    else:
        use.kill()
    _, said = use.communicate(timeout=tasks.PATIENCE)
    assert use.returncode == -number
    assert said.count("Traceback") == (number == signal.SIGINT)
    wait_until(lambda: not any(map(alive, begun(tmp_path).values())))


@pytest.mark.slow
def test_an_interrupt_leaves_dask(cluster: Any, tmp_path: Path) -> None:
    body = "list(workers.map(hang, shared, range(100, 110)))"
    use = start_use(body, cluster.scheduler_address, tmp_path)
    wait_until(lambda: 100 in begun(tmp_path))
    use.send_signal(signal.SIGINT)
    _, said = use.communicate(timeout=tasks.PATIENCE)
    assert use.returncode == -signal.SIGINT
    assert said.count("Traceback") == 1
    (tmp_path / GATE).touch()
