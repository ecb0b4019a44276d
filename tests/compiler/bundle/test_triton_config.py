"""config.pbtxt is what Triton's own schema reads, field for field."""

from dataclasses import replace
from pathlib import Path

import onnx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from onnx import TensorProto, helper
from support.triton_schema import parse_config

from regcache.compiler.bundle.triton_config import TensorSpec, TritonConfig, graph_tensors
from regcache.passes.errors import InputError

CONFIG = TritonConfig(
    name="vit",
    backend="onnxruntime",
    gpu=False,
    max_batch=8,
    queue_delay=500,
    inputs=(TensorSpec("pixel_values", "TYPE_FP32", (-1, 3, 16, 16)),),
    outputs=(
        TensorSpec("pooled", "TYPE_FP32", (-1, 32)),
        TensorSpec("tokens", "TYPE_FP16", (-1, -1, 32)),
    ),
)


def test_every_field() -> None:
    config = replace(
        CONFIG,
        gpu=True,
        parameters={"intra_op_thread_count": "3"},
        filename="vit.onnx",
        accelerator={"trt_engine_cache_enable": "1"},
        plans={"8.9": "model-8.9.plan", "12.0": "model-12.0.plan"},
    )
    tensorrt = {"name": "tensorrt", "parameters": {"trt_engine_cache_enable": "1"}}
    assert parse_config(config.to_pbtxt()) == {
        "name": "vit",
        "backend": "onnxruntime",
        "max_batch_size": 8,
        "input": [{"name": "pixel_values", "data_type": "TYPE_FP32", "dims": ["3", "16", "16"]}],
        "output": [
            {"name": "pooled", "data_type": "TYPE_FP32", "dims": ["32"]},
            {"name": "tokens", "data_type": "TYPE_FP16", "dims": ["-1", "32"]},
        ],
        "instance_group": [{"count": 1, "kind": "KIND_GPU"}],
        "dynamic_batching": {
            "preferred_batch_size": [4, 8],
            "max_queue_delay_microseconds": "500",
        },
        "optimization": {"execution_accelerators": {"gpu_execution_accelerator": [tensorrt]}},
        "default_model_filename": "vit.onnx",
        "parameters": {"intra_op_thread_count": {"string_value": "3"}},
        "cc_model_filenames": {"8.9": "model-8.9.plan", "12.0": "model-12.0.plan"},
    }


def test_a_batch_that_the_graph_fixes() -> None:
    fixed = replace(
        CONFIG,
        max_batch=None,
        inputs=(TensorSpec("pixel_values", "TYPE_FP32", (4, 3, 16, 16)),),
        outputs=(TensorSpec("pooled", "TYPE_FP32", (4, 32)),),
    )
    found = parse_config(fixed.to_pbtxt())
    assert "max_batch_size" not in found  # 0 is protobuf's default
    assert "dynamic_batching" not in found
    assert found["input"][0]["dims"] == ["4", "3", "16", "16"]
    assert found["output"][0]["dims"] == ["4", "32"]
    assert "max_batch_size: 0\n" in fixed.to_pbtxt()


@pytest.mark.parametrize(
    ("max_batch", "preferred"), [(1, None), (2, [2]), (3, [2, 3]), (16, [8, 16])]
)
def test_preferred_batches(max_batch: int, preferred: list[int] | None) -> None:
    found = parse_config(replace(CONFIG, max_batch=max_batch).to_pbtxt())
    assert found["max_batch_size"] == max_batch
    assert found.get("dynamic_batching", {}).get("preferred_batch_size") == preferred


@given(st.text())
def test_any_text_survives(text: str) -> None:
    output = (TensorSpec(text, "TYPE_FP32", (-1, 32)),)
    found = parse_config(replace(CONFIG, outputs=output).to_pbtxt())
    assert found["output"][0].get("name", "") == text


def test_reads_the_tensors_of_a_graph(tmp_path: Path) -> None:
    def model(dtype: int, dims: list[str | int | None]) -> Path:
        value = helper.make_tensor_value_info("x", dtype, dims)
        other = helper.make_tensor_value_info("y", dtype, dims)
        node = helper.make_node("Identity", ["x"], ["y"])
        path = tmp_path / "graph.onnx"
        onnx.save(helper.make_model(helper.make_graph([node], "g", [value], [other])), path)
        return path

    found = graph_tensors(model(TensorProto.FLOAT16, ["batch", 3, None]))
    assert found == (
        (TensorSpec("x", "TYPE_FP16", (-1, 3, -1)),),
        (TensorSpec("y", "TYPE_FP16", (-1, 3, -1)),),
    )
    with pytest.raises(InputError, match="'x'"):
        graph_tensors(model(TensorProto.STRING, [1]))
