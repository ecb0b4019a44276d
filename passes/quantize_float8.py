"""Put FP8 Q/DQ pairs around the linears of a vision encoder (ONNX QuantizeLinear, opset 19)."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_graphsurgeon as gs

from regcache.passes.base import Edit, Log, Lossy, Parity
from regcache.passes.errors import InputError
from regcache.passes.find_blocks import view_encoder
from regcache.passes.float8 import FLOAT8, Float8, round_weight
from regcache.passes.qdq_nodes import (
    check_names,
    check_planned,
    free_name,
    insert_pair,
    insert_weight,
    plan_sites,
)
from regcache.passes.walk import stored_weight


@dataclass(frozen=True)
class QuantizeFloat8:
    """Quantize the blocks' linears to E4M3: activations per tensor, weights per output channel.

    Sites, `only`, what stays float and what is refused are as in QuantizeLinears; weights are
    rounded to the nearest, activations saturate. A graph below opset 19 is refused: canonicalize
    raises it.

    TensorRT-RTX 1.7 builds the result for compute capabilities 8.9 and 12.0, and refuses 8.6. Every
    linear is an FP8 product then, whether the rest is FP32 or FP16, but for a packed qkv, which
    SplitQkv has to split first; q, k and v are one product for 8.9, three once 12.0 is among the
    targets. Attention stays as wide as the rest is, fused into one kernel only where that is FP16.
    ONNX Runtime 1.32 drops a Relu before an FP8 QuantizeLinear unless "ReluQuantRewrite" is off.
    """

    activations: Mapping[str, Float8]
    only: frozenset[str] | None = None
    name: ClassVar[str] = "quantize_float8"
    parity: ClassVar[Parity] = Lossy()

    def requires(self, graph: gs.Graph) -> None:
        """Opset 19, a readable encoder, scales that name tensors of it, names of its linears."""
        if graph.opset < 19:
            raise InputError(
                f"quantize_float8 needs opset 19 or later, the graph has {graph.opset}"
            )
        check_names(self.name, graph, self.activations, self.only or frozenset())

    def rewrite(self, graph: gs.Graph) -> Log:
        """Insert the Q/DQ pairs and replace the weights by E4M3 numbers."""
        sites, skips = plan_sites(view_encoder(graph), self.activations, self.only)
        weights: dict[str, gs.Variable] = {}
        taken = frozenset(graph.tensors())
        for site in sites:
            name = free_name(site.tensor.name, taken)
            scale = self.activations[site.tensor.name].scale
            # The zero point says nothing but the type: opset 19 has no other way to name it.
            floats = insert_pair(graph, site.tensor, name, scale, np.zeros((), FLOAT8))
            for linear in site.linears:
                constant = stored_weight(linear.matmul)
                assert constant is not None
                if constant.name not in weights:
                    rounded = round_weight(constant.values)
                    name = free_name(constant.name, taken)
                    weights[constant.name] = insert_weight(
                        graph, name, rounded.values, rounded.scales, zero_point=0
                    )
                linear.matmul.inputs = [floats, weights[constant.name]]
        return Log(tuple(Edit(site.name, "fp8 x fp8") for site in sites), skips)

    def ensures(self, before: gs.Graph, after: gs.Graph) -> None:
        """The same linears in the same places, with E4M3 weights exactly where planned."""
        old, new = view_encoder(before), view_encoder(after)
        sites, _ = plan_sites(old, self.activations, self.only)
        check_planned(old, new, sites)
        planned = {linear.name for site in sites for linear in site.linears}
        for linear in new.linears:
            stored = stored_weight(linear.matmul)
            assert stored is not None
            assert linear.name not in planned or stored.values.dtype == FLOAT8
