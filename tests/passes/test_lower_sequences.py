"""Lists of tensors without lists: the same numbers bit for bit."""

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import pytest
from onnx import parser
from support.running import run_feeds

from regcache.passes.base import run
from regcache.passes.check import check_and_infer
from regcache.passes.lower_sequences import LowerSequences
from regcache.passes.onnx_file import import_graph
from regcache.passes.settle import settle

X = np.random.default_rng(0).standard_normal((2, 7, 4)).astype(np.float32)


def graph_of(body: str, result: str, kind: str = "float") -> gs.Graph:
    """x [N, 7, 4] -> y; `zero`, `two`, `last` are numbers, `sizes` are 3, 3 and 1."""
    model = parser.parse_model(
        '<ir_version: 8, opset_import: ["" : 20]> '
        f"g (float[N, 7, 4] x) => ({kind}[{result}] y) {{ {body} }}"
    )
    numbers = {"zero": 0, "two": 2, "three": 3, "last": -1, "sizes": [3, 3, 1]}
    for name, value in numbers.items():
        model.graph.initializer.append(onnx.numpy_helper.from_array(np.array(value), name))
    graph = import_graph(model)
    check_and_infer(graph)
    return graph


PAIR = "n = Neg(x) s = SequenceConstruct(x, n)"
SPLIT = "s = SplitToSequence<axis = 1, keepdims = 0>(x)"


@pytest.mark.parametrize(
    ("body", "result", "ops"),
    [
        (f"{SPLIT} y = SequenceAt(s, two)", "N, 4", ["Gather"]),
        (f"{SPLIT} y = SequenceAt(s, last)", "N, 4", ["Gather"]),
        ("s = SplitToSequence<axis = 1>(x) y = SequenceAt(s, two)", "N, 1, 4", ["Slice"]),
        ("s = SplitToSequence<axis = 1>(x, three) y = SequenceAt(s, last)", "N, 1, 4", ["Slice"]),
        ("s = SplitToSequence<axis = -2>(x, sizes) y = SequenceAt(s, zero)", "N, 3, 4", ["Slice"]),
        (f"{PAIR} y = SequenceAt(s, last)", "N, 7, 4", ["Neg", "Identity"]),
        (f"{PAIR} y = ConcatFromSequence<axis = 1>(s)", "N, 14, 4", ["Neg", "Concat"]),
        (
            f"{PAIR} y = ConcatFromSequence<axis = 0, new_axis = 1>(s)",
            "2, N, 7, 4",
            ["Neg", "Unsqueeze", "Unsqueeze", "Concat"],
        ),
    ],
)
def test_a_list_is_read_without_it(body: str, result: str, ops: list[str]) -> None:
    graph = graph_of(body, result)
    after = run(LowerSequences(), graph)
    onnx.checker.check_model(gs.export_onnx(after.graph), full_check=True)
    assert sorted(node.op for node in after.graph.nodes) == sorted(ops)
    np.testing.assert_array_equal(
        run_feeds(after.graph, {"x": X})[0], run_feeds(graph, {"x": X})[0]
    )
    assert not run(LowerSequences(), after.graph).changed


def test_the_length_of_a_list_is_settled() -> None:
    body = "s = SplitToSequence<axis = 1>(x, three) n = SequenceLength(s) y = Identity(n)"
    graph = settle(graph_of(body, "", "int64"))
    assert run_feeds(graph, {"x": X})[0] == 3
    assert not any(node.op.startswith("S") for node in graph.nodes)


@pytest.mark.parametrize(
    "body",
    [
        "s = SplitToSequence<axis = 0, keepdims = 0>(x) y = SequenceAt(s, zero)",
        "s = SequenceConstruct(x) y = SequenceAt(s, two)",
        """n = Shape<start = 0, end = 1>(x) m = Squeeze(n) s = SplitToSequence<axis = 1>(x)
        y = SequenceAt(s, m)""",
    ],
)
def test_what_is_computed_is_refused(body: str) -> None:
    result = run(LowerSequences(), graph_of(body, "A, B" if "keepdims" in body else "A, B, C"))
    assert not result.changed
    assert [skip.reason for skip in result.log.skips] == ["its list is not known"]
