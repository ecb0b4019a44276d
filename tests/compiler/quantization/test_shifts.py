"""Shifted channels: where they are chosen, by how much, and the error of layers in float64."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from support.factor_cases import (
    MIDDLE,
    ZERO_POINT,
    Case,
    layer_error,
    make_case,
    see,
    see_halves,
    with_outliers,
)
from support.number_formats import FP8, S8S8, U8S8, U8U8, W4A16
from support.running import run_graph
from support.site_choices import choose_equalizations, choose_shifts, refine_shifts
from support.tiny_vit import Spec, TinyVit

from regcache.compiler.calibration.folds import Folded, Halved, Observed, Suggested
from regcache.compiler.calibration.quantizer import Quantizer
from regcache.compiler.job.options import Calibrator
from regcache.compiler.job.targets import (
    Simulation,
    simulate,
)
from regcache.compiler.quantization.factors import folds_error, rounding_error
from regcache.compiler.quantization.sampled_weight import SampledWeight
from regcache.compiler.quantization.shifts import Shift
from regcache.passes.affine import Affine
from regcache.passes.base import run
from regcache.passes.observe import Observe

Floats = NDArray[np.float32]
NORM, VALUES, HIDDEN, GELU = "blocks.1.q+k+v", "blocks.1.out", "blocks.1.fc1", "blocks.1.fc2"


SIGNED = {
    "s8s8": Quantizer(S8S8),
    "s8s8 min-max": Quantizer(S8S8, Calibrator.MIN_MAX),
    "w6a6": Quantizer(simulate(S8S8, Simulation.W6A6)),
}
UNSHIFTED = {
    "u8s8": U8S8,
    "u8u8": U8U8,
    "w6a6": simulate(U8S8, Simulation.W6A6),
    "fp8": FP8,
    "w4a16": W4A16,
    "w4a16, simulated": simulate(S8S8, Simulation.W4A16),
}


def off_centre(spec: Spec | None = None) -> TinyVit:
    """Channels of block 1 that lie around 50: behind both norms, in V, and behind GELU."""
    vit = TinyVit(spec or Spec(width=32, hidden=64, heads=4))
    for bias, channel, weights in (
        ("1.norm1.b", 9, ("1.q", "1.k", "1.v")),
        ("1.v.b", 5, ("1.out",)),
        ("1.norm2.b", 4, ("1.gate", "1.fc1")),
        ("1.fc1.b", 7, ("1.fc2",)),
    ):
        vit.weights[bias][channel] += 50
        for name in weights:
            if name in vit.weights:
                vit.weights[name][channel] /= 20
    return vit


def choose(case: Case, quantizer: Quantizer) -> dict[str, Shift]:
    return choose_shifts(case.view, case.statistics, quantizer)


def activation(case: Case, site: str, images: int = 16) -> Floats:
    """What all images show of an activation, one row a token."""
    name = case.site(site).tensor.name
    observed = run(Observe((name,)), case.graph).graph
    values = run_graph(observed, case.vit.images(images))[-1]
    return values.reshape(-1, values.shape[-1])


@pytest.mark.parametrize("name", UNSHIFTED)
def test_only_symmetric_integers_are_shifted(tmp_path: Path, name: str) -> None:
    case, quantizer = make_case(tmp_path, off_centre()), Quantizer(UNSHIFTED[name])
    assert choose(case, quantizer) == {}
    assert refine_shifts(case.view, case.statistics, {}, {}, quantizer) == {}


@pytest.mark.parametrize("images", [1, 2])
def test_one_image_is_not_enough(tmp_path: Path, images: int) -> None:
    case = make_case(tmp_path, off_centre(), images=images)
    for found in (
        choose(case, SIGNED["s8s8"]),
        refine_shifts(case.view, case.statistics, {}, {}, SIGNED["s8s8"]),
    ):
        assert bool(found) == (images == 2)


@pytest.mark.parametrize("how", SIGNED)
def test_a_channel_around_50_is_moved_by_its_middle(tmp_path: Path, how: str) -> None:
    case, quantizer = make_case(tmp_path, off_centre()), SIGNED[how]
    found = choose(case, quantizer)
    assert {NORM, VALUES, HIDDEN} <= found.keys()
    assert not any(name.endswith(".fc2") for name in found)
    for name, channel in ((NORM, 9), (VALUES, 5), (HIDDEN, 4)):
        shift, rows = found[name], activation(case, name)
        assert (shift.name, shift.scale) == (MIDDLE, None)
        values = shift.values.whole
        assert values.dtype == np.float32
        middles = (rows.min(axis=0).astype(np.float64) + rows.max(axis=0)) / 2
        np.testing.assert_allclose(values, middles, atol=1e-4)
        assert values[channel] == pytest.approx(50, abs=5)
        assert np.abs(np.delete(values, channel)).max() < 10
        assert error(case, name, quantizer, shift.values) < 0.2 * error(case, name, quantizer)
        for half, of_half in zip(seen_of(case, name).folds, shift.values.folds, strict=True):
            middles = (half.fit.lows.astype(np.float64) + half.fit.highs) / 2
            np.testing.assert_allclose(of_half, middles, atol=1e-4)


def error(
    case: Case,
    name: str,
    quantizer: Quantizer,
    shift: Suggested | None = None,
    scale: Affine | None = None,
    factors: Suggested | None = None,
) -> float:
    """In float64 what a layer gets wrong on each half, moved and divided as the other suggests."""
    weights = [linear.weight for linear in case.site(name).linears]
    found = 0.0
    for half, fold in enumerate(seen_of(case, name).folds):
        rows = fold.other.rows if shift is None else fold.other.rows - shift.folds[half]
        by = np.ones_like(rows[0]) if factors is None else factors.folds[half]
        scaled = [np.asarray(weight * by[:, None], np.float32) for weight in weights]
        best = scale or quantizer.scale(scaled, see(rows / by))
        assert isinstance(best, Affine)
        found += layer_error(best, weights, by, rows, quantizer.target.weight_bits)
    return found


def seen_of(case: Case, name: str) -> Halved:
    return case.statistics[name]


def replaced(case: Case, name: str, seen: Halved) -> dict[str, Halved]:
    """The case's statistics but for one site."""
    return {**case.statistics, name: seen}


