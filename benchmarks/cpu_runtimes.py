"""Float, bf16 and int8 on every CPU runtime: time as a share of ONNX Runtime's float, and accuracy.

Each model runs in a process of its own, as sessions that share one spin against one another; all
of them in turn, some rounds over. Its time is the least of the rounds' medians, as what else the
machine does only adds to it; the CPUs' time, in all, is told beside it. Accuracy is beside ONNX
Runtime's float.

    python benchmarks/cpu_runtimes.py FLOAT_ONNX --evaluation DIR [--artifact ARTIFACT]...
        [--model NAME=FILE_ONNX]... [--rounds 3] [--threads N] [--json FILE]

An artifact runs in ONNX Runtime and in OpenVINO; another library's file, such as the one that
`peers.py --only nncf-mixed --keep DIR` leaves, in OpenVINO. Where the CPU computes no bf16, that is
left out.
"""

import json
import statistics
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import typer
from rich.console import Console
from rich.table import Column, Table

from regcache.compiler.artifact.artifact import Artifact
from regcache.export.onnx_file import sidecar
from regcache.passes.errors import InputError
from regcache.passes.model_files import model_files
from regcache.passes.preprocess import Preprocess
from regcache.runtime.images import ImageFolder
from regcache.runtime.list_images import list_images
from regcache.runtime.machine import cpu_features, cpu_name
from regcache.runtime.openvino_options import InferencePrecision, check_openvino, computes_bf16
from regcache.runtime.parity import ParityMeter
from regcache.runtime.run_with import RuntimeName
from regcache.runtime.session import available_cpus
from regcache.runtime.time_alone import BATCHES, Deployed, Timed, embed_alone, least, time_alone

_WIDTH = 160


@dataclass(frozen=True)
class Case:
    """One model in one runtime."""

    name: str
    deployed: Deployed

    @property
    def label(self) -> str:
        """As the table names it."""
        return f"{self.deployed.runtime.value}, {self.name}, {self.deployed.precision.value}"


@dataclass(frozen=True)
class Row:
    """A case with its shares of ONNX Runtime's float time, and how close to float it is."""

    label: str
    shares: dict[int, float]
    milliseconds: dict[int, float]
    rounds: list[dict[int, float]]
    cpu_shares: dict[int, float]
    load_ms: float
    peak_mb: float | None
    megabytes: float
    cosine_mean: float
    cosine_min: float
    nn_agreement: float


def cases_of(
    float_onnx: Path, artifacts: list[Path], models: list[tuple[str, Path]], threads: int
) -> Iterator[Case]:
    """ONNX Runtime's float first, which all others are a share of."""
    ort, openvino = RuntimeName.ONNXRUNTIME, RuntimeName.OPENVINO
    own = [(f"regcache {folder.name}", Artifact.open(folder).model) for folder in artifacts]
    for name, model in (("float", float_onnx), *own):
        yield Case(name, Deployed(model, ort, threads))
    precisions = [InferencePrecision.F32]
    precisions += [InferencePrecision.BF16] if computes_bf16() else []
    for name, model in (("float", float_onnx), *own, *models):
        for precision in precisions:
            yield Case(name, Deployed(model, openvino, threads, precision))


def time_all(
    cases: list[Case], recipe: Preprocess, rounds: int, seconds: float
) -> dict[Case, list[Timed]]:
    """Every case in turn, `rounds` times."""
    says = Console(stderr=True, highlight=False)
    timed: dict[Case, list[Timed]] = {case: [] for case in cases}
    for turn in range(rounds):
        for case in cases:
            says.print(f"round {turn + 1} of {rounds}: {case.label}", markup=False)
            timed[case].append(time_alone(case.deployed, recipe, seconds))
    return timed


