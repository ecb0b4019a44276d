"""What makes an activation, as far as a division of its channels can go into it."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import onnx_graphsurgeon as gs
from numpy.typing import NDArray

from regcache.passes.encoder import EncoderView, Linear, Role, Site
from regcache.passes.marks import of_registers
from regcache.passes.split_qkv import packed_thirds
from regcache.passes.walk import (
    NORMS,
    SHAPE_OPS,
    consumers,
    data_inputs,
    is_bias,
    is_constant,
    is_output,
    keeps_channels,
    producer,
)

Floats = NDArray[np.float32]

# Behind these the last axis is another one, or only a part of it.
_OTHER_CHANNELS = frozenset({"Gather", "Slice", "Split", "Transpose", "Flatten"})


class FactorSource(Protocol):
    """What computes a site's activation, and can divide its channels.

    `where`: where the division goes, in a log's words. `free`: whether it adds no node.
    `activation`: the tensor that the site's linears read once it is divided.
    """

    where: str
    free: bool
    activation: gs.Variable

    def divide(self, graph: gs.Graph, factors: Floats) -> None:
        """Make the activation [..., K] divided by `factors` [K]."""


def refusal(view: EncoderView, site: Site) -> str | None:
    """Why an activation cannot be changed together with the linears that read it; None: it can."""
    if any(linear.quantized for linear in site.linears):
        return "quantized already"
    readers = {id(linear.matmul) for linear in site.linears}
    if any(id(node) not in readers for node in site.tensor.outputs):
        return "its activation is read elsewhere"
    if is_output(view.graph, site.tensor):
        return "its activation is an output of the graph"
    return None


def find_source(view: EncoderView, site: Site) -> FactorSource:
    """What makes a site's activation; an explicit Mul where nothing else can take the factors."""
    norm = norm_behind(view.graph, site)
    if norm is not None:
        return _Norm(site.tensor, norm)
    product = producer(site.tensor)
    if product is not None and _factors_of(product, site) is not None:
        return _Factors(site.tensor, product)
    for block in view.blocks:
        if site.linears[0] is block.attention.out:
            value = value_behind(view, site)
            return value or _Explicit(site.tensor, site.name)
        if site.linears[0] is block.mlp.fc2 and len(block.mlp.fc1) == 2:
            up = block.mlp.fc1[1]
            gated = product is not None and up.output in product.inputs and product.op == "Mul"
            if gated and _divisible(view.graph, up):
                return Columns(site.tensor, up, slice(None), (), "folded into the up projection")
    return _Explicit(site.tensor, site.name)


@dataclass
class _Norm:
    """A norm with a weight [K] (ONNX LayerNormalization, RMSNormalization)."""

    activation: gs.Variable
    norm: gs.Node
    where: str = "folded into the norm"
    free: bool = True

    def divide(self, graph: gs.Graph, factors: Floats) -> None:
        for slot, constant in enumerate(self.norm.inputs[1:], start=1):
            if not constant.is_empty():
                self.norm.inputs[slot] = _divided(constant, factors, f"{self.norm.name}/{slot}")


@dataclass
class _Factors:
    """A Mul by one constant per channel [K], as this pass leaves behind."""

    activation: gs.Variable
    product: gs.Node
    where: str = "folded into the factors before it"
    free: bool = True

    def divide(self, graph: gs.Graph, factors: Floats) -> None:
        slot = next(slot for slot, item in enumerate(self.product.inputs) if is_constant(item))
        self.product.inputs[slot] = _divided(
            self.product.inputs[slot], factors, f"{self.product.name}/{slot}"
        )


@dataclass
class Columns:
    """A linear whose `columns` are the channels, and registers that join it on the way."""

    activation: gs.Variable
    linear: Linear
    columns: slice
    registers: tuple[tuple[gs.Node, int], ...]
    where: str = "folded into the value projection"
    free: bool = True

    def divide(self, graph: gs.Graph, factors: Floats) -> None:
        weight, bias = self.linear.matmul.inputs[1], _bias(self.linear)
        whole = np.ones(weight.values.shape[1], np.float32)
        whole[self.columns] = factors
        self.linear.matmul.inputs[1] = _divided(weight, whole, f"{self.linear.name}/weight")
        if bias is not None and self.linear.bias_add is not None:
            add = self.linear.bias_add
            add.inputs[add.inputs.index(bias)] = _divided(bias, whole, f"{self.linear.name}/bias")
        self.change_registers(np.divide, factors)

    def change_registers(self, change: Callable[[Floats, Floats], Floats], vector: Floats) -> None:
        """Let registers in V [..., heads, R, head_dim] be `change` of them and a vector [K]."""
        for node, slot in self.registers:
            old = node.inputs[slot]
            # Channels are head by head.
            by_head = vector.reshape(old.values.shape[1], 1, -1)
            new = np.asarray(change(old.values, by_head), np.float32)
            node.inputs[slot] = gs.Constant(f"{old.name}/changed", new)


