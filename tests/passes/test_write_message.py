"""What is written without graphsurgeon is what graphsurgeon writes, to the byte."""

from typing import Any

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import pytest
from onnx_graphsurgeon.exporters.onnx_exporter import OnnxExporter
from support.canonical import canonical_graph
from support.quantized_graphs import quantized
from support.spellings import SPELLINGS
from support.tiny_vit import Spec, TinyVit

from regcache.passes.detach_weights import export_skeleton
from regcache.passes.float8 import FLOAT8
from regcache.passes.onnx_file import import_graph
from regcache.passes.write_message import is_plain, write_node, write_plain


def assert_same(graph: gs.Graph) -> None:
    """The skeleton with everything in it is the graph's own message, but for its shapes."""
    found, left_out = export_skeleton(graph, 1 << 40)
    wanted = gs.export_onnx(graph)
    del wanted.graph.value_info[:]
    assert not left_out
    assert found.SerializeToString() == wanted.SerializeToString()


@pytest.mark.parametrize("name", SPELLINGS)
def test_every_spelling(name: str) -> None:
    assert_same(import_graph(TinyVit(SPELLINGS[name]).model()))


def test_a_quantized_encoder() -> None:
    assert_same(quantized(canonical_graph(TinyVit(Spec()).model())))


def test_constants_that_were_never_read_are_written_as_they_came() -> None:
    assert_same(gs.import_onnx(TinyVit(Spec()).model()))


ATTRIBUTES: list[Any] = [
    *(0, -3, 2**40, True, np.int64(7), 0.5, np.float32(0.1), "text", "déjà", b"bytes"),
    *([1, 2], (3, 4), [0.5, 1.0], [1, 0.5], ["a", b"b"], np.arange(3), np.float32),
    gs.Constant("value", np.ones((2, 3), np.float32)),
]


@pytest.mark.parametrize("value", ATTRIBUTES, ids=repr)
def test_every_kind_of_attribute(value: Any) -> None:
    tensors = [gs.Variable(name) for name in ("a", "", "b", "c")]
    for name, domain in (("node", "com.microsoft"), ("", None)):
        node = gs.Node("Any", name, {"one": value, "two": 1}, tensors[:3], tensors[3:], domain)
        found = onnx.NodeProto()
        write_node(node, found)
        wanted = OnnxExporter.export_node(node)
        assert found.SerializeToString() == wanted.SerializeToString()


@pytest.mark.parametrize("dtype", ["f4", "f2", "f8", "i8", "i4", "i1", "u1", "bool"])
@pytest.mark.parametrize("shape", [(), (0,), (3,), (2, 3)])
def test_plain_constants(dtype: str, shape: tuple[int, ...]) -> None:
    values = np.arange(6)[: int(np.prod(shape))].reshape(shape).astype(dtype)
    for one in (values, np.asfortranarray(values)):
        constant = gs.Constant("weight", one)
        assert is_plain(constant)
        found = onnx.TensorProto()
        write_plain(constant, found)
        wanted = OnnxExporter.export_tensor_proto(constant)
        assert found.SerializeToString() == wanted.SerializeToString()


def test_what_numpy_does_not_have_is_not_plain() -> None:
    ones = np.ones(2, np.float32)
    assert not is_plain(gs.Constant("float8", ones.astype(FLOAT8)))
    assert not is_plain(gs.Constant("bfloat16", ones, export_dtype=onnx.TensorProto.BFLOAT16))
    assert not is_plain(gs.import_onnx(TinyVit(Spec()).model()).nodes[0].inputs[1])
