"""Sessions of graphs in memory."""

import gc
from pathlib import Path

import ml_dtypes
import numpy as np
import onnx_graphsurgeon as gs
import pytest
from support.running import run_graph
from support.tiny_vit import Spec, TinyVit
from support.workbench_cases import make_case

from regcache.compiler.calibration import mapped
from regcache.compiler.calibration.graph_session import open_graph, run_all
from regcache.compiler.calibration.mapped import keep_on_disk
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
    weights = lend_weights(graph).weights
    stored = {
        name: tensor.values
        for name, tensor in graph.tensors().items()
        if isinstance(tensor, gs.Constant)
    }
    assert weights
    assert all(values is stored[name] for name, values in weights.items())
    large = {name for name, values in stored.items() if values.size > 256}
    assert weights.keys() == large


def test_a_session_reads_mapped_weights_where_they_lie(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Beside what is lent from memory; the numbers are the same, and nothing is left behind."""
    vit = TinyVit(Spec())
    graph, images = canonicalize(vit.model()), vit.images(3)
    wanted = run_all(open_graph(graph, threads=1), images, batch=3)
    monkeypatch.setattr(mapped, "LARGE", 0)
    sizes = [array.nbytes for array in lend_weights(graph).weights.values()]
    monkeypatch.setattr(mapped, "_LEAST", max(sizes))  # the smaller ones stay in memory
    keep_on_disk(graph, tmp_path)
    lent = lend_weights(graph)
    assert lent.in_files
    assert lent.folder == tmp_path
    assert lent.weights.keys() > lent.in_files
    session = open_graph(graph, threads=1)
    assert len(list(tmp_path.iterdir())) == 1  # the weights: the model itself is gone
    del graph, lent
    gc.collect()
    assert not list(tmp_path.iterdir())
    for found, values in zip(run_all(session, images, batch=3), wanted, strict=True):
        np.testing.assert_array_equal(found, values)


def test_numbers_that_numpy_lacks_stay_in_the_message() -> None:
    values = np.zeros((20, 20), ml_dtypes.float8_e4m3fn)
    images = gs.Variable("images", np.float32, (1, 20))
    output, weight = gs.Variable("output", np.float32), gs.Variable("weight", np.float32)
    scale = gs.Constant("scale", np.ones((), np.float32))
    nodes = [
        gs.Node("DequantizeLinear", "dq", {}, [gs.Constant("w", values), scale], [weight]),
        gs.Node("MatMul", "product", {}, [images, weight], [output]),
    ]
    lent = lend_weights(gs.Graph(nodes, [images], [output], opset=21))
    assert not lent.weights
    assert len(lent.content) > values.size
