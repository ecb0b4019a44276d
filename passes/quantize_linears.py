"""Put Q/DQ pairs around the linears of a vision encoder (ONNX QuantizeLinear, opset 13)."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np
import onnx_graphsurgeon as gs
from numpy.typing import NDArray

from regcache.passes.affine import Affine, IntegerType, check_bits
from regcache.passes.base import Edit, Log, Lossy, Parity
from regcache.passes.encoder import Linear
from regcache.passes.errors import InputError
from regcache.passes.external_weights import let_go
from regcache.passes.find_blocks import view_encoder
from regcache.passes.qdq_nodes import (
    check_names,
    check_planned,
    free_name,
    insert_pair,
    insert_weight,
    plan_sites,
)
from regcache.passes.walk import clips_integers, stored_weight


@dataclass(frozen=True)
class RoundedWeight:
    """A weight as integers, int8 [K, N], and the step of each output channel, float32 [N]."""

    integers: NDArray[np.int8]
    scales: NDArray[np.float32]

    def dequantized(self) -> NDArray[np.float32]:
        """The float32 weight [K, N] that the integers and scales stand for."""
        return np.asarray(self.integers * self.scales, np.float32)


@dataclass(frozen=True)
class QuantizeLinears:
    """Quantize the blocks' linears: activations per tensor, weights per output channel.

    `activations` gives the scale of each site by the name of its tensor; linears that read the
    same tensor share one Q/DQ pair, with a Clip of the integers between where the scale has fewer
    than 8 bits. Weights are symmetric in `weight_dtype`, their integers `weight_bits` wide without
    the lowest (8 bits: +-127, and for uint8 a zero point of 128): those that `weights` gives, by
    the linear's name, else the nearest to the float weight. `only` names the linears to
    quantize ("blocks.3.fc1"), None means all. Biases, norms, softmax, the residual stream and the
    other linears stay float, also one that reads the same tensor.
    Refused: a site that `activations` does not name, one with nothing in `only`, a linear that is
    quantized already.
    """

    activations: Mapping[str, Affine]
    weight_dtype: IntegerType = "int8"
    weight_bits: int = 8
    only: frozenset[str] | None = None
    weights: Mapping[str, RoundedWeight] = field(default_factory=dict)
    name: ClassVar[str] = "quantize_linears"
    parity: ClassVar[Parity] = Lossy()

    def requires(self, graph: gs.Graph) -> None:
        """A readable encoder, scales that name tensors of it, and names of its linears."""
        check_bits(self.weight_bits)
        named = (self.only or frozenset()) | self.weights.keys()
        linears = check_names(self.name, graph, self.activations, named)
        last = 2 ** (self.weight_bits - 1) - 1
        for name, given in self.weights.items():
            shape = linears[name].weight_shape
            if given.integers.shape != shape or given.scales.shape != shape[1:]:
                raise InputError(f"quantize_linears: the integers of {name} do not fit {shape}")
            if np.abs(given.integers.astype(np.int16)).max(initial=0) > last:
                raise InputError(f"quantize_linears: an integer of {name} is beyond +-{last}")

    def rewrite(self, graph: gs.Graph) -> Log:
        """Insert the Q/DQ pairs and replace the weights by integers."""
        sites, skips = plan_sites(view_encoder(graph), self.activations, self.only)
        weights: dict[str, gs.Variable] = {}
        taken = frozenset(graph.tensors())
        weight_kind = _kind(self.weight_dtype, self.weight_bits)
        edits = []
        for site in sites:
            scale = self.activations[site.tensor.name]
            floats = insert_pair(
                graph,
                site.tensor,
                free_name(site.tensor.name, taken),
                scale.scale,
                np.array(scale.zero_point, dtype=scale.dtype),
                scale.limits if scale.bits < 8 else None,
            )
            for linear in site.linears:
                weight = self._dequantized_weight(graph, linear, weights, taken)
                linear.matmul.inputs = [floats, weight]
            edits.append(Edit(site.name, f"{_kind(scale.dtype, scale.bits)} x {weight_kind}"))
        return Log(tuple(edits), skips)

    def ensures(self, before: gs.Graph, after: gs.Graph) -> None:
        """The same linears in the same places, with integer weights exactly where planned."""
        old = view_encoder(before)
        sites, _ = plan_sites(old, self.activations, self.only)
        check_planned(old, view_encoder(after), sites)
        narrow = [site for site in sites if self.activations[site.tensor.name].bits < 8]
        clips = [sum(map(clips_integers, graph.nodes)) for graph in (before, after)]
        assert clips[1] - clips[0] == len(narrow)

    def _dequantized_weight(
        self, graph: gs.Graph, linear: Linear, done: dict[str, gs.Variable], taken: frozenset[str]
    ) -> gs.Variable:
        """The DequantizeLinear output for a linear's weight; equal weights may share a constant."""
        constant = stored_weight(linear.matmul)
        assert constant is not None
        given = self.weights.get(linear.name)
        key = constant.name if given is None else linear.name
        if key not in done:
            if given is None:
                given = quantize_weight(constant.values, self.weight_bits)
                let_go(constant.values)
            middle = 2 ** (self.weight_bits - 1) if self.weight_dtype == "uint8" else 0
            stored = (given.integers.astype(np.int16) + middle).astype(self.weight_dtype)
            name = free_name(key, taken)
            done[key] = insert_weight(graph, name, stored, given.scales, middle)
        return done[key]


def quantize_weight(weight: NDArray[np.float32], bits: int = 8) -> RoundedWeight:
    """Symmetric int8 of a weight [K, N] with one scale per output channel [N].

    The integers span +-(2 ** (bits - 1) - 1), which is +-127 for 8 bits.
    """
    last = 2 ** (bits - 1) - 1
    peaks = np.abs(weight).max(axis=0).astype(np.float32)
    # An all-zero channel has no scale of its own; any positive one gives zeros.
    scales = np.where(peaks > 0, peaks / np.float32(last), np.float32(1)).astype(np.float32)
    scales = np.maximum(scales, np.finfo(np.float32).tiny)
    integers = np.clip(np.rint(weight / scales), -last, last).astype(np.int8)
    return RoundedWeight(integers, scales)


def _kind(dtype: str, bits: int) -> str:
    return dtype if bits == 8 else f"{dtype} of {bits} bits"
