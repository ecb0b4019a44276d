"""What the search computes on pieces of an encoder equals the whole encoder, run directly."""

import functools
import pickle
import re
import tempfile
import weakref
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx_graphsurgeon as gs
import pytest
from numpy.typing import NDArray
from support.number_formats import S8S8, U8S8, affines
from support.running import run_graph
from support.spellings import SPELLINGS
from support.tiny_vit import Spec, TinyVit
from support.workbench_cases import QUANTIZERS, Case, assert_errors, random_tokens, run_named

from regcache.compiler.calibration import graph_session
from regcache.compiler.calibration.graph_session import open_graph, run_all
from regcache.compiler.calibration.observe import SiteStatistics
from regcache.compiler.calibration.quantizer import Quantizer
from regcache.compiler.curation import workbench as workbench_module
from regcache.compiler.curation.screening import Screen, predicted_damage, screened_ranges
from regcache.compiler.curation.sensitivity import block_damage
from regcache.compiler.curation.setting import Setting
from regcache.compiler.curation.study import ReferenceImages, Study
from regcache.compiler.curation.trial import Trial, decide_setting, try_setting
from regcache.compiler.curation.workbench import HeldStudy, Workbench
from regcache.compiler.job.options import Calibrator
from regcache.compiler.job.targets import Simulation, Target, simulate
from regcache.passes.affine import Affine
from regcache.passes.base import run
from regcache.passes.canonicalize import canonicalize
from regcache.passes.check import check_and_infer
from regcache.passes.encoder import Block, Site, by_tensor
from regcache.passes.errors import InputError
from regcache.passes.find_blocks import view_encoder
from regcache.passes.quantize_linears import QuantizeLinears
from regcache.passes.round_weights import RoundWeights

Floats = NDArray[np.float32]

# The batch that the graph fixes; the studies ask for 2, so that every one leaves a rest.
BATCHES = {"dynamic batch": None, "batch of 1": 1, "batch of 3": 3}
SPEC = Spec(depth=3)


@functools.cache
def make_case(
    spec: Spec = SPEC, quantizer: str = "u8s8", batch: int | None = None, images: int = 14
) -> Case:
    vit = TinyVit(spec)
    model = vit.model()
    free = graph = canonicalize(model)
    if batch is not None:
        for value in (*model.graph.input, *model.graph.output):
            value.type.tensor_type.shape.dim[0].dim_value = batch
        graph = canonicalize(model)
    dealt = ReferenceImages.deal(vit.images(images))
    more = {"batch": 2, "sensitivity_images": 3, "screening_images": 3}
    return Case(vit, free, Study.of(graph, dealt, QUANTIZERS[quantizer], **more))


def assert_scales(found: Mapping[str, Affine], wanted: Mapping[str, Affine]) -> None:
    assert found.keys() == wanted.keys()
    for name, scale in found.items():
        assert scale.zero_point == wanted[name].zero_point
        assert scale.scale == pytest.approx(wanted[name].scale, rel=1e-5)
        assert (scale.dtype, scale.bits) == (wanted[name].dtype, wanted[name].bits)


@pytest.fixture(autouse=True, scope="module")
def _free() -> Iterator[None]:
    yield
    make_case.cache_clear()


@pytest.fixture(params=BATCHES, scope="module")
def case(request: pytest.FixtureRequest) -> Case:
    return make_case(batch=BATCHES[request.param])


@pytest.mark.slow
def test_hidden_states_are_those_of_the_whole_encoder(case: Case) -> None:
    workbench = case.workbench
    assert len(workbench.fit) == len(workbench.quantized) == len(workbench.streams) == 4
    images = case.study.images
    wanted = run_named(case.graph, workbench.streams, images.fit)
    for found, stream in zip(workbench.fit, wanted, strict=True):
        np.testing.assert_allclose(found, stream, rtol=1e-5, atol=1e-5)
    quantized = run_named(case.quantized(case.graph), workbench.streams, images.rank)
    for found, stream in zip(workbench.quantized, quantized, strict=True):
        np.testing.assert_allclose(found, stream, rtol=1e-5, atol=1e-5)


