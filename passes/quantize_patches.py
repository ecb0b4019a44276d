"""Put Q/DQ pairs around the convolution that makes patches (ONNX QuantizeLinear, opset 13)."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np
import onnx_graphsurgeon as gs

from regcache.passes.affine import Affine
from regcache.passes.base import Edit, Log, Lossy, Parity, Skip
from regcache.passes.errors import InputError
from regcache.passes.qdq_nodes import free_name, insert_pair, insert_weight
from regcache.passes.quantize_linears import RoundedWeight, quantize_weight
from regcache.passes.walk import count_ops, is_constant, name_of, producer


@dataclass(frozen=True)
class QuantizePatches:
    """Quantize a patch convolution: its images per tensor, its weight int8 per output channel.

    `activations` gives the scale of the images by the name of their tensor. Weights are symmetric:
    the integers that `weights` gives [3 height width, channels], by the convolution's name, else
    the nearest to the float weight. The bias stays float.
    Matched: a Conv whose strides are its kernel's size, so that no pixel is read twice, with a
    constant weight [channels, 3, height, width].
    Skipped: one whose images `activations` does not name, one that is quantized already.
    """

    activations: Mapping[str, Affine]
    weights: Mapping[str, RoundedWeight] = field(default_factory=dict)
    name: ClassVar[str] = "quantize_patches"
    parity: ClassVar[Parity] = Lossy()

    def requires(self, graph: gs.Graph) -> None:
        """Scales of 8 bits that name tensors of the graph; weights that fit its convolutions."""
        tensors = graph.tensors()
        for name, scale in self.activations.items():
            if name not in tensors:
                raise InputError(f"quantize_patches: no tensor {name!r} in the graph")
            if scale.bits != 8:
                raise InputError(f"quantize_patches: {name!r} needs 8 bits, not {scale.bits}")
        known = {name_of(node): node for node in patch_convolutions(graph)}
        for name, given in self.weights.items():
            if name not in known:
                raise InputError(f"quantize_patches: no patch convolution {name!r}")
            count, *sides = _stored(known[name]).shape
            if given.integers.shape != (math.prod(sides), count):
                raise InputError(f"quantize_patches: the integers of {name} do not fit its weight")

    def rewrite(self, graph: gs.Graph) -> Log:
        """Insert a pair before each convolution and replace its weight by integers."""
        edits, skips = [], []
        taken = frozenset(graph.tensors())
        for node in patch_convolutions(graph):
            name = name_of(node)
            images, weight = node.inputs[:2]
            maker = producer(images)
            if not is_constant(weight) or (maker is not None and maker.op == "DequantizeLinear"):
                skips.append(Skip(name, "quantized already"))
                continue
            scale = self.activations.get(images.name)
            if scale is None:
                skips.append(Skip(name, "no scale for its images"))
                continue
            zero = np.array(scale.zero_point, scale.dtype)
            floats = insert_pair(graph, images, free_name(images.name, taken), scale.scale, zero)
            values = weight.values
            rounded = self.weights.get(name)
            if rounded is None:
                rounded = quantize_weight(values.reshape(len(values), -1).T)
            stored = np.ascontiguousarray(rounded.integers.T.reshape(values.shape))
            key = free_name(weight.name, taken)
            made = insert_weight(graph, key, stored, rounded.scales, 0, axis=0)
            node.inputs = [floats, made, *node.inputs[2:]]
            edits.append(Edit(name, f"{scale.dtype} x int8"))
        return Log(tuple(edits), tuple(skips))

    def ensures(self, before: gs.Graph, after: gs.Graph) -> None:
        """Only a QuantizeLinear and two DequantizeLinears for each convolution are new."""
        pairs = count_ops(after, "QuantizeLinear") - count_ops(before, "QuantizeLinear")
        assert len(after.nodes) - len(before.nodes) == 3 * pairs
        assert len(patch_convolutions(after)) == len(patch_convolutions(before))


def patch_convolutions(graph: gs.Graph) -> list[gs.Node]:
    """The Conv nodes that make patches: strides of the kernel's size, one group, no padding."""
    return [node for node in graph.nodes if node.op == "Conv" and _cuts_patches(node)]


def _cuts_patches(node: gs.Node) -> bool:
    stored = _stored(node)
    if not is_constant(stored) or len(stored.shape) != 4:
        return False
    plain = node.attrs.get("group", 1) == 1 and not any(node.attrs.get("pads", ()))
    return plain and list(node.attrs.get("strides", ())) == list(stored.shape[2:])


def _stored(node: gs.Node) -> gs.Tensor:
    """A convolution's weight, in integers where it is quantized."""
    weight: gs.Tensor = node.inputs[1]
    maker = producer(weight)
    return maker.inputs[0] if maker is not None and maker.op == "DequantizeLinear" else weight
