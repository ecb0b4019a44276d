"""How much faster a quantized encoder runs than its float original, on ONNX Runtime's CPU."""

import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from regcache.passes.errors import InputError
from regcache.runtime.finite_record import FiniteRecord
from regcache.runtime.session import OrtSession, available_cpus

DEFAULT_BATCHES = (1, 8)
DEFAULT_SECONDS = 1.5
DEFAULT_ROUNDS = 5

# What a model too slow for the asked rounds still gets, and the multiple of the time that decides.
_FEWEST_ROUNDS = 3
_PATIENCE = 4
# Measured: an idle worker thread of ONNX Runtime spins for 30 ms.
_NAP_SECONDS = 0.01
_MOST_NAPS = 20


class SpeedRatio(FiniteRecord):
    """Two encoders timed in turn on the same images."""

    batch: int
    """Images in a run."""
    threads: int
    """Threads of each encoder."""
    float_ms: float
    """Median milliseconds of a run in float."""
    quantized_ms: float
    """Median milliseconds of a run, quantized."""
    ratio: float
    """Median over the rounds of quantized time / float time; below 1, quantized is faster."""
    rounds: int
    """Pairs of runs, one of each encoder, that were timed."""


def compare_speed(
    float_model: Path | bytes,
    quantized_model: Path | bytes,
    images: NDArray[Any],
    *,
    batches: Sequence[int] = DEFAULT_BATCHES,
    threads: int | None = None,
    seconds: float = DEFAULT_SECONDS,
    rounds: int = DEFAULT_ROUNDS,
) -> list[SpeedRatio]:
    """Time both models in turn, float/quantized/quantized/float, one result per batch size.

    `images`: preprocessed; they are repeated to fill a batch.
    `batches`: images per run; where a model fixes its batch, only that one is measured.
    `threads`: of each model, defaults to the CPUs this process may use.
    `seconds`: for each batch size, warm-up included. Takes longer to finish `rounds` pairs of runs,
    up to four times `seconds`, and beyond that to finish 3; pairs come in twos.

    What else the machine does slows neighbouring runs alike, so the ratio holds better than the
    milliseconds. Both models are in memory at once, as they would be deployed.
    Raises InputError when a model cannot be loaded or run, takes images of another shape, the two
    fix different batches, or there is nothing to measure.
    """
    threads = threads or available_cpus()
    if not len(images):
        raise InputError("no images to measure the speed with")
    if min(batches, default=0) < 1:
        raise InputError(f"batch sizes must be positive, not {list(batches)}")
    with (
        OrtSession(float_model, threads=threads, deployed=True, resting=True) as original,
        OrtSession(quantized_model, threads=threads, deployed=True, resting=True) as quantized,
    ):
        found = []
        for batch in possible_batches(original, quantized, batches):
            filled = np.resize(images, (batch, *images.shape[1:]))
            pairs = time_pairs(
                partial(original.run, filled),
                partial(quantized.run, filled),
                seconds=seconds,
                rounds=rounds,
                settle=go_on,
            )
            found.append(_summary(pairs, batch, threads))
    return found


class Batched(Protocol):
    """A loaded encoder that may take one batch size only."""

    name: str
    fixed_batch: int | None


def possible_batches(
    original: Batched, quantized: Batched, batches: Sequence[int]
) -> Sequence[int]:
    """The batch sizes to measure: the one that a model fixes, else those asked for.

    Raises InputError when the two fix different ones.
    """
    fixed = {item.fixed_batch for item in (original, quantized)} - {None}
    if len(fixed) > 1:
        raise InputError(
            f"{original.name} takes batches of {original.fixed_batch} only, "
            f"{quantized.name} of {quantized.fixed_batch}"
        )
    return [batch for batch in fixed if batch is not None] or batches


def time_pairs(
    run_float: Callable[[], object],
    run_quantized: Callable[[], object],
    *,
    seconds: float,
    rounds: int,
    clock: Callable[[], float] = time.perf_counter,
    settle: Callable[[], None] | None = None,
) -> list[tuple[float, float]]:
    """Seconds of each (float, quantized) pair, an even number of them, after one run of each.

    `seconds` and `rounds` are those of `compare_speed`. `settle` is called before every timed run;
    by default it waits until this process's threads rest.
    """
    settle = settle or _let_threads_rest

    def timed(run: Callable[[], object]) -> float:
        settle()
        start = clock()
        run()
        return clock() - start

    begin = clock()
    run_float()
    run_quantized()
    pairs: list[tuple[float, float]] = []
    while not _enough(len(pairs), clock() - begin, seconds, rounds):
        ahead = timed(run_float), timed(run_quantized)
        # The second pair in the other order: both models run first and last equally often.
        later = timed(run_quantized), timed(run_float)
        pairs += [ahead, later[::-1]]
    return pairs


def _enough(pairs: int, elapsed: float, seconds: float, rounds: int) -> bool:
    """Whether to stop after `pairs` pairs and `elapsed` seconds."""
    if elapsed >= _PATIENCE * seconds:
        return pairs >= min(rounds, _FEWEST_ROUNDS)
    return elapsed >= seconds and pairs >= rounds


def _let_threads_rest() -> None:
    """Wait until this process computes nothing, or for 0.2 s.

    The threads of the model that ran last spin for a while and take CPUs from the next model's:
    measured on two cores, that lengthened either model's run by 29 ms and hid part of the gain.
    """
    for _ in range(_MOST_NAPS):
        before = time.process_time()
        time.sleep(_NAP_SECONDS)
        if time.process_time() - before < _NAP_SECONDS / 10:
            return


def go_on() -> None:
    """Wait for nothing, before a run of a model that no other's threads disturb."""


def _summary(pairs: Sequence[tuple[float, float]], batch: int, threads: int) -> SpeedRatio:
    return SpeedRatio(
        batch=batch,
        threads=threads,
        float_ms=1e3 * statistics.median(one for one, _ in pairs),
        quantized_ms=1e3 * statistics.median(other for _, other in pairs),
        ratio=statistics.median(other / one for one, other in pairs),
        rounds=len(pairs),
    )
