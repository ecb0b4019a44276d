"""One way to place registers and to delete sinks, and how a graph gets it."""

from itertools import pairwise
from typing import Literal

import numpy as np
import onnx_graphsurgeon as gs
from numpy.typing import NDArray

from regcache.compiler.curation.registers import capture_registers
from regcache.compiler.job.record import Record
from regcache.passes.base import Pass, PassRun, run_all
from regcache.passes.bound_hidden import BoundHidden
from regcache.passes.delete_sinks import DeleteSinks
from regcache.passes.encoder import EncoderView
from regcache.passes.move_hidden import MoveHidden
from regcache.passes.rotated_stream import as_stream
from regcache.passes.splice_register_tokens import SpliceRegisterTokens
from regcache.passes.splice_registers import SpliceRegisters

Floats = NDArray[np.float32]
Mode = Literal["kv", "token"]


class Setting(Record):
    """Where registers are put and how many sinks are deleted; by default R = 0 and no deletion."""

    candidates: tuple[int, ...] = ()
    """The registers, as numbers of candidates from 0; one may come several times."""
    start: int = 0
    """The first block that has the registers."""
    end: int = 0
    """The first block that no longer has them."""
    mode: Mode = "kv"
    """How they are put there: in K and V (`kv`), or as tokens that run along (`token`)."""
    anew: tuple[int, ...] = ()
    """Further blocks between `start` and `end`, ascending, at whose input the registers are
    inserted afresh in mode kv: what blocks made of them until there is left behind."""
    delete_at: int = 0
    """The block at whose input sinks are deleted."""
    delete_count: int = 0
    """How many patches of largest norm are deleted there, in each image."""
    bounded: bool = False
    """Whether what fc1 computes is clipped where its activation is zero anyway (BoundHidden)."""
    moved: tuple[tuple[int, int], ...] = ()
    """Hidden units, as block and unit from 0, whose largest activation moves to an added token
    (MoveHidden)."""

    @property
    def count(self) -> int:
        """R, the number of registers."""
        return len(self.candidates)

    @property
    def carried(self) -> int:
        """How many registers a model carries: R, and the token that units are moved to."""
        return self.count + bool(self.moved)

    @property
    def changes(self) -> bool:
        """Whether the setting changes the encoder at all."""
        return bool(self.candidates or self.delete_count or self.bounded or self.moved)

    def first_block(self, depth: int) -> int:
        """The first block that runs differently; `depth` where none does."""
        starts = [self.start] if self.candidates else []
        starts += [self.delete_at] if self.delete_count else []
        starts += [0] if self.bounded else []
        starts += [block for block, _ in self.moved]
        return min(starts, default=depth)

    def key(self) -> str:
        """One line of text that tells settings apart."""
        return self.model_dump_json()

    def __str__(self) -> str:
        parts = []
        if self.candidates:
            anew = f", anew at {', '.join(map(str, self.anew))}" if self.anew else ""
            span = f"[{self.start}, {self.end})"
            parts.append(f"R = {self.count} ({self.mode}) in blocks {span}{anew}")
        if self.delete_count:
            parts.append(f"{self.delete_count} sinks deleted at block {self.delete_at}")
        if self.moved:
            blocks = sorted({block for block, _ in self.moved})
            units = f"{len(self.moved)} hidden unit{'s' * (len(self.moved) > 1)}"
            named = f"block{'s' * (len(blocks) > 1)} {', '.join(map(str, blocks))}"
            parts.append(f"{units} of {named} moved to a token")
        if self.bounded:
            parts.append("fc1 bounded below")
        return " and ".join(parts) or "R = 0"


def place_registers(
    graph: gs.Graph, view: EncoderView, setting: Setting, tokens: Floats
) -> tuple[gs.Graph, list[PassRun]]:
    """The graph with `setting`, and what each pass did. `tokens`: the registers [R, width].

    They are not rotated, whether or not the graph's stream is. `view` is of `graph`, in float: it
    gives the registers' keys and values in mode kv. Raises InputError where a pass refuses the
    graph.
    """
    steps: list[Pass] = []
    if setting.delete_count:
        steps.append(DeleteSinks(setting.delete_at, setting.delete_count))
    if setting.candidates:
        steps += _splices(view, setting, as_stream(view.graph, tokens))
    if setting.moved:
        first, token = min(setting.moved)[0], np.zeros((1, view.width), np.float32)
        steps += [SpliceRegisterTokens(first, len(view.blocks), token), MoveHidden(setting.moved)]
    if setting.bounded:
        steps.append(BoundHidden())
    return run_all(steps, graph)


def _splices(view: EncoderView, setting: Setting, tokens: Floats) -> list[Pass]:
    """A pass for each insertion. `tokens`: as the graph's stream holds them."""
    if setting.mode == "token":
        return [SpliceRegisterTokens(setting.start, setting.end, tokens)]
    spans = pairwise((setting.start, *setting.anew, setting.end))
    return [SpliceRegisters(*span, *capture_registers(view, *span, tokens)) for span in spans]
