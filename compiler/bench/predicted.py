"""The times that a benchmark on TensorRT-RTX puts beside what it measures, from peak rates."""

from collections.abc import Sequence
from pathlib import Path

from regcache.compiler.artifact.artifact import Artifact
from regcache.compiler.engines.signed_model import engine_source
from regcache.compiler.reporter import Reporter
from regcache.passes.errors import InputError
from regcache.runtime.bench_result import BatchResult, RunnerResult
from regcache.runtime.engine_cost import beside, multiplies_on, predict
from regcache.runtime.gpu import find_gpu
from regcache.runtime.gpu_rates import find_rates
from regcache.runtime.runners import RunnerName
from regcache.runtime.tensorrt_rtx import kernels_at


def with_predictions(
    result: RunnerResult, models: Sequence[Path], artifact: Artifact, reporter: Reporter
) -> RunnerResult:
    """A runner's measurements with what was predicted for both models beside them.

    `models`: the ONNX files of the float and of the quantized model. Left as it is for other
    runners than TensorRT-RTX, which alone lists kernels with shapes, and, with a note, for a GPU
    whose rates are not in the table.
    """
    if result.runner is not RunnerName.TENSORRT_RTX:
        return result
    gpu = find_gpu()
    try:
        rates = find_rates(gpu.name)
    except InputError as error:
        reporter.step(f"no time predicted: {error}")
        return result
    tuned = result.batches[0].batch
    kernels = []
    for model in models:
        with engine_source(model, artifact, reporter) as source:
            kernels.append(kernels_at(source, [gpu.compute_capability], tuned))
    if not all(multiplies_on(some, rates) for some in kernels):
        return result

    def predicted(item: BatchResult) -> BatchResult:
        original, quantized = (predict(some, rates, item.batch) for some in kernels)
        times = {
            "predicted_float": original,
            "predicted_quantized": beside(quantized, original),
        }
        return item.model_copy(update=times)

    return result.model_copy(update={"batches": tuple(map(predicted, result.batches))})
