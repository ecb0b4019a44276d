"""Products with weights outside the blocks, which are not quantized."""

from regcache.compiler.encoder.pass_record import PassRecord
from regcache.passes.count_flops import product_flops
from regcache.passes.encoder import EncoderView
from regcache.passes.errors import InputError
from regcache.passes.walk import is_constant

# Of the work with weights: patch embeddings, poolers and projections have less, but for toys.
_MUCH = 0.25


def outside_blocks(view: EncoderView) -> list[PassRecord]:
    """A record of the float work outside the blocks, where it is much of the whole; else none.

    Nodes of unknown shapes are left out; without a known number of tokens there is no record.
    """
    if view.tokens is None:
        return []
    inside = {id(linear.matmul) for linear in view.linears}
    work: dict[str, int] = {}
    for node in view.graph.nodes:
        weighted = node.op in {"MatMul", "Gemm", "Conv"} and any(map(is_constant, node.inputs))
        if weighted and id(node) not in inside:
            try:
                work[f"{node.op} {node.name or node.outputs[0].name}"] = product_flops(node) // 2
            except InputError:
                continue
    blocks = view.tokens * sum(linear.work for linear in view.linears)
    share = sum(work.values()) / (sum(work.values()) + blocks)
    if share < _MUCH:
        return []
    ordered = sorted(work, key=lambda name: -work[name])
    listed = ordered[0] if len(ordered) == 1 else f"{ordered[0]} and {len(ordered) - 1} more"
    line = f"{share:.0%} of the work with weights lies outside the blocks, in float: {listed}"
    skips = [f"{name}: outside the blocks" for name in ordered]
    return [PassRecord(name="view_encoder", edits=0, skips=skips, slower=[line])]
