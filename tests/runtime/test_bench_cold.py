"""Cold start and memory in a process of its own."""

from pathlib import Path

import onnx
import pytest
from support.tiny_vit import Spec, TinyVit

from regcache.passes.errors import InputError
from regcache.runtime.bench_cold import cold_start, measure_start, peak_memory
from regcache.runtime.runners import Loading, RunnerName

LINUX = Path("/proc/self/status").is_file()


def plan(path: Path, *, width: int = 32) -> Loading:
    onnx.save(TinyVit(Spec(width=width, hidden=4 * width, grid=4)).model(), path)
    return Loading(RunnerName.ORT_CPU, path, 1, (4, 1), (3, 16, 16))


def test_a_fresh_process_knows_nothing_of_this_one(tmp_path: Path) -> None:
    """300 MB that this process had resident does not count."""
    here = peak_memory()
    ballast = bytearray(300_000_000)
    ballast[:: 1 << 12] = b"1" * len(ballast[:: 1 << 12])
    grown = peak_memory()
    del ballast
    start = cold_start(plan(tmp_path / "tiny.onnx"))
    assert start.cold_start_ms == pytest.approx(start.load_ms + start.first_run_ms)
    assert min(start.load_ms, start.first_run_ms) > 0
    assert start.gpu_memory_mb is None
    if LINUX:
        assert here is not None
        assert grown is not None
        assert grown >= 300_000_000
        assert start.peak_memory_mb is not None
        assert start.imports_mb is not None
        assert 10 < start.imports_mb <= start.peak_memory_mb < 250


def test_what_cannot_be_loaded_is_named(tmp_path: Path) -> None:
    loading = Loading(RunnerName.ORT_CPU, tmp_path / "none.onnx", 1, (1,), (3, 16, 16))
    with pytest.raises(InputError, match=r"none\.onnx: .*doesn't exist"):
        cold_start(loading)


def test_the_smallest_batch_comes_first_and_a_fixed_one_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from regcache.runtime import ort_cpu

    seen: list[int] = []
    run = ort_cpu.OrtCpuRunner.run

    def record(self: ort_cpu.OrtCpuRunner, images: object) -> object:
        seen.append(len(images))  # type: ignore[arg-type]
        return run(self, images)  # type: ignore[arg-type]

    monkeypatch.setattr(ort_cpu.OrtCpuRunner, "run", record)
    loading = plan(tmp_path / "tiny.onnx")
    measure_start(loading)
    assert seen == [1, 4]
    model = onnx.load(loading.model)
    for value in (*model.graph.input, *model.graph.output):
        value.type.tensor_type.shape.dim[0].dim_value = 5
    onnx.save(model, loading.model)
    measure_start(loading)
    assert seen == [1, 4, 5]


def test_peak_memory_is_linux_own(tmp_path: Path) -> None:
    status = tmp_path / "status"
    status.write_text("VmPeak:\t  9 kB\nVmHWM:\t  125 kB\nVmRSS:\t 100 kB\n")
    assert peak_memory(status) == 125 * 1024
    status.write_text("Name: cat\n")
    assert peak_memory(status) is None
    assert peak_memory(tmp_path / "none") is None
