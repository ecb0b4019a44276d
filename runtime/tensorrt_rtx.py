"""TensorRT-RTX engines, built ahead of time from ONNX files on a machine without a GPU.

Polygraphy's loaders cannot name the GPUs to build for, and without names the builder asks the
machine's own GPU; so this talks to TensorRT-RTX's Python API. An engine runs on a GPU only.
"""

import gc
import re
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from regcache.passes.errors import InputError, MissingExtraError
from regcache.runtime.engine_layers import EngineLayer, is_layer_list, parse_layers

COMPUTE_CAPABILITIES = ("8.6", "8.9", "12.0")
"""GeForce RTX 30 and A-series, RTX 40, RTX 50: what an engine is built for unless told."""

# What the parser says of an operator that it does not know, or knows and does not support.
_UNSUPPORTED = ("false", "Plugin not found")
# TensorRT keeps the first logger of a process; each of ours still gets what its builder says.
_OTHER_LOGGER = "differs from one already registered"
# A mere warning of the parser, and another model: 200 would be read as -56.
_UINT8_AS_INT8 = "Defaulting to INT8"


@dataclass(frozen=True)
class EngineBuild:
    """A serialized engine and how it came about.

    `version`: of TensorRT-RTX, which must be the same where the engine is loaded.
    `batch`: the least, the tuned and the largest batch size; all the same where the graph fixes it.
    `layers`: the kernels with their number formats, as the builder listed them.
    `warnings`: what the builder warned of, one line each. `seconds`: parsing and building.
    """

    engine: bytes
    version: str
    compute_capabilities: tuple[str, ...]
    batch: tuple[int, int, int]
    layers: tuple[EngineLayer, ...]
    warnings: tuple[str, ...]
    seconds: float


@contextmanager
def _no_collection() -> Iterator[None]:
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


@_no_collection()
def build_engine(
    model: Path,
    *,
    compute_capabilities: Sequence[str] = COMPUTE_CAPABILITIES,
    max_batch: int = 8,
    opt_batch: int = 1,
) -> EngineBuild:
    """Build an engine from an ONNX file: strongly typed, for batch sizes 1 to `max_batch`.

    `compute_capabilities`: of the GPUs to build for, as "8.6"; one engine holds them all.
    `opt_batch`: the batch size that the kernels are tuned for. Nothing is written, and nothing
    printed, except that a crash inside the builder leaves its own line on standard error.

    Raises MissingExtraError without TensorRT-RTX; InputError on a compute capability that it does
    not build for, batch sizes out of order, a file that cannot be read, a node that the parser or
    the builder refuses (naming it), or an input with another dynamic dimension than the batch.
    """
    trt = _import_tensorrt()
    targets = _compute_capabilities(trt, compute_capabilities)
    if not 1 <= opt_batch <= max_batch:
        raise InputError(f"batch sizes: 1 <= {opt_batch} (tuned) <= {max_batch} (largest) is false")
    _check_readable(model)
    started = time.perf_counter()
    log = _collecting_logger(trt)
    builder = trt.Builder(log)
    strong = 1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED)
    network = builder.create_network(strong)
    _parse(trt, network, log, model)
    _let_attention_decompose(trt, network)
    config = builder.create_builder_config()
    config.num_compute_capabilities = len(targets)
    for index, target in enumerate(targets.values()):
        config.set_compute_capability(target, index)
    # Without it the builder lists no layers; it adds nothing to the engine's size.
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
    profile, batch = _profile(builder, network, (1, opt_batch, max_batch), model)
    config.add_optimization_profile(profile)
    serialized = builder.build_serialized_network(network, config)
    if serialized is None:
        reason = _tidy(log.errors[0]) if log.errors else "no engine, and no reason given"
        raise InputError(f"{model}: TensorRT-RTX {trt.__version__} cannot build it: {reason}")
    return EngineBuild(
        engine=bytes(serialized),
        version=trt.__version__,
        compute_capabilities=tuple(targets),
        batch=batch,
        layers=parse_layers(log.layers),
        warnings=tuple(log.warnings),
        seconds=time.perf_counter() - started,
    )


