"""Which operations ONNX Runtime's CPU provider makes of a model."""

import os
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path

import onnx
import onnxruntime as ort

from regcache.passes.errors import InputError, first_line
from regcache.passes.temporary import temporary_folder
from regcache.runtime.device import LOG_NOTHING
from regcache.runtime.session import OrtSession, available_cpus

# What ONNX Runtime 1.32 makes of a linear between Q/DQ pairs, depending on what is around it.
_INTEGER_MATMULS = (
    "MatMulIntegerToFloat",  # MatMul
    "QLinearMatMul",  # MatMul with a quantized output
    "QGemm",  # Gemm with an int32 bias; with a float bias it stays a float Gemm
    "DynamicQuantizeMatMul",  # scales measured at run time
    "MatMulInteger",  # as written
)
_SMALL_BYTES = 1024


def optimised_ops(model: Path | bytes, *, threads: int | None = None) -> dict[str, int]:
    """How many nodes of each op type the graph has as this machine runs it, commonest first.

    `model`: an ONNX file or its bytes; `threads` defaults to the CPUs this process may use.
    Op types come without their domain; nodes inside the branches of If and Loop count too.

    ONNX Runtime writes the weights to a file beside the graph, as a model of more than 2 GB needs:
    large models cost the time to load them, and room for a copy in the temporary folder meanwhile.
    Raises InputError when the model cannot be loaded, as OrtSession does, or written.
    """
    name = "the model in memory" if isinstance(model, bytes) else str(model)
    source = model if isinstance(model, bytes) else os.fspath(model)
    with temporary_folder() as folder:
        path = folder / "optimised.onnx"
        try:
            ort.InferenceSession(
                source, _options(path, threads), providers=["CPUExecutionProvider"]
            )
        except Exception as error:  # ONNX Runtime's exceptions share no other base
            # A model that cannot be loaded fails here again, with its reason.
            with OrtSession(model, threads=threads):
                raise InputError(
                    f"{name}: its optimised form cannot be written to {folder}: {first_line(error)}"
                ) from error
        graph = onnx.load(path, load_external_data=False).graph
    return dict(Counter(node.op_type for node in _nodes(graph)).most_common())


def integer_matmuls(ops: Mapping[str, int]) -> int:
    """How many of the nodes that `optimised_ops` counted multiply integer matrices.

    MatMulNBits, which linears with quantized weights alone become, is not among them: its input
    and output are float, and what it computes with depends on the CPU.
    """
    return sum(ops.get(op, 0) for op in _INTEGER_MATMULS)


def _options(path: Path, threads: int | None) -> ort.SessionOptions:
    options = ort.SessionOptions()
    options.log_severity_level = LOG_NOTHING
    options.intra_op_num_threads = threads or available_cpus()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_ALL
    options.optimized_model_filepath = str(path)
    # Weights outside the graph: a protobuf holds 2 GB at most, and the graph alone loads fast.
    for key, value in (("file_name", "weights"), ("min_size_in_bytes", str(_SMALL_BYTES))):
        options.add_session_config_entry(
            f"session.optimized_model_external_initializers_{key}", value
        )
    return options


def _nodes(graph: onnx.GraphProto) -> Iterator[onnx.NodeProto]:
    """The nodes of a graph and of its subgraphs."""
    for node in graph.node:
        yield node
        for attribute in node.attribute:
            for inner in (attribute.g, *attribute.graphs):
                yield from _nodes(inner)
