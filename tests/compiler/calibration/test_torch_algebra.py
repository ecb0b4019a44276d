"""PyTorch's algebra, on the CPU, against NumPy's: elements to the bit, sums but for rounding.

On a GPU the same code runs; there it is compared where one is at hand.
"""

from functools import partial
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from support.gptq_reference import Layer
from support.number_formats import FP8, S8S8, U8S8, W4A16

from regcache.compiler.calibration.algebra import NUMPY, Algebra
from regcache.compiler.calibration.number_formats import number_format
from regcache.compiler.calibration.placing import algebra_of, algebra_on
from regcache.compiler.calibration.quantizer import Quantizer
from regcache.compiler.calibration.ranges import output_error
from regcache.compiler.job.options import Calibrator
from regcache.compiler.job.targets import Target
from regcache.passes.affine import Affine
from regcache.passes.float8 import Float8
from regcache.runtime.device import Device

pytestmark = pytest.mark.torch

Floats = NDArray[np.float32]
FORMATS = {"u8s8": U8S8, "s8s8": S8S8, "fp8": FP8, "w4a16": W4A16}


def cuda_is_there() -> bool:
    import torch

    return torch.cuda.is_available()


@pytest.fixture(params=["cpu", "cuda:0"])
def torch_algebra(request: pytest.FixtureRequest) -> Algebra:
    if request.param != "cpu" and not cuda_is_there():
        pytest.skip("NOT CHECKED: PyTorch finds no CUDA here: needs a GPU")
    return algebra_on(Device(arrays=request.param))


def draw(*shape: int, seed: int = 0) -> Floats:
    """Long-tailed values."""
    return np.random.default_rng(seed).standard_t(3, shape).astype(np.float32)


def test_the_device_decides(torch_algebra: Algebra) -> None:
    assert algebra_on(Device()) is NUMPY
    assert algebra_on(Device(gpu=0)) is NUMPY
    placed = torch_algebra.put(draw(3, 2))
    assert torch_algebra.put(placed) is placed
    assert algebra_of(placed) is torch_algebra
    assert algebra_of(draw(2)) is NUMPY


def test_arrays_come_back_as_they_were(torch_algebra: Algebra) -> None:
    turned = draw(4, 6)[::-1, 1::2]
    turned.flags.writeable = False
    np.testing.assert_array_equal(torch_algebra.get(torch_algebra.put(turned)), turned)
    assert torch_algebra.get(torch_algebra.zeros(3)).dtype == np.float64
    halves = [torch_algebra.put(draw(2, 3)), torch_algebra.put(draw(2, 3, seed=1))]
    for axis in (0, 1):
        wanted = np.concatenate([draw(2, 3), draw(2, 3, seed=1)], axis=axis)
        np.testing.assert_array_equal(torch_algebra.get(torch_algebra.join(halves, axis)), wanted)


@pytest.mark.parametrize(
    "scale",
    [
        Affine.from_range(-3, 5, "uint8", symmetric=False),
        Affine.from_range(-3, 5, "int8", symmetric=True),
        Affine.from_range(-3, 5, "uint8", symmetric=False, bits=4),
        Float8.from_range(-1, 3),
        Float8(0.25),
    ],
    ids=str,
)
def test_round_trips_are_the_same(torch_algebra: Algebra, scale: Affine | Float8) -> None:
    """To the bit, ties and what is clipped among them."""
    ties = (np.arange(-600, 600, dtype=np.float32) + 0.5) * np.float32(scale.scale)
    for values in (draw(50, 40), ties):
        found = torch_algebra.get(torch_algebra.round_trip(scale, torch_algebra.put(values)))
        assert found.dtype == np.float32
        np.testing.assert_array_equal(found, NUMPY.round_trip(scale, values))


def test_nearest_weights_are_the_same(torch_algebra: Algebra) -> None:
    weight = draw(70, 9)
    weight[:, 4] = 0
    weight[32:64, 2] = 0
    placed = torch_algebra.put(weight)
    for bits in (8, 4):
        found = torch_algebra.get(torch_algebra.nearest(placed, bits))
        np.testing.assert_array_equal(found, NUMPY.nearest(weight, bits))
        found = torch_algebra.get(torch_algebra.nearest_blocks(placed, bits, 32))
        np.testing.assert_array_equal(found, NUMPY.nearest_blocks(weight, bits, 32))
    found = torch_algebra.get(torch_algebra.nearest_float8(placed))
    np.testing.assert_array_equal(found, NUMPY.nearest_float8(weight))


