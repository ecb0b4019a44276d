"""Moved and evened-out encoders: the same function, and what calibration would see in them."""

import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray
from onnx import numpy_helper
from support import number_formats
from support.factor_cases import MIDDLE, ZERO_POINT, Case, make_case, observed, with_outliers
from support.running import run_graph
from support.timed_commands import cli
from support.tiny_source import RECIPE, photos
from support.tiny_vit import Spec, TinyVit

from regcache.compiler.calibration.calibrate import Calibrated
from regcache.compiler.calibration.folds import Observed
from regcache.compiler.calibration.observe import HalvedStatistics, observe, stream_ranges
from regcache.compiler.calibration.quantizer import Quantizer
from regcache.compiler.encoder.float_encoder import FloatEncoder
from regcache.compiler.job.context import Context
from regcache.compiler.job.options import CompileOptions, Rounding
from regcache.compiler.job.targets import TargetName
from regcache.compiler.quantization.equalize import (
    Equalized,
    as_it_is,
    equalize,
    equalize_encoder,
    without_shifts,
)
from regcache.compiler.quantization.finish import choose_integers, write_integers
from regcache.compiler.quantization.int8_share import Placement
from regcache.compiler.reporter import Reporter
from regcache.export.onnx_file import sidecar
from regcache.passes.affine import Affine
from regcache.passes.base import run
from regcache.passes.choose_outputs import choose_outputs
from regcache.passes.find_blocks import view_encoder
from regcache.passes.observe import Observe
from regcache.passes.walk import producer
from regcache.runtime.images import ImageFolder

pytestmark = pytest.mark.slow

Floats = NDArray[np.float32]
U8S8, S8S8 = Quantizer(number_formats.U8S8), Quantizer(number_formats.S8S8)
QUANTIZERS = {"u8s8": U8S8, "s8s8": S8S8}
SPELLED = {
    "separate": Spec(width=32, hidden=64, heads=4),
    "fused": Spec(width=32, hidden=64, heads=4, qkv="fused"),
    "swiglu": Spec(width=32, hidden=64, heads=4, activation="swiglu"),
}


def planted(spec: Spec) -> TinyVit:
    """Outlying channels in block 1, and others that lie around 50 behind norms and in V."""
    vit = with_outliers(spec)
    for bias, channel, weights in (
        ("1.norm1.b", 9, ("1.q", "1.k", "1.v")),
        ("1.v.b", 6, ("1.out",)),
        ("1.norm2.b", 4, ("1.gate", "1.fc1")),
    ):
        vit.weights[bias][channel] += 50
        for name in weights:
            if name in vit.weights:
                vit.weights[name][channel] /= 20
    return vit


def planted_case(folder: Path, spelling: str) -> tuple[Case, FloatEncoder]:
    case = make_case(folder, planted(SPELLED[spelling]))
    return case, planted_encoder(folder, case)


def planted_encoder(folder: Path, case: Case) -> FloatEncoder:
    path = folder / "float.onnx"  # never read
    outputs = choose_outputs(case.view)
    return FloatEncoder(path, case.graph, case.view, RECIPE, "source", outputs)


def how_of(found: Equalized) -> dict[str, str]:
    """What was done, by the name of the site."""
    return {name: one.how for name, one in found.activations.items() if one.how is not None}


def scales_of(found: Equalized) -> dict[str, Affine]:
    """The scales that activations were shifted for, by the name of the site."""
    return {name: one.scale for name, one in found.activations.items() if one.scale is not None}


def statistics_of(found: Equalized) -> dict[str, Observed]:
    """What calibration would see, by the name of the site."""
    return {name: one.statistics for name, one in found.activations.items()}


def equalized_case(folder: Path, spelling: str, quantizer: str) -> tuple[Case, Equalized]:
    case, encoder = planted_case(folder, spelling)
    return case, equalize_encoder(encoder, case.statistics, QUANTIZERS[quantizer])


each = pytest.mark.parametrize(
    ("spelling", "quantizer"), [(one, other) for one in SPELLED for other in QUANTIZERS]
)


@each
def test_the_encoder_computes_the_same(tmp_path: Path, spelling: str, quantizer: str) -> None:
    case, encoder = planted_case(tmp_path, spelling)
    original = [linear.weight.copy() for linear in case.view.linears]
    found = equalize_encoder(encoder, case.statistics, QUANTIZERS[quantizer]).encoder
    pictures = case.vit.images(3, seed=5)
    for ours, before, truth in zip(
        run_graph(found.graph, pictures),
        run_graph(case.graph, pictures),
        case.vit.reference(pictures),
        strict=True,
    ):
        assert np.abs(ours - before).max() <= 1e-4 * np.abs(before).max()
        assert np.abs(ours - truth).max() <= 1e-4 * np.abs(truth).max()
    assert found.view.graph is found.graph
    assert (found.path, found.recipe) == (encoder.path, encoder.recipe)
    assert encoder.graph is case.graph
    for linear, weight in zip(case.view.linears, original, strict=True):
        np.testing.assert_array_equal(linear.weight, weight)


