"""What the tasks of a search share within a worker: hidden states that are computed once."""

import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal, TypeVar

import numpy as np
import onnx_graphsurgeon as gs
from numpy.typing import NDArray

from regcache.compiler.calibration.graph_session import open_graph, stream_tokens
from regcache.compiler.calibration.mapped import gather, kept_folder, return_memory
from regcache.compiler.calibration.number_format import Scale
from regcache.compiler.calibration.observe import SiteStatistics, site_statistics
from regcache.compiler.calibration.statistics import NormHistogram, TokenNorms
from regcache.compiler.curation.parts import (
    Part,
    State,
    check_batch,
    output_errors,
    run_named,
)
from regcache.compiler.curation.registers import RegisterCapture
from regcache.compiler.curation.shared_weights import SharedWeights
from regcache.compiler.curation.study import Study
from regcache.passes.base import run
from regcache.passes.choose_outputs import choose_outputs
from regcache.passes.cut_graph import cut_graph, needed_before
from regcache.passes.encoder import Block, Site
from regcache.passes.errors import InputError
from regcache.passes.external_weights import let_go
from regcache.passes.find_blocks import view_encoder
from regcache.passes.onnx_file import constant_bytes
from regcache.passes.rotated_stream import stream_rotation
from regcache.runtime.session import LARGE, OrtSession, available_cpus

Floats = NDArray[np.float32]
T = TypeVar("T")


