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
from test_compiler_cli import RECIPE, SPEC, photos
from tiny_vit import TinyVit
from typer.testing import CliRunner

from regcache.compiler.reporter import Reporter
from regcache.compiler.targets import Precision, TargetName
from regcache.export.onnx_file import sidecar
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
    assert "not run: runner ort-cuda: " in console.export_text()

    fp8 = script.Case("fp8", TargetName.ORT_CPU, Precision.FP8, (RunnerName.ORT_CPU,))
    (failed,) = script.run_case(fp8, check, Reporter())
    assert (failed.passed, failed.failure) == (False, "fp8 runs on TensorRT, not on ort-cpu")


def test_the_whole_set(script: ModuleType) -> None:
    """Every runner, and both number formats of TensorRT."""
    runners = {runner for case in script.CASES for runner in case.runners}
    assert runners == set(RunnerName)
    assert {case.precision for case in script.CASES} == {Precision.INT8, Precision.FP8}
    assert not script.Outcome("a", "b", cosine=0.97).passed
