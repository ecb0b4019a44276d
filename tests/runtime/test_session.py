"""Sessions report what is wrong in one line; the saturation probe measures real kernels."""

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import onnxruntime as ort
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from onnx import TensorProto, helper
from support.canonical import canonical_graph
from support.examples import examples
from support.running import run_graph
from support.small_models import pooling_encoder
from support.tiny_vit import Spec, TinyVit

from regcache.passes.affine import Affine
from regcache.passes.base import run
from regcache.passes.errors import InputError
from regcache.passes.find_blocks import view_encoder
from regcache.passes.quantize_linears import QuantizeLinears
from regcache.runtime import session
from regcache.runtime.session import OrtSession, available_cpus, u8_matmul_exact, u8s8_saturates


@pytest.fixture
def model_file(tmp_path: Path) -> Path:
    path = tmp_path / "encoder.onnx"
    path.write_bytes(pooling_encoder())
    return path


@pytest.mark.parametrize("integers", [True, False])
@pytest.mark.parametrize("deployed", [True, False])
def test_runs_from_a_path_and_from_bytes(model_file: Path, integers: bool, deployed: bool) -> None:
    images = np.random.default_rng(0).normal(size=(5, 3, 4, 6)).astype(np.float32)
    for model in (model_file, model_file.read_bytes()):
        with OrtSession(model, threads=1, integers=integers, deployed=deployed) as encode:
            assert encode.input_name == "images"
            assert encode.input_shape == ("batch", 3, "h", "w")
            assert encode.output_names == ["pooled", "flat"]
            pooled, flat = encode.run(images)
        np.testing.assert_allclose(pooled[..., 0, 0], images.mean(axis=(2, 3)), rtol=1e-5)
        np.testing.assert_array_equal(flat, images.reshape(5, -1))


def test_outputs_in_the_order_asked_for(model_file: Path) -> None:
    images = np.random.default_rng(0).normal(size=(2, 3, 4, 6)).astype(np.float32)
    plain = OrtSession(model_file).run(images)
    for first in (["flat"], ["flat", "pooled"]):
        encode = OrtSession(model_file, outputs=first)
        assert encode.output_names == ["flat", "pooled"]
        for one, other in zip(encode.run(images), reversed(plain), strict=True):
            np.testing.assert_array_equal(one, other)
    with pytest.raises(InputError, match="has no output 'tokens', only pooled, flat"):
        OrtSession(model_file, outputs=["tokens"])


@pytest.mark.parametrize("batch", ["batch", 5])
def test_several_inputs(batch: int | str) -> None:
    """What the others take is filled up along with the images."""
    infos = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, [batch, 3])
        for name in ("images", "before", "sum")
    ]
    node = helper.make_node("Add", ["images", "before"], ["sum"])
    graph = helper.make_graph([node], "tail", infos[:2], infos[2:])
    model = helper.make_model(graph, ir_version=8, opset_imports=[helper.make_opsetid("", 17)])
    content = bytes(model.SerializeToString())
    images = np.arange(6, dtype=np.float32).reshape(2, 3)
    (found,) = OrtSession(content, inputs=2).run(images, 10 * images)
    np.testing.assert_array_equal(found, 11 * images)
    with pytest.raises(InputError, match="needs one image input, float32 or uint8, has images"):
        OrtSession(content)


def test_a_fixed_batch_is_filled_up() -> None:
    images = np.random.default_rng(0).normal(size=(2, 3, 4, 6)).astype(np.float32)
    encode = OrtSession(pooling_encoder(batch=5))
    assert encode.fixed_batch == 5
    assert len(encode.filled(images)) == 5
    pooled, flat = encode.run(images)
    np.testing.assert_allclose(pooled[..., 0, 0], images.mean(axis=(2, 3)), rtol=1e-5)
    np.testing.assert_array_equal(flat, images.reshape(2, -1))
    assert OrtSession(pooling_encoder()).filled(images) is images