class Workbench:
    """A study, run once in float, and once quantized where a search asks for that.

    `streams`: names of the residual stream at the input of every block, then after the last. `fit`:
    these hidden states, float32 [N, T, width] each, of the `fit` images in float. `stream_norms`:
    norms of their tokens, not rotated. `outputs`: names of the outputs that errors are measured at.
    `before`: for each stream, names of the tensors from before it that the outputs need. `batch`:
    images of a run. `at_once`: runs of a task at a time; there are fewer tasks than CPUs at times,
    and one alone where the graph is large. The hidden states of a large graph are mapped from disk.

    By the site's name: `scales`; `site_norms`, norms of the tokens of its activation;
    `patch_norms`, l-infinity norms of the patches alone.

    Every session runs on one thread, so that results do not depend on who computes them. Raises
    InputError where the encoder cannot be cut at its blocks.
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
        self.at_once = available_cpus()
        self._large = constant_bytes(self.graph) >= LARGE
        self._weights = SharedWeights(kept_folder(self.graph))
        self.batch = 1 if self._large and not study.device.on_gpu else study.batch
        self._turn = stream_rotation(self.graph)
        self.stream_norms = [TokenNorms() for _ in self.streams]
        self.site_norms = {site.name: TokenNorms() for site in self.view.sites}
        self.patch_norms = {site.name: NormHistogram() for site in self.view.sites}
        self.fit, statistics = self._run_float()
        self.scales = study.scales or study.quantizer.scales(self.view.sites, statistics)
        self._fit_tensors = self._run_few(study.sensitivity_images)
        self.return_memory()

    def sites(self, start: int, end: int) -> list[Site]:
        """The sites of blocks [start, end)."""
        return [site for site in self.view.sites if start <= site.block < end]

    def quantize(self, graph: gs.Graph, scales: Mapping[str, Scale]) -> gs.Graph:
        """A copy of the encoder, or of a part, with the linears of the sites in `scales` quantized.

        Their weights are stored as the float numbers that the integers stand for.
        """
        step = self.study.quantizer.step(self.view.sites, scales)
        return self._weights.put_into(run(step, graph).graph)

    def in_own_channels(self, tokens: Floats, index: int) -> Floats:
        """Tokens [..., width] of `streams[index]`, not rotated, as the encoder came.

        The output of the last block never is rotated (see RotateStream).
        """
        return tokens if self._turn is None or index == self.depth else tokens @ self._turn.T

    def return_memory(self) -> None:
        """Give back what a task used; states that lie on disk are read again where needed."""
        with self._lock:
            quantized = self._kept.get("quantized", {})
        for state in (*self.fit, *quantized.values()):
            let_go(state)
        self._weights.let_go()
        return_memory(self.graph)

    def kept(self, key: Any, make: Callable[[], T]) -> T:
        """The result of `make`, which is called once for each `key`."""
        with self._lock:
            if key not in self._kept:
                self._kept[key] = make()
            made: T = self._kept[key]
            return made

    def tail(self, block: int) -> Part:
        """The part behind the input of a block, in float; behind the last block for `depth`."""
        return Part.of(self.graph, self.streams[block], self.outputs)

    def fit_state(self, block: int, images: int) -> State:
        """The state at a block's input, in float, of so many of the images for sensitivity."""
        others = {name: self._fit_tensors[name][:images] for name in self.before[block]}
        return State(self.fit[block][:images], others)

    def fit_outputs(self, images: int) -> list[Floats]:
        """The float outputs of so many of the images for sensitivity, at `outputs`."""
        return [self._fit_tensors[name][:images] for name in self.outputs]

    def quantized_state(self, block: int) -> State:
        """The state at the input of a block, quantized, of the `rank` images."""
        others = {name: self._quantized[name] for name in self.before[block]}
        return State(self.quantized[block], others)

    @property
    def quantized(self) -> list[Floats]:
        """Hidden states [N, T, width] of the `rank` images, quantized, at `streams`."""
        return [self._quantized[name] for name in self.streams]

    def references(self, images: Literal["rank", "decide"]) -> list[Floats]:
        """Float outputs of the images to `rank` or to `decide`, at `outputs`."""

        def run_float() -> list[Floats]:
            known = self._run(self.graph, self.outputs, getattr(self.study.images, images))[0]
            return [known[name] for name in self.outputs]

        return self.kept(("references", images), run_float)

    @property
    def baseline(self) -> NDArray[np.float64]:
        """The error of each of the `rank` images [N], quantized, without registers."""
        quantized = [self._quantized[name] for name in self.outputs]
        return self.kept("baseline", lambda: output_errors(self.references("rank"), quantized))

    @property
    def _quantized(self) -> dict[str, Floats]:
        return self.kept("quantized", self._run_quantized)

    def capture(self, start: int, end: int) -> RegisterCapture:
        """What computes keys and values of registers in blocks [start, end)."""
        make = lambda: RegisterCapture(self.view, start, end, 1, self.study.device)  # noqa: E731
        return self.kept(("capture", start, end), make)

    def _run_float(self) -> tuple[list[Floats], dict[str, SiteStatistics]]:
        images = self.study.images.fit
        statistics = site_statistics(self.view, len(images), self.study.seed)
        sites, count = self.view.sites, len(self.streams)
        names = [*self.streams, *(site.tensor.name for site in sites)]
        wanted = cut_graph(self.graph, None, names)
        session = open_graph(wanted, threads=1, device=self.study.device)

        def streams() -> Iterator[list[Floats]]:
            for outputs in stream_tokens(session, images, available_cpus()):
                for index, norms in enumerate(self.stream_norms):
                    norms.update(self.in_own_channels(outputs[index], index))
                for site, tokens in zip(sites, outputs[count:], strict=True):
                    self.site_norms[site.name].update(tokens)
                    statistics[site.name].update(tokens)
                    patches = tokens[:, self.view.prefix_tokens or 0 :]
                    self.patch_norms[site.name].update(np.abs(patches).max(axis=-1))
                yield outputs[:count]

        return gather(streams(), on_disk=self._large), statistics

    def _run_few(self, count: int) -> dict[str, Floats]:
        """The outputs of the first `fit` images, and what they need from before the streams."""
        images = self.study.images.fit[:count]
        if self._others:
            return self._run(self.graph, [*self.outputs, *self._others], images)[0]
        state = State(self.fit[self.depth][:count], {})  # all before it has been run
        with self.tail(self.depth).open(self.study.device) as compute:
            found = dict(zip(self.outputs, compute(state, self.batch), strict=True))
        check_batch(found, len(images))
        return found

    @property
    def _others(self) -> list[str]:
        return list(dict.fromkeys(name for names in self.before for name in names))

    def _run_quantized(self) -> dict[str, Floats]:
        graph = self.quantize(self.graph, self.scales)
        names = [*self.streams, *self.outputs, *self._others]
        return self._run(graph, names, self.study.images.rank)[0]

    def _run(self, graph: gs.Graph, names: Sequence[str], *sets: Floats) -> list[dict[str, Floats]]:
        device, on_disk = self.study.device, self._large
        return run_named(graph, names, sets, self.batch, self.at_once, device, on_disk=on_disk)


def _check_layout(graph: gs.Graph, blocks: Iterable[Block]) -> None:
    """Raise InputError for sequence-first hidden states [T, B, width], as some exporters make."""
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
    workers: int = 1,
) -> None:
    """Feed the sites' activations, which are the session's outputs, to their statistics.

    `workers`: images that run at a time.
    """
    names = [site.name for site in sites]
    for outputs in stream_tokens(session, inputs, workers):
        for name, tokens in zip(names, outputs, strict=True):
            statistics[name].update(tokens)


class HeldStudy:
    """A study as workers hold it, with the workbench that its tasks work at.

    A workbench is made when a task first asks for it, and freed with this object. Threads share
    the object; a pickle carries the study alone, so that each process and each Dask worker makes
    one workbench of the copy that it holds.
    """

    def __init__(self, study: Study) -> None:
        self.study = study
        self._making = threading.Lock()
        self._workbench: Workbench | None = None

    def __reduce__(self) -> tuple[Any, ...]:
        return HeldStudy, (self.study,)

    def workbench(self) -> Workbench:
        """The workbench of the study, always the same. Raises InputError as Workbench does."""
        with self._making:
            if self._workbench is None:
                self._workbench = Workbench(self.study)
            return self._workbench
