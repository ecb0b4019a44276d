"""Find the transformer blocks of a canonical graph (see regcache.passes.encoder)."""

from collections.abc import Sequence
from itertools import pairwise

import onnx_graphsurgeon as gs

from regcache.passes.encoder import Attention, Block, EncoderView, Linear, Mlp
from regcache.passes.errors import InputError
from regcache.passes.marks import of_registers, rotates
from regcache.passes.scalar_function import identify_activation
from regcache.passes.walk import (
    NORMS,
    SHAPE_OPS,
    consumers,
    data_inputs,
    downstream,
    is_bias,
    is_linear,
    linears_behind,
    producer,
    skip_affine,
    skip_back,
    skip_rotation,
    upstream,
)

# Between the two matmuls of attention: scaling, masking, and torch's guard against NaN rows.
_SOFTMAX_OPS = SHAPE_OPS | frozenset(["Mul", "Div", "Add", "Where", "IsNaN"])
# Between a linear and its residual add: bias and layer scale.
# A Sum is what KeepNormApart makes of an Add.
_JOINS = frozenset(["Add", "Sum"])
_BRANCH_OPS = SHAPE_OPS | frozenset(["Mul", "Add"])

# What stands before attention in blocks that are none of these, and what that says of them.
_WINDOWS = ": attention within windows, as in Swin and SAM, is not supported"
_OTHER_BLOCKS = {
    **dict.fromkeys(("Concat", "Pad", "Slice"), _WINDOWS),
    "Add": ": norms behind attention and MLP (post-norm, res-post-norm) are not supported",
}


class _MismatchError(Exception):
    """A node that does not fit the pattern of a block."""

    def __init__(self, node: gs.Node | None, reason: str) -> None:
        where = "the graph" if node is None else f"{node.op} {node.name or node.outputs[0].name!r}"
        super().__init__(f"{where}: {reason}")


def view_encoder(graph: gs.Graph) -> EncoderView:
    """Find the blocks of a canonical, topologically sorted graph (see canonicalize).

    Attention whose queries come from a learned probe (SigLIP's pooling head) is no block and is
    left out. Raises InputError, naming the first node that does not fit, when there is no block,
    when a self-attention is not part of a pre-norm block, or when blocks do not follow each other.
    """
    blocks: list[Block] = []
    try:
        for node in list(graph.nodes):
            if node.op not in {"Softmax", "Attention"}:
                continue
            block = _block_around(node, len(blocks))
            if block is not None:
                blocks.append(block)
        if not blocks:
            raise InputError("no transformer block: there is no softmax between two matmuls")
        _check_chain(blocks)
        heads, head_dim = _heads(blocks[0].attention)
    except _MismatchError as error:
        raise InputError(f"not a pre-norm vision transformer: {error}") from error
    return EncoderView(graph, tuple(blocks), heads, head_dim)


def _block_around(softmax: gs.Node, index: int) -> Block | None:
    """The block whose attention has this softmax; None when it is no self-attention."""
    matmuls = _attention_matmuls(softmax)
    if matmuls is None:
        return None
    scores, context = matmuls
    operands = (
        context.inputs[:3]
        if scores is context
        else [scores.inputs[0], scores.inputs[1], context.inputs[1]]
    )
    roots = [_one_root(operand, scores) for operand in operands]
    linears = [root for root in roots if root is not None]
    sources = {id(skip_back(root.inputs[0])) for root in linears}
    if len(linears) < 3 or len(sources) != 1:
        return None  # a pooling head: its query is a constant, or comes from elsewhere
    normed = skip_back(linears[0].inputs[0])
    norm1 = _norm_behind(normed, softmax)
    residual_in = norm1.inputs[0]

    prefix = f"blocks.{index}"
    out = _linear_after(context, f"{prefix}.out")
    add1 = _residual_add(out, residual_in)
    middle = add1.outputs[0]
    norm2, mlp, add2 = _mlp_after(middle, prefix)
    attention = Attention(_projections(linears, prefix), scores, softmax, context, out)
    return Block(index, residual_in, norm1, attention, middle, norm2, mlp, add2.outputs[0])