@each
def test_statistics_are_those_of_the_equalized_graph(
    tmp_path: Path, spelling: str, quantizer: str
) -> None:
    case, found = equalized_case(tmp_path, spelling, quantizer)
    assert_agree(statistics_of(found), observed(found.encoder.graph, case.vit.images(16), tmp_path))


def assert_agree(found: Mapping[str, Observed], again: Mapping[str, HalvedStatistics]) -> None:
    """Ranges, and the sampled rows but for each image's largest, which may be another now."""
    assert found.keys() == again.keys()
    for name, seen in found.items():
        whole = again[name].whole
        rows, wanted = (
            item.rows.reshape(16, 10, -1)[:, [0, *range(2, 10)]] for item in (seen, whole)
        )
        # A float of around 50, as it was before, is no more precise.
        slack = 1e-4 * max(abs(whole.low), whole.high, 10)
        for one, other in ((seen.lows, whole.lows), (seen.highs, whole.highs), (rows, wanted)):
            np.testing.assert_allclose(one, other, rtol=1e-3, atol=slack)
        assert seen.low == pytest.approx(float(seen.lows.min()))
        assert seen.high == pytest.approx(float(seen.highs.max()))


@pytest.mark.parametrize("spelling", SPELLED)
def test_what_was_done_is_said(tmp_path: Path, spelling: str) -> None:
    case, found = equalized_case(tmp_path, spelling, "s8s8")
    block = case.view.blocks[1]
    for site in case.view.sites:
        how = how_of(found).get(site.name, "")
        if site.linears == block.mlp.fc1:
            assert how.startswith(MIDDLE)
            assert "taken off, into the norm" in how
        if site.name.endswith(".fc2") and spelling != "swiglu":
            assert f"{ZERO_POINT} taken off, an Add of its own" in how
    values = how_of(found)["blocks.1.out"]
    assert values.startswith(MIDDLE)
    assert "taken off, into the value projection" in values
    shifting, equalizing = found.encoder.passes
    assert (shifting.name, equalizing.name) == ("shift_activations", "equalize")
    taken = [how for how in how_of(found).values() if "taken off" in how]
    ranged = [how for how in how_of(found).values() if "range^" in how]
    assert (shifting.edits, equalizing.edits) == (len(taken), len(ranged))
    assert ranged
    assert shifting.skips == equalizing.skips == []
    assert len(how_of(found)) < len(taken) + len(ranged)  # some were done both ways
    assert any("taken off" in how and "; range^" in how for how in how_of(found).values())


@each
def test_scales_of_moved_channels_are_chosen_on_images_without_a_say(
    tmp_path: Path, spelling: str, quantizer: str
) -> None:
    _, found = equalized_case(tmp_path, spelling, quantizer)
    assert {site.name for site in found.encoder.view.sites} == found.activations.keys()
    moved = 0
    for site in found.encoder.view.sites:
        activation = found.activations[site.name]
        tried, fitted = activation.for_scale, activation.statistics
        if "taken off" not in (activation.how or ""):
            assert tried is fitted
            continue
        moved += 1
        assert tried.rows.shape == fitted.rows.shape
        # A channel's largest value in one half is beyond what the other half suggests.
        assert (tried.highs - tried.lows).mean() > (fitted.highs - fitted.lows).mean()
    assert bool(moved) == (quantizer == "s8s8")


@pytest.mark.parametrize("spelling", SPELLED)
def test_unmoved_is_evened_out_alone(tmp_path: Path, spelling: str) -> None:
    case, found = equalized_case(tmp_path, spelling, "s8s8")
    even = without_shifts(context(tmp_path), planted_encoder(tmp_path, case), found)
    pictures = case.vit.images(3, seed=5)
    for ours, truth in zip(
        run_graph(even.graph, pictures), case.vit.reference(pictures), strict=True
    ):
        assert np.abs(ours - truth).max() <= 1e-4 * np.abs(truth).max()
    assert even.view.graph is even.graph
    assert not [node.name for node in even.graph.nodes if node.name.startswith("shift/")]
    # Where an Add of its own stands behind them, factors do not fold into the up projection.
    unfolded = [
        site[:-3] + "up" for site, how in how_of(found).items() if "an Add of its own" in how
    ]
    for one, other in zip(even.view.linears, found.encoder.view.linears, strict=True):
        if one.name in unfolded:
            continue
        np.testing.assert_array_equal(one.weight, other.weight)  # shifts are in the biases
    (norm,) = (item.values for item in even.view.blocks[1].norm2.inputs[2:])
    (weight, bias), (divided, _) = (
        [item.values for item in view.blocks[1].norm2.inputs[1:]] for view in (case.view, even.view)
    )
    np.testing.assert_allclose(norm, bias * (divided / weight), rtol=1e-4, atol=1e-6)


