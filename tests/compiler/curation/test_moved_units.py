"""Test-time registers as a rival: which hidden units make the sinks, and when they are tried."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx
import pytest
from support.sinking import BLOCK, SPEC, write_sinking
from support.workbench_cases import QUANTIZERS

from regcache.compiler.curation.moved_units import find_units, try_moved_units
from regcache.compiler.curation.search import Search
from regcache.compiler.curation.setting import Setting
from regcache.compiler.curation.study import ReferenceImages, Study
from regcache.compiler.curation.trial import Trial, TrialResult, decide_setting
from regcache.compiler.curation.workbench import HeldStudy
from regcache.passes.canonicalize import canonicalize


@pytest.fixture(scope="module")
def held(tmp_path_factory: pytest.TempPathFactory) -> HeldStudy:
    """A search for the encoder with one sink, which one unit of one block fires on."""
    model = onnx.load(write_sinking(tmp_path_factory.mktemp("sinking") / "tiny.onnx"))
    shape = (20, 3, SPEC.size, SPEC.size)
    images = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    quantizer = QUANTIZERS["s8s8 min-max"]
    return HeldStudy(Study.of(canonicalize(model), ReferenceImages.deal(images), quantizer))


def test_the_unit_that_fires_on_sinks_is_found(held: HeldStudy) -> None:
    assert find_units(held.workbench(), BLOCK)[0] == (BLOCK, 0)


def test_units_of_the_last_block_are_not_looked_at(held: HeldStudy) -> None:
    workbench = held.workbench()
    found = find_units(workbench, workbench.depth - 1)
    assert found
    assert max(block for block, _ in found) < workbench.depth - 1


def test_without_sinks_there_are_none(held: HeldStudy, monkeypatch: pytest.MonkeyPatch) -> None:
    workbench = held.workbench()
    flat = [np.ones_like(states) for states in workbench.fit]
    monkeypatch.setattr(workbench, "fit", flat)
    assert find_units(workbench, BLOCK) == []


def test_moving_it_lowers_the_error(held: HeldStudy) -> None:
    none = np.zeros((0, SPEC.width), np.float32)
    before = decide_setting(held, Trial(Setting(), none))
    after = decide_setting(held, Trial(Setting(moved=((BLOCK, 0),)), none))
    assert after.refused is None
    assert after.mean < before.mean / 4


class _Search(Search):
    """A search that notes what it tries; moved units are best."""

    def _try(self, settings: list[Setting]) -> None:
        self.tried |= {one: TrialResult((0.1 if one.moved else 0.2,)) for one in settings}


def searching(workbench: Any, damage: Mapping[str, float] | None = None, **more: Any) -> _Search:
    shared: Any = (None, [], damage or {}, BLOCK, workbench.depth)
    found = _Search(*shared, **more)
    found._try([Setting(delete_count=1)])
    return found


def test_sets_of_them_are_tried_at_the_end(held: HeldStudy) -> None:
    search = searching(held.workbench())
    best = try_moved_units(held.workbench(), search, BLOCK)
    moved = [one.moved for one in search.tried if one.moved]
    assert best.moved
    assert moved[0] == ((BLOCK, 0),)
    assert all(set(moved[0]) <= set(units) for units in moved)


@pytest.mark.parametrize(("damaged", "tried"), [("fc2", True), ("fc1", False)])
def test_where_nothing_else_helps_they_are_tried_if_their_range_does_the_damage(
    held: HeldStudy, damaged: str, tried: bool
) -> None:
    sites = held.workbench().view.sites
    (worst,) = (one.name for one in sites if one.block == BLOCK and one.name.endswith(damaged))
    damage = {one.name: float(one.name == worst) for one in sites}
    search = searching(held.workbench(), damage)
    best = try_moved_units(held.workbench(), search, BLOCK, surely=False)
    assert bool(best.moved) == tried
    assert any(one.moved for one in search.tried) == tried


def test_another_library_is_given_no_token(held: HeldStudy) -> None:
    search = searching(held.workbench(), token_mode=False)
    assert try_moved_units(held.workbench(), search, BLOCK) == Setting(delete_count=1)
    assert len(search.tried) == 1
