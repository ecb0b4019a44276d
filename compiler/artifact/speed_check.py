"""Whether an artifact for ONNX Runtime is worth it on the machine that compiled it."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from regcache.compiler.artifact.manifest import SpeedRecord
from regcache.passes.errors import InputError
from regcache.runtime.openvino_primitives import Primitives
from regcache.runtime.optimised_graph import integer_matmuls, optimised_ops
from regcache.runtime.speed import SpeedRatio, compare_speed

# Faster at one batch size is enough, and a ratio far below 1 needs few runs; one that is not is
# measured again, at a larger batch too.
_BATCHES, _SECONDS, _ROUNDS, _SECONDS_AGAIN = (1,), 0.1, 2, 2.0
# Less is lost in a machine's noise, of a run's time or altogether.
_NOISE, _NOISE_MS = 1.05, 1.0


def check_speed(
    float_model: Path,
    model: Path,
    images: NDArray[Any],
    warn: Callable[[str], None],
    *,
    linears: int,
    accept_slower: bool,
    threads: int | None = None,
) -> SpeedRecord:
    """Time both models on preprocessed `images` and count the integer kernels.

    `linears`: how many are quantized, activations included; a warning tells where there are fewer
    integer kernels. Raises InputError where the model is slower than float at every batch size,
    unless `accept_slower`. A warning, a line given to `warn`, takes the error's place then, and
    where the model is hardly slower.
    """
    kernels = integer_matmuls(optimised_ops(model, threads=threads))
    if kernels < linears:
        warn(f"ONNX Runtime computes {kernels} of {linears} quantized linears in integers")
    ratios = compare_speed(
        float_model,
        model,
        images,
        batches=_BATCHES,
        threads=threads,
        seconds=_SECONDS,
        rounds=_ROUNDS,
    )
    if _slower(ratios):  # the machine may have been busy
        ratios = compare_speed(float_model, model, images, threads=threads, seconds=_SECONDS_AGAIN)
    if _slower(ratios):
        complaint = f"slower than float on this machine: {describe_speed(ratios)}"
        if not accept_slower and _loses_time(ratios):
            raise InputError(f"{complaint}; --accept-slower ships it all the same")
        warn(complaint)
    return SpeedRecord(integer_matmuls=kernels, ratios=ratios)


def describe_speed(ratios: Sequence[SpeedRatio]) -> str:
    """The ratios as one line."""
    first, *rest = ratios
    parts = [f"{first.ratio:.2f} x float's time at batch {first.batch}"]
    parts += [f"{speed.ratio:.2f} x at batch {speed.batch}" for speed in rest]
    return f"{', '.join(parts)}, with {first.threads} threads"


def describe_primitives(found: Primitives) -> str:
    """What OpenVINO computed in, as one line."""
    kinds = (("int8", found.int8), ("bf16", found.bf16), ("f16", found.f16), ("f32", found.f32))
    counts = ", ".join(f"{count} {kind}" for kind, count in kinds if count)
    return f"OpenVINO ran {counts} primitives, {found.float_products} products in float"


def _slower(ratios: Sequence[SpeedRatio]) -> bool:
    return all(speed.ratio > _NOISE for speed in ratios)


def _loses_time(ratios: Sequence[SpeedRatio]) -> bool:
    return any(speed.quantized_ms - speed.float_ms > _NOISE_MS for speed in ratios)
