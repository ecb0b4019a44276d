"""Search loops on a Dask cluster: workers that die, copies of studies, clusters that are no use."""

import importlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from support import executor_tasks as tasks
from support.executor_cluster import (
    alive,
    behind_the_gate,
    start_cluster,
    wait_until,
)
from support.executor_tasks import GATE, Study

from regcache.compiler.workers import dask as dask_workers
from regcache.compiler.workers.open_workers import open_workers
from regcache.passes.errors import InputError, MissingExtraError

pytestmark = [pytest.mark.xdist_group("executor"), pytest.mark.slow]
KILLED = r"a worker process was killed \(out of memory\?\)"


@pytest.mark.parametrize("scheduler", ["dask"], indirect=True)
def test_a_study_whose_holders_all_died_is_sent_again(
    scheduler: str, cluster: Any, tmp_path: Path
) -> None:
    with open_workers(scheduler) as workers:
        shared = workers.share(Study(tmp_path))
        results = workers.map(tasks.scale_from_two_on_behind_the_gate, shared, range(12))
        first = [next(results), next(results)]
        wait_until(lambda: behind_the_gate(tmp_path))
        victims = [nanny.pid for nanny in cluster.workers.values()]
        for victim in victims:
            os.kill(victim, signal.SIGKILL)
        wait_until(lambda: not any(map(alive, victims)))
        (tmp_path / GATE).touch()
        assert [*first, *results] == [2 * setting for setting in range(12)]
        assert list(workers.map(tasks.scale, shared, range(3))) == [0, 2, 4]


def test_a_dask_worker_keeps_its_copy_of_a_study(cluster: Any, tmp_path: Path) -> None:
    """Also where Dask drops it from an idle worker; until the workers are closed."""
    with open_workers(cluster.scheduler_address) as workers:
        assert isinstance(workers, dask_workers.DaskWorkers)
        shared, client = workers.share(Study(tmp_path)), workers._client
        copies = set(workers.map(tasks.tell_copy, shared, range(20)))
        client.amm.run_once()
        wait_until(lambda: len(client.who_has([shared.handle.future]).popitem()[1]) == 1)
        copies |= set(workers.map(tasks.tell_copy, shared, range(20)))
    assert 1 <= len(copies) == len({process for process, _ in copies}) <= 2
    with importlib.import_module("distributed").Client(cluster.scheduler_address) as client:
        assert not any(client.run(lambda dask_worker: dask_worker.regcache_copies).values())


def test_a_task_that_dask_gave_up_is_blamed(cluster: Any, tmp_path: Path) -> None:
    with (
        open_workers(cluster.scheduler_address) as workers,
        pytest.raises(InputError, match=rf"^tcp://\S+: {KILLED}, 4 times at the same task$"),
    ):
        list(workers.map(tasks.be_given_up, workers.share(Study(tmp_path)), [0]))


@pytest.mark.parametrize("listening", [False, True])
def test_no_scheduler_at_the_address_is_told_soon(
    listening: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    waited, shorter = dask_workers._CONNECT, 1.0
    monkeypatch.setattr(dask_workers, "_CONNECT", shorter)
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        if listening:
            server.listen()
        address = f"tcp://127.0.0.1:{server.getsockname()[1]}"
        begin, before = time.monotonic(), set(threading.enumerate())
        with (
            pytest.raises(InputError, match=f"^{address}: no Dask scheduler answers: .+$"),
            open_workers(address),
        ):
            pass
        assert time.monotonic() - begin < 15 - (waited - shorter)
        assert set(threading.enumerate()) <= before


def test_a_worker_is_no_scheduler(cluster: Any) -> None:
    address = next(iter(cluster.workers.values())).worker_address
    with pytest.raises(InputError, match=r"it is a Worker$"), open_workers(address):
        pass


def test_a_missing_dask_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "distributed", None)
    with (
        pytest.raises(MissingExtraError, match=r'distributed: pip install "regcache\[scale\]"$'),
        open_workers("tcp://127.0.0.1:1"),
    ):
        pass


def test_a_cluster_without_workers_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dask_workers, "_NO_WORKERS", 0.2)
    with (
        start_cluster(tmp_path, 0) as cluster,
        open_workers(cluster.scheduler_address) as workers,
        pytest.raises(InputError, match=r"^tcp://\S+: the Dask cluster fails: .*workers"),
    ):
        workers.share(1)


def test_a_study_that_workers_cannot_load_is_told(cluster: Any) -> None:
    with (
        open_workers(cluster.scheduler_address) as workers,
        pytest.raises(InputError, match=r"^tcp://\S+: the Dask cluster fails: .*cannot be loaded"),
    ):
        workers.share(tasks.Unloadable())


def test_a_lost_scheduler_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dask_workers, "_CONNECT", 1.0)
    with (
        start_cluster(tmp_path, 1) as cluster,
        open_workers(cluster.scheduler_address) as workers,
    ):
        shared = workers.share(Study(tmp_path))
        results = workers.map(tasks.scale_from_two_on_behind_the_gate, shared, range(5))
        assert [next(results), next(results)] == [0, 2]
        (tmp_path / GATE).touch()
        cluster.close()
        with pytest.raises(InputError, match=r"^tcp://\S+: the Dask cluster fails: "):
            list(results)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("openssl") is None, reason="needs openssl to make a certificate")
def test_a_scheduler_with_certificates_is_asked_with_ours(tmp_path: Path) -> None:
    """Those that Dask's configuration names; who has none is not answered."""
    key, certificate = str(tmp_path / "key.pem"), str(tmp_path / "certificate.pem")
    command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-keyout", key]
    subject = ["-out", certificate, "-days", "1", "-subj", "/CN=127.0.0.1"]
    subprocess.run([*command, *subject], check=True, capture_output=True)
    distributed, dask = map(importlib.import_module, ("distributed", "dask"))
    files = {"key": key, "cert": certificate}
    names: dict[str, Any] = {
        f"distributed.comm.tls.{role}": files for role in ("client", "scheduler", "worker")
    }
    names |= {"distributed.comm.tls.ca-file": certificate}
    with (
        dask.config.set(names),
        distributed.LocalCluster(
            n_workers=1, threads_per_worker=1, processes=False, dashboard_address=None,
            protocol="tls://", security=distributed.Security(),
        ) as cluster,
    ):  # fmt: skip
        address = cluster.scheduler_address
        assert address.startswith("tls://")
        with open_workers(address) as workers:
            assert list(workers.map(tasks.scale, workers.share(Study(tmp_path)), range(3))) == [
                0, 2, 4,
            ]  # fmt: skip
        with (
            dask.config.set({f"{name}": None for name in names}),
            pytest.raises(InputError, match=r"^tls://\S+: no Dask scheduler answers"),
            open_workers(address),
        ):
            pass
