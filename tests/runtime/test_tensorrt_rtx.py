"""Engines from the real TensorRT-RTX, and one-line refusals of what it does not take."""

import gc
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import pytest
from numpy.typing import NDArray
from onnx import NodeProto, TensorProto, helper, numpy_helper
from support import zoo
from support.building import assert_builds, int8_products, needs_tensorrt
from support.canonical import canonical_graph
from support.running import run_graph
from support.sample import sample_blocks
from support.tiny_vit import Spec, TinyVit

from regcache.passes.affine import Affine, IntegerType
from regcache.passes.base import run
from regcache.passes.errors import InputError, MissingExtraError
from regcache.passes.find_blocks import view_encoder
from regcache.passes.observe import Observe
from regcache.passes.quantize_linears import QuantizeLinears
from regcache.passes.signed_integers import SignedIntegers
from regcache.runtime.engine_layers import products_by_precision
from regcache.runtime.tensorrt_rtx import (
    build_engine,
    capabilities_since,
    supported_compute_capabilities,
)


def test_a_missing_tensorrt_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt_rtx", None)
    with pytest.raises(MissingExtraError, match=r'pip install "regcache\[trt-rtx\]"'):
        build_engine(Path("model.onnx"))


def quantized(
    graph: gs.Graph, images: NDArray[np.float32], dtype: IntegerType = "int8"
) -> gs.Graph:
    """Q/DQ around every linear, with the ranges that the images give: around 0 for int8."""
    view = view_encoder(graph)
    sites = [site.tensor.name for site in view.sites]
    outputs = run_graph(run(Observe(tuple(sites)), graph).graph, images, optimize=True)
    seen = zip(sites, outputs[len(graph.outputs) :], strict=True)
    scales = {
        site: Affine.from_range(float(x.min()), float(x.max()), dtype, symmetric=dtype == "int8")
        for site, x in seen
    }
    return run(QuantizeLinears(scales), graph).graph


def random_images(side: int = zoo.SIDE) -> NDArray[np.float32]:
    shape = (1, 3, side, side)
    return np.random.default_rng(0).standard_normal(shape, dtype=np.float32)


@needs_tensorrt
@pytest.mark.sample
@pytest.mark.xdist_group("sample")
def test_the_quantized_sample_is_small_and_int8(folder: Path) -> None:
    """2 blocks: q, k and v as one product, out, fc1 and fc2; also with zero points moved to 0."""
    original = sample_blocks(folder, 2)
    large = assert_builds(original)
    assert int8_products(large) == 0
    moved = run(SignedIntegers(), quantized(original, random_images(224), "uint8")).graph
    for graph in (quantized(original, random_images(224)), moved):
        small = assert_builds(graph)
        assert len(small.engine) <= 0.45 * len(large.engine)
        assert int8_products(small) == 2 * 4


@pytest.mark.torch
@needs_tensorrt
@pytest.mark.xdist_group("clip-b16")
def test_clip_b16_builds_from_its_file(folder: Path) -> None:
    path = zoo.export_family("clip-b16", folder).path
    built = build_engine(path)
    assert len(built.engine) == pytest.approx(path.stat().st_size, rel=0.05)
    assert products_by_precision(built.layers).keys() == {"FP32"}


SPELLINGS = {
    "plain": Spec(),
    "sdpa": Spec(attention="sdpa"),
    "merged": Spec(attention="merged", opset=17, gelu="half_last", layer_norm="pow"),
    "operator": Spec(attention="op4", opset=23),
    "packed operator": Spec(attention="op3", opset=23),
    "fused": Spec(qkv="fused", gemm=True, activation="quick_gelu", layer_scale=True),
    "gated": Spec(activation="swiglu", pooling_head=True, prefix=0),
}


@needs_tensorrt
@pytest.mark.parametrize("name", SPELLINGS)
def test_exporters_spellings_build(name: str) -> None:
    graph = canonical_graph(TinyVit(SPELLINGS[name]).model())
    assert_builds(graph)


