"""What the search's tasks share within a process: hidden states that are computed once."""

import threading
from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeVar

import numpy as np
import onnx_graphsurgeon as gs
from numpy.typing import NDArray

from regcache.compiler.calibration.graph_session import open_graph, stream_tokens
from regcache.compiler.calibration.mapped import return_memory
from regcache.compiler.calibration.number_formats import Scale
from regcache.compiler.calibration.observe import SiteStatistics, site_statistics
from regcache.compiler.calibration.statistics import NormHistogram, TokenNorms
from regcache.compiler.curation.parts import Part, State, output_errors, run_named
from regcache.compiler.curation.registers import RegisterCapture
from regcache.compiler.curation.study import Study
from regcache.passes.base import run
from regcache.passes.choose_outputs import choose_outputs
from regcache.passes.cut_graph import cut_graph, needed_before
from regcache.passes.encoder import Block, Site
from regcache.passes.errors import InputError
from regcache.passes.find_blocks import view_encoder
from regcache.runtime.session import OrtSession, available_cpus

Floats = NDArray[np.float32]
T = TypeVar("T")


class Workbench:
    """A study, run once in float and once quantized, with its hidden states at block boundaries.

    `streams`: names of the residual stream at the input of every block, then after the last.
    `fit`, `quantized`: those hidden states [N, T, width], of the `fit` images in float and of the
    `rank` images quantized. `outputs`: names of those that errors are measured at; `before`: for
    each stream, names of what they need from before it. `norms`: of the tokens of streams and
    activations; `patch_norms`: l-infinity, of patches alone, of activations. `references`: float
    outputs of the `rank` and `decide` images. Every session runs on one thread, so that no result
    depends on who computes it.
    """

    def __init__(self, study: Study) -> None:
        self.study, self.graph = study, study.graph
        self.view = view_encoder(study.graph)
        self.depth = len(self.view.blocks)
        blocks = self.view.blocks
        self.streams = [block.input.name for block in blocks] + [blocks[-1].output.name]
        self.outputs = study.outputs or choose_outputs(self.view).counted
        self.before = [needed_before(self.graph, name, self.outputs) for name in self.streams]
        _check_layout(self.graph, blocks)
        self._lock, self._kept = threading.RLock(), dict[Any, Any]()
        self.norms = {name: TokenNorms() for name in (*self.streams, *self.tensors)}
        self.patch_norms = {name: NormHistogram() for name in self.tensors}
        self.fit, statistics = self._run_float()
        self.scales: dict[str, Scale] = study.quantizer.scales(self.view.sites, statistics)
        few = self.study.images.fit[: study.sensitivity_images]
        self._fit_others = self._run(self.graph, self._others, few)[0]
        found = self._run_quantized()
        self.quantized = [found[name] for name in self.streams]
        self._quantized_others = {name: found[name] for name in self._others}
        self.references = self._run_references()
        return_memory()
        quantized = [found[name] for name in self.outputs]
        self.baseline = output_errors(self.references["rank"], quantized)

    @property
    def tensors(self) -> list[str]:
        """The activations that feed the blocks' linears."""
        return [site.tensor.name for site in self.view.sites]

    def sites(self, start: int, end: int) -> list[Site]:
        """The sites of blocks [start, end)."""
        inside = {
            linear.input.name for block in self.view.blocks[start:end] for linear in block.linears
        }
        return [site for site in self.view.sites if site.tensor.name in inside]

    def kept(self, key: Any, make: Callable[[], T]) -> T:
        """What `make` returns, made once under `key`."""
        with self._lock:
            if key not in self._kept:
                self._kept[key] = make()
            found: T = self._kept[key]
            return found

    def tail(self, block: int) -> Part:
        """What follows the input of a block, in float; the heads alone for block `depth`."""
        return Part.of(self.graph, self.streams[block], self.outputs)

    def fit_state(self, block: int) -> State:
        """What there is at the input of a block, in float, of the images for sensitivity."""
        others = {name: self._fit_others[name] for name in self.before[block]}
        return State(self.fit[block][: self.study.sensitivity_images], others)

    def quantized_state(self, block: int) -> State:
        """What there is at the input of a block, quantized, of the `rank` images."""
        others = {name: self._quantized_others[name] for name in self.before[block]}
        return State(self.quantized[block], others)

    def capture(self, start: int, end: int) -> RegisterCapture:
        """Keys and values of registers in blocks [start, end)."""
        make = lambda: RegisterCapture(self.view, start, end, 1, self.study.device)  # noqa: E731
        return self.kept(("capture", start, end), make)

    def _run_float(self) -> tuple[list[Floats], dict[str, SiteStatistics]]:
        images = self.study.images.fit
        statistics = site_statistics(self.view, len(images), self.study.seed)
        names = [*self.streams, *self.tensors]
        wanted = cut_graph(self.graph, None, names)
        session = open_graph(wanted, threads=1, device=self.study.device)
        hidden: list[list[Floats]] = []
        for outputs in stream_tokens(session, images, available_cpus()):
            for name, tokens in zip(names, outputs, strict=True):
                self.norms[name].update(tokens)
                if name in statistics:
                    statistics[name].update(tokens)
                    patches = tokens[:, self.view.prefix_tokens or 0 :]
                    self.patch_norms[name].update(np.abs(patches).max(axis=-1))
            hidden.append(outputs[: len(self.streams)])
        return [np.concatenate(part) for part in zip(*hidden, strict=True)], statistics

    @property
    def _others(self) -> list[str]:
        return list(dict.fromkeys(name for names in self.before for name in names))

    def _run_quantized(self) -> dict[str, Floats]:
        graph = run(self.study.quantizer.step(self.scales), self.graph).graph
        names = [*self.streams, *self.outputs, *self._others]
        return self._run(graph, names, self.study.images.rank)[0]

    def _run_references(self) -> dict[str, list[Floats]]:
        images = self.study.images
        found = self._run(self.graph, self.outputs, images.rank, images.decide)
        rank, decide = ([known[name] for name in self.outputs] for known in found)
        return {"rank": rank, "decide": decide}

    def _run(self, graph: gs.Graph, names: Sequence[str], *sets: Floats) -> list[dict[str, Floats]]:
        study = self.study
        return run_named(graph, names, sets, study.batch, available_cpus(), study.device)


def _check_layout(graph: gs.Graph, blocks: Iterable[Block]) -> None:
    """Refuse the sequence-first hidden states [T, B, width] of some exporters."""
    batch = graph.inputs[0].shape[0]
    for block in blocks:
        first, *rest = block.input.shape
        if isinstance(first, int) and first != batch:
            raise InputError(
                f"registers: the hidden state at block {block.index}, {[first, *rest]}, does not "
                "have the batch in front"
            )


def collect(
    session: OrtSession,
    inputs: Floats,
    sites: Iterable[Site],
    statistics: dict[str, SiteStatistics],
) -> None:
    """Feed the sites' activations, which are the session's outputs, to their statistics."""
    names = [site.tensor.name for site in sites]
    for outputs in stream_tokens(session, inputs):
        for name, tokens in zip(names, outputs, strict=True):
            statistics[name].update(tokens)


_workbenches: dict[str, Workbench] = {}
_opening = threading.Lock()


def open_workbench(study: Study) -> Workbench:
    """The workbench of a study, made once per process; only the latest is kept."""
    with _opening:
        if study.key not in _workbenches:
            _workbenches.clear()
            _workbenches[study.key] = Workbench(study)
        return _workbenches[study.key]


def close_workbench() -> None:
    """Free the memory of the latest study."""
    _workbenches.clear()
