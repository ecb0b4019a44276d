"""How large a compiled model will be."""

from math import prod

from regcache.compiler.encoder.float_encoder import FloatEncoder
from regcache.compiler.job.targets import Precision
from regcache.passes.model_files import model_size

# Bytes of a linear's weight.
_WEIGHT_BYTES = {
    Precision.INT8: 1.0,
    Precision.FP8: 1.0,
    Precision.MXFP8: 33 / 32,
    Precision.NVFP4: 9 / 16,
    Precision.W4A16: 0.625,
    Precision.BF16: 4.0,
    Precision.FP16: 2.0,
    Precision.FP32: 4.0,
}


def compiled_bytes(weights: int, linears: int, precision: Precision, *, half: bool) -> int:
    """Bytes of model.onnx, with all linears quantized.

    `weights`: bytes of the float model. `linears`: numbers in the weights of its linears. `half`:
    whether the rest is in FP16.
    """
    rest = max(weights - 4 * linears, 0)
    return round(linears * _WEIGHT_BYTES[precision] + rest / (2 if half else 1))


def bytes_of(encoder: FloatEncoder, precision: Precision, *, half: bool) -> int:
    """Bytes of model.onnx for an encoder whose weights are in its ONNX file; see compiled_bytes."""
    linears = sum(prod(linear.weight_shape) for linear in encoder.view.linears)
    return compiled_bytes(model_size(encoder.path), linears, precision, half=half)
