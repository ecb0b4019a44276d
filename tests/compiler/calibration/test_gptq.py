"""GPTQ against the method spelled out in float64, brute force and rounding to nearest."""

import itertools
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from support.examples import examples
from support.gptq_reference import _DOUBT, SEEDS, Layer, slow_gptq

from regcache.compiler.calibration import gptq
from regcache.compiler.calibration.gptq import choose_steps, round_by_error

Floats = NDArray[np.float32]
Doubles = NDArray[np.float64]


LAYERS = st.builds(
    Layer.draw,
    seed=SEEDS,
    rows=st.integers(1, 24),
    columns=st.integers(1, 12),
    samples=st.integers(1, 60),
    block_size=st.integers(1, 30),
    last=st.sampled_from([1, 7, 31, 127]),
)


@examples(60)
@given(layer=LAYERS)
def test_equals_the_method_spelled_out(layer: Layer) -> None:
    """Singular Gram matrices and blocks too; a channel near a tie may round either way."""
    found = layer.round()
    assert found.dtype == np.int8
    assert found.shape == layer.weight.shape
    assert np.abs(found.astype(int)).max() <= layer.last
    wanted, margin, _ = slow_gptq(layer)
    clear = margin > _DOUBT
    np.testing.assert_array_equal(found[:, clear], wanted[:, clear])


def test_nearly_all_is_clear_of_ties() -> None:
    """What the test above leaves out is little."""
    clear = [slow_gptq(Layer.draw(seed, 12, 8, 40))[1] > _DOUBT for seed in range(20)]
    assert np.mean(clear) > 0.5


