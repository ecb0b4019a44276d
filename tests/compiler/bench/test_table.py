"""What people read of a benchmark: columns only for what was measured."""

import io
import re
from pathlib import Path

import pytest
from rich.console import Console
from rich.table import Table
from support.bench_results import runner

from regcache.compiler.bench.plot import write_plot
from regcache.compiler.bench.table import bench_lines, bench_tables, speed_table
from regcache.compiler.cli.tables import print_tables
from regcache.runtime.bench_result import (
    BenchResult,
    Machine,
)
from regcache.runtime.engine_cost import PredictedTime
from regcache.runtime.runners import RunnerName


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


def test_a_prediction_stands_beside_what_was_measured() -> None:
    measured = runner(RunnerName.TENSORRT_RTX)
    one, other = (
        PredictedTime(
            gpu="A GPU", batch=1, total_ms=total, memory_ms=1, arithmetic_ms=1, launches_ms=1,
            ratio=ratio,
        )
        for total, ratio in ((6.0, None), (4.5, 0.75))
    )  # fmt: skip
    times = {"predicted_float": one, "predicted_quantized": other}
    batches = (measured.batches[0].model_copy(update=times),)
    console = Console(width=140, record=True, file=io.StringIO())
    console.print(speed_table(measured.model_copy(update={"batches": batches})))
    original, quantized = (
        [cell.strip() for cell in line.split("│")[1:-1]]
        for line in console.export_text().splitlines()[-3:-1]
    )
    assert original[-5:] == ["6.00", "", "", "", ""]
    assert quantized[-5:] == ["4.50", "0.500", "0.250", "0.750", "321"]


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
