"""Sessions report what is wrong in one line; the saturation probe measures real kernels."""

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from numpy.typing import NDArray
from onnx import TensorProto, helper

from regcache.passes.errors import InputError
from regcache.runtime import session
from regcache.runtime.session import OrtSession, available_cpus, u8_matmul_exact, u8s8_saturates


def encoder(
    batch: int | str = "batch", input_type: int = TensorProto.FLOAT, op: str = "GlobalAveragePool"
) -> bytes:
    """images [batch, 3, H, W] -> pooled [batch, 3, 1, 1] and flat [batch, 3 x H x W]."""
    nodes = [
        helper.make_node(op, ["images"], ["pooled"]),
        helper.make_node("Flatten", ["images"], ["flat"], axis=1),
    ]
    graph = helper.make_graph(
        nodes,
        "encoder",
        [helper.make_tensor_value_info("images", input_type, [batch, 3, "h", "w"])],
        [helper.make_tensor_value_info(name, input_type, None) for name in ("pooled", "flat")],
    )
    model = helper.make_model(graph, ir_version=8, opset_imports=[helper.make_opsetid("", 17)])
    return bytes(model.SerializeToString())


@pytest.fixture
def model_file(tmp_path: Path) -> Path:
    path = tmp_path / "encoder.onnx"
    path.write_bytes(encoder())
    return path


@pytest.mark.parametrize("optimize", [True, False])
@pytest.mark.parametrize("arena", [True, False])
def test_runs_from_a_path_and_from_bytes(model_file: Path, optimize: bool, arena: bool) -> None:
    images = np.random.default_rng(0).normal(size=(5, 3, 4, 6)).astype(np.float32)
    for model in (model_file, model_file.read_bytes()):
        with OrtSession(model, threads=1, optimize=optimize, arena=arena) as encode:
            assert encode.input_name == "images"
            assert encode.input_shape == ("batch", 3, "h", "w")
            assert encode.output_names == ["pooled", "flat"]
            pooled, flat = encode.run(images)
        np.testing.assert_allclose(pooled[..., 0, 0], images.mean(axis=(2, 3)), rtol=1e-5)
        np.testing.assert_array_equal(flat, images.reshape(5, -1))


def test_a_fixed_batch_is_filled_up() -> None:
    images = np.random.default_rng(0).normal(size=(2, 3, 4, 6)).astype(np.float32)
    encode = OrtSession(encoder(batch=5))
    assert encode.fixed_batch == 5
    assert len(encode.filled(images)) == 5
    pooled, flat = encode.run(images)
    np.testing.assert_allclose(pooled[..., 0, 0], images.mean(axis=(2, 3)), rtol=1e-5)
    np.testing.assert_array_equal(flat, images.reshape(2, -1))
    assert OrtSession(encoder()).filled(images) is images


def test_leaving_the_context_frees_the_model(model_file: Path) -> None:
    with OrtSession(model_file) as encode:
        pass
    assert not hasattr(encode, "_session")


def test_threads_default_to_the_cpus_of_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    assert available_cpus() >= 1
    monkeypatch.setattr("os.sched_getaffinity", lambda _pid: {3, 5, 7}, raising=False)
    assert available_cpus() == 3
    options = session._session_options(None, True, False)
    assert options.intra_op_num_threads == 3
    monkeypatch.delattr("os.sched_getaffinity")
    monkeypatch.setattr("os.cpu_count", lambda: None)
    assert available_cpus() == 1


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (None, "doesn't exist"),
        (b"", "No graph"),
        (b"hello", "Protobuf parsing failed"),
        (encoder()[:80], "Protobuf parsing failed"),
        (encoder(op="NoSuchOp"), "NoSuchOp"),
        (encoder(input_type=TensorProto.FLOAT16), r"needs one float32 image input, has images"),
    ],
)
def test_a_model_that_cannot_be_loaded_is_named_in_one_silent_line(
    tmp_path: Path, content: bytes | None, reason: str, capfd: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "broken.onnx"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(InputError, match=reason) as caught:
        OrtSession(path)
    message = str(caught.value)
    assert message.startswith(f"{path}: ")
    assert message.count(str(path)) <= 2
    assert "\n" not in message
    assert "ONNXRuntimeError" not in message
    assert capfd.readouterr() == ("", "")


def test_a_model_in_memory_has_a_name_in_errors() -> None:
    with pytest.raises(InputError, match="the model in memory: ONNX Runtime: "):
        OrtSession(b"hello")


def test_a_model_with_two_inputs_is_refused() -> None:
    model = onnx.load_model_from_string(encoder())
    model.graph.input.append(helper.make_tensor_value_info("input_ids", TensorProto.INT64, [1]))
    with pytest.raises(InputError, match=r"images: tensor\(float\), input_ids: tensor\(int64\)"):
        OrtSession(model.SerializeToString())


@pytest.mark.parametrize("shape", [(5, 3, 4, 4), (2, 1, 4, 4), (2, 3, 4)])
def test_images_of_another_shape_are_refused(shape: tuple[int, ...]) -> None:
    expected = rf"takes \[2, 3, h, w\], not \[{', '.join(map(str, shape))}\]"
    with pytest.raises(InputError, match=expected):
        OrtSession(encoder(batch=2)).run(np.zeros(shape, np.float32))


def test_a_model_that_fails_on_its_input_is_named(capfd: pytest.CaptureFixture[str]) -> None:
    graph = helper.make_graph(
        [helper.make_node("Reshape", ["images", "shape"], ["pooled"])],
        "fails",
        [helper.make_tensor_value_info("images", TensorProto.FLOAT, ["b", 3, 4, 4])],
        [helper.make_tensor_value_info("pooled", TensorProto.FLOAT, None)],
        [helper.make_tensor("shape", TensorProto.INT64, [2], [7, 11])],
    )
    model = helper.make_model(graph, ir_version=8, opset_imports=[helper.make_opsetid("", 17)])
    with pytest.raises(InputError, match=r"on \[2, 3, 4, 4\]: .*Reshape") as caught:
        OrtSession(model.SerializeToString()).run(np.zeros((2, 3, 4, 4), np.float32))
    assert "\n" not in str(caught.value)
    assert capfd.readouterr() == ("", "")


def test_unsigned_weights_are_exact_on_this_machine() -> None:
    assert u8_matmul_exact(np.uint8)


def test_the_probe_is_cached_and_agrees_with_itself() -> None:
    assert u8s8_saturates() is u8s8_saturates()
    assert u8s8_saturates() is not u8_matmul_exact(np.int8)


class SaturatingKernels:
    """What a CPU without VNNI computes: pairs of products, added in 16 bits that clip."""

    def __init__(self, model: bytes, *_args: Any, **_options: Any) -> None:
        initializer = onnx.load_model_from_string(model).graph.initializer[0]
        self.weights = onnx.numpy_helper.to_array(initializer).astype(np.int64)
        self.clips = initializer.data_type == TensorProto.INT8

    def run(self, _names: None, feed: dict[str, NDArray[Any]]) -> list[NDArray[Any]]:
        images = feed["x"].astype(np.int64)
        products = images[:, :, None] * self.weights
        pairs = np.add.reduceat(products, np.arange(0, products.shape[1], 2), axis=1)
        sums = (np.clip(pairs, -32768, 32767) if self.clips else pairs).sum(axis=1)
        return [sums.astype(np.int32), sums.astype(np.float32)]


def test_the_probe_notices_saturation(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ort, "InferenceSession", SaturatingKernels)
    assert not u8_matmul_exact(np.int8)
    assert u8_matmul_exact(np.uint8)
