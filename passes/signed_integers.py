"""Store 8-bit integers the way TensorRT takes them: int8 with zero point 0, nothing lost."""

from collections import Counter
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import onnx_graphsurgeon as gs
from numpy.typing import NDArray

from regcache.passes.base import Close, Edit, Log, Parity
from regcache.passes.correct_bias import add_to_bias
from regcache.passes.encoder import Linear
from regcache.passes.errors import InputError
from regcache.passes.walk import (
    clips_integers,
    consumers,
    is_bias,
    is_constant,
    is_linear,
    is_output,
    producer,
)

_QDQ = frozenset({"QuantizeLinear", "DequantizeLinear"})
_MOVES = frozenset({"Reshape", "Transpose"})
_UINT8, _INT8 = np.dtype(np.uint8), np.dtype(np.int8)


@dataclass(frozen=True)
class SignedIntegers:
    """Turn uint8, and int8 with other zero points, into int8 with zero point 0.

    s (u - z) = s v + c, where v is u - 128 for uint8 and u itself for int8, and c is s (128 - z) or
    -s z. So an Add takes c off an activation before its QuantizeLinear, which then rounds to v,
    and c comes back behind the DequantizeLinear: through the bias of a linear, as c times the
    column sums of its dequantised weight, so that the pair stays next to the MatMul; for any other
    reader, and an output of the graph, by an Add. A weight has z taken off its integers.
    The integers are the same but for the 128. Only a number within float rounding of the middle
    between two of them may go to the other one. This is the last pass: `view_encoder` does not read
    what it leaves.

    Matched: Q/DQ pairs of one scale for the whole tensor, also with a Clip of the integers between
    (its limits move along), or Reshapes and Transposes; weights of one zero point or one for each
    index of an axis.
    Refused with InputError, naming the node: scales or zero points that are not constant, scales
    other than float32, an activation with several of them, integers that something else reads or
    that the graph gives away, and a weight that does not fit int8.
    """

    name: ClassVar[str] = "signed_integers"
    parity: ClassVar[Parity] = Close(rtol=1e-3, atol=1e-3)
    version: ClassVar[int] = 1
    """Goes up when the pass comes to write other graphs: engines are built again then."""

    def requires(self, graph: gs.Graph) -> None:
        """Every pair and weight that is to change can be."""
        for node in _to_change(graph):
            if _on_weight(node):
                _signed(node)
            else:
                _check_activation(graph, node)

    def rewrite(self, graph: gs.Graph) -> Log:
        """Change the integers' type and zero points, and move what these stood for."""
        plan = [(node, _zero_point(node)) for node in _to_change(graph)]
        stored: dict[tuple[int, bytes], gs.Constant] = {}
        edits = []
        for node, zero in plan:
            name, made = _name(node), node.outputs[0].name
            if _on_weight(node):
                key = (id(node.inputs[0]), zero.tobytes())
                if key not in stored:
                    stored[key] = gs.Constant(f"{made}/signed", _signed(node))
                node.inputs[0] = stored[key]
            elif node.op == "QuantizeLinear":
                _take_off(graph, node, zero)
            else:
                _give_back(graph, node, _offset(node, zero))
            signed = gs.Constant(f"{made}/zero_point/signed", np.zeros(zero.shape, np.int8))
            node.inputs = [*node.inputs[:2], signed]
            edits.append(Edit(name, f"{zero.dtype} around {_listed(zero)} to int8"))
        return Log(tuple(edits))

    def ensures(self, before: gs.Graph, after: gs.Graph) -> None:
        """Nothing left to change, the same ends, and nothing but Adds is new."""
        assert not _to_change(after)
        old, new = (Counter(node.op for node in graph.nodes) for graph in (before, after))
        assert (new - old).keys() <= {"Add"}
        assert not old - new
        ends = zip(before.inputs + before.outputs, after.inputs + after.outputs, strict=True)
        assert all((one.name, one.dtype) == (other.name, other.dtype) for one, other in ends)


