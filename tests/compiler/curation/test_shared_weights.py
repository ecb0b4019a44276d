"""Quantized weights as floats: the numbers of the integers, one array for all who read them."""

from pathlib import Path

import numpy as np
import onnx_graphsurgeon as gs
import pytest
from numpy.typing import NDArray
from support.running import run_graph
from support.workbench_cases import make_case

from regcache.compiler.curation.shared_weights import SharedWeights
from regcache.passes.base import run
from regcache.passes.copy_graph import copy_graph
from regcache.passes.walk import count_ops, is_constant, producer

CASE = make_case()


def quantized() -> gs.Graph:
    workbench = CASE.workbench
    step = CASE.study.quantizer.step(workbench.view.sites, workbench.scales)
    return run(step, CASE.graph).graph


def weights(graph: gs.Graph) -> dict[str, NDArray[np.float32]]:
    products = [node for node in graph.nodes if node.op == "MatMul"]
    return {
        node.name: item.values for node in products for item in node.inputs if is_constant(item)
    }


@pytest.mark.parametrize("on_disk", [False, True])
def test_the_graph_computes_the_same_with_one_copy_of_each_weight(
    tmp_path: Path, on_disk: bool
) -> None:
    graph, shared = quantized(), SharedWeights(tmp_path if on_disk else None)
    images = CASE.study.images.rank
    wanted = run_graph(graph, images)
    linears = len(CASE.workbench.view.linears)
    pairs = count_ops(graph, "DequantizeLinear")
    first, second = (shared.put_into(copy_graph(graph)) for _ in range(2))
    assert count_ops(first, "DequantizeLinear") == pairs - linears
    for found, values in zip(run_graph(first, images), wanted, strict=True):
        np.testing.assert_allclose(found, values, rtol=1e-5, atol=1e-6)
    shared.let_go()
    before, after = weights(first), weights(second)
    assert before.keys() == after.keys()
    assert all(values is after[name] for name, values in before.items())
    assert bool(list(tmp_path.iterdir())) == on_disk


def test_the_weights_are_scale_times_integers() -> None:
    graph = quantized()
    wanted = {}
    for node in graph.nodes:
        source = producer(node.inputs[1]) if node.op == "MatMul" else None
        if source is not None and is_constant(source.inputs[0]):
            integers, scale, middle = (item.values for item in source.inputs)
            wanted[node.name] = (integers.astype(np.float64) - middle) * scale
    found = weights(SharedWeights(None).put_into(graph))
    assert wanted.keys() <= found.keys()
    for name, values in wanted.items():
        np.testing.assert_allclose(found[name], values, rtol=1e-6)
