"""Turn a decomposed GELU back into one Gelu node (ONNX Gelu, opset 20)."""

from dataclasses import dataclass
from typing import ClassVar

import onnx_graphsurgeon as gs

from regcache.passes.base import Close, Edit, Log, Parity, Skip
from regcache.passes.errors import InputError
from regcache.passes.scalar_function import identify_activation
from regcache.passes.walk import consumers, count_ops, is_constant, name_of, producer

_ELEMENTWISE = frozenset(["Add", "Sub", "Mul", "Div", "Pow", "Neg"])
_LONGEST_TAIL = 4


@dataclass(frozen=True)
class FuseGelu:
    """Replace Erf and Tanh spellings of GELU by a Gelu node.

    Matched: any elementwise arrangement around one Erf or Tanh node that computes
    0.5 x (1 + erf(x / sqrt 2)) or its tanh approximation; what it computes is evaluated, not its
    spelling. Refused: a Tanh or Erf that is part of something else (a pooler's tanh, say).
    """

    name: ClassVar[str] = "fuse_gelu"
    parity: ClassVar[Parity] = Close(rtol=1e-4, atol=1e-5)

    def requires(self, graph: gs.Graph) -> None:
        """Opset 20, which introduced Gelu."""
        if graph.opset < 20:
            raise InputError(f"fuse_gelu needs opset 20 or later, the graph has {graph.opset}")

    def rewrite(self, graph: gs.Graph) -> Log:
        """Insert the Gelu nodes; the old ones fall to the clean-up."""
        edits, skips = [], []
        for node in [node for node in graph.nodes if node.op in {"Erf", "Tanh"}]:
            match = _match(node)
            if match is None:
                skips.append(Skip(name_of(node), f"{node.op} is not part of a GELU"))
                continue
            source, output, approximate = match
            output.inputs.clear()
            graph.nodes.append(
                gs.Node(
                    "Gelu",
                    name=f"{name_of(node)}/gelu",
                    attrs={"approximate": approximate},
                    inputs=[source],
                    outputs=[output],
                )
            )
            edits.append(Edit(name_of(node), f"Gelu(approximate={approximate})"))
        return Log(tuple(edits), tuple(skips))

    def ensures(self, before: gs.Graph, after: gs.Graph) -> None:
        """As many Gelu nodes more as Erf and Tanh nodes less."""
        assert count_ops(after, "Gelu") - count_ops(before, "Gelu") == sum(
            count_ops(before, op) - count_ops(after, op) for op in ("Erf", "Tanh")
        )


def _match(node: gs.Node) -> tuple[gs.Tensor, gs.Tensor, str] | None:
    """(input, output, approximate) of the GELU around an Erf or Tanh node."""
    wanted, approximate = ("gelu", "none") if node.op == "Erf" else ("gelu_tanh", "tanh")
    output = node.outputs[0]
    for _ in range(_LONGEST_TAIL):
        following = consumers(output)
        if len(following) != 1 or following[0].op not in _ELEMENTWISE:
            return None
        output = following[0].outputs[0]
        for source in _sources(node.inputs[0]):
            if identify_activation(source, output) == wanted:
                return source, output, approximate
    return None


def _sources(tensor: gs.Tensor) -> list[gs.Tensor]:
    """Tensors upstream of `tensor` that the GELU's input may be, nearest first."""
    found = [tensor]
    for _ in range(_LONGEST_TAIL):
        node = producer(found[-1])
        if node is None or node.op not in _ELEMENTWISE:
            break
        data = [item for item in node.inputs if not is_constant(item)]
        if not data:
            break
        # In x + 0.044715 x^3 both operands lead to x; x itself is the one not computed from x.
        found.append(data[0])
    return found
