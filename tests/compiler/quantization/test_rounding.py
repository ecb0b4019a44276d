"""Rounding by what the layers read, and bias corrections, against float64 over every row."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from support.rounding_cases import IMAGES, TARGETS, make_case
from support.tiny_vit import Spec

from regcache.compiler.calibration.number_formats import Rounded
from regcache.compiler.calibration.placing import algebra_of, algebra_on
from regcache.compiler.quantization import rounding
from regcache.compiler.quantization.rounding import LayerInput, round_weights
from regcache.passes.affine import Affine
from regcache.passes.quantize_linears import quantize_weight
from regcache.runtime.device import Device

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


@pytest.mark.parametrize("budget", [1, 8 * (16**2 * 2 + 32**2)])
def test_more_passes_find_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, budget: int
) -> None:
    case = make_case(tmp_path)
    whole = case.round()
    passes: list[None] = []

    def batches() -> Iterator[Floats]:
        passes.append(None)
        yield from np.array_split(case.images, 5)

    monkeypatch.setattr(rounding, "_BYTES", budget)
    parted = round_weights(
        case.graph, case.view.sites, case.scales, batches, tmp_path / "again.onnx",
        images=IMAGES, target=case.target, threads=1,
    )  # fmt: skip
    assert len(passes) == (len(case.view.sites) if budget == 1 else 3)
    assert_same(parted, whole)


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
    scales = {site.name: case.scales[site.name] for site in some}
    parted = round_weights(
        case.graph, case.view.sites, scales, case.batches, tmp_path / "some.onnx",
        images=IMAGES, target=case.target, threads=1,
    )  # fmt: skip
    names = {linear.name for site in some for linear in site.linears}
    weights = {name: whole.weights[name] for name in names}
    assert_same(parted, Rounded(weights, {name: whole.biases[name] for name in names}))


def test_the_seed_decides_which_rows_are_seen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = make_case(tmp_path)
    assert_same(case.round(seed=1), case.round(seed=1))
    monkeypatch.setattr(rounding, "_ROWS", 1)
    monkeypatch.setattr(rounding, "_LEAST_ROWS_OF_AN_IMAGE", 3)
    assert_same(case.round(seed=1), case.round(seed=1))
    one, other = case.round(seed=1).biases, case.round(seed=2).biases
    assert all(not np.array_equal(one[name], other[name]) for name in one)


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 999),
    shape=st.tuples(st.integers(1, 6), st.integers(1, 9), st.integers(1, 5)),
    wanted=st.integers(1, 12),
    split=st.integers(1, 6),
)
def test_layer_inputs_take_the_first_token_and_others_once(
    seed: int, shape: tuple[int, int, int], wanted: int, split: int
) -> None:
    images, tokens, channels = shape
    scale = Affine(0.05, 100, "uint8")
    draw = np.random.default_rng(seed).normal(0, 3, shape).astype(np.float32)
    # In the last channel each token bears its number, as a power of two: sums tell which are in.
    draw[:, :, -1] = 2.0 ** np.arange(tokens)
    for image in range(images):
        seen = LayerInput(scale, wanted, np.random.default_rng(seed))
        seen.update(draw[image : image + 1])
        marks = int(seen.float_total[-1])
        assert marks & 1  # the first token
        assert marks.bit_count() == seen.rows == min(wanted, tokens)
        chosen = [token for token in range(tokens) if marks >> token & 1]
        rows = draw[image, chosen].astype(np.float64)
        rounded = scale.round_trip(draw[image, chosen]).astype(np.float64)
        np.testing.assert_allclose(seen.float_total, rows.sum(axis=0), rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(seen.total, rounded.sum(axis=0), rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(seen.gram, rounded.T @ rounded, rtol=1e-5, atol=1e-4)
    whole = LayerInput(scale, wanted, np.random.default_rng(seed))
    parted = LayerInput(scale, wanted, np.random.default_rng(seed))
    whole.update(draw)
    for start in range(0, images, split):
        parted.update(draw[start : start + split])
    assert whole.rows == parted.rows == images * min(wanted, tokens)
    assert int(whole.float_total[-1]) == int(parted.float_total[-1])
    np.testing.assert_allclose(parted.gram, whole.gram, rtol=1e-5, atol=1e-3)
    assert (whole.gram.shape, whole.total.shape) == ((channels, channels), (channels,))


def test_rows_of_many_channels_wait_on_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rounding, "_MANY_CHANNELS", 7)
    for channels, name in ((6, "few"), (7, "many")):
        draw = np.random.default_rng(0).normal(size=(5, 9, channels)).astype(np.float32)
        store = tmp_path / name
        found = [LayerInput(None, 4, np.random.default_rng(1), one) for one in (None, store)]
        for start in range(0, 5, 2):
            for seen in found:
                seen.update(draw[start : start + 2])
        assert store.exists() == (name == "many")
        np.testing.assert_allclose(found[0].gram, found[1].gram, rtol=1e-5, atol=1e-5)
        np.testing.assert_array_equal(found[0].total, found[1].total)
        for seen in found:
            seen.close()
        assert not list(tmp_path.iterdir())


@pytest.mark.torch
def test_gram_matrices_live_on_the_device(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those that are made of rows on disk, too."""
    monkeypatch.setattr(rounding, "_MANY_CHANNELS", 7)
    algebra = algebra_on(Device(arrays="cpu"))
    for channels in (6, 7):
        draw = np.random.default_rng(0).normal(size=(5, 9, channels)).astype(np.float32)
        here = LayerInput(None, 4, np.random.default_rng(1))
        there = LayerInput(None, 4, np.random.default_rng(1), tmp_path / f"{channels}", algebra)
        for seen in (here, there):
            seen.update(draw[:3])
            seen.update(draw[3:])
        assert algebra_of(there.gram) is algebra
        np.testing.assert_allclose(algebra.get(there.gram), here.gram, rtol=1e-5, atol=1e-5)
        np.testing.assert_array_equal(there.total, here.total)
        there.close()
