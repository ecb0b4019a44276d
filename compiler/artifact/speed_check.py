"""Whether an artifact for ONNX Runtime is worth it on the machine that compiled it."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from regcache.compiler.artifact.manifest import SpeedRecord
from regcache.compiler.job.stages import Stage
from regcache.compiler.reporter import Reporter
from regcache.passes.errors import InputError
from regcache.runtime.optimised_graph import integer_matmuls, optimised_ops
from regcache.runtime.speed import SpeedRatio, compare_speed

_SECONDS, _SECONDS_AGAIN = 0.4, 2.0
# Less is lost in a machine's noise, of a run's time or altogether.
_NOISE, _NOISE_MS = 1.05, 1.0


def check_speed(
    float_model: Path,
    model: Path,
    images: NDArray[Any],
    reporter: Reporter,
    *,
    linears: int,
    accept_slower: bool,
    threads: int | None = None,
) -> SpeedRecord:
    """Time both models on preprocessed `images` and count the integer kernels.

    `linears`: how many are quantized, activations included; fewer integer kernels are warned of.
    Raises InputError where the model is slower than float at every batch size, unless
    `accept_slower`: then, as where it is hardly so, there is a warning.
    """
    reporter.begin(Stage.SPEED)
    found = integer_matmuls(optimised_ops(model, threads=threads))
    if found < linears:
        reporter.warn(f"ONNX Runtime computes {found} of {linears} quantized linears in integers")
    ratios = compare_speed(float_model, model, images, threads=threads, seconds=_SECONDS)
    if _slower(ratios):  # the machine may have been busy
        ratios = compare_speed(float_model, model, images, threads=threads, seconds=_SECONDS_AGAIN)
    if _slower(ratios):
        complaint = f"slower than float on this machine: {describe_speed(ratios)}"
        if not accept_slower and _loses_time(ratios):
            raise InputError(f"{complaint}; --accept-slower ships it all the same")
        reporter.warn(complaint)
    return SpeedRecord(integer_matmuls=found, ratios=ratios)


def describe_speed(ratios: Sequence[SpeedRatio]) -> str:
    """The ratios as one line."""
    parts = [f"{one.ratio:.2f} x float's time at batch {one.batch}" for one in ratios]
    return ", ".join(parts) + f" with {ratios[0].threads} threads"


def _slower(ratios: Sequence[SpeedRatio]) -> bool:
    return all(one.ratio > _NOISE for one in ratios)


def _loses_time(ratios: Sequence[SpeedRatio]) -> bool:
    return any(one.quantized_ms - one.float_ms > _NOISE_MS for one in ratios)
