"""Made-up measurements of both models on a runner."""

from regcache.runtime.bench_result import (
    BatchResult,
    ColdStart,
    EnergySource,
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