def test_references_are_the_float_encoder(case: Case) -> None:
    workbench = case.workbench
    images = case.study.images
    for name, some in (("rank", images.rank), ("decide", images.decide)):
        wanted = case.references(some)
        (found,) = workbench.references[name]
        np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-5)


def test_scales_are_those_of_all_images_at_once(case: Case) -> None:
    workbench, step = case.workbench, case.step(case.graph)
    assert isinstance(step, QuantizeLinears)
    found = by_tensor(view_encoder(case.graph).sites, affines(workbench.scales))
    assert len(found) == len(workbench.scales)
    assert_scales(found, step.activations)


@pytest.mark.slow
@pytest.mark.parametrize("quantizer", QUANTIZERS)
def test_the_baseline_is_the_quantized_encoder(quantizer: str) -> None:
    case = make_case(quantizer=quantizer)
    wanted = case.errors(case.quantized(case.graph), case.study.images.rank)
    assert_errors(case.workbench.baseline, wanted)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("block", "quantizer", "batch"),
    [(0, "u8s8", None), (1, "u8s8", None), (2, "u8s8", None), (1, "w4a4", 3)],
)
def test_damage_is_that_of_the_whole_encoder(block: int, quantizer: str, batch: int | None) -> None:
    case = make_case(quantizer=quantizer, batch=batch)
    step = case.step(case.graph)
    assert isinstance(step, QuantizeLinears)
    sites, scales = view_encoder(case.graph).sites, step.activations
    tensors = {site.name: site.tensor.name for site in sites}
    images = case.study.images.fit[:3]

    def damage(names: list[str]) -> float:
        some = replace(step, activations={tensors[name]: scales[tensors[name]] for name in names})
        return float(case.errors(run(some, case.graph).graph, images).mean())

    found = block_damage(case.held, block)
    names = [name for name in tensors if name.startswith(f"blocks.{block}.")]
    assert list(found.sites) == names
    wanted = np.array([damage([name]) for name in found.sites] + [damage(names)])
    assert_errors([*found.sites.values(), found.whole], wanted)


@pytest.mark.slow
@pytest.mark.parametrize("batch", BATCHES.values())
def test_screened_ranges_are_those_of_the_whole_encoder(batch: int | None) -> None:
    """Widened to hold 0, as a scale is."""
    case = make_case(batch=batch)
    images = case.study.images.fit[:3]
    for start, end, count in [(1, 3, 4), (0, 1, 0)]:
        tokens = random_tokens(case.vit.spec, count)
        setting = Setting(candidates=tuple(range(count)), start=start, end=end)
        graph = case.placed(setting, tokens)
        sites = [site for site in view_encoder(case.graph).sites if start <= site.block < end]
        observed = run_named(graph, [site.tensor.name for site in sites], images)
        wanted = {
            site.name: max(float(x.max()), 0.0) - min(float(x.min()), 0.0)
            for site, x in zip(sites, observed, strict=True)
        }
        assert screened_ranges(case.held, Screen(tokens, start, end)) == pytest.approx(wanted)


def test_predicted_damage_goes_with_the_square_of_the_range() -> None:
    damage, plain = {"a": 2.0, "b": 3.0, "zero": 5.0}, {"a": 10.0, "b": 4.0, "zero": 0.0}
    assert predicted_damage(damage, plain, {"a": 5.0, "b": 8.0, "zero": 1.0}) == 2 / 4 + 3 * 4
    assert predicted_damage(damage, plain, {"a": 10.0}) == 2


SETTINGS = {
    "kv": Setting(candidates=(0, 1), start=1, end=3),
    "kv, first block": Setting(candidates=(0,), start=0, end=1),
    "kv, last block": Setting(candidates=(0,) * 4, start=2, end=3),
    "token": Setting(candidates=(0, 1), start=1, end=2, mode="token"),
    "token to the end": Setting(candidates=(0,), start=1, end=3, mode="token"),
    "deletion": Setting(delete_at=1, delete_count=3),
    "deletion, then kv": Setting(candidates=(0,), start=2, end=3, delete_at=1, delete_count=2),
    "kv, then deletion": Setting(candidates=(0,), start=1, end=2, delete_at=2, delete_count=2),
    "nothing": Setting(),
}


