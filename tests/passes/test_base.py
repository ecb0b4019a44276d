"""Several passes one after the other do what each does alone, on one copy while nothing changes."""

import onnx_graphsurgeon as gs
import pytest
from support.spellings import SPELLINGS
from support.tiny_vit import Spec, TinyVit
from support.untouched import told

from regcache.passes import base
from regcache.passes.base import run, run_all
from regcache.passes.canonicalize import PASSES
from regcache.passes.check import check_and_infer
from regcache.passes.copy_graph import copy_graph
from regcache.passes.onnx_file import import_graph
from regcache.passes.raise_opset import raise_opset


def written(name: str) -> gs.Graph:
    graph = import_graph(raise_opset(TinyVit(SPELLINGS[name]).model()))
    check_and_infer(graph)
    return graph


@pytest.mark.parametrize("name", SPELLINGS)
def test_all_of_them_do_what_each_does_alone(name: str) -> None:
    graph = written(name)
    before = told(graph)
    found, ran = run_all(PASSES, graph)
    assert told(graph) == before
    alone = graph
    for step in PASSES:
        alone = run(step, alone).graph
    assert told(found) == told(alone)
    assert ran


def test_idle_passes_share_a_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    copied: list[gs.Graph] = []

    def counted(graph: gs.Graph) -> gs.Graph:
        copied.append(graph)
        return copy_graph(graph)

    graph, _ = run_all(PASSES, import_graph(raise_opset(TinyVit(Spec()).model())))
    monkeypatch.setattr(base, "copy_graph", counted)
    again, _ = run_all(PASSES, graph)
    assert again is graph
    assert copied == [graph]
    assert len(PASSES) > 10
