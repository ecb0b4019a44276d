"""`compile --prefer fastest`: what is quantized by predicted time, and what is said of it."""

import json
from pathlib import Path

import onnx
import pytest
from support.command_line import assert_refused, run_regcache
from support.tiny_source import RECIPE, photos
from support.tiny_vit import Spec, TinyVit

from regcache.compiler.artifact.artifact import Artifact
from regcache.compiler.quantization import fastest
from regcache.export.onnx_file import sidecar
from regcache.runtime.gpu_rates import GpuRates

pytestmark = pytest.mark.slow

SPEC = Spec(width=32, heads=4, hidden=64, depth=2, grid=4)
FAST = ("--registers", "off", "--no-equalize", "--rounding", "nearest")


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("prefer")
    onnx.save(TinyVit(SPEC).model(), folder / "tiny.onnx")
    sidecar(folder / "tiny.onnx").write_text(RECIPE.to_json())
    photos(folder / "photos", 6, seed=1)
    return folder / "tiny.onnx"


def command(source: Path, output: Path, *options: str) -> tuple[object, ...]:
    given = ("--images", source.parent / "photos", "-o", output, "--target", "tensorrt-rtx")
    return ("compile", source, *given, *FAST, *options)


def test_what_saves_no_time_becomes_float16_and_says_so(source: Path, tmp_path: Path) -> None:
    """The tiny encoder is nothing but launches, of which int8 takes more."""
    outcome = run_regcache(*command(source, tmp_path / "a", "--prefer", "fastest", "--gpu", "A10"))
    assert outcome.code == 0, outcome
    said = "Registers: none (int8 is predicted to save no time on A10: FP16 throughout)"
    assert outcome.out.splitlines()[0] == said
    assert "calibrating" not in outcome.err
    manifest = json.loads((tmp_path / "a" / "manifest.json").read_text())
    assert manifest["options"]["precision"] == "fp16"
    assert manifest["curation"]["reason"] == said
    types = {item.data_type for item in onnx.load(tmp_path / "a" / "model.onnx").graph.initializer}
    assert onnx.TensorProto.INT8 not in types
    named = run_regcache(
        *("compile", source, "-o", tmp_path / "b", "--target", "tensorrt-rtx"),
        *("--precision", "fp16"),
    )
    assert named.code == 0, named
    both = [(tmp_path / name / "model.onnx").read_bytes() for name in "ab"]
    assert both[0] == both[1]


def test_options_that_say_nothing_in_float16_are_left_out(source: Path, tmp_path: Path) -> None:
    """The artifact could not be opened: its own options excluded each other."""
    searching = ("--registers", "auto", "--search-budget", "5m", "--effort", "thorough")
    given = ("--prefer", "fastest", "--gpu", "A10", "--attention", "float", "--no-half")
    outcome = run_regcache(*command(source, tmp_path / "a", *given, *searching))
    assert outcome.code == 0, outcome
    options = Artifact.open(tmp_path / "a").manifest.options
    assert (options.precision, options.search_budget, options.half) == ("fp16", None, None)


def test_int8_that_is_predicted_slower_is_said_with_what_is_not(
    source: Path, tmp_path: Path
) -> None:
    outcome = run_regcache(*command(source, tmp_path / "a"))
    assert outcome.code == 0, outcome
    assert "predicted to be slower than FP16 on L4, A10, RTX 4090, RTX 5090" in outcome.out
    assert "try --prefer fastest" in outcome.out
    manifest = json.loads((tmp_path / "a" / "manifest.json").read_text())
    times = manifest["quantization"]["predicted"]
    assert len(times) == 4 * 3
    assert all(time["ratio"] > 1 for time in times)


def test_int8_where_arithmetic_is_what_takes_time(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a GPU whose memory and launches cost nothing."""
    rates = {"FP16": 1e9, "FP32": 1e9, "INT8": 8e9}
    gpu = GpuRates("slow", "8.9", rates, 1e15, "made up", between_kernels=0.0)
    monkeypatch.setattr(fastest, "find_rates", lambda _: gpu)
    outcome = run_regcache(*command(source, tmp_path / "a", "--prefer", "fastest", "--gpu", "slow"))
    assert outcome.code == 0, outcome
    assert "predicted to be slower" not in outcome.out
    record = json.loads((tmp_path / "a" / "manifest.json").read_text())["quantization"]
    assert record["int8_share"] > 0.7
    assert [time["gpu"] for time in record["predicted"]] == ["slow"] * 3
    assert all(time["ratio"] < 0.6 for time in record["predicted"])
    assert record["pareto"]  # the damage was measured


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (("--prefer", "fastest", "--gpu", "RTX 4080"), "no GPU 'RTX 4080' in the table: L4, A10"),
        (("--prefer", "fastest", "--int8-share", "0.5"), "--int8-share do not go together"),
        (("--gpu", "A10", "--precision", "fp16"), "--gpu is for int8 and fp8 on TensorRT"),
        (("--precision", "fp8", "--gpu", "A10"), "--gpu A10: multiplies no FP8"),
    ],
)
def test_bad_input(source: Path, tmp_path: Path, options: tuple[str, ...], reason: str) -> None:
    assert_refused(run_regcache(*command(source, tmp_path / "a", *options)), reason)
    assert not (tmp_path / "a").exists()