@_no_collection()
def supported_compute_capabilities() -> tuple[str, ...]:
    """The compute capabilities that the installed TensorRT-RTX builds for, as "8.6".

    Raises MissingExtraError without TensorRT-RTX.
    """
    return tuple(_known_capabilities(_import_tensorrt()))


def _import_tensorrt() -> Any:
    try:
        import tensorrt_rtx
    except ImportError as error:
        raise MissingExtraError(
            "building TensorRT-RTX engines", extra="trt-rtx", module="tensorrt_rtx"
        ) from error
    return tensorrt_rtx


def _collecting_logger(trt: Any) -> Any:
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


def _known_capabilities(trt: Any) -> dict[str, Any]:
    """TensorRT's targets by compute capability: SM86 as "8.6"."""
    names = trt.ComputeCapability.__members__
    matches = {name: re.fullmatch(r"SM(\d+)(\d)", name) for name in names}
    return {f"{match[1]}.{match[2]}": names[name] for name, match in matches.items() if match}


def _compute_capabilities(trt: Any, wanted: Sequence[str]) -> dict[str, Any]:
    known = _known_capabilities(trt)
    if isinstance(wanted, str) or not wanted:
        raise InputError(f"compute capabilities: needs a list such as 8.6,8.9, not {wanted!r}")
    for name in wanted:
        if name not in known:
            raise InputError(
                f"compute capability {name!r}: TensorRT-RTX {trt.__version__} builds for "
                f"{', '.join(known)}"
            )
    return {name: known[name] for name in wanted}


def _check_readable(model: Path) -> None:
    try:
        with model.open("rb"):
            pass
    except OSError as error:
        raise InputError(f"{model}: {error.strerror or error}") from error


def _parse(trt: Any, network: Any, log: Any, model: Path) -> None:
    """Read the file into the network, or raise InputError with the node that was refused."""
    parser = trt.OnnxParser(network, log)
    parsed = parser.parse_from_file(str(model))
    log.node = ""
    if parser.num_errors:
        raise InputError(f"{model}: {_refusal(parser.get_error(0), log, trt.__version__)}")
    # The parser takes bytes that are no ONNX for a graph without nodes.
    if not parsed or not network.num_outputs:
        raise InputError(f"{model}: not an ONNX file, or truncated")
    for warning in log.warnings:
        if _UINT8_AS_INT8 in warning:
            node = warning.partition(": ")[0]
            raise InputError(f"{model}: {node}: TensorRT-RTX reads uint8 as int8; use int8")


def _refusal(error: Any, log: Any, version: str) -> str:
    """One line: the operator, the node and what the parser has against it."""
    if error.code().name == "MODEL_DESERIALIZE_FAILED":
        return "not an ONNX file, or truncated"
    reason = _tidy(error.desc())
    if error.node() < 0:  # of the file, not of a node: the log begins with the cause
        return f"TensorRT-RTX {version}: {_tidy(log.errors[0]) if log.errors else reason}"
    node = repr(error.node_name()) if error.node_name() else f"number {error.node()}"
    if any(sign in reason for sign in _UNSUPPORTED):
        return f"{error.node_operator()} {node}: TensorRT-RTX {version} has no such operator"
    return f"{error.node_operator()} {node}: TensorRT-RTX {version}: {reason}"


def _let_attention_decompose(trt: Any, network: Any) -> None:
    """Allow ONNX's Attention without a kernel of its own, as in FP32, which is refused else.

    Where there is a kernel, it is taken all the same.
    """
    for index in range(network.num_layers):
        layer = network.get_layer(index)
        if layer.type == trt.LayerType.ATTENTION_INPUT:
            layer.__class__ = trt.IAttentionInputLayer  # TensorRT's way to downcast in Python
            layer.attention.decomposable = True


def _profile(
    builder: Any, network: Any, sizes: tuple[int, int, int], model: Path
) -> tuple[Any, tuple[int, int, int]]:
    """The range of every input's shape, and the batch sizes it allows."""
    profile = builder.create_optimization_profile()
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
        profile.set_shape(tensor.name, *((size, *rest) for size in sizes))
    return profile, sizes


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
