"""The encoder view: transformer blocks found in a graph by pattern, not by node names.

A block is pre-norm: x + attention(norm(x)), then x + mlp(norm(x)). Attention is found as a softmax
between two matmuls of run-time tensors (or one Attention node), everything else by walking from
there along the data until it meets the residual adds.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from functools import cached_property
from typing import TypeVar

import numpy as np
import onnx_graphsurgeon as gs
from numpy.typing import NDArray

from regcache.passes.walk import is_constant, stored_weight, upstream

T = TypeVar("T")


class Role(StrEnum):
    """What a linear does in its block; a projection may make several of q, k and v."""

    Q = "q"
    K = "k"
    V = "v"
    QK = "qk"
    QV = "qv"
    KV = "kv"
    QKV = "qkv"
    OUT = "out"
    GATE = "gate"
    UP = "up"
    FC1 = "fc1"
    FC2 = "fc2"


@dataclass(frozen=True, eq=False)
class Linear:
    """A fully connected layer: MatMul with a constant weight and, mostly, an Add for the bias.

    `name`: "blocks.3.fc1" where it belongs to a block; only then has it a `block` and a `role`.
    """

    name: str
    matmul: gs.Node
    bias_add: gs.Node | None

    @property
    def block(self) -> int:
        """The number of the linear's block, from 0."""
        return int(self.name.split(".")[1])

    @property
    def role(self) -> Role:
        """What the linear does in its block."""
        return Role(self.name.rpartition(".")[2])

    @property
    def input(self) -> gs.Variable:
        """The activation [..., K]."""
        return self.matmul.inputs[0]

    @property
    def output(self) -> gs.Variable:
        """The result [..., N], after the bias."""
        return (self.bias_add or self.matmul).outputs[0]

    @property
    def weight_shape(self) -> tuple[int, int]:
        """(K, N)."""
        stored = stored_weight(self.matmul)
        assert stored is not None
        rows, columns = stored.shape
        return int(rows), int(columns)

    @property
    def work(self) -> int:
        """Multiply-accumulates for one token."""
        rows, columns = self.weight_shape
        return rows * columns

    @property
    def bias(self) -> NDArray[np.float32]:
        """The constant bias of each column, float32 [N]; zeros where there is none."""
        columns = self.weight_shape[1]
        if self.bias_add is None:
            return np.zeros(columns, np.float32)
        (values,) = (item.values for item in self.bias_add.inputs if is_constant(item))
        return np.broadcast_to(values.reshape(-1), columns).astype(np.float32)

    def replace_bias(self, constant: gs.Constant) -> None:
        """Let the Add behind the product, which there has to be, add another constant."""
        assert self.bias_add is not None, f"{self.name} has no bias"
        slot = next(slot for slot, item in enumerate(self.bias_add.inputs) if is_constant(item))
        self.bias_add.inputs[slot] = constant

    @property
    def quantized(self) -> bool:
        """Whether the weight stands behind a DequantizeLinear already."""
        return not is_constant(self.matmul.inputs[1])

    @property
    def weight(self) -> NDArray[np.float32]:
        """The float weight [K, N], shared with the graph: never write into it."""
        assert not self.quantized, f"{self.name} is quantized"
        values: NDArray[np.float32] = self.matmul.inputs[1].values
        return values


@dataclass(frozen=True, eq=False)
class Attention:
    """Self-attention. `projections` are the distinct linears that make q, k and v (1 to 3).

    `scores` is the matmul q k^T, `softmax` normalises it, `context` is the matmul with v; all three
    are the same node where the graph holds ONNX's Attention operator.
    """

    projections: tuple[Linear, ...]
    scores: gs.Node
    softmax: gs.Node
    context: gs.Node
    out: Linear

    @property
    def query(self) -> gs.Variable:
        """Left operand of the scores, [B, heads, T, head_dim] in the matmul form."""
        return self.scores.inputs[0]

    @property
    def key(self) -> gs.Variable:
        """Right operand of the scores, [B, heads, head_dim, T] in the matmul form."""
        return self.scores.inputs[1]

    @property
    def value(self) -> gs.Variable:
        """What the probabilities weigh, [B, heads, T, head_dim] in the matmul form."""
        return self.context.inputs[2 if self.context is self.scores else 1]


@dataclass(frozen=True, eq=False)
class Mlp:
    """Feed-forward layer. `fc1` has one linear, or two where gate and value are apart (SwiGLU).

    `activation` is one of regcache.passes.scalar_function.ACTIVATIONS, "swiglu", or "unknown".
    """

    fc1: tuple[Linear, ...]
    activation: str
    fc2: Linear


