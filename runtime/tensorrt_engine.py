"""Plain TensorRT engines, built through Polygraphy on, and for, this machine's GPU.

Unlike TensorRT-RTX, TensorRT times its kernels while it builds, so an engine belongs to the kind of
GPU it was built on, and a timing cache saves most of the time of the next build.
"""

import time
from pathlib import Path
from typing import Any

from regcache.passes.errors import InputError, MissingExtraError
from regcache.runtime.engine_build import EngineBuild
from regcache.runtime.engine_layers import EngineLayer, parse_layers
from regcache.runtime.gpu import find_gpu
from regcache.runtime.tensorrt_network import (
    check_batch_sizes,
    collecting_logger,
    input_shapes,
    no_collection,
    parse_network,
    refused_by_builder,
)


def build_engine(
    model: Path,
    *,
    max_batch: int = 8,
    opt_batch: int = 1,
    known_timings: Path | None = None,
    new_timings: Path | None = None,
) -> EngineBuild:
    """Build an engine from an ONNX file: strongly typed, for batch sizes 1 to `max_batch`.

    `opt_batch`: the batch size that the kernels are tuned for. `known_timings`: the timing cache of
    earlier builds with this version on this GPU; `new_timings`: where those go together with what
    this build measured. Nothing is printed.

    Raises MissingExtraError without TensorRT or Polygraphy; InputError without a GPU, on batch
    sizes out of order, a file that cannot be read or an input with another dynamic dimension than
    the batch; and RefusedGraphError, an InputError, with the node that the parser or the builder
    refuses.
    """
    trt = _import_tensorrt()
    gpu = find_gpu()
    sizes = check_batch_sizes(opt_batch, max_batch)
    started = time.perf_counter()
    engine, batch, warnings = serialize_engine(
        trt, model, sizes, known_timings=known_timings, new_timings=new_timings
    )
    seconds = time.perf_counter() - started
    return EngineBuild(
        engine=engine,
        version=trt.__version__,
        compute_capabilities=(gpu.compute_capability,),
        batch=batch,
        layers=inspect_layers(trt, engine),
        warnings=warnings,
        seconds=seconds,
        gpu=gpu.name,
    )


def library_version() -> str:
    """The version of the installed TensorRT. Raises MissingExtraError where there is none."""
    return str(_import_tensorrt().__version__)


@no_collection()
def serialize_engine(
    trt: Any,
    model: Path,
    sizes: tuple[int, int, int],
    *,
    known_timings: Path | None,
    new_timings: Path | None,
) -> tuple[bytes, tuple[int, int, int], tuple[str, ...]]:
    """The engine's bytes, the batch sizes it takes and the builder's warnings.

    `trt` is the library that Polygraphy uses. Raises as `build_engine`.
    """
    from polygraphy.backend.trt import CreateConfig, EngineBytesFromNetwork, Profile
    from polygraphy.exception import PolygraphyException
    from polygraphy.logger import G_LOGGER

    product = f"{'TensorRT-RTX' if 'rtx' in trt.__name__ else 'TensorRT'} {trt.__version__}"
    log = collecting_logger(trt)
    with G_LOGGER.verbosity(G_LOGGER.CRITICAL + 1):  # it writes to standard output
        builder = trt.Builder(log)
        network = parse_network(trt, builder, log, model, product)
        shapes, batch = input_shapes(network, sizes, model)
        profile = Profile()
        for name, limits in shapes.items():
            profile.add(name, *limits)
        known = known_timings if known_timings is not None and known_timings.is_file() else None
        # TF32 as TensorRT has it by default, so that the float engine is no slower than it need be.
        config = CreateConfig(
            profiles=[profile], tf32=True, load_timing_cache=None if known is None else str(known)
        )
        timings = None if new_timings is None else str(new_timings)
        build = EngineBytesFromNetwork((builder, network), config, save_timing_cache=timings)
        try:
            serialized = bytes(build())
        except PolygraphyException as error:
            raise refused_by_builder(model, log, product) from error
    return serialized, batch, tuple(log.warnings)


def inspect_layers(trt: Any, engine: bytes) -> tuple[EngineLayer, ...]:
    """The kernels of an engine, as TensorRT's inspector lists them. Needs the engine's GPU."""
    from polygraphy.backend.trt import EngineFromBytes
    from polygraphy.logger import G_LOGGER

    with G_LOGGER.verbosity(G_LOGGER.CRITICAL + 1):
        loaded = EngineFromBytes(engine)()
    inspector = loaded.create_engine_inspector()
    text: str = inspector.get_engine_information(trt.LayerInformationFormat.ONELINE)
    return parse_layers(text)


def _import_tensorrt() -> Any:
    what, extra = "building TensorRT engines", "trt"
    try:
        from polygraphy import config
    except ImportError as error:
        raise MissingExtraError(what, extra=extra, module="polygraphy") from error
    if config.USE_TENSORRT_RTX:
        raise InputError("POLYGRAPHY_USE_TENSORRT_RTX is set, so Polygraphy would not use TensorRT")
    try:
        import tensorrt
    except ImportError as error:
        raise MissingExtraError(what, extra=extra, module="tensorrt") from error
    return tensorrt
