"""Which engine is benchmarked: the artifact's own where it suits, else a real one built here."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import onnx
import pytest
from support.building import has_gpu, needs_tensorrt
from support.canonical import canonical_graph
from support.quantized_graphs import quantized, zero_points
from support.tiny_vit import Spec, TinyVit

from regcache.compiler.artifact.artifact import Artifact
from regcache.compiler.artifact.engine_record import EngineKind, EngineRecord
from regcache.compiler.bench import engines as bench_engines
from regcache.compiler.bench.engines import engine_for, suits
from regcache.compiler.engines.signed_model import REWRITE
from regcache.compiler.job.options import CompileOptions
from regcache.compiler.job.targets import TargetName
from regcache.compiler.reporter import Reporter
from regcache.passes.errors import InputError, MissingExtraError
from regcache.passes.onnx_file import import_graph, save_graph
from regcache.runtime import tensorrt_engine, tensorrt_rtx
from regcache.runtime.engine_build import EngineBuild
from regcache.runtime.gpu import Gpu
from regcache.runtime.open_runner import open_runner
from regcache.runtime.runners import Loading, RunnerName
from regcache.runtime.tensorrt_network import RefusedGraphError

GPU = Gpu("Some RTX", "8.6", "580.1", 10**10)
RECORD = EngineRecord(
    file="engines/model.engine", model="model.onnx", engine=EngineKind.TENSORRT_RTX, version="1.7",
    compute_capabilities=["8.6", "8.9"], gpu=None, batch=(1, 2, 8), products={}, layers={},
    fused_attentions=0, warnings=[], inputs="",
)  # fmt: skip


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    onnx.save(TinyVit(Spec()).model(), tmp_path / "model.onnx")
    monkeypatch.setattr(bench_engines, "find_gpu", lambda: GPU)
    return tmp_path


def loading(folder: Path, runner: RunnerName = RunnerName.TENSORRT_RTX) -> Loading:
    return Loading(runner, folder / "model.onnx", 1, (2, 1, 8), (3, 8, 8))


def artifact(
    folder: Path, *engines: EngineRecord, target: TargetName = TargetName.TENSORRT_RTX
) -> Artifact:
    options = CompileOptions(source="tiny.onnx", images="photos", target=target)
    manifest = SimpleNamespace(engines=engines, options=options)
    opened = SimpleNamespace(folder=folder, model=folder / "model.onnx", manifest=manifest)
    return cast(Artifact, opened)


@pytest.fixture
def for_ort(folder: Path) -> Artifact:
    """What `folder` holds is for ort-cpu, with uint8 around other zero points than 0."""
    save_graph(quantized(canonical_graph(TinyVit(Spec(depth=1)).model())), folder / "model.onnx")
    return artifact(folder, target=TargetName.ORT_CPU)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({}, True),
        ({"version": "1.6"}, False),
        ({"compute_capabilities": ["8.9"]}, False),
        ({"gpu": "Some RTX"}, True),
        ({"gpu": "Another"}, False),
        ({"batch": (1, 1, 8)}, False),
        ({"batch": (1, 2, 4)}, False),
        ({"engine": EngineKind.TENSORRT}, False),
        ({"rewrite": REWRITE}, True),
        ({"rewrite": "signed_integers 1"}, False),
    ],
)
def test_what_suits(
    folder: Path, monkeypatch: pytest.MonkeyPatch, change: dict[str, Any], expected: bool
) -> None:
    monkeypatch.setattr(tensorrt_rtx, "library_version", lambda: "1.7")
    assert suits(RECORD.model_copy(update=change), loading(folder), GPU) is expected


def test_the_artifacts_own_engine_is_taken(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tensorrt_rtx, "library_version", lambda: "1.7")
    engines = [RECORD.model_copy(update={"model": "float.onnx", "file": "no"}), RECORD]
    found = engine_for(artifact(folder, *engines), loading(folder), folder, Reporter())
    assert found == folder / "engines/model.engine"


@needs_tensorrt
def test_another_is_built_and_loads_up_to_the_gpu(folder: Path) -> None:
    engine = engine_for(artifact(folder, RECORD), loading(folder), folder, Reporter())
    assert engine.parent == folder
    assert engine.stat().st_size > 10_000
    if has_gpu():
        pytest.skip("NOT CHECKED: there is a GPU")
    with pytest.raises(InputError, match=r"\.engine: tensorrt_rtx cannot load it: cudaError"):
        open_runner(replace(loading(folder), model=engine))


@needs_tensorrt
def test_integers_of_onnx_runtime_build(
    folder: Path, for_ort: Artifact, capsys: pytest.CaptureFixture[str]
) -> None:
    engine = engine_for(for_ort, loading(folder), folder, Reporter())
    assert engine.stat().st_size > 10_000
    assert "moving the zero points of model.onnx to 0" in capsys.readouterr().err
    # Another model that is called the same is none of the artifact's.
    other = replace(loading(folder), model=folder / "other" / "model.onnx")
    other.model.parent.mkdir()
    other.model.write_bytes(for_ort.model.read_bytes())
    with pytest.raises(RefusedGraphError, match="zero point"):
        engine_for(for_ort, other, folder, Reporter())


@pytest.mark.parametrize("runner", [name for name in RunnerName if name.takes_engines])
def test_no_library_reads_other_zero_points(
    folder: Path, for_ort: Artifact, monkeypatch: pytest.MonkeyPatch, runner: RunnerName
) -> None:
    """What is handed to the library, also where there is none."""
    asked = []

    def build_engine(model: Path, **options: object) -> EngineBuild:
        asked.append((model, zero_points(import_graph(onnx.load(model))), options))
        return cast(EngineBuild, SimpleNamespace(engine=b"an engine"))

    for library in (tensorrt_rtx, tensorrt_engine):
        monkeypatch.setattr(library, "build_engine", build_engine)
    engine = engine_for(for_ort, loading(folder, runner), folder, Reporter())
    assert engine.read_bytes() == b"an engine"
    ((model, zeros, options),) = asked
    assert all(zero.dtype == np.int8 and not zero.any() for zero in zeros)
    assert not model.exists()
    assert (options["max_batch"], options["opt_batch"]) == (8, 2)
    assert ("compute_capabilities" in options) == (runner is RunnerName.TENSORRT_RTX)


def test_plain_tensorrt_needs_its_library_or_a_gpu(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    plan = loading(folder, RunnerName.TENSORRT)
    with pytest.raises((MissingExtraError, InputError)):
        engine_for(artifact(folder), plan, folder, Reporter())
