"""Rounding by what the layers read, and bias corrections, against float64 over every row."""

from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from support.rounding_cases import IMAGES, TARGETS, make_case
from support.tiny_vit import Spec

from regcache.compiler.calibration import stored_rows
from regcache.compiler.calibration.number_format import Rounded
from regcache.compiler.quantization.rounding import round_weights
from regcache.passes.quantize_linears import quantize_weight

Floats = NDArray[np.float32]
Doubles = NDArray[np.float64]

SPELLED = {"separate": Spec(), "fused": Spec(qkv="fused"), "swiglu": Spec(activation="swiglu")}


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("spelling", SPELLED)
def test_layers_err_less_than_with_nearest_integers(
    tmp_path: Path, spelling: str, target: str
) -> None:
    """The error of Q(X) W' + b' on all rows, layer by layer and far less in sum."""
    case = make_case(tmp_path, SPELLED[spelling], target)
    rounded, bits = case.round(), case.target.weight_bits
    wanted = {linear.name for _, linear in case.linears}
    assert rounded.by_channel.keys() == rounded.biases.keys() == wanted
    found, nearest = [], []
    for site, linear in case.linears:
        given, plain = rounded.by_channel[linear.name], quantize_weight(linear.weight, bits)
        assert given.integers.shape == linear.weight_shape
        assert given.scales.shape == linear.weight_shape[1:]
        assert np.abs(given.integers.astype(int)).max() <= 2 ** (bits - 1) - 1
        lost = case.shift(site, linear, given)
        found.append(np.square(lost - rounded.biases[linear.name]).sum())
        lost = case.shift(site, linear, plain)
        nearest.append(np.square(lost).sum())
    assert (np.array(found) < 1.05 * np.array(nearest)).all()
    assert np.sum(found) < 0.95 * np.sum(nearest)


@pytest.mark.parametrize("target", TARGETS)
def test_bias_corrections_are_the_mean_shift(tmp_path: Path, target: str) -> None:
    case = make_case(tmp_path, target=target)
    rounded = case.round()
    for site, linear in case.linears:
        given = rounded.by_channel[linear.name]
        shift = case.shift(site, linear, given)
        found = rounded.biases[linear.name]
        assert found.dtype == np.float32
        assert found.shape == linear.weight_shape[1:]
        np.testing.assert_allclose(found, shift.mean(axis=0), rtol=1e-4, atol=1e-6)
        assert np.square(shift - found).sum() <= np.square(shift).sum()


@pytest.mark.parametrize("threads", [2, 5])
def test_any_number_of_threads_finds_the_same(tmp_path: Path, threads: int) -> None:
    case = make_case(tmp_path)
    assert_same(case.round(threads=threads), case.round())


def assert_same(found: Rounded, wanted: Rounded) -> None:
    assert found.by_channel.keys() == wanted.by_channel.keys()
    for name, weight in wanted.by_channel.items():
        np.testing.assert_array_equal(found.by_channel[name].integers, weight.integers)
        np.testing.assert_array_equal(found.by_channel[name].scales, weight.scales)
        np.testing.assert_array_equal(found.biases[name], wanted.biases[name])


def test_sites_without_a_scale_are_left_alone(tmp_path: Path) -> None:
    case = make_case(tmp_path)
    some = [site for site in case.view.sites if ".fc" in site.name]
    whole = case.round()
    inputs = case.inputs({site.name: case.scales[site.name] for site in some})
    parted = round_weights(case.view.sites, inputs, target=case.target, threads=1)
    names = {linear.name for site in some for linear in site.linears}
    weights = {name: whole.weights[name] for name in names}
    assert_same(parted, Rounded(weights, {name: whole.biases[name] for name in names}))


def test_the_seed_decides_which_rows_are_seen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = make_case(tmp_path)
    assert_same(case.round(seed=1), case.round(seed=1))
    monkeypatch.setattr(stored_rows, "ROWS", 3 * IMAGES)
    monkeypatch.setattr(stored_rows, "LEAST_ROWS_OF_AN_IMAGE", 3)
    assert_same(case.round(seed=1), case.round(seed=1))
    one, other = case.round(seed=1).biases, case.round(seed=2).biases
    assert all(not np.array_equal(one[name], other[name]) for name in one)
