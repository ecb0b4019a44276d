"""A benchmark as tables and lines for people."""

from collections.abc import Iterator

from rich.table import Column, Table

from regcache.runtime.bench_result import (
    BenchResult,
    ColdStart,
    RunnerResult,
    Timing,
)

_NONE = "-"


def bench_tables(result: BenchResult) -> list[Table]:
    """Both models by batch size, a table for every runner; and how they start."""
    starts = _table("start", "model", "load ms", "first run", "both", "peak MB", "imports",
                    "GPU")  # fmt: skip
    for runner in result.runners:
        starts.add_row(runner.runner.value, "float", *_start(runner.float_start))
        starts.add_row("", "quantized", *_start(runner.quantized_start))
    return [*(speed_table(runner) for runner in result.runners), starts]


def speed_table(runner: RunnerResult) -> Table:
    """One runner's table; columns that this runner does not measure are left out."""
    has_copies = runner.runner.on_gpu
    has_energy = runner.energy.unreadable is None
    has_predictions = any(batch.predicted_quantized is not None for batch in runner.batches)
    optional = ["to GPU", "and back"] * has_copies + ["J/image"] * has_energy
    optional += ["predicted ms"] * has_predictions
    ratios = ["ratio"] + ["compute"] * has_copies + ["predicted"] * has_predictions
    count = runner.threads
    threads = "" if count is None else f", {count} thread{'s' if count > 1 else ''}"
    names = ("model", "p50 ms", "p90", "p99", "images/s", *optional, *ratios, "runs")
    table = _table("batch", *names, title=f"{runner.runner}{threads}")
    for batch in runner.batches:
        compute = _NONE if batch.compute_ratio is None else f"{batch.compute_ratio:.3f}"
        told = batch.predicted_quantized
        ratio = _NONE if told is None or told.ratio is None else f"{told.ratio:.3f}"
        tail = [f"{batch.ratio:.3f}", *[compute] * has_copies, *[ratio] * has_predictions]
        tail.append(str(batch.runs))
        blank = [""] * len(tail)
        for model, timing, predicted, last in (
            ("float", batch.float_model, batch.predicted_float, blank),
            ("quantized", batch.quantized_model, batch.predicted_quantized, tail),
        ):
            cells = _times(timing)
            cells += _copies(timing) * has_copies + _joules(timing) * has_energy
            cells += [_NONE if predicted is None else f"{predicted.total_ms:.2f}"] * has_predictions
            table.add_row(str(batch.batch), model, *cells, *last)
    return table


def bench_lines(result: BenchResult) -> Iterator[str]:
    """The machine, what could not be read, and what is over the limit."""
    machine = result.machine
    yield f"{machine.cpu}, {machine.cpus} CPUs, GPU: {machine.gpu or 'none'}"
    for runner in result.runners:
        if runner.placement is not None:
            counts = ", ".join(f"{count} on {where}" for where, count in runner.placement.items())
            yield f"{runner.runner}: nodes: {counts}"
        if runner.energy.unreadable is not None:
            yield f"{runner.runner}: no energy: {runner.energy.unreadable}"
        yield from _over(runner, result.max_ratio)


def _over(runner: RunnerResult, limit: float | None) -> Iterator[str]:
    if limit is None:
        return
    for batch in runner.over(limit):
        yield (f"{runner.runner}: ratio {batch.ratio:.3f} at batch {batch.batch} is over {limit:g}")


def _table(first: str, *others: str, title: str | None = None) -> Table:
    columns = (Column(other, justify="right", no_wrap=True) for other in others)
    return Table(Column(first, no_wrap=True), *columns, title=title, title_justify="left")


def _times(timing: Timing) -> list[str]:
    spread = timing.latency_ms
    found = [f"{value:.2f}" for value in (spread.p50, spread.p90, spread.p99)]
    return [*found, f"{timing.images_per_second:.1f}"]


def _copies(timing: Timing) -> list[str]:
    copies = (timing.to_device_ms, timing.to_host_ms)
    return [_NONE if part is None else f"{part.p50:.2f}" for part in copies]


def _joules(timing: Timing) -> list[str]:
    return [_NONE if timing.joules_per_image is None else f"{timing.joules_per_image:.3g}"]


def _start(start: ColdStart) -> tuple[str, ...]:
    sizes = (start.peak_memory_mb, start.imports_mb, start.gpu_memory_mb)
    return (
        *(f"{value:.0f}" for value in (start.load_ms, start.first_run_ms, start.cold_start_ms)),
        *(_NONE if size is None else f"{size:.0f}" for size in sizes),
    )