@dataclass
class _Explicit:
    """A Mul of its own."""

    tensor: gs.Variable
    site: str
    where: str = "a Mul of its own"
    free: bool = False

    def __post_init__(self) -> None:
        name = f"{self.tensor.name}/equalized"
        self.activation = gs.Variable(name, dtype=np.float32, shape=self.tensor.shape)

    def divide(self, graph: gs.Graph, factors: Floats) -> None:
        factor = gs.Constant(f"{self.tensor.name}/factors", np.asarray(1 / factors, np.float32))
        name = f"equalize/{self.site}"
        graph.nodes.append(gs.Node("Mul", name, {}, [self.tensor, factor], [self.activation]))


def norm_behind(graph: gs.Graph, site: Site) -> gs.Node | None:
    """The norm that makes the activation and nothing else; None where there is none."""
    channels, tensor = site.linears[0].weight_shape[0], site.tensor
    node = producer(tensor)
    while node is not None and (node.op in SHAPE_OPS - _OTHER_CHANNELS or keeps_channels(node)):
        tensor = node.inputs[0]
        if not _read_once(graph, tensor):
            return None
        node = producer(tensor)
    if node is None or node.op not in NORMS or not all(map(is_constant, _given(node.inputs[1:]))):
        return None
    return node if _is_vector(node.inputs[1], channels) else None


def _factors_of(product: gs.Node, site: Site) -> gs.Constant | None:
    """The constant [K] that a Mul applies to the activation's channels."""
    if product.op != "Mul" or len(data_inputs(product)) != 1:
        return None
    channels = site.linears[0].weight_shape[0]
    return next((item for item in product.inputs if _is_vector(item, channels)), None)


def _divisible(graph: gs.Graph, linear: Linear) -> bool:
    """Whether a linear's columns can be divided without another reader noticing."""
    if linear.quantized or not (linear.bias_add is None or _bias(linear) is not None):
        return False
    return all(_read_once(graph, item) for item in (linear.matmul.outputs[0], linear.output))


def value_behind(view: EncoderView, site: Site) -> Columns | None:
    """The value projection whose output reaches an output projection's site unmixed."""
    (attention,) = (
        block.attention for block in view.blocks if block.attention.out is site.linears[0]
    )
    graph = view.graph
    channels, heads = attention.out.weight_shape[0], view.heads
    context = attention.context.outputs[0]
    if channels != heads * view.head_dim or not _moved(graph, attention.out.input, context):
        return None
    found = _through_registers(attention.value)
    if found is None or not _read_once(graph, attention.value):
        return None
    tensor, registers = found
    for linear in attention.projections:
        if not _divisible(graph, linear):
            continue
        if linear.role is Role.V and linear.weight_shape[1] == channels:
            if _moved(graph, tensor, linear.output):
                return Columns(attention.out.input, linear, slice(None), registers)
        elif linear.role is Role.QKV:
            thirds = packed_thirds(linear)
            if thirds is not None and _moved(graph, tensor, thirds[2]):
                last = slice(2 * channels, 3 * channels)
                return Columns(attention.out.input, linear, last, registers)
    return None


def _through_registers(
    value: gs.Tensor,
) -> tuple[gs.Tensor, tuple[tuple[gs.Node, int], ...]] | None:
    """The values without spliced registers, and where the registers' constants are read."""
    node = producer(value)
    if node is None or not of_registers(node.name) or node.op != "Concat":
        return value, ()
    registers, values = node.inputs
    if is_constant(registers):
        place = (node, 0)
    else:
        maker = producer(registers)
        while maker is not None and maker.op == "Reshape":  # heads merged with the batch
            maker = producer(maker.inputs[0])
        if maker is None or maker.op != "Expand" or not is_constant(maker.inputs[0]):
            return None
        place = (maker, 0)
    if len(place[0].inputs[0].shape) != 4 or place[0].inputs[0].shape[1] == 1:
        return None  # rank 3, or one head: not head by head
    return values, (place,)


def _moved(graph: gs.Graph, tensor: gs.Tensor, start: gs.Tensor) -> bool:
    """Whether the tensor is `start` moved about, its channels in their order, for no other reader.

    The last axis must stay the last: else channels are read dim by dim instead of head by head.
    """
    while tensor is not start:
        node = producer(tensor)
        if node is None or node.op not in SHAPE_OPS or not _read_once(graph, node.inputs[0]):
            return False
        if (
            node.op == "Transpose"
            and node.attrs.get("perm", [0])[-1] != len(node.inputs[0].shape) - 1
        ):
            return False
        tensor = node.inputs[0]
    return True


def _read_once(graph: gs.Graph, tensor: gs.Tensor) -> bool:
    return len(consumers(tensor)) == 1 and not is_output(graph, tensor)


def _bias(linear: Linear) -> gs.Constant | None:
    """The constant [N] that a linear adds."""
    if linear.bias_add is None:
        return None
    width = linear.weight_shape[1]
    biases = filter(is_bias, linear.bias_add.inputs)
    return next((item for item in biases if item.values.size == width), None)


def _is_vector(tensor: gs.Tensor, length: int) -> bool:
    return is_constant(tensor) and tensor.values.shape == (length,)


def _given(tensors: list[gs.Tensor]) -> list[gs.Tensor]:
    return [tensor for tensor in tensors if not tensor.is_empty()]


def _divided(constant: gs.Constant, factors: Floats, name: str) -> gs.Constant:
    values = np.asarray(constant.values / factors, np.float32)
    return gs.Constant(f"{name}/divided", values)
