"""Somebody else's quantizer, really called, to decide whether registers help it."""

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import onnx_graphsurgeon as gs
from numpy.typing import NDArray

from regcache.passes.errors import InputError, first_line
from regcache.passes.marks import BOUNDED
from regcache.passes.onnx_file import LARGEST_SINGLE_FILE, constant_bytes, save_graph
from regcache.passes.temporary import temporary_folder
from regcache.runtime.session import OrtSession, fill_batch

Floats = NDArray[np.float32]
Batches = list[dict[str, Floats]]
"""Calibration images, each run under the name of the model's input."""
Ranges = Mapping[str, tuple[Floats, Floats]]
"""The least and the largest value of each tensor, by name."""


@dataclass(frozen=True)
class Work:
    """A model to quantize: its file and `graph`, images, and the file to write, in its folder."""

    model: Path
    graph: gs.Graph
    feeds: Batches
    output: Path

    @property
    def large(self) -> bool:
        """Whether the weights are too large for the model's own file."""
        return constant_bytes(self.graph) > LARGEST_SINGLE_FILE


class OtherQuantizer(Protocol):
    """A quantizer that can be called."""

    @property
    def name(self) -> str:
        """In a word."""

    @property
    def asked_by(self) -> str:
        """The option that asked for it, which its errors begin with."""

    @property
    def rounds_outputs(self) -> bool | None:
        """Whether it rounds what linears compute, too, as well as what they read; None: unknown."""

    def check(self) -> None:
        """Raise InputError, naming what is missing, where it cannot be called."""

    def quantize(self, work: Work) -> Ranges | None:
        """Write the quantized model. Whatever it raises is a failure of the quantizer.

        Returns the ranges in float of what bounds clip, at least, or None where they are not known.
        """


@dataclass(frozen=True)
class Quantized:
    """What a quantizer made of a graph, ready to run, `batch` images at a time.

    `bound_reached`: whether images drove anything below a bound of BoundHidden, as far as is known.
    """

    quantizer: OtherQuantizer
    session: OrtSession
    outputs: int
    batch: int
    bound_reached: bool

    def run(self, images: Floats) -> list[Floats]:
        """The outputs, float32 [N, ...], as ONNX Runtime computes them here, in integers.

        Raises InputError where it cannot.
        """
        with _written_by(self.quantizer, self.session.name):
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
        """Quantize a graph. Raises InputError with the quantizer's own words where it fails."""
        size = graph.inputs[0].shape[0]
        size = size if isinstance(size, int) else self.batch
        with temporary_folder() as folder:
            model, quantized = folder / "float.onnx", folder / "quantized.onnx"
            save_graph(graph, model)
            name, chunks = graph.inputs[0].name, _chunks(self.fit, size)
            feeds = [{name: fill_batch(chunk, size)} for chunk in chunks]
            with _said_by(self.quantizer):
                ranges = self.quantizer.quantize(Work(model, graph, feeds, quantized))
            reached = ranges is None or _bound_reached(graph, ranges)
            with self._session(quantized) as session:
                size = session.fixed_batch or size
                yield Quantized(self.quantizer, session, len(self.outputs), size, reached)

    def _session(self, quantized: Path) -> OrtSession:
        with _written_by(self.quantizer, str(quantized)):
            return OrtSession(quantized, threads=self.threads, outputs=self.outputs)


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
        raise InputError(f"{quantizer.asked_by}: {first_line(error)}") from error
    finally:
        logging.disable(before)


@contextmanager
def _written_by(quantizer: OtherQuantizer, file: str) -> Iterator[None]:
    """Say whose file it is that cannot be run; its name is that of a folder that will be gone."""
    try:
        yield
    except InputError as error:
        said = str(error).replace(file, "what it wrote")
        raise InputError(f"{quantizer.asked_by}: {said}") from error


def bounds_of(graph: gs.Graph) -> dict[str, float]:
    """What BoundHidden clips below, by the name of the tensor that is clipped."""
    clips = (node for node in graph.nodes if node.name.startswith(BOUNDED))
    return {node.inputs[0].name: float(node.inputs[1].values) for node in clips}


def _bound_reached(graph: gs.Graph, ranges: Ranges) -> bool:
    return any(float(ranges[name][0].min()) < low for name, low in bounds_of(graph).items())
