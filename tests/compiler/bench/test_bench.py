"""`regcache bench` from the command line on a tiny artifact."""

import json
from dataclasses import replace
from pathlib import Path

import onnx
import pytest
from support.command_line import Outcome, assert_refused, run_regcache
from support.quantized_graphs import zero_points
from support.tiny_source import RECIPE, SPEC, photos
from support.tiny_vit import TinyVit

from regcache.compiler.artifact.artifact import Artifact
from regcache.compiler.bench import engines as bench_engines
from regcache.compiler.bench.bench import loading_of, parse_batches, parse_runners
from regcache.compiler.cli.options import listed
from regcache.compiler.reporter import Reporter
from regcache.export.onnx_file import sidecar
from regcache.passes.errors import InputError
from regcache.passes.onnx_file import import_graph
from regcache.runtime import open_runner, tensorrt_rtx
from regcache.runtime.bench_result import BenchResult
from regcache.runtime.gpu import Gpu
from regcache.runtime.runners import RunnerName

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny encoder and its artifact, which no test changes."""
    path = tmp_path_factory.mktemp("bench")
    onnx.save(TinyVit(SPEC).model(), path / "tiny.onnx")
    sidecar(path / "tiny.onnx").write_text(RECIPE.to_json())
    images = photos(path / "photos", 6, seed=1)
    command = ("compile", path / "tiny.onnx", "--images", images, "-o", path / "artifact")
    compiled = run_regcache(*command, "--rounding", "nearest", "--accept-slower", "--no-equalize")
    assert compiled.code == 0, compiled
    return path


def bench(folder: Path, *options: object) -> Outcome:
    return run_regcache("bench", folder / "artifact", "--seconds", 0, "--threads", 1, *options)


def test_numbers_table_and_plot(folder: Path, tmp_path: Path) -> None:
    report, plot = tmp_path / "bench.json", tmp_path / "bench.png"
    outcome = bench(folder, "--batch", "1, 3", "--max-ratio", 1e6, "--json", report, "--plot", plot)
    assert outcome.code == 0, outcome
    assert "is over" not in outcome.out
    text = report.read_text()
    assert not {"NaN", "Infinity"} & set(text.replace(",", " ").split())
    result = BenchResult.model_validate_json(text)
    assert (result.target, result.max_ratio, result.passed) == ("ort-cpu", 1e6, True)
    assert result.against == str(folder / "tiny.onnx")
    (runner,) = result.runners
    assert (runner.runner, runner.threads, runner.placement) == (RunnerName.ORT_CPU, 1, None)
    assert [(row.batch, row.runs) for row in runner.batches] == [(1, 4), (3, 4)]
    assert runner.float_start.load_ms > 0
    assert (runner.energy.source is None) != (runner.energy.unreadable is None)
    for row in runner.batches:
        assert row.float_model.latency_ms.p50 <= row.float_model.latency_ms.p99
        assert (row.float_model.joules_per_image is None) == (runner.energy.source is None)
    assert "quantized" in outcome.out
    assert "ort-cpu, 1 thread\n" in outcome.out
    assert plot.read_bytes().startswith(b"\x89PNG")
    assert plot.stat().st_size > 5000
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bench.json", "bench.png"]


def test_another_float_model_and_json_on_stdout(folder: Path, tmp_path: Path) -> None:
    plot = tmp_path / "bench.svg"
    options = ("--against", folder / "tiny.onnx", "--half-float", "--batch", "1", "--plot", plot)
    outcome = bench(folder, *options, "--json", "-")
    assert outcome.code == 0, outcome
    result = json.loads(outcome.out)
    assert result["against"] == str(folder / "tiny.onnx")
    assert "<svg" in plot.read_text()


def test_a_repeated_option_adds_up(folder: Path) -> None:
    options = ("--batch", "3", "--batch", "1, 2", "--runner", "ort-cpu", "--runner", "ort-cpu")
    outcome = bench(folder, *options, "--json", "-")
    assert outcome.code == 0, outcome
    (runner,) = json.loads(outcome.out)["runners"]
    assert [row["batch"] for row in runner["batches"]] == [3, 1, 2]
    assert_refused(bench(folder, "--runner", "gpu", "--runner", "ort-cpu"), "--runner 'gpu'")


def test_a_ratio_over_the_limit_is_exit_code_1(folder: Path) -> None:
    outcome = bench(folder, "--batch", "2", "--max-ratio", 1e-6)
    assert outcome.code == 1
    assert "at batch 2 is over 1e-06" in outcome.out


class TestRefusals:
    """Exit code 2 and one line, before anything is measured."""

    @pytest.mark.parametrize("runner", [name for name in RunnerName if name.on_gpu])
    def test_a_gpu_runner(
        self, folder: Path, monkeypatch: pytest.MonkeyPatch, runner: RunnerName
    ) -> None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
        outcome = bench(folder, "--runner", f"ort-cpu,{runner}")
        assert_refused(outcome, f"runner {runner}")
        assert "timing" not in outcome.err

    def test_a_gpu_that_tensorrt_rtx_leaves_out(
        self, folder: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """One line that says which GPU, and what runs there, before the first runner is timed."""
        hopper = Gpu("NVIDIA H100 80GB HBM3", "9.0", "580.1", 1 << 36)
        for module in (open_runner, bench_engines):
            monkeypatch.setattr(module, "find_gpu", lambda: hopper)
        monkeypatch.setattr(open_runner, "find_spec", lambda _name: object())
        capabilities = "supported_compute_capabilities"
        monkeypatch.setattr(tensorrt_rtx, capabilities, lambda: ("8.9", "12.0"))
        monkeypatch.setattr(tensorrt_rtx, "library_version", lambda: "1.7")
        outcome = bench(folder, "--runner", "ort-cpu", "--runner", "tensorrt-rtx")
        assert_refused(
            outcome,
            "NVIDIA H100 80GB HBM3 (compute capability 9.0): TensorRT-RTX 1.7 runs on 8.9, 12.0 "
            "alone: --runner tensorrt",
        )
        assert "timing" not in outcome.err

    def test_options(self, folder: Path) -> None:
        assert_refused(bench(folder, "--runner", "gpu"), "--runner 'gpu'", "there are ort-cpu, ")
        outcome = bench(folder, "--runner", "openvin")
        assert_refused(outcome, "--runner 'openvin'", "did you mean openvino?")
        assert_refused(bench(folder, "--batch", "0"), "--batch '0'")
        assert_refused(bench(folder, "--plot", "bench.pdf"), "must end in .png or .svg")

    def test_models(self, folder: Path, tmp_path: Path) -> None:
        assert_refused(bench(tmp_path), "no regcache artifact")
        assert_refused(bench(folder, "--against", tmp_path / "no.onnx"), "no.onnx", "doesn't exist")
        larger = tmp_path / "larger.onnx"
        onnx.save(TinyVit(replace(SPEC, grid=5)).model(), larger)
        outcome = bench(folder, "--against", larger)
        assert_refused(outcome, "larger.onnx: takes [batch, 3, 20, 20], not [1, 3, 16, 16]")

    def test_a_missing_matplotlib(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("regcache.compiler.bench.plot.find_spec", lambda _name: None)
        outcome = bench(folder, "--plot", "bench.png")
        assert_refused(outcome, 'needs matplotlib: pip install "regcache[report]"')


def test_tensorrt_s_provider_reads_no_other_zero_points(folder: Path, tmp_path: Path) -> None:
    artifact = Artifact.open(folder / "artifact")
    assert any(zero.any() for zero in zero_points(import_graph(onnx.load(artifact.model))))

    def model_of(runner: RunnerName, model: Path) -> Path:
        return loading_of(artifact, runner, (1,), 1, tmp_path, Reporter(), model=model).model

    signed = model_of(RunnerName.ORT_TENSORRT, artifact.model)
    assert signed.parent == tmp_path
    assert not any(zero.any() for zero in zero_points(import_graph(onnx.load(signed))))
    assert model_of(RunnerName.ORT_TENSORRT, artifact.float_model) == artifact.float_model
    assert model_of(RunnerName.ORT_CUDA, artifact.model) == artifact.model


def test_lists() -> None:
    assert listed(["8, 1", "8"]) == ["8", "1", "8"]
    assert parse_batches(["8", "1", "8"]) == (8, 1)
    assert parse_runners(["tensorrt", "ort-cpu"]) == (RunnerName.TENSORRT, RunnerName.ORT_CPU)
    for text in ("", "1,", "-1", "1.5", "a"):
        with pytest.raises(InputError, match="must be a batch size, or some as 1,8"):
            parse_batches(listed([text]))
    with pytest.raises(InputError, match="--runner ''"):
        parse_runners(listed(["ort-cpu,"]))
