"""Quantize one layer, and one block, at a time, and measure the damage at the pooled output."""

from dataclasses import dataclass

import numpy as np
import onnx_graphsurgeon as gs
from numpy.typing import NDArray

from regcache.compiler.graph_session import open_graph, run_all
from regcache.compiler.study import Study
from regcache.compiler.workbench import Workbench, embedding_errors, workbench
from regcache.passes.base import run
from regcache.passes.cut_graph import cut_graph

Floats = NDArray[np.float32]


@dataclass(frozen=True)
class BlockDamage:
    """Mean 1 - cosine of the pooled output, the rest of the encoder in float.

    `sites`: with one activation and the linears that read it quantized, by the tensor's name;
    `whole`: with all of the block's.
    """

    sites: dict[str, float]
    whole: float


def block_damage(study: Study, block: int) -> BlockDamage:
    """The damage that quantizing parts of one block does, on the first of the `fit` images.

    Blocks before it are not run: their hidden states are there already.
    """
    bench = workbench(study)
    inputs = bench.fit[block][: study.sensitivity_images]
    graph = cut_graph(bench.graph, bench.streams[block], [bench.streams[block + 1]])
    last = bench.fit[-1][: study.sensitivity_images]
    reference = run_all(bench.head(), last, study.batch)[0]
    names = [site.tensor.name for site in bench.sites(block, block + 1)]

    def damage(quantized: list[str]) -> float:
        outputs = _run_on(bench, block, graph, quantized, inputs)
        return float(embedding_errors(reference, outputs).mean())

    return BlockDamage({name: damage([name]) for name in names}, damage(names))


def _run_on(
    bench: Workbench, block: int, graph: gs.Graph, quantized: list[str], inputs: Floats
) -> Floats:
    """The pooled output with some activations of one block quantized."""
    study = bench.study
    step = study.quantizer.step({name: bench.scales[name] for name in quantized})
    session = open_graph(run(step, graph).graph, threads=1)
    hidden = run_all(session, inputs, study.batch)[0]
    for index in range(block + 1, bench.depth):
        hidden = run_all(bench.block(index), hidden, study.batch)[0]
    return run_all(bench.head(), hidden, study.batch)[0]
