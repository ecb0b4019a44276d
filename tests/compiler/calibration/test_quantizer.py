"""Scales of the base quantizer: their bits, and ranges that disturb the layers least."""

from dataclasses import replace

import numpy as np
import pytest
from support.number_formats import S8S8, U8S8, affines
from support.workbench_cases import make_case

from regcache.compiler.calibration.observe import SiteStatistics
from regcache.compiler.calibration.quantizer import Quantizer
from regcache.compiler.job.options import Calibrator
from regcache.compiler.job.targets import Simulation, Target, simulate
from regcache.passes.affine import Affine
from regcache.passes.encoder import Site, by_tensor
from regcache.passes.find_blocks import view_encoder
from regcache.passes.quantize_linears import QuantizeLinears
from regcache.passes.round_weights import RoundWeights


@pytest.mark.parametrize("simulation", Simulation)
def test_scales_have_the_bits_of_the_simulation(simulation: Simulation) -> None:
    weights, activations = {
        "w8a8": (8, 8), "w6a6": (6, 6), "w4a4": (4, 4), "w4a16": (4, None)
    }[simulation.value]  # fmt: skip
    assert (simulation.weight_bits, simulation.activation_bits) == (weights, activations)
    for target in (U8S8, S8S8):
        narrow = simulate(target, simulation)
        assert narrow.node_gain == 0.1  # nobody waits for a simulation's nodes
        same = replace(target, node_gain=0.1)
        assert replace(narrow, weight_bits=8, activation_bits=8, why=target.why) == same
        case = make_case()
        view, statistics = view_encoder(case.graph), case.statistics(case.graph)
        for calibrator in Calibrator:
            quantizer = Quantizer(narrow, calibrator)
            scales = affines(quantizer.scales(view.sites, statistics))
            step = quantizer.step(view.sites, scales)
            if activations is None:
                assert not quantizer.quantizes_activations
                assert (scales, step) == ({}, RoundWeights(weights))
                continue
            assert quantizer.quantizes_activations
            assert step == QuantizeLinears(
                by_tensor(view.sites, scales), target.weight_dtype, weights
            )
            assert scales.keys() == statistics.keys()
            for name, scale in scales.items():
                assert (scale.bits, scale.dtype) == (activations, target.activation_dtype)
                check_range(scale, statistics[name], target, calibrator)


@pytest.mark.parametrize("simulation", [Simulation.W4A4, Simulation.W6A6])
@pytest.mark.parametrize("target", [U8S8, S8S8], ids=["asymmetric", "symmetric"])
def test_few_bits_clip_where_that_disturbs_the_layers_least(
    target: Target, simulation: Simulation
) -> None:
    """No share of the whole range, of those tried on both ends at once, is better."""
    case = make_case()
    sites, statistics = view_encoder(case.graph).sites, case.statistics(case.graph)
    quantizer = Quantizer(simulate(target, simulation))
    scales = affines(quantizer.scales(sites, statistics))
    clipped = 0
    for site in sites:
        seen = statistics[site.name]
        min_max = replace(quantizer, calibrator=Calibrator.MIN_MAX)
        whole = affines(min_max.scales([site], statistics))
        chosen, tried = scales[site.name], whole[site.name]
        error, first = (output_error(scale, seen, site) for scale in (chosen, tried))
        for share in np.linspace(0.95, 0.25, 15):
            tried = Affine.from_range(
                seen.low * share, seen.high * share, chosen.dtype,
                symmetric=target.activation_symmetric, bits=chosen.bits,
            )  # fmt: skip
            assert error <= output_error(tried, seen, site) * 1.001
        assert error <= first * 1.001
        clipped += error < first
    assert clipped > len(sites) / 2


def output_error(scale: Affine, seen: SiteStatistics, site: Site) -> float:
    """||(Q(X) - X) W||^2 over the sampled rows, in float64."""
    rows = seen.sample.rows.astype(np.float64)
    integers = np.clip(np.rint(rows / scale.scale) + scale.zero_point, *scale.limits)
    weights = np.concatenate([linear.weight for linear in site.linears], axis=1)
    lost = (integers - scale.zero_point) * scale.scale - rows
    return float(np.square(lost @ weights.astype(np.float64)).sum())


def check_range(
    scale: Affine, seen: SiteStatistics, target: Target, calibrator: Calibrator
) -> None:
    """What was observed, up to a step of rounding the zero point, or clipped to part of it."""
    low, high = min(seen.low, 0.0), max(seen.high, 0.0)
    if target.activation_symmetric:
        low, high = -max(-low, high), max(-low, high)
        assert scale.zero_point == 0
    width = scale.range[1] - scale.range[0]
    if target.activation_symmetric:  # the lowest integer is left out
        width -= scale.scale
    share = width / (high - low)
    if calibrator is Calibrator.MIN_MAX:
        assert share == pytest.approx(1)
    else:
        assert 0.1 < share < 1.11
