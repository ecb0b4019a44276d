"""The part of an encoder that turns register tokens into their keys and values."""

import numpy as np
import onnx
import onnx_graphsurgeon as gs
from numpy.typing import NDArray

from regcache.passes.check import check_and_infer
from regcache.passes.clean_up import clean_up
from regcache.passes.copy_graph import copy_graph
from regcache.passes.encoder import Attention, Block, EncoderView
from regcache.passes.errors import InputError, first_line
from regcache.passes.find_blocks import view_encoder
from regcache.passes.key_scale import key_scale, scalar
from regcache.passes.register_nodes import check_blocks
from regcache.passes.walk import HEAD_OPS, data_inputs, is_constant, producer, upstream

Floats = NDArray[np.float32]


def register_graph(view: EncoderView, start: int, end: int) -> gs.Graph:
    """A graph from tokens [1, R, width] to the attention operands of blocks `start` to `end` - 1.

    The input "tokens" is the hidden state at block `start`; the tokens attend to one another only
    and get no rotation. The outputs are, block by block, what the graph feeds to the scores as
    keys and to the context as values; `operand_heads` reads them. Raises InputError where the
    blocks cannot be cut out of the graph.
    """
    check_blocks(start, end, len(view.blocks))
    graph = copy_graph(view.graph)
    blocks = view_encoder(graph).blocks[start:end]
    for block in blocks:
        _drop_rotation(block)
    tokens = gs.Variable("tokens", dtype=np.float32, shape=[1, "registers", view.width])
    stream = blocks[0].input
    for node in list(stream.outputs):
        node.inputs = [tokens if item is stream else item for item in node.inputs]
    graph.inputs = [tokens]
    graph.outputs = [
        item for block in blocks for item in (block.attention.key, block.attention.value)
    ]
    clean_up(graph)
    try:
        if view.tokens is not None:
            _infer(graph, tokens, view.tokens)
            _free_reshapes(graph, view.tokens)
        _infer(graph, tokens, "registers")
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        reason = first_line(error)
        raise InputError(f"registers: block {start} cannot be cut out: {reason}") from error
    return graph


def _infer(graph: gs.Graph, tokens: gs.Variable, count: int | str) -> None:
    """Set the number of tokens and infer every shape behind it."""
    tokens.shape = [1, count, tokens.shape[2]]
    for output in graph.outputs:
        output.dtype = np.dtype(np.float32)
        output.shape = [f"{output.name}/{axis}" for axis in range(len(output.shape))]
    check_and_infer(graph)


def _free_reshapes(graph: gs.Graph, tokens: int) -> None:
    """Let a Reshape that names the number of tokens infer it instead; the batch is 1 here."""
    for node in graph.nodes:
        if node.op == "Reshape" and is_constant(node.inputs[1]):
            result = node.outputs[0].shape
            if result.count(tokens) == 1 and tokens in node.inputs[1].values.tolist():
                freed = [-1 if dim == tokens else dim for dim in result]
                node.inputs[1] = gs.Constant(f"{node.name}/freed", np.array(freed, dtype=np.int64))


def operand_heads(
    attention: Attention, head_dim: int, key: Floats, value: Floats
) -> tuple[Floats, Floats]:
    """K and V [heads, R, head_dim] from the operands that a register graph yields.

    The keys come back without the scale that the graph multiplies them by.
    """
    if attention.scores is not attention.context:
        # Matmul form: keys [1, heads, head_dim, R] or [heads, head_dim, R], values as wanted.
        key = key.reshape(-1, *key.shape[-2:]).swapaxes(1, 2)
        return key / np.float32(key_scale(attention.key)), value.reshape(-1, *value.shape[-2:])
    if key.ndim == 4:
        return key[0], value[0]
    keys, values = (item.reshape(item.shape[1], -1, head_dim) for item in (key, value))
    return keys.swapaxes(0, 1), values.swapaxes(0, 1)


def _drop_rotation(block: Block) -> None:
    """Rewire queries and keys around rotary embeddings: registers have no position."""
    attention = block.attention
    roots = {id(linear.matmul) for linear in attention.projections}
    for slot in (0, 1):
        rotated = _rotated(attention.scores.inputs[slot])
        if rotated is None:
            continue
        heads = _before_rotation(rotated, roots)
        for reader in list(rotated.outputs):
            reader.inputs = [heads if item is rotated else item for item in reader.inputs]


def _rotated(operand: gs.Tensor) -> gs.Tensor | None:
    """Upstream of an operand, the output of a rotation's last node; None without rotation."""
    while (node := producer(operand)) is not None:
        if node.op in {"Concat", "Add"} and len(data_inputs(node)) > 1:
            return operand
        if node.op in {"Mul", "Div"} and any(map(scalar, node.inputs)):
            operand = next(item for item in node.inputs if not scalar(item))
        elif node.op in {"Reshape", "Transpose", "Cast", "Identity"}:
            operand = node.inputs[0]
        else:
            return None
    return None


def _before_rotation(rotated: gs.Tensor, roots: set[int]) -> gs.Tensor:
    """The tensor of the same shape that every path from a linear to `rotated` goes through."""
    tensor = rotated
    while (node := producer(tensor)) is not None and id(node) not in roots:
        tensor = data_inputs(node)[0]
        if tensor.shape == rotated.shape and not _reaches(rotated, roots, without=tensor):
            return tensor
    raise InputError(f"registers: cannot tell where the rotation of {rotated.name!r} begins")


def _reaches(tensor: gs.Tensor, roots: set[int], without: gs.Tensor) -> bool:
    """Whether a linear is upstream of `tensor` along a path that avoids `without`."""

    def follow(node: gs.Node) -> list[gs.Tensor]:
        inputs = data_inputs(node) if node.op in HEAD_OPS and id(node) not in roots else []
        return [item for item in inputs if item is not without]

    return any(id(node) in roots for node in upstream(tensor, follow))
