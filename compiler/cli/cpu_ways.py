"""The ways to run an encoder on a CPU, what was measured of them, and the choice between them."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

from rich.table import Column, Table

from regcache.compiler.job.record import Record
from regcache.compiler.job.targets import Precision, TargetName
from regcache.passes.errors import InputError
from regcache.runtime.machine import cpu_features
from regcache.runtime.parity_result import ParityResult

MIN_COSINE = 0.999
# Of the fastest's time: within that, what is closer to float is taken.
_NOISE = 1.05


@dataclass(frozen=True)
class Accuracy:
    """How close a way's embeddings have to be to the float encoder's; None: no limit.

    `min_cosine`: the least mean cosine of the embeddings. `max_error`: the largest relative error.
    """

    min_cosine: float | None = MIN_COSINE
    max_error: float | None = None

    @classmethod
    def of(cls, min_cosine: float | None = None, max_error: float | None = None) -> Self:
        """The limits that were asked for; where there are none, the default cosine alone."""
        if min_cosine is None and max_error is None:
            return cls()
        return cls(min_cosine, max_error)

    def missed(self, cosine: float, error: float) -> str | None:
        """The limit that a way's cosine or error misses, in words; None where it keeps both."""
        if self.min_cosine is not None and cosine < self.min_cosine:
            return f"cosine below {self.min_cosine:g}"
        if self.max_error is not None and error > self.max_error:
            return f"error above {self.max_error:g}"
        return None


def relative_error(result: ParityResult) -> float:
    """|error| / |float| of the embeddings, over all images together."""
    return float(10 ** (-result.sqnr_db / 20))


@dataclass(frozen=True)
class Way:
    """A target on the CPU and a precision."""

    target: TargetName
    precision: Precision

    def __str__(self) -> str:
        return f"{self.target.value} {self.precision.value}"


class WayRecord(Record):
    """What one way to run the encoder on this CPU takes, and how close it is to float."""

    target: TargetName
    """The target, which names the runtime."""
    precision: Precision
    """What the linears compute in."""
    milliseconds: dict[int, float]
    """Milliseconds of a run, by batch size: the least of the rounds' medians."""
    images_per_second: float
    """At the largest batch size."""
    load_ms: float
    """Milliseconds to load the model."""
    file_mb: float
    """Megabytes of the model's file."""
    peak_mb: float | None
    """Megabytes of memory at most; None where the system does not say."""
    cosine_mean: float
    """Mean cosine to ONNX Runtime's float, on some of the images."""
    cosine_min: float
    """The least of these cosines."""
    error: float
    """|error| / |float| of the embeddings, over these images together."""
    verdict: str
    """Whether it was chosen, and why, in words."""


class Choice(Record):
    """What was chosen for this CPU, and between what."""

    target: TargetName
    """The target of the artifact."""
    precision: Precision
    """Its precision."""
    min_cosine: float | None
    """The least mean cosine that was asked for, if one was."""
    max_error: float | None
    """The largest relative error that was asked for, if one was."""
    features: tuple[str, ...]
    """What this CPU has of the instructions that decide, by Linux's names."""
    ways: list[WayRecord]
    """Every way that was measured, the fastest first."""


def choose(ways: Sequence[WayRecord], accuracy: Accuracy) -> Choice:
    """The choice between ways that were measured. Raises InputError where none is close enough."""
    ordered = sorted(ways, key=_time)
    missed = {id(way): accuracy.missed(way.cosine_mean, way.error) for way in ways}
    near = [way for way in ordered if missed[id(way)] is None]
    if not near:
        best = max(ways, key=lambda way: way.cosine_mean)
        raise InputError(
            f"no way on this CPU is close enough: {best.target.value} {best.precision.value}, the "
            f"closest, has a cosine of {best.cosine_mean:.6f} and an error of {best.error:.4f}"
        )
    even = [way for way in near if _time(way) <= _NOISE * _time(near[0])]
    chosen = max(even, key=lambda way: way.cosine_mean)

    def verdict(way: WayRecord) -> str:
        if way is chosen:
            return "chosen: fastest" if way is near[0] else "chosen: as fast, and closer to float"
        reason = missed[id(way)]
        if reason is not None:
            return reason
        if way in even:
            return "as fast, but less close"
        return f"{_time(way) / _time(chosen):.2f} x the time"

    return Choice(
        target=chosen.target,
        precision=chosen.precision,
        min_cosine=accuracy.min_cosine,
        max_error=accuracy.max_error,
        features=cpu_features(),
        ways=[way.model_copy(update={"verdict": verdict(way)}) for way in ordered],
    )


def choice_table(choice: Choice) -> Table:
    """One line for each way, the fastest first."""
    batches = sorted({batch for way in choice.ways for batch in way.milliseconds})
    numbers = [f"ms at {batch}" for batch in batches]
    numbers += ["images/s", "load ms", "file MB", "peak MB", "cosine", "worst", "error"]
    columns = [Column(name, justify="right", no_wrap=True) for name in numbers]
    names = [Column("target", no_wrap=True), Column("precision", no_wrap=True)]
    title = " ".join(choice.features) or "a CPU whose features are not known"
    table = Table(*names, *columns, Column("verdict", no_wrap=True), title=title)
    for way in choice.ways:
        table.add_row(
            *(way.target.value, way.precision.value),
            *(f"{way.milliseconds[batch]:.1f}" for batch in batches),
            *(f"{way.images_per_second:.1f}", f"{way.load_ms:.0f}", f"{way.file_mb:.1f}"),
            "-" if way.peak_mb is None else f"{way.peak_mb:.0f}",
            *(f"{way.cosine_mean:.6f}", f"{way.cosine_min:.5f}", f"{way.error:.4f}", way.verdict),
        )
    return table


def _time(way: WayRecord) -> float:
    """The geometric mean of its times, so that no batch size counts more than another."""
    return math.prod(way.milliseconds.values()) ** (1 / len(way.milliseconds))
