"""Sessions of graphs in memory."""

import gc

import ml_dtypes
import numpy as np
import onnx_graphsurgeon as gs
import pytest
from support.running import run_graph
from support.tiny_vit import Spec, TinyVit
from support.workbench_cases import make_case

from regcache.compiler.calibration.graph_session import open_graph, run_all
from regcache.passes.canonicalize import canonicalize
from regcache.passes.detach_weights import lend_weights
from regcache.runtime import session as session_module


@pytest.mark.parametrize("large", [False, True])
def test_a_session_shares_the_graph_s_weights(monkeypatch: pytest.MonkeyPatch, large: bool) -> None:
    """Also where they are not packed for the kernels, and once the graph is gone."""
    vit = TinyVit(Spec())
    if large:
        monkeypatch.setattr(session_module, "LARGE", 1000)
    graph, images = canonicalize(vit.model()), vit.images(5)
    (wanted,) = run_graph(graph, images)[:1]
    session = open_graph(graph, threads=1)
    del graph
    gc.collect()
    np.testing.assert_allclose(run_all(session, images, batch=2)[0], wanted, rtol=1e-5, atol=1e-6)


def test_lent_weights_are_the_graph_s_own_arrays() -> None:
    graph = make_case().graph
    _, weights = lend_weights(graph)
    stored = {
        name: tensor.values
        for name, tensor in graph.tensors().items()
        if isinstance(tensor, gs.Constant)
    }
    assert weights
    assert all(values is stored[name] for name, values in weights.items())
    large = {name for name, values in stored.items() if values.size > 256}
    assert weights.keys() == large


def test_numbers_that_numpy_lacks_stay_in_the_message() -> None:
    values = np.zeros((20, 20), ml_dtypes.float8_e4m3fn)
    images = gs.Variable("images", np.float32, (1, 20))
    output, weight = gs.Variable("output", np.float32), gs.Variable("weight", np.float32)
    scale = gs.Constant("scale", np.ones((), np.float32))
    nodes = [
        gs.Node("DequantizeLinear", "dq", {}, [gs.Constant("w", values), scale], [weight]),
        gs.Node("MatMul", "product", {}, [images, weight], [output]),
    ]
    content, weights = lend_weights(gs.Graph(nodes, [images], [output], opset=21))
    assert not weights
    assert len(content) > values.size
