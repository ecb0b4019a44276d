"""OpenVINO on the CPU: one compiled model, run at once or as several requests."""

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from regcache.passes.errors import InputError, first_line
from regcache.passes.read_graph import read_message
from regcache.runtime.openvino_options import (
    Hint,
    InferencePrecision,
    OpenVinoOptions,
    check_openvino,
    computes_bf16,
)
from regcache.runtime.session import fill_batch, put_first

Images = NDArray[Any]
Outputs = list[NDArray[Any]]

_INPUT_TYPES = {"float32": np.dtype(np.float32), "uint8": np.dtype(np.uint8)}


class OpenVinoSession:
    """An encoder loaded into OpenVINO on the CPU; the counterpart of OrtSession.

    `model`: an ONNX file, or an .xml file of OpenVINO's own format (IR) with its .bin beside it.
    `threads`: of all requests together; defaults to all CPUs this process may use.
    `outputs`: the names of those that come first; the others follow in the file's order.
    `fixed_batch` is the model's batch size where the graph fixes it, else None; `input_dtype` that
    of the images it takes. `requests`: how many batches OpenVINO wants to work on at a time.
    `precision`: what it computes in where nothing is quantized, "f32" or "bf16". `profiled`: note
    what each run executes.
    Raises MissingExtraError without OpenVINO, and InputError, naming the file and the reason, when
    the model cannot be loaded, has no such output or not one input of float32 or uint8, the cache
    cannot be a folder, or the CPU computes no bf16 where that is asked for. Use it as a context
    manager to free the weights early.
    """

    def __init__(
        self,
        model: Path,
        *,
        threads: int | None = None,
        openvino: OpenVinoOptions | None = None,
        outputs: Sequence[str] = (),
        profiled: bool = False,
    ) -> None:
        check_openvino("running a model in OpenVINO")
        from openvino import compile_model

        self.name = str(model)
        options = openvino or OpenVinoOptions()
        properties = options.properties(threads) | ({"PERF_COUNT": True} if profiled else {})
        _check_files(model, options.cache)
        if options.precision is InferencePrecision.BF16 and not computes_bf16():
            raise InputError("this CPU computes no bf16: take the inference precision auto or f32")
        try:
            self._compiled = compile_model(model, "CPU", properties)
        except RuntimeError as error:
            raise InputError(f"{self.name}: OpenVINO: {_reason(error)}") from error
        if len(self._compiled.inputs) != 1:
            count = len(self._compiled.inputs)
            raise InputError(f"{self.name}: needs one image input, has {count}")
        (image,) = self._compiled.inputs
        kind = image.get_element_type().to_dtype().name
        if kind not in _INPUT_TYPES:
            raise InputError(f"{self.name}: needs images of float32 or uint8, takes {kind}")
        self.input_dtype = _INPUT_TYPES[kind]
        dims = image.get_partial_shape()
        self._shape = [dim.get_length() if dim.is_static else None for dim in dims]
        self.fixed_batch: int | None = self._shape[0] if self._shape else None
        given = [_name_of(port) for port in self._compiled.outputs]
        self.output_names: list[str] = put_first(given, outputs, self.name)
        self._order = [given.index(name) for name in self.output_names]
        kind = self._compiled.get_property("INFERENCE_PRECISION_HINT").to_string()
        self.precision: str = {"bfloat16": "bf16", "bf16": "bf16"}.get(kind, "f32")
        wanted = self._compiled.get_property("OPTIMAL_NUMBER_OF_INFER_REQUESTS")
        self.requests: int = max(1, int(wanted))
        self._splits = options.hint is Hint.THROUGHPUT and self.fixed_batch is None
        self._idle: list[Any] = []

    def run(self, images: Images) -> Outputs:
        """Encode images of the model's dtype and layout; outputs in the order of `output_names`.

        Under the throughput hint a batch is split among the requests, which run side by side. Where
        the model's batch is fixed, fewer images are filled up with copies of the last.
        Raises InputError when the dtype or shape is not the model's, or the model fails on it.
        """
        count = min(self.requests, len(images)) if self._splits else 1
        if count <= 1:
            return self._finish(*self._start(images))
        started = [self._start(part) for part in np.array_split(images, count)]
        found = [self._finish(*one) for one in started]
        return [np.concatenate(parts) for parts in zip(*found, strict=True)]

    def run_each(self, batches: Iterable[Images]) -> Iterator[Outputs]:
        """Encode batches in order, as many at a time as OpenVINO has requests.

        The next batch is taken while the last are computed, so reading images costs no time of its
        own.
        """
        started: deque[tuple[Any, int]] = deque()
        for images in batches:
            if len(started) == self.requests:
                yield self._finish(*started.popleft())
            started.append(self._start(images))
        while started:
            yield self._finish(*started.popleft())

    def executed(self) -> list[tuple[str, str]]:
        """(type of layer, kernel) of what the last run executed; of a `profiled` session alone."""
        (request,) = self._idle
        return [
            (info.node_type, info.exec_type)
            for info in request.get_profiling_info()
            if info.status.name == "EXECUTED"
        ]

    def _start(self, images: Images) -> tuple[Any, int]:
        """A request that computes, and how many of its rows are wanted."""
        count, images = len(images), fill_batch(images, self.fixed_batch)
        if images.dtype != self.input_dtype:
            raise InputError(f"{self.name}: takes {self.input_dtype}, not {images.dtype}")
        fits = len(images.shape) == len(self._shape) and all(
            want in (None, have) for have, want in zip(images.shape, self._shape, strict=True)
        )
        if not fits:
            takes = ["batch" if dim is None else dim for dim in self._shape]
            shown = ", ".join(map(str, takes))
            raise InputError(f"{self.name}: takes [{shown}], not {list(images.shape)}")
        request = self._idle.pop() if self._idle else self._compiled.create_infer_request()
        request.start_async({0: np.ascontiguousarray(images)}, share_inputs=True)
        return request, count

    def _finish(self, request: Any, count: int) -> Outputs:
        try:
            request.wait()
        except RuntimeError as error:
            raise InputError(f"{self.name}: OpenVINO: {_reason(error)}") from error
        made = [np.array(request.get_output_tensor(slot).data) for slot in self._order]
        self._idle.append(request)
        if count < (self.fixed_batch or 0):
            made = [output[:count] for output in made]
        return made

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self._idle.clear()
        del self._compiled


def _check_files(model: Path, cache: Path | None) -> None:
    if model.suffix == ".onnx":
        read_message(model)  # what it cannot read, OpenVINO tries as other formats, and logs each
    elif not model.is_file():
        raise InputError(f"{model}: no such file")
    if cache is not None and cache.exists() and not cache.is_dir():
        raise InputError(f"{cache}: is no folder to keep compiled models in")


def _name_of(port: Any) -> str:
    """An output's name in the file; OpenVINO lists those of tensors that it found equal beside."""
    names, whole = port.get_names(), str(port.get_node().get_friendly_name())
    own = whole.removesuffix("/sink_port_0")
    return own if own in names or not names else str(min(names))


def _reason(error: RuntimeError) -> str:
    """The line of OpenVINO's message that says what is wrong: the last that is no place in it."""
    lines = [line.strip() for line in str(error).splitlines()]
    said = [line for line in lines if line and not line.startswith(("Exception from", "Check '"))]
    return said[-1] if said else first_line(error)
