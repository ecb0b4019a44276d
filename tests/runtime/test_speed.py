"""Speed is compared in balanced pairs and bounded time, all on an injected clock."""

import itertools
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Self

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from pydantic import ValidationError
from support.small_models import pooling_encoder

from regcache.passes.errors import InputError
from regcache.runtime import speed
from regcache.runtime.session import OrtSession
from regcache.runtime.speed import SpeedRatio, compare_speed

IMAGES = np.arange(3 * 3 * 4 * 6, dtype=np.float32).reshape(3, 3, 4, 6)


class Machine:
    """A clock that only runs take time on; `slowness` is what the first runs are slowed by."""

    def __init__(self, slowness: Iterable[float] = ()) -> None:
        self.now, self.order = 100.0, ""
        self.slowness = itertools.chain(slowness, itertools.repeat(1.0))

    def model(self, name: str, seconds: float) -> Callable[[], None]:
        def take_time() -> None:
            self.order += name
            self.now += seconds * next(self.slowness)

        return take_time

    def settle(self) -> None:
        self.order += "."

    def pairs(self, one: float, other: float, **limits: Any) -> list[tuple[float, float]]:
        models = self.model("A", one), self.model("B", other)
        return speed.time_pairs(*models, clock=lambda: self.now, settle=self.settle, **limits)


def test_the_models_take_turns_after_a_warm_up_and_a_rest() -> None:
    machine = Machine()
    pairs = machine.pairs(2.0, 1.0, seconds=13.0, rounds=4)
    assert machine.order == "AB" + 2 * ".A.B.B.A"
    assert pairs == [(2.0, 1.0)] * 4


def test_each_pair_holds_neighbouring_runs_float_first() -> None:
    """The warm-up is slow and counts for nothing."""
    machine = Machine([50.0, 50.0, 1.0, 2.0, 3.0, 4.0])
    pairs = machine.pairs(10.0, 1.0, seconds=0.0, rounds=1)
    assert pairs == [(10.0, 2.0), (40.0, 3.0)]


@pytest.mark.parametrize(
    ("run_seconds", "rounds", "expected"),
    [
        (0.01, 5, 26),  # the time is up
        (0.1, 5, 6),  # longer, to finish the rounds
        (0.1, 20, 10),  # four times as long, and still not finished
        (2.0, 5, 4),  # too slow for anything but the fewest
        (2.0, 1, 2),
    ],
)
def test_slow_models_get_fewer_pairs(run_seconds: float, rounds: int, expected: int) -> None:
    pairs = Machine().pairs(run_seconds, run_seconds, seconds=0.525, rounds=rounds)
    assert len(pairs) == expected


TIMES = st.floats(1e-3, 100)


@given(one=TIMES, other=TIMES, seconds=st.floats(0, 1), rounds=st.integers(1, 12))
def test_time_is_bounded(one: float, other: float, seconds: float, rounds: int) -> None:
    machine = Machine()
    pairs = len(machine.pairs(one, other, seconds=seconds, rounds=rounds))
    fewest = min(rounds, 3)
    assert pairs in range(fewest + fewest % 2, 10**6, 2)
    # Whatever was measured before the last four runs was not yet enough.
    before = machine.now - 100.0 - 2 * (one + other)
    assert pairs - 2 < fewest or before < 4 * seconds + 1e-9
    assert pairs - 2 < rounds or before < seconds + 1e-9


def test_the_ratio_is_the_median_of_the_pairs() -> None:
    """Not the ratio of the medians."""
    row = speed._summary([(1.0, 2.0), (10.0, 3.0), (2.0, 6.0), (1.0, 0.5)], 4, 2)
    assert row.ratio == pytest.approx((2.0 + 0.5) / 2)
    assert (row.float_ms, row.quantized_ms) == (1500.0, 2500.0)
    assert (row.batch, row.threads, row.rounds) == (4, 2, 4)


def test_a_machine_that_slows_down_keeps_the_ratio() -> None:
    # Two warm-up runs, then pairs of runs on a machine of ever changing speed, one run disturbed.
    phases = [1.0, 1.0, *np.repeat([1.0, 3.0, 1.5, 9.0, 2.0, 1.0], 2)]
    phases[5] = 40.0
    machine = Machine(phases)
    row = speed._summary(machine.pairs(4.0, 1.0, seconds=100.0, rounds=5), 1, 1)
    assert row.rounds == 6
    assert row.ratio == pytest.approx(0.25)


