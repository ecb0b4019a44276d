"""benchmarks/plugin.py: what it makes of errors, and of peers that are not there."""

from dataclasses import replace
from pathlib import Path

import pytest

pytestmark = pytest.mark.torch


def test_the_share_of_the_gap() -> None:
    from benchmarks.plugin import Row, summary

    row = Row(0, "ort", "ort", "R = 1", {}, 0.02, 0.02, 0.12, 0.04)
    assert row.regained == pytest.approx(0.8)
    none = replace(row, planted=0.029, planted_registers=0.01)
    assert none.regained is None
    worse = replace(row, seed=1, planted_registers=0.13)
    assert worse.regained == pytest.approx(-0.1)
    said = summary("ort", [row, none, worse])
    assert said.startswith("ort: un-planted 0.0200, with registers 0.0200; planted 0.1200")
    assert said.endswith("; 0.35 (-0.10 to 0.80) of the gap regained, 2 seeds with a gap")
    assert summary("ort", [none]).endswith("; no gap")
    failed = Row(0, "nncf", "w8a8", failure="skipped: there is no python")
    assert summary("nncf", [failed]) == "nncf: not measured: skipped: there is no python"


def test_a_peer_that_is_not_there_is_skipped(tmp_path: Path) -> None:
    from benchmarks.peers import PEERS, PeerError
    from benchmarks.plugin import Workshop, judge_of

    nncf = next(peer for peer in PEERS if peer.name == "nncf-mixed")
    shop = Workshop(tmp_path, tmp_path, {"nncf": tmp_path / "python"}, 1)
    with pytest.raises(PeerError, match="skipped: there is no "):
        shop.python(nncf)
    assert judge_of(next(peer for peer in PEERS if peer.name == "ort-u8s8")) == "ort"
    modelopt = next(peer for peer in PEERS if peer.name == "modelopt-max")
    assert judge_of(modelopt) == "modelopt-max"
