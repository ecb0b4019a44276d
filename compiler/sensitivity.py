"""Quantize one layer, and one block, at a time, and measure the damage at the pooled output."""

from dataclasses import dataclass

from regcache.compiler.graph_session import open_graph, run_all
from regcache.compiler.study import Study
from regcache.compiler.workbench import embedding_errors, workbench
from regcache.passes.base import run
from regcache.passes.cut_graph import cut_graph


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
    count, batch = study.sensitivity_images, study.batch
    inputs = bench.fit[block][:count]
    graph = cut_graph(bench.graph, bench.streams[block], [bench.streams[block + 1]])
    names = [site.tensor.name for site in bench.sites(block, block + 1)]
    with bench.tail(bench.depth) as head:
        reference = run_all(head, bench.fit[-1][:count], batch)[0]
    with bench.tail(block + 1) as tail:

        def damage(quantized: list[str]) -> float:
            step = study.quantizer.step({name: bench.scales[name] for name in quantized})
            with open_graph(run(step, graph).graph, threads=1) as session:
                hidden = run_all(session, inputs, batch)[0]
            return float(embedding_errors(reference, run_all(tail, hidden, batch)[0]).mean())

        return BlockDamage({name: damage([name]) for name in names}, damage(names))
