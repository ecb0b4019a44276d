"""config.pbtxt of a Triton Inference Server model, as protobuf text."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeAlias

import onnx
from google.protobuf.text_encoding import CEscape

from regcache.passes.errors import InputError

_TYPES: dict[int, str] = {
    onnx.TensorProto.FLOAT: "TYPE_FP32",
    onnx.TensorProto.FLOAT16: "TYPE_FP16",
    onnx.TensorProto.INT32: "TYPE_INT32",
    onnx.TensorProto.INT64: "TYPE_INT64",
    onnx.TensorProto.UINT8: "TYPE_UINT8",
    onnx.TensorProto.BOOL: "TYPE_BOOL",
}


class Word(str):
    """The name of an enumerator: written without quotes."""

    __slots__ = ()


Value: TypeAlias = "str | int | Mapping[str, Value] | Sequence[Value]"


@dataclass(frozen=True)
class TensorSpec:
    """An input or output: Triton's name of its type, and its dims with the batch first.

    A dim that is not fixed is -1.
    """

    name: str
    data_type: str
    dims: tuple[int, ...]


@dataclass(frozen=True)
class TritonConfig:
    """What Triton has to know of a model.

    `max_batch`: images in one run, or None where the graph fixes its batch.
    `queue_delay`: microseconds that an image waits for others to fill a batch.
    `accelerator`: parameters of the TensorRT execution provider, None where it does not run.
    `plans`: the file of a TensorRT engine for each compute capability.
    `parameters`: of the backend, by name. `filename`: of the model, where the backend expects
    another.
    """

    name: str
    backend: str
    gpu: bool
    max_batch: int | None
    queue_delay: int
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    parameters: Mapping[str, str] = field(default_factory=dict)
    filename: str | None = None
    accelerator: Mapping[str, str] | None = None
    plans: Mapping[str, str] = field(default_factory=dict)

    def to_pbtxt(self) -> str:
        """The text of config.pbtxt, of inference.ModelConfig."""
        fields: dict[str, Value] = {
            "name": self.name,
            "backend": self.backend,
            "max_batch_size": self.max_batch or 0,
            "input": [self._tensor(item) for item in self.inputs],
            "output": [self._tensor(item) for item in self.outputs],
            "instance_group": [{"count": 1, "kind": Word("KIND_GPU" if self.gpu else "KIND_CPU")}],
        }
        if self.max_batch is not None and self.max_batch > 1:
            fields["dynamic_batching"] = {
                "preferred_batch_size": sorted({max(self.max_batch // 2, 2), self.max_batch}),
                "max_queue_delay_microseconds": self.queue_delay,
            }
        if self.accelerator is not None:
            tensorrt: dict[str, Value] = {
                "name": "tensorrt",
                "parameters": _map(self.accelerator),
            }
            fields["optimization"] = {
                "execution_accelerators": {"gpu_execution_accelerator": [tensorrt]}
            }
        if self.filename is not None:
            fields["default_model_filename"] = self.filename
        if self.parameters:
            fields["parameters"] = [
                {"key": key, "value": {"string_value": value}}
                for key, value in self.parameters.items()
            ]
        if self.plans:
            fields["cc_model_filenames"] = _map(self.plans)
        return _text(fields)

    def _tensor(self, spec: TensorSpec) -> Value:
        dims = spec.dims if self.max_batch is None else spec.dims[1:]
        return {"name": spec.name, "data_type": Word(spec.data_type), "dims": dims}


def graph_tensors(model: Path) -> tuple[tuple[TensorSpec, ...], tuple[TensorSpec, ...]]:
    """The inputs and outputs of an ONNX file; its weights are not read.

    Raises InputError for a type of number that Triton's config has no name for here.
    """
    graph = onnx.load(model, load_external_data=False).graph
    stored = {weight.name for weight in graph.initializer}
    inputs = tuple(_spec(item) for item in graph.input if item.name not in stored)
    return inputs, tuple(_spec(item) for item in graph.output)


def _spec(item: onnx.ValueInfoProto) -> TensorSpec:
    tensor = item.type.tensor_type
    if tensor.elem_type not in _TYPES or not tensor.HasField("shape"):
        raise InputError(f"{item.name!r}: of a type or shape that Triton cannot be told")
    dims = tuple(dim.dim_value if dim.HasField("dim_value") else -1 for dim in tensor.shape.dim)
    return TensorSpec(item.name, _TYPES[tensor.elem_type], dims)


def _map(entries: Mapping[str, str]) -> Value:
    return [{"key": key, "value": value} for key, value in entries.items()]


def _text(fields: Mapping[str, Value], indent: str = "") -> str:
    """Protobuf text: a sequence is a field that is repeated."""
    lines = []
    for name, value in fields.items():
        for item in [value] if isinstance(value, (str, int, Mapping)) else value:
            if isinstance(item, Mapping):
                lines.append(f"{indent}{name} {{\n{_text(item, indent + '  ')}{indent}}}\n")
            elif isinstance(item, str) and not isinstance(item, Word):
                lines.append(f'{indent}{name}: "{CEscape(item.encode(), as_utf8=False)}"\n')
            else:
                lines.append(f"{indent}{name}: {item}\n")
    return "".join(lines)