def test_on_a_cpu_nothing_is_moved(tmp_path: Path) -> None:
    case, found = equalized_case(tmp_path, "separate", "u8s8")
    assert [log.name for log in found.encoder.passes] == ["equalize"]
    assert how_of(found)
    assert not any("taken off" in how for how in how_of(found).values())
    assert scales_of(found) == {}
    plain = without_shifts(context(tmp_path), planted_encoder(tmp_path, case), found)
    assert plain.graph is found.encoder.graph


def test_what_a_pass_refuses_stays_as_it_was(tmp_path: Path) -> None:
    """An activation that the graph gives away is neither shifted nor equalized."""
    case, _ = planted_case(tmp_path, "separate")
    sites = ["blocks.1.q+k+v", "blocks.1.fc2"]
    names = [case.site(site).tensor.name for site in sites]
    graph = run(Observe(tuple(names)), case.graph).graph
    outputs = choose_outputs(case.view)
    encoder = FloatEncoder(tmp_path, graph, view_encoder(graph), RECIPE, "source", outputs)
    found = equalize_encoder(encoder, case.statistics, S8S8)
    assert not how_of(found).keys() & set(sites)
    assert not scales_of(found).keys() & set(sites)
    reason = "its activation is an output of the graph"
    skips = [skip for log in found.encoder.passes for skip in log.skips]
    assert {f"{site}: {reason}" for site in sites} == set(skips)
    for site in sites:
        np.testing.assert_array_equal(
            statistics_of(found)[site].rows, case.statistics[site].whole.rows
        )
    again = observed(found.encoder.graph, case.vit.images(16), tmp_path)
    assert_agree(statistics_of(found), again)
    pictures = case.vit.images(2, seed=5)
    for ours, truth in zip(
        run_graph(found.encoder.graph, pictures), run_graph(graph, pictures), strict=True
    ):
        assert np.abs(ours - truth).max() <= 1e-4 * np.abs(truth).max()


def test_a_norm_without_bias_is_evened_out_and_not_moved(tmp_path: Path) -> None:
    """The scale that belongs to the shift is given up with it."""
    case, encoder = planted_case(tmp_path, "swiglu")
    site = case.site("blocks.1.q+k+v")
    moved = equalize_encoder(encoder, case.statistics, S8S8)
    assert how_of(moved)[site.name].startswith(f"{ZERO_POINT} taken off, into the norm; range^")
    assert site.name in scales_of(moved)
    graph = case.graph.copy()
    norm = view_encoder(graph).blocks[1].norm1
    norm.inputs = norm.inputs[:2]
    outputs = choose_outputs(case.view)
    bare = FloatEncoder(tmp_path, graph, view_encoder(graph), RECIPE, "source", outputs)
    found = equalize_encoder(bare, case.statistics, S8S8)
    assert found.encoder.passes[0].skips == [f"{site.name}: its norm has no bias to move it into"]
    assert how_of(found)[site.name].startswith("range^")
    assert scales_of(found).keys() == scales_of(moved).keys() - {site.name}


def test_as_it_is_changes_nothing(tmp_path: Path) -> None:
    case, encoder = planted_case(tmp_path, "separate")
    found = as_it_is(encoder, case.statistics)
    assert found.encoder.graph is case.graph
    assert (scales_of(found), how_of(found), found.encoder.passes) == ({}, {}, ())
    assert statistics_of(found).keys() == case.statistics.keys()
    for name, seen in case.statistics.items():
        np.testing.assert_array_equal(statistics_of(found)[name].rows, seen.whole.rows)
        np.testing.assert_array_equal(statistics_of(found)[name].lows, seen.whole.lows)
        np.testing.assert_array_equal(statistics_of(found)[name].highs, seen.whole.highs)


def context(folder: Path) -> Context:
    options = CompileOptions(
        source="tiny.onnx",
        images="none",
        target=TargetName.TENSORRT_RTX,
        rounding=Rounding.NEAREST,
        half=False,
    )
    images = ImageFolder([folder / "unread.png"], RECIPE, 4)
    return Context(options, S8S8.target, images, folder, folder / "journal", Reporter())


