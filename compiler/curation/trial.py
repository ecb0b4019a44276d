"""The true error of a setting: spliced, calibrated and quantized as it would ship."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import onnx_graphsurgeon as gs
from numpy.typing import NDArray

from regcache.compiler.calibration.graph_session import open_graph, return_memory, run_all
from regcache.compiler.calibration.observe import site_statistics
from regcache.compiler.calibration.quantizer import Scale
from regcache.compiler.curation.parts import Part, output_errors
from regcache.compiler.curation.setting import Setting, place_registers
from regcache.compiler.curation.study import Study
from regcache.compiler.curation.workbench import Workbench, collect, workbench
from regcache.passes.base import run
from regcache.passes.cut_graph import cut_graph
from regcache.passes.errors import InputError

Floats = NDArray[np.float32]


@dataclass(frozen=True)
class Trial:
    """A setting and its registers [R, width]."""

    setting: Setting
    tokens: Floats


@dataclass(frozen=True)
class TrialResult:
    """1 - cosine of each image's outputs to the unchanged float encoder's, the mean of the outputs.

    `refused` is why a pass refused the setting; then there are no errors.
    """

    errors: tuple[float, ...] = ()
    refused: str | None = None

    @property
    def mean(self) -> float:
        """The mean error; infinite where the setting was refused."""
        return float(np.mean(self.errors)) if self.errors else float("inf")


def try_setting(study: Study, trial: Trial) -> TrialResult:
    """The errors on the `rank` images; blocks before the setting's first are not run again."""
    bench = workbench(study)
    first = trial.setting.first_block(bench.depth)
    if first == bench.depth:
        return TrialResult(tuple(bench.baseline.tolist()))
    try:
        graph = _placed(bench, trial)
        tail = Part.of(graph, bench.streams[first], bench.outputs)
        step = study.quantizer.step(_new_scales(bench, graph, first))
        tail = tail.with_graph(run(step, tail.graph).graph)
    except InputError as error:
        return TrialResult(refused=str(error))
    with tail.open() as compute:
        outputs = compute(bench.quantized_state(first), study.batch)
    return_memory()
    return _result(bench, "rank", outputs)


def decide_setting(study: Study, trial: Trial) -> TrialResult:
    """The errors on the `decide` images, which the search never saw, of the whole encoder."""
    bench = workbench(study)
    first = trial.setting.first_block(bench.depth)
    graph = _placed(bench, trial)
    scales = (
        bench.scales if first == bench.depth else bench.scales | _new_scales(bench, graph, first)
    )
    quantized = run(study.quantizer.step(scales), graph).graph
    session = open_graph(cut_graph(quantized, None, bench.outputs), threads=1)
    return _result(bench, "decide", run_all(session, study.images.decide, study.batch))


def _result(bench: Workbench, images: str, outputs: Sequence[Floats]) -> TrialResult:
    errors = output_errors(bench.references[images], outputs)
    return TrialResult(tuple(errors.tolist()))


def _placed(bench: Workbench, trial: Trial) -> gs.Graph:
    return place_registers(bench.graph, bench.view, trial.setting, trial.tokens)[0]


def _new_scales(bench: Workbench, graph: gs.Graph, first: int) -> dict[str, Scale]:
    """The scales from block `first` on, where the graph runs differently, from the `fit` images."""
    study = bench.study
    sites = bench.sites(first, bench.depth)
    names = [site.tensor.name for site in sites]
    session = open_graph(cut_graph(graph, bench.streams[first], names), threads=1)
    statistics = site_statistics(bench.view, len(study.images.fit), study.seed)
    collect(session, bench.fit[first], sites, statistics)
    return study.quantizer.scales(sites, statistics)
