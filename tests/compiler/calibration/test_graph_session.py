"""Sessions of graphs in memory."""

import tempfile
from pathlib import Path

import numpy as np
import pytest
from support.workbench_cases import make_case

from regcache.compiler.calibration import graph_session
from regcache.compiler.calibration.graph_session import open_graph, run_all


def test_a_graph_that_passes_2_gb_runs_from_a_file(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    case = make_case()
    images = case.study.images.rank
    wanted = run_all(open_graph(case.graph, threads=1), images, batch=2)
    monkeypatch.setattr(graph_session, "LARGE", 1000)  # weights in a file of their own
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    found = run_all(open_graph(case.graph, threads=1), images, batch=2)
    for one, other in zip(found, wanted, strict=True):
        np.testing.assert_array_equal(one, other)
    assert not list(tmp_path.iterdir())