def test_what_one_half_suggests_has_to_help_the_other(tmp_path: Path) -> None:
    case = make_case(tmp_path, TinyVit(Spec(width=32, hidden=64, heads=4)))
    random = np.random.default_rng(0)
    up, down = (random.uniform(-1, 1, (64, 32)).astype(np.float32) for _ in range(2))
    up[:, 3] += 20
    down[:, 3] -= 20
    for halves, helps in (((up, up[::-1]), True), ((up, down), False), ((down, up), False)):
        seen = see_halves(*halves)
        found = choose_shifts(case.view, replaced(case, NORM, seen), SIGNED["s8s8"])
        assert (NORM in found) == helps


@pytest.mark.parametrize("how", ["s8s8", "s8s8 min-max"])
def test_nothing_where_nothing_is_to_be_gained(tmp_path: Path, how: str) -> None:
    case = make_case(tmp_path, TinyVit(Spec()))
    random, statistics = np.random.default_rng(0), dict[str, Halved]()
    for site in case.view.sites:
        rows = random.uniform(-1, 1, (128, site.linears[0].weight_shape[0])).astype(np.float32)
        rows[::64], rows[1::64] = 1, -1
        statistics[site.name] = see_halves(rows[:64], rows[64:])
    assert choose_shifts(case.view, statistics, SIGNED[how]) == {}
    assert refine_shifts(case.view, statistics, {}, {}, SIGNED[how]) == {}


@pytest.mark.parametrize("how", SIGNED)
@pytest.mark.parametrize("equalized", [False, True])
def test_a_zero_point_makes_symmetric_integers_of_skewed_ones(
    tmp_path: Path, how: str, equalized: bool
) -> None:
    """Zero stays a whole step, so that what GELU makes nothing of stays nothing."""
    case, quantizer = make_case(tmp_path, with_outliers()), SIGNED[how]
    factors = choose_equalizations(case.view, case.statistics, quantizer) if equalized else {}
    found = refine_shifts(case.view, case.statistics, {}, factors, quantizer)
    bits = 6 if how == "w6a6" else 8
    for name in ("blocks.0.fc2", GELU):
        shift = found[name]
        values = shift.values.whole
        even = factors[name].factors if name in factors else None
        by = np.ones_like(values) if even is None else even.whole
        assert shift.name == ZERO_POINT
        assert shift.scale is not None
        assert (shift.scale.dtype, shift.scale.zero_point) == ("int8", 0)
        assert shift.scale.bits == bits
        steps = values.astype(np.float64) / (shift.scale.scale * by.astype(np.float64))
        whole = np.rint(steps)
        np.testing.assert_allclose(steps, whole, atol=1e-3)
        assert set(whole) <= set(range(2 ** (bits - 2), 2 ** (bits - 1) + 1))
        assert len(set(whole)) == 1
        # GELU's nothing, moved and rounded, comes back as the step that the bias takes off.
        nothing = shift.scale.round_trip(-values / by)
        np.testing.assert_allclose(nothing, -values / by, rtol=1e-5)
        plain = error(case, name, quantizer, factors=even)
        assert error(case, name, quantizer, shift.values, shift.scale, even) < 0.95 * plain
    if equalized:
        assert GELU in factors


