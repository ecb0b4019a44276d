"""What is rotated in the work that may be float, and what comes of it in an artifact."""

from fractions import Fraction
from pathlib import Path

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import pytest
from hypothesis import given
from hypothesis import strategies as st
from onnx import numpy_helper
from support.building import assert_builds, int8_products
from support.canonical import canonical_graph
from support.examples import examples
from support.running import run_graph
from support.tiny_artifact import tiny_artifact
from support.tiny_source import RECIPE
from support.tiny_vit import Spec, TinyVit

from regcache.compiler import pipeline
from regcache.compiler.artifact.artifact import Artifact
from regcache.compiler.curation.curate import Curated
from regcache.compiler.curation.record import CurationRecord
from regcache.compiler.curation.setting import Setting, place_registers
from regcache.compiler.encoder.float_encoder import FloatEncoder
from regcache.compiler.job.context import Context, choose_target
from regcache.compiler.job.options import CompileOptions
from regcache.compiler.job.targets import Precision, Simulation, TargetName
from regcache.compiler.parity.blocks import compare_blocks
from regcache.compiler.quantization import rotation
from regcache.compiler.quantization.rotation import (
    Rotations,
    choose_rotations,
    rotate,
    rotation_work,
)
from regcache.compiler.reporter import Reporter
from regcache.passes.base import run
from regcache.passes.canonicalize import canonicalize
from regcache.passes.choose_outputs import choose_outputs
from regcache.passes.encoder import EncoderView
from regcache.passes.find_blocks import view_encoder
from regcache.passes.marks import rotates
from regcache.passes.onnx_file import load_model
from regcache.passes.rotate_hidden import RotateHidden, hidden_sites, rotated_channels
from regcache.passes.rotated_stream import rotated_stream
from regcache.runtime.images import ImageFolder
from regcache.runtime.list_images import list_images

DEPTH = 3
SHARE = 0.6
pytestmark = [
    pytest.mark.xdist_group("rotation"),
    pytest.mark.slow,
]  # one worker makes the artifacts for all


def view_of(spec: Spec) -> EncoderView:
    return view_encoder(canonical_graph(TinyVit(spec).model()))


def linears_work(view: EncoderView) -> int:
    return sum(rows * columns for rows, columns in (one.weight_shape for one in view.linears))


def products_work(view: EncoderView) -> int:
    """Multiply-accumulates of the rotations' MatMuls for one token, read off their shapes."""
    products = [node for node in view.graph.nodes if rotates(node) and node.op == "MatMul"]
    tokens = view.tokens
    assert tokens is not None
    total = 0
    for node in products:
        _, *dims = node.outputs[0].shape
        numbers = 1
        for dim in dims:
            numbers *= dim
        total += numbers * node.inputs[1].values.shape[0]
    return total // tokens


@examples(25)
@given(
    depth=st.integers(1, 4),
    heads=st.integers(1, 3),
    hidden=st.sampled_from([24, 32, 48, 64, 128]),
    share=st.integers(0, 64).map(lambda part: part / 64),
)
def test_rotations_leave_linears_a_part_of_what_may_be_float(
    depth: int, heads: int, hidden: int, share: float
) -> None:
    view = view_of(Spec(width=8 * heads, heads=heads, depth=depth, hidden=hidden))
    graph, choice = view.graph, choose_rotations(view, share)
    steps = choice.free(seed=0)
    for step in steps if choice.hidden is None else (*steps, RotateHidden(choice.hidden)):
        graph = run(step, graph).graph
    after = view_encoder(graph)
    work = rotation_work(after)
    assert work == products_work(after)
    assert Fraction(work, work + linears_work(view)) <= (1 - Fraction(share)) * Fraction("0.7001")


def test_less_that_has_to_be_int8_is_more_that_is_rotated() -> None:
    view = view_of(Spec(width=32, heads=4, hidden=128, depth=12))
    stream, small = Rotations(stream=True), Rotations(stream=True, hidden=16)
    wanted = {
        1.0: Rotations(),
        0.985: Rotations(),  # 1.05 % at most, and the stream's products are 1.37 %
        0.98: stream,
        0.9: stream,  # 16 channels of 12 x 128 are another 14 %
        0.7: small,
        0.3: Rotations(stream=True, hidden=64),
    }
    assert {share: choose_rotations(view, share) for share in wanted} == wanted


