"""Put a model's nodes into the order that ONNX asks for: producers before their readers."""

from collections.abc import Iterator

import onnx

from regcache.passes.errors import InputError
from regcache.passes.message_graphs import subgraphs


def sort_nodes(graph: onnx.GraphProto) -> None:
    """Sort the nodes of a graph and of its subgraphs in place, keeping what order is free.

    Some converters (ONNX Runtime's to float16, for one) append nodes at the end. Nodes of
    subgraphs count as readers of what they take from outside. Raises InputError, naming a tensor,
    when nodes read each other in a circle or two of them write the same tensor.
    """
    for node in graph.node:
        for inner in subgraphs(node):
            sort_nodes(inner)
    makers: dict[str, int] = {}
    for number, node in enumerate(graph.node):
        for name in filter(None, node.output):
            if name in makers:
                raise InputError(f"the tensor {name!r} is written by two nodes")
            makers[name] = number
    needs = [{makers[name] for name in _reads(node) if name in makers} for node in graph.node]
    if all(need < number for number, group in enumerate(needs) for need in group):
        return
    order = _order(needs)
    if len(order) < len(needs):
        placed = set(order)
        stuck = next(n for n in range(len(needs)) if n not in placed)
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
    for graph in subgraphs(node):
        own = {item.name for item in graph.input} | {item.name for item in graph.initializer}
        own |= {name for inner in graph.node for name in inner.output}
        found = [name for inner in graph.node for name in _reads(inner)]
        yield from (name for name in found if name not in own)
        yield from (item.name for item in graph.output if item.name not in own)
