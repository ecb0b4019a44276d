"""Time a quantized encoder and its float original in turn, on one runner."""

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from regcache.runtime.bench_result import BatchResult, Percentiles, Timing
from regcache.runtime.energy import EnergyMeter, Unreadable
from regcache.runtime.runners import Lap, Loading, Runner
from regcache.runtime.speed import go_on, possible_batches, time_pairs

# Pairs that a slow model still gets, within four times the seconds.
_ROUNDS = 10
# Of the seconds asked for: GPUs raise their clocks and TensorRT-RTX compiles kernels meanwhile.
_WARM_UP, _ENERGY = 0.2, 0.3
_FEWEST_WARM_UPS = 2

Clock = Callable[[], float]


@dataclass(frozen=True)
class Stopwatch:
    """How time is taken: `clock` in seconds, and what is waited for before every timed run."""

    clock: Clock = time.perf_counter
    settle: Callable[[], None] | None = None


@dataclass
class _Recorded:
    """A runner on fixed images, every run's parts kept."""

    runner: Runner
    images: NDArray[np.float32]
    laps: list[Lap | None] = field(default_factory=list)

    def __call__(self) -> None:
        self.laps.append(self.runner.run(self.images).lap)


def time_runners(
    original: Runner,
    quantized: Runner,
    loading: Loading,
    *,
    seconds: float,
    meter: EnergyMeter | Unreadable,
    watch: Stopwatch | None = None,
) -> list[BatchResult]:
    """Time both loaded models in turn at every batch size, then read the energy of each alone.

    `seconds`: of timed runs for a batch size; a slow model takes longer, to finish 10 pairs, up to
    four times. Warm-up before takes a fifth as long for each model, energy three tenths.
    Where a model fixes its batch size, only that one is measured.

    Raises InputError when a model does not take the images, or the two fix different batch sizes.
    """
    watch = watch or _stopwatch(loading)
    results = []
    for batch in possible_batches(original, quantized, loading.batches):
        images = loading.images(batch)
        models = _Recorded(original, images), _Recorded(quantized, images)
        for model in models:
            _repeat(model, _WARM_UP * seconds, watch.clock)
        pairs = time_pairs(
            *models, seconds=seconds, rounds=_ROUNDS, clock=watch.clock, settle=watch.settle
        )
        laps = [model.laps[-len(pairs) :] for model in models]
        energies = [
            _joules_per_run(model, _ENERGY * seconds, meter, watch.clock) for model in models
        ]
        results.append(_summary(pairs, laps, energies, batch))
    return results


def _stopwatch(loading: Loading) -> Stopwatch:
    """On a GPU nothing is waited for: idle, it would lower its clocks."""
    return Stopwatch(settle=go_on) if loading.runner.on_gpu else Stopwatch()


def _repeat(run: Callable[[], object], seconds: float, clock: Clock) -> int:
    """Run for some seconds, twice at least; returns how often."""
    start, count = clock(), 0
    while count < _FEWEST_WARM_UPS or clock() - start < seconds:
        run()
        count += 1
    return count


def _joules_per_run(
    run: Callable[[], object], seconds: float, meter: EnergyMeter | Unreadable, clock: Clock
) -> float | None:
    if isinstance(meter, Unreadable):
        return None
    before = meter.read()
    count = _repeat(run, seconds, clock)
    return (meter.read() - before) / count


def _summary(
    pairs: Sequence[tuple[float, float]],
    laps: Sequence[Sequence[Lap | None]],
    joules: Sequence[float | None],
    batch: int,
) -> BatchResult:
    one, other = zip(*pairs, strict=True)
    computes = [[lap.compute for lap in each if lap is not None] for each in laps]
    compute_pairs = list(zip(*computes, strict=True))
    return BatchResult(
        batch=batch,
        runs=len(pairs),
        ratio=_ratio(pairs),
        compute_ratio=_ratio(compute_pairs) if compute_pairs else None,
        float_model=_timing(one, laps[0], joules[0], batch),
        quantized_model=_timing(other, laps[1], joules[1], batch),
    )


def _ratio(pairs: Sequence[tuple[float, ...]]) -> float:
    return statistics.median(quantized / original for original, quantized in pairs)


def _timing(
    seconds: Sequence[float], laps: Sequence[Lap | None], joules: float | None, batch: int
) -> Timing:
    parts = [lap for lap in laps if lap is not None]
    return Timing(
        latency_ms=_percentiles(seconds),
        images_per_second=batch / statistics.fmean(seconds),
        to_device_ms=_percentiles([lap.to_device for lap in parts]) if parts else None,
        compute_ms=_percentiles([lap.compute for lap in parts]) if parts else None,
        to_host_ms=_percentiles([lap.to_host for lap in parts]) if parts else None,
        joules_per_image=None if joules is None else joules / batch,
    )


def _percentiles(seconds: Sequence[float]) -> Percentiles:
    p50, p90, p99 = (1e3 * float(value) for value in np.percentile(seconds, (50, 90, 99)))
    return Percentiles(p50=p50, p90=p90, p99=p99)
