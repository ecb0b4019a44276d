"""Walking a graph along its data: producers, consumers, and ops that only move numbers about."""

from collections.abc import Callable, Iterable, Iterator
from typing import TypeGuard

import onnx_graphsurgeon as gs

from regcache.passes.marks import rotates
from regcache.passes.tensorrt_operators import DEQUANTIZERS, OPERATORS

# Ops that move or round values without mixing them with other data.
SHAPE_OPS = frozenset(
    {
        "Cast",
        "DequantizeLinear",
        "Dropout",
        "Flatten",
        "Gather",
        "Identity",
        "QuantizeLinear",
        "Reshape",
        "Slice",
        "Split",
        "Squeeze",
        "Transpose",
        "Unsqueeze",
        *OPERATORS,
    }
)
NORMS = frozenset({"LayerNormalization", "RMSNormalization", "SimplifiedLayerNormalization"})
# Nodes that rotate an activation are named with this: their products are none of the encoder's.
# Ops between a linear and a matmul of attention: scaling, rotation, norms of one head.
HEAD_OPS = SHAPE_OPS | NORMS | {"Add", "Concat", "Div", "Expand", "Mul", "Neg", "Sub", "Where"}


def is_constant(tensor: gs.Tensor) -> TypeGuard[gs.Constant]:
    """Whether the tensor's values are known before the model runs."""
    return isinstance(tensor, gs.Constant)


def is_bias(tensor: gs.Tensor) -> TypeGuard[gs.Constant]:
    """Whether a tensor is a constant for each channel, the last dimension, or one for all."""
    return is_constant(tensor) and all(dim == 1 for dim in tensor.shape[:-1])


def name_of(node: gs.Node) -> str:
    """The node's name, or that of what it makes: exporters leave nodes without names."""
    return str(node.name or node.outputs[0].name)


def producer(tensor: gs.Tensor) -> gs.Node | None:
    """The node that writes the tensor; None for graph inputs and constants.

    A Clip of quantized integers counts as part of its QuantizeLinear, here and in `consumers`.
    """
    node: gs.Node | None = tensor.inputs[0] if tensor.inputs else None
    return node.inputs[0].inputs[0] if node is not None and clips_integers(node) else node


def consumers(tensor: gs.Tensor) -> list[gs.Node]:
    """The nodes that read the tensor's data (Shape reads only its shape)."""
    found = []
    for node in tensor.outputs:
        if clips_integers(node):
            found += consumers(node.outputs[0])
        elif node.op != "Shape":
            found.append(node)
    return found


def is_output(graph: gs.Graph, tensor: gs.Tensor) -> bool:
    """Whether the graph gives the tensor away."""
    return any(item is tensor for item in graph.outputs)


def clips_integers(node: gs.Node) -> bool:
    """Whether the node is a Clip of what a QuantizeLinear rounded: fewer bits, no activation."""
    if node.op != "Clip" or not node.inputs[0].inputs:
        return False
    return bool(node.inputs[0].inputs[0].op == "QuantizeLinear")


def read_tensors(node: gs.Node) -> list[gs.Tensor]:
    """What a node reads, what its subgraphs take from outside included."""
    found = list(node.inputs)
    for value in node.attrs.values():
        if isinstance(value, gs.Graph):
            found += [item for inner in value.nodes for item in read_tensors(inner)]
            found += value.outputs
    return found


def data_inputs(node: gs.Node) -> list[gs.Tensor]:
    """The inputs that carry data at run time: variables, without shapes, indices and axes."""
    kept = node.inputs[:1] if node.op in SHAPE_OPS else node.inputs
    return [tensor for tensor in kept if not tensor.is_empty() and not is_constant(tensor)]


def stored_weight(node: gs.Node) -> gs.Constant | None:
    """The [K, N] constant on a MatMul's right, perhaps behind a DequantizeLinear."""
    tensor = node.inputs[1] if node.op == "MatMul" else None
    before = None if tensor is None else producer(tensor)
    if before is not None and before.op in DEQUANTIZERS:
        tensor = before.inputs[0]
    return tensor if tensor is not None and is_constant(tensor) and len(tensor.shape) == 2 else None


def is_linear(node: gs.Node) -> bool:
    """A MatMul with a constant [K, N] weight on its right, quantized or not."""
    return not rotates(node) and stored_weight(node) is not None


def skip_rotation(tensor: gs.Tensor) -> gs.Tensor:
    """The tensor before a rotation's nodes; itself where there are none."""
    node = producer(tensor)
    while node is not None and rotates(node):
        (tensor,) = data_inputs(node)  # a matrix may stand on either side
        node = producer(tensor)
    return tensor