@pytest.mark.parametrize("dtype", [np.uint8, np.float32])
def test_takes_the_images_that_the_graph_takes(dtype: type[np.generic]) -> None:
    """Bytes with the channels last, or floats: never the other, which would be read as bytes."""
    graph = helper.make_graph(
        [
            helper.make_node("Cast", ["images"], ["floats"], to=TensorProto.FLOAT),
            helper.make_node("ReduceMean", ["floats"], ["pooled"], axes=[1, 2], keepdims=0),
        ],
        "bytes",
        [
            helper.make_tensor_value_info(
                "images", helper.np_dtype_to_tensor_dtype(np.dtype(dtype)), [2, 4, 6, 3]
            )
        ],
        [helper.make_tensor_value_info("pooled", TensorProto.FLOAT, [2, 3])],
    )
    model = helper.make_model(graph, ir_version=8, opset_imports=[helper.make_opsetid("", 17)])
    images = np.random.default_rng(0).integers(0, 256, (1, 4, 6, 3)).astype(dtype)
    with OrtSession(model.SerializeToString()) as encode:
        assert encode.input_dtype == dtype
        (pooled,) = encode.run(images)
        np.testing.assert_allclose(pooled, images.mean(axis=(1, 2)), rtol=1e-5)
        other = np.float32 if dtype is np.uint8 else np.float64
        refusal = f"takes {encode.input_dtype}, not {np.dtype(other)}"
        with pytest.raises(InputError, match=refusal):
            encode.run(images.astype(other))


def test_leaving_the_context_frees_the_model(model_file: Path) -> None:
    with OrtSession(model_file) as encode:
        pass
    assert not hasattr(encode, "_session")


def test_threads_default_to_the_cpus_of_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    assert available_cpus() >= 1
    monkeypatch.setattr("os.sched_getaffinity", lambda _pid: {3, 5, 7}, raising=False)
    assert available_cpus() == 3
    options = session.cpu_session_options(None, True, False)
    assert options.intra_op_num_threads == 3
    assert options.get_session_config_entry("session.intra_op.allow_spinning") == "0"
    monkeypatch.delattr("os.sched_getaffinity")
    monkeypatch.setattr("os.cpu_count", lambda: None)
    assert available_cpus() == 1


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (None, "doesn't exist"),
        (b"", "No graph"),
        (b"hello", "Protobuf parsing failed"),
        (pooling_encoder()[:80], "Protobuf parsing failed"),
        (pooling_encoder(op="NoSuchOp"), "NoSuchOp"),
        (
            pooling_encoder(input_type=TensorProto.FLOAT16),
            r"one image input, float32 or uint8, has images",
        ),
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
    model = onnx.load_model_from_string(pooling_encoder())
    model.graph.input.append(helper.make_tensor_value_info("input_ids", TensorProto.INT64, [1]))
    with pytest.raises(InputError, match=r"images: tensor\(float\), input_ids: tensor\(int64\)"):
        OrtSession(model.SerializeToString())


@pytest.mark.parametrize("shape", [(5, 3, 4, 4), (2, 1, 4, 4), (2, 3, 4)])
def test_images_of_another_shape_are_refused(shape: tuple[int, ...]) -> None:
    expected = rf"takes \[2, 3, h, w\], not \[{', '.join(map(str, shape))}\]"
    with pytest.raises(InputError, match=expected):
        OrtSession(pooling_encoder(batch=2)).run(np.zeros(shape, np.float32))


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