def test_threads_rest_until_the_process_is_idle(monkeypatch: pytest.MonkeyPatch) -> None:
    for busy, expected in ((0, 1), (3, 4), (1000, 20)):
        naps: list[float] = []
        monkeypatch.setattr(time, "sleep", naps.append)
        monkeypatch.setattr(time, "process_time", lambda n=naps, most=busy: min(len(n), most) / 100)
        speed._let_threads_rest()
        assert naps == [0.01] * expected


class FakeSession:
    """An encoder that records what it is run on."""

    seen: list[tuple[str, NDArray[np.float32]]]
    options: list[dict[str, Any]]
    fixed: dict[str, int]

    def __init__(self, model: Path, **options: Any) -> None:
        self.name, self.fixed_batch = str(model), self.fixed.get(str(model))
        self.options.append(options)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_error: object) -> None: ...

    def run(self, images: NDArray[np.float32]) -> None:
        self.seen.append((self.name, images))


@pytest.fixture
def sessions(monkeypatch: pytest.MonkeyPatch) -> type[FakeSession]:
    FakeSession.seen, FakeSession.options, FakeSession.fixed = [], [], {}
    monkeypatch.setattr(speed, "OrtSession", FakeSession)
    return FakeSession


def compare(**options: Any) -> list[SpeedRatio]:
    return compare_speed(Path("float"), Path("int8"), IMAGES, seconds=0.0, **options)


def test_images_are_repeated_to_fill_every_batch(sessions: type[FakeSession]) -> None:
    rows = compare(threads=3)
    assert [(row.batch, row.threads, row.rounds) for row in rows] == [(1, 3, 4), (8, 3, 4)]
    assert sessions.options == [{"threads": 3, "deployed": True, "resting": True}] * 2
    assert {len(images) for _, images in sessions.seen} == {1, 8}
    for _, images in sessions.seen:
        np.testing.assert_array_equal(images, IMAGES[np.arange(len(images)) % 3])
        assert images.dtype == np.float32
    once = ["float", "int8", *2 * ["float", "int8", "int8", "float"]]
    assert [name for name, _ in sessions.seen] == 2 * once


@pytest.mark.parametrize("fixed", [{"float": 4}, {"int8": 4}, {"float": 4, "int8": 4}])
def test_only_a_fixed_batch_is_measured(sessions: type[FakeSession], fixed: dict[str, int]) -> None:
    sessions.fixed = fixed
    assert [row.batch for row in compare(rounds=1)] == [4]
    assert {len(images) for _, images in sessions.seen} == {4}


def test_different_fixed_batches_are_refused(sessions: type[FakeSession]) -> None:
    sessions.fixed = {"float": 4, "int8": 2}
    with pytest.raises(InputError, match="float takes batches of 4 only, int8 of 2"):
        compare()
    assert not sessions.seen


def test_nothing_to_measure_is_refused(sessions: type[FakeSession]) -> None:
    for batches in ((), (1, 0), (-1,)):
        with pytest.raises(InputError, match="batch sizes must be positive"):
            compare(batches=batches)
    with pytest.raises(InputError, match="no images"):
        compare_speed(Path("float"), Path("int8"), IMAGES[:0])
    assert not sessions.options


def test_real_models_are_measured() -> None:
    models = pooling_encoder(), pooling_encoder(batch=2)
    (row,) = compare_speed(*models, IMAGES, threads=1, seconds=0.0, rounds=1)
    assert (row.batch, row.threads, row.rounds) == (2, 1, 2)
    assert min(row.float_ms, row.quantized_ms, row.ratio) > 0
    with pytest.raises(ValidationError):
        row.rounds = 3


def test_threads_rest_behind_a_run() -> None:
    """Others spin on: that also shows that this test can fail."""
    images = np.ones((64, 3, 64, 64), np.float32)
    busy = dict[bool, float]()
    for resting in (False, True):
        with OrtSession(pooling_encoder(), threads=2, deployed=True, resting=resting) as session:
            session.run(images)
            before = time.process_time()
            time.sleep(0.1)
            busy[resting] = time.process_time() - before
    assert busy[True] < 0.01 < busy[False]


def test_a_model_that_cannot_be_used_is_named(tmp_path: Path) -> None:
    none = tmp_path / "none.onnx"
    for one, other in ((none, pooling_encoder()), (pooling_encoder(), none)):
        with pytest.raises(InputError, match=r"none\.onnx: .*doesn't exist"):
            compare_speed(one, other, IMAGES)
    with pytest.raises(InputError, match=r"takes \[batch, 3, h, w\], not \[1, 1, 4, 6\]"):
        compare_speed(pooling_encoder(), pooling_encoder(), IMAGES[:, :1])
