"""Another library's quantizer, really called, to decide whether registers help it."""

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from enum import StrEnum
from importlib import import_module
from importlib.util import find_spec
from inspect import signature
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_graphsurgeon as gs
from numpy.typing import NDArray

from regcache.compiler.curation.tensor_ranges import tensor_ranges
from regcache.passes.errors import InputError, first_line
from regcache.passes.marks import BOUNDED
from regcache.passes.onnx_file import LARGEST_SINGLE_FILE, constant_bytes, load_model, save_graph
from regcache.passes.temporary import temporary_folder
from regcache.runtime.session import OrtSession, fill_batch

Floats = NDArray[np.float32]
Batches = list[dict[str, Floats]]
"""Calibration images, each run under the name of the model's input."""
Ranges = Mapping[str, tuple[Floats, Floats]]
"""The least and the largest value of each tensor, by name."""


class OtherQuantizer(StrEnum):
    """A library that can be called."""

    ORT = "ort"
    NNCF = "nncf"

    @property
    def rounds_outputs(self) -> bool:
        """Whether it rounds what linears compute, too, as well as what they read."""
        return self is OtherQuantizer.ORT

    def check(self) -> None:
        """Raise InputError, naming the package, where it is not installed."""
        package, wanted = _PACKAGES[self]
        if find_spec(package) is None:
            raise InputError(f"--for {self.value} needs {wanted}: pip install {wanted}")


# The option of quantize_static that keeps ranges in a file, which older versions do not have.
_CACHE = "calibration_cache_path"
_PACKAGES = {
    OtherQuantizer.ORT: ("onnxruntime", "onnxruntime"),
    OtherQuantizer.NNCF: ("nncf", "nncf"),
}


@dataclass(frozen=True)
class Quantized:
    """What a library made of a graph, ready to run, `batch` images at a time.

    `bound_reached`: whether images drove anything below a bound of BoundHidden, as far as is known.
    """

    session: OrtSession
    outputs: int
    batch: int
    bound_reached: bool

    def run(self, images: Floats) -> list[Floats]:
        """The outputs, float32 [N, ...], as ONNX Runtime computes them here, in integers."""
        found = [self.session.run(chunk) for chunk in _chunks(images, self.batch)]
        return [np.concatenate([one[index] for one in found]) for index in range(self.outputs)]


@dataclass(frozen=True)
class ReallyQuantized:
    """Quantizes float graphs with `quantizer`, calibrated on the images `fit`.

    `outputs`: names of the outputs that are computed. `batch`: images in a run.
    """

    quantizer: OtherQuantizer
    fit: Floats
    outputs: Sequence[str]
    batch: int
    threads: int | None = None

    @contextmanager
    def open(self, graph: gs.Graph) -> Iterator[Quantized]:
        """Quantize a graph. Raises InputError with the library's own words where it fails."""
        size = graph.inputs[0].shape[0]
        size = size if isinstance(size, int) else self.batch
        with temporary_folder() as folder:
            model, quantized = folder / "float.onnx", folder / "quantized.onnx"
            save_graph(graph, model)
            name, chunks = graph.inputs[0].name, _chunks(self.fit, size)
            feeds = [{name: fill_batch(chunk, size)} for chunk in chunks]
            with _said_by(self.quantizer):
                ranges = _QUANTIZE[self.quantizer](_Work(model, graph, feeds, quantized))
            reached = ranges is None or _bound_reached(graph, ranges)
            with OrtSession(quantized, threads=self.threads, outputs=self.outputs) as session:
                yield Quantized(session, len(self.outputs), size, reached)


def _chunks(images: Floats, size: int) -> list[Floats]:
    return [images[start : start + size] for start in range(0, len(images), size)]


@contextmanager
def _said_by(quantizer: OtherQuantizer) -> Iterator[None]:
    """Keep a library's log to itself, and make one line of its errors."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    except Exception as error:  # whatever a library raises
        raise InputError(f"--for {quantizer.value}: {first_line(error)}") from error
    finally:
        logging.disable(before)


@dataclass(frozen=True)
class _Work:
    """A model to quantize: its file and `graph`, images, and the file to write."""

    model: Path
    graph: gs.Graph
    feeds: Batches
    output: Path

    @property
    def large(self) -> bool:
        """Whether the weights are too large for the model's own file."""
        return constant_bytes(self.graph) > LARGEST_SINGLE_FILE


def _with_ort(work: _Work) -> Ranges | None:
    """quantize_static as it comes, min-max; uint8 activations, and int8 weights per channel.

    Returns the ranges, where this version of it takes them: its own run to find them is without
    any optimization.
    """
    quantization = import_module("onnxruntime.quantization")
    items, more, ranges = iter(work.feeds), dict[str, Any](), None
    reader = type(
        "Reader",
        (quantization.CalibrationDataReader,),
        {"get_next": lambda _: next(items, None)},
    )
    if _CACHE in signature(quantization.quantize_static).parameters:
        batches = (next(iter(feed.values())) for feed in work.feeds)
        ranges = tensor_ranges(work.graph, batches)
        more[_CACHE] = work.output.with_name("ranges.json")
        data = quantization.TensorsData(quantization.CalibrationMethod.MinMax, ranges)
        quantization.save_tensors_data(data, more[_CACHE])
    quantization.quantize_static(
        work.model,
        work.output,
        reader(),
        activation_type=quantization.QuantType.QUInt8,
        weight_type=quantization.QuantType.QInt8,
        per_channel=True,
        use_external_data_format=work.large,
        **more,
    )
    return ranges


def _bound_reached(graph: gs.Graph, ranges: Ranges) -> bool:
    clips = (node for node in graph.nodes if node.name.startswith(BOUNDED))
    products = ((node.inputs[0].name, float(node.inputs[1].values)) for node in clips)
    return any(float(ranges[name][0].min()) < low for name, low in products)


def _with_nncf(work: _Work) -> None:
    """NNCF's post-training quantization for transformers, with its defaults."""
    nncf: Any = import_module("nncf")
    with redirect_stdout(StringIO()):  # Rich's progress bars
        quantized = nncf.quantize(
            load_model(work.model),
            nncf.Dataset(work.feeds),
            model_type=nncf.ModelType.TRANSFORMER,
            subset_size=len(work.feeds),
        )
    onnx.save(quantized, work.output, save_as_external_data=work.large)


_QUANTIZE: Mapping[OtherQuantizer, Callable[[_Work], Ranges | None]] = {
    OtherQuantizer.ORT: _with_ort,
    OtherQuantizer.NNCF: _with_nncf,
}
