"""Store block linears' weights in 4 or 8 bits: ONNX Runtime's contrib op MatMulNBits."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_graphsurgeon as gs
from numpy.typing import NDArray

from regcache.passes.base import Edit, Log, Lossy, Parity, Skip
from regcache.passes.encoder import EncoderView, Linear
from regcache.passes.errors import InputError
from regcache.passes.find_blocks import view_encoder
from regcache.passes.microsoft import DOMAIN, import_microsoft

OP = "MatMulNBits"
_SMALLEST_BLOCK = 16


@dataclass(frozen=True, eq=False)
class BlockWeight:
    """A weight of 4- or 8-bit integers, one scale per output channel and block of input channels.

    `integers`: int8 [K, N], of 4 `bits` -8 to 7. `scales`: float32 [ceil(K / block_size), N], of
    any sign. `block_size`: a power of two, 16 or more; the last block may have fewer channels.
    """

    integers: NDArray[np.int8]
    scales: NDArray[np.float32]
    block_size: int
    bits: int = 4

    def dequantized(self) -> NDArray[np.float32]:
        """The float32 weight [K, N] that the integers and scales stand for."""
        scales = np.repeat(self.scales, self.block_size, axis=0)[: len(self.integers)]
        weight: NDArray[np.float32] = self.integers.astype(np.float32) * scales
        return weight


@dataclass(frozen=True)
class PackWeights:
    """Replace the MatMul of each named linear by MatMulNBits, with two 4-bit weights in a byte.

    `weights` gives the integers and scales by the linear's name ("blocks.3.fc1"). Node names,
    activations, bias Adds and linears without an entry stay as they are; linears with the same
    BlockWeight object share its constants. ONNX Runtime runs the result, `view_encoder` does not
    read it: this is the last pass, and it packs everything in one run.
    Refused: a linear that is quantized already.
    """

    weights: Mapping[str, BlockWeight]
    name: ClassVar[str] = "pack_weights"
    parity: ClassVar[Parity] = Lossy()

    def requires(self, graph: gs.Graph) -> None:
        """A readable encoder with nothing packed yet, names of its linears, weights that fit."""
        if any(node.op == OP for node in graph.nodes):
            raise InputError("pack_weights: the graph has packed weights already")
        linears = {linear.name: linear for linear in view_encoder(graph).linears}
        for name, weight in self.weights.items():
            if name not in linears:
                raise InputError(f"pack_weights: no linear {name!r}")
            problem = _problem(weight, linears[name])
            if problem:
                raise InputError(f"pack_weights: {name}: {problem}")

    def rewrite(self, graph: gs.Graph) -> Log:
        """Turn the matmuls into MatMulNBits; the float weights fall to the clean-up."""
        linears, skips = self._plan(view_encoder(graph))
        edits = []
        constants: dict[int, list[gs.Constant]] = {}
        for linear in linears:
            weight, node = self.weights[linear.name], linear.matmul
            if id(weight) not in constants:
                constants[id(weight)] = _constants(linear.name, weight)
            node.op, node.domain, node.attrs = OP, DOMAIN, _attributes(weight)
            node.inputs = [linear.input, *constants[id(weight)]]
            edits.append(Edit(linear.name, f"{weight.bits} bits, blocks of {weight.block_size}"))
        if edits:
            import_microsoft(graph)
        return Log(tuple(edits), skips)

    def ensures(self, before: gs.Graph, after: gs.Graph) -> None:
        """The planned matmuls are packed, and every other node is the one it was."""
        linears, _ = self._plan(view_encoder(before))
        planned = {id(linear.matmul) for linear in linears}
        wanted = sorted(_signature(node, packed=id(node) in planned) for node in before.nodes)
        assert wanted == sorted(_signature(node, packed=node.op == OP) for node in after.nodes)

    def _plan(self, view: EncoderView) -> tuple[list[Linear], tuple[Skip, ...]]:
        """The linears to pack, and those that cannot be."""
        named = [linear for linear in view.linears if linear.name in self.weights]
        skips = [Skip(linear.name, "quantized already") for linear in named if linear.quantized]
        return [linear for linear in named if not linear.quantized], tuple(skips)


def pack_integers(integers: NDArray[np.int8], block_size: int, bits: int = 4) -> NDArray[np.uint8]:
    """Integers [K, N] of 4 or 8 bits as MatMulNBits stores them.

    Returns uint8 [N, ceil(K / block_size), block_size * bits / 8]. They are stored plus 8, or 128,
    the op's default zero point. Of 4 bits each byte holds two neighbours along K, the earlier one
    in its low half; the last block is filled up with zeros.
    """
    rows, columns = integers.shape
    blocks, middle = -(-rows // block_size), 2 ** (bits - 1)
    stored = np.full((columns, blocks * block_size), middle, np.uint8)
    stored[:, :rows] = integers.T.astype(np.int16) + middle
    stored = stored.reshape(columns, blocks, block_size)
    if bits == 8:
        return stored
    return np.asarray(stored[..., 0::2] | stored[..., 1::2] << 4)


def _problem(weight: BlockWeight, linear: Linear) -> str | None:
    """Why a linear cannot have this weight; None where it can."""
    rows, columns = linear.weight_shape
    size = weight.block_size
    if size < _SMALLEST_BLOCK or size & (size - 1):
        return f"blocks of {size}, not a power of two from {_SMALLEST_BLOCK} on"
    blocks = -(-rows // size)
    for what, array, dtype, shape in (
        ("integers", weight.integers, "int8", (rows, columns)),
        ("scales", weight.scales, "float32", (blocks, columns)),
    ):
        if array.dtype != dtype or array.shape != shape:
            found = f"{array.dtype} {list(array.shape)}"
            return f"the {what} are {found}, not {dtype} {list(shape)}"
    if weight.bits not in (4, 8):
        return f"{weight.bits} bits, not 4 or 8"
    low, high = weight.integers.min(), weight.integers.max()
    if weight.bits == 4 and (low < -8 or high > 7):
        return f"integers from {low} to {high} do not fit into 4 bits (-8 to 7)"
    if not np.isfinite(weight.scales).all():
        return "the scales hold NaN or infinity"
    return None


def _constants(name: str, weight: BlockWeight) -> list[gs.Constant]:
    """The packed integers and the scales [N, blocks]."""
    packed = pack_integers(weight.integers, weight.block_size, weight.bits)
    scales = np.ascontiguousarray(weight.scales.T)
    return [gs.Constant(f"{name}/packed", packed), gs.Constant(f"{name}/scales", scales)]


def _attributes(weight: BlockWeight) -> dict[str, int]:
    rows, columns = weight.integers.shape
    # Accuracy level 4 would round the activations to int8 too; 0 leaves them in float32.
    return {
        "K": rows,
        "N": columns,
        "bits": weight.bits,
        "block_size": weight.block_size,
        "accuracy_level": 0,
    }


def _signature(node: gs.Node, packed: bool) -> tuple[str, str, list[str], list[str]]:
    """What identifies a node: of a packed one, or one to be packed, without its weight."""
    inputs = [tensor.name for tensor in node.inputs]
    outputs = [tensor.name for tensor in node.outputs]
    return (OP, node.name, inputs[:1], outputs) if packed else (node.op, node.name, inputs, outputs)
