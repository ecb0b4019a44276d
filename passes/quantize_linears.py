"""Put Q/DQ pairs around the linears of a vision encoder (ONNX QuantizeLinear, opset 13)."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np
import onnx_graphsurgeon as gs
from numpy.typing import NDArray

from regcache.passes.affine import Affine, IntegerType, check_bits
from regcache.passes.base import Edit, Log, Lossy, Parity, Skip
from regcache.passes.encoder import EncoderView, Linear, Site
from regcache.passes.errors import InputError
from regcache.passes.find_blocks import view_encoder
from regcache.passes.walk import clips_integers, stored_weight


@dataclass(frozen=True)
class RoundedWeight:
    """A weight as integers, int8 [K, N], and the step of each output channel, float32 [N]."""

    integers: NDArray[np.int8]
    scales: NDArray[np.float32]


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
        unknown = self.activations.keys() - graph.tensors().keys()
        if unknown:
            raise InputError(f"quantize_linears: no tensor {min(unknown)!r} in the graph")
        linears = {linear.name: linear for linear in view_encoder(graph).linears}
        for name in sorted((self.only or frozenset()) | self.weights.keys()):
            if name not in linears:
                raise InputError(f"quantize_linears: no linear {name!r}")
        last = 2 ** (self.weight_bits - 1) - 1
        for name, given in self.weights.items():
            shape = linears[name].weight_shape
            if given.integers.shape != shape or given.scales.shape != shape[1:]:
                raise InputError(f"quantize_linears: the integers of {name} do not fit {shape}")
            if np.abs(given.integers.astype(np.int16)).max(initial=0) > last:
                raise InputError(f"quantize_linears: an integer of {name} is beyond +-{last}")

    def rewrite(self, graph: gs.Graph) -> Log:
        """Insert the Q/DQ pairs and replace the weights by integers."""
        sites, skips = self._plan(view_encoder(graph))
        weights: dict[str, gs.Variable] = {}
        taken = frozenset(graph.tensors())
        for site in sites:
            scale = self.activations[site.tensor.name]
            floats = _dequantized_activation(graph, site, scale, taken)
            for linear in site.linears:
                weight = self._dequantized_weight(graph, linear, weights, taken)
                linear.matmul.inputs = [floats, weight]
        weight_kind = _kind(self.weight_dtype, self.weight_bits)
        edits = []
        for site in sites:
            scale = self.activations[site.tensor.name]
            edits.append(Edit(site.name, f"{_kind(scale.dtype, scale.bits)} x {weight_kind}"))
        return Log(tuple(edits), skips)

    def ensures(self, before: gs.Graph, after: gs.Graph) -> None:
        """The same linears in the same places, with integer weights exactly where planned."""
        old, new = view_encoder(before), view_encoder(after)
        sites, _ = self._plan(old)
        planned = {linear.name for site in sites for linear in site.linears}
        for one, other in zip(old.linears, new.linears, strict=True):
            assert (one.name, one.weight_shape) == (other.name, other.weight_shape)
            assert other.quantized == (one.quantized or one.name in planned)
        narrow = [site for site in sites if self.activations[site.tensor.name].bits < 8]
        clips = [sum(map(clips_integers, graph.nodes)) for graph in (before, after)]
        assert clips[1] - clips[0] == len(narrow)

    def _plan(self, view: EncoderView) -> tuple[list[Site], tuple[Skip, ...]]:
        """The sites to quantize, each with those of its linears that `only` names."""
        sites, skips = [], []
        for whole in view.sites:
            wanted = [item for item in whole.linears if self.only is None or item.name in self.only]
            others = tuple(item for item in whole.linears if item not in wanted)
            if others:
                skips.append(Skip(Site(whole.tensor, others).name, "not among those to quantize"))
            if not wanted:
                continue
            site = Site(whole.tensor, tuple(wanted))
            if any(linear.quantized for linear in wanted):
                skips.append(Skip(site.name, "quantized already"))
            elif site.tensor.name not in self.activations:
                skips.append(Skip(site.name, "no scale for its activation"))
            else:
                sites.append(site)
        return sites, tuple(skips)

    def _dequantized_weight(
        self, graph: gs.Graph, linear: Linear, done: dict[str, gs.Variable], taken: frozenset[str]
    ) -> gs.Variable:
        """The DequantizeLinear output for a linear's weight; equal weights may share a constant."""
        constant = stored_weight(linear.matmul)
        assert constant is not None
        given = self.weights.get(linear.name)
        key = constant.name if given is None else linear.name
        if key not in done:
            name = _free_name(key, taken)
            if given is None:
                given = quantize_weight(constant.values, self.weight_bits)
            integers, scales = given.integers, given.scales
            middle = 2 ** (self.weight_bits - 1) if self.weight_dtype == "uint8" else 0
            stored = (integers.astype(np.int16) + middle).astype(self.weight_dtype)
            inputs = [
                gs.Constant(f"{name}/quantized", stored),
                gs.Constant(f"{name}/scale", scales),
                gs.Constant(f"{name}/zero_point", np.full(scales.shape, middle, stored.dtype)),
            ]
            output = gs.Variable(f"{name}/dequantized", dtype=np.float32)
            graph.nodes.append(
                gs.Node("DequantizeLinear", f"{name}/dq", {"axis": 1}, inputs, [output])
            )
            done[key] = output
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


def _dequantized_activation(
    graph: gs.Graph, site: Site, scale: Affine, taken: frozenset[str]
) -> gs.Variable:
    """The output of a new Q/DQ pair behind a site's tensor, clipped to fewer bits between."""
    name = _free_name(site.tensor.name, taken)
    numbers = [
        gs.Constant(f"{name}/scale", np.array(scale.scale, dtype=np.float32)),
        gs.Constant(f"{name}/zero_point", np.array(scale.zero_point, dtype=scale.dtype)),
    ]
    integers = gs.Variable(f"{name}/quantized", dtype=np.dtype(scale.dtype))
    floats = gs.Variable(f"{name}/dequantized", dtype=np.float32)
    graph.nodes.append(
        gs.Node("QuantizeLinear", f"{name}/q", {}, [site.tensor, *numbers], [integers])
    )
    if scale.bits < 8:
        limits = [
            gs.Constant(f"{name}/{end}", np.array(limit, dtype=scale.dtype))
            for end, limit in zip(("min", "max"), scale.limits, strict=True)
        ]
        clipped = gs.Variable(f"{name}/clipped", dtype=np.dtype(scale.dtype))
        graph.nodes.append(gs.Node("Clip", f"{name}/clip", {}, [integers, *limits], [clipped]))
        integers = clipped
    graph.nodes.append(
        gs.Node("DequantizeLinear", f"{name}/dq", {}, [integers, *numbers], [floats])
    )
    return floats


def _free_name(name: str, taken: frozenset[str]) -> str:
    """A prefix for new tensors that an earlier run, for other linears, did not use."""
    while f"{name}/dequantized" in taken:
        name += "/again"
    return name


def _kind(dtype: str, bits: int) -> str:
    return dtype if bits == 8 else f"{dtype} of {bits} bits"
