"""What an engine costs by the builder's list of its kernels: bytes, operations, and a prediction.

A prediction of time from peak rates, no measurement: every kernel takes as long as its bytes or its
operations at the GPU's peak, whichever is longer, and a launch. Real kernels reach a part of both,
and tensors that stay in the cache move faster; a ratio of two predictions is worth more than one.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from regcache.runtime.engine_layers import EngineLayer, EngineTensor
from regcache.runtime.finite_record import FiniteRecord
from regcache.runtime.gpu_rates import GpuRates

_BYTES = {
    "INT64": 8,
    "FP32": 4,
    "INT32": 4,
    "BF16": 2,
    "FP16": 2,
    "FP8": 1,
    "FP8UE8M0": 1,
    "INT8": 1,
    "BOOL": 1,
    "FP4": 0.5,
}


@dataclass(frozen=True)
class Kernel:
    """What one kernel moves and computes.

    `moved`: bytes of activations that it reads and writes for one image; `constants`: bytes that it
    reads once. `operations`: of its product, for one image, a multiplication and an addition being
    two; 0 for all that does not multiply matrices. `format`: what it multiplies in.
    """

    moved: float
    constants: int = 0
    operations: float = 0.0
    format: str = "FP16"


class PredictedTime(FiniteRecord):
    """A predicted time of an engine on a GPU at one batch size, from peak rates: no measurement."""

    gpu: str
    """Name of the GPU."""
    batch: int
    """Images in a run."""
    total_ms: float
    """Milliseconds of all kernels, each as long as its memory or its arithmetic takes, whichever is
    longer, and a launch.
    """
    memory_ms: float
    """Milliseconds that all bytes take at the memory's bandwidth."""
    arithmetic_ms: float
    """Milliseconds that all products take at the peak rates of their number formats."""
    launches_ms: float
    """Milliseconds between the kernels."""
    ratio: float | None = None
    """`total_ms` over that of the float engine built alike, which is FP16 except where `bench` was
    asked for another; None without one.
    """


def kernels_of(layers: Iterable[EngineLayer], batch: int) -> tuple[Kernel, ...]:
    """The kernels of an engine whose network has a fixed batch, by the builder's list.

    Entries without tensors, such as waits for another stream, are none.
    Raises ValueError where a shape is open or a format has no known size.
    """
    return tuple(_kernel(layer, batch) for layer in layers if layer.inputs or layer.outputs)


def moved_bytes(kernels: Iterable[Kernel], batch: int) -> float:
    """Bytes that kernels read and write for `batch` images."""
    return sum(kernel.moved * batch + kernel.constants for kernel in kernels)


def predict(kernels: Sequence[Kernel], gpu: GpuRates, batch: int) -> PredictedTime:
    """The time of `batch` images on a GPU, predicted.

    Raises KeyError for a product in a format that the GPU does not multiply.
    """
    memory = [(kernel.moved * batch + kernel.constants) / gpu.bandwidth for kernel in kernels]
    arithmetic = [
        kernel.operations * batch / gpu.operations[kernel.format] if kernel.operations else 0.0
        for kernel in kernels
    ]
    launches = len(kernels) * gpu.between_kernels
    busy = sum(map(max, memory, arithmetic))
    return PredictedTime(
        gpu=gpu.name,
        batch=batch,
        total_ms=_milliseconds(busy + launches),
        memory_ms=_milliseconds(sum(memory)),
        arithmetic_ms=_milliseconds(sum(arithmetic)),
        launches_ms=_milliseconds(launches),
    )


def beside(predicted: PredictedTime, original: PredictedTime) -> PredictedTime:
    """A prediction with its ratio to that of the float engine."""
    return predicted.model_copy(update={"ratio": round(predicted.total_ms / original.total_ms, 4)})


def multiplies_on(kernels: Iterable[Kernel], gpu: GpuRates) -> bool:
    """Whether a GPU multiplies in all the formats that the kernels do."""
    return all(kernel.format in gpu.operations for kernel in kernels if kernel.operations)


def _milliseconds(seconds: float) -> float:
    return round(seconds * 1e3, 6)


def _kernel(layer: EngineLayer, batch: int) -> Kernel:
    moved = sum(map(_size, (*layer.inputs, *layer.outputs)))
    constants = sum(map(_size, layer.constants))
    return Kernel(moved / batch, constants, _operations(layer) / batch, layer.precision)


def _size(tensor: EngineTensor) -> int:
    if min(tensor.shape, default=0) < 0:
        raise ValueError(f"the shape {tensor.shape} is open: build with a fixed batch")
    if tensor.format not in _BYTES:
        raise ValueError(f"how many bytes has {tensor.format}?")
    return math.ceil(tensor.size * _BYTES[tensor.format])


def _operations(layer: EngineLayer) -> int:
    """Of the layer's product: two for each number it makes and each that is summed up in it."""
    if not layer.multiplies:
        return 0
    (made, *_), weight = layer.outputs, layer.weight
    if layer.fused_attention:
        query, key, *_ = layer.inputs
        # q k^T makes a score for every pair of a query and a key, and its product with v sums them.
        keys = key.size // (math.prod(query.shape[:-2]) * query.shape[-1])
        return 4 * query.size * keys
    if weight is None:
        return 2 * made.size * layer.inputs[0].shape[-1]
    # Of a convolution [N, C, ...], else [K, N], or several of them in one product [3, K, N].
    summed = math.prod(weight.shape[1:]) if len(weight.shape) == 4 else weight.shape[-2]
    return 2 * made.size * summed