@pytest.mark.parametrize("lazy", [1, 5, 128])
@pytest.mark.parametrize("block_size", [150, 50, 64])
def test_the_size_of_a_lazy_block_does_not_matter(
    lazy: int, block_size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    layer = Layer.draw(1, 150, 20, 400, block_size=block_size)
    wanted, margin, _ = slow_gptq(layer)
    monkeypatch.setattr(gptq, "_LAZY", lazy)
    found = layer.round()
    near = margin <= 3e-4  # wide layers come near a tie somewhere in most columns
    assert near.mean() < 0.5
    np.testing.assert_array_equal(found[:, ~near], wanted[:, ~near])
    assert layer.errors(found).sum() == pytest.approx(layer.errors(wanted).sum(), rel=0.02)


@examples(60)
@given(layer=LAYERS)
def test_the_error_has_its_bound(layer: Layer) -> None:
    """Each row adds at most half a step, squared, by the curvature that is left there.

    Unless a correction clips, as one may where a small weight has a step of its own.
    """
    roomy = replace(layer, steps=layer.steps * 4, last=127)
    found = roomy.round()
    *_, curvature = slow_gptq(roomy)
    bound = curvature @ np.square(roomy.row_steps.astype(np.float64) / 2)
    clips = (np.abs(found.astype(int)) == 127).any(axis=0)
    assert (clips | (roomy.errors(found, roomy.damped) <= bound * 1.01 + 1e-12)).all()


@pytest.mark.parametrize("rows", [2, 3, 4])
def test_brute_force_is_little_better(rows: int) -> None:
    last, ratios, nearest = 3, [], []
    grid = np.array(list(itertools.product(range(-last, last + 1), repeat=rows)), np.float64)
    for seed in range(60):
        layer = Layer.draw(seed, rows, 1, 30, last=last)
        lost = grid * layer.steps[0, 0] - layer.weight[:, 0]
        least = np.einsum("gk,kj,gj->g", lost, layer.gram, lost).min()
        found = layer.errors(layer.round())[0]
        assert found >= least * (1 - 1e-6)
        ratios.append(found / least)
        nearest.append(layer.errors(layer.nearest())[0] / least)
    assert np.median(ratios) < 1.05
    assert np.mean(np.log(ratios)) < 0.6 * np.mean(np.log(nearest))


@pytest.mark.parametrize("samples", [10, 60, 500])
@pytest.mark.parametrize(("last", "size"), [(127, 32), (7, 32), (7, 8)])
def test_better_than_nearest_on_correlated_inputs(samples: int, last: int, size: int) -> None:
    layers = [Layer.draw(seed, 32, 16, samples, last=last, block_size=size) for seed in range(12)]
    found = [layer.errors(layer.round()).sum() for layer in layers]
    nearest = [layer.errors(layer.nearest()).sum() for layer in layers]
    assert np.mean(found) < 0.8 * np.mean(nearest)
    assert np.mean(np.less_equal(found, np.multiply(nearest, 1.001))) > 0.9


@examples(30)
@given(seed=SEEDS, rows=st.integers(1, 20), columns=st.integers(1, 8))
def test_inputs_that_do_not_correlate_round_to_nearest(seed: int, rows: int, columns: int) -> None:
    random = np.random.default_rng(seed)
    weight = random.standard_normal((rows, columns)).astype(np.float32)
    gram = np.diag(random.uniform(0, 5, rows))
    layer = Layer(weight, gram, choose_steps(weight, np.diag(gram), 127), 127)
    nearest = np.clip(np.rint(weight / layer.steps), -127, 127)
    np.testing.assert_array_equal(layer.round(), nearest)


@pytest.mark.parametrize("scale", [0.0, 1e-30, 1e12])
def test_dead_channels_and_extreme_inputs(scale: float) -> None:
    layer = Layer.draw(5, 12, 6, 5)
    gram = layer.gram * scale
    gram[3], gram[:, 3] = 0, 0
    found = replace(layer, gram=gram).round()
    nearest = layer.nearest()
    assert np.abs(found.astype(int)).max() <= 127
    np.testing.assert_array_equal(found[3], nearest[3])  # nothing reads it, nothing corrects it
    if scale:
        lost = layer.errors(found, gram).sum()
        assert lost < layer.errors(nearest, gram).sum()
    else:
        np.testing.assert_array_equal(found, nearest)


def weighted_error(layer: Layer, moments: Doubles, steps: Floats) -> Doubles:
    """The error of nearest rounding by block and column, input channels by `moments`."""
    rows = Layer(layer.weight, layer.gram, steps, layer.last, layer.block_size)
    lost = np.square(rows.nearest() * rows.row_steps - layer.weight) * moments[:, None]
    size = layer.block_size or len(lost)
    return np.array([lost[start : start + size].sum(axis=0) for start in range(0, len(lost), size)])


@examples(60)
@given(layer=LAYERS)
def test_steps_are_never_worse_than_without_clipping(layer: Layer) -> None:
    """Also where the blocks do not divide the channels, and in each block of each column alone."""
    moments = np.diag(layer.gram)
    size = layer.block_size or len(layer.weight)
    whole = np.ones_like(layer.steps)
    for block in range(len(whole)):
        peaks = np.abs(layer.weight[block * size : (block + 1) * size]).max(axis=0, initial=0)
        whole[block] = np.where(peaks > 0, peaks / layer.last, 1)
    assert (layer.steps <= whole).all()
    assert (layer.steps >= whole * 0.75).all()
    found = weighted_error(layer, moments, layer.steps)
    bound = weighted_error(layer, moments, whole)
    assert (found <= bound * 1.001 + 1e-6 * moments.mean()).all()


def test_few_bits_clip() -> None:
    layer = Layer.draw(2, 64, 32, 400, last=7)
    whole = np.abs(layer.weight).max(axis=0) / 7
    moments = np.diag(layer.gram)
    assert np.mean(layer.steps[0] < whole) > 0.5
    found = weighted_error(layer, moments, layer.steps).sum()
    assert found < 0.9 * weighted_error(layer, moments, whole[None]).sum()


def test_the_weights_that_are_read_most_decide_the_step() -> None:
    """A large weight on a channel that is nearly silent is clipped, and not where it is loud."""
    weight = np.random.default_rng(0).uniform(-1, 1, (40, 1)).astype(np.float32)
    weight[7] = 1.3
    moments = np.ones(40)
    moments[7] = 1e-6
    assert choose_steps(weight, moments, 7)[0, 0] == pytest.approx(1.3 / 7 * 0.76, rel=0.05)
    moments[7] = 1e6
    assert choose_steps(weight, moments, 7)[0, 0] == pytest.approx(1.3 / 7)


@pytest.mark.parametrize(("size", "blocks"), [(None, 1), (4, 3), (3, 4)])
def test_zeros_have_a_step(size: int | None, blocks: int) -> None:
    weight = np.zeros((10, 3), np.float32)
    weight[:, 1] = np.linspace(-1, 1, 10)
    for moments in (np.ones(10), np.zeros(10)):
        steps = choose_steps(weight, moments, 127, size)
        assert steps.shape == (blocks, 3)
        assert steps.dtype == np.float32
        np.testing.assert_array_equal(steps[:, [0, 2]], 1)
        assert (steps[:, 1] > 0).all()
        integers = round_by_error(weight, np.diag(moments), steps, 127, size)
        assert not integers[:, [0, 2]].any()
        assert integers[:, 1].any()
