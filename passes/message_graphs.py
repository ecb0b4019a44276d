"""Walking through an ONNX message: the nodes of its subgraphs, and every text in it."""

from collections.abc import Iterator
from typing import Any

import onnx
from google.protobuf.message import Message


def subgraphs(node: onnx.NodeProto) -> Iterator[onnx.GraphProto]:
    """The graphs among a node's attributes."""
    for attribute in node.attribute:
        if attribute.HasField("g"):
            yield attribute.g
        yield from attribute.graphs


def all_nodes(graph: onnx.GraphProto) -> Iterator[onnx.NodeProto]:
    """The nodes of a graph and of its subgraphs."""
    for node in graph.node:
        yield node
        for inner in subgraphs(node):
            yield from all_nodes(inner)


def texts_are_valid(message: Message) -> bool:
    """Whether every text in a message is UTF-8; protobuf gives others out as bytes, or raises."""
    if isinstance(message, onnx.TensorProto):
        return isinstance(message.name, str)  # not its numbers: reading them copies them
    for field, value in message.ListFields():
        items: Any = (value,) if isinstance(value, str | bytes | Message) else value
        if field.type == field.TYPE_STRING and not all(isinstance(item, str) for item in items):
            return False
        if field.type == field.TYPE_MESSAGE and not all(map(texts_are_valid, items)):
            return False
    return True
