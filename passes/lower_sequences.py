"""Write lists of tensors without lists: Slice, Gather and Concat, which every runtime reads."""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_graphsurgeon as gs

from regcache.passes.base import Edit, Exact, Log, Parity, Skip
from regcache.passes.walk import is_constant, name_of, producer
from regcache.passes.write_nodes import NodeWriter

# A list of more is none that a model would hold.
_LONGEST = 1 << 16
_READERS = frozenset({"ConcatFromSequence", "SequenceAt", "SequenceLength"})


@dataclass(frozen=True)
class LowerSequences:
    """Replace what reads a list that SplitToSequence or SequenceConstruct made.

    Exporters write `unbind`, `chunk` and `stack` like this. Matched: SequenceAt with a constant
    index, ConcatFromSequence with and without a new axis, SequenceLength. Refused: an index, or
    sizes of a split, that are computed, and a split of an unknown size where its end matters.
    """

    name: ClassVar[str] = "lower_sequences"
    parity: ClassVar[Parity] = Exact()

    def requires(self, graph: gs.Graph) -> None:
        """Nothing: a graph without lists is left alone."""

    def rewrite(self, graph: gs.Graph) -> Log:
        """Write what a reader gets of a list; the list falls to the clean-up."""
        edits, skips = [], []
        for node in [node for node in graph.nodes if node.op in _READERS]:
            maker, site = producer(node.inputs[0]), name_of(node)
            parts = None if maker is None else _parts(maker)
            if parts is None or not _known(node, len(parts)):
                skips.append(Skip(site, "its list is not known"))
                continue
            _read(NodeWriter(graph, f"{node.outputs[0].name}/listed"), node, parts)
            edits.append(Edit(site, f"{node.op} of {len(parts)}"))
        return Log(tuple(edits), tuple(skips))

    def ensures(self, before: gs.Graph, after: gs.Graph) -> None:
        """Fewer nodes read lists."""
        counts = [sum(node.op in _READERS for node in graph.nodes) for graph in (before, after)]
        assert counts[1] < counts[0]


def _known(node: gs.Node, length: int) -> bool:
    """Whether a node reads items that a list of this length has."""
    if node.op != "SequenceAt":
        return True
    index = node.inputs[1]
    return is_constant(index) and -length <= int(index.values.item()) < length


@dataclass(frozen=True)
class _Part:
    """An item of a list: a tensor, or places [start, end) of one of its axes.

    `single`: whether that is one place, whose axis is dropped.
    """

    tensor: gs.Tensor
    axis: int = 0
    start: int = 0
    end: int | None = None
    single: bool = False

    def write(self, write: NodeWriter, name: str, output: gs.Variable | None) -> gs.Tensor:
        """The item as a tensor; `output` where one is given."""
        if self.single:
            place = write.constant(f"{name}/place", np.array(self.start, np.int64))
            return write.node("Gather", name, [self.tensor, place], output, axis=self.axis)
        if self.end is not None:
            ends = [(self.start, "start"), (self.end, "end"), (self.axis, "axis")]
            bounds = [write.ints(f"{name}/{what}", place) for place, what in ends]
            return write.node("Slice", name, [self.tensor, *bounds], output)
        return (
            self.tensor if output is None else write.node("Identity", name, [self.tensor], output)
        )


def _parts(maker: gs.Node) -> list[_Part] | None:
    """The items of a list; None where they are not known."""
    if maker.op == "SequenceConstruct":
        return [_Part(tensor) for tensor in maker.inputs]
    if maker.op != "SplitToSequence":
        return None
    source, axis = maker.inputs[0], int(maker.attrs.get("axis", 0))
    size = source.shape[axis] if source.shape else None
    given = len(maker.inputs) > 1 and not maker.inputs[1].is_empty()
    if not isinstance(size, int) or size > _LONGEST:
        return None
    if given and (not is_constant(maker.inputs[1]) or np.min(maker.inputs[1].values) < 1):
        return None
    if not given:
        single = maker.attrs.get("keepdims", 1) == 0
        return [_Part(source, axis, place, place + 1, single) for place in range(size)]
    split = maker.inputs[1].values
    lengths = [int(split)] * -(-size // int(split)) if split.ndim == 0 else split.tolist()
    ends = np.minimum(np.cumsum(lengths), size).tolist()
    return [_Part(source, axis, start, end) for start, end in zip([0, *ends], ends, strict=False)]


def _read(write: NodeWriter, node: gs.Node, parts: list[_Part]) -> None:
    """Write what a node reads of a list, as what the node made."""
    result = node.outputs[0]
    if node.op == "SequenceAt":
        parts[int(node.inputs[1].values.item())].write(write, "item", result)
        return
    if node.op == "SequenceLength":
        count = write.constant("count", np.array(len(parts), np.int64))
        write.node("Identity", "length", [count], result)
        return
    axis = int(node.attrs["axis"])
    items = [part.write(write, f"item_{place}", None) for place, part in enumerate(parts)]
    if node.attrs.get("new_axis", 0):
        new = write.ints("new", axis)
        items = [
            write.node("Unsqueeze", f"wide_{place}", [item, new])
            for place, item in enumerate(items)
        ]
    write.node("Concat", "concat", items, result, axis=axis)
