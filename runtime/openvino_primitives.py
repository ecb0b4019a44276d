"""What OpenVINO's primitives computed in, read from what a run executed."""

from collections import Counter
from collections.abc import Iterable

from regcache.runtime.finite_record import FiniteRecord
from regcache.runtime.openvino_session import OpenVinoSession

# These move no number.
_FREE = frozenset({"Const", "Input", "Output", "Reshape"})
_FORMATS = {"i8": "int8", "u8": "int8", "bf16": "bf16", "fp16": "f16", "f16": "f16"}
_PRODUCTS = frozenset({"Convolution", "FullyConnected", "MatMul", "ScaledDotProductAttention"})


class Primitives(FiniteRecord):
    """How many primitives OpenVINO ran in each number format, in its execution graph."""

    precision: str
    """What it computed in where nothing is quantized: `f32` or `bf16`."""
    int8: int = 0
    """Primitives that read 8-bit integers; fused ones count once."""
    bf16: int = 0
    """Primitives in bf16."""
    f16: int = 0
    """Primitives in FP16."""
    f32: int = 0
    """Primitives in FP32, and the few that compute in integers of more bits."""
    float_products: int = 0
    """Of those not in int8: fully connected layers, convolutions and products alone."""

    @classmethod
    def of(cls, session: OpenVinoSession) -> "Primitives":
        """Of the last run of a profiled session."""
        return count_primitives(session.executed(), session.precision)


def count_primitives(executed: Iterable[tuple[str, str]], precision: str) -> Primitives:
    """Count (type of layer, kernel): a kernel's name ends in what it computes in."""
    counts = Counter[str]()
    for layer, kernel in executed:
        if layer in _FREE:
            continue
        found = _FORMATS.get(kernel.lower().rpartition("_")[2], "f32")
        counts[found] += 1
        # Quantized fully connected layers have a longer name.
        if found != "int8" and any(layer.startswith(name) for name in _PRODUCTS):
            counts["float_products"] += 1
    return Primitives(precision=precision, **counts)
