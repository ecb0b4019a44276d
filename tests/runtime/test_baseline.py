"""A later comparison held against an earlier one."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from regcache.passes.errors import InputError
from regcache.runtime.baseline import Baseline, fingerprint
from regcache.runtime.parity import ParityMeter
from regcache.runtime.parity_result import Compared, ParityResult
from regcache.runtime.thresholds import Check

COMPARED = Compared(source="a.onnx", source_sha256="1" * 64, images_sha256="2" * 64)


def result(**other: Any) -> ParityResult:
    """A comparison of 40 images, with some of its figures replaced."""
    random = np.random.default_rng(0)
    truth = random.standard_normal((40, 8)).astype(np.float32)
    meter = ParityMeter()
    meter.update([truth], [truth + np.float32(0.05)], [f"{index}.jpg" for index in range(40)])
    figures = {"cosine_mean": 0.999, "cosine_min": 0.99, "sqnr_db": 27.0, "nn_agreement": 0.9}
    return meter.result(compared=COMPARED).model_copy(update={**figures, **other})


@pytest.fixture
def baseline(tmp_path: Path) -> Baseline:
    file = tmp_path / "old.json"
    file.write_text(result().model_dump_json())
    return Baseline.read(file)


@pytest.mark.parametrize(
    ("figure", "kept", "lost"),
    [
        ("cosine_mean", 0.9988, 0.99879),
        ("cosine_min", 0.984, 0.9839),
        ("sqnr_db", 26.21, 26.2),
        ("nn_agreement", 0.85, 0.8499),
    ],
)
def test_what_got_worse_by_more_than_noise_fails(
    baseline: Baseline, figure: str, kept: float, lost: float
) -> None:
    assert baseline.hold(result(**{figure: kept})).passed
    held = baseline.hold(result(**{figure: lost}))
    assert not held.passed
    missed = [check.name for check in held.checks if not check.passed]
    assert missed == [f"{figure} since the baseline"]
    assert missed[0] in str(held.failure())


def test_what_got_better_or_stayed_passes(baseline: Baseline) -> None:
    assert baseline.hold(result()).passed
    better = {"cosine_mean": 1.0, "cosine_min": 1.0, "sqnr_db": 200.0, "nn_agreement": 1.0}
    assert baseline.hold(result(**better)).passed


def test_how_much_may_be_lost_can_be_said(tmp_path: Path) -> None:
    file = tmp_path / "old.json"
    file.write_text(result().model_dump_json())
    strict = Baseline.read(file, 0.0)
    assert strict.hold(result()).passed
    assert not strict.hold(result(cosine_mean=0.99899)).passed
    assert Baseline.read(file, 1.0).hold(result(cosine_mean=0.9981)).passed
    with pytest.raises(InputError, match="--max-regression nan"):
        Baseline.read(file, float("nan"))


def test_a_perfect_baseline_leaves_room_for_rounding(tmp_path: Path) -> None:
    file = tmp_path / "old.json"
    file.write_text(result(cosine_mean=1.0, cosine_min=1.0).model_dump_json())
    near = {"cosine_mean": 1 - 5e-7, "cosine_min": 1 - 5e-7}
    assert Baseline.read(file).hold(result(**near)).passed


def test_thresholds_still_hold(baseline: Baseline) -> None:
    missed = Check(name="cosine_mean", value=0.9, bound="at least", limit=0.95)
    held = baseline.hold(result(checks=(missed,)))
    assert [check for check in held.checks if not check.passed] == [missed]
    assert not held.passed


@pytest.mark.parametrize(
    ("update", "part"),
    [
        ({"images_sha256": "3" * 64}, "is of other images"),
        ({"source": "b.onnx", "source_sha256": "4" * 64}, "is of a.onnx, and this of b.onnx"),
    ],
)
def test_something_else_is_refused(baseline: Baseline, update: dict[str, str], part: str) -> None:
    with pytest.raises(InputError, match=part):
        baseline.check_alike(COMPARED.model_copy(update=update))


@pytest.mark.parametrize("update", [{}, {"source": "/ci/a.onnx"}, {"source_sha256": "4" * 64}])
def test_the_same_source_by_name_or_content_is_taken(
    baseline: Baseline, update: dict[str, str]
) -> None:
    """A path is another on another machine, an export another with another exporter."""
    baseline.check_alike(COMPARED.model_copy(update=update))


def test_another_original_is_refused(baseline: Baseline) -> None:
    with pytest.raises(InputError, match="compares with pytorch, and this with float-onnx"):
        baseline.hold(result(reference="float-onnx"))


def test_a_figure_that_is_gone_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "old.json"
    file.write_text(result(top1_agreement=0.9).model_dump_json())
    with pytest.raises(InputError, match=r"has top1_agreement, not measured now: .*--class-scores"):
        Baseline.read(file).hold(result())


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("{}", "is no JSON of this version's parity"),
        ("no", "is no JSON"),
        (None, "No such file"),
        (result(compared=None).model_dump_json(), "does not say what was compared"),
    ],
)
def test_files_that_are_no_baseline(tmp_path: Path, text: str | None, part: str) -> None:
    file = tmp_path / "old.json"
    if text is not None:
        file.write_text(text)
    with pytest.raises(InputError, match=part):
        Baseline.read(file)


def test_images_are_known_by_content(tmp_path: Path) -> None:
    paths = [tmp_path / name for name in ("a", "b", "c")]
    for path in paths:
        path.write_text(path.name)
    known = fingerprint(paths)
    moved = paths[0].rename(tmp_path / "z")
    assert fingerprint([paths[2], moved, paths[1]]) == known
    assert fingerprint(paths) == fingerprint(paths[1:]) != known
    moved.write_text("other")
    assert fingerprint([moved, *paths[1:]]) != known
