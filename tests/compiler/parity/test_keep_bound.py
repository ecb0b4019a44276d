"""`compile --min-cosine`: as little in float as a bound on images held out asks for."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.command_line import Outcome, assert_refused, run_regcache
from support.tiny_artifact import write_tiny
from support.tiny_source import photos

import regcache
from regcache.compiler.artifact.artifact import Artifact
from regcache.compiler.job.calibration_images import hold_out
from regcache.compiler.parity.keep_bound import fewest
from regcache.compiler.quantization.int8_share import BoundRecord
from regcache.passes.errors import FallsShortError, InputError

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("keep_bound")]

FAST = ("--registers", "off", "--no-equalize", "--rounding", "nearest", "--accept-slower",
        "--threads", 1, "--no-rotate", "--int8-share", 1)  # fmt: skip


@given(most=st.integers(0, 300), needed=st.integers(1, 310), guess=st.integers(-3, 400))
def test_about_the_fewest_in_a_few_tries(most: int, needed: int, guess: int) -> None:
    tried: list[int] = []

    def passes(count: int) -> bool:
        tried.append(count)
        return count >= needed

    found = fewest(passes, most, guess)
    if needed > most:
        assert found is None
    else:
        assert found is not None
        assert needed <= found <= max(needed + 1, needed * 8 / 7)
        assert found == min(count for count in tried if count >= needed)
        assert found == [count for count in tried if count >= needed][-1]
    assert len(tried) == len(set(tried)) <= 12
    assert all(1 <= count <= most for count in tried)


class TestHeldOut:
    """Which images calibrate nothing."""

    @pytest.mark.parametrize(("count", "held"), [(24, 8), (50, 10), (1000, 64)])
    def test_a_fifth_of_all(self, count: int, held: int) -> None:
        images = [Path(f"{index:04}.jpg") for index in range(count)]
        kept, out = hold_out(images)
        assert len(out) == held
        assert sorted([*map(str, kept), *map(str, out)]) == [str(image) for image in images]

    def test_too_few(self) -> None:
        with pytest.raises(InputError, match="give 24 or more, not 23"):
            hold_out([Path(str(index)) for index in range(23)])


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bound")
    photos(folder / "photos", 26, seed=1)
    return write_tiny(folder, depth=2)


def compile_to(encoder: Path, out: Path, *options: object) -> Outcome:
    given = ("--images", encoder.parent / "photos", *FAST)
    return run_regcache("compile", encoder, "-o", out, *given, *options)


def bound_of(artifact: Path) -> BoundRecord:
    bound = Artifact.open(artifact).manifest.quantization.bound
    assert bound is not None
    return bound


@pytest.fixture(scope="module")
def loose(encoder: Path) -> Path:
    """A bound that is kept to with all linears quantized."""
    done = compile_to(encoder, encoder.parent / "loose", "--min-cosine", 0.9)
    assert done.code == 0, done
    return encoder.parent / "loose"


@pytest.fixture(scope="module")
def tight(encoder: Path, loose: Path) -> Path:
    """A bound that halves the error."""
    least = (1 + bound_of(loose).cosine) / 2
    done = compile_to(encoder, encoder.parent / "tight", "--min-cosine", least)
    assert done.code == 0, done
    assert f"it keeps to --min-cosine {least}: 0.9" in done.out
    assert "on 8 of the images held out" in done.out
    return encoder.parent / "tight"


def test_what_holds_already_is_left_as_it_is(loose: Path) -> None:
    quantization = Artifact.open(loose).manifest.quantization
    assert (quantization.int8_share, quantization.left_float) == (1, [])
    bound = bound_of(loose)
    assert [one.share for one in bound.tried] == [1]
    assert bound.cosine == bound.tried[0].cosine


def test_more_stays_float_until_it_holds(tight: Path, loose: Path) -> None:
    manifest, bound = Artifact.open(tight).manifest, bound_of(tight)
    quantization = manifest.quantization
    assert bound.cosine >= bound.min_cosine > bound_of(loose).cosine
    assert 0 < quantization.int8_share < 1
    chosen = next(one for one in bound.tried if one.share == quantization.int8_share)
    assert chosen.cosine == bound.cosine
    assert all(one.cosine < bound.min_cosine for one in bound.tried if one.share > chosen.share)
    assert len(quantization.sites) + len(quantization.left_float) == 8
    order = [point.left_float for point in quantization.pareto[1:]]
    assert quantization.left_float == order[: len(quantization.left_float)]


def test_the_figures_are_those_of_images_that_calibrated_nothing(tight: Path) -> None:
    manifest, bound = Artifact.open(tight).manifest, bound_of(tight)
    assert (bound.images, manifest.calibration.images) == (8, 18)
    assert manifest.parity.images == "held-out"
    paths = sorted((tight.parent / "photos").iterdir())
    listed = tight.parent / "held.txt"
    listed.write_text("\n".join(map(str, hold_out(paths)[1])))
    result = regcache.parity(tight, listed, threads=1, reference="float-onnx")
    assert result.cosine_mean == pytest.approx(bound.cosine, abs=1e-9)


def test_the_card_and_the_report_tell(tight: Path, tmp_path: Path) -> None:
    assert "of the images that calibrated nothing" in (tight / "README.md").read_text()
    pytest.importorskip("jinja2", reason="NOT CHECKED: Jinja2 is not installed")
    done = run_regcache("report", tight, "-o", tmp_path / "report.html")
    assert done.code == 0, done
    page = (tmp_path / "report.html").read_text()
    assert "a first look at 8 of the images that calibrated nothing" in page
    assert f"--min-cosine {bound_of(tight).min_cosine} was asked for" in page


def test_compiled_once_more_it_is_the_same(tight: Path, tmp_path: Path) -> None:
    done = run_regcache("compile", "--from", tight, "-o", tmp_path / "again")
    assert done.code == 0, done
    assert "byte by byte" in done.out
    assert bound_of(tmp_path / "again") == bound_of(tight)


def test_the_same_sites_by_their_share_are_the_same_model(
    encoder: Path, tight: Path, tmp_path: Path
) -> None:
    """Nothing but the placement follows from the bound: images held out have no say in ranges."""
    manifest = Artifact.open(tight).manifest
    paths = sorted((encoder.parent / "photos").iterdir())
    listed = tmp_path / "kept.txt"
    listed.write_text("\n".join(map(str, hold_out(paths)[0])))
    share = manifest.quantization.int8_share
    given = (*FAST[:-1], share, "--images", listed, "-o", tmp_path / "b")
    done = run_regcache("compile", encoder, *given)
    assert done.code == 0, done
    assert (tmp_path / "b/model.onnx").read_bytes() == (tight / "model.onnx").read_bytes()


def test_what_cannot_be_reached_is_said_and_nothing_is_written(
    encoder: Path, tmp_path: Path
) -> None:
    done = compile_to(encoder, tmp_path / "a", "--min-cosine", 1)
    assert done.code == 1
    last = done.err.splitlines()[-1]
    assert last.startswith("regcache: error: --min-cosine 1.0 is not reached: 0.99")
    assert "of the work quantized" in last
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(FallsShortError, match="is not reached"):
        regcache.compile(
            *(encoder, encoder.parent / "photos", tmp_path / "a"),
            registers="off",
            min_cosine=1,
            equalize=False,
            rounding="nearest",
        )
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (("--precision", "w4a16"), "--min-cosine keeps linears float"),
        (("--simulate", "w8a8"), "--min-cosine keeps linears float"),
        (("--target", "tensorrt", "--precision", "fp16"), "--min-cosine says nothing with"),
        (("--target", "tensorrt", "--prefer", "fastest"), "--prefer fastest and --min-cosine do"),
        (("--max-images", 20), "give 24 or more, not 20"),
    ],
)
def test_what_does_not_go_with_it(
    encoder: Path, tmp_path: Path, options: tuple[Any, ...], reason: str
) -> None:
    given = ("--images", encoder.parent / "photos", "--min-cosine", 0.99, *options)
    outcome = run_regcache("compile", encoder, "-o", tmp_path / "a", *given)
    assert_refused(outcome, reason)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("target", ["tensorrt-rtx", "openvino"])
def test_other_targets(encoder: Path, tmp_path: Path, target: str) -> None:
    if target == "openvino":
        pytest.importorskip("openvino", reason="NOT CHECKED: OpenVINO is not installed")
    out = tmp_path / "a"
    done = compile_to(encoder, out, "--target", target, "--min-cosine", 0.99)
    assert done.code == 0, done
    assert bound_of(out).cosine >= 0.99
    assert json.loads((out / "manifest.json").read_text())["options"]["min_cosine"] == 0.99


@pytest.mark.parametrize("least", [1.5, float("nan")])
def test_what_is_no_cosine(encoder: Path, tmp_path: Path, least: float) -> None:
    with pytest.raises(InputError, match="a cosine from -1 to 1 is wanted"):
        regcache.compile(encoder, encoder.parent / "photos", tmp_path / "a", min_cosine=least)


def test_dry_run_plans_it(encoder: Path, tmp_path: Path) -> None:
    done = compile_to(encoder, tmp_path / "a", "--min-cosine", 0.99, "--dry-run")
    assert done.code == 0, done
    assert "keeping to --min-cosine" in " ".join(done.out.split())
