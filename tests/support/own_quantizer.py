"""A quantizer of somebody's own, run as a command: MODEL IMAGES OUTPUT."""

import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnxruntime import quantization


def quantize(model: Path, images: Path, output: Path) -> None:
    """As with `--for ort`: min-max, all operators, weights per channel."""
    name = onnx.load(model).graph.input[0].name
    items = iter([{name: image[None]} for image in np.load(images)])

    class Reader(quantization.CalibrationDataReader):  # type: ignore[misc]
        def get_next(self) -> Any:
            return next(items, None)

    quantization.quantize_static(
        model,
        output,
        Reader(),
        activation_type=quantization.QuantType.QUInt8,
        weight_type=quantization.QuantType.QInt8,
        per_channel=True,
    )


if __name__ == "__main__":
    quantize(*map(Path, sys.argv[1:]))
