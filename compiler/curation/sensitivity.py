"""Quantize one layer, and one block, at a time, and measure the damage at the outputs."""

from dataclasses import dataclass

from regcache.compiler.curation.parts import Part, State, output_errors
from regcache.compiler.curation.workbench import HeldStudy
from regcache.passes.base import run


@dataclass(frozen=True)
class BlockDamage:
    """Damage of one block's quantization: mean 1 - cosine of the counted outputs to float.

    `sites`: of one activation and the linears that read it, by the site's name; `whole`: of all the
    block's. The rest of the encoder is in float.
    """

    sites: dict[str, float]
    whole: float


def block_damage(held: HeldStudy, block: int) -> BlockDamage:
    """The damage that quantizing parts of one block does, on the first of the `fit` images.

    Blocks before it are not run: their hidden states are there already.
    """
    workbench, study = held.workbench(), held.study
    state, batch = workbench.fit_state(block), study.batch
    before, behind = workbench.before[block], workbench.before[block + 1]
    made = [workbench.streams[block + 1], *(name for name in behind if name not in before)]
    part = Part.of(workbench.graph, workbench.streams[block], made)
    names = [site.name for site in workbench.sites(block, block + 1)]
    with workbench.tail(workbench.depth).open(study.device) as heads:
        reference = heads(workbench.fit_state(workbench.depth), batch)
    with workbench.tail(block + 1).open(study.device) as tail:

        def damage(quantized: list[str]) -> float:
            step = workbench.quantizing({name: workbench.scales[name] for name in quantized})
            with part.with_graph(run(step, part.graph).graph).open(study.device) as compute:
                hidden, *more = compute(state, batch)
            others = {**state.others, **dict(zip(made[1:], more, strict=True))}
            outputs = tail(State(hidden, others), batch)
            return float(output_errors(reference, outputs).mean())

        return BlockDamage({name: damage([name]) for name in names}, damage(names))
