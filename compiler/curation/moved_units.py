"""Test-time registers (arXiv 2506.08010), a rival: the hidden units that make the sinks."""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from regcache.compiler.calibration.graph_session import open_graph, stream_tokens
from regcache.compiler.curation.candidates import EARLIER
from regcache.compiler.curation.search import Search
from regcache.compiler.curation.setting import Setting
from regcache.compiler.curation.workbench import Workbench
from regcache.passes.cut_graph import cut_graph
from regcache.passes.move_hidden import activation_of

Floats = NDArray[np.float32]

# Sinks are tokens whose norm is above the mean by so many deviations (arXiv 2506.08010).
_DEVIATIONS = 3
# Units count whose mean activation on sinks is so many times what they hold elsewhere.
_EXACTLY = 8.0
# How many units are moved together, those that are largest on sinks first.
_SETS = (1, 3, 10)


class _Unit(NamedTuple):
    """A hidden unit, and its mean activation on sinks."""

    held: float
    block: int
    unit: int


def try_moved_units(workbench: Workbench, search: Search, sensitive: int) -> Setting:
    """The best setting of a search, once it has tried to move the units that make the sinks."""
    if not search.token_mode:
        return search.best() or Setting()
    units = find_units(workbench, sensitive)
    sets = [units[:count] for count in _SETS if count == 1 or len(units) >= count]
    return search.also([Setting(moved=tuple(sorted(chosen))) for chosen in sets if chosen])


def find_units(workbench: Workbench, sensitive: int) -> list[tuple[int, int]]:
    """Hidden units, as (block, unit), that are large exactly on sinks, the largest first.

    Sinks are the patches of the `fit` images that stand out after the sensitive block, in norm;
    units are of that block and up to EARLIER before it.
    """
    sinks = _sinks(workbench, sensitive)
    if not sinks.any():
        return []
    found = list[_Unit]()
    last = min(sensitive, workbench.depth - 2)  # what is moved in the last block reaches no other
    for block in range(max(sensitive - EARLIER, 0), last + 1):
        found += _units_of(workbench, block, sinks)
    return [(one.block, one.unit) for one in sorted(found, reverse=True)[: max(_SETS)]]


def _sinks(workbench: Workbench, sensitive: int) -> NDArray[np.bool_]:
    """Which tokens are sinks [N, T]; those in front of the patches never are."""
    at, prefix = sensitive + 1, workbench.view.prefix_tokens or 0
    hidden = workbench.in_own_channels(workbench.fit[at], at)
    norms = np.abs(hidden).max(axis=-1)
    patches = norms[:, prefix:]
    sinks: NDArray[np.bool_] = norms > patches.mean() + _DEVIATIONS * patches.std()
    sinks[:, :prefix] = False
    return sinks


def _units_of(workbench: Workbench, block: int, sinks: NDArray[np.bool_]) -> list[_Unit]:
    """The units of one block that are large on sinks alone."""
    name = activation_of(workbench.view.blocks[block]).name
    graph = cut_graph(workbench.graph, workbench.streams[block], [name])
    on_sinks, elsewhere = np.zeros(1), np.zeros(1)
    with open_graph(graph, threads=1, brief=True, device=workbench.study.device) as session:
        runs = stream_tokens(session, workbench.fit[block], workbench.at_once)
        start = 0
        for (hidden,) in runs:
            there = sinks[start : start + len(hidden)]
            start += len(hidden)
            on_sinks = on_sinks + hidden[there].sum(axis=0, dtype=np.float64)
            elsewhere = elsewhere + np.abs(hidden[~there]).sum(axis=0, dtype=np.float64)
    held = on_sinks / sinks.sum()
    usual = elsewhere / (~sinks).sum()
    chosen = np.flatnonzero(held > _EXACTLY * usual)
    return [_Unit(float(held[unit]), block, int(unit)) for unit in chosen]
