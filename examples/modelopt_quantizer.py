"""NVIDIA Model Optimizer as what decides on registers: see docs/registers.md.

It runs in an environment of its own, with `pip install "nvidia-modelopt[onnx]"`:

    regcache registers SOURCE --images photos -o with-registers.onnx --quantizer \
        "modelopt-env/bin/python examples/modelopt_quantizer.py {model} {images} {output}"
"""

import sys

import numpy as np
import onnx
from modelopt.onnx.quantization import quantize

model, images, output = sys.argv[1:]
name = onnx.load(model, load_external_data=False).graph.input[0].name
quantize(
    model,
    quantize_mode="int8",
    calibration_data={name: np.load(images)},
    calibration_method="entropy",
    calibration_eps=["cpu"],  # ONNX Runtime's, to calibrate with
    high_precision_dtype="fp32",  # what stays float, so that a CPU can run it
    output_path=output,
)
