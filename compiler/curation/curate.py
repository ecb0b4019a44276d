"""Curate: find the most sensitive block, search settings, and decide on unseen images."""

import math
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from regcache.compiler.curation.ablation import ablate
from regcache.compiler.curation.candidates import find_candidates, usual_outliers
from regcache.compiler.curation.decision import Improvement
from regcache.compiler.curation.held_out import HeldOut
from regcache.compiler.curation.journal import Journal
from regcache.compiler.curation.moved_units import try_moved_units
from regcache.compiler.curation.other_quantizer import OtherQuantizer
from regcache.compiler.curation.record import (
    CandidateRecord,
    CurationRecord,
    SensitivityRecord,
    TriedRecord,
    UniversalityRecord,
)
from regcache.compiler.curation.rivals import choose
from regcache.compiler.curation.search import Search, SearchTasks
from regcache.compiler.curation.sensitivity import BlockDamage, block_damage, site_damages
from regcache.compiler.curation.setting import Setting
from regcache.compiler.curation.site_records import norms_record, sensitivity_records
from regcache.compiler.curation.study import Study
from regcache.compiler.curation.trial import TrialResult
from regcache.compiler.curation.workbench import HeldStudy, Workbench
from regcache.compiler.job.context import SearchOptions
from regcache.compiler.reporter import Reporter
from regcache.compiler.workers.open_workers import open_workers
from regcache.passes.cut_graph import needed_before
from regcache.passes.errors import InputError
from regcache.passes.onnx_file import constant_bytes
from regcache.runtime.session import LARGE, available_cpus

Floats = NDArray[np.float32]

# A smaller share of the error is not worth the images that would decide, nor registers' time.
_LEAST_GAIN = 0.02
# Bytes of weights that the sessions of all workers of a large encoder may hold together.
_ROOM = 1_000_000_000


@dataclass(frozen=True)
class Curated:
    """The setting to ship (the default one changes nothing), its registers [R, width], and why.

    `vectors`: every candidate [n, width] where an ablation was asked for, else none.
    """

    setting: Setting
    tokens: Floats
    record: CurationRecord
    vectors: Floats = field(default_factory=lambda: np.zeros((0, 0), np.float32))

    def having(self, setting: Setting) -> "Curated":
        """The same with another setting of the ablation."""
        tokens = self.vectors[list(setting.candidates)]
        return replace(self, setting=setting, tokens=tokens)


class UnsearchableError(InputError):
    """The encoder cannot be cut at its blocks, so that nothing can be searched."""


def curate(
    study: Study,
    where: SearchOptions,
    reporter: Reporter,
    other: OtherQuantizer | None = None,
) -> Curated:
    """Find registers and sink deletion that lower the error of the quantized encoder for certain.

    Every image set of the study needs an image. The search goes on where a killed one with the
    same study stopped. `other`: somebody else's quantizer that has the last word, on the encoder
    without registers and with the best setting. Raises UnsearchableError where the encoder cannot
    be cut at its blocks, InputError where the other quantizer fails.
    """
    with _tasks(study, where, reporter) as (workbench, tasks):
        _check_blocks(workbench)
        held_out = HeldOut(workbench, tasks, other)
        return _curate(workbench, tasks, held_out, reporter, ablates=where.ablate)


def measure_sensitivity(
    study: Study, where: SearchOptions, reporter: Reporter
) -> list[SensitivityRecord]:
    """The damage of each activation alone, without a search; see curate for what is raised."""
    with _tasks(study, where, reporter) as (workbench, tasks):
        damage = _measure_damage(workbench, tasks)
        return sensitivity_records(workbench, damage.sites, damage.alone)


