"""The toolchain that builds an engine: a library of one version, and the GPUs to build for."""

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from regcache.compiler.artifact.engine_record import EngineKind
from regcache.compiler.job.targets import Precision
from regcache.compiler.reporter import Reporter
from regcache.export.cache import cache_folder, written_whole
from regcache.passes.errors import InputError
from regcache.runtime import tensorrt_engine, tensorrt_rtx
from regcache.runtime.engine_build import EngineBuild
from regcache.runtime.gpu import find_gpu

# What GPUs have to multiply, and from which compute capability on they do.
_SINCE = {
    Precision.FP8: ("FP8", tensorrt_rtx.FLOAT8_SINCE),
    Precision.MXFP8: ("MXFP8", tensorrt_rtx.BLOCKS_SINCE),
    Precision.NVFP4: ("NVFP4", tensorrt_rtx.BLOCKS_SINCE),
}

ALL = "all"
"""In place of compute capabilities: all that the library builds for."""


@dataclass(frozen=True)
class BuildOptions:
    """What a user can choose of a build.

    `compute_capabilities`: as "8.6", or (ALL,); None for those of the usual GPUs. `max_batch`,
    `opt_batch`: the largest batch size and the one that kernels are tuned for. `with_float`:
    whether float.onnx is built too. `force`: whether to build what is up to date. `predict`:
    whether its time is predicted, which takes two more builds.
    """

    engine: EngineKind = EngineKind.TENSORRT_RTX
    compute_capabilities: tuple[str, ...] | None = None
    max_batch: int = 8
    opt_batch: int = 1
    with_float: bool = False
    force: bool = False
    predict: bool = True


@dataclass(frozen=True)
class Toolchain:
    """A library that builds engines, and all its settings but the ONNX file.

    `description`: for people. `facts`: for the key that decides whether to build again.
    """

    engine: EngineKind
    description: str
    facts: dict[str, object]
    build: Callable[[Path], EngineBuild]


def open_toolchain(options: BuildOptions, precision: Precision, reporter: Reporter) -> Toolchain:
    """Find the library, and the GPU where it needs one.

    Raises MissingExtraError without the library, and InputError where there is no GPU for
    TensorRT, and on compute capabilities that the library or the precision does not take.
    """
    if options.engine is EngineKind.TENSORRT_RTX:
        return _tensorrt_rtx(options, precision, reporter)
    return _tensorrt(options, precision)


def _tensorrt_rtx(options: BuildOptions, precision: Precision, reporter: Reporter) -> Toolchain:
    version = tensorrt_rtx.library_version()
    capabilities = _capabilities(options.compute_capabilities, precision, reporter)

    def build(model: Path) -> EngineBuild:
        return tensorrt_rtx.build_engine(
            model,
            compute_capabilities=capabilities,
            max_batch=options.max_batch,
            opt_batch=options.opt_batch,
        )

    facts = {"compute_capabilities": capabilities} | _facts(options, version)
    name = f"TensorRT-RTX {version} for compute capability {', '.join(capabilities)}"
    return Toolchain(options.engine, name, facts, build)


def _capabilities(
    wanted: tuple[str, ...] | None, precision: Precision, reporter: Reporter
) -> tuple[str, ...]:
    """The compute capabilities to build for, ascending: what the user named, or the usual ones.

    Raises InputError for one that the library does not build for. Those that cannot compute the
    precision are left out with a note where the user did not name them, else refused.
    """
    known = tensorrt_rtx.supported_compute_capabilities()
    named = tensorrt_rtx.COMPUTE_CAPABILITIES if wanted is None else wanted
    everything = named == (ALL,)
    names = known if everything else named
    for name in names:
        if name not in known:
            version = tensorrt_rtx.library_version()
            raise InputError(
                f"compute capability {name!r}: TensorRT-RTX {version} builds for {', '.join(known)}"
            )
    ordered = tuple(name for name in known if name in names)
    if precision not in _SINCE:
        return ordered
    what, least = _SINCE[precision]
    able = tensorrt_rtx.capabilities_since(least, ordered)
    unable = ", ".join(name for name in ordered if name not in able)
    if unable and (wanted is None or everything):
        reporter.step(f"leaving out compute capability {unable}: it multiplies no {what}")
    elif unable:
        raise InputError(
            f"compute capability {unable}: multiplies no {what}, which begins with "
            f"{least}; name others, or compile with --precision int8"
        )
    return able


def _tensorrt(options: BuildOptions, precision: Precision) -> Toolchain:
    if options.compute_capabilities is not None:
        raise InputError(
            "--compute-capability is for tensorrt-rtx: TensorRT builds for this machine's GPU"
        )
    version, gpu = tensorrt_engine.library_version(), find_gpu()
    what, least = _SINCE.get(precision, ("", "0.0"))
    if not tensorrt_rtx.capabilities_since(least, [gpu.compute_capability]):
        raise InputError(f"{gpu.name}: compute capability {gpu.compute_capability} has no {what}")

    def build(model: Path) -> EngineBuild:
        timings = _timing_cache(version, gpu.name)
        with written_whole(timings) as updated:
            return tensorrt_engine.build_engine(
                model,
                max_batch=options.max_batch,
                opt_batch=options.opt_batch,
                known_timings=timings,
                new_timings=updated,
            )

    facts = {"gpu": gpu.name} | _facts(options, version)
    return Toolchain(options.engine, f"TensorRT {version} on {gpu.name}", facts, build)


def _timing_cache(version: str, gpu: str) -> Path:
    """Where TensorRT's timings of one version on one kind of GPU are kept between builds."""
    folder = cache_folder() / "tensorrt-timings"
    folder.mkdir(exist_ok=True)
    return folder / f"{version}-{re.sub(r'[^a-z0-9]+', '-', gpu.lower())}.cache"


def _facts(options: BuildOptions, version: str) -> dict[str, object]:
    return {
        "engine": options.engine.value,
        "version": version,
        "max_batch": options.max_batch,
        "opt_batch": options.opt_batch,
    }
