"""Put a model's nodes into the order that ONNX asks for: producers before their readers."""

from collections.abc import Iterator

import onnx

from regcache.passes.errors import InputError


def sort_nodes(graph: onnx.GraphProto) -> None:
    """Sort the nodes of a graph in place, keeping their order wherever it is free.

    Some converters (ONNX Runtime's to float16, for one) append nodes at the end. Nodes of
    subgraphs count as readers of what they take from outside. Raises InputError, naming a tensor,
    when nodes read each other in a circle or two of them write the same tensor.
    """
    makers: dict[str, int] = {}
    for number, node in enumerate(graph.node):
        for name in filter(None, node.output):
            if name in makers:
                raise InputError(f"the tensor {name!r} is written by two nodes")
            makers[name] = number
    needs = [
        {makers[name] for name in _reads(node) if name in makers} - {number}
        for number, node in enumerate(graph.node)
    ]
    if all(need < number for number, group in enumerate(needs) for need in group):
        return
    order = _order(needs)
    if len(order) < len(needs):
        stuck = next(n for n in range(len(needs)) if n not in set(order))
        name = next(iter(graph.node[stuck].output), graph.node[stuck].name)
        raise InputError(f"the nodes around {name!r} read each other in a circle")
    nodes = [onnx.NodeProto.FromString(graph.node[n].SerializeToString()) for n in order]
    del graph.node[:]
    graph.node.extend(nodes)


def _order(needs: list[set[int]]) -> list[int]:
    """Numbers so that each comes after those it needs; shorter where there is a circle."""
    placed, order = [False] * len(needs), []
    for start in range(len(needs)):
        stack = [(start, iter(sorted(needs[start])))]
        open_now = {start}
        while stack and not placed[start]:
            number, waiting = stack[-1]
            following = next((n for n in waiting if not placed[n]), None)
            if following is None:
                placed[number] = True
                order.append(number)
                open_now.discard(number)
                stack.pop()
            elif following in open_now:
                return order
            else:
                open_now.add(following)
                stack.append((following, iter(sorted(needs[following]))))
    return order


def _reads(node: onnx.NodeProto) -> Iterator[str]:
    """Names that a node reads, those that its subgraphs take from outside included."""
    yield from node.input
    for attribute in node.attribute:
        for graph in (*([attribute.g] if attribute.HasField("g") else ()), *attribute.graphs):
            for inner in graph.node:
                yield from _reads(inner)
            yield from (item.name for item in graph.output)
