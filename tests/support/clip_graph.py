"""A graph with an image and a text tower, as exporters write CLIP."""

import numpy as np
import onnx
from onnx import TensorProto, helper
from support.small_models import Draft

FLOAT, LONG, BOOL = TensorProto.FLOAT, TensorProto.INT64, TensorProto.BOOL


def clip() -> onnx.ModelProto:
    """Two towers and their products, as a whole CLIP is exported; and a number of no input."""
    draft, random = Draft(), np.random.default_rng(1)
    rows = draft.node("Flatten", "pixel_values")
    weight = draft.weight(random.standard_normal((48, 6)).astype(np.float32))
    draft.node("MatMul", rows, weight, outputs=["image_embeds"])
    table = draft.weight(random.standard_normal((9, 6)).astype(np.float32))
    words = draft.node("Gather", table, "input_ids")
    draft.node("ReduceMax", words, draft.weight(np.array([1])), outputs=["text_embeds"], keepdims=0)
    turned = draft.node("Transpose", "text_embeds", perm=[1, 0])
    draft.node("MatMul", "image_embeds", turned, outputs=["logits_per_image"])
    draft.node("Identity", draft.weight(np.ones(1, np.float32)), outputs=["logit_scale"])
    draft.node("Relu", "image_embeds", outputs=["hidden"])
    outputs = ["logits_per_image", "hidden", "text_embeds", "logit_scale", "image_embeds"]
    model = draft.model({"pixel_values": ["n", 3, 4, 4]}, outputs)
    model.graph.input.append(helper.make_tensor_value_info("input_ids", LONG, ["m", "words"]))
    return model
