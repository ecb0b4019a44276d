"""What people read of a benchmark: columns only for what was measured."""

import io
import re
from pathlib import Path

import pytest
from rich.console import Console
from rich.table import Table

from regcache.compiler.bench.plot import write_plot
from regcache.compiler.bench.table import bench_lines, bench_tables
from regcache.compiler.cli.tables import print_tables
from regcache.runtime.bench_result import (
    BatchResult,
    BenchResult,
    ColdStart,
    EnergySource,
    Machine,
    Percentiles,
    RunnerResult,
    Timing,
)
from regcache.runtime.runners import RunnerName


def percentiles(value: float) -> Percentiles:
    return Percentiles(p50=value, p90=2 * value, p99=3 * value)


def timing(value: float, *, on_gpu: bool) -> Timing:
    part = percentiles(value / 4) if on_gpu else None
    return Timing(
        latency_ms=percentiles(value),
        images_per_second=1e3 / value,
        to_device_ms=part,
        compute_ms=part,
        to_host_ms=part,
        joules_per_image=0.125 if on_gpu else None,
    )


def runner(name: RunnerName) -> RunnerResult:
    gpu = name.on_gpu
    batch = BatchResult(
        batch=1,
        runs=321,
        ratio=0.5,
        compute_ratio=0.25 if gpu else None,
        float_model=timing(8.0, on_gpu=gpu),
        quantized_model=timing(4.0, on_gpu=gpu),
    )
    start = ColdStart(
        load_ms=1,
        first_run_ms=2,
        cold_start_ms=3,
        peak_memory_mb=200,
        imports_mb=None,
        gpu_memory_mb=777 if gpu else None,
    )
    return RunnerResult(
        runner=name,
        threads=None if gpu else 2,
        placement={"CUDAExecutionProvider": 90, "CPUExecutionProvider": 3} if gpu else None,
        batches=(batch,),
        float_start=start,
        quantized_start=start,
        energy=EnergySource(source="NVML") if gpu else EnergySource(unreadable="no RAPL"),
    )


@pytest.fixture
def result() -> BenchResult:
    return BenchResult(
        artifact="an/artifact",
        target="ort-cpu",
        against="float.onnx",
        seconds=1.0,
        machine=Machine(
            cpu="A CPU", cpus=2, system="Linux", python="3.11", gpu="A GPU", versions={}
        ),
        runners=(runner(RunnerName.ORT_CPU), runner(RunnerName.ORT_CUDA)),
        max_ratio=0.4,
        passed=False,
    )


def test_tables(result: BenchResult) -> None:
    console = Console(width=120, record=True, file=io.StringIO())
    cpu, gpu, starts = bench_tables(result)
    assert [column.header for column in cpu.columns][-3:] == ["images/s", "ratio", "runs"]
    added = ["to GPU", "and back", "J/image", "ratio", "compute", "runs"]
    assert [column.header for column in gpu.columns][-6:] == added
    console.print(gpu)
    last = console.export_text().splitlines()[-2].split("│")
    cells = [cell.strip() for cell in last[1:-1]]
    assert cells == ["1", "quantized", "4.00", "8.00", "12.00", "250.0", "1.00", "1.00", "0.125",
                     "0.500", "0.250", "321"]  # fmt: skip
    console.print(starts)
    assert "777" in console.export_text()


@pytest.mark.parametrize("columns", ["40", "80"])
def test_a_pipe_gets_every_column(
    result: BenchResult,
    columns: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("COLUMNS", columns)
    monkeypatch.delenv("FORCE_COLOR", raising=False)  # it makes Rich take a pipe for a terminal
    for table in bench_tables(result):
        print_tables([table])
        lines = capsys.readouterr().out.splitlines()
        header = next(line for line in lines if line.startswith("┃"))
        names = [cell.strip() for cell in header.split("┃")[1:-1]]
        assert names == [column.header for column in table.columns]
        assert "…" not in "".join(lines)


def test_a_terminal_is_kept_to_where_cells_may_wrap(
    result: BenchResult, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A table of numbers is not cut there either."""
    monkeypatch.setenv("COLUMNS", "40")
    monkeypatch.setenv("FORCE_COLOR", "1")
    words = Table("name", "text")
    words.add_row("x", "word " * 20)
    print_tables([words])
    assert max(map(len, plain(capsys.readouterr().out))) <= 40
    print_tables(bench_tables(result))
    assert "…" not in capsys.readouterr().out


def plain(text: str) -> list[str]:
    """Lines without colours."""
    return re.sub(r"\x1b\[[0-9;]*m", "", text).splitlines()


def test_lines(result: BenchResult) -> None:
    assert list(bench_lines(result)) == [
        "A CPU, 2 CPUs, GPU: A GPU",
        "ort-cpu: no energy: no RAPL",
        "ort-cpu: ratio 0.500 at batch 1 is over 0.4",
        "ort-cuda: nodes: 90 on CUDAExecutionProvider, 3 on CPUExecutionProvider",
        "ort-cuda: ratio 0.500 at batch 1 is over 0.4",
    ]


def test_the_same_numbers_give_the_same_picture(result: BenchResult, tmp_path: Path) -> None:
    pictures = [tmp_path / name for name in ("one.svg", "two.svg")]
    for picture in pictures:
        write_plot(result, picture)
    assert pictures[0].read_text() == pictures[1].read_text()
    assert "ort-cuda" in pictures[0].read_text()
