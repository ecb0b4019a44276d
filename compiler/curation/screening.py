"""Screens: how far registers narrow the ranges at the sensitive layers, in float."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from regcache.compiler.calibration.graph_session import open_graph, stream
from regcache.compiler.curation.workbench import HeldStudy
from regcache.passes.base import run
from regcache.passes.cut_graph import cut_graph
from regcache.passes.errors import InputError
from regcache.passes.rotated_stream import as_stream
from regcache.passes.splice_registers import SpliceRegisters

Floats = NDArray[np.float32]
Ranges = dict[str, float]


@dataclass(frozen=True)
class Screen:
    """Registers [R, width] to screen: their keys and values are added in blocks [start, end)."""

    tokens: Floats
    start: int
    end: int


def screened_ranges(held: HeldStudy, screen: Screen) -> Ranges:
    """The width of the range of every activation of blocks [start, end), by the site's name.

    In float, on the first of the `fit` images, with registers in mode kv, whichever mode ships.
    Empty where a pass refuses the registers.
    """
    workbench, study = held.workbench(), held.study
    start, end = screen.start, screen.end
    sites = workbench.sites(start, end)
    names = [site.name for site in sites]
    # Whole blocks, which the pass can read.
    ends = [*(site.tensor.name for site in sites), workbench.streams[end]]
    segment = workbench.kept(
        ("segment", start, end), lambda: cut_graph(workbench.graph, workbench.streams[start], ends)
    )
    if len(screen.tokens):
        try:
            tokens = as_stream(workbench.graph, screen.tokens)
            keys, values = workbench.capture(start, end).operands(tokens)
            segment = run(SpliceRegisters(0, end - start, keys, values), segment).graph
        except InputError:
            return {}
    low, high = dict.fromkeys(names, 0.0), dict.fromkeys(names, 0.0)
    session = open_graph(segment, threads=1, brief=True, device=study.device)
    few = workbench.fit[start][: study.screening_images]
    for outputs in stream(session, few, workbench.batch, workbench.at_once):
        for name, output in zip(names, outputs, strict=False):
            low[name] = min(low[name], float(output.min()))
            high[name] = max(high[name], float(output.max()))
    return {name: high[name] - low[name] for name in names}


def predicted_damage(damage: Mapping[str, float], plain: Ranges, ranges: Ranges) -> float:
    """The damage to expect of layers whose ranges went from `plain` to `ranges`.

    The error of rounding grows with the square of the step, which is in proportion to the range.
    """
    return sum(
        damage[name] * (width / plain[name]) ** 2
        for name, width in ranges.items()
        if plain[name] > 0
    )