@contextmanager
def _tasks(
    study: Study, where: SearchOptions, reporter: Reporter
) -> Iterator[tuple[Workbench, SearchTasks]]:
    """Yield the study's workbench, and where its tasks run.

    Their journal is removed when the block ends without an error. Raises UnsearchableError where
    the encoder cannot be cut at its blocks.
    """
    held = HeldStudy(study)
    try:
        workbench = held.workbench()
    except InputError as error:
        raise UnsearchableError(str(error)) from error
    deadline = None if where.budget is None else time.monotonic() + where.budget
    count = where.workers or available_cpus()
    size = constant_bytes(study.graph)
    if size >= LARGE:  # every worker holds sessions with most of the weights, and may use all CPUs
        count = min(count, max(1, _ROOM // size))
    with (
        open_workers(where.scheduler, count) as workers,
        Journal(where.journal, study.key) as journal,
    ):
        if len(journal):
            reporter.step(f"going on with a search of {len(journal)} results")
        yield workbench, SearchTasks(workers, workers.share(held), journal, reporter, deadline)
        journal.remove()


def _check_blocks(workbench: Workbench) -> None:
    """Raise UnsearchableError where a block reads more than the hidden state before it."""
    for block, (start, end) in enumerate(pairwise(workbench.streams)):
        needed = needed_before(workbench.graph, start, [end])
        if needed:
            raise UnsearchableError(f"block {block} also needs {needed[0]!r}")


@dataclass(frozen=True)
class _Damage:
    """`blocks`: the damage of each block. `sites`: of each site, by name; `alone`: the names of
    those that were quantized alone to measure it, the others have their part of their block's.
    """

    blocks: list[float]
    sites: dict[str, float]
    alone: frozenset[str]


def _measure_damage(workbench: Workbench, tasks: SearchTasks) -> _Damage:
    """Block by block first, then the sites that stand out one by one."""
    label = "measuring sensitivity"
    every = {str(index): index for index in range(workbench.depth)}
    found = tasks.run(label, block_damage, every, BlockDamage, to_the_end=True)
    sites = {name: part for block in found.values() for name, part in block.sites.items()}
    closer = {str(names): names for names in _to_look_closer_at(workbench, sites)}
    measured = tasks.run(label, site_damages, closer, dict[str, float], to_the_end=True)
    alone = {name: damage for block in measured.values() for name, damage in block.items()}
    workbench.return_memory()
    return _Damage([block.whole for block in found.values()], sites | alone, frozenset(alone))


def _to_look_closer_at(workbench: Workbench, damage: Mapping[str, float]) -> list[list[str]]:
    """The sites of most damage per multiply-accumulate, and the one of most damage, by block.

    Placement keeps the first float, a search sets out from the last.
    """
    sites = workbench.view.sites
    order = sorted(sites, key=lambda site: -damage[site.name] / site.work)
    chosen = order[: math.ceil(workbench.study.sites_alone * len(sites))]
    worst = max(sites, key=lambda site: damage[site.name])
    names = {site.name for site in (*chosen, worst)}
    blocks = dict[int, list[str]]()
    for site in sites:
        if site.name in names:
            blocks.setdefault(site.block, []).append(site.name)
    return list(blocks.values())


def most_sensitive_block(workbench: Workbench, damage: Mapping[str, float]) -> int:
    """l_q: the block of the layer where quantization does the most damage that registers can undo.

    That is the damage of a layer that is quantized alone, times the share of its squared range
    that a few patches hold beyond the median patch. A range that the class token or a channel of
    every token holds stays as it is, whatever registers there are.
    """

    def undone(name: str) -> float:
        norms = workbench.patch_norms[name]
        typical = norms.percentile(50)
        return damage[name] * (1 - (typical / norms.maximum) ** 2) if norms.maximum else 0.0

    blocks = range(workbench.depth)
    names = [[site.name for site in workbench.sites(block, block + 1)] for block in blocks]
    return max(blocks, key=lambda block: max(map(undone, names[block])))


def _curate(
    workbench: Workbench,
    tasks: SearchTasks,
    held_out: HeldOut,
    reporter: Reporter,
    *,
    ablates: bool,
) -> Curated:
    damage = _measure_damage(workbench, tasks)
    sensitive = most_sensitive_block(workbench, damage.sites)
    candidates, universality = find_candidates(workbench, sensitive)
    study = workbench.study
    limits = (study.short_list, study.token_mode, usual_outliers(workbench, sensitive))
    search = Search(tasks, candidates, damage.sites, sensitive, workbench.depth, *limits)
    best, before, improvement = search.run(), float(workbench.baseline.mean()), None
    best = try_moved_units(workbench, search, sensitive, surely=_helps(search, best, before))
    if _helps(search, best, before):
        best = choose(search, best, held_out)
        if best.changes:
            improvement = held_out.improvement(best, search.registers(best))
    setting = best if improvement is not None and improvement.certain else Setting()
    judged = [_tried(one, result) for one, result in held_out.ranked.items()]
    reason = _reason(search, best, before, improvement, judged)
    reporter.step(reason)
    images = study.images
    record = CurationRecord(
        reason=reason,
        setting=setting,
        n_images={
            "fit": len(images.fit),
            "rank": len(images.rank),
            "decide": len(images.decide),
        },
        sensitive_block=sensitive,
        sensitivity=sensitivity_records(workbench, damage.sites, damage.alone),
        block_damage=damage.blocks,
        streams=[norms_record(norms) for norms in workbench.stream_norms],
        universality=UniversalityRecord.model_validate(universality),
        candidates=[CandidateRecord.model_validate(candidate) for candidate in candidates],
        screened=search.screened,
        error_without=before,
        tried=[_tried(setting, result) for setting, result in search.tried.items()],
        judged=judged,
        improvement=improvement,
        ablation=ablate(workbench, search, best, held_out) if ablates else [],
        out_of_time=tasks.over,
    )
    every = Setting(candidates=tuple(range(len(candidates) if ablates else 0)))
    return Curated(setting, search.registers(setting), record, search.registers(every))


def _helps(search: Search, setting: Setting, before: float) -> bool:
    """Whether it is worth the images that decide; `before`: the error without registers."""
    return setting.changes and search.tried[setting].mean < before * (1 - _LEAST_GAIN)


def _reason(
    search: Search,
    best: Setting,
    before: float,
    improvement: Improvement | None,
    judged: list[TriedRecord],
) -> str:
    """In a line for people; the numbers behind it are in the record."""
    if improvement is not None and improvement.certain:
        left = improvement.with_setting / improvement.without
        return f"Registers: {best}; the error falls to {left:.0%}{_unfinished(search)}"
    if improvement is not None:
        low, high = improvement.gain_low, improvement.gain_high
        why = f"it is not certain that they help: the error falls by {low:.1e} to {high:.1e}"
    elif judged and not best.changes:
        without, *others = (one.error for one in judged if one.error is not None)
        least = f"{min(others):.2e} at best" if others else "refused"
        why = f"the quantizer itself does better without: error {without:.2e}, {least} with"
    elif not search.tried:
        why = "nothing was tried"
    elif best not in search.tried:
        why = f"the passes refuse all {len(search.tried)} settings, as the record tells"
    else:
        error = search.tried[best].mean
        helped = "hardly" if error < before else "not"
        why = f"they would {helped} have helped: error {before:.2e} without, {error:.2e} with"
    return f"Registers: none ({why}{_unfinished(search)})"


def _unfinished(search: Search) -> str:
    return "; time ran out" if search.tasks.over else ""


def _tried(setting: Setting, result: TrialResult) -> TriedRecord:
    error = result.mean if result.errors else None
    return TriedRecord(setting=setting, error=error, refused=result.refused)
