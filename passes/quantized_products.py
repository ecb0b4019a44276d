"""Count the products of quantized weights that a file asks for."""

from pathlib import Path

import onnx


def quantized_products(path: Path) -> int:
    """How many activations a quantized weight is multiplied with, each counted once.

    Linears that read the same activation, q, k and v, may become one product. Weights are not read.
    """
    graph = onnx.load(path, load_external_data=False).graph
    makers = {output: node for node in graph.node for output in node.output}
    stored = {item.name for item in graph.initializer}

    def dequantized(name: str) -> str | None:
        maker = makers.get(name)
        reads = maker is not None and maker.op_type == "DequantizeLinear"
        return maker.input[0] if maker is not None and reads else None

    found = set()
    for node in graph.node:
        if node.op_type == "MatMul":
            activation, weight = map(dequantized, node.input)
            if activation is not None and weight in stored:
                found.add(activation)
    return len(found)
