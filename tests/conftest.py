"""Fixtures that several test files share."""

from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory, worker_id: str) -> Path:
    """Where the zoo keeps its checkpoints and exports, shared by all xdist workers.

    Tests of one family carry the same xdist group, so that one worker makes each of them.
    """
    base = tmp_path_factory.getbasetemp()
    return (base if worker_id == "master" else base.parent) / "zoo"
