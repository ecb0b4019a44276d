"""What is left once shapes are known: no loop, no shape that cannot be, none that is unknown."""

import numpy as np
import pytest
from onnx import TensorProto, helper
from support.small_models import Draft

from regcache.passes.errors import InputError
from regcache.passes.onnx_file import import_graph
from regcache.passes.settle import check_settled, loops, settle


def counting(draft: Draft, *, inside: bool = False) -> str:
    """A Loop that doubles `x` as often as the file says, perhaps in a branch."""
    values = [
        helper.make_tensor_value_info(name, dtype, shape)
        for name, dtype, shape in (
            ("i", TensorProto.INT64, []),
            ("go", TensorProto.BOOL, []),
            ("state", TensorProto.FLOAT, None),
            ("go_on", TensorProto.BOOL, []),
            ("doubled", TensorProto.FLOAT, None),
        )
    ]
    body = helper.make_graph(
        [
            helper.make_node("Identity", ["go"], ["go_on"]),
            helper.make_node("Add", ["state", "state"], ["doubled"]),
        ],
        "body",
        values[:3],
        values[3:],
    )
    trips = draft.weight(np.array(10**12))
    true = draft.weight(np.array(True))
    if not inside:
        return draft.node("Loop", trips, true, "x", body=body)
    loop = helper.make_node("Loop", [trips, true, "x"], ["end"], "inner", body=body)
    end = helper.make_tensor_value_info("end", TensorProto.FLOAT, None)
    copy = helper.make_node("Identity", ["x"], ["same"])
    same = helper.make_tensor_value_info("same", TensorProto.FLOAT, None)
    condition = draft.node("Cast", draft.node("ReduceMax", "x", keepdims=0), to=TensorProto.BOOL)
    return draft.node(
        "If",
        condition,
        then_branch=helper.make_graph([loop], "a", [], [end]),
        else_branch=helper.make_graph([copy], "b", [], [same]),
    )


@pytest.mark.parametrize("inside", [False, True])
def test_loops_are_never_run_and_are_refused(inside: bool) -> None:
    draft = Draft()
    graph = settle(import_graph(draft.model({"x": [2]}, [counting(draft, inside=inside)])))
    assert [node.op for node in loops(graph)] == ["Loop"]
    name = "inner" if inside else "n0"
    with pytest.raises(InputError, match=f"^Loop '{name}' runs as often as its input says"):
        check_settled(graph)


def test_a_graph_without_loops_is_none_of_its_business() -> None:
    draft = Draft()
    check_settled(settle(import_graph(draft.model({"x": [2]}, [draft.node("Relu", "x")]))))


def test_outputs_of_unknown_rank_are_refused() -> None:
    draft = Draft()
    shape = draft.node("Cast", draft.node("NonZero", "x"), to=TensorProto.INT64)
    flat = draft.node("Reshape", shape, draft.weight(np.array([-1])))
    graph = settle(import_graph(draft.model({"x": [4]}, [draft.node("Reshape", "x", flat)])))
    with pytest.raises(
        InputError, match=r"^how many dimensions its output 'n3_Reshape' has is not"
    ):
        check_settled(graph)


@pytest.mark.parametrize("perm", [[2, 1, 3], [0, 2, 1], [0, 1, 2, 2], [1]])
def test_transposes_that_lose_axes_are_refused(perm: list[int]) -> None:
    draft = Draft()
    turned = draft.node("Transpose", "x", perm=perm)
    graph = import_graph(draft.model({"x": ["n", 2, 3, 4]}, [turned]))
    with pytest.raises(InputError, match=r"^the graph's shapes do not fit: "):
        settle(graph)


def test_a_transpose_without_perm_turns_all_axes() -> None:
    draft = Draft()
    model = draft.model({"x": ["n", 2, 3, 4]}, [draft.node("Transpose", "x")])
    assert settle(import_graph(model)).outputs[0].shape == [4, 3, 2, "n"]
