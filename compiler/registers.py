"""Compute the keys and values that registers are cached as, from the ONNX graph itself."""

import numpy as np
import onnx_graphsurgeon as gs
from numpy.typing import NDArray

from regcache.passes.encoder import EncoderView
from regcache.passes.errors import InputError
from regcache.passes.register_graph import operand_heads, register_graph
from regcache.runtime.session import OrtSession

Floats = NDArray[np.float32]


def capture_registers(
    view: EncoderView, start: int, end: int, tokens: Floats
) -> tuple[Floats, Floats]:
    """Keys and values [end - start, heads, R, head_dim] of register tokens [R, width].

    `tokens` is the hidden state at the input of block `start`. Blocks `start` to `end` - 1 run in
    float on the tokens alone: they attend to one another only, and carry no position. Raises
    InputError when the tokens do not fit the encoder or are not finite.
    """
    if tokens.ndim != 2 or tokens.shape[1] != view.width:
        raise InputError(f"registers: tokens {tokens.shape} do not fit a width of {view.width}")
    if not np.isfinite(tokens).all():
        raise InputError("registers: tokens must be finite")
    blocks = view.blocks[start:end]
    if not len(tokens):
        empty = np.zeros((len(blocks), view.heads, 0, view.head_dim), np.float32)
        return empty, empty
    model = gs.export_onnx(register_graph(view, start, end)).SerializeToString()
    with OrtSession(model) as session:
        operands = session.run(np.ascontiguousarray(tokens[None], dtype=np.float32))
    pairs = [
        operand_heads(block.attention, view.head_dim, key, value)
        for block, key, value in zip(blocks, operands[::2], operands[1::2], strict=True)
    ]
    keys, values = (np.stack(side).astype(np.float32) for side in zip(*pairs, strict=True))
    return keys, values
