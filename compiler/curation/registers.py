"""Compute the keys and values that registers are cached as, from the ONNX graph itself."""

import numpy as np
from numpy.typing import NDArray

from regcache.compiler.calibration.graph_session import open_graph
from regcache.passes.encoder import EncoderView
from regcache.passes.errors import InputError
from regcache.passes.register_graph import operand_heads, register_graph
from regcache.runtime.device import CPU, Device

Floats = NDArray[np.float32]


class RegisterCapture:
    """Blocks `start` to `end` - 1 of an encoder, in float, ready to run on registers alone.

    Raises InputError where the blocks cannot be cut out of the graph.
    """

    def __init__(
        self,
        view: EncoderView,
        start: int,
        end: int,
        threads: int | None = None,
        device: Device = CPU,
    ) -> None:
        self.view, self.blocks = view, view.blocks[start:end]
        self._session = open_graph(register_graph(view, start, end), threads=threads, device=device)

    def operands(self, tokens: Floats) -> tuple[Floats, Floats]:
        """Keys and values [blocks, heads, R, head_dim] of tokens [R, width].

        The tokens are the hidden state at the first block; they attend to one another only, and
        carry no position. Raises InputError when they do not fit the encoder or are not finite.
        """
        _check(self.view, tokens)
        operands = self._session.run(np.ascontiguousarray(tokens[None], dtype=np.float32))
        pairs = [
            operand_heads(block.attention, self.view.head_dim, key, value)
            for block, key, value in zip(self.blocks, operands[::2], operands[1::2], strict=True)
        ]
        keys, values = (np.stack(side).astype(np.float32) for side in zip(*pairs, strict=True))
        return keys, values


def capture_registers(
    view: EncoderView, start: int, end: int, tokens: Floats
) -> tuple[Floats, Floats]:
    """Keys and values [end - start, heads, R, head_dim] of register tokens [R, width].

    See RegisterCapture; R may be 0.
    """
    _check(view, tokens)
    if not len(tokens):
        empty = np.zeros((len(view.blocks[start:end]), view.heads, 0, view.head_dim), np.float32)
        return empty, empty
    return RegisterCapture(view, start, end, threads=1).operands(tokens)


def _check(view: EncoderView, tokens: Floats) -> None:
    if tokens.ndim != 2 or tokens.shape[1] != view.width:
        raise InputError(f"registers: tokens {tokens.shape} do not fit a width of {view.width}")
    if not np.isfinite(tokens).all():
        raise InputError("registers: tokens must be finite")
