"""`compile --target cpu`: the machine decides, by times that are given here."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from support.command_line import Outcome, assert_refused, run_regcache
from support.tiny_artifact import write_tiny
from support.tiny_source import photos

import regcache
from regcache.compiler.artifact.artifact import Artifact
from regcache.compiler.cli import measure_ways as measuring
from regcache.compiler.cli.cpu import TargetChoice
from regcache.compiler.cli.cpu_ways import Accuracy, WayRecord, choose
from regcache.compiler.job.targets import Precision, TargetName
from regcache.passes.errors import InputError
from regcache.passes.preprocess import Preprocess
from regcache.runtime.openvino_options import InferencePrecision, computes_bf16
from regcache.runtime.run_with import RuntimeName
from regcache.runtime.time_alone import Deployed, Timed

pytestmark = pytest.mark.slow

pytest.importorskip("openvino", reason="NOT CHECKED: OpenVINO is not installed")
FAST = ("--rounding", "nearest", "--no-equalize", "--int8-share", 1, "--registers", "off")

Times = Callable[[Deployed], float]


def way(target: str, precision: str, times: tuple[float, float], cosine: float) -> WayRecord:
    return WayRecord(
        target=TargetName(target),
        precision=Precision(precision),
        milliseconds=dict(zip((1, 8), times, strict=True)),
        images_per_second=8e3 / times[1],
        load_ms=1,
        file_mb=1,
        peak_mb=None,
        cosine_mean=cosine,
        cosine_min=cosine,
        error=1 - cosine,
        verdict="",
    )


FLOAT = way("ort-cpu", "fp32", (10, 80), 1)
BF16 = way("openvino", "bf16", (5, 40), 0.9999)
INT8 = way("openvino", "int8", (4, 32), 0.9995)


class TestChoice:
    """Between ways that were measured."""

    @pytest.mark.parametrize(("least", "chosen"), [(0.999, INT8), (0.9997, BF16), (0.99999, FLOAT)])
    def test_the_fastest_that_is_close_enough(self, least: float, chosen: WayRecord) -> None:
        found = choose([FLOAT, INT8, BF16], Accuracy(least))
        assert (found.target, found.precision) == (chosen.target, chosen.precision)
        assert [item.precision.value for item in found.ways] == ["int8", "bf16", "fp32"]
        verdicts = {item.precision: item.verdict for item in found.ways}
        assert verdicts[chosen.precision] == "chosen: fastest"
        if least == 0.9997:
            assert verdicts[Precision.INT8] == "cosine below 0.9997"
            assert verdicts[Precision.FP32] == "2.00 x the time"

    def test_nobody_ships_int8_where_bf16_is_as_fast(self) -> None:
        even = way("openvino", "bf16", (4.1, 33), 0.9999)
        found = choose([FLOAT, INT8, even], Accuracy())
        assert found.precision is Precision.BF16
        assert [item.verdict for item in found.ways][:2] == [
            "as fast, but less close",
            "chosen: as fast, and closer to float",
        ]

    def test_no_batch_size_counts_more(self) -> None:
        other = way("ort-cpu", "int8", (2, 60), 0.9995)  # half the time at 1, twice at 8
        assert choose([INT8, other], Accuracy()).target is TargetName.ORT_CPU
        slower = way("ort-cpu", "int8", (2.6, 60), 0.9995)
        assert choose([INT8, slower], Accuracy()).target is TargetName.OPENVINO

    def test_none_is_close_enough(self) -> None:
        with pytest.raises(InputError, match=r"int8, the closest, has a cosine of 0\.9995"):
            choose([INT8], Accuracy(0.9999))

    @pytest.mark.parametrize(("most", "chosen"), [(0.01, INT8), (0.0002, BF16), (0, FLOAT)])
    def test_the_fastest_of_so_small_an_error(self, most: float, chosen: WayRecord) -> None:
        """A cosine that was not asked for does not count then."""
        found = choose([FLOAT, INT8, BF16], Accuracy.of(max_error=most))
        assert (found.min_cosine, found.max_error) == (None, most)
        assert found.precision is chosen.precision
        far = way("openvino", "int8", (1, 8), 0.9)
        assert choose([FLOAT, far], Accuracy.of(max_error=0.2)).precision is Precision.INT8


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return photos(tmp_path_factory.mktemp("images") / "photos", 8, seed=3)


@pytest.fixture
def given(monkeypatch: pytest.MonkeyPatch) -> Callable[[Times], None]:
    """Let times be given, and run models in this process."""

    def give(times: Times) -> None:
        def timed(deployed: Deployed, _recipe: Preprocess, _seconds: float) -> Timed:
            return Timed({1: times(deployed), 8: 8 * times(deployed)}, 1.0, None)

        def embedded(deployed: Deployed, pixels: NDArray[np.float32]) -> NDArray[np.float32]:
            with deployed.open() as session:
                return session.run(pixels)[0]

        monkeypatch.setattr(measuring, "time_alone", timed)
        monkeypatch.setattr(measuring, "embed_alone", embedded)

    return give


def compile_tiny(folder: Path, images: Path, *options: object) -> Outcome:
    command = ("compile", write_tiny(folder), "--images", images, "-o", folder / "artifact")
    return run_regcache(*command, "--target", "cpu", "--threads", 1, *FAST, *options)


def test_int8_where_it_is_fastest(
    images: Path, tmp_path: Path, given: Callable[[Times], None]
) -> None:
    int8 = {RuntimeName.OPENVINO: InferencePrecision.AUTO}
    given(lambda one: 1.0 if int8.get(one.runtime) is one.precision else 2.0)
    report = tmp_path / "choice.json"
    outcome = compile_tiny(tmp_path, images, "--min-cosine", 0.9, "--json", report)
    assert outcome.code == 0, outcome
    found = json.loads(report.read_text())
    assert (found["choice"]["target"], found["choice"]["precision"]) == ("openvino", "int8")
    ways = [(item["target"], item["precision"]) for item in found["choice"]["ways"]]
    floats = ["fp32", *["bf16"] * computes_bf16()]
    assert sorted(ways) == sorted(
        [("ort-cpu", "fp32"), ("ort-cpu", "int8"), ("openvino", "int8")]
        + [("openvino", precision) for precision in floats]
    )
    assert Artifact.open(tmp_path / "artifact").manifest.options.target is TargetName.OPENVINO
    assert found["manifest"]["options"]["target"] == "openvino"
    assert "chosen: fastest" in outcome.out
    left = {path.name for path in tmp_path.iterdir()}
    assert left == {"artifact", "choice.json", "tiny.onnx", "tiny.preprocess.json"}


def test_float_where_int8_is_not_close_enough(
    images: Path, tmp_path: Path, given: Callable[[Times], None]
) -> None:
    given(lambda one: 1.0 if one.runtime is RuntimeName.ONNXRUNTIME else 2.0)
    outcome = compile_tiny(tmp_path, images, "--min-cosine", 0.9999999)
    assert outcome.code == 0, outcome
    options = Artifact.open(tmp_path / "artifact").manifest.options
    assert (options.target, options.precision) == (TargetName.ORT_CPU, Precision.FP32)
    assert "cosine below 1" in outcome.out


@pytest.mark.parametrize(
    ("kind", "least", "precision"),
    [("avx2", 0.999, "fp32"), ("vnni", 0.9, "int8"), ("vnni", 1, "fp32"), ("amx", 0.999, "bf16")],
)
def test_another_cpu_by_rule(
    images: Path, tmp_path: Path, kind: str, least: float, precision: str
) -> None:
    if precision == "bf16" and not computes_bf16():
        pytest.skip("NOT CHECKED: this CPU computes no bf16")
    outcome = compile_tiny(tmp_path, images, "--for", kind, "--min-cosine", least)
    assert outcome.code == 0, outcome
    options = Artifact.open(tmp_path / "artifact").manifest.options
    assert (options.target.value, options.precision.value) == ("openvino", precision)
    assert ("FP32 in place of int8" in outcome.err) == (kind == "vnni" and precision == "fp32")


def test_bench_shows_the_same_table(
    images: Path, tmp_path: Path, given: Callable[[Times], None]
) -> None:
    given(lambda one: 1.0 if one.runtime is RuntimeName.OPENVINO else 2.0)
    artifact, report = tmp_path / "artifact", tmp_path / "bench.json"
    compiled = run_regcache(
        *("compile", write_tiny(tmp_path), "--images", images, "-o", artifact, "--threads", 1),
        *("--accept-slower", *FAST),
    )
    assert compiled.code == 0, compiled
    command = ("bench", artifact, "--seconds", 0, "--batch", 1, "--threads", 1)
    outcome = run_regcache(*(*command, "--images", images, "--min-cosine", 0.9, "--json", report))
    assert outcome.code == 0, outcome
    found = json.loads(report.read_text())
    assert [item["batch"] for item in found["runners"][0]["batches"]] == [1]
    ways = {(item["target"], item["precision"]): item for item in found["choice"]["ways"]}
    floats = ["fp32", *["bf16"] * computes_bf16()]
    assert set(ways) == {
        *(("ort-cpu", one) for one in ("int8", "fp32")),
        *(("openvino", one) for one in floats),
    }
    assert found["choice"]["target"] == "openvino"
    assert ways["ort-cpu", "int8"]["verdict"] == "2.00 x the time"
    assert ways["ort-cpu", "fp32"]["cosine_mean"] == pytest.approx(1)
    assert ways["ort-cpu", "int8"]["error"] > ways["openvino", "fp32"]["error"]
    assert "2.00 x the time" in outcome.out
    assert_refused(run_regcache(*command, "--max-error", 1), "says nothing without --images")


def test_a_python_call(images: Path, tmp_path: Path, given: Callable[[Times], None]) -> None:
    given(lambda one: 1.0 if one.runtime is RuntimeName.OPENVINO else 2.0)
    quick: dict[str, Any] = {
        "rounding": "nearest",
        "equalize": False,
        "int8_share": 1,
        "registers": "off",
        "target": "cpu",
        "threads": 1,
    }
    source, output = write_tiny(tmp_path), tmp_path / "artifact"
    refused: tuple[tuple[dict[str, Any], str], ...] = (
        ({"target": "openvino", "max_error": 0.9}, 'option max_error is for target "cpu"'),
        ({"target": "cpu", "precision": "bf16"}, "chooses the precision"),
        ({"target": "cpu", "max_error": "low"}, "max_error: a number is wanted, not 'low'"),
        ({"target": "cpu", "for_cpu": "arm"}, "for_cpu: 'arm' is none of avx2, vnni, amx"),
    )
    for options, said in refused:
        with pytest.raises(InputError, match=said):
            regcache.compile(source, images, output, **options)
    with pytest.raises(InputError, match="name a folder"):
        regcache.compile(source, None, output, target="cpu")
    made = regcache.compile(source, images, output, max_error=0.9, **quick)
    assert made.folder == output
    assert made.manifest.options.target is TargetName.OPENVINO
    made = regcache.compile(source, images, output, for_cpu="avx2", **quick)
    assert made.manifest.options.precision is Precision.FP32


def test_what_does_not_go_together(images: Path, tmp_path: Path) -> None:
    for options, said in (
        (("--precision", "bf16"), "--target cpu chooses the precision"),
        (("--no-float",), "compares with float.onnx"),
        (("--simulate", "w6a6"), "--simulate cannot be timed"),
        (("--max-error", 0.1, "--target", "openvino"), "--max-error is for --target cpu"),
        (("--for", "vnni", "--target", "ort-cpu"), "--for is for --target cpu"),
    ):
        assert_refused(compile_tiny(tmp_path, images, *options), said)
    assert not (tmp_path / "artifact").exists()


def test_every_target_can_be_named() -> None:
    assert {item.value for item in TargetChoice} == {*(one.value for one in TargetName), "cpu"}
