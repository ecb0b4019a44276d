"""Find what the queries, keys and values of a packed projection become, however they are parted."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import onnx_graphsurgeon as gs
from numpy.typing import NDArray

from regcache.passes.axis_factors import Factor, Layout, LostTrackError, moved
from regcache.passes.encoder import Attention, Linear
from regcache.passes.walk import HEAD_OPS, consumers, data_inputs, is_output, name_of, upstream


@dataclass(frozen=True)
class Part:
    """A tensor that holds the queries, keys or values of every head and token, and nothing else.

    `layout`: what its axes are of the projection's output [B, T, N], or [T, B, N]. `head_dim`: how
    many channels a head has.
    """

    tensor: gs.Variable
    layout: Layout
    head_dim: int

    @property
    def channels(self) -> list[Factor]:
        """The channels as (heads, channels of a head), or as one where they are not apart."""
        factors = self.layout.channel_factors
        turned = len(factors) == 2 and factors[1].size != self.head_dim
        return factors[::-1] if turned else factors

    @property
    def heads(self) -> tuple[int, int] | None:
        """(heads, head_dim); None where the channels of all heads are one axis."""
        channels = self.channels
        return (channels[0].size, channels[1].size) if len(channels) == 2 else None

    @property
    def columns(self) -> NDArray[np.int64]:
        """The column of the projection that each channel is, head by head."""
        columns = np.array([self.layout.start], np.int64)
        for factor in self.channels:
            steps = np.arange(factor.size) * factor.stride
            columns = (columns[:, None] + steps).ravel()
        return columns


def find_parts(
    graph: gs.Graph, attention: Attention, packed: Linear, head_dim: int
) -> dict[str, Part]:
    """The parts of a packed projection, by their letters.

    Raises LostTrackError, naming the reason, where one cannot be told from the others.
    """
    letters = packed.name.rpartition(".")[2]
    share, rest = divmod(packed.weight_shape[1], len(letters))
    if rest or packed.output.shape is None:
        raise LostTrackError("its columns are no equal parts")
    parts = _parted(graph, packed, share, head_dim)
    operands = {"q": attention.query, "k": attention.key, "v": attention.value}
    found = {}
    for letter in letters:
        behind = _behind(operands[letter])
        own = [part for part in parts if id(part.tensor) in behind]
        if len(own) != 1:
            raise LostTrackError("its parts cannot be told apart")
        found[letter] = own[0]
    columns = np.concatenate([part.columns for part in found.values()])
    if len(parts) != len(letters) or not np.array_equal(np.sort(columns), np.arange(len(columns))):
        raise LostTrackError("its parts are not its columns, each once")
    return found


def _parted(graph: gs.Graph, packed: Linear, share: int, head_dim: int) -> list[Part]:
    """The last tensors that hold `share` channels of a projection and are only moved about."""
    found, waiting = [], [(packed.output, Layout.of(packed.output.shape))]
    while waiting:
        tensor, layout = waiting.pop()
        if is_output(graph, tensor) or is_output(graph, packed.matmul.outputs[0]):
            raise LostTrackError("it is an output of the graph")
        if layout.count == share:
            further = _further(consumers(tensor), layout, share, head_dim)
            if further is None:
                found.append(Part(tensor, layout, head_dim))
            else:
                waiting.append(further)
            continue
        for node in consumers(tensor):
            layouts = moved(node, layout)
            if layouts is None:
                raise LostTrackError(f"{node.op} {name_of(node)!r} reads several of its parts")
            if any(one.count < share for one in layouts):
                raise LostTrackError(f"{node.op} {name_of(node)!r} takes less than a part")
            pairs = zip(node.outputs, layouts, strict=True)
            waiting += [(output, one) for output, one in pairs if output.outputs]
    return found


def _further(
    nodes: Sequence[gs.Node], layout: Layout, share: int, head_dim: int
) -> tuple[gs.Variable, Layout] | None:
    """What the only reader of a part moves it to; None where there are others, or it does more."""
    if len(nodes) != 1 or len(nodes[0].outputs) != 1 or _is_in_order(layout, head_dim):
        return None
    try:
        layouts = moved(nodes[0], layout)
    except LostTrackError:
        return None
    if layouts is None or layouts[0].count != share or not _is_by_head(layouts[0], head_dim):
        return None
    return nodes[0].outputs[0], layouts[0]


def _is_in_order(layout: Layout, head_dim: int) -> bool:
    """Whether a part is [B, heads, T, head_dim]."""
    single = len(layout.axes) == 4 and all(len(axis) == 1 for axis in layout.axes)
    ours = [axis[0].source == layout.channels for axis in layout.axes] if single else []
    return ours == [False, True, False, True] and layout.axes[3][0].size == head_dim


def _is_by_head(layout: Layout, head_dim: int) -> bool:
    """Whether the channels are one axis, or one of heads and one of those of a head."""
    sizes = [factor.size for factor in layout.channel_factors]
    return len(sizes) == 1 or (len(sizes) == 2 and head_dim in sizes)


def _behind(operand: gs.Tensor) -> set[int]:
    """The ids of the tensors that an operand of attention is computed from, head by head."""

    def follow(node: gs.Node) -> list[gs.Tensor]:
        return data_inputs(node) if node.op in HEAD_OPS else []

    nodes = upstream(operand, follow)
    return {id(operand), *(id(item) for node in nodes for item in follow(node))}
