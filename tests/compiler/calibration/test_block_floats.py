"""Weights of block-scaled floats, chosen by the error at their layers' outputs."""

from dataclasses import replace

import numpy as np
import pytest
from numpy.typing import NDArray
from support.number_formats import MXFP8, NVFP4
from support.rounding_cases import Case, make_case
from support.tiny_vit import Spec

from regcache.compiler.calibration.block_floats import choose_scales, make_up
from regcache.compiler.calibration.number_format import EVENLY, Emphasis, Rounded
from regcache.compiler.job.targets import Target
from regcache.compiler.quantization.rounding import round_weights
from regcache.passes.block_floats import BlockFloat, BlockFloatWeight, BlockFormat, round_weight

Floats = NDArray[np.float32]
TARGETS = {BlockFormat.NVFP4: NVFP4, BlockFormat.MXFP8: MXFP8}
KINDS = pytest.mark.parametrize("kind", BlockFormat)


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Case:
    return make_case(tmp_path_factory.mktemp("case"), Spec(width=32, hidden=64))


def rounded_in(case: Case, target: Target) -> Rounded:
    assert target.blocks is not None
    scales = {name: BlockFloat.from_range(target.blocks, -8, 8) for name in case.seen}
    return round_weights(case.view.sites, case.inputs(scales), target=target, threads=1)


def steps_of(weight: BlockFloatWeight) -> Floats:
    return np.repeat(weight.scales * np.float32(weight.scale), weight.kind.block_size, axis=0)


@KINDS
def test_every_weight_holds_numbers_of_the_format(case: Case, kind: BlockFormat) -> None:
    found = rounded_in(case, TARGETS[kind]).by_block_float
    assert found.keys() == {linear.name for _, linear in case.linears}
    for _, linear in case.linears:
        weight = found[linear.name]
        assert weight.kind is kind
        np.testing.assert_array_equal(weight.values, kind.nearest(weight.values))
        again = kind.scales(weight.scales * np.float32(kind.largest), 1.0)
        np.testing.assert_array_equal(weight.scales, again)
        assert np.abs(weight.dequantized() - linear.weight).max() < 0.5


@KINDS
def test_layers_err_less_than_with_nearest_weights(case: Case, kind: BlockFormat) -> None:
    """X W' + b' on the rounded rows X, against F W on the float ones F."""
    rounded, found, plain = rounded_in(case, TARGETS[kind]), 0.0, 0.0
    scale = BlockFloat.from_range(kind, -8, 8)
    for site, linear in case.linears:
        rows = case.seen[site.name].rows
        read, wanted = scale.round_trip(rows), rows @ linear.weight
        weight = rounded.by_block_float[linear.name].dequantized()
        made = read @ weight + rounded.biases[linear.name]
        found += float(np.square(made - wanted).sum())
        nearest = read @ round_weight(linear.weight, kind).dequantized()
        plain += float(np.square(nearest - wanted).sum())
    assert found < 0.9 * plain


@KINDS
def test_chosen_scales_err_no_more_than_those_of_the_peaks(kind: BlockFormat) -> None:
    random = np.random.default_rng(2)
    weight = random.standard_normal((64, 24)).astype(np.float32)
    weight[::9] *= 6
    moments = random.uniform(0.1, 4, 64)
    nearest = round_weight(weight, kind)
    scales = choose_scales(weight, moments, kind, nearest.scale)

    def error(scales: Floats) -> Floats:
        chosen = BlockFloatWeight(kind, weight, scales, nearest.scale)
        steps = steps_of(chosen)
        lost = kind.nearest_scaled(weight, steps) * steps - weight
        squares = np.square(lost) * moments[:, None]
        return np.asarray(squares.reshape(len(scales), -1, 24).sum(axis=1), np.float32)

    assert (error(scales) <= error(nearest.scales) * (1 + 1e-5)).all()
    assert (scales != nearest.scales).any() or kind is BlockFormat.MXFP8


def test_making_up_lowers_the_error_of_a_rounded_input() -> None:
    """Of inputs halved. Drawn to the weight, it grows by half; with no loss it stays."""
    random = np.random.default_rng(3)
    rows = random.standard_normal((4000, 32)).astype(np.float32)
    read = rows / np.float32(2)
    weight = random.standard_normal((32, 8)).astype(np.float32)
    gram = (read.T @ read).astype(np.float64)
    made = make_up(weight, gram, (read.T @ (rows - read)).astype(np.float64))
    before, after = (np.square(read @ one - rows @ weight).sum() for one in (weight, made))
    assert after < 0.5 * before
    np.testing.assert_allclose(made, weight * 1.5, atol=0.2)
    np.testing.assert_array_equal(make_up(weight, gram, np.zeros((32, 32))), weight)


def test_class_tokens_that_count_more_err_less(case: Case) -> None:
    """And the means of the other tokens, in whose place attention reads them, where these do."""
    scales = {name: BlockFloat.from_range(BlockFormat.NVFP4, -8, 8) for name in case.seen}
    inputs = case.inputs(scales)

    def errors(emphasis: Emphasis) -> tuple[float, float]:
        told = {name: replace(one, emphasis=emphasis) for name, one in inputs.items()}
        rounded = round_weights(case.view.sites, told, target=NVFP4, threads=1)
        first, mean = 0.0, 0.0
        for site, linear in case.linears:
            tokens = case.seen[site.name].tokens
            weight = rounded.by_block_float[linear.name].dequantized()
            left = tokens @ linear.weight - scales[site.name].round_trip(tokens) @ weight
            left = left - left.mean(axis=(0, 1))  # biases correct it
            first += float(np.square(left[:, 0]).sum())
            mean += float(np.square(left[:, 1:].mean(axis=1)).sum())
        return first, mean

    evenly, first, both = (errors(one) for one in (EVENLY, Emphasis(50), Emphasis(1, 20)))
    assert first[0] < 0.9 * evenly[0]
    assert both[1] < 0.9 * evenly[1]
