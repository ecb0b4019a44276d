"""What the manifest says of an engine, and what decides whether to build it again."""

import pytest
from pydantic import ValidationError
from support.engine_artifacts import engine_build, engine_record

from regcache.compiler.artifact.engine_record import (
    EngineKind,
    EngineRecord,
    inputs_key,
    with_size_ratios,
)


def test_counts_and_names() -> None:
    record = EngineRecord.of(
        engine_build(), model="model.onnx", engine=EngineKind.TENSORRT_RTX, inputs="ab"
    )
    assert record.file == "engines/model-tensorrt-rtx-8.6-12.0-batch-1-1-8.engine"
    assert record.products == {"INT8": 1, "FP16": 1}
    assert record.layers == {"INT8": 1, "FP16": 1, "FP32": 1}
    assert record.fused_attentions == 1
    assert record.warnings == ["beware"]
    assert record.rewrite is None
    assert EngineRecord.model_validate_json(record.model_dump_json()) == record
    with pytest.raises(ValidationError):
        EngineRecord.model_validate({**record.model_dump(), "seconds": 3.0})


def test_a_gpu_names_a_tensorrt_engine() -> None:
    tuned = engine_build((2, 2, 2), gpu="NVIDIA GeForce RTX 4090")
    record = EngineRecord.of(tuned, model="float.onnx", engine=EngineKind.TENSORRT, inputs="ab")
    assert record.file == "engines/float-tensorrt-nvidia-geforce-rtx-4090-batch-2-2-2.engine"
    assert record.gpu == "NVIDIA GeForce RTX 4090"


def test_every_input_changes_the_key() -> None:
    hashes, options = {"model.onnx": "aa"}, {"version": "1.7", "max_batch": 8}
    keys = {
        inputs_key(hashes, options),
        inputs_key({"model.onnx": "ab"}, options),
        inputs_key({**hashes, "model.onnx.data": "aa"}, options),
        inputs_key(hashes, {**options, "version": "1.8"}),
        inputs_key(hashes, {**options, "max_batch": 4}),
        inputs_key(hashes, {**options, "compute_capabilities": ("8.6",)}),
    }
    assert len(keys) == 6
    assert inputs_key(hashes, dict(reversed(options.items()))) == inputs_key(hashes, options)


def test_ratios_are_to_the_float_engine_built_alike() -> None:
    sizes = {"a": 40, "b": 100, "c": 30}
    records = [
        engine_record("c", batch=(1, 1, 4)),
        engine_record("b", "float.onnx"),
        engine_record("a"),
    ]
    found = with_size_ratios(records, sizes, "float.onnx")
    assert [record.file for record in found] == ["a", "b", "c"]
    assert [record.size_ratio for record in found] == [0.4, None, None]
    assert with_size_ratios(found[:1], sizes, "float.onnx")[0].size_ratio is None
