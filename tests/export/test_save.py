"""Writing a traced model weight by weight gives the file that protobuf itself would write."""

from pathlib import Path

import numpy as np
import onnx
import onnx_ir
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

from regcache.export import save_onnx

# Sizes whose lengths take one, two and three bytes in protobuf's encoding.
WEIGHTS = {
    name: np.random.default_rng(size).standard_normal((1, size), dtype=np.float32)
    for name, size in {"one": 1, "two": 100, "three": 10_000}.items()
}


def model() -> onnx.ModelProto:
    nodes = [helper.make_node("Add", ["x", name], [f"{name}_sum"]) for name in WEIGHTS]
    graph = helper.make_graph(
        nodes,
        "sums",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 1])],
        [
            helper.make_tensor_value_info(f"{n}_sum", TensorProto.FLOAT, ["batch", None])
            for n in WEIGHTS
        ],
        [numpy_helper.from_array(weight, name) for name, weight in WEIGHTS.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


@pytest.mark.parametrize("external", [False, True])
def test_every_weight_is_written(
    external: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    if external:
        monkeypatch.setattr(save_onnx, "LARGEST_SINGLE_FILE", 0)
    path = tmp_path / "m.onnx"
    save_onnx.save_model(onnx_ir.from_proto(model()), path)
    assert [file.name for file in sorted(tmp_path.iterdir())] == (
        ["m.onnx", "m.onnx.data"] if external else ["m.onnx"]
    )
    onnx.checker.check_model(str(path), full_check=True)
    saved = onnx.load(path)
    assert {w.name: w.dims for w in saved.graph.initializer} == {
        name: list(weight.shape) for name, weight in WEIGHTS.items()
    }
    x = np.ones((2, 1), np.float32)
    for name, output in zip(
        WEIGHTS, onnxruntime.InferenceSession(path).run(None, {"x": x}), strict=True
    ):
        np.testing.assert_array_equal(output, x + WEIGHTS[name])
