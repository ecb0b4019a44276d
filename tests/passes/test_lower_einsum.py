"""Einsum as MatMul: the same numbers as numpy's einsum, and linears where a weight is constant."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper
from support.examples import examples
from support.running import run_feeds

from regcache.passes.base import Result, run
from regcache.passes.check import check_and_infer
from regcache.passes.lower_einsum import LowerEinsum
from regcache.passes.onnx_file import import_graph
from regcache.passes.walk import count_ops, is_linear

Array = NDArray[Any]


def build(
    equation: str,
    arrays: Sequence[Array],
    constant: Sequence[int] = (),
    dynamic: bool = True,
    bias: Array | None = None,
) -> gs.Graph:
    """An Einsum of inputs x0, x1 (the first axis dynamic) and constants, perhaps an Add behind."""
    nodes = [helper.make_node("Einsum", ["x0", "x1"][: len(arrays)], ["y"], "e", equation=equation)]
    values = {f"x{slot}": arrays[slot] for slot in constant}
    if bias is not None:
        nodes.append(helper.make_node("Add", ["y", "bias"], ["z"], "add"))
        values["bias"] = bias
    dims = [[*item.shape] for item in arrays]
    inputs = [
        helper.make_tensor_value_info(
            f"x{slot}", TensorProto.FLOAT, ["batch", *shape[1:]] if dynamic and shape else shape
        )
        for slot, shape in enumerate(dims)
        if slot not in constant
    ]
    unknown = [None] * np.einsum(equation, *arrays).ndim
    output = helper.make_tensor_value_info(nodes[-1].output[0], TensorProto.FLOAT, unknown)
    weights = [numpy_helper.from_array(item, name) for name, item in values.items()]
    graph = helper.make_graph(nodes, "einsum", inputs, [output], weights)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    imported = import_graph(model)
    check_and_infer(imported)
    return imported


def lowered(
    equation: str, arrays: Sequence[Array], bias: Array | None = None, **changes: Any
) -> Result:
    """Lower it, and hold the numbers against numpy's in float64."""
    graph = build(equation, arrays, bias=bias, **changes)
    result = run(LowerEinsum(), graph)
    assert len(result.log.edits) == 1, result.log
    onnx.checker.check_model(gs.export_onnx(result.graph), full_check=True)
    wanted = np.einsum(equation, *[item.astype(np.float64) for item in arrays])
    wanted = wanted if bias is None else wanted + bias
    feeds = {f"x{slot}": item for slot, item in enumerate(arrays)}
    feeds = {item.name: feeds[item.name] for item in graph.inputs}
    (found,) = run_feeds(result.graph, feeds)
    np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-5)
    assert not run(LowerEinsum(), result.graph).changed
    return result


def draw_array(random: np.random.Generator, *shape: int) -> Array:
    return random.standard_normal(shape).astype(np.float32)


SIZES = {
    "b": 2,
    "h": 3,
    "i": 5,
    "j": 5,
    "t": 5,
    "s": 5,
    "q": 5,
    "k": 5,
    "d": 4,
    "n": 3,
    "c": 12,
    "e": 6,
}


def of_sizes(equation: str) -> list[Array]:
    random = np.random.default_rng(0)
    terms = equation.split("->", maxsplit=1)[0].split(",")
    return [draw_array(random, *[SIZES[letter] for letter in term]) for term in terms]


@pytest.mark.parametrize("dynamic", [True, False])
@pytest.mark.parametrize(
    "equation",
    [
        "bhid,bhjd->bhij", "bhij,bhjd->bhid", "bthd,bshd->bhts", "bhts,bshd->bthd",
        "bqhd,bkhd->bhqk", "bkhd,bqhd->bhqk", "bhid,bhdj->bhij", "hbid,hbjd->hbij",
        "bid,bjd->bij", "tbd,sbd->bts", "bhts,bshd->tbhd", "bhij,bhjd", "ij,jk", "bhd,bhd->bh",
        "bhid,bhjd->bij", "bhid,hjd->bhij", "id,bhjd->bhij", "i,i->", "bi,i->b", "bhie,bhjd->bid",
    ],
)  # fmt: skip
def test_two_operands(equation: str, dynamic: bool) -> None:
    result = lowered(equation, of_sizes(equation), dynamic=dynamic)
    assert count_ops(result.graph, "MatMul") == 1


@pytest.mark.parametrize(
    ("equation", "shape", "ops"),
    [
        ("btc,cd->btd", (12, 4), ["MatMul"]),
        ("btc,dc->btd", (4, 12), ["MatMul"]),
        ("btc,chd->bthd", (12, 3, 4), ["MatMul", "Reshape"]),
        ("btc,hcd->bhtd", (3, 12, 4), ["MatMul", "Reshape", "Transpose"]),
        ("bthd,hdc->btc", (3, 4, 12), ["Reshape", "MatMul"]),
        ("bhtd,hdc->btc", (3, 4, 12), ["Transpose", "Reshape", "MatMul"]),
        ("bhtd,chd->btc", (12, 3, 4), ["Transpose", "Reshape", "MatMul"]),
    ],
)
@pytest.mark.parametrize("first", [False, True])
def test_a_constant_operand_becomes_a_linear(
    equation: str, shape: tuple[int, ...], ops: list[str], first: bool
) -> None:
    random = np.random.default_rng(0)
    terms, output = equation.split("->")
    data, weight = terms.split(",")
    arrays = [draw_array(random, *[SIZES[letter] for letter in data]), draw_array(random, *shape)]
    if first:
        arrays, equation = arrays[::-1], f"{weight},{data}->{output}"
    result = lowered(equation, arrays, constant=[0 if first else 1])
    assert [node.op for node in result.graph.nodes] == ops
    (matmul,) = [node for node in result.graph.nodes if node.op == "MatMul"]
    assert is_linear(matmul)


