"""An ONNX file as a network of TensorRT's or TensorRT-RTX's, whose Python APIs are alike.

`trt` is the library's module and `product` its name with the version, for messages.
"""

import gc
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import onnx
from google.protobuf.message import DecodeError

from regcache.passes.errors import InputError
from regcache.runtime.engine_layers import is_layer_list

Shapes = tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]
"""The least, the tuned and the largest shape of an input."""

# What the parser says of an operator that it does not know, or knows and does not support.
_UNSUPPORTED = ("false", "Plugin not found")
# TensorRT keeps the first logger of a process; each of ours still gets what its builder says.
_OTHER_LOGGER = "differs from one already registered"
# A mere warning of the parser, and another model: 200 would be read as -56.
_UINT8_AS_INT8 = "Defaulting to INT8"


class RefusedGraphError(InputError):
    """A graph that the parser or the builder does not take, named with the node where known."""


@contextmanager
def no_collection() -> Iterator[None]:
    """Hold off the cyclic garbage collector.

    The logger runs under a lock of TensorRT's that the destructor of an older builder waits for:
    a collection inside the logger would wait for itself.
    """
    enabled = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def collecting_logger(trt: Any) -> Any:
    """A logger that prints nothing and keeps `errors`, `warnings` and the list of `layers`.

    `node`: what is being parsed, which the warnings then begin with.
    """

    class CollectingLogger(trt.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.errors: list[str] = []
            self.warnings: list[str] = []
            self.layers = ""
            self.node = ""

        def log(self, severity: Any, message: str) -> None:
            if severity in {self.ERROR, self.INTERNAL_ERROR}:
                self.errors.append(message)
            elif severity == self.WARNING and _OTHER_LOGGER not in message:
                self.warnings.append(f"{self.node}{_tidy(message)}")
            elif match := re.fullmatch(r"Parsing node: (.*) \[(\w+)\]", message):
                self.node = f"{match[2]} {match[1]!r}: "
            elif is_layer_list(message):
                self.layers = message

    return CollectingLogger()


def check_batch_sizes(opt_batch: int, max_batch: int) -> tuple[int, int, int]:
    """(1, `opt_batch`, `max_batch`). Raises InputError where they are out of order."""
    if not 1 <= opt_batch <= max_batch:
        raise InputError(f"batch sizes: 1 <= {opt_batch} (tuned) <= {max_batch} (largest) is false")
    return 1, opt_batch, max_batch


def parse_network(
    trt: Any, builder: Any, log: Any, model: Path, product: str, *, batch: int | None = None
) -> Any:
    """Read an ONNX file into a new network, strongly typed.

    `batch`: the batch size for good, where the file leaves it open; None leaves it open, too.

    Raises InputError where the file cannot be read, and RefusedGraphError with the node that the
    parser refuses, or that it would read as something else.
    """
    _check_readable(model)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, log)
    if batch is None:
        parsed = parser.parse_from_file(str(model))
    else:
        parsed = parser.parse(_with_batch(model, batch), str(model))
    log.node = ""
    if parser.num_errors:
        raise RefusedGraphError(f"{model}: {_refusal(parser.get_error(0), log, product)}")
    # The parser takes bytes that are no ONNX for a graph without nodes.
    if not parsed or not network.num_outputs:
        raise RefusedGraphError(f"{model}: not an ONNX file, or truncated")
    for warning in log.warnings:
        if _UINT8_AS_INT8 in warning:
            node, name = warning.partition(": ")[0], product.partition(" ")[0]
            raise RefusedGraphError(f"{model}: {node}: {name} reads uint8 as int8; use int8")
    _let_attention_decompose(trt, network)
    return network


def input_shapes(
    network: Any, sizes: tuple[int, int, int], model: Path
) -> tuple[dict[str, Shapes], tuple[int, int, int]]:
    """The range of every input's shape, and the batch sizes it allows.

    Raises InputError for an input with another dynamic dimension than the batch.
    """
    shapes: dict[str, Shapes] = {}
    for index in range(network.num_inputs):
        tensor = network.get_input(index)
        first, *rest = tuple(tensor.shape) or (1,)
        if any(side < 0 for side in rest):
            shape = ", ".join("?" if side < 0 else str(side) for side in (first, *rest))
            raise InputError(
                f"{model}: input {tensor.name!r} [{shape}]: only the batch may be dynamic"
            )
        if first >= 0:
            sizes = (first, first, first)
        least, tuned, largest = ((size, *rest) for size in sizes)
        shapes[tensor.name] = (least, tuned, largest)
    return shapes, sizes


def refused_by_builder(model: Path, log: Any, product: str) -> RefusedGraphError:
    """The error of a builder that returned no engine, with the reason that it logged."""
    reason = _tidy(log.errors[0]) if log.errors else "no engine, and no reason given"
    return RefusedGraphError(f"{model}: {product} cannot build it: {reason}")


def _with_batch(model: Path, batch: int) -> bytes:
    """The file's message with a batch size; as it is where it is no ONNX, which the parser says.

    Not by the network's inputs: TensorRT-RTX 1.7 then takes no scales of blocks any more.
    """
    try:
        message = onnx.load(model, load_external_data=False)
    except DecodeError:
        return model.read_bytes()
    for item in message.graph.input:
        dims = item.type.tensor_type.shape.dim
        if dims and not dims[0].HasField("dim_value"):
            dims[0].dim_value = batch
    return bytes(message.SerializeToString())


def _check_readable(model: Path) -> None:
    try:
        with model.open("rb"):
            pass
    except OSError as error:
        raise InputError(f"{model}: {error.strerror or error}") from error


def _refusal(error: Any, log: Any, product: str) -> str:
    """One line: the operator, the node and what the parser has against it."""
    if error.code().name == "MODEL_DESERIALIZE_FAILED":
        return "not an ONNX file, or truncated"
    reason = _tidy(error.desc())
    if error.node() < 0:  # of the file, not of a node: the log begins with the cause
        return f"{product}: {_tidy(log.errors[0]) if log.errors else reason}"
    node = repr(error.node_name()) if error.node_name() else f"number {error.node()}"
    if any(sign in reason for sign in _UNSUPPORTED):
        return f"{error.node_operator()} {node}: {product} has no such operator"
    return f"{error.node_operator()} {node}: {product}: {reason}"


def _let_attention_decompose(trt: Any, network: Any) -> None:
    """Allow ONNX's Attention without a kernel of its own, as in FP32, which is refused else.

    Where there is a kernel, it is taken all the same.
    """
    for index in range(network.num_layers):
        layer = network.get_layer(index)
        if layer.type == trt.LayerType.ATTENTION_INPUT:
            layer.__class__ = trt.IAttentionInputLayer  # TensorRT's way to downcast in Python
            layer.attention.decomposable = True


def _tidy(message: str) -> str:
    """A message of TensorRT on one line, without its own source files and codes."""
    text = " ".join(message.split())
    text = re.sub(r"^\w+\.(cpp|hpp|h):\d+: ", "", text)
    text = re.sub(r"^[\w:]+: Error Code \d+: [\w ]+ \((.*)\)$", r"\1", text)
    text = re.sub(r" In [\w():<>~]+ at /\S+", "", text)
    text = re.sub(
        r"^(\[[\w.]+:\d+: \w+\]|\w+Exception: [\w.]+:\d+: CHECK\(.*?\) failed\.) ", "", text
    )
    text = re.sub(r"^Assertion failed: .*?: ", "", text)
    return re.sub(r" Please set k.*", "", text).rstrip(" .")
