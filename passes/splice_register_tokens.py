"""Let registers run along as tokens for some blocks (RegCache, mode token)."""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_graphsurgeon as gs
from numpy.typing import NDArray

from regcache.passes.base import Edit, Log, Lossy, Parity
from regcache.passes.encoder import EncoderView
from regcache.passes.errors import InputError
from regcache.passes.find_blocks import view_encoder
from regcache.passes.marks import TOKENS, of_registers
from regcache.passes.register_nodes import Writer, check_blocks, over_batch
from regcache.passes.token_positions import Positions, between, find_positions, leaving
from regcache.passes.walk import consumers

Floats = NDArray[np.float32]


@dataclass(frozen=True)
class SpliceRegisterTokens:
    """Append R tokens to the hidden state at block `start`, slice them out at block `end`.

    `tokens`: float32 [R, width]. They stand behind all others, where they move no class token and
    no patch; attention does not care for order, and rotary tables grow by the identity. `end` may
    be the number of blocks: the slice then stands after the last. R = 0 leaves the graph alone.

    Refused with InputError: token registers in the same graph already, deleted sinks between
    `start` and `end`, hidden states or attention between the two that leave the encoder, positions
    that are not understood (see find_positions).
    """

    start: int
    end: int
    tokens: Floats
    name: ClassVar[str] = "splice_register_tokens"
    parity: ClassVar[Parity] = Lossy()

    @property
    def count(self) -> int:
        """R, the number of registers."""
        return len(self.tokens)

    def requires(self, graph: gs.Graph) -> None:
        """A readable encoder whose width the tokens fit."""
        view = view_encoder(graph)
        check_blocks(self.start, self.end, len(view.blocks))
        if self.tokens.ndim != 2 or self.tokens.shape[1] != view.width:
            raise InputError(
                f"registers: tokens {self.tokens.shape} do not fit a width of {view.width}"
            )
        if not np.isfinite(self.tokens).all():
            raise InputError("registers: tokens must be finite")
        if any(node.name.startswith(TOKENS) for node in graph.nodes):
            raise InputError("registers: the graph has register tokens already")
        region = _region(view, self.start, self.end)
        if any(of_registers(node.name) and "/delete/" in node.name for node in region):
            raise InputError("registers: sinks are deleted between these blocks")
        blocks = view.blocks[self.start : self.end]
        left = leaving(graph, region, blocks[-1].output)
        if left is not None:
            index = next((block.index for block in blocks if left is block.output), None)
            what = repr(left.name) if index is None else f"the output of block {index}"
            raise InputError(f"registers: {what} leaves the encoder")
        find_positions(region, view)

    def rewrite(self, graph: gs.Graph) -> Log:
        """Insert the Concat and the Slice, and lengthen rotary tables between them."""
        if self.count == 0:
            return Log()
        view = view_encoder(graph)
        region = _region(view, self.start, self.end)
        _lengthen(find_positions(region, view), self.count)
        inside = {id(node) for node in region}
        stream, last = view.blocks[self.start].input, view.blocks[self.end - 1].output
        write = Writer(graph, "token")
        registers = over_batch(graph, self.tokens[None].astype(np.float32), "token/registers")
        joined = write.node("Concat", "concat", [stream, registers], axis=1)
        for node in [node for node in consumers(stream) if id(node) in inside]:
            node.inputs = [joined if item is stream else item for item in node.inputs]
        readers = list(last.outputs)
        kept = write.slice("slice", last, 0, -self.count)
        for node in readers:
            node.inputs = [kept if item is last else item for item in node.inputs]
        graph.outputs = [kept if item is last else item for item in graph.outputs]
        return Log((Edit(f"blocks.{self.start}:{self.end}", f"{self.count} register tokens"),))

    def ensures(self, before: gs.Graph, after: gs.Graph) -> None:
        """The outputs' shapes as they were."""
        for old, new in zip(before.outputs, after.outputs, strict=True):
            assert old.shape[1:] == new.shape[1:]


def _region(view: EncoderView, start: int, end: int) -> list[gs.Node]:
    return between(view, view.blocks[start].input, view.blocks[end - 1].output)


def _lengthen(positions: Positions, count: int) -> None:
    """Make room for `count` tokens behind the others, without rotation."""
    for place in positions.splits:
        *first, last = place.sizes
        name = f"{TOKENS}{place.node.name}/sizes"
        place.node.inputs[1] = gs.Constant(name, np.array([*first, last + count], dtype=np.int64))
    for table in positions.tables:
        values = table.table.values
        shape = (*values.shape[:-2], count, values.shape[-1])
        identity = np.full(shape, 0.0 if table.sine else 1.0, dtype=values.dtype)
        name = f"{TOKENS}{table.node.name}/table"
        table.node.inputs[table.slot] = gs.Constant(
            name, np.concatenate([values, identity], axis=-2)
        )
