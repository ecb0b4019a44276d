"""`make gpu-check`: says plainly that there is no GPU, and its steps run on the CPU."""

import importlib.util
import io
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import onnx
import pytest
from rich.console import Console
from support.tiny_source import RECIPE, SPEC, photos
from support.tiny_vit import TinyVit
from typer.testing import CliRunner

from regcache.compiler.bench import engines as bench_engines
from regcache.compiler.job.targets import Precision, TargetName
from regcache.compiler.reporter import Reporter
from regcache.export.onnx_file import sidecar
from regcache.passes.errors import InputError
from regcache.runtime import tensorrt_rtx
from regcache.runtime.gpu import Gpu
from regcache.runtime.runners import RunnerName

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "gpu_check.py"


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("gpu_check", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["gpu_check"] = module  # where its dataclasses look for their types
    spec.loader.exec_module(module)
    return module


def test_no_gpu_is_one_line(
    script: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    import typer

    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    app = typer.Typer()
    app.command()(script.main)
    options = ["--calibration", str(tmp_path), "--evaluation", str(tmp_path)]
    outcome = CliRunner().invoke(app, options)
    assert outcome.exit_code == 2
    assert outcome.output.startswith("gpu-check: no GPU: ")
    assert outcome.output.count("\n") == 1


@pytest.mark.slow
def test_a_case_runs_what_it_can_and_says_the_rest(
    script: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    path = tmp_path / "tiny.onnx"
    onnx.save(TinyVit(replace(SPEC, depth=1)).model(), path)
    sidecar(path).write_text(RECIPE.to_json())
    images = photos(tmp_path / "photos", 6, seed=1)
    check = script.Check(str(path), images, images, tmp_path / "work", seconds=0.0)
    runners = (RunnerName.ORT_CPU, RunnerName.ORT_CUDA)
    case = script.Case("ort", TargetName.ORT_CPU, Precision.INT8, runners)
    ran, refused = script.run_case(case, check, Reporter())
    assert ran.passed
    assert 0.99 < ran.cosine < 1
    assert [row.batch for row in ran.bench.runners[0].batches] == [1, 8]
    work = sorted(item.name for item in (tmp_path / "work").iterdir())
    assert work == ["ort", "ort-ort-cpu.json", "ort-ort-cpu.png"]
    assert not refused.passed
    assert refused.failure.startswith("runner ort-cuda: ")
    console = Console(width=200, record=True, file=io.StringIO())
    console.print(script.outcome_table([ran, refused]))
    assert console.export_text().splitlines()[-2].split("│")[3].strip() == "failed"
    (line,) = script.outcome_lines([ran, refused])
    assert line.startswith("ort on ort-cuda: failed: runner ort-cuda: ")
    assert script.exit_code([ran, refused]) == 1

    fp8 = script.Case("fp8", TargetName.ORT_CPU, Precision.FP8, (RunnerName.ORT_CPU,))
    (failed,) = script.run_case(fp8, check, Reporter())
    assert (failed.passed, failed.failure) == (
        False,
        "fp8 runs on tensorrt and tensorrt-rtx, not on ort-cpu",
    )


def on_gpu(monkeypatch: pytest.MonkeyPatch, script: ModuleType, gpu: Gpu) -> None:
    """As if a GPU were there, and every library; nothing runs on it."""
    for module in (script, bench_engines):
        monkeypatch.setattr(module, "find_gpu", lambda: gpu)
    monkeypatch.setattr(script, "check_runner", lambda _runner: None)
    known = ("7.5", "8.6", "8.9", "12.0")
    monkeypatch.setattr(tensorrt_rtx, "supported_compute_capabilities", lambda: known)
    monkeypatch.setattr(tensorrt_rtx, "library_version", lambda: "1.7")


def test_a_gpu_that_tensorrt_rtx_leaves_out_fails_nothing(
    script: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The rest is tried there, and its failures count."""
    on_gpu(monkeypatch, script, Gpu("NVIDIA H100", "9.0", "580.1", 1 << 36))
    monkeypatch.setattr(script, "compile_encoder", lambda *_: None)

    def refuse(*_: object) -> None:
        raise InputError("no engine")

    monkeypatch.setattr(script, "build_engines", refuse)
    check = script.Check("source", tmp_path, tmp_path, tmp_path)
    runners = (RunnerName.TENSORRT_RTX, RunnerName.TENSORRT)
    case = script.Case("int8", TargetName.TENSORRT_RTX, Precision.INT8, runners)
    left_out, tried = script.run_case(case, check, Reporter())
    assert list(script.outcome_lines([left_out, tried])) == [
        "int8 on tensorrt-rtx: not run, and no failure: NVIDIA H100 (compute capability 9.0): "
        "TensorRT-RTX 1.7 runs on 7.5, 8.6, 8.9, 12.0 alone: --runner tensorrt",
        "int8 on tensorrt: failed: no engine",
    ]
    good = script.Outcome("ort", "ort-cuda", cosine=0.999)
    assert script.exit_code([good, left_out]) == 0
    assert script.exit_code([good, left_out, tried]) == 1
    far = script.Outcome("ort", "ort-cuda", cosine=0.9)
    assert far.describe() == "ort on ort-cuda: failed: cosine 0.90000 is under 0.98"
    assert script.exit_code([far, left_out]) == 1


def test_a_gpu_without_float8_fails_nothing(
    script: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, int8, fp8 = script.CASES
    on_gpu(monkeypatch, script, Gpu("RTX A4000", "8.6", "580.1", 1 << 34))
    assert script._why_not_here(int8, RunnerName.TENSORRT_RTX) is None
    reason = "RTX A4000: compute capability 8.6 multiplies no FP8"
    assert script._why_not_here(fp8, RunnerName.TENSORRT) == reason
    on_gpu(monkeypatch, script, Gpu("RTX 4090", "8.9", "580.1", 1 << 34))
    assert script._why_not_here(fp8, RunnerName.TENSORRT) is None


def test_the_whole_set(script: ModuleType) -> None:
    """Every runner but OpenVINO, which is the CPU's, and both number formats of TensorRT."""
    runners = {runner for case in script.CASES for runner in case.runners}
    assert runners == set(RunnerName) - {RunnerName.OPENVINO}
    assert {case.precision for case in script.CASES} == {Precision.INT8, Precision.FP8}
    assert not script.Outcome("a", "b", cosine=0.97).passed
