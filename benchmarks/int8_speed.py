"""What int8 saves on ONNX Runtime's CPU: time against the float original, and where it goes.

Both models run in turn, in one process; the ratio is what counts. The time by op type is measured
in runs of its own, at batch 1, and holds what profiling costs.

    python benchmarks/int8_speed.py ARTIFACT [--threads 2] [--json FILE]
"""

import json
import tempfile
from collections import Counter
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import onnxruntime as ort
import typer
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Column, Table

from regcache.compiler.artifact.artifact import Artifact
from regcache.runtime.optimised_graph import integer_matmuls, optimised_ops
from regcache.runtime.runners import Loading, RunnerName
from regcache.runtime.session import OrtSession, available_cpus
from regcache.runtime.speed import SpeedRatio, compare_speed

SHOWN_OPS = 12


def op_milliseconds(
    model: Path, images: NDArray[Any], threads: int, runs: int = 10
) -> dict[str, float]:
    """Milliseconds of a run by op type, the slowest first: the mean of `runs` after a warm-up."""
    with tempfile.TemporaryDirectory() as folder:
        options = ort.SessionOptions()
        options.intra_op_num_threads = threads
        options.enable_profiling = True
        options.profile_file_prefix = f"{folder}/profile"
        session = ort.InferenceSession(str(model), options, providers=["CPUExecutionProvider"])
        feed = {session.get_inputs()[0].name: images}
        for _ in range(runs + 1):
            session.run(None, feed)
        events: list[dict[str, Any]] = json.loads(Path(session.end_profiling()).read_text())
    started = sorted(event["ts"] for event in events if event["name"] == "model_run")
    total: Counter[str] = Counter()
    for event in events:
        if event["cat"] == "Node" and event["ts"] >= started[1]:
            total[event["args"]["op_name"]] += event["dur"]
    return {op: micros / runs / 1e3 for op, micros in total.most_common()}


def speed_table(speed: list[SpeedRatio]) -> Table:
    """Both models' time and their ratio at every batch size."""
    table = Table("batch", "threads", "float ms", "int8 ms", "int8 / float", "rounds")
    for row in speed:
        times = (f"{row.float_ms:.2f}", f"{row.quantized_ms:.2f}", f"{row.ratio:.3f}")
        table.add_row(str(row.batch), str(row.threads), *times, str(row.rounds))
    return table


def op_table(profiles: dict[str, dict[str, float]], counts: dict[str, dict[str, int]]) -> Table:
    """Time and number of nodes of the op types that take longest, float beside int8."""
    headers = [f"{name} {what}" for name in profiles for what in ("nodes", "ms", "%")]
    columns = [Column(header, justify="right") for header in headers]
    table = Table(Column("op", no_wrap=True), *columns)
    ops = Counter[str]()
    for profile in profiles.values():
        ops.update(profile)
    for op in [op for op, _ in ops.most_common(SHOWN_OPS)]:
        cells = []
        for name, profile in profiles.items():
            share = 100 * profile.get(op, 0.0) / sum(profile.values())
            cells += [str(counts[name].get(op, 0)), f"{profile.get(op, 0.0):.2f}", f"{share:.1f}"]
        table.add_row(op, *cells)
    sums = (f"{sum(profile.values()):.2f}" for profile in profiles.values())
    table.add_row("all", *(cell for total in sums for cell in ("", total, "100.0")))
    return table


def main(
    artifact: Path,
    threads: Annotated[int | None, typer.Option()] = None,
    json_file: Annotated[Path | None, typer.Option("--json")] = None,
) -> None:
    """Print the ratios at batch 1 and 8, the integer matmuls, and the time by op type."""
    opened = Artifact.open(artifact)
    models = {"float": opened.float_model, "int8": opened.model}
    shape, dtype = opened.recipe.shape, opened.recipe.dtype
    threads = threads or available_cpus()
    images = Loading(RunnerName.ORT_CPU, opened.model, threads, (8,), shape, dtype).images(8)
    speed = compare_speed(models["float"], models["int8"], images, threads=threads)
    with OrtSession(models["int8"]) as session:
        few = np.resize(images, (session.fixed_batch or 1, *shape))
    counts = {name: optimised_ops(model, threads=threads) for name, model in models.items()}
    profiles = {name: op_milliseconds(model, few, threads) for name, model in models.items()}
    console = Console()
    console.print(speed_table(speed))
    for name, ops in counts.items():
        console.print(
            f"{name}: {integer_matmuls(ops)} integer matmuls of {sum(ops.values())} nodes"
        )
    console.print(op_table(profiles, counts))
    if json_file is not None:
        figures = {
            "speed": [row.model_dump() for row in speed],
            "integer_matmuls": {name: integer_matmuls(ops) for name, ops in counts.items()},
            "ops": counts,
            "op_ms": profiles,
        }
        json_file.write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    typer.run(main)