def _attention_matmuls(softmax: gs.Node) -> tuple[gs.Node, gs.Node] | None:
    """The matmuls before and after a softmax, or None when it is no attention (a classifier)."""
    if softmax.op == "Attention":
        return softmax, softmax
    before = producer(skip_back(softmax.inputs[0]))
    scores = before
    while scores is not None and scores.op in _SOFTMAX_OPS:
        # Behind a mask's Add or Where, the scores are the operand that depends on a MatMul.
        candidates = [producer(item) for item in data_inputs(scores)]
        scores = next((node for node in candidates if node and node.op != "Expand"), None)
    if scores is None or scores.op != "MatMul" or is_linear(scores):
        return None
    for node in downstream(softmax.outputs[0], _SOFTMAX_OPS | {"Softmax"}):
        if node.op == "MatMul" and not is_linear(node):
            return scores, node
        if node.op == "Where":
            for item in consumers(node.outputs[0]):
                if item.op == "MatMul" and not is_linear(item):
                    return scores, item
    return None


def _one_root(operand: gs.Tensor, scores: gs.Node) -> gs.Node | None:
    """The only linear behind an operand of attention; None when a constant is behind it."""
    roots = linears_behind(operand)
    if len(roots) > 1:
        raise _MismatchError(scores, f"{len(roots)} linears meet in one operand of attention")
    return roots[0] if roots else None


def _norm_behind(tensor: gs.Tensor, at: gs.Node) -> gs.Node:
    node = producer(tensor)
    if node is None or node.op not in NORMS:
        found = "a graph input" if node is None else f"{node.op} {node.name!r}"
        why = "" if node is None else _OTHER_BLOCKS.get(node.op, "")
        raise _MismatchError(at, f"its input is {found}, not a layer norm{why}")
    return node


def _as_linear(matmul: gs.Node, name: str) -> Linear:
    following = consumers(matmul.outputs[0])
    if len(following) == 1 and following[0].op == "Add":
        add = following[0]
        if any(map(is_bias, add.inputs)):
            return Linear(name, matmul, add)
    return Linear(name, matmul, None)


def _projections(roots: Sequence[gs.Node], prefix: str) -> tuple[Linear, ...]:
    """The distinct linears among those of q, k and v; "qkv" where one makes all three."""
    letters: dict[int, str] = {}
    for root, letter in zip(roots, "qkv", strict=True):
        letters[id(root)] = letters.get(id(root), "") + letter
    distinct = {id(root): root for root in roots}
    return tuple(_as_linear(root, f"{prefix}.{letters[key]}") for key, root in distinct.items())


def _linear_after(context: gs.Node, name: str) -> Linear:
    passed = SHAPE_OPS | NORMS | {"Add", "Mul"}
    for node in downstream(context.outputs[0], passed):
        if is_linear(node):
            return _as_linear(node, name)
        if node.op not in passed or len(data_inputs(node)) != 1:
            raise _MismatchError(node, "stands between attention and its output projection")
    raise _MismatchError(context, "no output projection follows")


def _residual_add(linear: Linear, stream: gs.Tensor) -> gs.Node:
    """The Add that joins a linear's result with the residual stream."""
    for node in downstream(linear.output, _BRANCH_OPS):
        operands = data_inputs(node)
        if node.op in _JOINS and len(operands) == 2:
            if any(item is stream or skip_rotation(item) is stream for item in operands):
                return node
            raise _MismatchError(node, f"does not add {stream.name!r}, the input of the norm")
        if node.op not in _BRANCH_OPS:
            raise _MismatchError(node, f"stands between {linear.name} and the residual add")
    raise _MismatchError(linear.matmul, f"no residual add follows {linear.name}")


