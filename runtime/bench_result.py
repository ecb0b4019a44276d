"""What a benchmark measured, as it is written to JSON: all numbers finite, or null."""

from regcache.runtime.engine_cost import PredictedTime
from regcache.runtime.finite_record import FiniteRecord
from regcache.runtime.runners import RunnerName
from regcache.runtime.shown_table import Row, ShownTable


class Percentiles(FiniteRecord):
    """Percentiles of a time in milliseconds, over runs."""

    p50: float
    """Half of the runs took no longer."""
    p90: float
    """90 % of the runs took no longer."""
    p99: float
    """99 % of the runs took no longer; with fewer than 100, it lies between the slowest two."""


class Timing(FiniteRecord):
    """One model's runs at one batch size."""

    latency_ms: Percentiles
    """From images in ordinary memory to outputs in ordinary memory."""
    images_per_second: float
    """Batch size / mean latency, one run after the other."""
    to_device_ms: Percentiles | None = None
    """The part of a run that copies images to the device; None where nothing is copied."""
    compute_ms: Percentiles | None = None
    """The part of a run between the copies; None where nothing is copied."""
    to_host_ms: Percentiles | None = None
    """The part of a run that copies outputs back; None where nothing is copied."""
    joules_per_image: float | None = None
    """Energy of runs back to back; None where none can be read."""


class BatchResult(FiniteRecord):
    """Both models at one batch size."""

    batch: int
    """Images in a run."""
    runs: int
    """Runs of each model, timed in turn."""
    ratio: float
    """Median of quantized / float latency over pairs of neighbouring runs; below 1, quantized is
    faster.
    """
    compute_ratio: float | None
    """`ratio` without the copies; None where there are none."""
    float_model: Timing
    """The float model's runs."""
    quantized_model: Timing
    """The quantized model's runs."""
    predicted_float: PredictedTime | None = None
    """What was predicted for the float model, from peak rates; None where nothing was."""
    predicted_quantized: PredictedTime | None = None
    """What was predicted for the quantized model, its ratio to the float model's included."""


class ColdStart(FiniteRecord):
    """One model in a process of its own, importing the libraries not counted.

    Megabytes are 10^6 bytes, and None where the system does not say.
    """

    load_ms: float
    """Milliseconds from the file to a model ready to run."""
    first_run_ms: float
    """Milliseconds of the first run, at the smallest batch size."""
    cold_start_ms: float
    """`load_ms` + `first_run_ms`."""
    peak_memory_mb: float | None
    """Most resident memory up to one run of every batch size."""
    imports_mb: float | None
    """The part of `peak_memory_mb` that was resident before the model was loaded."""
    gpu_memory_mb: float | None
    """By how much the GPU's used memory grew."""


class EnergySource(FiniteRecord):
    """Where energy was read."""

    source: str | None = None
    """What it was read from; None where there is nothing to read."""
    unreadable: str | None = None
    """Why there is nothing to read; None where there is."""


class RunnerResult(FiniteRecord):
    """Both models on one runner."""

    runner: RunnerName
    """The runner's name."""
    threads: int | None
    """Threads of each model; None on a GPU."""
    placement: dict[str, int] | None
    """Nodes of the quantized model, counted by the ONNX Runtime provider that computes them; None
    where there is one place only.
    """
    batches: tuple[BatchResult, ...]
    """The measurements, by batch size."""
    float_start: ColdStart
    """How the float model starts."""
    quantized_start: ColdStart
    """How the quantized model starts."""
    energy: EnergySource
    """Where energy was read."""

    def over(self, limit: float) -> list[BatchResult]:
        """The batch sizes at which quantized takes more than `limit` x float's time."""
        return [item for item in self.batches if item.ratio > limit]


class Machine(FiniteRecord):
    """Where it was measured."""

    cpu: str
    """Name of the CPU."""
    cpus: int
    """CPUs that the process may use."""
    system: str
    """The operating system."""
    python: str
    """Version of Python."""
    gpu: str | None
    """Name, driver and compute capability of the GPU; None without one."""
    versions: dict[str, str]
    """Versions of the libraries that run models, by name, where installed."""


class BenchResult(FiniteRecord, ShownTable):
    """A benchmark of an artifact; a notebook shows a row for each runner and batch size."""

    artifact: str
    """The artifact's folder."""
    target: str
    """The target that it was compiled for."""
    against: str
    """Source of the float model."""
    seconds: float
    """Seconds asked for each batch size and runner."""
    machine: Machine
    """Where it was measured."""
    runners: tuple[RunnerResult, ...]
    """The measurements, by runner."""
    max_ratio: float | None
    """The largest ratio that passes; None where none was given."""
    passed: bool
    """Whether no ratio is over it."""

    def rows(self) -> list[Row]:
        """Each runner at each batch size: milliseconds of both models, and their ratio."""
        return [
            {
                "runner": runner.runner.value,
                "batch": found.batch,
                "ratio": found.ratio,
                "quantized_ms": found.quantized_model.latency_ms.p50,
                "float_ms": found.float_model.latency_ms.p50,
                "quantized_images_per_second": found.quantized_model.images_per_second,
                "float_images_per_second": found.float_model.images_per_second,
            }
            for runner in self.runners
            for found in runner.batches
        ]
