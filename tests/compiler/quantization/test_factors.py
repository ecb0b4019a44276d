"""Evened-out channels: the factors by formula, and the error of layers in float64."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from support.factor_cases import QUANTIZERS, Case, layer_error, make_case, see, with_outliers
from support.number_formats import U8S8, affine
from support.site_choices import choose_equalizations
from support.tiny_vit import Spec, TinyVit

from regcache.compiler.calibration.folds import Folded, Suggested
from regcache.compiler.calibration.observe import halved_statistics
from regcache.compiler.calibration.quantizer import Quantizer
from regcache.compiler.job.targets import Simulation, simulate
from regcache.compiler.quantization.factors import (
    LEAST_GAIN,
    Rule,
    folds_error,
    rules_for,
)
from regcache.compiler.quantization.sampled_weight import SampledWeight
from regcache.passes.encoder import Site
from regcache.passes.equalize import foldable
from regcache.passes.find_blocks import view_encoder

Floats = NDArray[np.float32]
Doubles = NDArray[np.float64]

# Sites of block 1 behind a norm, behind values, and behind GELU.
NORM, VALUES, GELU = "blocks.1.q+k+v", "blocks.1.out", "blocks.1.fc2"


SEEN = st.builds(
    lambda seed, channels, spread: (
        np.random.default_rng(seed).normal(size=(6, channels))
        * np.exp(spread * np.random.default_rng(seed + 1).normal(size=channels))
    ).astype(np.float32),
    seed=st.integers(0, 9999),
    channels=st.integers(1, 12),
    spread=st.floats(0, 2),
)


@given(rows=SEEN, exponent=st.sampled_from([0.25, 0.5, 0.75, 0.9]), smooth=st.booleans())
def test_factors_by_the_formula(rows: Floats, exponent: float, smooth: bool) -> None:
    weight = np.random.default_rng(0).normal(size=(rows.shape[1], 5)).astype(np.float32)
    weight *= np.linspace(0.1, 3, len(weight), dtype=np.float32)[:, None]
    factors = Rule(exponent, smooth).factors(see(rows), np.abs(weight).max(axis=1))
    assert factors.dtype == np.float32
    assert factors.shape == (rows.shape[1],)
    ranges = np.abs(rows).max(axis=0).astype(np.float64)
    wanted = np.maximum(ranges, ranges.max() / 1000) ** exponent
    if smooth:
        wanted /= np.abs(weight).max(axis=1).astype(np.float64) ** (1 - exponent)
    wanted /= np.prod(wanted ** (1 / len(wanted)))
    np.testing.assert_allclose(factors, wanted, rtol=1e-5)
    assert np.log(factors.astype(np.float64)).mean() == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("smooth", [False, True])
def test_silent_channels_and_dead_weights_have_factors(smooth: bool) -> None:
    rows, weight = np.ones((3, 4), np.float32), np.ones((4, 2), np.float32)
    rows[:, 1], weight[2] = 0, 0
    for one, other in ((rows, weight), (rows * 0, weight), (rows, weight * 0)):
        factors = Rule(0.75, smooth).factors(see(one), np.abs(other).max(axis=1))
        assert np.isfinite(factors).all()
        assert (factors > 0).all()
        assert factors.max() / factors.min() < 2000
    assert str(Rule(0.25)) == "range^0.25"
    assert str(Rule(0.75, smooth=True)) == "range^0.75 / weight^0.25"


def whole_error(case: Case, site: Site, factors: Floats, quantizer: Quantizer) -> float:
    """With the range that all images suggest, over all their rows."""
    weights = [linear.weight for linear in site.linears]
    seen = case.statistics[site.name].whole
    scaled = [np.asarray(weight * factors[:, None], np.float32) for weight in weights]
    scale = affine(quantizer.scale(scaled, seen.divided(factors)))
    return layer_error(scale, weights, factors, seen.rows, quantizer.target.weight_bits)


@pytest.mark.parametrize("quantizer", QUANTIZERS)
def test_an_outlying_channel_is_evened_out(tmp_path: Path, quantizer: str) -> None:
    case = make_case(tmp_path, with_outliers())
    chosen, how = case.choose(quantizer), QUANTIZERS[quantizer]
    for name, channel in ((NORM, 3), (VALUES, 5), (GELU, 7)):
        one, site = chosen[name], case.site(name)
        factors = one.factors.whole
        assert factors.argmax() == channel
        assert factors[channel] > 2 * np.median(factors)
        assert np.log(factors).mean() == pytest.approx(0, abs=1e-5)
        assert 0 < one.error_left < 0.5
        found = whole_error(case, site, factors, how)
        plain = whole_error(case, site, np.ones_like(factors), how)
        assert found < 0.6 * plain
    assert not chosen[GELU].rule.smooth  # a Mul of its own: powers of the range alone
    for one in chosen.values():
        assert one.error_left < 0.98


@pytest.mark.parametrize("quantizer", QUANTIZERS)
def test_the_error_left_is_that_of_the_other_half(tmp_path: Path, quantizer: str) -> None:
    """Factors from one half, error on the other, both ways; those that ship from all images."""
    case, how = make_case(tmp_path, with_outliers()), QUANTIZERS[quantizer]
    for name, one in case.choose(quantizer).items():
        site = case.site(name)
        seen = case.statistics[site.name]
        weights = [linear.weight for linear in site.linears]
        weight = np.concatenate(weights, axis=1)
        peaks = np.abs(weight).max(axis=1)
        # Ranges are chosen by 32 output channels from all over.
        total = weight.shape[1]
        some = weight[:, np.arange(min(total, 32)) * total // min(total, 32)]
        errors = np.zeros(2)
        for fit, other in (seen.observed, seen.observed[::-1]):
            for slot, factors in enumerate((one.rule.factors(fit, peaks), np.ones(len(weight)))):
                by = np.asarray(factors, np.float32)
                scale = affine(how.scale([some * by[:, None]], other.divided(by)))
                bits = how.target.weight_bits
                errors[slot] += layer_error(scale, weights, by, other.rows, bits)
        assert one.error_left == pytest.approx(errors[0] / errors[1], rel=0.02)
        np.testing.assert_array_equal(one.factors.whole, one.rule.factors(seen.whole, peaks))
        for half, factors in zip(seen.observed, one.factors.folds, strict=True):
            np.testing.assert_array_equal(factors, one.rule.factors(half, peaks))


@pytest.mark.parametrize("quantizer", QUANTIZERS)
def test_no_rule_leaves_less_error(tmp_path: Path, quantizer: str) -> None:
    """Though rules are given up as soon as their error is too large."""
    case, how = make_case(tmp_path, with_outliers()), QUANTIZERS[quantizer]
    chosen = case.choose(quantizer)
    for site in case.view.sites:
        seen, free = Folded.of(case.statistics[site.name]), foldable(case.view, site)
        weight = SampledWeight.of([linear.weight for linear in site.linears])
        errors = {
            rule: folds_error(rule.suggest(seen, weight.peaks), weight, seen, how)
            for rule in rules_for(how, free=free)
        }
        least = min(errors, key=lambda rule: errors[rule])
        if site.name in chosen:
            assert chosen[site.name].rule == least
            assert chosen[site.name].error == pytest.approx(errors[least], rel=1e-4)
        else:
            plain = folds_error(Suggested.everywhere(1, seen), weight, seen, how)
            gain = LEAST_GAIN if free else how.target.node_gain
            assert errors[least] > 0.999 * (1 - gain) * plain
    assert len(chosen) > len(case.view.sites) / 2


@pytest.mark.parametrize("quantizer", QUANTIZERS)
def test_nothing_where_nothing_is_to_be_gained(tmp_path: Path, quantizer: str) -> None:
    """Channels of one range, read by weights of one size: every rule leaves them as they are."""
    vit = TinyVit(Spec())
    for name, weight in vit.weights.items():
        if name.endswith((".q", ".k", ".v", ".out", ".fc1", ".fc2")):
            np.divide(weight, np.abs(weight).max(axis=1, keepdims=True), out=weight)
    case = make_case(tmp_path, vit)
    random = np.random.default_rng(0)
    for site in case.view.sites:
        statistics = halved_statistics(case.view, 16, seed=0)[site.name]
        tokens = random.uniform(-1, 1, (16, 10, site.linears[0].weight_shape[0]))
        tokens[:, 0] = np.where(np.arange(16) % 4 < 2, 1, -1)[:, None]
        statistics.update(tokens.astype(np.float32))
        case.statistics[site.name] = statistics
    assert case.choose(quantizer) == {}


def test_little_is_not_enough_for_a_mul_of_its_own(tmp_path: Path) -> None:
    """Sites that cost a node are taken for a gain of a tenth, others for a fiftieth."""
    for seed in range(4):
        case = make_case(tmp_path, TinyVit(Spec(seed=seed)))
        for name, one in case.choose().items():
            assert one.error_left < (0.9 if name.endswith("fc2") else 0.98)


def test_weight_only_and_single_images_give_none(tmp_path: Path) -> None:
    case = make_case(tmp_path, with_outliers())
    formats = simulate(U8S8, Simulation.W4A16)
    assert choose_equalizations(case.view, case.statistics, Quantizer(formats)) == {}
    assert case.choose()
    assert make_case(tmp_path, with_outliers(), images=1).choose() == {}
    assert make_case(tmp_path, with_outliers(), images=2).choose()


def test_a_site_is_chosen_by_itself(tmp_path: Path) -> None:
    case = make_case(tmp_path, with_outliers())
    whole, one = case.choose(), case.site(NORM)
    alone = replace(case, view=view_encoder(case.graph))
    alone.statistics[one.name].halves[1].sample.images = 0  # as of a single image
    found = alone.choose()
    assert found.keys() == whole.keys() - {NORM}
    for name, equalization in found.items():
        np.testing.assert_array_equal(equalization.factors.whole, whole[name].factors.whole)
