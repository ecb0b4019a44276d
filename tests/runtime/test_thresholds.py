"""Thresholds: what a file may say, and what is held against them."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from regcache.passes.errors import InputError
from regcache.runtime.thresholds import Check, Thresholds, finite_check

MEASURED = {
    "cosine_mean": 0.999,
    "cosine_min": 0.98,
    "sqnr_db": 30.0,
    "nn_agreement": 0.9,
    "patch_cosine_mean": 0.99,
    "top1_agreement": 0.97,
    "knn_top1_drop": 0.01,
}


def read(folder: Path, text: str) -> Thresholds:
    file = folder / "thresholds.toml"
    file.write_text(text)
    return Thresholds.read(file)


def test_reads_what_a_file_sets(tmp_path: Path) -> None:
    found = read(tmp_path, "cosine_min = 0.98\nknn_top1_drop = 0.005  # half a point\nsqnr_db = 25")
    assert found == Thresholds(cosine_min=0.98, knn_top1_drop=0.005, sqnr_db=25)
    assert found.cosine_mean == 0.995
    assert read(tmp_path, "") == Thresholds()


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("cosine_min = 1.5", "cosine_min: Input should be less than or equal to 1"),
        ("cosine_min = nan", "cosine_min: "),
        ('cosine_min = "high"', "cosine_min: Input should be a valid number"),
        ("cosine = 0.9", "cosine: no such threshold; there are cosine_mean"),
        ("cosine_min = ", "is no TOML"),
    ],
)
def test_refuses_what_it_does_not_understand(tmp_path: Path, text: str, complaint: str) -> None:
    with pytest.raises(InputError, match=complaint) as refused:
        read(tmp_path, text)
    assert "thresholds.toml" in str(refused.value)


def test_refuses_a_file_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="No such file"):
        Thresholds.read(tmp_path / "none.toml")
    (tmp_path / "binary.toml").write_bytes(b"\xff\xfe")
    with pytest.raises(InputError, match="is no TOML"):
        Thresholds.read(tmp_path / "binary.toml")


def test_every_threshold_can_fail_and_pass() -> None:
    kept = Thresholds.of({**MEASURED, "block_cosine_mean": 0.9})
    blocks = [("blocks.0", 0.95), ("blocks.1", 0.9)]
    assert all(check.passed for check in kept.check(MEASURED, blocks))
    for name, value in MEASURED.items():
        worse = value + 0.001 if name == "knn_top1_drop" else value - 0.001
        failed = [c for c in kept.check({**MEASURED, name: worse}, blocks) if not c.passed]
        assert [check.name for check in failed] == [name]
    failed = [c for c in kept.check(MEASURED, [*blocks, ("blocks.2", 0.8)]) if not c.passed]
    assert [check.name for check in failed] == ["blocks.2 cosine_mean"]


def test_what_is_not_asked_for_is_not_held_against() -> None:
    awful = {**MEASURED, "cosine_min": -1.0, "nn_agreement": 0.0}
    assert [check.name for check in Thresholds().check(awful, [])] == ["cosine_mean"]


@pytest.mark.parametrize(
    ("limit", "advice"),
    [
        ("patch_cosine_mean", "no output with a row for every patch"),
        ("top1_agreement", "not known to be class scores: add --class-scores if it is"),
        ("knn_top1_drop", "--gallery"),
        ("block_cosine_mean", "--per-layer"),
    ],
)
def test_a_threshold_of_something_not_measured_is_an_error(limit: str, advice: str) -> None:
    measured = {**MEASURED, limit: None}
    with pytest.raises(InputError, match=advice):
        Thresholds.of({limit: 0.5}).check(measured, [])


def test_what_the_options_leave_out_is_known_ahead() -> None:
    kept = Thresholds.of({"knn_top1_drop": 0.1, "block_cosine_mean": 0.9})
    kept.ask_for(knn=True, blocks=True)
    Thresholds().ask_for(knn=False, blocks=False)
    with pytest.raises(InputError, match="knn_top1_drop: not measured: add --gallery"):
        kept.ask_for(knn=False, blocks=True)
    with pytest.raises(InputError, match="block_cosine_mean: not measured: add --per-layer"):
        kept.ask_for(knn=True, blocks=False)
    with pytest.raises(InputError, match=r"top1_agreement: not measured: .* --class-scores"):
        Thresholds.of({"top1_agreement": 0.9}).ask_for(knn=True, blocks=True, scores=False)


@given(value=st.floats(-1, 1), limit=st.floats(-1, 1))
def test_a_check_says_what_it_found(value: float, limit: float) -> None:
    least = Check(name="a", value=value, bound="at least", limit=limit)
    most = Check(name="a", value=value, bound="at most", limit=limit)
    assert least.passed == (value >= limit)
    assert most.passed == (value <= limit)
    assert ("below" in least.describe()) != least.passed
    assert ("above" in most.describe()) != most.passed


def test_no_image_may_be_infinite() -> None:
    assert finite_check(0).passed
    assert not finite_check(1).passed
