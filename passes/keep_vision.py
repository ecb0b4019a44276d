"""Keep what an encoder computes from the image alone: the vision tower of a whole CLIP, say."""

from dataclasses import dataclass
from typing import ClassVar

import onnx_graphsurgeon as gs

from regcache.passes.base import Edit, Exact, Log, Parity
from regcache.passes.errors import InputError
from regcache.passes.walk import read_tensors


@dataclass(frozen=True)
class KeepVision:
    """Drop the outputs that need more than the image, and the inputs that are then left unread.

    An output that is the image itself is dropped too. `image`: the name of the image input.
    Refused: a graph without an output of the image alone.
    """

    image: str
    name: ClassVar[str] = "keep_vision"
    parity: ClassVar[Parity] = Exact()

    def requires(self, graph: gs.Graph) -> None:
        """At least one output that depends on the image and on no other input."""
        others = other_inputs(graph, self.image)
        made = {item.name for item in graph.outputs if item.inputs}
        if not any(needs == {self.image} for name, needs in others.items() if name in made):
            found = "; ".join(
                f"{name} needs {', '.join(sorted(needs)) or 'no input at all'}"
                for name, needs in others.items()
            )
            raise InputError(f"no output depends on the image {self.image!r} alone: {found}")

    def rewrite(self, graph: gs.Graph) -> Log:
        """Shorten the lists of outputs and inputs; nodes left over fall to the clean-up."""
        needs = other_inputs(graph, self.image)
        kept = [item for item in graph.outputs if item.inputs and needs[item.name] == {self.image}]
        dropped = [item.name for item in graph.outputs if not any(item is one for one in kept)]
        unread = [item.name for item in graph.inputs if item.name != self.image]
        graph.outputs = kept
        graph.inputs = [item for item in graph.inputs if item.name == self.image]
        edits = [Edit(name, "output dropped") for name in dropped]
        return Log(tuple(edits + [Edit(name, "input dropped") for name in unread]))

    def ensures(self, before: gs.Graph, after: gs.Graph) -> None:
        """One input, and outputs that were there before, in the same order."""
        assert [item.name for item in after.inputs] == [self.image]
        names = [item.name for item in after.outputs]
        assert names == [item.name for item in before.outputs if item.name in names]


def other_inputs(graph: gs.Graph, image: str) -> dict[str, set[str]]:
    """Which graph inputs every output depends on, by the output's name."""
    names = {id(item): item.name for item in graph.inputs}
    known: dict[int, frozenset[str]] = {key: frozenset([name]) for key, name in names.items()}
    for node in graph.nodes:  # sorted
        found: frozenset[str] = frozenset()
        for item in read_tensors(node):
            found |= known.get(id(item), frozenset())
        for item in node.outputs:
            known[id(item)] = found
    return {item.name: set(known.get(id(item), frozenset())) for item in graph.outputs}