def check_trial(case: Case, setting: Setting) -> None:
    tokens = random_tokens(case.vit.spec, setting.count)
    quantized = case.quantized(case.placed(setting, tokens))
    images = case.study.images
    for function, some in ((try_setting, images.rank), (decide_setting, images.decide)):
        result = function(case.held, Trial(setting, tokens))
        assert result.refused is None
        assert_errors(result.errors, case.errors(quantized, some))
        assert result.mean == pytest.approx(np.mean(result.errors))


@pytest.mark.slow
@pytest.mark.parametrize("name", SETTINGS)
def test_a_trial_is_the_whole_encoder_with_the_setting(name: str) -> None:
    check_trial(make_case(), SETTINGS[name])


@pytest.mark.slow
@pytest.mark.parametrize(("batch", "name"), [(1, "kv"), (3, "deletion, then kv")])
def test_a_trial_where_the_graph_fixes_the_batch(batch: int, name: str) -> None:
    check_trial(make_case(batch=batch), SETTINGS[name])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("quantizer", "name"), [("s8s8 min-max", "token"), ("w4a4", "kv"), ("w4a16", "kv")]
)
def test_a_trial_with_another_quantizer(quantizer: str, name: str) -> None:
    check_trial(make_case(quantizer=quantizer), SETTINGS[name])


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["no prefix, pooled", "merged heads", "attention operator, rank 3"]
)
def test_a_trial_in_other_spellings(name: str) -> None:
    check_trial(make_case(SPELLINGS[name]), Setting(candidates=(0, 1, 2), start=1, end=2))


@pytest.mark.parametrize(
    ("setting", "reason"),
    [
        (Setting(candidates=(0,), start=2, end=2), r"\[2, 2\) is no range within 3 blocks"),
        (Setting(candidates=(0,), start=1, end=4), r"\[1, 4\) is no range within 3 blocks"),
        (Setting(delete_at=0, delete_count=9), "cannot delete 9 of 9 patches"),
        (
            Setting(candidates=(0,), start=0, end=3, mode="token", delete_at=1, delete_count=1),
            "sinks are deleted between these blocks",
        ),
    ],
)
def test_a_refused_setting_is_data(setting: Setting, reason: str) -> None:
    case = make_case()
    result = try_setting(case.held, Trial(setting, random_tokens(case.vit.spec, setting.count)))
    assert re.search(reason, result.refused or "")
    assert result.errors == ()
    assert result.mean == float("inf")


def test_threads_share_the_workbench_of_a_held_study() -> None:
    held = HeldStudy(make_case().study)
    with ThreadPoolExecutor(4) as pool:
        made = set(pool.map(HeldStudy.workbench, [held] * 8))
    assert made == {held.workbench()}
    assert HeldStudy(held.study).workbench() not in made


def test_a_held_study_travels_without_its_workbench() -> None:
    held = HeldStudy(make_case().study)
    before = pickle.dumps(held)
    baseline = held.workbench().baseline
    assert pickle.dumps(held) == before
    copy = pickle.loads(before)
    assert copy.study.key == held.study.key
    np.testing.assert_array_equal(copy.workbench().baseline, baseline)


def test_a_workbench_goes_with_what_holds_it() -> None:
    held = HeldStudy(make_case().study)
    workbench = weakref.ref(held.workbench())
    assert block_damage(held, 0).sites
    del held
    assert workbench() is None


@pytest.mark.slow
def test_results_do_not_depend_on_the_number_of_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    case = make_case()
    settings = [SETTINGS[name] for name in ("kv", "deletion, then kv", "nothing")]
    trials = [Trial(setting, random_tokens(SPEC, setting.count)) for setting in settings]
    screens = [Screen(random_tokens(SPEC, count), 1, 3) for count in (0, 2)]

    def everything(threads: int) -> list[Any]:
        held = HeldStudy(case.study)
        monkeypatch.setattr(workbench_module, "available_cpus", lambda: threads)
        with ThreadPoolExecutor(threads) as pool:
            results: list[Any] = list(pool.map(partial(try_setting, held), trials))
            results += pool.map(partial(block_damage, held), range(1, 3))
            results += pool.map(partial(screened_ranges, held), screens)
        workbench = held.workbench()
        states = [*workbench.fit, *workbench.quantized]
        states += [one for outputs in workbench.references.values() for one in outputs]
        hidden = [x.tobytes() for x in states]
        return [*results, workbench.scales, workbench.baseline.tobytes(), hidden]

    assert everything(4) == everything(1)