def write(
    path: Path,
    nodes: Sequence[NodeProto],
    constants: dict[str, NDArray[Any]] | None = None,
    shape: Sequence[int | str] = ("batch", 3, 8, 8),
) -> Path:
    """An ONNX file whose nodes turn `x` into `y`."""
    graph = helper.make_graph(
        nodes,
        "test",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(values, name) for name, values in (constants or {}).items()],
    )
    model = helper.make_model(graph, ir_version=8, opset_imports=[helper.make_opsetid("", 17)])
    onnx.save(model, path)
    return path


def relu(path: Path, shape: Sequence[int | str] = ("batch", 3, 8, 8)) -> Path:
    return write(path, [helper.make_node("Relu", ["x"], ["y"], name="relu")], shape=shape)


def refusal(path: Path, **options: Any) -> str:
    """The one line that building ends with, without the file's name."""
    with pytest.raises(InputError) as caught:
        build_engine(path, **options)
    where, _, reason = str(caught.value).partition(": ")
    assert where == str(path)
    assert "\n" not in reason
    return reason


@needs_tensorrt
class TestBuilds:
    def test_facts_and_silence(self, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
        path = relu(tmp_path / "m.onnx")
        built = build_engine(path, compute_capabilities=["8.9", "8.9"], max_batch=4, opt_batch=2)
        assert built.compute_capabilities == ("8.9",)
        assert built.batch == (1, 2, 4)
        assert built.version.count(".") >= 2
        assert 0 < built.seconds < 60
        assert capfd.readouterr() == ("", "")

    def test_every_listed_capability_but_turing(self, tmp_path: Path) -> None:
        """Turing multiplies no FP32."""
        known = [name for name in supported_compute_capabilities() if name != "7.5"]
        assert {"8.0", "8.6", "8.9", "12.0"} <= set(known)
        path = tmp_path / "m.onnx"
        onnx.save(TinyVit(Spec()).model(), path)
        assert build_engine(path, compute_capabilities=known).compute_capabilities == tuple(known)
        reason = refusal(path, compute_capabilities=["7.5"])
        assert reason.endswith("for Turing (SM75): FP32 GEMM is not supported")

    def test_float8_begins_with_ada(self) -> None:
        found = capabilities_since("8.9", ("12.0", "7.5", "8.6", "8.9", "10.0"))
        assert found == ("12.0", "8.9", "10.0")

    def test_a_fixed_batch_stays(self, tmp_path: Path) -> None:
        assert build_engine(relu(tmp_path / "m.onnx", [2, 3, 8, 8])).batch == (2, 2, 2)

    def test_weights_beside_the_file(self, tmp_path: Path) -> None:
        model = TinyVit(Spec()).model()
        path = tmp_path / "m.onnx"
        onnx.save(model, path, save_as_external_data=True, location="w.data", size_threshold=0)
        assert len(build_engine(path).layers) > 10
        (tmp_path / "w.data").unlink()
        assert refusal(path).endswith(f"Failed to open file: {tmp_path / 'w.data'}")

    def test_beside_another_tensorrt_user(self, tmp_path: Path) -> None:
        """TensorRT keeps the logger of whoever came first."""
        import tensorrt_rtx

        other = tensorrt_rtx.Builder(tensorrt_rtx.Logger(tensorrt_rtx.Logger.ERROR))
        built = build_engine(relu(tmp_path / "m.onnx"))
        assert built.layers
        assert not built.warnings
        del other


@needs_tensorrt
class TestRefusals:
    @pytest.mark.parametrize("op", ["Det", "NoSuchOperator"])
    def test_an_operator(self, op: str, tmp_path: Path) -> None:
        nodes = [
            helper.make_node("Relu", ["x"], ["r"], name="first"),
            helper.make_node(op, ["r"], ["y"], name="head/odd"),
        ]
        reason = refusal(write(tmp_path / "m.onnx", nodes))
        assert reason.startswith(f"{op} 'head/odd': TensorRT-RTX 1.")
        assert reason.endswith("has no such operator")

    def test_a_collection_never_waits_for_the_logger(self, tmp_path: Path) -> None:
        """Of refused builders, which tracebacks keep in cycles until the collector comes."""
        path = write(tmp_path / "m.onnx", [helper.make_node("Det", ["x"], ["y"])])
        thresholds = gc.get_threshold()
        gc.set_threshold(1)
        try:
            assert len({refusal(path) for _ in range(5)}) == 1
        finally:
            gc.set_threshold(*thresholds)
        assert gc.isenabled()

    def test_a_nameless_node(self, tmp_path: Path) -> None:
        path = write(tmp_path / "m.onnx", [helper.make_node("Det", ["x"], ["y"])])
        assert refusal(path).startswith("Det number 0: ")

    @pytest.mark.parametrize(
        ("zero_point", "reason"),
        [
            (np.uint8(0), "TensorRT-RTX reads uint8 as int8; use int8"),
            (np.uint8(128), "Non-zero zero point is not supported"),
            (np.int8(3), "Non-zero zero point is not supported"),
        ],
    )
    def test_a_zero_point(self, zero_point: Any, reason: str, tmp_path: Path) -> None:
        nodes = [
            helper.make_node("QuantizeLinear", ["x", "scale", "zero"], ["q"], name="blk/q"),
            helper.make_node("DequantizeLinear", ["q", "scale", "zero"], ["y"], name="blk/dq"),
        ]
        numbers = {"scale": np.array(0.1, np.float32), "zero": np.array(zero_point)}
        found = refusal(write(tmp_path / "m.onnx", nodes, numbers))
        assert found.startswith("QuantizeLinear 'blk/q': ")
        assert found.endswith(reason)

    def test_what_only_the_builder_sees(self, tmp_path: Path) -> None:
        node = helper.make_node("Reshape", ["x", "shape"], ["y"], name="blk/reshape")
        path = write(tmp_path / "m.onnx", [node], {"shape": np.array([0, 5])})
        reason = refusal(path)
        assert "blk/reshape: reshape changes volume. Reshaping [batch,3,8,8] to [batch,5]" in reason
        assert "/_src/" not in reason

    @pytest.mark.parametrize("shape", [["batch", 3, "h", "w"], ["batch", 3, 8, "w"]])
    def test_a_dynamic_side(self, shape: list[int | str], tmp_path: Path) -> None:
        reason = refusal(relu(tmp_path / "m.onnx", shape))
        assert reason.startswith("input 'x' [?, 3, ")
        assert reason.endswith("only the batch may be dynamic")

    @pytest.mark.parametrize("kept", [0, 11, 0.5, 0.99])
    def test_a_truncated_file(self, kept: float, tmp_path: Path) -> None:
        path = tmp_path / "m.onnx"
        whole = TinyVit(Spec()).model().SerializeToString()
        path.write_bytes(whole[: int(kept * len(whole)) if kept < 1 else int(kept)])
        assert refusal(path) == "not an ONNX file, or truncated"

    def test_no_file(self, tmp_path: Path) -> None:
        assert refusal(tmp_path / "none.onnx") == "No such file or directory"
        assert refusal(tmp_path) == "Is a directory"

    @pytest.mark.parametrize("name", ["7", "abc", "9.0", "86", "sm86", "", " 8.6", "8.6,8.9"])
    def test_a_compute_capability(self, name: str, tmp_path: Path) -> None:
        with pytest.raises(InputError, match=r"builds for 7\.5, 8\.0, 8\.6, 8\.9, 12\.0") as caught:
            build_engine(tmp_path / "unread.onnx", compute_capabilities=["8.6", name])
        assert str(caught.value).startswith(f"compute capability {name!r}: ")

    @pytest.mark.parametrize("names", [[], "8.6"])
    def test_no_list_of_compute_capabilities(self, names: Any) -> None:
        with pytest.raises(InputError, match=r"needs a list such as 8\.6,8\.9"):
            build_engine(Path("unread.onnx"), compute_capabilities=names)

    @pytest.mark.parametrize(("tuned", "largest"), [(0, 8), (9, 8), (1, 0)])
    def test_batch_sizes(self, tuned: int, largest: int) -> None:
        with pytest.raises(InputError, match="batch sizes"):
            build_engine(Path("unread.onnx"), opt_batch=tuned, max_batch=largest)