@pytest.mark.parametrize(("hidden", "size"), [(128, 64), (80, 16), (24, None)])
def test_channels_are_rotated_as_many_at_a_time_as_go_into_them(
    hidden: int, size: int | None
) -> None:
    view = view_of(Spec(width=32, heads=4, hidden=hidden, depth=12))
    assert choose_rotations(view, 0) == Rotations(stream=True, hidden=size)


@pytest.fixture(scope="module")
def tiny() -> FloatEncoder:
    graph = canonical_graph(
        TinyVit(Spec(width=32, heads=4, hidden=64, depth=DEPTH, grid=4)).model()
    )
    outputs = choose_outputs(view_encoder(graph))
    return FloatEncoder(Path("tiny.onnx"), graph, view_encoder(graph), RECIPE, "source", outputs)


def context(**changes: object) -> Context:
    values = {"source": "tiny.onnx", "images": "photos", "target": TargetName.TENSORRT}
    options = CompileOptions.model_validate(values | {"int8_share": SHARE} | changes)
    images = ImageFolder([Path("unread.png")], RECIPE)
    scratch = Path("unwritten")
    return Context(options, choose_target(options), images, scratch, scratch, Reporter())


@pytest.mark.parametrize(
    "changes",
    [{"precision": Precision.FP8}, {"simulate": Simulation.W8A8}, {"rotate": False}],
    ids=str,
)
def test_what_holds_outliers_well_is_not_rotated(changes: dict[str, object]) -> None:
    assert context().options.rotates
    assert not context(**changes).options.rotates


@pytest.mark.parametrize("share", [None, 1.0])
def test_where_there_is_no_room_values_alone_are_rotated(
    tiny: FloatEncoder, share: float | None
) -> None:
    told = context(int8_share=share)
    found = rotate(told, tiny, told.options.share)
    assert [(log.name, log.edits) for log in found.passes] == [("rotate_values", DEPTH)]
    assert rotation_work(found.view) == products_work(found.view) == 0


def test_a_simulation_that_shall_rotates_all_there_is(tiny: FloatEncoder) -> None:
    told = context(simulate=Simulation.W4A4, rotate=True, int8_share=None)
    assert told.options.rotates
    found = rotate(told, tiny, told.options.rotations_leave)
    assert [(log.name, log.edits) for log in found.passes] == [
        ("rotate_stream", 1),
        ("rotate_values", DEPTH),
        ("rotate_hidden", DEPTH),
    ]
    assert [rotated_channels(block.mlp.fc2) for block in found.view.blocks] == [64] * DEPTH


def test_says_what_it_did(tiny: FloatEncoder) -> None:
    found = rotate(context(), tiny, SHARE)
    assert [(log.name, log.edits) for log in found.passes] == [
        ("rotate_stream", 1),
        ("rotate_values", 3),
        ("rotate_hidden", 3),
    ]
    assert rotated_stream(found.view)
    assert [rotated_channels(block.mlp.fc2) for block in found.view.blocks] == [16, 16, 16]
    assert found.path == tiny.path


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("rotated")
    chosen = ("--target", "tensorrt-rtx", "--int8-share", str(SHARE), "--equalize")
    return tiny_artifact(folder, *chosen, "--rounding", "gptq", depth=DEPTH)


def int8_weights(path: Path) -> list[tuple[str, tuple[int, ...]]]:
    """The matrices that stand as int8 in a file: what they multiply, and their shape."""
    graph = onnx.load(path).graph
    stored = {item.name: numpy_helper.to_array(item) for item in graph.initializer}
    made = {node.output[0]: node for node in graph.node}
    found = []
    for node in graph.node:
        weight = made.get(node.input[1]) if node.op_type == "MatMul" else None
        if weight is not None and weight.op_type == "DequantizeLinear":
            integers = stored.get(weight.input[0])
            if integers is not None and integers.dtype == np.int8:
                found.append((node.input[0], integers.shape))
    return found


