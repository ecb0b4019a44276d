"""Fold the biases of queries, keys and values into their weights, by way of the norm before."""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_graphsurgeon as gs
from numpy.typing import NDArray

from regcache.passes.base import Close, Edit, Log, Parity, Skip
from regcache.passes.encoder import Block
from regcache.passes.find_blocks import view_encoder
from regcache.passes.walk import consumers, hand_on, is_bias, is_constant, is_output

Doubles = NDArray[np.float64]


@dataclass(frozen=True)
class FoldBiases:
    """Let float linears of q, k and v compute the same without biases.

    TensorRT-RTX 1.7 copies queries, keys and values once more to add their biases; without biases
    its fused attention reads what the product wrote: three kernels and a sixth of all traffic less.

    What a layer norm makes before its scale sums to 0 over the channels, so n = 1 / scale is
    orthogonal to all that it makes but for its own bias: with that bias b and a weight W, adding
    n u^T to W adds (b . n) u to every row of the product, a bias of our choice. The norm's bias is
    moved along n until b . n is large enough to divide by; u takes back what that does to W, too.

    Matched: a LayerNormalization with a constant scale, whose output only float linears of q, k and
    v read, one with a bias at least; together or packed.
    Left as they are: linears that are quantized, or have no biases. Refused: other norms, of which
    nothing sums to 0; a norm that something else reads.
    """

    name: ClassVar[str] = "fold_biases"
    parity: ClassVar[Parity] = Close(rtol=1e-4, atol=1e-4)

    def requires(self, graph: gs.Graph) -> None:
        """A readable encoder."""
        view_encoder(graph)

    def rewrite(self, graph: gs.Graph) -> Log:
        """Replace the norm's bias and the weights; the Adds of biases fall to the clean-up."""
        edits, skips = [], []
        for block in view_encoder(graph).blocks:
            linears = block.attention.projections
            biased = any(linear.bias_add is not None for linear in linears)
            if not biased or any(linear.quantized for linear in linears):
                continue
            site = f"blocks.{block.index}.{'+'.join(linear.role.value for linear in linears)}"
            reason = _refusal(graph, block)
            if reason is not None:
                skips.append(Skip(site, reason, "TensorRT takes three kernels more"))
                continue
            _fold(graph, block)
            edits.append(Edit(site, "no biases"))
        return Log(tuple(edits), tuple(skips))

    def ensures(self, before: gs.Graph, after: gs.Graph) -> None:
        """The same linears; no biases at those of q, k and v where there is an edit."""
        old, new = view_encoder(before), view_encoder(after)
        assert old.linear_shapes == new.linear_shapes
        for one, other in zip(old.blocks, new.blocks, strict=True):
            had, has = (
                [linear.bias_add is not None for linear in block.attention.projections]
                for block in (one, other)
            )
            assert not any(has) or has == had


def _refusal(graph: gs.Graph, block: Block) -> str | None:
    norm, linears = block.norm1, block.attention.projections
    if norm.op != "LayerNormalization":
        return "the norm before them is none whose channels sum to 0"
    if len(norm.outputs) > 1 and any(item.outputs for item in norm.outputs[1:]):
        return "the norm's mean is read"
    if norm.attrs.get("axis", -1) != -1 and not _last_axis(norm):
        return "the norm is not over the last axis"
    if not all(is_constant(item) and is_bias(item) for item in norm.inputs[1:]):
        return "the norm's scale or bias is not constant"
    readers = {id(node) for node in consumers(norm.outputs[0])}
    if readers != {id(linear.matmul) for linear in linears} or is_output(graph, norm.outputs[0]):
        return "something else reads the norm"
    adds = [linear.bias_add for linear in linears if linear.bias_add is not None]
    if any(is_output(graph, linear.matmul.outputs[0]) for linear in linears) or any(
        not any(is_constant(item) for item in add.inputs) for add in adds
    ):
        return "a bias is not constant"
    return None


def _last_axis(norm: gs.Node) -> bool:
    shape = norm.inputs[0].shape
    return bool(shape) and norm.attrs["axis"] == len(shape) - 1


def _fold(graph: gs.Graph, block: Block) -> None:
    norm, linears = block.norm1, block.attention.projections
    width = linears[0].weight_shape[0]
    scale, *rest = (_vector(item.values, width) for item in norm.inputs[1:])
    shift = rest[0] if rest else np.zeros(width)
    normal = _normal(scale)
    moved = shift + _step(scale, shift, normal) * normal
    for linear in linears:
        name, weight = f"{linear.name}/folded", linear.weight.astype(np.float64)
        wanted = linear.bias.astype(np.float64) + (shift - moved) @ weight
        folded = weight + np.outer(normal, wanted / (moved @ normal))
        linear.matmul.inputs[1] = gs.Constant(name, folded.astype(np.float32))
        if linear.bias_add is not None:
            handed_on = hand_on(graph, linear.bias_add, linear.matmul.outputs[0])
            assert handed_on
    constant = gs.Constant(f"blocks.{block.index}.norm1/moved", moved.astype(np.float32))
    norm.inputs = [*norm.inputs[:2], constant]


def _normal(scale: Doubles) -> Doubles:
    """A vector [K] orthogonal to whatever the norm makes without its bias, of largest entry 1."""
    dead = scale == 0
    found: Doubles = dead.astype(np.float64) if dead.any() else 1 / scale
    return np.asarray(found / np.abs(found).max())


def _step(scale: Doubles, shift: Doubles, normal: Doubles) -> float:
    """How far the norm's bias moves along `normal`: by what channels reach, and away from 0."""
    reach = float(np.sqrt(np.mean(scale**2 + shift**2))) or 1.0
    return reach if shift @ normal >= 0 else -reach


def _vector(values: NDArray[np.float32], size: int) -> Doubles:
    return np.broadcast_to(values.reshape(-1), size).astype(np.float64)