def test_a_flattened_mlp_shows_all_its_tokens() -> None:
    """[B T, K], in a batch that is fixed and filled up: 5 images are two batches of 3."""
    case = make_case(quantizer="s8s8 min-max", batch=3)
    flat = case.study.graph.copy()
    for block in view_encoder(flat).blocks:
        flatten(flat, block)
    check_and_infer(flat)
    images, quantizer = case.study.images, case.study.quantizer
    workbench = Workbench(Study.of(flat, images, quantizer, batch=3))
    every = [
        *workbench.stream_norms, *workbench.site_norms.values(),
        *case.workbench.stream_norms, *case.workbench.site_norms.values(),
    ]  # fmt: skip
    for norms in every:
        assert norms.linf.counts.sum() == len(images.fit) * case.vit.spec.tokens
    for block in view_encoder(flat).blocks:
        assert len(block.mlp.fc2.input.shape) == 2
    assert_scales(affines(workbench.scales), affines(case.workbench.scales))


def flatten(graph: gs.Graph, block: Block) -> None:
    """Run a block's MLP on [B T, width], as exporters of Gemm do."""
    source, result = block.norm2.outputs[0], block.mlp.fc2.output
    flat = gs.Variable(f"{source.name}/flat", dtype=np.float32)
    for node in list(source.outputs):
        node.inputs = [flat if item is source else item for item in node.inputs]
    wide = gs.Variable(f"{result.name}/wide", dtype=np.float32)
    for node in list(result.outputs):
        node.inputs = [wide if item is result else item for item in node.inputs]
    for old, new, shape in ((source, flat, [-1, 16]), (result, wide, [-1, 10, 16])):
        target = gs.Constant(f"{new.name}/shape", np.array(shape))
        graph.nodes.append(gs.Node("Reshape", new.name, {}, [old, target], [new]))
    graph.toposort()


def test_sequence_first_hidden_states_are_refused() -> None:
    case = make_case()
    graph = case.graph.copy()
    view = view_encoder(graph)
    turned = [(view.blocks[0].input, "in"), (view.blocks[-1].output, "out")]
    for block in view.blocks:
        turned.append((block.norm1.outputs[0], f"{block.index}.norm1"))
        turned.append((block.attention.out.output, f"{block.index}.out"))
    for tensor, name in turned:
        new = gs.Variable(f"turned/{name}", dtype=np.float32)
        for node in list(tensor.outputs):
            node.inputs = [new if item is tensor else item for item in node.inputs]
        graph.nodes.append(gs.Node("Transpose", new.name, {"perm": [1, 0, 2]}, [tensor], [new]))
    check_and_infer(graph.toposort())
    images = case.study.images
    np.testing.assert_allclose(  # the encoder that it was
        run_graph(graph, images.fit)[0], case.references(images.fit), rtol=1e-3, atol=1e-5
    )
    with pytest.raises(InputError, match=r"block 0.* does not have the batch in front"):
        Workbench(Study.of(graph, images, case.study.quantizer))


@pytest.mark.parametrize("simulation", Simulation)
def test_scales_have_the_bits_of_the_simulation(simulation: Simulation) -> None:
    weights, activations = {
        "w8a8": (8, 8), "w6a6": (6, 6), "w4a4": (4, 4), "w4a16": (4, None)
    }[simulation.value]  # fmt: skip
    assert (simulation.weight_bits, simulation.activation_bits) == (weights, activations)
    for target in (U8S8, S8S8):
        narrow = simulate(target, simulation)
        assert replace(narrow, weight_bits=8, activation_bits=8, why=target.why) == target
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


def test_a_graph_that_passes_2_gb_runs_from_a_file(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    case = make_case()
    images = case.study.images.rank
    wanted = run_all(open_graph(case.graph, threads=1), images, batch=2)
    monkeypatch.setattr(graph_session, "LARGE", 1000)  # weights in a file of their own
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    found = run_all(open_graph(case.graph, threads=1), images, batch=2)
    for one, other in zip(found, wanted, strict=True):
        np.testing.assert_array_equal(one, other)
    assert not list(tmp_path.iterdir())
