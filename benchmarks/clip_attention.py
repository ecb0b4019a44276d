"""Would a bound on the attention that sinks get do what registers do?

Behind the sensitive block, patches whose norm stands out there (three deviations above the mean of
an image) get no more than a share of each query's attention: what softmax gives them is clipped,
and put back to a sum of one or not, or their scores are lowered by a constant, which a fused
attention takes as its bias. The form that does best on the images that rank settings is held
against none on those that decide, and beside it what the search ships, unless --no-search. Ranges
are min-max, weights rounded to the nearest, halves of photographs as in planted_curation.py.

    PYTHONPATH=.:tests:examples python -m benchmarks.clip_attention [--seeds 2] [--natural]
        [--grown FILE.onnx]... [--bits 8]... [--no-search] [--json FILE]
"""

import json
import math
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import onnx_graphsurgeon as gs
import typer
from numpy.typing import NDArray

from benchmarks.four_bits import encoders
from benchmarks.planted_curation import study_of
from regcache.compiler.calibration.graph_session import open_graph, run_all
from regcache.compiler.calibration.observe import site_statistics
from regcache.compiler.calibration.quantizer import Quantizer
from regcache.compiler.curation.curate import curate
from regcache.compiler.curation.decision import Improvement, measure_improvement
from regcache.compiler.curation.parts import output_errors
from regcache.compiler.curation.workbench import HeldStudy, Workbench, collect
from regcache.compiler.job.context import SearchOptions
from regcache.compiler.job.options import Calibrator
from regcache.compiler.job.targets import Simulation, TargetName, resolve_target, simulate
from regcache.compiler.reporter import Reporter
from regcache.passes.copy_graph import copy_graph
from regcache.passes.cut_graph import cut_graph
from regcache.passes.encoder import EncoderView

_DEVIATIONS = 3.0  # as what moves hidden units tells sinks
_SHARES = (0.03, 0.01, 0.003)
_LOWERED = (math.log(4), math.log(16), 30.0)  # the last: nothing is left of them


@dataclass(frozen=True)
class Clip:
    """`how`: "clipped", "shared out" (to a sum of one again) or "lowered"; by how much."""

    how: Literal["clipped", "shared out", "lowered"]
    amount: float

    def __str__(self) -> str:
        return f"{self.how} {'by' if self.how == 'lowered' else 'at'} {self.amount:.3g}"


_CLIPS = [Clip(how, share) for how in ("clipped", "shared out") for share in _SHARES]
_CLIPS += [Clip("lowered", amount) for amount in _LOWERED]


class Writer:
    """Adds nodes to a graph."""

    def __init__(self, graph: gs.Graph) -> None:
        self.graph, self._count = graph, 0

    def node(self, op: str, *inputs: gs.Tensor | Sequence[float], **attrs: Any) -> gs.Variable:
        """The output of a new node; numbers become constants, int64 where they are whole."""
        self._count += 1
        name = f"clip/{self._count}"
        tensors = [
            item if isinstance(item, gs.Tensor) else gs.Constant(f"{name}/{at}", np.asarray(item))
            for at, item in enumerate(inputs)
        ]
        output = gs.Variable(f"{name}/out", dtype=np.float32)
        self.graph.nodes.append(gs.Node(op, name, attrs, tensors, [output]))
        return output

    def sinks(self, stream: gs.Tensor, prefix: int) -> gs.Variable:
        """Which tokens of a stream [B, T, width] stand out, as 0 or 1 [B, 1, 1, T]."""
        norms = self.node("ReduceMax", self.node("Abs", stream), [-1], keepdims=0)
        patches = self.node("Slice", norms, [prefix], [np.iinfo(np.int64).max], [1])
        mean = self.node("ReduceMean", patches, [1], keepdims=1)
        apart = self.node("Sub", patches, mean)
        square = self.node("ReduceMean", self.node("Mul", apart, apart), [1], keepdims=1)
        far = self.node("Mul", self.node("Sqrt", square), _number(_DEVIATIONS))
        found = self.node("Greater", patches, self.node("Add", mean, far))
        found.dtype = np.bool_
        ones = self.node("Cast", found, to=1)
        every = self.node("Pad", ones, [0, prefix, 0, 0])
        return self.node("Unsqueeze", every, [1, 2])

    def clip(self, softmax: gs.Node, sinks: gs.Tensor, clip: Clip) -> None:
        """Let sinks get less of what a softmax gives."""
        if clip.how == "lowered":
            less = self.node("Mul", sinks, _number(clip.amount))
            softmax.inputs[0] = self.node("Sub", softmax.inputs[0], less)
            return
        given = softmax.outputs[0]
        readers = list(given.outputs)
        over = self.node("Relu", self.node("Sub", given, _number(clip.amount)))
        left = self.node("Sub", given, self.node("Mul", over, sinks))
        if clip.how == "shared out":
            left = self.node("Div", left, self.node("ReduceSum", left, [-1], keepdims=1))
        for node in readers:
            node.inputs = [left if item is given else item for item in node.inputs]


