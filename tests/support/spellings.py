"""The spellings of a tiny encoder, and what a graph holds."""

from collections import Counter

import numpy as np
import onnx
import onnx_graphsurgeon as gs
from support.tiny_vit import Spec

SPELLINGS = {
    "plain": Spec(),
    "torchscript": Spec(layer_norm="pow", gelu="half_last", dynamic_shapes=True, opset=14),
    "opset 17": Spec(layer_norm="mul", gelu="half_first", opset=17),
    "erf reciprocal": Spec(layer_norm="pow", gelu="times_reciprocal", opset=18),
    "tanh": Spec(activation="gelu_tanh", gelu="half_last", opset=18),
    "tanh, half first": Spec(activation="gelu_tanh", gelu="half_first", opset=18),
    "gemm": Spec(gemm=True),
    "gemm, dynamic": Spec(gemm=True, dynamic_shapes=True, gelu="half_last", opset=17),
    "fused qkv": Spec(qkv="fused", layer_scale=True),
    "no prefix, pooled": Spec(prefix=0, pooling_head=True),
    "registers": Spec(prefix=5),
    "quick gelu": Spec(activation="quick_gelu"),
    "swiglu": Spec(activation="swiglu"),
    "relu": Spec(activation="relu"),
    "packed swiglu": Spec(activation="swiglu", packed_gate=True),
    "sdpa": Spec(attention="sdpa"),
    "merged heads": Spec(attention="merged"),
    "rms norm": Spec(layer_norm="rms", opset=18, gelu="half_last"),
    "einsum": Spec(attention="einsum", gelu="half_last", opset=17),
    "einsum linears": Spec(attention="einsum_all"),
    "attention operator": Spec(attention="op4", opset=23),
    "attention operator, rank 3": Spec(attention="op3", opset=23),
}


def ops(graph: gs.Graph) -> Counter[str]:
    return Counter(node.op for node in graph.nodes)


def shuffled(graph: onnx.GraphProto, seed: int) -> None:
    order = np.random.default_rng(seed).permutation(len(graph.node))
    nodes = [onnx.NodeProto.FromString(graph.node[n].SerializeToString()) for n in order]
    del graph.node[:]
    graph.node.extend(nodes)