def rounded_linear(
    affine: Affine, weights: NDArray[np.integer[Any]], steps: NDArray[np.float32]
) -> bytes:
    """images [batch, K, 1, 1] -> Q/DQ -> a linear [batch, N] with integer weights [K, N]."""
    constants = {
        "scale": np.array(affine.scale, np.float32),
        "zero": np.array(affine.zero_point, affine.dtype),
        "low": np.array(affine.limits[0], affine.dtype),
        "high": np.array(affine.limits[1], affine.dtype),
        "weights": weights,
        "steps": steps,
    }
    nodes = [
        helper.make_node("Flatten", ["images"], ["x"], axis=1),
        helper.make_node("QuantizeLinear", ["x", "scale", "zero"], ["q"]),
        helper.make_node("Clip", ["q", "low", "high"], ["clipped"]),
        helper.make_node("DequantizeLinear", ["clipped", "scale", "zero"], ["rounded"]),
        helper.make_node("DequantizeLinear", ["weights", "steps"], ["matrix"], axis=1),
        helper.make_node("MatMul", ["rounded", "matrix"], ["y"]),
    ]
    inner, columns = weights.shape
    graph = helper.make_graph(
        nodes,
        "linear",
        [helper.make_tensor_value_info("images", TensorProto.FLOAT, ["batch", inner, 1, 1])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", columns])],
        [onnx.numpy_helper.from_array(values, name) for name, values in constants.items()],
    )
    model = helper.make_model(graph, ir_version=8, opset_imports=[helper.make_opsetid("", 17)])
    return bytes(model.SerializeToString())


@examples(30)
@given(
    seed=st.integers(0, 999),
    rows=st.integers(1, 5),
    inner=st.integers(1, 70),
    columns=st.integers(1, 20),
    bits=st.integers(2, 8),
)
def test_without_integers_a_rounded_linear_is_computed_in_float(
    seed: int, rows: int, inner: int, columns: int, bits: int
) -> None:
    """Also at the extreme values, where integer kernels of old CPUs saturate."""
    random = np.random.default_rng(seed)
    affine = Affine.from_range(-1.0, 3.0, "uint8", symmetric=False, bits=bits)
    weights = random.choice(np.array([-127, 127, 64], np.int8), (inner, columns))
    steps = random.uniform(0.5, 2, columns).astype(np.float32)
    images = random.uniform(-2, 4, (rows, inner, 1, 1)).astype(np.float32)
    codes = np.clip(
        np.rint(images[:, :, 0, 0] / np.float32(affine.scale)) + affine.zero_point, 0, 2**bits - 1
    )
    real = (codes.astype(np.float64) - affine.zero_point) * affine.scale
    wanted = real @ (weights * steps.astype(np.float64))
    with OrtSession(rounded_linear(affine, weights, steps), threads=1, integers=False) as encode:
        (found,) = encode.run(images)
    np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-2)


def optimized_ops(model: bytes, integers: bool, path: Path) -> list[str]:
    """The nodes that ONNX Runtime makes of a model."""
    options = session.cpu_session_options(1, integers, False)
    options.optimized_model_filepath = str(path)
    ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    return [node.op_type for node in onnx.load(path).graph.node]


@pytest.mark.parametrize("bits", [8, 5])
def test_without_integers_a_quantized_encoder_keeps_the_float_optimisations(
    bits: int, tmp_path: Path
) -> None:
    vit = TinyVit(Spec(depth=1))
    graph = canonical_graph(vit.model())
    scales = {
        site.tensor.name: Affine.from_range(-4.0, 5.0, "uint8", symmetric=False, bits=bits)
        for site in view_encoder(graph).sites
    }
    graph = run(QuantizeLinears(scales, weight_bits=bits), graph).graph
    model = gs.export_onnx(graph).SerializeToString()
    images = vit.images(2)
    with OrtSession(model, threads=1, integers=False) as encode:
        outputs = encode.run(images)
    for found, wanted in zip(outputs, run_graph(graph, images), strict=True):
        np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-5)
    floats = optimized_ops(model, False, tmp_path / "floats.onnx")
    assert not [op for op in floats if "Integer" in op or op.startswith("QLinear")]
    assert "BiasGelu" in floats
    assert floats.count("QuantizeLinear") == floats.count("DequantizeLinear") == len(scales)
    integers = optimized_ops(model, True, tmp_path / "integers.onnx")
    assert integers.count("MatMulIntegerToFloat") == 6
