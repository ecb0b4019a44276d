"""Rotate what the MLPs' second linears read, so that no channel of it holds an outlier.

What an activation function leaves is mostly small and here and there large: integers of one scale
are wasted on it. A Walsh-Hadamard matrix for every few channels spreads what is large over them
(QuaRot, arXiv 2404.00456), and the weights take the rotation back, so the encoder computes the
same. Nothing before the activation function can do it for free: it costs a small product.
"""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_graphsurgeon as gs
from numpy.typing import NDArray

from regcache.passes.base import Close, Edit, Log, Parity, Skip
from regcache.passes.encoder import EncoderView, Linear, Site
from regcache.passes.equalize_sources import refusal
from regcache.passes.errors import InputError
from regcache.passes.find_blocks import view_encoder
from regcache.passes.marks import ROTATION, rotates
from regcache.passes.walk import skip_affine, skip_back, upstream

Floats = NDArray[np.float32]

SIZES = (64, 16, 4)
"""Channels that can be rotated together: powers of 4, so that FP16 holds the matrix exactly."""
_ROUNDS = frozenset({"Cast", "DequantizeLinear", "QuantizeLinear"})


@dataclass(frozen=True)
class RotateHidden:
    """Rotate the activation [..., K] that each block's fc2 reads, `size` channels at a time.

    It is multiplied by `rotation(size)` between two Reshapes (ONNX MatMul and Reshape, opset 14),
    the weight's rows by its transpose. Refused: a K that `size` does not divide, an activation that
    is a graph output or that something else reads, one of unknown rank, a quantized linear, and one
    that is rotated already. `only`: the names of the sites to rotate; None for all.
    """

    size: int = SIZES[0]
    only: frozenset[str] | None = None
    name: ClassVar[str] = "rotate_hidden"
    parity: ClassVar[Parity] = Close(rtol=1e-3, atol=1e-4)

    def requires(self, graph: gs.Graph) -> None:
        """A readable encoder, and a size that `SIZES` lists."""
        if self.size not in SIZES:
            raise InputError(f"rotate_hidden: {self.size} channels at a time: needs one of {SIZES}")
        view_encoder(graph)

    def rewrite(self, graph: gs.Graph) -> Log:
        """Insert the products, and turn the weights back."""
        edits, skips = [], []
        view, matrix = view_encoder(graph), rotation(self.size)
        for site in hidden_sites(view):
            if self.only is not None and site.name not in self.only:
                continue
            reason = self.refusal(view, site)
            if reason is not None:
                skips.append(Skip(site.name, reason))
                continue
            rotated = _insert(graph, site, matrix)
            for linear in site.linears:
                weight = turned(linear.weight, matrix)
                constant = gs.Constant(f"{linear.name}/rotated", weight)
                linear.matmul.inputs = [rotated, constant]
            edits.append(Edit(site.name, f"{self.size} channels at a time"))
        return Log(tuple(edits), tuple(skips))

    def ensures(self, before: gs.Graph, after: gs.Graph) -> None:
        """The same linears, and three nodes for each activation that is rotated now."""
        old, new = view_encoder(before), view_encoder(after)
        assert old.linear_shapes == new.linear_shapes
        rotated = [
            sum(rotated_channels(linear) > 0 for linear in one.linears) for one in (old, new)
        ]
        assert len(after.nodes) - len(before.nodes) == 3 * (rotated[1] - rotated[0])

    def refusal(self, view: EncoderView, site: Site) -> str | None:
        """Why a site of `hidden_sites` cannot be rotated; None: it can."""
        return refusal(view, site) or self._unfit(site)

    def _unfit(self, site: Site) -> str | None:
        channels, shape = site.linears[0].weight_shape[0], site.tensor.shape
        if rotated_channels(site.linears[0]):
            return "rotated already"
        if channels % self.size:
            return f"{channels} channels are not a multiple of {self.size}"
        return None if shape is not None else "its rank is not known"


def rotation(size: int) -> Floats:
    """An orthogonal matrix [size, size] of numbers that differ by their sign alone.

    Sylvester's matrix, its rows with the signs of a bent function: a constant added to all channels
    then spreads over all of them, instead of coming together in one.
    """
    index = np.arange(size)
    signs = 1 - 2 * _parity(index & (index >> 1))
    sylvester = 1 - 2 * _parity(index[:, None] & index)
    return np.asarray(signs[:, None] * sylvester / np.sqrt(size), np.float32)


def hidden_sites(view: EncoderView) -> list[Site]:
    """The activations that the blocks' second MLP linears read."""
    last = {id(block.mlp.fc2) for block in view.blocks}
    return [site for site in view.sites if id(site.linears[0]) in last]


def rotated_channels(linear: Linear) -> int:
    """How many channels of a linear's input are rotated together; 0: they are not."""
    products = (
        node
        for node in upstream(
            skip_affine(skip_back(linear.input, _ROUNDS)),
            lambda node: node.inputs[:1] if rotates(node) else (),
        )
        if rotates(node) and node.op == "MatMul"
    )
    return next((int(product.inputs[1].shape[0]) for product in products), 0)


def _insert(graph: gs.Graph, site: Site, matrix: Floats) -> gs.Variable:
    """Append the nodes that rotate an activation; returns it rotated."""
    tensor, size = site.tensor, len(matrix)
    channels, name = site.linears[0].weight_shape[0], f"{ROTATION}/{site.name}"
    kept = [0] * (len(tensor.shape) - 1)
    steps = (
        ("Reshape", "parts", np.array([*kept, channels // size, size], np.int64)),
        ("MatMul", "product", matrix),
        ("Reshape", "whole", np.array([*kept, channels], np.int64)),
    )
    for op, what, values in steps:
        constant = gs.Constant(f"{name}/{what}/constant", values)
        output = gs.Variable(f"{name}/{what}/out", dtype=np.float32)
        graph.nodes.append(gs.Node(op, f"{name}/{what}", {}, [tensor, constant], [output]))
        tensor = output
    return tensor


def turned(weight: Floats, matrix: Floats) -> Floats:
    """The weight [K, N] of an activation that is rotated."""
    parts = weight.astype(np.float64).reshape(-1, len(matrix), weight.shape[1])
    product = matrix.astype(np.float64).T @ parts
    return np.asarray(product.reshape(weight.shape), np.float32)


def _parity(numbers: NDArray[np.int64]) -> NDArray[np.int64]:
    """1 where a number has an odd count of ones, else 0."""
    return np.asarray(np.vectorize(lambda number: int(number).bit_count() % 2)(numbers), np.int64)
