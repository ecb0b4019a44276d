"""What registers and deletion do, each alone and both: the columns of the paper's ablation."""

from typing import Literal

import numpy as np
from numpy.typing import NDArray

from regcache.compiler.curation.decision import measure_improvement
from regcache.compiler.curation.held_out import HeldOut
from regcache.compiler.curation.parts import run_named
from regcache.compiler.curation.record import AblationRecord
from regcache.compiler.curation.search import Search
from regcache.compiler.curation.setting import Setting, place_registers
from regcache.compiler.curation.workbench import Workbench
from regcache.passes.errors import InputError
from regcache.passes.find_blocks import view_encoder

Floats = NDArray[np.float32]
Part = Literal["naive", "registers", "deletion", "both"]


def ablate(
    workbench: Workbench, search: Search, best: Setting, held_out: HeldOut
) -> list[AblationRecord]:
    """Measure the parts of the best setting on the images to decide, and none of them.

    A part that the best setting lacks is the best of that kind that the search tried; where it
    tried none, the rows that need it are missing.
    """
    parts = _parts(search, best)
    settings = {setting: search.registers(setting) for setting in parts.values()}
    found = held_out.measure(settings)
    without = found[parts["naive"]].errors
    rows = []
    for part, setting in parts.items():
        result, improvement = found[setting], None
        if result.errors and setting.changes:
            seed = workbench.study.seed
            improvement = measure_improvement(without, result.errors, seed)
        rows.append(
            AblationRecord(
                part=part,
                setting=setting,
                error=result.mean if result.errors else None,
                largest_norm=_largest_norm(workbench, setting, settings[setting], search.sensitive),
                improvement=improvement,
                refused=result.refused,
            )
        )
    return rows


def _parts(search: Search, best: Setting) -> dict[Part, Setting]:
    registers = best if best.count else search.best(lambda one: one.count > 0)
    deletion = best if best.delete_count else search.best(lambda one: one.delete_count > 0)
    parts: dict[Part, Setting] = {"naive": Setting()}
    alone = {"delete_at": 0, "delete_count": 0}
    if registers is not None:
        parts["registers"] = registers.model_copy(update=alone)
    if deletion is not None:
        at = {"delete_at": deletion.delete_at, "delete_count": deletion.delete_count}
        parts["deletion"] = Setting().model_copy(update=at)
        if registers is not None:
            parts["both"] = registers.model_copy(update=at)
    return parts


def _largest_norm(
    workbench: Workbench, setting: Setting, tokens: Floats, sensitive: int
) -> float | None:
    """What the next block reads, in float, registers that run along as tokens left out."""
    try:
        graph, _ = place_registers(workbench.graph, workbench.view, setting, tokens)
    except InputError:
        return None
    blocks, behind = view_encoder(graph).blocks, sensitive + 1
    name = blocks[behind].input.name if behind < len(blocks) else blocks[-1].output.name
    images, study = workbench.study.images.decide, workbench.study
    (found,) = run_named(graph, [name], [images], workbench.batch, workbench.at_once, study.device)
    deleted = setting.delete_count if setting.delete_at <= behind else 0
    own = workbench.fit[behind].shape[1] - deleted  # registers stand behind these
    return float(np.abs(workbench.in_own_channels(found[name][:, :own], behind)).max())
