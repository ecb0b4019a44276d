"""The true error of a setting: spliced, calibrated and quantized as it would ship."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import onnx_graphsurgeon as gs
from numpy.typing import NDArray

from regcache.compiler.calibration.graph_session import open_graph, run_all
from regcache.compiler.calibration.number_format import Scale
from regcache.compiler.calibration.observe import site_statistics
from regcache.compiler.curation.parts import Part, output_errors
from regcache.compiler.curation.setting import Setting, place_registers
from regcache.compiler.curation.workbench import HeldStudy, Workbench, collect
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
    """1 - cosine to the unchanged float encoder for each image, the mean over its outputs.

    `refused`: why a pass refused the setting; there are no errors then.
    """

    errors: tuple[float, ...] = ()
    refused: str | None = None

    @property
    def mean(self) -> float:
        """The mean error; infinite where the setting was refused."""
        return float(np.mean(self.errors)) if self.errors else float("inf")


def try_setting(held: HeldStudy, trial: Trial) -> TrialResult:
    """The errors on the `rank` images; blocks before the setting's first are not run again."""
    workbench, study = held.workbench(), held.study
    first = trial.setting.first_block(workbench.depth)
    if first == workbench.depth:
        return TrialResult(tuple(workbench.baseline.tolist()))
    try:
        graph = _placed(workbench, trial)
        tail = Part.of(graph, workbench.streams[first], workbench.outputs)
        scales = _new_scales(workbench, graph, first)
        tail = tail.with_graph(workbench.quantize(tail.graph, scales))
    except InputError as error:
        return TrialResult(refused=str(error))
    with tail.open(study.device, workbench.at_once) as compute:
        outputs = compute(workbench.quantized_state(first), workbench.batch)
    workbench.return_memory()
    return _result(workbench, "rank", outputs)


def decide_setting(held: HeldStudy, trial: Trial) -> TrialResult:
    """The errors of the whole encoder on the `decide` images, which the search never used."""
    workbench, study = held.workbench(), held.study
    first = trial.setting.first_block(workbench.depth)
    try:
        graph = _placed(workbench, trial)
    except InputError as error:
        return TrialResult(refused=str(error))
    new = {} if first == workbench.depth else _new_scales(workbench, graph, first)
    scales = {**workbench.scales, **new}
    wanted = cut_graph(workbench.quantize(graph, scales), None, workbench.outputs)
    session = open_graph(wanted, threads=1, device=study.device)
    images, batch = study.images.decide, workbench.batch
    return _result(workbench, "decide", run_all(session, images, batch, workbench.at_once))


def _result(
    workbench: Workbench, images: Literal["rank", "decide"], outputs: Sequence[Floats]
) -> TrialResult:
    errors = output_errors(workbench.references(images), outputs)
    return TrialResult(tuple(errors.tolist()))


def _placed(workbench: Workbench, trial: Trial) -> gs.Graph:
    return place_registers(workbench.graph, workbench.view, trial.setting, trial.tokens)[0]


def _new_scales(workbench: Workbench, graph: gs.Graph, first: int) -> dict[str, Scale]:
    """The scales from block `first` on, where the graph runs differently, from the `fit` images."""
    study = workbench.study
    sites = workbench.sites(first, workbench.depth)
    names = [site.tensor.name for site in sites]
    rest = cut_graph(graph, workbench.streams[first], names)
    session = open_graph(rest, threads=1, brief=True, device=study.device)
    statistics = site_statistics(workbench.view, len(study.images.fit), study.seed)
    collect(session, workbench.fit[first], sites, statistics, workbench.at_once)
    return study.quantizer.scales(sites, statistics, workbench.at_once)
