"""A benchmark as a picture: bars of the median latency, with whiskers."""

from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from regcache.compiler.job.staging import staged_file
from regcache.passes.errors import InputError, MissingExtraError
from regcache.runtime.bench_result import BatchResult, BenchResult, Percentiles, RunnerResult

if TYPE_CHECKING:
    from matplotlib.axes import Axes

SUFFIXES = (".png", ".svg")
_WIDTH = 0.38


def check_plot(path: Path) -> None:
    """Check that a plot can be drawn, before what it shows is measured.

    Raises MissingExtraError without matplotlib, InputError where the name ends otherwise.
    """
    if path.suffix not in SUFFIXES:
        raise InputError(f"--plot {path}: must end in {' or '.join(SUFFIXES)}")
    if find_spec("matplotlib") is None:
        raise MissingExtraError("--plot", extra="report", module="matplotlib")


def write_plot(result: BenchResult, path: Path) -> None:
    """Draw the latency by batch size, one panel a runner; needs no display.

    The bars are medians, per image so that all batch sizes show; thick whiskers reach up to the
    90th, thin ones to the 99th percentile.
    """
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    count = len(result.runners)
    figure = Figure(figsize=(1.5 + 4.5 * count, 4.2), layout="constrained")
    panels = figure.subplots(1, count, squeeze=False)[0]
    for panel, runner in zip(panels, result.runners, strict=True):
        _draw(panel, runner)
    panels[0].set_ylabel("ms / image (median; whiskers p90, p99)")
    figure.suptitle(f"{Path(result.artifact).name}, {result.target}: quantized against float")
    # Without a date and random names, the same numbers give the same bytes.
    metadata = {"Date": None} if path.suffix == ".svg" else None
    fixed = rc_context({"svg.hashsalt": "regcache", "svg.fonttype": "none"})
    with staged_file(path) as staged, fixed:
        figure.savefig(staged, metadata=metadata, dpi=150)


def _draw(panel: "Axes", runner: RunnerResult) -> None:
    for offset, which in ((-_WIDTH / 2, "float"), (_WIDTH / 2, "quantized")):
        latencies = [_per_image(batch, which) for batch in runner.batches]
        places = [index + offset for index in range(len(latencies))]
        middles = [latency.p50 for latency in latencies]
        panel.bar(places, middles, _WIDTH, label=which)
        p90, p99 = [latency.p90 for latency in latencies], [latency.p99 for latency in latencies]
        for line, ends in ((3.0, p90), (1.0, p99)):
            reach = [end - middle for end, middle in zip(ends, middles, strict=True)]
            bars = [[0.0] * len(reach), reach]
            panel.errorbar(places, middles, yerr=bars, fmt="none", ecolor="black", elinewidth=line)
    labels = [f"batch {batch.batch}\n{batch.ratio:.2f} x" for batch in runner.batches]
    panel.set_xticks(range(len(labels)), labels)
    panel.set_title(runner.runner.value)
    panel.legend()


def _per_image(batch: BatchResult, which: str) -> Percentiles:
    timing = batch.float_model if which == "float" else batch.quantized_model
    latency = timing.latency_ms
    return Percentiles(
        p50=latency.p50 / batch.batch, p90=latency.p90 / batch.batch, p99=latency.p99 / batch.batch
    )
