"""Whether an output is a hidden state that the embedding is pooled from."""

import onnx_graphsurgeon as gs

from regcache.passes.encoder import EncoderView
from regcache.passes.walk import data_inputs

# Ops that mix channels or tokens by weights: what stands behind one is no hidden state any more.
_MIXING = frozenset({"Attention", "Conv", "ConvTranspose", "Einsum", "Gemm", "MatMul"})


def is_pooled_from(view: EncoderView, tokens: gs.Tensor, embedding: gs.Tensor) -> bool:
    """Whether `tokens` [B, T, C] is a hidden state, perhaps normalised, that `embedding` sums up.

    So it is where both come from the same blocks' outputs, and no weights mix what is in them on
    the way to the tokens: they hold nothing that the embedding's error would not show.
    """
    if tokens.shape is None or len(tokens.shape) != 3:
        return False
    hidden = {id(block.output) for block in view.blocks} | {id(view.blocks[0].input)}
    theirs, ops = _origins(tokens, hidden)
    ours, _ = _origins(embedding, hidden)
    return theirs <= ours and not ops & _MIXING


def _origins(tensor: gs.Tensor, hidden: set[int]) -> tuple[set[int], set[str]]:
    """The hidden states (or inputs) nearest upstream of a tensor, and the ops between."""
    waiting, found, ops, seen = [tensor], set[int](), set[str](), set[int]()
    while waiting:
        item = waiting.pop()
        if id(item) in seen:
            continue
        seen.add(id(item))
        if id(item) in hidden or not item.inputs:
            found.add(id(item))
            continue
        for node in item.inputs:
            ops.add(node.op)
            waiting.extend(data_inputs(node))
    return found, ops