def rows_of(timed: dict[Case, list[Timed]], recipe: Preprocess, evaluation: Path) -> list[Row]:
    """The medians of every case, and its accuracy beside the first."""
    paths, first = list_images(evaluation), next(iter(timed))
    images = np.concatenate([batch.images for batch in ImageFolder(paths, recipe, 8)])
    names, truth = [path.name for path in paths], embed_alone(first.deployed, images)
    rows = []
    for case, own in timed.items():
        meter = ParityMeter()
        meter.update([truth], [embed_alone(case.deployed, images)], names)
        parity = meter.result(reference="float-onnx")
        times, base = least(own), least(timed[first])
        row = Row(
            label=case.label,
            shares={batch: times[batch] / base[batch] for batch in times},
            milliseconds=times,
            rounds=[dict(one.milliseconds) for one in own],
            cpu_shares={batch: used(own, batch) / used(timed[first], batch) for batch in times},
            load_ms=statistics.median(one.load_ms for one in own),
            peak_mb=own[-1].peak_mb,
            megabytes=sum(path.stat().st_size for path in model_files(case.deployed.model)) / 1e6,
            cosine_mean=parity.cosine_mean,
            cosine_min=parity.cosine_min,
            nn_agreement=parity.nn_agreement,
        )
        rows.append(row)
    return rows


def used(rounds: list[Timed], batch: int) -> float:
    """The least milliseconds of all CPUs together."""
    return min(one.cpu_ms[batch] for one in rounds)


def table_of(rows: list[Row], title: str) -> Table:
    """One line for each case."""
    heads = [f"share at {batch}" for batch in BATCHES]
    heads += [f"CPU at {batch}" for batch in BATCHES] + [f"ms at {batch}" for batch in BATCHES]
    heads += ["images/s", "load ms", "peak MB", "file MB", "cosine", "worst", "nn"]
    columns = [Column(head, justify="right", no_wrap=True) for head in heads]
    table = Table(Column("runtime, model, rest", no_wrap=True), *columns, title=title)
    for row in rows:
        last = BATCHES[-1]
        table.add_row(
            row.label,
            *(f"{row.shares[batch]:.3f}" for batch in BATCHES),
            *(f"{row.cpu_shares[batch]:.3f}" for batch in BATCHES),
            *(f"{row.milliseconds[batch]:.1f}" for batch in BATCHES),
            f"{1e3 * last / row.milliseconds[last]:.0f}",
            f"{row.load_ms:.0f}",
            "" if row.peak_mb is None else f"{row.peak_mb:.0f}",
            f"{row.megabytes:.1f}",
            f"{row.cosine_mean:.6f}",
            f"{row.cosine_min:.4f}",
            f"{row.nn_agreement:.3f}",
        )
    return table


def _recipe(model: Path) -> Preprocess:
    for file in (sidecar(model), model.with_name("preprocess.json")):
        if file.is_file():
            return Preprocess.from_json(file.read_text(encoding="utf-8"))
    raise InputError(f"{model}: no {sidecar(model).name} or preprocess.json beside it")


def _named(text: str) -> tuple[str, Path]:
    name, equals, file = text.partition("=")
    if not equals or not Path(file).is_file():
        raise typer.BadParameter(f"--model {text}: NAME=FILE_ONNX is wanted, of a file there is")
    return name, Path(file)


def main(
    float_onnx: Path,
    evaluation: Annotated[Path, typer.Option(help="Photographs that nothing was calibrated on.")],
    artifact: Annotated[list[Path] | None, typer.Option(help="An artifact of regcache.")] = None,
    model: Annotated[list[str] | None, typer.Option(help="NAME=FILE_ONNX, for OpenVINO.")] = None,
    rounds: Annotated[int, typer.Option(min=1)] = 3,
    threads: int | None = None,
    seconds: Annotated[float, typer.Option(help="Of timed runs, by batch size.")] = 2.0,
    json_file: Annotated[Path | None, typer.Option("--json")] = None,
) -> None:
    """Print one table of all models in all runtimes."""
    threads = threads or available_cpus()
    try:
        check_openvino("this table")
        cases = list(
            cases_of(float_onnx, artifact or [], [_named(one) for one in model or []], threads)
        )
        recipe = _recipe(float_onnx)
        timed = time_all(cases, recipe, rounds, seconds)
        rows = rows_of(timed, recipe, evaluation)
    except InputError as error:
        raise typer.BadParameter(str(error)) from error
    machine = f"{cpu_name()}, {' '.join(cpu_features()) or 'features unknown'}, {threads} threads"
    console = Console()
    console.width = max(console.width, _WIDTH)
    console.print(table_of(rows, machine))
    if json_file is not None:
        found = {"machine": machine, "rounds": rounds, "rows": [asdict(row) for row in rows]}
        json_file.write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    typer.run(main)
