"""Graphs that a hostile or broken exporter would write: the traps of onnx_mutations.py."""

import math
import os
from random import Random
from typing import Any

import numpy as np
import onnx
from onnx import AttributeProto, NodeProto, TensorProto, ValueInfoProto, helper
from support.onnx_mutations import NOT_UTF8, Mutation, Sample, make_link, make_sparse, pick_message
from support.onnx_nesting import constant, deep, functions, wrap

_SIZES = (0, 1, -1, -5, 3, 13, 10**5, 10**7, 2**30, 2**31, 2**40, 2**62)


def opset(sample: Sample, random: Random) -> str:
    """Another version of the operators, or of the format."""
    version = random.choice((*range(100), -1, 2**40))
    domain = random.choice(("", "", "", "ai.onnx.ml", "com.microsoft", "x.y"))
    if random.random() < 0.2:
        sample.model.ir_version = random.randrange(40)
    if domain or not sample.model.opset_import:
        sample.model.opset_import.append(helper.make_opsetid(domain, version))
    else:
        sample.model.opset_import[0].version = version
    return f"{domain} {version}"


def operator(sample: Sample, random: Random) -> str:
    """A node becomes another operator, or one that nobody knows."""
    node = pick_message(sample, random, NodeProto)
    known = sorted({schema.name for schema in onnx.defs.get_all_schemas()})
    was = node.op_type
    node.op_type = random.choice((*random.sample(known, 3), "Attention", "NoSuchOp", ""))
    node.domain = random.choice(("", "", "com.microsoft", "x.y"))
    return f"{was} -> {node.domain}.{node.op_type}"


def dims(sample: Sample, random: Random) -> str:
    """A weight whose shape does not fit its data, is negative or huge."""
    weight = pick_message(sample, random, TensorProto)
    if weight.dims and random.random() < 0.7:
        weight.dims[random.randrange(len(weight.dims))] = random.choice(_SIZES)
    else:
        weight.dims.append(random.choice(_SIZES))
    return f"{weight.name} {list(weight.dims)}"


def data_type(sample: Sample, random: Random) -> str:
    """A weight of another type, known or not, perhaps with its data where it does not belong."""
    weight = pick_message(sample, random, TensorProto)
    weight.data_type = random.choice((*range(30), 99, -1))
    where = random.choice(("raw_data", "raw_data", "float_data", "int32_data", "string_data"))
    if where != "raw_data":
        weight.ClearField("raw_data")
        values: dict[str, list[Any]] = {
            "float_data": [1.0] * 16,
            "int32_data": [70000] * 16,
            "string_data": [b"a", NOT_UTF8],
        }
        getattr(weight, where).extend(values[where])
    return f"{weight.name} {weight.data_type} in {where}"


def narrow(sample: Sample, random: Random) -> str:
    """All weights in another float type, with what reads them left as it was or cast."""
    dtype = random.choice(
        (TensorProto.FLOAT16, TensorProto.DOUBLE, TensorProto.BFLOAT16, TensorProto.FLOAT8E4M3FN)
    )
    graph = sample.model.graph
    casts = []
    for weight in graph.initializer:
        whole = 4 * math.prod(weight.dims) == len(weight.raw_data)  # no other trap was here
        if weight.data_type == TensorProto.FLOAT and whole:
            values = np.frombuffer(weight.raw_data, np.float32)
            name = f"{weight.name}.narrow"
            weight.CopyFrom(helper.make_tensor(name, dtype, weight.dims, values.astype(np.float64)))
            casts.append(
                helper.make_node(
                    "Cast", [name], [name.removesuffix(".narrow")], to=TensorProto.FLOAT
                )
            )
    nodes = [*(casts if random.random() < 0.5 else []), *graph.node]
    copies = [NodeProto.FromString(node.SerializeToString()) for node in nodes]
    del graph.node[:]
    graph.node.extend(copies)
    return f"{TensorProto.DataType.Name(dtype)}, {len(casts)} weights"


