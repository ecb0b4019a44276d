"""The temporary file that TensorRT reads in the place of ONNX Runtime's integers."""

from pathlib import Path

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import pytest
from support.block_weights import block_weights
from support.canonical import canonical_graph
from support.quantized_graphs import assert_same_numbers, quantized, zero_points
from support.tiny_vit import Spec, TinyVit

from regcache.compiler.engines.signed_model import REWRITE, signed_model, write_signed
from regcache.compiler.reporter import Reporter
from regcache.passes.base import run
from regcache.passes.errors import InputError
from regcache.passes.onnx_file import import_graph, save_graph
from regcache.passes.pack_weights import PackWeights
from regcache.passes.walk import count_ops, is_linear
from regcache.runtime.tensorrt_network import RefusedGraphError

WAY_OUT = "; it was compiled for ort-cpu: compile it with --target tensorrt-rtx"


@pytest.fixture
def model(tmp_path: Path) -> Path:
    path = tmp_path / "model.onnx"
    save_graph(quantized(canonical_graph(TinyVit(Spec(depth=1)).model())), path)
    return path


def test_the_file_lasts_as_long_as_the_block(
    model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = model.read_bytes()
    with signed_model(model, Reporter()) as signed:
        assert signed.name == model.name
        assert signed.parent != model.parent
        zeros = zero_points(import_graph(onnx.load(signed)))
        assert zeros
        assert all(zero.dtype == np.int8 and not zero.any() for zero in zeros)
    assert not signed.parent.exists()
    assert model.read_bytes() == before
    assert "moving the zero points of model.onnx to 0" in capsys.readouterr().err


def test_a_model_without_integers_is_taken_as_it_is(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "model.onnx"
    save_graph(canonical_graph(TinyVit(Spec(depth=1)).model()), path)
    with signed_model(path, Reporter()) as signed:
        assert signed == path
    assert capsys.readouterr().err == ""


def test_errors_name_the_artifact_s_file(model: Path) -> None:
    with pytest.raises(RefusedGraphError) as refused, signed_model(model, Reporter()) as signed:
        raise RefusedGraphError(f"{signed}: Softmax 'a': no")
    assert str(refused.value) == f"{model}: Softmax 'a': no{WAY_OUT}"
    with pytest.raises(InputError) as failed, signed_model(model, Reporter()) as signed:
        raise InputError(f"{signed}: No space left on device")
    assert str(failed.value) == f"{model}: No space left on device"
    assert not isinstance(failed.value, RefusedGraphError)


def test_integers_that_cannot_move_name_their_node(model: Path) -> None:
    graph = import_graph(onnx.load(model))
    weight = next(node for node in graph.nodes if node.op == "DequantizeLinear")
    assert isinstance(weight.inputs[0], gs.Constant)
    shape = weight.inputs[2].shape
    weight.inputs[0].values = np.full(weight.inputs[0].shape, 100, np.int8)
    weight.inputs[2] = gs.Constant("far", np.full(shape, -100, np.int8))
    save_graph(graph, model)
    with pytest.raises(RefusedGraphError) as refused, signed_model(model, Reporter()):
        pass
    reason = "without its zero point, the weight is 200 to 200, beyond int8"
    where = f"{model}: signed_integers: DequantizeLinear {weight.name!r}"
    assert str(refused.value) == f"{where}: {reason}{WAY_OUT}"


def test_the_rewrite_has_a_version() -> None:
    assert REWRITE == "split_qkv 2 + signed_integers 1"


def test_a_packed_projection_is_split_before(tmp_path: Path) -> None:
    """As the file is read from disk, by shapes that it holds."""
    spec = Spec(depth=2, qkv="fused")
    path = tmp_path / "model.onnx"
    packed = quantized(canonical_graph(TinyVit(spec).model()))
    save_graph(packed, path)
    with signed_model(path, Reporter()) as signed:
        graph = import_graph(onnx.load(signed))
    linears = [node for node in graph.nodes if is_linear(node)]
    assert len(linears) == 6 * spec.depth
    assert count_ops(graph, "Gather") == count_ops(packed, "Gather") - 3 * spec.depth
    assert_same_numbers(packed, graph, TinyVit(spec).images(2))


def test_weights_in_blocks_are_taken_as_they_are(tmp_path: Path) -> None:
    """The encoder view does not read MatMulNBits."""
    path = tmp_path / "model.onnx"
    graph = canonical_graph(TinyVit(Spec(depth=1, qkv="fused")).model())
    save_graph(run(PackWeights(block_weights(graph)), graph).graph, path)
    assert write_signed(path, tmp_path, Reporter()) == path
