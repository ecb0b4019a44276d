"""Speed is compared in balanced pairs and bounded time, all on an injected clock; op counts."""

import contextlib
import itertools
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Self

import numpy as np
import onnx
import onnx.parser
import onnx_graphsurgeon as gs
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from pydantic import ValidationError
from support.canonical import canonical_graph
from support.scales import linear_scales
from support.small_models import pooling_encoder
from support.spellings import SPELLINGS
from support.tiny_vit import TinyVit

from regcache.passes.affine import IntegerType
from regcache.passes.base import run
from regcache.passes.errors import InputError
from regcache.passes.find_blocks import view_encoder
from regcache.passes.quantize_linears import QuantizeLinears
from regcache.runtime import speed
from regcache.runtime.optimised_graph import integer_matmuls, optimised_ops
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


# Where q, k and v share a signed input, ONNX Runtime leaves them in float on x86.
SIGNED = ("fused qkv", "int8", "int8")
UNSIGNED = [(name, "uint8", "int8") for name in ("plain", "swiglu", "gemm, dynamic")]


@pytest.mark.parametrize(
    ("name", "dtype", "weight_dtype"), [*UNSIGNED, ("plain", "uint8", "uint8"), SIGNED]
)
def test_every_quantized_linear_runs_on_integers(
    name: str, dtype: IntegerType, weight_dtype: IntegerType
) -> None:
    graph = canonical_graph(TinyVit(SPELLINGS[name]).model())
    linears = view_encoder(graph).linears
    quantized = run(QuantizeLinears(linear_scales(graph, dtype), weight_dtype), graph).graph
    ops, floats = (
        optimised_ops(gs.export_onnx(item).SerializeToString(), threads=1)
        for item in (quantized, graph)
    )
    assert integer_matmuls(ops) == len(linears)
    assert list(ops.values()) == sorted(ops.values(), reverse=True)
    assert integer_matmuls(floats) == 0


LINEAR = """<ir_version: 8, opset_import: ["" : 17]> linear (float[n, 16] x) => (float[n, 4] y)
<float s = {{0.1}}, uint8 z = {{5}}, int8[16, 4] w = {{{weights}}}, int8[4] wz = {{0, 0, 0, 0}},
 float[4] ws = {{1, 2, 3, 4}}, int32[4] b = {{1, 2, 3, 4}}, int32[4] bz = {{0, 0, 0, 0}}>
{{ {nodes} }}"""
MATRIX = "m = DequantizeLinear <axis = 1> (w, ws, wz)"
ROUNDED = f"q = QuantizeLinear (x, s, z) r = DequantizeLinear (q, s, z) {MATRIX}"
GEMM = f"{ROUNDED} d = DequantizeLinear <axis = 0> (b, ws, bz) y = Gemm (r, m, d)"
CODES = f"{ROUNDED} p = MatMul (r, m) c = QuantizeLinear (p, s, z)"
SUMS = "q, t, u = DynamicQuantizeLinear (x) i = MatMulInteger (q, w, u) f = Cast <to = 1> (i)"
DYNAMIC = f"{SUMS} a = Mul (t, s) y = Mul (f, a)"
BRANCH = f"inner () => (float[n, 4] y) {{ {DYNAMIC} }}"
BRANCHES = f"then_branch = {BRANCH}, else_branch = {BRANCH}"
CHOICE = f"k = ReduceSum <keepdims = 0> (x) o = Cast <to = 9> (k) y = If (o) <{BRANCHES}>"


def linear(nodes: str) -> onnx.ModelProto:
    """x [n, 16] -> y [n, 4]."""
    weights = ", ".join(map(str, range(-32, 32)))
    return onnx.parser.parse_model(LINEAR.format(weights=weights, nodes=nodes))


@pytest.mark.parametrize(
    ("nodes", "op", "count"),
    [
        (GEMM, "QGemm", 1),
        (f"{CODES} y = DequantizeLinear (c, s, z)", "QLinearMatMul", 1),
        (DYNAMIC, "DynamicQuantizeMatMul", 1),
        (f"{SUMS} y = Neg (f)", "MatMulInteger", 1),
        (CHOICE, "DynamicQuantizeMatMul", 2),
    ],
)
def test_integer_linears_of_other_spellings_count(nodes: str, op: str, count: int) -> None:
    """Those in branches too."""
    ops = optimised_ops(linear(nodes).SerializeToString(), threads=1)
    assert ops[op] == integer_matmuls(ops) == count


def test_a_linear_with_integer_weights_alone_does_not() -> None:
    model = linear(f"{MATRIX} y = MatMul (x, m)").SerializeToString()
    assert integer_matmuls(optimised_ops(model, threads=1)) == 0


def test_weights_in_a_file_of_their_own_are_found(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    model = linear(GEMM)
    onnx.save_model(model, path, save_as_external_data=True, location="data", size_threshold=0)
    before = {file.name for file in tmp_path.iterdir()}
    assert integer_matmuls(optimised_ops(path)) == 1
    assert {file.name for file in tmp_path.iterdir()} == before


def test_op_counts_report_what_is_wrong_in_one_silent_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(InputError, match=r"none\.onnx: ONNX Runtime: .*doesn't exist"):
        optimised_ops(tmp_path / "none.onnx")
    gone = str(tmp_path / "gone")
    nowhere = contextlib.nullcontext(Path(gone))
    monkeypatch.setattr("regcache.runtime.optimised_graph.temporary_folder", lambda: nowhere)
    with pytest.raises(InputError, match=f"the model in memory: .* be written to {gone}") as caught:
        optimised_ops(pooling_encoder(), threads=1)
    assert "\n" not in str(caught.value)
    assert capfd.readouterr() == ("", "")
