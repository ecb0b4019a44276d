"""Graphs with Q/DQ pairs, and what is compared of them."""

from typing import Any

import numpy as np
import onnx_graphsurgeon as gs
from numpy.typing import NDArray
from support.running import run_graph
from support.scales import linear_scales

from regcache.passes.affine import Affine, IntegerType
from regcache.passes.base import run
from regcache.passes.find_blocks import view_encoder
from regcache.passes.observe import Observe
from regcache.passes.quantize_linears import QuantizeLinears

Floats = NDArray[np.float32]
FORMATS = {
    "U8S8": ("int8", 8, 8),
    "U8U8": ("uint8", 8, 8),
    "fewer bits": ("uint8", 6, 4),
}
"""Of the weight: its type and bits; and bits of the uint8 activation."""


def signed_linears(graph: gs.Graph) -> gs.Graph:
    """Signed Q/DQ pairs with the ranges of one random image."""
    names = tuple(site.tensor.name for site in view_encoder(graph).sites)
    shape = (1, *graph.inputs[0].shape[1:])
    image = np.random.default_rng(0).standard_normal(shape, dtype=np.float32)
    outputs = run_graph(run(Observe(names), graph).graph, image, optimize=True)
    scales = {
        name: Affine.from_range(float(x.min()), float(x.max()), "int8", symmetric=True)
        for name, x in zip(names, outputs[len(graph.outputs) :], strict=True)
    }
    return run(QuantizeLinears(scales), graph).graph


def quantized(graph: gs.Graph, name: str = "U8S8") -> gs.Graph:
    """A canonical encoder as `ort-cpu` has it: the activations' zero points lie around 117."""
    dtype, bits, weight_bits = FORMATS[name]
    weight_dtype: IntegerType = "uint8" if dtype == "uint8" else "int8"
    return run(
        QuantizeLinears(linear_scales(graph, bits=bits), weight_dtype, weight_bits), graph
    ).graph


def zero_points(graph: gs.Graph) -> list[NDArray[Any]]:
    pairs = [node for node in graph.nodes if node.op in ("QuantizeLinear", "DequantizeLinear")]
    return [node.inputs[2].values for node in pairs]


def assert_same_numbers(graph: gs.Graph, signed: gs.Graph, images: Floats) -> None:
    """All but a few numbers agree closely: those few met the middle between two integers."""
    for found, wanted in zip(run_graph(signed, images), run_graph(graph, images), strict=True):
        off = np.abs(found - wanted) > 1e-5 + 1e-5 * np.abs(wanted)
        assert off.mean() < 0.02
        np.testing.assert_allclose(found, wanted, atol=0.05)