def _to_change(graph: gs.Graph) -> list[gs.Node]:
    """The nodes of 8-bit integers that are unsigned or have another zero point than 0."""
    return [
        node
        for node in graph.nodes
        if node.op in _QDQ
        and ((zero := _zero_point(node)).dtype == _UINT8 or (zero.dtype == _INT8 and zero.any()))
    ]


def _zero_point(node: gs.Node) -> NDArray[Any]:
    """Of a QuantizeLinear or DequantizeLinear, in the type of its integers; 0 where it has none."""
    if len(node.inputs) > 2 and not node.inputs[2].is_empty():
        if not is_constant(node.inputs[2]):
            raise _refusal(node, "its zero point is not constant")
        values: NDArray[Any] = node.inputs[2].values
        return values
    integers = node.inputs[0] if node.op == "DequantizeLinear" else node.outputs[0]
    if integers.dtype is None:
        raise _refusal(node, "the type of its integers is not known")
    return np.zeros((), integers.dtype)


def _on_weight(node: gs.Node) -> bool:
    return node.op == "DequantizeLinear" and is_constant(node.inputs[0])


def _offset(node: gs.Node, zero: NDArray[Any]) -> float:
    """c: what the numbers are more than the scale times the signed integers."""
    middle = 128 if zero.dtype == _UINT8 else 0
    return float(node.inputs[1].values.item()) * (middle - int(zero.item()))


def _signed(node: gs.Node) -> NDArray[np.int8]:
    """The integers of a DequantizeLinear's weight with its zero point taken off."""
    stored = node.inputs[0].values
    signed = stored.astype(np.int16) - _spread(node, _zero_point(node).astype(np.int16))
    if signed.min(initial=0) < -128 or signed.max(initial=0) > 127:
        ends = f"{signed.min()} to {signed.max()}"
        raise _refusal(node, f"without its zero point, the weight is {ends}, beyond int8")
    return np.asarray(signed, np.int8)


def _spread(node: gs.Node, values: NDArray[Any]) -> NDArray[Any]:
    """Scales or zero points of a DequantizeLinear in a shape that fits its integers."""
    if values.size == 1:
        return values.reshape(())
    rank = len(node.inputs[0].shape)
    if values.ndim != 1 or node.attrs.get("block_size"):
        raise _refusal(node, "has blocks of integers")
    shape = [1] * rank
    shape[int(node.attrs.get("axis", 1))] = -1
    return values.reshape(shape)


def _check_activation(graph: gs.Graph, node: gs.Node) -> None:
    """Refuse a half of a pair that has no single float32 scale, or no other half."""
    scale, zero = node.inputs[1], _zero_point(node)
    if not is_constant(scale):
        raise _refusal(node, "its scale is not constant")
    if scale.values.dtype != np.float32:
        raise _refusal(node, f"its scale is {scale.values.dtype}, not float32")
    if scale.values.size != 1 or zero.size != 1:
        raise _refusal(node, "has several scales")
    if node.op == "DequantizeLinear":
        maker = producer(node.inputs[0])
        while maker is not None and maker.op in _MOVES:
            maker = producer(maker.inputs[0])
        if maker is None or maker.op != "QuantizeLinear":
            raise _refusal(node, "reads integers of no QuantizeLinear")
        return
    clips, moves = _clips(node), _moves(node.outputs[0])
    tensors = [item.outputs[0] for item in (node, *clips, *moves)]
    readers = [reader for tensor in tensors for reader in consumers(tensor)]
    others = [one for one in readers if one.op not in {"DequantizeLinear", *_MOVES}]
    if others or any(is_output(graph, tensor) for tensor in tensors):
        raise _refusal(node, "its integers are not for a DequantizeLinear alone")
    for clip in clips:
        if not all(item.is_empty() or is_constant(item) for item in clip.inputs[1:]):
            raise _refusal(clip, "its limits are not constant")


def _clips(quantize: gs.Node) -> list[gs.Node]:
    return [node for node in quantize.outputs[0].outputs if clips_integers(node)]


def _moves(integers: gs.Tensor) -> list[gs.Node]:
    """The nodes that give integers another shape or order before they are dequantized."""
    found = [node for node in consumers(integers) if node.op in _MOVES]
    return [*found, *(after for node in found for after in _moves(node.outputs[0]))]


