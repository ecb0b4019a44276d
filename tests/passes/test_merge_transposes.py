"""Transposing keys by way of three dimensions: one Transpose, where nobody else reads it."""

import numpy as np
import onnx_graphsurgeon as gs
import pytest

from regcache.passes.base import run
from regcache.passes.merge_transposes import MergeTransposes
from regcache.passes.walk import count_ops


def detour(*, given_away: bool) -> gs.Graph:
    """[2, 4, 5, 6] -> [8, 5, 6] -> [8, 6, 5] -> [2, 4, 6, 5]."""
    keys, merged, turned, split = (
        gs.Variable(name, np.float32, shape)
        for name, shape in (
            ("keys", [2, 4, 5, 6]), ("merged", [8, 5, 6]), ("turned", [8, 6, 5]),
            ("split", [2, 4, 6, 5]),
        )
    )  # fmt: skip
    shapes = [gs.Constant(f"to{n}", np.array(s)) for n, s in enumerate((merged.shape, split.shape))]
    nodes = [
        gs.Node("Reshape", "one", {}, [keys, shapes[0]], [merged]),
        gs.Node("Transpose", "two", {"perm": [0, 2, 1]}, [merged], [turned]),
        gs.Node("Reshape", "three", {}, [turned, shapes[1]], [split]),
    ]
    return gs.Graph(nodes, [keys], [split, *([turned] if given_away else [])], opset=20)


@pytest.mark.parametrize("given_away", [False, True])
def test_a_detour_is_merged_unless_it_is_an_output(given_away: bool) -> None:
    graph = detour(given_away=given_away)
    after = run(MergeTransposes(), graph)
    assert after.changed is not given_away
    assert count_ops(after.graph, "Transpose") == 1
    assert count_ops(after.graph, "Reshape") == (2 if given_away else 0)
    assert not run(MergeTransposes(), after.graph).changed
