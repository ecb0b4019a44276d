"""What another library's quantizer gets to choose from at the end of a search."""

from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest

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


def searched() -> Search:
    search = Search(cast("SearchTasks", None), CANDIDATES, {}, 1, 3)
    errors = {BEST: 0.1, OTHERS: 0.2, WORSE: 0.3}
    search.tried = {setting: TrialResult((error,)) for setting, error in errors.items()}
    return search


def offered(other: OtherQuantizer | None) -> dict[Setting, list[float]]:
    """The first number of the registers of each setting that is offered; the last one is taken."""
    found = dict[Setting, list[float]]()

    def best(settings: Mapping[Setting, Any]) -> Setting:
        found.update((setting, tokens[:, 0].tolist()) for setting, tokens in settings.items())
        return list(settings)[-1]

    held_out = cast("HeldOut", SimpleNamespace(other=other, best=best))
    chosen = choose(searched(), BEST, held_out)
    assert chosen == (list(found)[-1] if found else BEST)
    return found


@pytest.mark.parametrize(
    ("other", "expected"),
    [
        (None, {}),
        (OtherQuantizer.NNCF, {BEST: [0], TOKENS: [0], OTHERS: [1]}),
        (
            OtherQuantizer.ORT,
            {
                BEST.model_copy(update={"bounded": True}): [0],
                OTHERS.model_copy(update={"bounded": True}): [1],
                Setting(bounded=True): [],
            },
        ),
    ],
)
def test_what_it_chooses_from(
    other: OtherQuantizer | None, expected: dict[Setting, list[float]]
) -> None:
    assert offered(other) == expected
