"""Shared by the functions that write ONNX Runtime's fused operators as ONNX's own."""

import onnx_graphsurgeon as gs

from regcache.passes.walk import is_output


class CannotUnfuseError(Exception):
    """Why a fused operator has no equal among ONNX's own."""


def given(node: gs.Node, slot: int) -> gs.Tensor | None:
    """An optional input; None where it is left out."""
    present = slot < len(node.inputs) and not node.inputs[slot].is_empty()
    return node.inputs[slot] if present else None


def used_output(graph: gs.Graph, node: gs.Node, slot: int) -> gs.Variable | None:
    """An optional output; None where nothing reads it."""
    if slot >= len(node.outputs) or node.outputs[slot].is_empty():
        return None
    output = node.outputs[slot]
    return output if output.outputs or is_output(graph, output) else None


def refuse_inputs(node: gs.Node, **slots: int) -> None:
    """Raise CannotUnfuseError where one of the named inputs is given."""
    for name, slot in slots.items():
        if given(node, slot) is not None:
            raise CannotUnfuseError(f"it has the input {name}")


def refuse_outputs(graph: gs.Graph, node: gs.Node, **slots: int) -> None:
    """Raise CannotUnfuseError where one of the named outputs is read."""
    for name, slot in slots.items():
        if used_output(graph, node, slot) is not None:
            raise CannotUnfuseError(f"its output {name} is read")


def refuse_attributes(node: gs.Node, *names: str) -> None:
    """Raise CannotUnfuseError where one of the named attributes is set to anything but 0."""
    for name in names:
        if node.attrs.get(name, 0):
            raise CannotUnfuseError(f"{name} is {node.attrs[name]}")
