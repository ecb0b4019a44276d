"""A trial computes on pieces of an encoder what the whole encoder does, run directly."""

import re

import pytest
from support.spellings import SPELLINGS
from support.workbench_cases import (
    SETTINGS,
    check_trial,
    make_case,
    random_tokens,
)

from regcache.compiler.curation.setting import Setting
from regcache.compiler.curation.trial import Trial, try_setting


@pytest.mark.slow
@pytest.mark.parametrize("name", SETTINGS)
def test_a_trial_is_the_whole_encoder_with_the_setting(name: str) -> None:
    check_trial(make_case(), SETTINGS[name])


@pytest.mark.slow
@pytest.mark.parametrize(("batch", "name"), [(1, "kv"), (3, "deletion, then kv")])
def test_a_trial_where_the_graph_fixes_the_batch(batch: int, name: str) -> None:
    check_trial(make_case(batch=batch), SETTINGS[name])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("quantizer", "name"), [("s8s8 min-max", "token"), ("w4a4", "kv"), ("w4a16", "kv")]
)
def test_a_trial_with_another_quantizer(quantizer: str, name: str) -> None:
    check_trial(make_case(quantizer=quantizer), SETTINGS[name])


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["no prefix, pooled", "merged heads", "attention operator, rank 3"]
)
def test_a_trial_in_other_spellings(name: str) -> None:
    check_trial(make_case(SPELLINGS[name]), Setting(candidates=(0, 1, 2), start=1, end=2))


@pytest.mark.parametrize(
    ("setting", "reason"),
    [
        (Setting(candidates=(0,), start=2, end=2), r"\[2, 2\) is no range within 3 blocks"),
        (Setting(candidates=(0,), start=1, end=4), r"\[1, 4\) is no range within 3 blocks"),
        (Setting(delete_at=0, delete_count=9), "cannot delete 9 of 9 patches"),
        (
            Setting(candidates=(0,), start=0, end=3, mode="token", delete_at=1, delete_count=1),
            "sinks are deleted between these blocks",
        ),
    ],
)
def test_a_refused_setting_is_data(setting: Setting, reason: str) -> None:
    case = make_case()
    result = try_setting(case.held, Trial(setting, random_tokens(case.vit.spec, setting.count)))
    assert re.search(reason, result.refused or "")
    assert result.errors == ()
    assert result.mean == float("inf")
