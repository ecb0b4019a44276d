"""Take registers out of a graph again: what is left computes exactly what it did before."""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_graphsurgeon as gs

from regcache.passes.base import Edit, Log, Lossy, Parity
from regcache.passes.errors import InputError
from regcache.passes.marks import KEYS_AND_VALUES, MOVED, TOKENS
from regcache.passes.walk import is_constant, replace_everywhere


@dataclass(frozen=True)
class StripRegisters:
    """Undo splice_registers and splice_register_tokens, wherever they were applied.

    Matched: the Concat nodes in front of keys and values; the Concat, Slice and lengthened rotary
    tables of register tokens. The batch expansions fall to the clean-up. Deleted sinks are no
    registers and stay. Refused with InputError: register nodes whose neighbours were rewritten
    since, so that it is not clear what they replaced.
    """

    name: ClassVar[str] = "strip_registers"
    parity: ClassVar[Parity] = Lossy()

    def requires(self, graph: gs.Graph) -> None:
        """No hidden units that MoveHidden has moved; a graph without registers is left alone."""
        if any(node.name.startswith(MOVED) for node in graph.nodes):
            raise InputError("registers: hidden units that were moved are not put back")

    def rewrite(self, graph: gs.Graph) -> Log:
        """Rewire around the nodes that the splices added."""
        edits = []
        for node in list(graph.nodes):
            if node.op == "Concat" and node.name.startswith(KEYS_AND_VALUES):
                _bypass(graph, node, kept=1)
                edits.append(Edit(node.name, "registers removed"))
        concat = _named(graph, f"{TOKENS}concat")
        end = _named(graph, f"{TOKENS}slice")
        if concat is not None and end is not None:
            _shorten(graph, count=-int(end.inputs[2].values[0]))
            _bypass(graph, concat, kept=0)
            _bypass(graph, end, kept=0)
            edits.append(Edit(concat.name, "register tokens removed"))
        elif concat is not None or end is not None:
            raise InputError("registers: half of the token registers' nodes are missing")
        return Log(tuple(edits))

    def ensures(self, before: gs.Graph, after: gs.Graph) -> None:
        """No register node is left."""
        spliced = (KEYS_AND_VALUES, TOKENS)
        left = [node.name for node in after.nodes if node.name.startswith(spliced)]
        assert not left, left


def _named(graph: gs.Graph, name: str) -> gs.Node | None:
    return next((node for node in graph.nodes if node.name == name), None)


def _bypass(graph: gs.Graph, node: gs.Node, kept: int) -> None:
    if len(node.inputs) <= kept:
        raise InputError(f"registers: {node.op} {node.name!r} is not as it was spliced in")
    replace_everywhere(graph, node.outputs[0], node.inputs[kept])


def _shorten(graph: gs.Graph, count: int) -> None:
    """Give splits and rotary tables that were lengthened for tokens their old length."""
    for node in graph.nodes:
        for slot, item in enumerate(node.inputs):
            if not is_constant(item) or not item.name.startswith(TOKENS):
                continue
            name = item.name.removeprefix(TOKENS)
            if name.endswith("/sizes"):
                *first, last = item.values.tolist()
                sizes = np.array([*first, last - count], dtype=np.int64)
                node.inputs[slot] = gs.Constant(name, sizes)
            elif name.endswith("/table"):
                node.inputs[slot] = gs.Constant(name, item.values[..., :-count, :])
