"""Put Q/DQ pairs around the linears of a vision encoder (ONNX QuantizeLinear, opset 13)."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_graphsurgeon as gs
from numpy.typing import NDArray

from regcache.passes.affine import Affine, IntegerType
from regcache.passes.base import Edit, Log, Lossy, Parity, Skip
from regcache.passes.encoder import Linear, Site
from regcache.passes.errors import InputError
from regcache.passes.find_blocks import view_encoder
from regcache.passes.walk import stored_weight


@dataclass(frozen=True)
class QuantizeLinears:
    """Quantize the blocks' linears: activations per tensor, weights per output channel.

    `activations` gives the scale of each site by the name of its tensor; linears that read the
    same tensor share one Q/DQ pair. Weights are symmetric in `weight_dtype` (uint8 means a zero
    point of 128) over +-127. Biases, norms, softmax and the residual stream stay float.
    Refused: a site that `activations` does not name, a linear that is quantized already.
    """

    activations: Mapping[str, Affine]
    weight_dtype: IntegerType = "int8"
    name: ClassVar[str] = "quantize_linears"
    parity: ClassVar[Parity] = Lossy()

    def requires(self, graph: gs.Graph) -> None:
        """A readable encoder, and scales that name tensors of it."""
        unknown = self.activations.keys() - graph.tensors().keys()
        if unknown:
            raise InputError(f"quantize_linears: no tensor {min(unknown)!r} in the graph")
        view_encoder(graph)

    def rewrite(self, graph: gs.Graph) -> Log:
        """Insert the Q/DQ pairs and replace the weights by integers."""
        edits, skips = [], []
        weights: dict[str, gs.Variable] = {}
        for site in view_encoder(graph).sites:
            scale = self.activations.get(site.tensor.name)
            pending = [linear for linear in site.linears if not linear.quantized]
            if len(pending) < len(site.linears):
                skips.append(Skip(site.name, "quantized already"))
            elif scale is None:
                skips.append(Skip(site.name, "no scale for its activation"))
            else:
                self._quantize_site(graph, site, scale, weights)
                edits.append(Edit(site.name, f"{scale.dtype} x {self.weight_dtype}"))
        return Log(tuple(edits), tuple(skips))

    def ensures(self, before: gs.Graph, after: gs.Graph) -> None:
        """The same linears in the same places, those of the named sites with integer weights."""
        old, new = view_encoder(before), view_encoder(after)
        assert [linear.weight_shape for linear in old.linears] == [
            linear.weight_shape for linear in new.linears
        ]
        named = sum(len(site.linears) for site in old.sites if site.tensor.name in self.activations)
        assert sum(linear.quantized for linear in new.linears) >= named

    def _quantize_site(
        self, graph: gs.Graph, site: Site, scale: Affine, weights: dict[str, gs.Variable]
    ) -> None:
        name = site.tensor.name
        numbers = [
            gs.Constant(f"{name}/scale", np.array(scale.scale, dtype=np.float32)),
            gs.Constant(f"{name}/zero_point", np.array(scale.zero_point, dtype=scale.dtype)),
        ]
        integers = gs.Variable(f"{name}/quantized", dtype=np.dtype(scale.dtype))
        floats = gs.Variable(f"{name}/dequantized", dtype=np.float32)
        graph.nodes.append(
            gs.Node("QuantizeLinear", f"{name}/q", {}, [site.tensor, *numbers], [integers])
        )
        graph.nodes.append(
            gs.Node("DequantizeLinear", f"{name}/dq", {}, [integers, *numbers], [floats])
        )
        for linear in site.linears:
            linear.matmul.inputs = [floats, self._dequantized_weight(graph, linear, weights)]

    def _dequantized_weight(
        self, graph: gs.Graph, linear: Linear, done: dict[str, gs.Variable]
    ) -> gs.Variable:
        """The DequantizeLinear output for a linear's weight; equal weights may share a constant."""
        constant = stored_weight(linear.matmul)
        assert constant is not None
        if constant.name not in done:
            name = constant.name
            integers, scales = quantize_weight(constant.values)
            middle = 128 if self.weight_dtype == "uint8" else 0
            stored = (integers.astype(np.int16) + middle).astype(self.weight_dtype)
            inputs = [
                gs.Constant(f"{name}/quantized", stored),
                gs.Constant(f"{name}/scale", scales),
                gs.Constant(f"{name}/zero_point", np.full(scales.shape, middle, stored.dtype)),
            ]
            done[name] = gs.Variable(f"{name}/dequantized", dtype=np.float32)
            graph.nodes.append(
                gs.Node("DequantizeLinear", f"{name}/dq", {"axis": 1}, inputs, [done[name]])
            )
        return done[constant.name]


def quantize_weight(
    weight: NDArray[np.float32],
) -> tuple[NDArray[np.int8], NDArray[np.float32]]:
    """Symmetric int8 of a weight [K, N] with one scale per output channel [N], over +-127."""
    peaks = np.abs(weight).max(axis=0).astype(np.float32)
    # An all-zero channel has no scale of its own; any positive one gives zeros.
    scales = np.where(peaks > 0, peaks / np.float32(127), np.float32(1)).astype(np.float32)
    scales = np.maximum(scales, np.finfo(np.float32).tiny)
    integers = np.clip(np.rint(weight / scales), -127, 127).astype(np.int8)
    return integers, scales