def external(sample: Sample, random: Random) -> str:
    """A weight in another file: odd offsets, lengths and places."""
    weight = pick_message(sample, random, TensorProto)
    content = weight.raw_data
    weight.ClearField("raw_data")
    weight.data_location = TensorProto.EXTERNAL
    del weight.external_data[:]
    special = (
        "../w.bin",
        "/dev/zero",
        "link",
        "fifo",
        "folder",
        "",
        ".",
        "w.bin\0",
        "no",
        "sparse",
    )
    location = random.choice(("w.bin",) * 8 + special)
    entries = {
        "location": location,
        "offset": random.choice(("0", "0", "0", "-4", "1", "abc", "", "1e3", str(2**63), "9" * 30)),
        "length": random.choice((str(len(content)), str(len(content)), "-1", "x", str(2**40), "3")),
    }
    if random.random() < 0.2:
        del entries[random.choice(sorted(entries))]
    for key, value in entries.items():
        weight.external_data.add(key=key, value=value)
    sample.beside["w.bin"] = content[: random.choice((len(content), len(content) // 2))]
    sample.beside["link"] = make_link(
        random.choice(("/dev/zero", "w.bin", "link", "/etc/hostname"))
    )
    sample.beside["fifo"] = os.mkfifo
    sample.beside["folder"] = os.mkdir
    sample.beside["sparse"] = make_sparse
    return str(entries)


def rewire(sample: Sample, random: Random) -> str:
    """A node's input comes from another tensor: cycles, wrong shapes, nothing at all."""
    node = pick_message(sample, random, NodeProto)
    tensors = [name for other in sample.model.graph.node for name in other.output]
    tensors += [weight.name for weight in sample.model.graph.initializer] + ["", "nowhere"]
    if not node.input or random.random() < 0.1:
        node.input.append("")
    slot = random.randrange(len(node.input))
    was, node.input[slot] = node.input[slot], random.choice(tensors)
    return f"{node.name}: {was} -> {node.input[slot]}"


def double(sample: Sample, random: Random) -> str:
    """A node, weight, input or output stands there twice, or with another's name."""
    graph = sample.model.graph
    values: Any = random.choice((graph.node, graph.initializer, graph.input, graph.output))
    if not values:
        return "nothing"
    item = type(values[0]).FromString(random.choice(list(values)).SerializeToString())
    values.append(item)
    return f"{type(item).__name__} {item.name}"


def declare(sample: Sample, random: Random) -> str:
    """Another shape or type of an input or output."""
    value = pick_message(sample, random, ValueInfoProto)
    sizes = [random.choice((*_SIZES, "batch", "", "a b", "x" * 300)) for _ in range(4)]
    kept: list[Any] = [dim.dim_param or dim.dim_value for dim in value.type.tensor_type.shape.dim]
    for axis in range(len(kept)):
        if random.random() < 0.5:
            kept[axis] = random.choice(sizes)
    shape = random.choice((kept, kept, kept, kept, None, [], sizes, sizes * 16))
    dtype = random.choice((1, 1, 1, 1, 2, 7, 10, 11, 16, 17, 40))
    value.CopyFrom(helper.make_tensor_value_info(value.name, dtype, shape))
    return f"{value.name} {dtype} {shape}"[:200]


def attribute(sample: Sample, random: Random) -> str:
    """An attribute that is gone, of another type, or there twice."""
    nodes = [node for node in sample.model.graph.node if node.attribute]
    if not nodes:
        return "nothing"
    node = random.choice(nodes)
    index = random.randrange(len(node.attribute))
    one = node.attribute[index]
    how = random.choice(("gone", "type", "float", "ints", "strings", "twice", "reference"))
    text = f"{node.op_type}.{one.name} {how}"
    if how == "gone":
        del node.attribute[index]
    elif how == "type":
        kinds: Any = AttributeProto.AttributeType.values()
        one.type = random.choice(kinds)
    elif how == "twice":
        node.attribute.append(one)
    elif how == "reference":
        one.ref_attr_name = "outer"
    else:
        values: dict[str, Any] = {"float": 0.5, "ints": [-1] * 9, "strings": [NOT_UTF8, b""]}
        one.CopyFrom(helper.make_attribute(one.name, values[how]))
    return text


TRAPS: tuple[Mutation, ...] = (
    opset, operator, dims, data_type, narrow, external, rewire, double, declare, constant,
    wrap, functions, attribute, deep,
)  # fmt: skip
