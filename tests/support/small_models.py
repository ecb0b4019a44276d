"""Small ONNX models, written node by node."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx
import onnx_graphsurgeon as gs
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from regcache.passes.check import check_and_infer
from regcache.passes.onnx_file import import_graph

Shape = Sequence[int | str | None] | None


class Draft:
    """Nodes and weights of a model in the making; `node` and `weight` return tensor names."""

    def __init__(self) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.weights: list[onnx.TensorProto] = []

    def node(self, op: str, *inputs: str, outputs: Sequence[str] = (), **attributes: Any) -> str:
        """Add a node; the name of its first output, made up where none is given."""
        name = f"n{len(self.nodes)}"
        written = list(outputs) or [f"{name}_{op}"]
        self.nodes.append(helper.make_node(op, list(inputs), written, name, **attributes))
        return written[0]

    def weight(self, values: NDArray[Any], name: str = "") -> str:
        """Add an initializer."""
        name = name or f"w{len(self.weights)}"
        self.weights.append(numpy_helper.from_array(values, name))
        return name

    def model(
        self,
        inputs: Mapping[str, Shape],
        outputs: Sequence[str],
        *,
        opset: int = 20,
        dtype: int = TensorProto.FLOAT,
        output_dtype: int = TensorProto.FLOAT,
        **more: Any,
    ) -> onnx.ModelProto:
        """The model; inputs of one type, outputs of unknown shape. `more`: as make_model takes."""
        graph = helper.make_graph(
            self.nodes,
            "small",
            [helper.make_tensor_value_info(name, dtype, shape) for name, shape in inputs.items()],
            [helper.make_tensor_value_info(name, output_dtype, None) for name in outputs],
            self.weights,
        )
        opsets = more.pop("opset_imports", None) or [helper.make_opsetid("", opset)]
        made = helper.make_model(graph, opset_imports=opsets, **more)
        made.ir_version = 8 if opset < 21 else 11
        return made


def with_shapes(model: onnx.ModelProto) -> gs.Graph:
    """The model as a graph with shapes on its tensors."""
    graph = import_graph(model)
    check_and_infer(graph)
    return graph


def bake(model: onnx.ModelProto, batch: int, label: str | None = None) -> onnx.ModelProto:
    """Write a batch size into every Reshape of a model; `label`: what its input calls it still."""
    baked = onnx.ModelProto.FromString(model.SerializeToString())
    ends = [*baked.graph.input, *baked.graph.output]
    for value in ends:
        value.type.tensor_type.shape.dim[0].dim_value = batch
    inferred = onnx.shape_inference.infer_shapes(baked, data_prop=True).graph
    shapes = {
        info.name: [dim.dim_value for dim in info.type.tensor_type.shape.dim]
        for info in (*inferred.value_info, *inferred.output)
    }
    for node in baked.graph.node:
        if node.op_type == "Reshape":
            target = np.array(shapes[node.output[0]])
            node.input[1] = f"{node.name}/baked"
            baked.graph.initializer.append(numpy_helper.from_array(target, node.input[1]))
    if label is not None:
        for value in ends:
            value.type.tensor_type.shape.dim[0].dim_param = label
    return baked


def pooling_encoder(
    batch: int | str = "batch", input_type: int = TensorProto.FLOAT, op: str = "GlobalAveragePool"
) -> bytes:
    """images [batch, 3, H, W] -> pooled [batch, 3, 1, 1] and flat [batch, 3 x H x W]."""
    nodes = [
        helper.make_node(op, ["images"], ["pooled"]),
        helper.make_node("Flatten", ["images"], ["flat"], axis=1),
    ]
    graph = helper.make_graph(
        nodes,
        "encoder",
        [helper.make_tensor_value_info("images", input_type, [batch, 3, "h", "w"])],
        [helper.make_tensor_value_info(name, input_type, None) for name in ("pooled", "flat")],
    )
    model = helper.make_model(graph, ir_version=8, opset_imports=[helper.make_opsetid("", 17)])
    return bytes(model.SerializeToString())
