"""What another library's quantizer gets to choose from at the end of a search."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, cast

import numpy as np
import pytest

from regcache.compiler.curation.called_libraries import NNCF, ORT
from regcache.compiler.curation.candidates import Candidate
from regcache.compiler.curation.held_out import HeldOut
from regcache.compiler.curation.other_quantizer import OtherQuantizer
from regcache.compiler.curation.rivals import choose
from regcache.compiler.curation.search import Search, SearchTasks
from regcache.compiler.curation.setting import Setting
from regcache.compiler.curation.trial import TrialResult

BEST = Setting(candidates=(0,), start=1, end=3)
TOKENS = BEST.model_copy(update={"mode": "token"})
OTHERS = Setting(candidates=(1,), start=1, end=3)
WORSE = Setting(delete_at=1, delete_count=1)
CANDIDATES = [Candidate(np.full(4, index, np.float32), 1, 1.0, 1) for index in range(2)]


def bounded(setting: Setting) -> Setting:
    return setting.model_copy(update={"bounded": True})


def searched() -> Search:
    search = Search(cast("SearchTasks", None), CANDIDATES, {}, 1, 3)
    errors = {BEST: 0.1, OTHERS: 0.2, WORSE: 0.3}
    search.tried = {setting: TrialResult((error,)) for setting, error in errors.items()}
    return search


@dataclass(frozen=True)
class Known:
    """A quantizer of which that is known."""

    rounds_outputs: bool | None


@dataclass
class Held:
    """Makes of each setting the error that it is told, and notes what was asked, in order.

    `idle`: whether no image reaches a bound, so that a setting with one is the one without.
    """

    other: Known | None
    errors: Mapping[Setting, float]
    idle: bool = False
    asked: list[dict[Setting, list[float]]] = field(default_factory=list)
    ranked: dict[Setting, TrialResult] = field(default_factory=dict)

    def best(self, settings: Mapping[Setting, Any]) -> Setting:
        self.asked.append({one: tokens[:, 0].tolist() for one, tokens in settings.items()})
        for setting in (Setting(), *settings):
            known = setting.model_copy(update={"bounded": False}) if self.idle else setting
            self.ranked[known] = TrialResult((self.errors.get(known, 1.0),))
        return min(self.ranked, key=lambda setting: self.ranked[setting].mean)


def offered(held: Held) -> list[dict[Setting, list[float]]]:
    """The first number of the registers of each setting that is offered, each time."""
    chosen = choose(searched(), BEST, cast("HeldOut", held))
    assert chosen == (
        min(held.ranked, key=lambda one: held.ranked[one].mean) if held.ranked else BEST
    )
    return held.asked


PLAIN = {BEST: [0], TOKENS: [0], OTHERS: [1]}
BOUNDED = {bounded(BEST): [0], bounded(OTHERS): [1], bounded(Setting()): []}


@pytest.mark.parametrize(
    ("other", "expected"),
    [(None, []), (NNCF, [PLAIN]), (ORT, [BOUNDED])],
    ids=["ours", "rounds inputs", "rounds outputs"],
)
def test_what_it_chooses_from(
    other: OtherQuantizer | None, expected: list[dict[Setting, list[float]]]
) -> None:
    assert offered(Held(cast("Known | None", other), {})) == expected


@pytest.mark.parametrize(
    ("with_bound", "idle", "expected"),
    [(0.1, False, BOUNDED), (0.3, False, PLAIN), (0.2, False, PLAIN), (0.1, True, PLAIN)],
    ids=["a bound helps", "it harms", "it does nothing", "no image reaches it"],
)
def test_where_nobody_knows_whether_outputs_are_rounded(
    with_bound: float, idle: bool, expected: dict[Setting, list[float]]
) -> None:
    """The best setting with and without a bound tells, whatever R = 0 does."""
    errors = {Setting(): 0.01, BEST: 0.2, bounded(BEST): with_bound}
    first = {BEST: [0.0], bounded(BEST): [0.0]}
    assert offered(Held(Known(None), errors, idle)) == [first, expected]
