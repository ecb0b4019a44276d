"""What is predicted for a GPU beside a benchmark on it, by the real builder's list of kernels."""

from pathlib import Path
from types import SimpleNamespace
from typing import cast

import pytest
from support.bench_results import runner
from support.building import needs_tensorrt
from support.canonical import canonical_graph
from support.scales import linear_scales
from support.tiny_vit import Spec, TinyVit

from regcache.compiler.artifact.artifact import Artifact
from regcache.compiler.bench import predicted
from regcache.compiler.bench.predicted import with_predictions
from regcache.compiler.job.options import CompileOptions
from regcache.compiler.job.targets import TargetName
from regcache.compiler.reporter import Reporter
from regcache.passes.base import run
from regcache.passes.half_precision import HalfPrecision
from regcache.passes.onnx_file import save_graph
from regcache.passes.quantize_linears import QuantizeLinears
from regcache.runtime.gpu import Gpu
from regcache.runtime.runners import RunnerName


@pytest.fixture
def models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, Path]:
    """An encoder in FP16 and in int8, and a GPU that runs both."""
    gpu = Gpu("NVIDIA GeForce RTX 4090", "8.9", "580.1", 10**10)
    monkeypatch.setattr(predicted, "find_gpu", lambda: gpu)
    graph = canonical_graph(TinyVit(Spec(width=64, hidden=256, depth=1)).model())
    quantize = QuantizeLinears(linear_scales(graph, "int8"))
    paths = tmp_path / "float.onnx", tmp_path / "model.onnx"
    for one, path in zip((graph, run(quantize, graph).graph), paths, strict=True):
        save_graph(run(HalfPrecision(), one).graph, path)
    return paths


def artifact(model: Path) -> Artifact:
    options = CompileOptions(source="a", images="b", target=TargetName.TENSORRT_RTX)
    manifest = SimpleNamespace(options=options)
    return cast(Artifact, SimpleNamespace(model=model, manifest=manifest))


@needs_tensorrt
def test_both_models_are_predicted_on_the_gpu_that_measured(models: tuple[Path, Path]) -> None:
    before = runner(RunnerName.TENSORRT_RTX)
    after = with_predictions(before, models, artifact(models[1]), Reporter())
    (batch,) = after.batches
    original, quantized = batch.predicted_float, batch.predicted_quantized
    assert original is not None
    assert quantized is not None
    assert (original.gpu, original.batch) == ("RTX 4090", batch.batch)
    assert quantized.arithmetic_ms < original.arithmetic_ms
    assert quantized.launches_ms > original.launches_ms
    assert original.ratio is None
    assert quantized.ratio == pytest.approx(quantized.total_ms / original.total_ms, abs=1e-4)
    unpredicted = {"predicted_float": None, "predicted_quantized": None}
    assert batch.model_copy(update=unpredicted) == before.batches[0]


def test_an_unknown_gpu_and_other_runners_are_left_alone(
    models: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    elsewhere = runner(RunnerName.ORT_CUDA)
    assert with_predictions(elsewhere, models, artifact(models[1]), Reporter()) is elsewhere
    monkeypatch.setattr(predicted, "find_gpu", lambda: Gpu("Some GPU", "8.9", "580.1", 10**10))
    here = runner(RunnerName.TENSORRT_RTX)
    assert with_predictions(here, models, artifact(models[1]), Reporter()) is here
    assert "no time predicted: no GPU 'Some GPU' in the table: L4, A10" in capsys.readouterr().err
