"""TensorRT-RTX engines, built ahead of time from ONNX files on a machine without a GPU.

Through TensorRT-RTX's own Python API: Polygraphy chooses between TensorRT and TensorRT-RTX once a
process, by an environment variable, and writes the builder's list of layers to its log.
There is no timing cache: TensorRT-RTX times nothing while it builds. An engine runs on a GPU only.
"""

import re
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from regcache.passes.errors import InputError, MissingExtraError
from regcache.runtime.engine_build import EngineBuild
from regcache.runtime.engine_cost import Kernel, kernels_of
from regcache.runtime.engine_layers import parse_layers
from regcache.runtime.tensorrt_network import (
    check_batch_sizes,
    collecting_logger,
    input_shapes,
    no_collection,
    parse_network,
    refused_by_builder,
)

COMPUTE_CAPABILITIES = ("8.6", "8.9", "12.0")
"""GeForce RTX 30 and A-series, RTX 40, RTX 50: what an engine is built for unless told."""

FLOAT8_SINCE = "8.9"
"""The least compute capability that multiplies FP8; TensorRT-RTX builds no such engine below."""

BLOCKS_SINCE = "10.0"
"""The least compute capability that multiplies floats with a scale for each block of channels."""


@no_collection()
def build_engine(
    model: Path,
    *,
    compute_capabilities: Sequence[str] = COMPUTE_CAPABILITIES,
    max_batch: int = 8,
    opt_batch: int = 1,
) -> EngineBuild:
    """Build an engine from an ONNX file: strongly typed, for batch sizes 1 to `max_batch`.

    `compute_capabilities`: of the GPUs to build for, as "8.6"; one engine holds them all. A graph
    with FP8 needs those since FLOAT8_SINCE, one with block-scaled floats those since BLOCKS_SINCE.
    `opt_batch`: the batch size that the kernels are tuned for. Nothing is written, and nothing
    printed, except that a crash inside the builder leaves its own line on standard error.

    Raises MissingExtraError without TensorRT-RTX; InputError on a compute capability that it does
    not build for, batch sizes out of order, a file that cannot be read or an input with another
    dynamic dimension than the batch; and RefusedGraphError, an InputError, with the node that the
    parser or the builder refuses.
    """
    trt = _import_tensorrt()
    targets = _compute_capabilities(trt, compute_capabilities)
    sizes = check_batch_sizes(opt_batch, max_batch)
    started = time.perf_counter()
    built = _build(trt, model, targets, sizes)
    return EngineBuild(
        engine=built.engine,
        version=trt.__version__,
        compute_capabilities=tuple(targets),
        batch=built.batch,
        layers=parse_layers(built.log.layers),
        warnings=tuple(built.log.warnings),
        seconds=time.perf_counter() - started,
    )


@no_collection()
def kernels_at(model: Path, compute_capabilities: Sequence[str], batch: int) -> tuple[Kernel, ...]:
    """The kernels of an ONNX file's engine with the batch fixed, as the builder lists them.

    Only then are all shapes in the list. The engine is thrown away. Raises as `build_engine`.
    """
    trt = _import_tensorrt()
    targets = _compute_capabilities(trt, compute_capabilities)
    built = _build(trt, model, targets, (batch, batch, batch), fixed=True)
    return kernels_of(parse_layers(built.log.layers), built.batch[1])


@no_collection()
def supported_compute_capabilities() -> tuple[str, ...]:
    """The compute capabilities that the installed TensorRT-RTX builds for, as "8.6", ascending.

    Raises MissingExtraError without TensorRT-RTX.
    """
    return tuple(_known_capabilities(_import_tensorrt()))


def capabilities_since(least: str, names: Sequence[str]) -> tuple[str, ...]:
    """Those of some compute capabilities that are not below `least`, in the same order."""
    return tuple(name for name in names if _number(name) >= _number(least))


def library_version() -> str:
    """The version of the installed TensorRT-RTX. Raises MissingExtraError where there is none."""
    return str(_import_tensorrt().__version__)


@dataclass(frozen=True)
class _Built:
    engine: bytes
    batch: tuple[int, int, int]
    log: Any


def _build(
    trt: Any, model: Path, targets: dict[str, Any], sizes: tuple[int, int, int], fixed: bool = False
) -> _Built:
    """Build for some batch sizes; `fixed`: for the tuned one alone, written into the network."""
    product = f"TensorRT-RTX {trt.__version__}"
    log = collecting_logger(trt)
    builder = trt.Builder(log)
    network = parse_network(trt, builder, log, model, product, batch=sizes[1] if fixed else None)
    config = builder.create_builder_config()
    config.num_compute_capabilities = len(targets)
    for index, target in enumerate(targets.values()):
        config.set_compute_capability(target, index)
    # Without it the builder lists no layers; it adds nothing to the engine's size.
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
    shapes, batch = input_shapes(network, sizes, model)
    profile = builder.create_optimization_profile()
    for name, limits in shapes.items():
        profile.set_shape(name, *limits)
    config.add_optimization_profile(profile)
    serialized = builder.build_serialized_network(network, config)
    if serialized is None:
        raise refused_by_builder(model, log, product)
    return _Built(bytes(serialized), batch, log)


def _number(name: str) -> tuple[int, ...]:
    return tuple(int(part) for part in name.split("."))


def _import_tensorrt() -> Any:
    try:
        import tensorrt_rtx
    except ImportError as error:
        raise MissingExtraError(
            "building TensorRT-RTX engines", extra="trt-rtx", module="tensorrt_rtx"
        ) from error
    return tensorrt_rtx


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
