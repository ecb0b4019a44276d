"""Hidden states behind each block, compared with float's, whatever a compilation changed."""

from pathlib import Path

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import pytest
from onnx import numpy_helper
from support.mutations import copy_artifact, forge
from support.tiny_artifact import SPEC, tiny_artifact

from regcache.compiler.artifact.artifact import Artifact
from regcache.compiler.parity.blocks import compare_blocks
from regcache.compiler.reporter import Reporter
from regcache.passes.base import Pass, run
from regcache.passes.canonicalize import canonicalize
from regcache.passes.delete_sinks import DeleteSinks
from regcache.passes.errors import InputError
from regcache.passes.onnx_file import load_model, save_graph
from regcache.passes.splice_register_tokens import SpliceRegisterTokens
from regcache.runtime.images import ImageFolder
from regcache.runtime.list_images import list_images
from regcache.runtime.session import OrtSession
from regcache.runtime.tensor_parity import TensorParity, first_jump

DEPTH = 3
pytestmark = [
    pytest.mark.xdist_group("block_parity"),
    pytest.mark.slow,
]  # one worker makes the artifacts for all


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images, and the artifacts `cpu` and `rtx` of the tiny encoder."""
    folder = tmp_path_factory.mktemp("blocks")
    for name, target in (("cpu", "ort-cpu"), ("rtx", "tensorrt-rtx")):
        made = folder / f"{name}-made"
        made.mkdir()
        tiny_artifact(made, "--target", target, depth=DEPTH).rename(folder / name)
    (made / "calibration").rename(folder / "images")
    return folder


def blocks_of(artifact: Path, *, float_model: bool = False) -> list[TensorParity]:
    opened = Artifact.open(artifact)
    images = ImageFolder(list_images(artifact.parent / "images"), opened.recipe, 4)
    return compare_blocks(opened, images, Reporter(), float_model=float_model)


def with_model(artifact: Path, to: Path, model: gs.Graph) -> Path:
    """A copy of an artifact that ships another model."""
    copy_artifact(artifact, to)
    save_graph(model, to / "model.onnx")
    forge(to)
    return to


@pytest.mark.parametrize("name", ["cpu", "rtx"])
def test_a_healthy_artifact_stays_close_in_every_block(folder: Path, name: str) -> None:
    found = blocks_of(folder / name)
    assert [block.name for block in found] == ["blocks.0", "blocks.1", "blocks.2"]
    assert all(0 < block.relative_error < 0.03 for block in found)
    assert all(block.cosine_mean > 0.999 for block in found)
    assert first_jump(found) is None


def test_the_float_file_is_its_canonical_form(folder: Path) -> None:
    found = blocks_of(folder / "cpu", float_model=True)
    assert all(block.max_abs_error < 1e-4 for block in found)


def test_agrees_with_the_hidden_states_of_a_plain_session(folder: Path) -> None:
    """But for what int8 rounds the other way where ONNX Runtime fuses other nodes."""
    opened = Artifact.open(folder / "cpu")
    (batch,) = ImageFolder(list_images(folder / "images"), opened.recipe, 8)
    model = onnx.load(opened.model)
    last = next(node.input[0] for node in model.graph.node if "last_hidden_state" in node.output)
    tensors = []
    for path in (opened.float_model, opened.model):
        proto = onnx.load(path)
        proto.graph.output.append(onnx.helper.make_empty_tensor_value_info(last))
        tensors.append(OrtSession(proto.SerializeToString()).run(batch.images)[-1])
    truth, found = (tensor.astype(np.float64) for tensor in tensors)
    expected = np.linalg.norm(found - truth) / np.linalg.norm(truth)
    assert blocks_of(folder / "cpu")[-1].relative_error == pytest.approx(expected, rel=5e-2)


@pytest.mark.parametrize("damaged", [0, 1, 2])
def test_names_the_block_that_was_damaged(folder: Path, tmp_path: Path, damaged: int) -> None:
    (tmp_path / "images").symlink_to(folder / "images")
    broken = copy_artifact(folder / "cpu", tmp_path / "broken")
    model = onnx.load(broken / "model.onnx")
    (weight,) = (w for w in model.graph.initializer if w.name == f"{damaged}.fc2/quantized")
    shuffled = np.flip(numpy_helper.to_array(weight)).copy()
    weight.CopyFrom(numpy_helper.from_array(shuffled, weight.name))
    onnx.save(model, broken / "model.onnx")
    forge(broken)
    assert first_jump(blocks_of(broken)) == f"blocks.{damaged}"


@pytest.mark.parametrize(
    "step",
    [SpliceRegisterTokens(1, 2, np.zeros((3, SPEC.width), np.float32)), DeleteSinks(1, 2)],
    ids=["registers", "deleted"],
)
def test_tokens_that_only_one_has_are_left_out(folder: Path, tmp_path: Path, step: Pass) -> None:
    (tmp_path / "images").symlink_to(folder / "images")
    graph = run(step, canonicalize(load_model(folder / "cpu" / "float.onnx"))).graph
    found = blocks_of(with_model(folder / "cpu", tmp_path / "changed", graph))
    assert found[0].max_abs_error < 1e-5
    assert all(0 < block.relative_error < 0.5 for block in found[1:])


def test_refuses_a_model_of_other_blocks(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "images").symlink_to(folder / "images")
    graph = canonicalize(load_model(folder / "cpu" / "float.onnx"))
    for node in graph.nodes:
        if node.op == "Add":
            node.outputs[0].name += "_renamed"
    broken = with_model(folder / "cpu", tmp_path / "broken", graph)
    with pytest.raises(InputError, match=r"its blocks are not float.onnx's"):
        blocks_of(broken)
