"""A Dask cluster, and the scheduler of each kind of workers."""

import importlib
from collections.abc import Iterator
from typing import Any

import pytest
from support.executor_cluster import (
    start_cluster,
    up,
    wait_until,
)


@pytest.fixture(scope="package")
def lasting_cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """Two processes under a scheduler that itself gives up a task after one death."""
    importlib.import_module("distributed")  # its defaults must be there before they are changed
    options = {
        "distributed.scheduler.allowed-failures": 0,
        "distributed.comm.timeouts.connect": "5s",
        # Else the cluster looks back at each death and ends a worker that died again since.
        "distributed.deploy.lost-worker-timeout": "1 hour",
    }
    with (
        importlib.import_module("dask").config.set(options),
        start_cluster(tmp_path_factory.mktemp("dask"), 2) as cluster,
    ):
        yield cluster


@pytest.fixture
def cluster(lasting_cluster: Any) -> Any:
    """The cluster with both processes up: a nanny gives up a worker that is killed early."""
    nannies = lasting_cluster.workers.values()
    wait_until(lambda: len(nannies) == 2 and all(map(up, nannies)))
    return lasting_cluster


@pytest.fixture
def scheduler(request: pytest.FixtureRequest) -> str:
    """The scheduler of a test's kind."""
    if request.param != "dask":
        return str(request.param)
    return str(request.getfixturevalue("cluster").scheduler_address)
