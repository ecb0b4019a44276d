"""What the compiler says and does about speed, by ratios that are made up: nothing is timed."""

import io
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from regcache.compiler.artifact import speed_check
from regcache.compiler.artifact.manifest import SpeedRecord
from regcache.compiler.artifact.speed_check import check_speed, describe_speed
from regcache.compiler.reporter import Reporter
from regcache.passes.errors import InputError
from regcache.runtime.speed import SpeedRatio

IMAGES = np.ones((1, 3, 4, 4), np.float32)


def timed(*ratios: float, float_ms: float = 100.0) -> list[SpeedRatio]:
    """A look at batches 1, 8 and so on."""
    return [
        SpeedRatio(
            batch=8**index,
            threads=2,
            float_ms=float_ms,
            quantized_ms=float_ms * ratio,
            ratio=ratio,
            rounds=6,
        )
        for index, ratio in enumerate(ratios)
    ]


FASTER, SLOWER = timed(0.6, 0.7), timed(1.3, 1.2)


@dataclass
class Bench:
    """Stands in for the measurements: what each look finds, and what was asked of it."""

    looks: list[list[SpeedRatio]] = field(default_factory=list)
    ops: dict[str, int] = field(default_factory=lambda: {"MatMulIntegerToFloat": 12, "Add": 3})
    asked: list[dict[str, Any]] = field(default_factory=list)
    said: io.StringIO = field(default_factory=io.StringIO)

    def compare(self, *models: object, **options: Any) -> list[SpeedRatio]:
        self.asked.append({"models": models[:2], "images": models[2], **options})
        return self.looks.pop(0)

    def check(self, *, linears: int = 12, accept_slower: bool = False) -> SpeedRecord:
        reporter = Reporter(Console(file=self.said, soft_wrap=True, highlight=False))
        return check_speed(
            Path("float.onnx"), Path("model.onnx"), IMAGES, reporter.warn,
            linears=linears, accept_slower=accept_slower, threads=2,
        )  # fmt: skip

    @property
    def warnings(self) -> list[str]:
        lines = self.said.getvalue().splitlines()
        return [line.removeprefix("warning: ") for line in lines if line.startswith("warning: ")]


Given = Callable[..., Bench]


@pytest.fixture
def given(monkeypatch: pytest.MonkeyPatch) -> Given:
    """Let the looks at the speed find these ratios, one list for each."""

    def prepare(*looks: list[SpeedRatio], **ops: int) -> Bench:
        bench = Bench(list(looks))
        bench.ops = ops or bench.ops
        monkeypatch.setattr(speed_check, "compare_speed", bench.compare)
        monkeypatch.setattr(speed_check, "optimised_ops", lambda *_, **__: bench.ops)
        return bench

    return prepare


def test_faster_is_recorded_after_one_look(given: Given) -> None:
    bench = given(FASTER)
    assert bench.check() == SpeedRecord(integer_matmuls=12, ratios=FASTER)
    assert not bench.warnings
    (asked,) = bench.asked
    assert asked["models"] == (Path("float.onnx"), Path("model.onnx"))
    assert asked["images"] is IMAGES
    assert asked["threads"] == 2


def test_slower_twice_is_refused_in_one_line(given: Given) -> None:
    bench = given(timed(9.0, 9.0), SLOWER)
    with pytest.raises(InputError) as caught:
        bench.check()
    assert str(caught.value) == (
        "slower than float on this machine: 1.30 x float's time at batch 1, 1.20 x at batch 8, "
        "with 2 threads; --accept-slower ships it all the same"
    )
    assert not bench.warnings


def test_the_second_look_is_longer_and_decides(
    given: Given, long_looks: Mapping[str, float], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, seconds in long_looks.items():
        monkeypatch.setattr(speed_check, name, seconds)
    bench = given(SLOWER, FASTER)
    assert bench.check().ratios == FASTER
    assert not bench.warnings
    first, second = bench.asked
    assert second.pop("seconds") > first.pop("seconds")
    assert (first.pop("rounds"), first.pop("batches")) == (2, (1,))
    assert second == first


def test_slower_is_shipped_where_that_is_accepted(given: Given) -> None:
    bench = given(SLOWER, SLOWER)
    assert bench.check(accept_slower=True) == SpeedRecord(integer_matmuls=12, ratios=SLOWER)
    assert bench.warnings == [f"slower than float on this machine: {describe_speed(SLOWER)}"]


@pytest.mark.parametrize(
    ("float_ms", "refused"),
    [(3.0, False), (3.3, False), (3.4, True)],  # 30 % of it: 0.9, 0.99 and 1.02 ms
)
def test_less_than_a_millisecond_is_a_warning_only(
    given: Given, float_ms: float, refused: bool
) -> None:
    slower = timed(1.3, float_ms=float_ms)
    bench = given(slower, slower)
    if refused:
        with pytest.raises(InputError, match="--accept-slower"):
            bench.check()
        return
    assert bench.check().ratios == slower
    assert bench.warnings == [f"slower than float on this machine: {describe_speed(slower)}"]


@pytest.mark.parametrize("ratios", [(1.04, 1.3), (1.3, 1.04), (1.04, 1.04), (1.05, 2.0)])
def test_one_batch_size_as_fast_is_enough(given: Given, ratios: tuple[float, float]) -> None:
    """As fast within the noise."""
    bench = given(timed(*ratios))
    assert bench.check().ratios == timed(*ratios)
    assert not bench.warnings


def test_a_loss_at_any_batch_size_counts_once_all_are_slower(given: Given) -> None:
    mixed = [*timed(1.06, float_ms=2.0), timed(1.0, 1.06, float_ms=300.0)[1]]
    with pytest.raises(InputError, match=r"1\.06 x at batch 8"):
        given(mixed, mixed).check()


@pytest.mark.parametrize(
    ("ops", "linears", "found"),
    [
        ({"MatMulIntegerToFloat": 9, "QLinearMatMul": 1, "MatMul": 2}, 12, 10),
        ({"MatMul": 12}, 12, 0),
        ({"MatMulIntegerToFloat": 12}, 12, None),
        ({"MatMulIntegerToFloat": 13}, 12, None),
        ({"MatMulNBits": 12}, 0, None),  # weights alone are quantized
    ],
)
def test_too_few_integer_kernels_are_warned_of(
    given: Given, ops: dict[str, int], linears: int, found: int | None
) -> None:
    bench = given(FASTER, **ops)
    record = bench.check(linears=linears)
    kernels = sum(count for op, count in ops.items() if "Integer" in op or "QLinear" in op)
    assert record.integer_matmuls == kernels
    warning = f"ONNX Runtime computes {found} of {linears} quantized linears in integers"
    assert bench.warnings == ([] if found is None else [warning])


def test_the_line_names_every_batch_size() -> None:
    line = describe_speed(timed(0.5, 0.756, 1.0))
    assert line == (
        "0.50 x float's time at batch 1, 0.76 x at batch 8, 1.00 x at batch 64, with 2 threads"
    )
