"""Tiny encoders whose outputs or inputs are not as the compiler wants them."""

from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper
from support.small_models import bake
from support.tiny_vit import Spec, TinyVit

SPEC = Spec(layer_norm="pow", gelu="half_last", dynamic_shapes=True, opset=14)
VIT = TinyVit(SPEC)


def mixing(batch: Any) -> onnx.ModelProto:
    """Beside the encoder's outputs, their mean over the batch is taken off one of them."""
    model = bake(VIT.model(), 4) if isinstance(batch, int) else VIT.model()
    model.graph.node.append(
        helper.make_node("ReduceMean", ["pooled"], ["mean"], "mixer", axes=[0], keepdims=1)
    )
    model.graph.node.append(helper.make_node("Sub", ["pooled", "mean"], ["centred"]))
    model.graph.output.append(helper.make_tensor_value_info("centred", TensorProto.FLOAT, None))
    return model


def masked(kind: str) -> onnx.ModelProto:
    """The encoder with a mask of its tokens, in one of three spellings."""
    model = VIT.model()
    model.graph.input.append(
        helper.make_tensor_value_info("mask", TensorProto.FLOAT, ["n", SPEC.tokens, 1])
    )
    nodes = {
        "kept": [helper.make_node("Mul", ["last", "mask"], ["last_hidden_state"])],
        "dropped": [
            helper.make_node("Sub", ["one", "mask"], ["left"]),
            helper.make_node("Mul", ["last", "left"], ["last_hidden_state"]),
        ],
        "needed": [
            helper.make_node("Pow", ["mask", "two"], ["left"]),
            helper.make_node("Add", ["last", "left"], ["more"]),
            helper.make_node("Mul", ["more", "mask"], ["last_hidden_state"]),
        ],
    }
    for name, number in (("one", 1), ("two", 2)):
        model.graph.initializer.append(
            numpy_helper.from_array(np.array([number], np.float32), name)
        )
    model.graph.node[-1].output[0] = "last"
    model.graph.node.extend(nodes[kind])
    pooled = model.graph.output[0]
    del model.graph.output[0]
    assert pooled.name == "pooled"
    return model
