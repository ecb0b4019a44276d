"""Another library's quantizer, really called, to decide whether registers help it."""

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from enum import StrEnum
from importlib import import_module
from importlib.util import find_spec
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_graphsurgeon as gs
from numpy.typing import NDArray

from regcache.passes.errors import InputError, first_line
from regcache.passes.onnx_file import LARGEST_SINGLE_FILE, constant_bytes, load_model, save_graph
from regcache.passes.temporary import temporary_folder
from regcache.runtime.session import OrtSession, fill_batch

Floats = NDArray[np.float32]
Batches = list[dict[str, Floats]]
"""Calibration images, each run under the name of the model's input."""


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


_PACKAGES = {
    OtherQuantizer.ORT: ("onnxruntime", "onnxruntime"),
    OtherQuantizer.NNCF: ("nncf", "nncf"),
}


@dataclass(frozen=True)
class ReallyQuantized:
    """Quantizes float graphs with `quantizer`, calibrated on the images `fit`, and runs them.

    `outputs`: names of the outputs that are returned. `batch`: images in a run.
    """

    quantizer: OtherQuantizer
    fit: Floats
    outputs: Sequence[str]
    batch: int
    threads: int | None = None

    def run(self, graph: gs.Graph, images: Floats) -> list[Floats]:
        """The outputs of the quantized graph, float32 [N, ...], for `images`.

        They are computed as ONNX Runtime computes that model here, in integers. Raises InputError
        with the library's own words where it fails.
        """
        size = graph.inputs[0].shape[0]
        size = size if isinstance(size, int) else self.batch
        with temporary_folder() as folder:
            model, quantized = folder / "float.onnx", folder / "quantized.onnx"
            save_graph(graph, model)
            chunks = _chunks(self.fit, size)
            feeds = [{graph.inputs[0].name: fill_batch(chunk, size)} for chunk in chunks]
            large = constant_bytes(graph) > LARGEST_SINGLE_FILE
            with _said_by(self.quantizer):
                _QUANTIZE[self.quantizer](model, feeds, quantized, large)
            with OrtSession(quantized, threads=self.threads, outputs=self.outputs) as session:
                found = [session.run(chunk) for chunk in _chunks(images, size)]
        kept = range(len(self.outputs))
        return [np.concatenate([outputs[index] for outputs in found]) for index in kept]


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


def _with_ort(model: Path, feeds: Batches, output: Path, large: bool) -> None:
    """quantize_static as it comes, min-max; uint8 activations, and int8 weights per channel."""
    quantization = import_module("onnxruntime.quantization")
    items = iter(feeds)
    reader = type(
        "Reader",
        (quantization.CalibrationDataReader,),
        {"get_next": lambda _: next(items, None)},
    )
    quantization.quantize_static(
        model,
        output,
        reader(),
        activation_type=quantization.QuantType.QUInt8,
        weight_type=quantization.QuantType.QInt8,
        per_channel=True,
        use_external_data_format=large,
    )


def _with_nncf(model: Path, feeds: Batches, output: Path, large: bool) -> None:
    """NNCF's post-training quantization for transformers, with its defaults."""
    nncf: Any = import_module("nncf")
    with redirect_stdout(StringIO()):  # Rich's progress bars
        quantized = nncf.quantize(
            load_model(model),
            nncf.Dataset(feeds),
            model_type=nncf.ModelType.TRANSFORMER,
            subset_size=len(feeds),
        )
    onnx.save(quantized, output, save_as_external_data=large)


_QUANTIZE: Mapping[OtherQuantizer, Callable[[Path, Batches, Path, bool], None]] = {
    OtherQuantizer.ORT: _with_ort,
    OtherQuantizer.NNCF: _with_nncf,
}
