"""Copy a graph: what gs.Graph.copy does in a quarter of its time, as every pass begins with one."""

from typing import Any, TypeVar

import onnx_graphsurgeon as gs

from regcache.passes.walk import tensors_of

T = TypeVar("T", gs.Tensor, gs.Node)
# Lists that keep the other end of their edges up to date; graphsurgeon does not export the class.
_Edges = type(gs.Node("Identity").inputs)


def copy_graph(graph: gs.Graph) -> gs.Graph:
    """A graph of nodes and tensors of its own; weights and attributes' values are shared.

    Tensors of one name become one tensor. A graph with graphs inside (If, Loop, Scan) is left to
    graphsurgeon, which copies every tensor twice and every edge through two properties.
    """
    if any(isinstance(value, gs.Graph) for node in graph.nodes for value in node.attrs.values()):
        return graph.copy()
    tensors = {name: _without_edges(tensor) for name, tensor in tensors_of(graph).items()}
    nodes = []
    for node in graph.nodes:
        new = _without_edges(node)
        new.attrs = node.attrs.copy()
        for item in node.inputs:
            tensor = tensors.get(item.name) or gs.Variable.empty()
            list.append(new.inputs, tensor)
            list.append(tensor.outputs, new)
        for item in node.outputs:
            tensor = tensors.get(item.name) or gs.Variable.empty()
            list.append(new.outputs, tensor)
            list.append(tensor.inputs, new)
        nodes.append(new)
    copied = gs.Graph(
        inputs=[tensors[item.name] for item in graph.inputs],
        outputs=[tensors[item.name] for item in graph.outputs],
        name=graph.name,
        doc_string=graph.doc_string,
        opset=graph.opset,
        import_domains=graph.import_domains and [*graph.import_domains],  # exports append to it
        functions=list(graph.functions),
        ir_version=graph.ir_version,
    )
    copied.nodes = nodes  # only now: the class's constructor looks for graphs inside each
    return copied


def _without_edges(item: T) -> T:
    new: T = object.__new__(type(item))
    # Not through its properties: they would clear lists that are the original's.
    fields = new.__dict__
    fields.update(item.__dict__)
    fields["inputs"] = _edges(new, "outputs")
    fields["outputs"] = _edges(new, "inputs")
    if "data_location" in fields:
        fields["data_location"] = None  # of the file that it was read from
    return new


def _edges(owner: gs.Tensor | gs.Node, other_end: str) -> Any:
    """No edges yet; without the class's own constructor, which takes half of a copy's time."""
    edges: Any = list.__new__(_Edges)
    edges.parent_obj, edges.field_name = owner, other_end
    return edges
