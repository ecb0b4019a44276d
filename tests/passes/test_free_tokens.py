"""Linears between Reshapes run on [B, T, K], with a bias and without one."""

import numpy as np
import pytest
from support.running import run_graph
from support.small_models import Draft, with_shapes

from regcache.passes.base import run
from regcache.passes.free_tokens import FreeTokens

RANDOM = np.random.default_rng(0)
TOKENS = RANDOM.standard_normal((2, 5, 8)).astype(np.float32)


@pytest.mark.parametrize("bias", [True, False])
def test_a_linear_on_flattened_tokens_runs_on_tokens(bias: bool) -> None:
    draft = Draft()
    flat = draft.node("Reshape", "x", draft.weight(np.array([-1, 8])))
    made = draft.node("MatMul", flat, draft.weight(RANDOM.standard_normal((8, 6), np.float32)))
    if bias:
        made = draft.node("Add", made, draft.weight(np.ones(6, np.float32)))
    rows = draft.node("Reshape", made, draft.weight(np.array([-1, 5, 6])))
    graph = with_shapes(draft.model({"x": ["n", 5, 8]}, [rows]))
    freed = run(FreeTokens(), graph)
    assert freed.changed
    (linear,) = (node for node in freed.graph.nodes if node.op == "MatMul")
    assert linear.inputs[0].name == "x"
    for found, wanted in zip(run_graph(freed.graph, TOKENS), run_graph(graph, TOKENS), strict=True):
        np.testing.assert_allclose(found, wanted, rtol=1e-6)
