"""Tiny encoders with attention, linears, halves and registers as asked."""

import numpy as np
import onnx_graphsurgeon as gs
from support.canonical import canonical_graph
from support.scales import attention_scales, linear_scales
from support.tiny_vit import Spec, TinyVit

from regcache.passes.base import run
from regcache.passes.half_precision import HalfPrecision
from regcache.passes.quantize_attention import (
    QuantizeAttention,
)
from regcache.passes.quantize_linears import QuantizeLinears
from regcache.passes.splice_registers import SpliceRegisters

# Heads as wide as real ones, for those that TensorRT has fused kernels for.
SPEC = Spec(width=128, heads=2, hidden=256)


def spliced(graph: gs.Graph, spec: Spec, count: int) -> gs.Graph:
    """Random registers in all blocks."""
    shape = (spec.depth, spec.heads, count, spec.width // spec.heads)
    keys, values = np.random.default_rng(0).standard_normal((2, *shape)).astype(np.float32)
    return run(SpliceRegisters(0, spec.depth, keys, values), graph).graph


def prepared(spec: Spec, linears: bool, attention: bool, half: bool, registers: int) -> gs.Graph:
    """A tiny encoder, quantized where asked."""
    graph = canonical_graph(TinyVit(spec).model())
    if registers:
        graph = spliced(graph, spec, registers)
    if linears:
        graph = run(QuantizeLinears(linear_scales(graph, "int8")), graph).graph
    if attention:
        graph = run(QuantizeAttention(attention_scales(graph)), graph).graph
    return run(HalfPrecision(), graph).graph if half else graph
