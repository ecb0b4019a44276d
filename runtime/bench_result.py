"""What a benchmark measured, as it is written to JSON: all numbers finite, or null."""

from pydantic import BaseModel, ConfigDict

from regcache.runtime.runners import RunnerName


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class Percentiles(_Record):
    """Of milliseconds: half, 90 % and 99 % of the runs took no longer.

    With fewer than 100 runs, `p99` lies between the slowest two.
    """

    p50: float
    p90: float
    p99: float


class Timing(_Record):
    """One model's runs at one batch size.

    `latency_ms`: from images in ordinary memory to outputs in ordinary memory.
    `images_per_second`: batch size / mean latency, one run after the other.
    `to_device_ms`, `compute_ms`, `to_host_ms`: the parts of a run; None where nothing is copied.
    `joules_per_image`: of runs back to back; None where no energy can be read.
    """

    latency_ms: Percentiles
    images_per_second: float
    to_device_ms: Percentiles | None = None
    compute_ms: Percentiles | None = None
    to_host_ms: Percentiles | None = None
    joules_per_image: float | None = None


class BatchResult(_Record):
    """Both models at one batch size.

    `runs`: of each model, timed in turn. `ratio`: median over the pairs of neighbouring runs of
    quantized latency / float latency; below 1, quantized is faster. `compute_ratio`: the same
    without the copies; None where there are none.
    """

    batch: int
    runs: int
    ratio: float
    compute_ratio: float | None
    float_model: Timing
    quantized_model: Timing


class ColdStart(_Record):
    """One model in a process of its own, importing the libraries not counted.

    `load_ms`: from the file to a model ready to run; `first_run_ms`: at the smallest batch size;
    `cold_start_ms`: both. `peak_memory_mb`: most resident memory up to one run of every batch size;
    `imports_mb`: what of it was there before the model was loaded. `gpu_memory_mb`: by how much the
    GPU's used memory grew. None where the system does not say. Megabytes are 10^6 bytes.
    """

    load_ms: float
    first_run_ms: float
    cold_start_ms: float
    peak_memory_mb: float | None
    imports_mb: float | None
    gpu_memory_mb: float | None


class EnergySource(_Record):
    """What energy was read from, or why there is none to read."""

    source: str | None = None
    unreadable: str | None = None


class RunnerResult(_Record):
    """Both models on one runner.

    `placement`: of the quantized model's nodes, by the ONNX Runtime provider that computes them;
    None where there is one place only.
    """

    runner: RunnerName
    threads: int | None
    placement: dict[str, int] | None
    batches: tuple[BatchResult, ...]
    float_start: ColdStart
    quantized_start: ColdStart
    energy: EnergySource

    def over(self, limit: float) -> list[BatchResult]:
        """The batch sizes at which quantized takes more than `limit` x float's time."""
        return [item for item in self.batches if item.ratio > limit]


class Machine(_Record):
    """Where it was measured. `gpu`: its name, driver and compute capability; None without one."""

    cpu: str
    cpus: int
    system: str
    python: str
    gpu: str | None
    versions: dict[str, str]


class BenchResult(_Record):
    """A benchmark of an artifact.

    `against`: the float model's source. `seconds`: asked for each batch size and runner.
    `passed`: no ratio over `max_ratio`, where one was given.
    """

    artifact: str
    target: str
    against: str
    seconds: float
    machine: Machine
    runners: tuple[RunnerResult, ...]
    max_ratio: float | None
    passed: bool
