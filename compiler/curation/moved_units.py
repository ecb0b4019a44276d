"""Test-time registers (arXiv 2506.08010), a rival: the hidden units that make the sinks."""

from collections.abc import Iterator, Mapping
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from regcache.compiler.calibration.graph_session import open_graph, stream_tokens
from regcache.compiler.curation.candidates import EARLIER
from regcache.compiler.curation.screening import predicted_damage
from regcache.compiler.curation.search import Search
from regcache.compiler.curation.setting import Setting
from regcache.compiler.curation.workbench import Workbench
from regcache.passes.cut_graph import cut_graph
from regcache.passes.move_hidden import activation_of

Floats = NDArray[np.float32]
_Reach = tuple[Floats, Floats]

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


def try_moved_units(
    workbench: Workbench, search: Search, sensitive: int, *, surely: bool = True
) -> Setting:
    """The best setting of a search, once it has tried to move the units that make the sinks.

    Unless `surely`, only where the ranges that are left promise something.
    """
    if not search.token_mode:
        return search.best() or Setting()
    units = find_units(workbench, sensitive)
    sets = [units[:count] for count in _SETS if units and (count == 1 or len(units) >= count)]
    if not surely:
        reach = {block: _reach(workbench, block) for block in sorted({at for at, _ in units})}
        changes = [_change(workbench, search, reach, chosen) for chosen in sets]
        sets = [one for one, change in zip(sets, changes, strict=True) if search.promises(change)]
    return search.also([Setting(moved=tuple(sorted(chosen))) for chosen in sets])


def _change(
    workbench: Workbench, search: Search, reach: Mapping[int, _Reach], units: list[tuple[int, int]]
) -> float:
    """The change of damage to expect where units are moved; negative is better.

    `reach`: of the hidden units, by block.
    """
    plain, left = dict[str, float](), dict[str, float]()
    for block in sorted({block for block, _ in units}):
        moved = [unit for at, unit in units if at == block]
        name = activation_of(workbench.view.blocks[block]).name
        for site in workbench.sites(block, block + 1):
            if site.tensor.name == name:
                low, high = reach[block]
                plain[site.name] = float(high.max() - low.min())
                low, high = np.delete(low, moved), np.delete(high, moved)
                left[site.name] = float(high.max() - low.min())
    return predicted_damage(search.damage, plain, left) - sum(map(search.damage.__getitem__, plain))


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


def _activations(workbench: Workbench, block: int) -> Iterator[Floats]:
    """The hidden activations [n, T, units] of one block, some of the `fit` images at a time."""
    name = activation_of(workbench.view.blocks[block]).name
    graph = cut_graph(workbench.graph, workbench.streams[block], [name])
    with open_graph(graph, threads=1, brief=True, device=workbench.study.device) as session:
        for (hidden,) in stream_tokens(session, workbench.fit[block], workbench.at_once):
            yield hidden


def _reach(workbench: Workbench, block: int) -> _Reach:
    """The least and the largest activation of each hidden unit of one block."""
    ends = [(part.min((0, 1)), part.max((0, 1))) for part in _activations(workbench, block)]
    low, high = zip(*ends, strict=True)
    return np.min(low, axis=0), np.max(high, axis=0)


def _units_of(workbench: Workbench, block: int, sinks: NDArray[np.bool_]) -> list[_Unit]:
    """The units of one block that are large on sinks alone."""
    on_sinks, elsewhere = np.zeros(1), np.zeros(1)
    start = 0
    for hidden in _activations(workbench, block):
        there = sinks[start : start + len(hidden)]
        start += len(hidden)
        on_sinks = on_sinks + hidden[there].sum(axis=0, dtype=np.float64)
        elsewhere = elsewhere + np.abs(hidden[~there]).sum(axis=0, dtype=np.float64)
    held = on_sinks / sinks.sum()
    usual = elsewhere / (~sinks).sum()
    chosen = np.flatnonzero(held > _EXACTLY * usual)
    return [_Unit(float(held[unit]), block, int(unit)) for unit in chosen]
