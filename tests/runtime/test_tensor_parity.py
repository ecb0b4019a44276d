"""One tensor's parity against plain formulas, and where the error of blocks leaps."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from regcache.passes.errors import InputError
from regcache.runtime.tensor_parity import TensorMeter, TensorParity, first_jump

Floats = NDArray[np.float32]


def measure(truth: Floats, found: Floats, batch: int = 2) -> TensorParity:
    meter = TensorMeter("x")
    for start in range(0, len(truth), batch):
        meter.update(truth[start : start + batch], found[start : start + batch])
    return meter.result()


def block(number: int, error: float) -> TensorParity:
    return TensorParity(
        name=f"blocks.{number}",
        cosine_mean=1,
        cosine_min=1,
        relative_error=error,
        max_abs_error=error,
    )


@given(
    shape=st.sampled_from([(5, 4), (3, 2, 4), (3, 2, 2, 3), (1, 1)]),
    noise=st.floats(0.001, 2),
    seed=st.integers(0, 99),
)
def test_numbers_equal_their_formulas(shape: tuple[int, ...], noise: float, seed: int) -> None:
    random = np.random.default_rng(seed)
    truth = random.standard_normal(shape).astype(np.float32)
    found = truth + np.float32(noise) * random.standard_normal(shape).astype(np.float32)
    result = measure(truth, found)
    rows = (-1, shape[-1]) if len(shape) == 3 else (shape[0], -1)
    a, b = (item.reshape(rows).astype(np.float64) for item in (truth, found))
    cosines = (a * b).sum(1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)
    assert result.cosine_mean == pytest.approx(cosines.mean(), abs=1e-12)
    assert result.cosine_min == pytest.approx(cosines.min(), abs=1e-12)
    expected = np.linalg.norm(b - a) / np.linalg.norm(a)
    assert result.relative_error == pytest.approx(expected, rel=1e-12)
    assert result.max_abs_error == pytest.approx(np.abs(b - a).max(), rel=1e-12)


def test_equal_tensors_have_no_error() -> None:
    ones = np.ones((3, 2, 4), np.float32)
    assert measure(ones, ones) == block(0, 0).model_copy(update={"name": "x"})


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("first", [True, False])
def test_what_is_not_finite_is_as_bad_as_can_be(bad: float, first: bool) -> None:
    truth = np.ones((2, 3), np.float32)
    found = truth.copy()
    found[0 if first else 1, 1] = bad
    result = measure(truth, found, batch=1)
    assert result.cosine_min == -1
    assert result.relative_error > 1e300
    assert result.max_abs_error > 1e300
    assert "NaN" not in result.model_dump_json()


def test_refuses_other_shapes_and_nothing() -> None:
    meter = TensorMeter("logits")
    with pytest.raises(InputError, match=r"'logits' is \[2, 5\] where the original's is \[2, 4\]"):
        meter.update(np.zeros((2, 4)), np.zeros((2, 5)))
    with pytest.raises(InputError, match="nothing of 'logits'"):
        meter.result()


@pytest.mark.parametrize(
    ("errors", "jump"),
    [
        ([0.01, 0.012, 0.02, 0.03], None),
        ([0.001, 0.01, 0.05], None),  # below what rounding to 8 bits does
        ([0.01, 0.012, 0.3, 0.31], "blocks.2"),
        ([0.3, 0.31, 0.32], "blocks.0"),
        ([0.01, 0.2, 0.01, 0.9], "blocks.1"),
        ([], None),
    ],
)
def test_names_the_first_block_where_the_error_jumps(errors: list[float], jump: str | None) -> None:
    assert first_jump([block(*item) for item in enumerate(errors)]) == jump