def calibrated(folder: Path, case: Case) -> Calibrated:
    return Calibrated(case.statistics, {}, context(folder).images, {})


@pytest.mark.parametrize("left_float", [(), ("blocks.0.fc2",)])
def test_scales_survive_quantization(tmp_path: Path, left_float: tuple[str, ...]) -> None:
    case, encoder = planted_case(tmp_path, "separate")
    told = context(tmp_path)
    equalized = equalize(told, encoder, calibrated(tmp_path, case))
    sites = {site.name: site for site in equalized.encoder.view.sites}
    shifted = scales_of(equalized)
    assert {"blocks.0.fc2", "blocks.1.fc2"} <= shifted.keys()
    assert set(shifted) == {site for site, how in how_of(equalized).items() if ZERO_POINT in how}
    placement, known = Placement(left_float, 1.0), calibrated(tmp_path, case)
    integers = choose_integers(told, equalized, placement, known)
    quantized = write_integers(told, equalized, placement, known, integers)
    stored = quantized.graph.tensors()
    kept = [site for name, site in sites.items() if name not in left_float]
    assert quantized.linears == sum(len(site.linears) for site in kept)
    for name, scale in shifted.items():
        if name in left_float:
            assert name not in quantized.scales
            continue
        assert quantized.scales[name] is scale
        tensor = stored[sites[name].tensor.name]
        (rounding,) = [node for node in tensor.outputs if node.op == "QuantizeLinear"]
        assert float(rounding.inputs[1].values) == np.float32(scale.scale)
        assert rounding.inputs[2].values == 0
    for name in sites.keys() - shifted.keys():
        weights = [linear.weight for linear in sites[name].linears]
        seen = equalized.activations[name].for_scale
        assert quantized.scales[name] == S8S8.scale(weights, seen)


def test_zero_is_a_whole_step_in_the_artifact(tmp_path: Path) -> None:
    """End to end: what is taken off behind GELU, in steps of the scale that is stored."""
    source, artifact = tmp_path / "tiny.onnx", tmp_path / "artifact"
    vit = TinyVit(Spec(width=32, heads=4, hidden=64, depth=2, grid=4))
    onnx.save(vit.model(), source)
    sidecar(source).write_text(RECIPE.to_json())
    images = photos(tmp_path / "images", 8, seed=1)
    command = ("compile", source, "--images", images, "-o", artifact, "--registers", "off")
    options = ("--threads", 1, "--target", "tensorrt-rtx", "--no-half", "--rounding", "nearest")
    assert cli(*command, *options).code == 0
    manifest = json.loads((artifact / "manifest.json").read_text())
    graph = onnx.load(artifact / "model.onnx").graph
    values = {item.name: numpy_helper.to_array(item) for item in graph.initializer}
    made = {output: node for node in graph.node for output in node.output}
    shifted = 0
    for record in manifest["quantization"]["sites"]:
        if not record["site"].endswith(".fc2") or "zero point" not in record["equalization"]:
            continue
        shifted += 1
        assert (record["zero_point"], record["dtype"]) == (0, "int8")
        node, factors, shift = made[record["tensor"]], np.ones(64), None
        while node.op_type in {"Add", "Mul"}:
            (constant,) = [values[item] for item in node.input if item in values]
            if node.op_type == "Mul":
                factors = factors * constant
            else:
                shift = -constant.astype(np.float64)
            node = made[next(item for item in node.input if item not in values)]
        assert node.op_type == "Gelu"
        assert shift is not None
        steps = shift * factors / record["scale"]
        assert np.rint(steps[0]) in range(64, 129)
        np.testing.assert_allclose(steps, np.rint(steps[0]), atol=1e-3)
    assert shifted == vit.spec.depth


def test_ranges_of_the_residual_stream(tmp_path: Path) -> None:
    """Around every block and between attention and MLP, each tensor once."""
    case = make_case(tmp_path, TinyVit(Spec()))
    ranges = stream_ranges(case.view)
    assert len(ranges) == 2 * case.vit.spec.depth + 1
    pictures = case.vit.images(4)
    observe(case.graph, ranges, [pictures[:3], pictures[3:]], threads=1)
    outputs = run_graph(run(Observe(tuple(ranges)), case.graph).graph, pictures)[-len(ranges) :]
    for (name, seen), values in zip(ranges.items(), outputs, strict=True):
        maker = producer(case.graph.tensors()[name])
        assert maker is not None
        assert maker.op == "Add"
        np.testing.assert_allclose(seen.low, values.min(axis=(0, 1)), rtol=1e-5)
        np.testing.assert_allclose(seen.high, values.max(axis=(0, 1)), rtol=1e-5)
