"""Warm-up, turns, percentiles and energy on an injected clock; and two real models."""

from pathlib import Path
from typing import Self

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray
from support.tiny_vit import Spec, TinyVit

from regcache.passes.errors import InputError
from regcache.runtime.bench import Stopwatch, time_runners
from regcache.runtime.bench_result import BatchResult
from regcache.runtime.energy import Unreadable, cpu_meter
from regcache.runtime.open_runner import open_runner
from regcache.runtime.runners import Lap, Loading, Ran, RunnerName

NO_ENERGY = Unreadable("a test")


class Machine:
    """A clock that runs take time on; every second that passes costs two joules."""

    source = "a test"

    def __init__(self) -> None:
        self.now, self.order = 100.0, ""
        self.reads = 0

    def clock(self) -> float:
        return self.now

    def settle(self) -> None:
        self.order += "."

    def read(self) -> float:
        self.reads += 1
        return 2 * self.now


class FakeRunner:
    """Takes `seconds` an image, and `copies` before and after, which then count apart."""

    placement: dict[str, int] | None = None

    def __init__(
        self,
        name: str,
        machine: Machine,
        seconds: float,
        *,
        fixed_batch: int | None = None,
        copies: tuple[float, float] | None = None,
    ) -> None:
        self.name, self.fixed_batch = name, fixed_batch
        self.machine, self.seconds, self.copies = machine, seconds, copies
        self.seen: list[NDArray[np.float32]] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None: ...

    def run(self, images: NDArray[np.float32]) -> Ran:
        self.seen.append(images)
        compute = self.seconds * len(images)
        there, back = self.copies or (0.0, 0.0)
        self.machine.order += self.name
        self.machine.now += there + compute + back
        return Ran([], None if self.copies is None else Lap(there, compute, back))


def loading(*batches: int, runner: RunnerName = RunnerName.ORT_CPU) -> Loading:
    return Loading(runner, Path("model.onnx"), 1, batches, (3, 8, 8))


def timed(
    machine: Machine, one: FakeRunner, other: FakeRunner, *batches: int, **options: object
) -> list[BatchResult]:
    return time_runners(
        one,
        other,
        loading(*batches),
        seconds=10.0,
        meter=machine if options.get("energy") else NO_ENERGY,
        watch=Stopwatch(machine.clock, machine.settle),
    )


def test_models_warm_up_and_take_turns() -> None:
    """A fifth of the time to warm up, twice at least; one more run each before the pairs."""
    machine = Machine()
    one, other = FakeRunner("F", machine, 1.5), FakeRunner("Q", machine, 0.5)
    (row,) = timed(machine, one, other, 1)
    assert machine.order == "FF" + "QQQQ" + "FQ" + 5 * ".F.Q.Q.F"
    assert (row.batch, row.runs, row.compute_ratio) == (1, 10, None)
    assert row.ratio == pytest.approx(1 / 3)
    assert row.float_model.latency_ms.p50 == pytest.approx(1500)
    assert row.quantized_model.images_per_second == pytest.approx(2)
    assert row.float_model.compute_ms is None
    assert row.float_model.joules_per_image is None


def test_copies_are_counted_apart() -> None:
    machine = Machine()
    one = FakeRunner("F", machine, 0.4, copies=(0.1, 0.2))
    other = FakeRunner("Q", machine, 0.1, copies=(0.1, 0.2))
    (row,) = timed(machine, one, other, 1)
    assert row.ratio == pytest.approx(0.4 / 0.7)
    assert row.compute_ratio == pytest.approx(0.25)
    parts = (
        row.float_model.to_device_ms,
        row.float_model.compute_ms,
        row.float_model.to_host_ms,
    )
    assert [part.p50 for part in parts if part] == pytest.approx([100, 400, 200])
    assert row.float_model.latency_ms.p50 == pytest.approx(700)


def test_percentiles_are_those_of_all_runs() -> None:
    """Of 10 runs of which one is slow: it is the 99th percentile but hardly the 90th."""
    machine = Machine()
    one, other = FakeRunner("F", machine, 1.0), FakeRunner("Q", machine, 1.0)
    run, count = other.run, 0

    def sometimes_slow(images: NDArray[np.float32]) -> Ran:
        nonlocal count
        count += 1
        other.seconds = 3.0 if count == 7 else 1.0
        return run(images)

    other.run = sometimes_slow  # type: ignore[method-assign]
    (row,) = timed(machine, one, other, 1)
    latency = row.quantized_model.latency_ms
    seconds = [1.0] * (row.runs - 1) + [3.0]
    expected = [1e3 * float(np.percentile(seconds, part)) for part in (50, 90, 99)]
    assert [latency.p50, latency.p90, latency.p99] == pytest.approx(expected)
    assert row.quantized_model.images_per_second == pytest.approx(row.runs / sum(seconds))
    assert row.ratio == 1.0


def test_energy_is_read_of_each_model_alone() -> None:
    machine = Machine()
    one, other = FakeRunner("F", machine, 0.25), FakeRunner("Q", machine, 0.125)
    rows = timed(machine, one, other, 1, 4, energy=True)
    assert machine.order.endswith("FFF" + "QQQQQQ")
    assert machine.reads == 8
    for row in rows:
        assert row.float_model.joules_per_image == pytest.approx(0.5)
        assert row.quantized_model.joules_per_image == pytest.approx(0.25)


def test_every_batch_size_is_filled() -> None:
    machine = Machine()
    one, other = FakeRunner("F", machine, 1.0), FakeRunner("Q", machine, 1.0)
    assert [row.batch for row in timed(machine, one, other, 2, 1)] == [2, 1]
    assert {item.shape for item in one.seen} == {(2, 3, 8, 8), (1, 3, 8, 8)}
    assert all(item.dtype == np.float32 for item in one.seen)


def test_a_fixed_batch_is_the_only_one() -> None:
    machine = Machine()
    one, other = FakeRunner("F", machine, 1.0, fixed_batch=4), FakeRunner("Q", machine, 1.0)
    assert [row.batch for row in timed(machine, one, other, 1, 8)] == [4]
    other.fixed_batch = 2
    with pytest.raises(InputError, match="F takes batches of 4 only, Q of 2"):
        timed(machine, one, other, 1)


def test_real_models(tmp_path: Path) -> None:
    path = tmp_path / "tiny.onnx"
    onnx.save(TinyVit(Spec(grid=4)).model(), path)
    plan = Loading(RunnerName.ORT_CPU, path, 1, (1, 3), (3, 16, 16))
    with open_runner(plan) as one, open_runner(plan) as other:
        rows = time_runners(one, other, plan, seconds=0.0, meter=cpu_meter(tmp_path))
    assert [(row.batch, row.runs) for row in rows] == [(1, 4), (3, 4)]
    for row in rows:
        latency = row.quantized_model.latency_ms
        assert 0 < latency.p50 <= latency.p90 <= latency.p99
        assert row.ratio > 0
