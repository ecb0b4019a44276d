"""OpenVINO in the place of ONNX Runtime, which run.py was written for: the calls that it makes."""

import json
from pathlib import Path
from typing import Any, NamedTuple

from numpy.typing import NDArray


class Input(NamedTuple):
    """An input of a model: a dim that is not fixed is None."""

    name: str
    shape: list[int | None]


class InferenceSession:
    """A model compiled for the CPU, with what preprocess.json beside it says of precision."""

    def __init__(self, model: str) -> None:
        from openvino import compile_model

        recipe = json.loads(Path(model).with_name("preprocess.json").read_text(encoding="utf-8"))
        properties = {"PERFORMANCE_HINT": "LATENCY", **recipe["openvino"]}
        self.compiled = compile_model(model, "CPU", properties)

    def get_inputs(self) -> list[Input]:
        """The inputs, by name and shape."""
        return [
            Input(port.any_name, [dim.get_length() if dim.is_static else None for dim in dims])
            for port, dims in ((port, port.partial_shape) for port in self.compiled.inputs)
        ]

    def run(self, names: list[str] | None, feed: dict[str, NDArray[Any]]) -> list[NDArray[Any]]:
        """The named outputs, or all."""
        found = self.compiled(feed)
        ports = self.compiled.outputs if names is None else map(self.compiled.output, names)
        return [found[port] for port in ports]
