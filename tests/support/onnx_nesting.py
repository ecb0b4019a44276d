"""Constants, branches, loops and functions that hold more than a reader expects."""

from collections.abc import Callable
from random import Random
from typing import Any

import numpy as np
from onnx import NodeProto, TensorProto, helper, numpy_helper
from support.onnx_mutations import Sample, pick_message


def constant(sample: Sample, random: Random) -> str:
    """A constant that is huge, that cannot be evaluated, or whose evaluation does not end."""
    graph = sample.model.graph
    huge = random.choice((10**3, 10**7, 2**28, 2**30, 2**40, -1))
    made: dict[str, Callable[[], list[NodeProto]]] = {
        "Expand": lambda: [_ints("s", [huge]), _node("Expand", ["one", "s"])],
        "ConstantOfShape": lambda: [_ints("s", [huge, 4]), _node("ConstantOfShape", ["s"])],
        "Range": lambda: [
            *(_ints("s", huge), _ints("z", 0), _ints("o", 1)),
            _node("Range", ["z", "s", "o"]),
        ],
        "Tile": lambda: [_ints("s", [huge]), _node("Tile", ["one", "s"])],
        "Pad": lambda: [_ints("s", [huge, huge]), _node("Pad", ["one", "s"])],
        "Resize": lambda: [_node("Resize", ["one", "", "one"])],
        "Custom": lambda: [_node("Custom", ["one"], domain="x.y")],
        "Bfloat16": lambda: [
            helper.make_node("Cast", ["one"], ["s"], to=TensorProto.BFLOAT16),
            _node("Add", ["s", "s"]),
        ],
        "Random": lambda: [_node("RandomNormal", [], shape=[huge])],
        "Loop": lambda: _loop(huge),
        "If": lambda: _if(random.choice((1, 3, 5, 20, 30))),
        "Split": lambda: [_node("SplitToSequence", ["one"])],
        "String": lambda: [helper.make_node("Constant", [], ["grown"], value_string="a")],
    }  # fmt: skip
    kind = random.choice(sorted(made))
    graph.initializer.append(numpy_helper.from_array(np.ones(1, np.float32), "one"))
    nodes = made[kind]()
    readers = [
        node for node in graph.node if node.op_type in {"Add", "Mul", "MatMul"} and node.input
    ]
    if readers:
        reader = random.choice(readers)
        reader.input[random.randrange(len(reader.input))] = "grown"
    for node in reversed(nodes):
        graph.node.insert(0, node)
    return f"{kind} {huge}"


def _node(op: str, inputs: list[str], **attributes: Any) -> NodeProto:
    return helper.make_node(op, inputs, ["grown"], op, **attributes)


def _ints(name: str, values: int | list[int]) -> NodeProto:
    tensor = numpy_helper.from_array(np.array(values, np.int64))
    return helper.make_node("Constant", [], [name], value=tensor)


def _loop(trips: int) -> list[NodeProto]:
    """Counts to `trips`; -1: without an end."""
    values = [
        helper.make_tensor_value_info(name, dtype, shape)
        for name, dtype, shape in (
            ("i", TensorProto.INT64, []),
            ("go", TensorProto.BOOL, []),
            ("x", TensorProto.FLOAT, [1]),
        )
    ]  # fmt: skip
    nodes = [
        helper.make_node("Identity", ["go"], ["go_on"]),
        helper.make_node("Add", ["x", "x"], ["y"]),
    ]
    ends = [
        helper.make_tensor_value_info("go_on", TensorProto.BOOL, []),
        helper.make_tensor_value_info("y", TensorProto.FLOAT, [1]),
    ]
    body = helper.make_graph(nodes, "body", values, ends)
    true = numpy_helper.from_array(np.array(True))
    first = helper.make_node("Constant", [], ["true"], value=true)
    if trips < 0:
        return [first, _node("Loop", ["", "true", "one"], body=body)]
    return [_ints("trips", trips), first, _node("Loop", ["trips", "true", "one"], body=body)]


def _if(depth: int) -> list[NodeProto]:
    """A condition that is constant, in a condition that is constant, ..."""
    out = helper.make_tensor_value_info("inner", TensorProto.FLOAT, [1])
    node = helper.make_node("Identity", ["one"], ["inner"])
    for _ in range(depth):
        branch = helper.make_graph([node], "branch", [], [out])
        node = helper.make_node("If", ["true"], ["inner"], then_branch=branch, else_branch=branch)
        if depth > 6:  # else the two branches double it every time
            node.attribute[1].g.CopyFrom(helper.make_graph([], "none", [], [out]))
    node.output[0] = "grown"
    true = numpy_helper.from_array(np.array(True))
    return [helper.make_node("Constant", [], ["true"], value=true), node]


def wrap(sample: Sample, random: Random) -> str:
    """A node moves into the branch of an If, its condition constant or not."""
    graph = sample.model.graph
    if not graph.node:
        return "nothing"
    index = random.randrange(len(graph.node))
    node = NodeProto.FromString(graph.node[index].SerializeToString())
    outs = [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in node.output]
    branch = helper.make_graph([node], "branch", [], outs)
    condition = random.choice(("true", "pixel_values", "missing"))
    made = helper.make_node(
        "If", [condition], list(node.output), "if", then_branch=branch, else_branch=branch
    )
    graph.node[index].CopyFrom(made)
    graph.initializer.append(numpy_helper.from_array(np.array(True), "true"))
    return f"{node.name} under {condition}"


def functions(sample: Sample, random: Random) -> str:
    """Local functions: chains that double at each step, ones that call themselves, missing ones."""
    model = sample.model
    steps = random.choice((1, 3, 10, 16, 24, 40))
    last = random.choice(("Identity", "f0", "missing"))
    for step in range(steps):
        inner = f"f{step + 1}" if step + 1 < steps else last
        domain = "" if inner == "Identity" else "local"
        nodes = [
            helper.make_node(inner, ["x"], ["h"], domain=domain),
            helper.make_node(inner, ["h"], ["y"], domain=domain),
        ]
        ids = [helper.make_opsetid("", 20), helper.make_opsetid("local", 1)]
        model.functions.append(helper.make_function("local", f"f{step}", ["x"], ["y"], nodes, ids))
    model.opset_import.append(helper.make_opsetid("local", 1))
    node = pick_message(sample, random, NodeProto)
    node.op_type, node.domain = "f0", "local"
    del node.attribute[:]
    return f"{steps} steps to {last}"


def deep(sample: Sample, random: Random) -> str:
    """Graphs in graphs, deeper than anybody reads: written as bytes."""
    depth = random.choice((10, 30, 49, 60, 200, 3000))
    graph = b""
    for _ in range(depth):
        held = _field(1, b"b") + _field(6, graph) + b"\xa0\x01\x05"  # name, g, type: GRAPH
        graph = _field(1, _field(2, b"o") + _field(4, b"If") + _field(5, held))
    sample.edits.append(lambda content: content + _field(7, graph))
    return f"{depth} graphs"


def _field(number: int, content: bytes) -> bytes:
    length, size = b"", len(content)
    while size >= 128:
        length, size = length + bytes([size % 128 + 128]), size // 128
    return bytes([number * 8 + 2]) + length + bytes([size]) + content
