"""Weights rounded in blocks and to E4M3 by what the layers read, against float64 over every row."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from numpy.typing import NDArray
from support.examples import examples
from support.float8_numbers import nearest
from support.number_formats import FP8, W4A16
from support.rounding_cases import Case, make_case
from support.tiny_vit import Spec

from regcache.compiler.calibration.algebra import nearest_blocks
from regcache.compiler.calibration.number_format import Rounded, Scale
from regcache.compiler.calibration.number_formats import block_bits
from regcache.compiler.job.targets import Target
from regcache.compiler.quantization.rounding import round_weights
from regcache.passes.encoder import Linear
from regcache.passes.float8 import Float8

Floats = NDArray[np.float32]
Doubles = NDArray[np.float64]

# One and a half blocks of 32 channels, and two and a half.
SPECS = {
    "plain": Spec(width=48, hidden=80),
    "swiglu": Spec(width=48, hidden=80, activation="swiglu"),
}


def rounded_in(case: Case, target: Target, scales: dict[str, Scale | None]) -> Rounded:
    return round_weights(case.view.sites, case.inputs(scales), target=target, threads=1)


def in_blocks(case: Case) -> Rounded:
    return rounded_in(case, W4A16, dict.fromkeys(case.seen))


def bits_of(linear: Linear) -> int:
    """Eight where the damage is largest."""
    return 8 if linear.name.split(".")[-1] in {"v", "out"} else 4


def lost(case: Case, tensor: str, linear: Linear, weight: Floats) -> Doubles:
    """X W - X W' [rows, N] in float64."""
    rows = case.seen[tensor].rows.astype(np.float64)
    return np.asarray(rows @ (linear.weight.astype(np.float64) - weight))


@pytest.fixture(scope="module", params=SPECS)
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    return make_case(tmp_path_factory.mktemp(request.param), SPECS[request.param])


@pytest.fixture(scope="module")
def blocks(case: Case) -> Rounded:
    return in_blocks(case)


