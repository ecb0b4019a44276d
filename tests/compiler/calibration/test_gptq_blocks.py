"""GPTQ with signed steps, as 4-bit blocks need them, and steps fitted again afterwards."""

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from numpy.typing import NDArray
from support.examples import examples
from support.gptq_reference import SEEDS, Doubles, Floats, Layer, slow_gptq

from regcache.compiler.calibration import gptq
from regcache.compiler.calibration.gptq import choose_steps, refit_steps, round_by_error

_DOUBT = 0.02
# The ridge that keeps the equations regular is a millionth; steps are stored in float32.
_SLACK = 2e-6


def signed(
    seed: int,
    rows: int,
    columns: int,
    samples: int,
    size: int,
    last: int = 7,
    damping: float = 0.05,
) -> Layer:
    return Layer.draw(
        seed, rows, columns, samples, damping, last=last, first=-last - 1, block_size=size
    )


SIGNED = st.builds(
    signed,
    seed=SEEDS,
    rows=st.integers(1, 24),
    columns=st.integers(1, 12),
    samples=st.integers(1, 60),
    size=st.integers(1, 30),
    last=st.sampled_from([1, 7, 127]),
    damping=st.sampled_from([0.002, 0.05, 0.5]),
)


def blocks_of(layer: Layer) -> Iterator[tuple[int, slice]]:
    """The number of each block, and its rows."""
    size = layer.block_size or len(layer.weight)
    for block in range(len(layer.steps)):
        yield block, slice(block * size, (block + 1) * size)


@examples(60)
@given(layer=SIGNED)
def test_equals_the_method_spelled_out(layer: Layer) -> None:
    """With one integer more below than above, and other dampings."""
    found = layer.round()
    assert found.min() >= layer.lowest
    assert found.max() <= layer.last
    wanted, margin, _ = slow_gptq(layer)
    clear = margin > _DOUBT
    np.testing.assert_array_equal(found[:, clear], wanted[:, clear])


def test_damping_decides() -> None:
    """Much of it leaves nothing to correct by: each weight goes to its nearest."""
    layer = signed(4, 24, 8, 100, size=8, damping=0.01)
    much = replace(layer, damping=1e6)
    np.testing.assert_array_equal(much.round(), much.nearest())
    assert (layer.round() != layer.nearest()).mean() > 0.1


def test_the_lowest_integer_is_used_only_where_it_is_asked_for() -> None:
    layer = signed(3, 64, 32, 200, size=16)
    assert layer.round().min() == -8
    assert replace(layer, first=None).round().min() == -7
    assert replace(layer, first=-3).round().min() == -3