def _number(value: float) -> NDArray[np.float32]:
    return np.array(value, np.float32)


def clipped(view: EncoderView, graph: gs.Graph, sensitive: int, clip: Clip) -> gs.Graph:
    """A copy of `graph` whose blocks behind the sensitive one are clipped.

    It is what `view` is of, in float or quantized.
    """
    copy, behind = copy_graph(graph), view.blocks[sensitive + 1 :]
    tensors, nodes = copy.tensors(), {node.name: node for node in copy.nodes}
    write = Writer(copy)
    sinks = write.sinks(tensors[behind[0].input.name], view.prefix_tokens or 0)
    for block in behind:
        write.clip(nodes[block.attention.softmax.name], sinks, clip)
    return copy.toposort()


@dataclass(frozen=True)
class Errors:
    """1 - cosine to float of each image that ranks, and of each that decides."""

    rank: list[float]
    decide: list[float]


def errors_with(workbench: Workbench, sensitive: int, clip: Clip | None) -> Errors:
    """Calibrated on the `fit` images with the clip, quantized, and run with it."""

    def edited(graph: gs.Graph) -> gs.Graph:
        return graph if clip is None else clipped(workbench.view, graph, sensitive, clip)

    study, sites, scales = workbench.study, workbench.view.sites, workbench.scales
    if clip is not None:
        names = [site.tensor.name for site in sites]
        session = open_graph(cut_graph(edited(workbench.graph), None, names), threads=1)
        statistics = site_statistics(workbench.view, len(study.images.fit), study.seed)
        collect(session, study.images.fit, sites, statistics, workbench.at_once)
        scales = study.quantizer.scales(sites, statistics)
    quantized = edited(workbench.quantize(workbench.graph, scales))
    session = open_graph(cut_graph(quantized, None, workbench.outputs), threads=1)

    def errors(name: Literal["rank", "decide"], images: NDArray[np.float32]) -> list[float]:
        outputs = run_all(session, images, workbench.batch, workbench.at_once)
        return [float(error) for error in output_errors(workbench.references(name), outputs)]

    return Errors(errors("rank", study.images.rank), errors("decide", study.images.decide))


def measure(name: str, graph: gs.Graph, bits: int, *, search: bool) -> dict[str, Any]:
    """The clip that ranks best, and what the search ships, each beside nothing."""
    target = resolve_target(TargetName.ORT_CPU, u8s8_saturates=False)
    quantizer = Quantizer(simulate(target, Simulation(f"w{bits}a{bits}")), Calibrator.MIN_MAX)
    study = study_of(graph, quantizer)
    with tempfile.TemporaryDirectory() as scratch:
        # Without time, a search names the block and tries nothing.
        options = SearchOptions(Path(scratch) / "journal", budget=None if search else 0)
        record = curate(study, options, Reporter()).record
    assert record.sensitive_block is not None
    sensitive = min(record.sensitive_block, len(record.block_damage) - 2)
    workbench = HeldStudy(study).workbench()
    plain = errors_with(workbench, sensitive, None)
    tried = {clip: errors_with(workbench, sensitive, clip) for clip in _CLIPS}
    best = min(tried, key=lambda clip: float(np.mean(tried[clip].rank)))
    seen = measure_improvement(plain.decide, tried[best].decide, study.seed)
    ranks = {str(clip): round(float(np.mean(found.rank)), 5) for clip, found in tried.items()}
    row = {"encoder": name, "bits": bits, "block": sensitive, "clip": str(best)}
    row |= {"rank_plain": round(float(np.mean(plain.rank)), 5), "rank": ranks}
    row |= {"clipped": _told(seen), "shipped": str(record.setting)}
    return row | {"registers": _told(record.improvement)}


def _told(seen: Improvement | None) -> list[float]:
    """The errors without and with, and the interval of the gain."""
    if seen is None:
        return []
    figures = (seen.without, seen.with_setting, seen.gain_low, seen.gain_high)
    return [round(figure, 5) for figure in figures]


def main(
    seeds: int = 2,
    first: int = 0,
    grown: Annotated[list[Path] | None, typer.Option(help="A grown encoder, ONNX.")] = None,
    natural: bool = False,
    bits: Annotated[list[int] | None, typer.Option()] = None,
    search: bool = True,
    json_file: Annotated[Path | None, typer.Option("--json")] = None,
) -> None:
    """Print a line for each encoder and number of bits."""
    rows = []
    for name, graph in encoders(range(first, first + seeds), grown or [], natural):
        for number in bits or (8, 6, 4):
            rows.append(measure(name, graph, number, search=search))
            print(json.dumps(rows[-1]), flush=True)
    if json_file is not None:
        json_file.write_text(json.dumps(rows, indent=2) + "\n")


if __name__ == "__main__":
    typer.run(main)
