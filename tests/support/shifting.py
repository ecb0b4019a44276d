"""Random shifts of activations, applied to a tiny encoder and compared."""

import numpy as np
import onnx
import onnx_graphsurgeon as gs
from numpy.typing import NDArray
from support.equalizing import site_of
from support.untouched import told

from regcache.passes.base import Result, run
from regcache.passes.find_blocks import view_encoder
from regcache.passes.shift_activations import ShiftActivations

Floats = NDArray[np.float32]
NORM, VALUE, ADD = "into the norm", "into the value projection", "an Add of its own"
CLOSE = 2e-5
SOME = ("plain", "fused qkv", "swiglu", "packed swiglu", "gemm, dynamic", "merged heads")


def random_shifts(graph: gs.Graph, seed: int = 0, size: float = 3) -> dict[str, Floats]:
    """Shifts for every activation."""
    random = np.random.default_rng(seed)
    return {
        site.tensor.name: np.asarray(
            random.uniform(-size, size, site.linears[0].weight_shape[0]), np.float32
        )
        for site in view_encoder(graph).sites
    }


def apply(graph: gs.Graph, shifts: dict[str, Floats] | None = None) -> Result:
    """Shift, randomly where nothing is given, check with onnx, and that the graph is untouched."""
    original = told(graph)
    result = run(ShiftActivations(random_shifts(graph) if shifts is None else shifts), graph)
    onnx.checker.check_model(gs.export_onnx(result.graph), full_check=True)
    assert told(graph) == original
    names = [node.name for node in result.graph.nodes]
    assert len(set(names)) == len(names)
    return result


def one_site(graph: gs.Graph, name: str) -> dict[str, Floats]:
    tensor = site_of(graph, name).tensor.name
    return {tensor: random_shifts(graph)[tensor]}