def test_sums_are_the_same_but_for_rounding(torch_algebra: Algebra) -> None:
    one, other = draw(60, 33), draw(60, 33, seed=1)
    here, there = torch_algebra.put(one), torch_algebra.put(other)
    close = partial(np.testing.assert_allclose, rtol=2e-6)
    close(torch_algebra.square_sum(here), np.square(one, dtype=np.float64).sum())
    close(torch_algebra.dot(here, there), (one.astype(np.float64) * other).sum(), atol=1e-4)
    close(torch_algebra.spread(here), len(one) * one.var(axis=0, dtype=np.float64).sum())
    close(torch_algebra.magnitudes(here), NUMPY.magnitudes(one))
    gram = torch_algebra.gram(here)
    assert torch_algebra.get(gram).dtype == np.float64
    close(torch_algebra.get(gram), NUMPY.gram(one), atol=1e-4)
    close(torch_algebra.diagonal(gram), np.square(one, dtype=np.float64).sum(axis=0))


@pytest.mark.parametrize(("inner", "outer"), [(24, 16), (16, 24)])
def test_output_errors_are_the_same(torch_algebra: Algebra, inner: int, outer: int) -> None:
    weights, added = [draw(inner, outer), draw(inner, 3, seed=1)], draw(30, inner, seed=2)
    error = output_error([torch_algebra.put(weight) for weight in weights])
    found = error(torch_algebra.put(added))
    assert isinstance(found, float)
    wanted = added.astype(np.float64) @ np.concatenate(weights, axis=1)
    np.testing.assert_allclose(found, np.square(wanted).sum(), rtol=1e-5)


GPTQ: list[dict[str, Any]] = [
    {"rows": 40},
    {"rows": 200},
    {"rows": 70, "last": 7, "block_size": 32, "first": -8},
    {"rows": 150, "last": 3, "block_size": 40, "first": -4},
]


@pytest.mark.parametrize("case", GPTQ, ids=str)
def test_gptq_is_the_same(torch_algebra: Algebra, case: dict[str, Any]) -> None:
    """But for ties that rounding moves, and what these move: of as little error."""
    layer = Layer.draw(3, columns=20, samples=300, **case)
    size, first = layer.block_size, layer.first
    weight, gram = torch_algebra.put(layer.weight), torch_algebra.put(layer.gram)
    moments = torch_algebra.diagonal(gram) / 300
    steps = torch_algebra.choose_steps(weight, moments, layer.last, size, first=first)
    np.testing.assert_allclose(steps, layer.steps, rtol=1e-6)
    found = torch_algebra.round_by_error(weight, gram, layer.steps, layer.last, size, first=first)
    wanted = layer.round()
    assert found.dtype == np.int8
    assert (found != wanted).mean() < 0.01
    assert layer.errors(found).sum() == pytest.approx(layer.errors(wanted).sum(), rel=0.01)
    if size is not None:
        arguments = (wanted, layer.steps, size, 0.05)
        np.testing.assert_allclose(
            torch_algebra.refit_steps(weight, gram, *arguments),
            NUMPY.refit_steps(layer.weight, layer.gram, *arguments),
            rtol=1e-4,
        )


@pytest.mark.parametrize("target", FORMATS.values(), ids=FORMATS)
def test_formats_decide_alike(torch_algebra: Algebra, target: Target) -> None:
    """The scale of an activation, to the bit, and the nearest weights."""
    rows, weights = draw(80, 48), [draw(48, 20, seed=1), draw(48, 60, seed=2)]
    seen = Seen(rows)
    placed = torch_algebra.put(weights[0])
    found = number_format(target, torch_algebra).nearest(placed)
    np.testing.assert_array_equal(
        torch_algebra.get(found), number_format(target).nearest(weights[0])
    )
    if target.activation_bits is None:
        return
    place = str(placed.device)
    for calibrator in (Calibrator.OUTPUT_ERROR, Calibrator.MIN_MAX):
        there = Quantizer(target, calibrator, Device(arrays=place)).scale(weights, seen)
        assert there == Quantizer(target, calibrator).scale(weights, seen)


class Seen:
    """What is known of an activation [S, K]."""

    def __init__(self, rows: Floats) -> None:
        self.rows, self.low, self.high = rows, float(rows.min()), float(rows.max())