@dataclass(frozen=True, eq=False)
class Block:
    """A pre-norm transformer block and the residual stream [B, T, width] around it.

    `input` is the stream before, `middle` between attention and MLP, `output` after the block.
    """

    index: int
    input: gs.Variable
    norm1: gs.Node
    attention: Attention
    middle: gs.Variable
    norm2: gs.Node
    mlp: Mlp
    output: gs.Variable

    @property
    def linears(self) -> tuple[Linear, ...]:
        """All linears of the block in the order in which data meets them."""
        return (*self.attention.projections, self.attention.out, *self.mlp.fc1, self.mlp.fc2)


@dataclass(frozen=True, eq=False)
class Site:
    """One activation tensor [..., K] that feeds one or more linears, and so shares a scale."""

    tensor: gs.Variable
    linears: tuple[Linear, ...]

    @property
    def block(self) -> int:
        """The number of the linears' block, from 0."""
        return self.linears[0].block

    @property
    def role(self) -> Role:
        """The role of the first linear; the input of an fc2 or out linear has no other readers."""
        return self.linears[0].role

    @property
    def work(self) -> int:
        """Multiply-accumulates of all its linears for one token."""
        return sum(linear.work for linear in self.linears)

    @property
    def weight(self) -> NDArray[np.float32]:
        """The linears' float weights side by side [K, N]: never write into it."""
        weights = [linear.weight for linear in self.linears]
        return np.concatenate(weights, axis=1) if len(weights) > 1 else weights[0]

    @property
    def name(self) -> str:
        """Named after the linears it feeds: "blocks.3.q+k+v", "blocks.3.fc2".

        Passes may rename the tensor, or put another into its place; this name stays.
        """
        first, *others = (linear.name for linear in self.linears)
        return "+".join((first, *(name.rpartition(".")[2] for name in others)))


def by_tensor(sites: Iterable[Site], values: Mapping[str, T]) -> dict[str, T]:
    """Values of sites, which go by the site's name, by the name of its tensor, as passes take them.

    In the order of the sites; those without a value are left out.
    """
    return {site.tensor.name: values[site.name] for site in sites if site.name in values}


@dataclass(frozen=True, eq=False)
class EncoderView:
    """The blocks of a vision encoder, with `heads`, `head_dim` and `width` of the first."""

    graph: gs.Graph
    blocks: tuple[Block, ...]
    heads: int
    head_dim: int

    @property
    def width(self) -> int:
        """Channels of the residual stream."""
        return int(self.blocks[0].mlp.fc2.weight_shape[1])

    @property
    def linears(self) -> tuple[Linear, ...]:
        """The linears of all blocks, in order."""
        return tuple(linear for block in self.blocks for linear in block.linears)

    @property
    def linear_shapes(self) -> list[tuple[str, tuple[int, int]]]:
        """Name and (K, N) of every linear, in order; most passes keep them."""
        return [(linear.name, linear.weight_shape) for linear in self.linears]

    @cached_property
    def sites(self) -> tuple[Site, ...]:
        """The activations that feed the blocks' linears, in order, each tensor once."""
        readers: dict[str, list[Linear]] = {}
        for linear in self.linears:
            readers.setdefault(linear.input.name, []).append(linear)
        return tuple(Site(group[0].input, tuple(group)) for group in readers.values())

    @property
    def tokens(self) -> int | None:
        """Length of the sequence; None where the graph does not fix it."""
        shape = self.blocks[0].input.shape
        return shape[1] if shape and len(shape) == 3 and isinstance(shape[1], int) else None

    @property
    def patch_grid(self) -> tuple[int, ...] | None:
        """Height and width, in patches, of the patch convolution's output; None without one."""
        for node in upstream(self.blocks[0].input, lambda node: node.inputs):
            shape = node.outputs[0].shape
            if node.op == "Conv" and shape and all(isinstance(dim, int) for dim in shape[2:]):
                return tuple(shape[2:])
        return None

    @property
    def patches(self) -> int | None:
        """Patch tokens made by the patch convolution; None when there is no such convolution."""
        grid = self.patch_grid
        return None if grid is None else math.prod(grid)

    @property
    def prefix_tokens(self) -> int | None:
        """Class and register tokens that stand before the patches."""
        if self.tokens is None or self.patches is None:
            return None
        return self.tokens - self.patches