@pytest.mark.parametrize(
    ("equation", "shape", "added", "joins"),
    [
        ("btc,cd->btd", (12, 4), (4,), True),
        ("btc,chd->bthd", (12, 3, 4), (3, 4), True),
        ("btc,chd->bthd", (12, 3, 4), (1, 1, 3, 4), True),
        ("btc,chd->bthd", (12, 3, 4), (4,), True),
        ("btc,chd->bthd", (12, 3, 4), (3, 1), True),
        ("btc,chd->bhtd", (12, 3, 4), (3, 1, 4), True),
        ("btc,chd->bthd", (12, 3, 4), (5, 3, 4), False),  # something else for every token
        ("btc,chd->bthd", (12, 3, 4), (1,), False),
    ],
)
def test_a_bias_joins_its_linear(
    equation: str, shape: tuple[int, ...], added: tuple[int, ...], joins: bool
) -> None:
    random = np.random.default_rng(0)
    arrays = [draw_array(random, 2, 5, 12), draw_array(random, *shape)]
    result = lowered(equation, arrays, constant=[1], bias=draw_array(random, *added))
    (matmul,) = [node for node in result.graph.nodes if node.op == "MatMul"]
    add = matmul.outputs[0].outputs[0]
    vector = add.op == "Add" and add.inputs[1].shape == (int(np.prod(shape[1:])),)
    assert vector == joins


def test_without_contraction() -> None:
    for equation in ("i,j->ij", "bthd,d->bthd", "bthd,bt->bhtd", "bhd,bhd->bdh"):
        result = lowered(equation, of_sizes(equation))
        assert count_ops(result.graph, "MatMul") == 0
    for equation in ("bthd->bhtd", "bij->b", "bij->ji", "bij"):
        assert count_ops(lowered(equation, of_sizes(equation)).graph, "Mul") == 0


def test_ellipses() -> None:
    random = np.random.default_rng(0)
    for equation, shapes, constant in (
        ("...c,cd->...d", [(2, 5, 12), (12, 4)], [1]),
        ("...c,dc->...d", [(2, 3, 5, 12), (4, 12)], [1]),
        ("...id,...jd->...ij", [(2, 3, 5, 4), (2, 3, 6, 4)], []),
        ("...id,...jd->...ij", [(2, 1, 5, 4), (2, 3, 6, 4)], []),
        ("...id,...jd", [(2, 3, 5, 4), (2, 3, 6, 4)], []),
        ("b...d,b...d->b...", [(2, 3, 5, 4), (2, 3, 5, 4)], []),
        ("...,...->...", [(2, 3), (1, 3)], []),
        ("a,b->ab", [(2,), (3,)], []),
    ):
        lowered(equation, [draw_array(random, *shape) for shape in shapes], constant=constant)


@given(st.data())
@examples(60)
def test_any_equation(data: st.DataObject) -> None:
    letters = data.draw(st.lists(st.sampled_from("abcdef"), min_size=1, max_size=5, unique=True))
    terms = [
        data.draw(st.lists(st.sampled_from(letters), max_size=4, unique=True)) for _ in range(2)
    ]
    used = sorted(set(terms[0]) | set(terms[1]))
    output = data.draw(st.lists(st.sampled_from(used), unique=True)) if used else []
    sizes = {letter: data.draw(st.integers(1, 3)) for letter in used}
    random = np.random.default_rng(data.draw(st.integers(0, 9)))
    arrays = [draw_array(random, *[sizes[letter] for letter in term]) for term in terms]
    equation = f"{''.join(terms[0])},{''.join(terms[1])}->{''.join(output)}"
    constant = data.draw(st.sampled_from([[], [0], [1]]))
    lowered(equation, arrays, constant=constant, dynamic=False)


@pytest.mark.parametrize(
    ("equation", "reason"),
    [
        ("bii->bi", "'bii' has a label twice"),
        ("bhij,bhjd,bhd->bhi", "it has 3 operands"),
    ],
)
def test_refused(equation: str, reason: str) -> None:
    terms = equation.split("->", maxsplit=1)[0].split(",")
    inputs = [
        gs.Variable(f"x{slot}", np.float32, ["?"] * len(term)) for slot, term in enumerate(terms)
    ]
    output = gs.Variable("y", np.float32)
    graph = gs.Graph(
        [gs.Node("Einsum", "e", {"equation": equation}, inputs, [output])], inputs, [output]
    )
    result = LowerEinsum().rewrite(graph)
    assert [(skip.site, skip.reason) for skip in result.skips] == [("e", reason)]
    assert not result.edits


def test_unknown_sizes_and_ranks_are_refused() -> None:
    x, y = (gs.Variable(name, np.float32, ["b", "h", "t", "d"]) for name in "xy")
    z = gs.Variable("z", np.float32)
    node = gs.Node("Einsum", "e", {"equation": "bhtd,bhsd->bts"}, [x, y], [z])
    graph = gs.Graph([node], [x, y], [z], opset=17)
    result = run(LowerEinsum(), graph)
    assert result.log.skips[0].reason == "the sizes of the axes 'hd' are not known"
    assert not result.changed
    node.attrs["equation"], x.shape = "...td,...sd->...ts", None
    assert run(LowerEinsum(), graph).log.skips[0].reason == "the rank of 'x' is not known"