def _take_off(graph: gs.Graph, quantize: gs.Node, zero: NDArray[Any]) -> None:
    """Let a QuantizeLinear make signed integers, of its activation less the offset."""
    integers = quantize.outputs[0]
    for clip in _clips(quantize) if zero.dtype == _UINT8 else ():
        for slot, limit in enumerate(clip.inputs[1:], start=1):
            if not limit.is_empty():
                moved = np.array(int(limit.values.item()) - 128, np.int8)
                clip.inputs[slot] = gs.Constant(f"{clip.outputs[0].name}/{slot}/signed", moved)
        clip.outputs[0].dtype = _INT8
    for tensor in (integers, *(move.outputs[0] for move in _moves(integers))):
        tensor.dtype = _INT8
    offset = _offset(quantize, zero)
    if offset:
        source = quantize.inputs[0]
        less = gs.Variable(f"{integers.name}/moved", dtype=np.float32, shape=source.shape)
        quantize.inputs[0] = less
        _append_add(graph, source, -offset, less)


def _give_back(graph: gs.Graph, dequantize: gs.Node, offset: float) -> None:
    """Add `offset` to what a DequantizeLinear yields, in the biases of linears that read it."""
    if not offset:
        return
    floats = dequantize.outputs[0]
    linears = [node for node in floats.outputs if _is_linear_of(node, floats)]
    for node in linears:
        sums = _weight(node).sum(axis=0)
        add_to_bias(graph, _linear(graph, node), np.asarray(offset * sums, np.float32))
    if len(linears) < len(floats.outputs) or is_output(graph, floats):
        moved = gs.Variable(f"{floats.name}/moved", dtype=np.float32, shape=floats.shape)
        dequantize.outputs = [moved]
        for node in linears:
            node.inputs[0] = moved
        _append_add(graph, moved, offset, floats)


def _is_linear_of(node: gs.Node, floats: gs.Tensor) -> bool:
    """Whether a node multiplies `floats` with a weight whose numbers can be told."""
    if not is_linear(node) or node.inputs[0] is not floats:
        return False
    weight = node.inputs[1]
    if is_constant(weight):
        return True
    (dequantize,) = weight.inputs
    return all(map(is_constant, dequantize.inputs)) and not dequantize.attrs.get("block_size")


def _linear(graph: gs.Graph, matmul: gs.Node) -> Linear:
    """A linear with the Add behind it where that is its bias and nothing else reads the product."""
    product = matmul.outputs[0]
    readers = [] if is_output(graph, product) else product.outputs
    biased = len(readers) == 1 and readers[0].op == "Add"
    if biased and any(map(is_bias, readers[0].inputs)):
        return Linear(product.name, matmul, readers[0])
    return Linear(product.name, matmul, None)


def _weight(matmul: gs.Node) -> NDArray[np.float64]:
    """The weight [K, N] of a linear, dequantised where it stands behind a DequantizeLinear."""
    weight = matmul.inputs[1]
    if is_constant(weight):
        return np.asarray(weight.values, np.float64)
    node = weight.inputs[0]
    integers = node.inputs[0].values - _spread(node, _zero_point(node).astype(np.float64))
    scales = _spread(node, node.inputs[1].values.astype(np.float64))
    return np.asarray(integers * scales, np.float64)


def _append_add(graph: gs.Graph, source: gs.Tensor, offset: float, target: gs.Variable) -> None:
    constant = gs.Constant(f"{target.name}/offset", np.array(offset, np.float32))
    name = f"signed/{target.name}"
    graph.nodes.append(gs.Node("Add", name, {}, [source, constant], [target]))


def _listed(zero: NDArray[Any]) -> str:
    return "/".join(str(value) for value in np.unique(zero)[:3])


def _name(node: gs.Node) -> str:
    return str(node.name or node.outputs[0].name)


def _refusal(node: gs.Node, reason: str) -> InputError:
    return InputError(f"signed_integers: {node.op} {_name(node)!r}: {reason}")