def test_the_artifact_keeps_the_share_that_its_manifest_states(
    artifact: Path, tiny: FloatEncoder
) -> None:
    opened = Artifact.open(artifact)
    record = opened.manifest.quantization
    rotations = products_work(rotate(context(), tiny, SHARE).view)
    every = linears_work(tiny.view) + rotations
    int8 = sum(int(np.prod(shape)) for _, shape in int8_weights(opened.model))
    assert record.int8_share == pytest.approx(int8 / every)
    assert record.int8_share >= SHARE
    assert record.pareto[0].share == pytest.approx(1 - rotations / every)
    assert opened.manifest.encoder.activation == "gelu"
    assert opened.manifest.parity.result.cosine_mean > 0.999


def test_blocks_are_compared_in_the_rotation_of_float(artifact: Path) -> None:
    opened = Artifact.open(artifact)
    folder = ImageFolder(list_images(artifact.parent / "calibration"), opened.recipe, 4)
    found = compare_blocks(opened, folder, Reporter())
    assert len(found) == DEPTH
    assert all(block.cosine_mean > 0.999 for block in found)


def test_half_precision_holds_the_small_rotation_exactly(artifact: Path) -> None:
    stored = {
        item.name: numpy_helper.to_array(item)
        for item in onnx.load(artifact / "model.onnx").graph.initializer
    }
    small = [array for name, array in stored.items() if array.shape == (16, 16)]
    assert small
    assert all(set(abs(array).ravel().tolist()) == {0.25} for array in small)


def test_tensorrt_keeps_the_linears_behind_rotations_in_int8(artifact: Path) -> None:
    model = artifact / "model.onnx"
    built = assert_builds(gs.import_onnx(onnx.load(model)))
    # The projections that read one activation are one product.
    assert int8_products(built) == len({activation for activation, _ in int8_weights(model)})


def all_hidden(_context: Context, encoder: FloatEncoder, _size: int) -> frozenset[str]:
    return frozenset(site.name for site in hidden_sites(encoder.view))


@pytest.mark.parametrize(
    "setting",
    [
        Setting(candidates=(0, 1), start=1, end=2),
        Setting(candidates=(0, 1), start=0, end=2),
        Setting(candidates=(0, 1), start=1, end=2, mode="token"),
        Setting(candidates=(0, 1), start=0, end=1, mode="token"),
        Setting(delete_at=1, delete_count=2),
        Setting(delete_at=0, delete_count=2),
        Setting(candidates=(0,), start=1, end=2, delete_at=1, delete_count=2),
        Setting(moved=((0, 3), (0, 30))),
    ],
    ids=str,
)
@pytest.mark.parametrize(
    ("target", "share"), [("ort-cpu", SHARE), ("tensorrt", SHARE), ("tensorrt", 1.0)]
)
def test_registers_ship_in_a_rotated_encoder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, setting: Setting, target: str, share: float
) -> None:
    """As they would in one that is not rotated: the registers themselves are not."""
    tokens = np.random.default_rng(0).standard_normal((setting.count, 32)).astype(np.float32)
    curated = Curated(setting, tokens, CurationRecord(reason="chosen by the test", setting=setting))
    monkeypatch.setattr(pipeline, "find_registers", lambda *_: curated)
    monkeypatch.setattr(rotation, "choose_hidden", all_hidden)  # they are too alike to be worth it
    monkeypatch.setattr(pipeline, "choose_way", lambda _context, _encoder, way, *_: way)
    chosen = ("--target", target, "--int8-share", str(share), "--equalize", "--registers", "auto")
    opened = Artifact.open(tiny_artifact(tmp_path, *chosen, depth=2))
    edits = {record.name: record.edits for record in opened.manifest.passes}
    rotated = {name: count for name, count in edits.items() if name.startswith("rotate_")}
    room = {"rotate_stream": 1, "rotate_hidden": 2} if share < 1 else {}
    assert rotated == {"rotate_values": 2, **room}
    (batch,) = ImageFolder(list_images(tmp_path / "calibration"), opened.recipe, 8)
    graph = canonicalize(load_model(opened.float_model))
    placed, _ = place_registers(graph, view_encoder(graph), setting, tokens)
    wanted = run_graph(placed, batch.images)[0]
    with opened.session() as session:
        found = session.run(batch.images)[0]
    cosine = np.sum(wanted * found, axis=1)
    cosine /= np.linalg.norm(wanted, axis=1) * np.linalg.norm(found, axis=1)
    assert cosine.min() > 0.999
