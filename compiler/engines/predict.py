"""How long an engine will take, predicted beside that of the same encoder in FP16, built alike."""

from collections.abc import Sequence
from pathlib import Path

from regcache.compiler.artifact.artifact import Artifact
from regcache.compiler.artifact.engine_record import EngineKind
from regcache.compiler.encoder.prepare import FLOAT
from regcache.compiler.engines.toolchain import BuildOptions
from regcache.compiler.job.half import write_half
from regcache.compiler.job.targets import Precision
from regcache.compiler.reporter import Reporter
from regcache.passes.errors import InputError
from regcache.passes.temporary import temporary_folder
from regcache.runtime.engine_build import EngineBuild
from regcache.runtime.engine_cost import (
    Kernel,
    PredictedTime,
    beside,
    multiplies_on,
    predict,
)
from regcache.runtime.gpu_rates import gpus_of
from regcache.runtime.tensorrt_rtx import kernels_at


def predict_times(
    model: Path, built: EngineBuild, artifact: Artifact, options: BuildOptions, reporter: Reporter
) -> list[PredictedTime]:
    """The times of an engine for its least, tuned and largest batch on the GPUs of the table.

    `model`: the ONNX file that it was built from. Empty for TensorRT, which only lists a finished
    engine's kernels, without the shapes. Without float.onnx there is no ratio to FP16.
    """
    if options.engine is not EngineKind.TENSORRT_RTX:
        return []
    capabilities, tuned = built.compute_capabilities, built.batch[1]
    reporter.step("predicting its time beside FP16's")
    kernels = kernels_at(model, capabilities, tuned)
    half = _half_kernels(artifact, capabilities, tuned, reporter)
    return _times(kernels, half, built)


def _times(
    kernels: Sequence[Kernel], half: Sequence[Kernel] | None, built: EngineBuild
) -> list[PredictedTime]:
    found = []
    for gpu in gpus_of(built.compute_capabilities):
        for batch in sorted(set(built.batch)):
            if multiplies_on(kernels, gpu):
                time = predict(kernels, gpu, batch)
                found.append(time if half is None else beside(time, predict(half, gpu, batch)))
    return found


def _half_kernels(
    artifact: Artifact, capabilities: Sequence[str], batch: int, reporter: Reporter
) -> tuple[Kernel, ...] | None:
    """The kernels of the float encoder in FP16; None without it, or where it is no other."""
    if artifact.manifest.options.precision is Precision.FP16:
        return None
    if FLOAT not in artifact.manifest.files:
        reporter.step(f"no {FLOAT}: nothing to compare the prediction with")
        return None
    with temporary_folder() as folder:
        path = folder / "half.onnx"
        write_half(artifact.float_model, artifact.manifest.options.profile, path)
        try:
            return kernels_at(path, capabilities, batch)
        except InputError as error:
            reporter.warn(f"in FP16, {FLOAT} does not build: {error}")
            return None