def test_every_linear_is_stored_in_blocks(case: Case, blocks: Rounded) -> None:
    linears = [linear for _, linear in case.linears]
    names = {linear.name for linear in linears}
    assert blocks.by_block.keys() == blocks.biases.keys() == names
    assert not blocks.by_channel
    for linear in linears:
        stored, bits = blocks.by_block[linear.name], bits_of(linear)
        assert (stored.bits, stored.block_size) == (bits, 32)
        assert stored.integers.dtype == np.int8
        assert stored.integers.shape == linear.weight_shape
        rows, columns = linear.weight_shape
        assert stored.scales.dtype == np.float32
        assert stored.scales.shape == (-(-rows // 32), columns)
        assert np.isfinite(stored.scales).all()
        assert stored.integers.min() == -(2 ** (bits - 1))  # signed steps use all integers
        assert stored.integers.max() <= 2 ** (bits - 1) - 1
        assert np.abs(stored.dequantized() - linear.weight).max() < 0.5


def test_layers_err_less_than_with_nearest_blocks(case: Case, blocks: Rounded) -> None:
    """The errors of X W' + b' on all rows."""
    found, plain = [], []
    for site, linear in case.linears:
        stored = blocks.by_block[linear.name]
        error = lost(case, site.name, linear, stored.dequantized())
        found.append(np.square(error - blocks.biases[linear.name]).sum())
        other = nearest_blocks(linear.weight, bits_of(linear), 32).dequantized()
        plain.append(np.square(lost(case, site.name, linear, other)).sum())
    assert (np.array(found) < np.array(plain)).all()
    assert np.sum(found) < 0.6 * np.sum(plain)


def test_bias_corrections_of_blocks_are_the_mean_shift(case: Case, blocks: Rounded) -> None:
    for site, linear in case.linears:
        weight = blocks.by_block[linear.name].dequantized()
        shift = lost(case, site.name, linear, weight)
        found = blocks.biases[linear.name]
        assert found.dtype == np.float32
        np.testing.assert_allclose(found, shift.mean(axis=0), rtol=1e-3, atol=2e-6)
        assert np.abs(found).max() > 1e-5  # there is something to correct


def test_no_step_could_be_better(case: Case, blocks: Rounded) -> None:
    """The damped error's slope along each step is 0, beside those along single weights."""
    for site, linear in case.linears:
        stored, rows = blocks.by_block[linear.name], case.seen[site.name].rows
        gram = rows.T.astype(np.float64) @ rows
        gram += 0.05 * np.diag(gram).mean() * np.eye(len(gram))
        slopes = stored.integers * (gram @ (stored.dequantized() - linear.weight))
        starts = range(0, len(gram), 32)
        whole = np.abs(np.add.reduceat(slopes, starts, axis=0))
        assert (whole <= 0.01 * np.add.reduceat(np.abs(slopes), starts, axis=0)).all()


def test_eight_bits_err_far_less(tmp_path: Path) -> None:
    """Of the value projection, beside those of the queries and keys that read the same."""
    case = make_case(tmp_path, SPECS["plain"])
    rounded = in_blocks(case)
    sizes = {"q": 0.0, "v": 0.0}
    for site, linear in case.linears:
        name = linear.name.split(".")[-1]
        if name in sizes:
            weight = rounded.by_block[linear.name].dequantized()
            sizes[name] += float(np.square(lost(case, site.name, linear, weight)).sum())
    assert 0 < sizes["v"] < sizes["q"] / 50


def test_only_named_sites_are_rounded(case: Case, blocks: Rounded) -> None:
    some = [site for site in case.view.sites if ".fc" in site.name]
    parted = rounded_in(case, W4A16, dict.fromkeys(site.name for site in some))
    assert parted.by_block.keys() == {linear.name for site in some for linear in site.linears}
    for name, stored in parted.by_block.items():
        np.testing.assert_array_equal(stored.integers, blocks.by_block[name].integers)
        np.testing.assert_array_equal(stored.scales, blocks.by_block[name].scales)


def test_bits_go_by_the_linears_name(tmp_path: Path) -> None:
    """A packed projection holds the values, but is no value projection."""
    case = make_case(tmp_path, Spec(qkv="fused", depth=1))
    names = {linear.name: block_bits(linear, 4) for _, linear in case.linears}
    assert names == {f"blocks.0.{name}": 4 for name in ("qkv", "fc1", "fc2")} | {"blocks.0.out": 8}


def e4m3(values: Floats) -> Floats:
    """Each number of an array as the nearest of E4M3."""
    flat = [nearest(float(value)) for value in values.ravel()]
    return np.array(flat, np.float32).reshape(values.shape)


def test_fp8_has_biases_alone(tmp_path: Path) -> None:
    """The mean shift of E4M3 activations and weights, each the nearest to its number."""
    case = make_case(tmp_path, Spec(depth=1))
    case = replace(case, images=case.images[:6])
    for recorder in case.seen.values():
        recorder.parts[:] = [recorder.tokens[:6]]
    scales = {name: Float8(0.013 + 0.01 * n) for n, name in enumerate(case.seen)}
    rounded = rounded_in(case, FP8, dict(scales))
    assert not rounded.by_channel
    assert not rounded.by_block
    assert rounded.biases.keys() == {linear.name for _, linear in case.linears}
    for site, linear in case.linears:
        rows, scale = case.seen[site.name].rows, np.float32(scales[site.name].scale)
        steps = np.abs(linear.weight).max(axis=0) / np.float32(448)
        weight = e4m3(linear.weight / steps).astype(np.float64) * steps
        given = e4m3(rows / scale).astype(np.float64) * scale
        shift = rows.astype(np.float64) @ linear.weight - given @ weight
        found = rounded.biases[linear.name]
        np.testing.assert_allclose(found, shift.mean(axis=0), rtol=1e-3, atol=2e-6)
        assert np.abs(found).max() > 1e-4


@examples(60)
@given(
    weight=hnp.arrays(
        np.float32,
        hnp.array_shapes(min_dims=2, max_dims=2, max_side=20),
        elements=st.floats(-8, 8, width=32),
    ),
    bits=st.sampled_from([2, 4, 8]),
    size=st.integers(1, 24),
)
def test_nearest_blocks_by_the_formula(weight: Floats, bits: int, size: int) -> None:
    found = nearest_blocks(weight, bits, size)
    rows, columns = weight.shape
    assert (found.bits, found.block_size) == (bits, size)
    assert found.scales.shape == (-(-rows // size), columns)
    assert found.integers.dtype == np.int8
    assert found.scales.dtype == np.float32
    last = 2 ** (bits - 1) - 1
    for column in range(columns):
        for start in range(0, rows, size):
            part = weight[start : start + size, column]
            peak = max(abs(float(value)) for value in part)
            scale = float(found.scales[start // size, column])
            if peak / last < np.finfo(np.float32).tiny * 1.001:
                assert scale == 1 or peak  # numbers too small for a step: whichever
                continue
            assert scale == pytest.approx(peak / last)
            integers = found.integers[start : start + size, column].astype(int)
            assert np.abs(integers).max() == last
            for integer, value in zip(integers, part, strict=True):
                assert abs(integer) <= last
                assert abs(integer * scale - float(value)) <= scale * 0.5001
