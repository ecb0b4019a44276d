"""benchmarks/device_cost.py: says plainly that there is no GPU, and compares on the CPU."""

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

import onnx
import pytest
import typer
from support.tiny_source import RECIPE, SPEC, photos
from support.tiny_vit import TinyVit
from typer.testing import CliRunner, Result

from regcache.export.onnx_file import sidecar

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "device_cost.py"


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("device_cost", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["device_cost"] = module  # where its dataclasses look for their types
    spec.loader.exec_module(module)
    return module


def run(script: ModuleType, *arguments: object) -> Result:
    app = typer.Typer()
    app.command()(script.main)
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def test_no_gpu_is_one_line(script: ModuleType, tmp_path: Path) -> None:
    outcome = run(script, "no.onnx", "--images", tmp_path, "--device", "cuda:977")
    assert outcome.exit_code == 2
    assert outcome.output.startswith("device-cost: no GPU: device cuda:977: ")
    assert outcome.output.count("\n") == 1


@pytest.mark.slow
@pytest.mark.torch
def test_pytorch_decides_as_numpy_does(script: ModuleType, tmp_path: Path) -> None:
    model = tmp_path / "tiny.onnx"
    onnx.save(TinyVit(SPEC).model(), model)
    sidecar(model).write_text(RECIPE.to_json())
    photos(tmp_path / "images", 18, seed=1)
    results = tmp_path / "results.json"
    options = ("--images", tmp_path / "images", "--rehearse", "--json", results)
    outcome = run(script, model, *options)
    assert outcome.exit_code == 0, outcome.output
    (found,) = json.loads(results.read_text())
    assert found["alike"] == 1
    assert found["left_float"]
    assert found["registers"]
    assert found["between"] > 0.99999
    assert found["gpu_cosine"] == pytest.approx(found["cpu_cosine"], abs=1e-5)
    assert "100.0 %" in outcome.output