def left(case: Case, name: str, seen: Halved, values: Suggested) -> float:
    """The error of a layer whose activation is shifted."""
    weight = SampledWeight.of([linear.weight for linear in case.site(name).linears])
    ones = Suggested.everywhere(1, seen)
    return folds_error(ones, weight, Folded.of(seen).shifted(values), SIGNED["w6a6"])


def test_a_shift_and_a_zero_point_add_up(tmp_path: Path) -> None:
    """A rare tail of one channel: its middle is far from where its values are."""
    case = make_case(tmp_path, TinyVit(Spec(width=32, hidden=64, heads=4)))
    rows = np.random.default_rng(0).uniform(0, 1, (2048, 32)).astype(np.float32)
    rows[5, 3] = 3
    seen = see_halves(rows[:1024], rows[1024:])
    middles = Suggested.by(lambda half: (half.lows + half.highs) / np.float32(2), seen)
    before = Shift(MIDDLE, middles, left(case, NORM, seen, middles))
    assert middles.whole[3] == pytest.approx(1.5, abs=0.01)
    little = Suggested.by(lambda half: np.full_like(half.lows, 0.01), seen)
    kept = Shift(MIDDLE, little, left(case, VALUES, seen_of(case, VALUES), little))
    statistics, shifts = replaced(case, NORM, seen), {NORM: before, VALUES: kept}
    found = refine_shifts(case.view, statistics, shifts, {}, SIGNED["w6a6"])
    shift = found[NORM]
    assert shift.name == f"{MIDDLE} and {ZERO_POINT}"
    assert shift.scale is not None
    steps = (shift.values.whole.astype(np.float64) - middles.whole) / shift.scale.scale
    assert np.rint(steps[0]) < -3
    np.testing.assert_allclose(steps, np.rint(steps[0]), atol=1e-3)
    for half, before_half in zip(shift.values.folds, middles.folds, strict=True):
        moved = (half.astype(np.float64) - before_half) / shift.scale.scale
        np.testing.assert_allclose(moved, np.rint(steps[0]), atol=1e-3)
    assert found[VALUES].name.startswith(MIDDLE)  # what was chosen before stays


def test_the_error_by_the_formula(tmp_path: Path) -> None:
    """With a scale that is given, and but for the mean: a constant in what is rounded is free."""
    case, quantizer = make_case(tmp_path, with_outliers()), SIGNED["s8s8"]
    for name in (NORM, VALUES, GELU):
        site = case.site(name)
        weights = [linear.weight for linear in site.linears]
        weight = np.concatenate(weights, axis=1)
        seen = case.statistics[site.name].whole
        factors = np.linspace(0.5, 2, len(weight), dtype=np.float32)
        for scale in (Affine(0.05, 0, "int8"), Affine(0.2, 3, "int8")):
            sampled = SampledWeight.of(weights)
            found = rounding_error(factors, sampled, seen, quantizer, scale)
            wanted = layer_error(scale, weights, factors, seen.rows, 8)
            assert found == pytest.approx(wanted, rel=0.02)
        constant = Observed(seen.lows * 0 + 0.3, seen.highs * 0 + 0.3, seen.rows * 0 + 0.3)
        alike = rounding_error(factors, sampled, constant, quantizer, Affine(1, 0, "int8"))
        assert alike == pytest.approx(0, abs=1e-6)


def test_the_same_again(tmp_path: Path) -> None:
    found = []
    for run_number in range(2):
        folder = tmp_path / str(run_number)
        folder.mkdir()
        case = make_case(folder, off_centre())
        first = choose(case, SIGNED["s8s8"])
        second = refine_shifts(case.view, case.statistics, first, {}, SIGNED["s8s8"])
        assert first.keys() <= second.keys()
        found.append(second)
    assert found[0].keys() == found[1].keys()
    for name, shift in found[0].items():
        assert replace(shift, values=found[1][name].values) == found[1][name]
        np.testing.assert_array_equal(shift.values.whole, found[1][name].values.whole)