@examples(60)
@given(
    seed=SEEDS,
    rows=st.integers(1, 40),
    columns=st.integers(1, 9),
    size=st.integers(1, 45),
    last=st.sampled_from([1, 7, 127]),
)
def test_weights_on_the_grid_come_back(
    seed: int, rows: int, columns: int, size: int, last: int
) -> None:
    """Where nothing clips, each block's largest weight lands on the lowest integer exactly."""
    random = np.random.default_rng(seed)
    count = -(-rows // size)
    integers = random.integers(-last, last + 1, (rows, columns))
    for block in range(count):
        part = integers[block * size : (block + 1) * size]
        part[random.integers(len(part), size=columns), np.arange(columns)] = -last - 1
    steps = (2.0 ** random.integers(-9, 3, (count, columns))).astype(np.float32)
    steps *= random.choice([-1, 1], (count, columns))
    weight = (integers * np.repeat(steps, size, axis=0)[:rows]).astype(np.float32)
    found = choose_steps(weight, np.ones(rows), last, size, first=-last - 1)
    np.testing.assert_array_equal(found, steps)
    gram = np.eye(rows)
    again = round_by_error(weight, gram, found, last, size, first=-last - 1)
    np.testing.assert_array_equal(again, integers)


@examples(60)
@given(layer=SIGNED)
def test_steps_point_to_the_largest_weight(layer: Layer) -> None:
    """They take it to the lowest integer or beyond, and clip only where that errs less."""
    moments = np.diag(layer.gram)
    for block, rows in blocks_of(layer):
        part = layer.weight[rows].astype(np.float64)
        largest = part[np.abs(part).argmax(axis=0), np.arange(part.shape[1])]
        reached = largest / layer.steps[block].astype(np.float64)
        assert (reached <= layer.lowest * (1 - 1e-6)).all()
        assert (reached >= layer.lowest / 0.75).all()

        def error(steps: Doubles, part: Doubles = part, rows: slice = rows) -> Doubles:
            rounded = np.clip(np.rint(part / steps), layer.lowest, layer.last) * steps
            return np.asarray((np.square(rounded - part) * moments[rows, None]).sum(axis=0))

        bound = error(largest / layer.lowest)
        assert (error(layer.steps[block]) <= bound * 1.001 + 1e-6 * moments.mean()).all()


def test_one_integer_more_errs_less() -> None:
    random = np.random.default_rng(0)
    weight = random.standard_normal((320, 40)).astype(np.float32)
    lost = {}
    for first in (-7, -8):
        steps = choose_steps(weight, np.ones(320), 7, 32, first=first)
        every = np.repeat(steps, 32, axis=0)
        lost[first] = np.square(np.clip(np.rint(weight / every), first, 7) * every - weight).sum()
    assert lost[-8] < 0.93 * lost[-7]


def test_blocks_of_zeros_have_a_step_of_1() -> None:
    weight = np.zeros((7, 2), np.float32)
    weight[4:, 1] = 1, -2, 3
    steps = choose_steps(weight, np.ones(7), 7, 4, first=-8)
    np.testing.assert_array_equal(steps[:, 0], 1)
    assert steps[0, 1] == 1
    assert steps[1, 1] < 0


def least_squares(layer: Layer, integers: NDArray[np.int8]) -> Doubles:
    """The best steps [blocks, N], column by column: min |R A s - R w| with R^T R the damped Gram.

    Blocks whose integers are all zero get a 0.
    """
    root = np.linalg.cholesky(layer.damped).T
    found = np.zeros(layer.steps.shape)
    for column in range(layer.weight.shape[1]):
        design = np.zeros((len(root), len(found)))
        for block, rows in blocks_of(layer):
            design[rows, block] = integers[rows, column]
        wanted = root @ layer.weight[:, column].astype(np.float64)
        found[:, column] = np.linalg.lstsq(root @ design, wanted, rcond=None)[0]
    return found


def refit(layer: Layer, integers: NDArray[np.int8]) -> Floats:
    assert layer.block_size is not None
    return refit_steps(
        layer.weight, layer.gram, integers, layer.steps, layer.block_size, layer.damping
    )


def lost_by(layer: Layer, steps: NDArray[np.floating], integers: NDArray[np.int8]) -> Doubles:
    """The damped error of each output channel with other steps."""
    return replace(layer, steps=np.asarray(steps)).errors(integers, layer.damped)


def slack_of(layer: Layer, steps: NDArray[np.floating], integers: NDArray[np.int8]) -> Doubles:
    """By how much [N] a ridge solution may err more than these steps do.

    It minimises the error and the ridge's share of what each block puts out alone.
    """
    alone = np.zeros(layer.weight.shape[1])
    for block, rows in blocks_of(layer):
        part = integers[rows] * steps[block].astype(np.float64)
        alone += np.einsum("kn,kj,jn->n", part, layer.damped[rows, rows], part)
    return _SLACK * (alone + lost_by(layer, steps, integers))


# Equations that are all but singular; and a lone channel whose step would change its sign.
@example(signed(0, 2, 2, 1, size=1, last=1, damping=0.002))
@example(signed(2854, 13, 6, 4, size=12))
@examples(100)
@given(layer=SIGNED)
def test_refitted_steps_never_err_more(layer: Layer) -> None:
    integers = layer.round()
    found = refit(layer, integers)
    assert found.dtype == np.float32
    assert found.shape == layer.steps.shape
    assert (np.sign(found) == np.sign(layer.steps)).all()
    bound = lost_by(layer, layer.steps, integers) + slack_of(layer, layer.steps, integers)
    assert (lost_by(layer, found, integers) <= bound).all()


@examples(60)
@given(
    seed=SEEDS,
    rows=st.integers(1, 40),
    columns=st.integers(1, 8),
    size=st.integers(4, 45),
    samples=st.integers(20, 200),
)
def test_refitted_steps_are_the_least_squares(
    seed: int, rows: int, columns: int, size: int, samples: int
) -> None:
    """Also where the blocks do not divide the channels."""
    layer = signed(seed, rows, columns, samples, size)
    integers = layer.round()
    wanted = least_squares(layer, integers)
    same = (wanted * layer.steps >= 0).all(axis=0)
    found = refit(layer, integers)
    there = wanted[:, same] != 0
    near_zero = 1e-4 * np.abs(wanted).max()  # such a step is as exact as the others, not relatively
    found_there, wanted_there = found[:, same][there], wanted[:, same][there]
    np.testing.assert_allclose(found_there, wanted_there, rtol=2e-3, atol=near_zero)
    bound = lost_by(layer, wanted, integers) + slack_of(layer, wanted, integers)
    assert (lost_by(layer, found, integers) <= bound)[same].all()
    np.testing.assert_array_equal(found[:, ~same], layer.steps[:, ~same])


def test_most_columns_keep_their_signs_and_gain() -> None:
    """What the tests above leave out is little, and what is gained is not."""
    layer = signed(7, 90, 40, 400, size=16)
    integers = layer.round()
    assert (least_squares(layer, integers) * layer.steps > 0).all()
    gain = lost_by(layer, refit(layer, integers), integers) / lost_by(layer, layer.steps, integers)
    assert gain.max() < 1
    assert gain.mean() < 0.95


@pytest.mark.parametrize("block", [0, 2, 4])
def test_blocks_of_zeros_keep_their_step(block: int) -> None:
    """And the others are fitted as if these were not there."""
    layer = signed(11, 36, 5, 300, size=8)
    integers, weight = layer.round(), layer.weight.copy()
    for array in (integers, weight):
        array[block * 8 : (block + 1) * 8, :3] = 0
    layer = replace(layer, weight=weight)
    found = refit(layer, integers)
    np.testing.assert_array_equal(found[block, :3], layer.steps[block, :3])
    wanted = least_squares(layer, integers)
    others = np.delete(np.arange(5), block)
    np.testing.assert_allclose(found[others], wanted[others], rtol=1e-4)
    np.testing.assert_allclose(found[block, 3:], wanted[block, 3:], rtol=1e-4)
    integers[:] = 0
    np.testing.assert_array_equal(refit(layer, integers), layer.steps)


@pytest.mark.parametrize("columns", [1, 3, 8])
def test_the_columns_solved_at_a_time_do_not_matter(
    columns: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    layer = signed(13, 40, 8, 300, size=16)
    integers = layer.round()
    whole = refit(layer, integers)
    monkeypatch.setattr(gptq, "_COLUMNS", columns)
    np.testing.assert_allclose(refit(layer, integers), whole, rtol=1e-6)


def test_the_given_steps_stay_as_they_are() -> None:
    layer = signed(17, 20, 4, 100, size=8)
    before = layer.steps.copy()
    assert (refit(layer, layer.round()) != before).any()
    np.testing.assert_array_equal(layer.steps, before)