def _mlp_after(middle: gs.Variable, prefix: str) -> tuple[gs.Node, Mlp, gs.Node]:
    """Norm, MLP and residual add that follow the attention's residual add."""
    adds = [node for node in consumers(middle) if node.op in _JOINS and len(data_inputs(node)) == 2]
    if len(adds) != 1:
        raise _MismatchError(producer(middle), "is not followed by an MLP with a residual add")
    (branch,) = [item for item in data_inputs(adds[0]) if item is not middle] or [middle]
    fc2_node = _only_linear(skip_back(branch, _BRANCH_OPS), adds[0])
    fc2 = _as_linear(fc2_node, f"{prefix}.fc2")
    fc1_nodes = _linears_before_activation(fc2.input)
    sources = {id(skip_back(node.inputs[0])) for node in fc1_nodes}
    if not fc1_nodes or len(sources) != 1 or len(fc1_nodes) > 2:
        raise _MismatchError(fc2_node, "is not behind an activation and one or two linears")
    norm2 = _norm_behind(skip_back(fc1_nodes[0].inputs[0]), fc1_nodes[0])
    if norm2.inputs[0] is not middle:
        raise _MismatchError(norm2, f"does not read {middle.name!r}")
    names = ("fc1",) if len(fc1_nodes) == 1 else ("gate", "up")
    fc1 = tuple(
        _as_linear(node, f"{prefix}.{name}") for node, name in zip(fc1_nodes, names, strict=True)
    )
    return norm2, Mlp(fc1, _activation(fc1, fc2), fc2), adds[0]


def _only_linear(tensor: gs.Tensor, at: gs.Node) -> gs.Node:
    node = producer(tensor)
    if node is None or not is_linear(node):
        raise _MismatchError(at, "adds something that is not the output of a linear")
    return node


def _linears_before_activation(tensor: gs.Tensor) -> list[gs.Node]:
    """The linears nearest upstream of fc2's input, whatever stands between, gate first."""

    def follow(node: gs.Node) -> list[gs.Tensor]:
        return [] if is_linear(node) else data_inputs(node)

    found, gates = [], set[int]()
    for node in upstream(tensor, follow):
        if is_linear(node):
            found.append(node)
        elif node.op in {"MatMul", "Softmax", "Conv"} and not rotates(node):
            raise _MismatchError(node, "stands inside the MLP")
        elif node.op == "Sigmoid":
            gates.update(id(linear) for linear in linears_behind(node.inputs[0]))
    return sorted(found, key=lambda node: id(node) not in gates)


def _activation(fc1: Sequence[Linear], fc2: Linear) -> str:
    if len(fc1) == 2:
        return "swiglu"
    name = identify_activation(fc1[0].output, skip_rotation(skip_affine(fc2.input)))
    if name is not None:
        return name
    # One packed linear that is split into gate and value has twice fc2's inputs.
    packed = fc1[0].weight_shape[1] == 2 * fc2.weight_shape[0]
    return "swiglu" if packed else "unknown"


def _check_chain(blocks: Sequence[Block]) -> None:
    for block, following in pairwise(blocks):
        if not _leads_to(block.output, following.input):
            raise _MismatchError(
                producer(following.input),
                f"stands between the end of block {block.index} and block {following.index}",
            )


def _leads_to(output: gs.Tensor, following: gs.Tensor) -> bool:
    """Whether nothing but a register pass's own nodes stand between two blocks."""

    def follow(node: gs.Node) -> list[gs.Tensor]:
        return list(node.inputs) if of_registers(node.name) else []

    maker = producer(output)
    return output is following or any(
        node is maker for node in upstream(following, follow) if not of_registers(node.name)
    )


def _heads(attention: Attention) -> tuple[int, int]:
    shape = attention.value.shape
    if attention.scores is attention.context and (shape is None or len(shape) == 3):
        heads = int(attention.scores.attrs.get("kv_num_heads", 0))
        width = shape[-1] if shape else None
        if heads and isinstance(width, int):
            return heads, width // heads
    if shape and len(shape) == 4 and isinstance(shape[1], int) and isinstance(shape[3], int):
        return shape[1], shape[3]
    if shape and len(shape) == 3 and isinstance(shape[2], int):  # [B * heads, T, head_dim]
        return attention.out.weight_shape[0] // shape[2], shape[2]
    raise _MismatchError(attention.context, f"the shape of its values, {shape}, is not static")
