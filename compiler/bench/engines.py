"""The engines that a benchmark runs: the artifact's own where they suit, else built for the GPU."""

from dataclasses import replace
from pathlib import Path

from regcache.compiler.artifact.artifact import Artifact
from regcache.compiler.artifact.engine_record import EngineRecord
from regcache.compiler.engines.signed_model import REWRITE, engine_source
from regcache.compiler.reporter import Reporter
from regcache.runtime import tensorrt_engine, tensorrt_rtx
from regcache.runtime.engine_build import EngineBuild
from regcache.runtime.gpu import Gpu, find_gpu
from regcache.runtime.runners import Loading, RunnerName


def why_unsupported(runner: RunnerName) -> str | None:
    """Why a runner's library cannot run on this machine's GPU, and which does; None where it can.

    TensorRT-RTX does not support data-centre GPUs such as Hopper's. Raises MissingExtraError where
    the library is not installed, and InputError where there is no GPU.
    """
    if runner is not RunnerName.TENSORRT_RTX:
        return None
    gpu, known = find_gpu(), tensorrt_rtx.supported_compute_capabilities()
    if gpu.compute_capability in known:
        return None
    return (
        f"{gpu.name} (compute capability {gpu.compute_capability}): TensorRT-RTX "
        f"{tensorrt_rtx.library_version()} runs on {', '.join(known)} alone: "
        f"--runner {RunnerName.TENSORRT}"
    )


def engine_for(artifact: Artifact, loading: Loading, folder: Path, reporter: Reporter) -> Path:
    """The engine of an ONNX file for this machine's GPU, tuned for the first batch size.

    An engine that `regcache build` put into the artifact is taken where the installed version built
    it, for this GPU and the same batch sizes. Otherwise an engine is built into `folder`.

    Raises MissingExtraError where the library is not installed, and InputError where there is no
    GPU, or the library refuses the model or the GPU.
    """
    gpu = find_gpu()
    for record in artifact.manifest.engines:
        if artifact.folder / record.model == loading.model and suits(record, loading, gpu):
            return artifact.folder / record.file
    reporter.step(f"{loading.runner}: building an engine of {loading.model.name}")
    path = folder / f"{loading.runner}-{loading.model.stem}.engine"
    with engine_source(loading.model, artifact, reporter) as model:
        path.write_bytes(_build(replace(loading, model=model), gpu).engine)
    return path


def _build(loading: Loading, gpu: Gpu) -> EngineBuild:
    tuned, largest = loading.batches[0], max(loading.batches)
    if loading.runner is RunnerName.TENSORRT:
        return tensorrt_engine.build_engine(loading.model, max_batch=largest, opt_batch=tuned)
    capabilities = [gpu.compute_capability]
    return tensorrt_rtx.build_engine(
        loading.model, compute_capabilities=capabilities, max_batch=largest, opt_batch=tuned
    )


def suits(record: EngineRecord, loading: Loading, gpu: Gpu) -> bool:
    """Whether an engine of the artifact equals what would be built here for a runner."""
    if record.engine.value != loading.runner.value:
        return False
    library = tensorrt_rtx if loading.runner is RunnerName.TENSORRT_RTX else tensorrt_engine
    return (
        record.version == library.library_version()
        and gpu.compute_capability in record.compute_capabilities
        and record.gpu in (None, gpu.name)
        and record.batch == (1, loading.batches[0], max(loading.batches))
        and record.rewrite in (None, REWRITE)
    )
