"""Build a graph with the real compiler, TensorRT-RTX, which needs no GPU for it."""

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

import onnx_graphsurgeon as gs
import pytest

from regcache.passes.errors import InputError
from regcache.passes.onnx_file import save_graph
from regcache.runtime.engine_build import EngineBuild
from regcache.runtime.engine_layers import products_by_precision
from regcache.runtime.tensorrt_rtx import COMPUTE_CAPABILITIES, build_engine
from regcache.runtime.trt_runner import cuda_errors

_MISSING = importlib.util.find_spec("tensorrt_rtx") is None
_REASON = 'NOT BUILT, TensorRT-RTX is missing: pip install "regcache[trt-rtx]"'

needs_tensorrt = pytest.mark.skipif(_MISSING, reason=_REASON)


def assert_builds(
    graph: gs.Graph, capabilities: Sequence[str] = COMPUTE_CAPABILITIES
) -> EngineBuild:
    """Build one engine for all default GPUs, or those named, batches 1 to 8, without a warning.

    Skips the test where TensorRT-RTX is missing, so call it last.
    """
    if _MISSING:
        pytest.skip(_REASON)
    with TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        save_graph(graph, path)
        built = build_engine(path, compute_capabilities=capabilities)
    assert built.compute_capabilities == tuple(capabilities)
    assert built.batch == (1, 1, 8)
    assert not built.warnings
    assert built.layers
    return built


def int8_products(built: EngineBuild) -> int:
    """How many matrix products of an engine compute in INT8."""
    return products_by_precision(built.layers).get("INT8", 0)


def has_gpu() -> bool:
    from polygraphy import cuda

    try:
        with cuda_errors("probe"):
            cuda.Stream().free()
    except (InputError, OSError):
        return False
    return True