def keeps_channels(node: gs.Node) -> bool:
    """Whether a node moves numbers, and the last axis stays what it is."""
    if node.op == "Transpose":
        perm = node.attrs.get("perm")  # none reverses the axes
        return bool(perm) and bool(perm[-1] == len(perm) - 1)
    if node.op not in {"Cast", "Identity", "Reshape", "Squeeze", "Unsqueeze"}:
        return False
    source, result = node.inputs[0].shape, node.outputs[0].shape
    known = bool(source and result) and isinstance(source[-1], int)
    return known and source[-1] == result[-1]


def upstream(
    tensor: gs.Tensor, follow: Callable[[gs.Node], Iterable[gs.Tensor]]
) -> Iterator[gs.Node]:
    """The nodes behind a tensor, each once; `follow` gives the inputs of a node to go on by."""
    waiting, seen = [tensor], set[int]()
    while waiting:
        node = producer(waiting.pop())
        if node is not None and id(node) not in seen:
            seen.add(id(node))
            yield node
            waiting.extend(follow(node))


def linears_behind(tensor: gs.Tensor) -> list[gs.Node]:
    """The nearest linears upstream, reached through head-wise ops, in order of discovery."""

    def follow(node: gs.Node) -> list[gs.Tensor]:
        return data_inputs(node) if node.op in HEAD_OPS and not is_linear(node) else []

    return [node for node in upstream(tensor, follow) if is_linear(node)]


def skip_back(tensor: gs.Tensor, ops: frozenset[str] = SHAPE_OPS) -> gs.Tensor:
    """Go upstream through ops of one data input; the first tensor not produced by one."""
    while True:
        node = producer(tensor)
        if node is None or node.op not in ops or len(data_inputs(node)) != 1:
            return tensor
        (tensor,) = data_inputs(node)


def skip_affine(tensor: gs.Tensor) -> gs.Tensor:
    """The tensor before Adds and Muls of one constant per channel; itself where there is none."""
    while True:
        node = producer(tensor)
        if node is None or node.op not in {"Add", "Mul"}:
            return tensor
        vectors = [item for item in node.inputs if is_constant(item) and item.values.size > 1]
        if len(vectors) != 1:
            return tensor
        tensor = data_inputs(node)[0]


def downstream(tensor: gs.Tensor, ops: frozenset[str]) -> Iterator[gs.Node]:
    """Nodes reached from a tensor through `ops`, breadth first, each once; stops behind others."""
    waiting, seen = list(consumers(tensor)), set[int]()
    while waiting:
        node = waiting.pop(0)
        if id(node) in seen:
            continue
        seen.add(id(node))
        yield node
        if node.op in ops and len(data_inputs(node)) == 1:
            waiting.extend(item for output in node.outputs for item in consumers(output))


def replace_everywhere(graph: gs.Graph, old: gs.Tensor, new: gs.Tensor) -> None:
    """Let every reader of `old`, and the graph's outputs, read `new`."""
    for node in list(old.outputs):
        node.inputs = [new if item is old else item for item in node.inputs]
    graph.outputs = [new if item is old else item for item in graph.outputs]


def tensors_of(graph: gs.Graph) -> dict[str, gs.Tensor]:
    """What `graph.tensors()` gives, in a third of its time, with no word of two of one name."""
    named: dict[str, gs.Tensor] = {}
    for items in (
        graph.inputs,
        *(edges for node in graph.nodes for edges in (node.inputs, node.outputs)),
        graph.outputs,
    ):
        for item in items:
            named[item.name] = item
    named.pop("", None)
    return named


def count_ops(graph: gs.Graph, op: str) -> int:
    """How many nodes of one kind a graph has."""
    return sum(node.op == op for node in graph.nodes)


def hand_on(graph: gs.Graph, node: gs.Node, source: gs.Tensor) -> bool:
    """Let everything that reads the node's first output read `source`; the node falls to clean-up.

    An output of the graph keeps its name: what makes `source` writes it. False, and nothing is
    changed, where nothing in the graph makes it or it is an output itself.
    """
    result = node.outputs[0]
    old, new = (source, result) if is_output(graph, result) else (result, source)
    if old is source:
        if not source.inputs or is_output(graph, source):
            return False
        maker = source.inputs[0]
        node.outputs.clear()
        maker.outputs = [result if item is source else item for item in maker.outputs]
    node.outputs.clear()
    node.inputs.clear()
    for reader in list(old.outputs):
        reader.inputs = [new if item is old else item for item in reader.inputs]
    return True
