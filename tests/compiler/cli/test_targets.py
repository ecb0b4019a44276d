"""`regcache compile` for every target."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import pytest
from onnx import numpy_helper
from support.canonical import canonical_graph
from support.cli_runs import Cli, Compiled
from support.tiny_source import RECIPE, SPEC
from support.tiny_vit import TinyVit

from regcache.export.onnx_file import sidecar
from regcache.passes.find_blocks import view_encoder
from regcache.passes.onnx_file import save_graph

# One worker compiles for all.
pytestmark = pytest.mark.xdist_group("cli")


@pytest.mark.slow
@pytest.mark.parametrize("target", ["ort-cpu", "openvino", "tensorrt", "tensorrt-rtx"])
def test_targets(
    cli: Cli, compiled: Compiled, evaluation: Path, tmp_path: Path, target: str
) -> None:
    artifact = compiled.artifact  # of the default target
    if target != "ort-cpu":
        artifact = tmp_path / "artifact"
        command = ("compile", compiled.encoder, "--images", compiled.calibration, "-o", artifact)
        assert cli(*command, "--target", target).code == 0
    model = onnx.load(artifact / "model.onnx")
    zero_points = [
        numpy_helper.to_array(weight)
        for weight in model.graph.initializer
        if weight.name.endswith("/zero_point")
    ]
    if target not in ("ort-cpu", "openvino"):
        assert {array.dtype for array in zero_points} == {np.dtype(np.int8)}
        assert all((array == 0).all() for array in zero_points)
    else:
        assert np.dtype(np.uint8) in {array.dtype for array in zero_points}
    parity = ("parity", artifact, "--images", evaluation, "--runtime", "onnxruntime")
    assert cli(*parity).code == 0


@pytest.mark.slow
def test_a_packed_projection_is_split_where_that_helps(
    cli: Cli, calibration: Path, tmp_path: Path
) -> None:
    path = tmp_path / "packed.onnx"
    onnx.save(TinyVit(replace(SPEC, qkv="fused")).model(), path)
    sidecar(path).write_text(RECIPE.to_json())
    # TensorRT-RTX takes one linear again, in another form.
    for target, linears in (("ort-cpu", 4), ("openvino", 6), ("tensorrt", 6), ("tensorrt-rtx", 4)):
        artifact = tmp_path / target
        command = ("compile", path, "--images", calibration, "-o", artifact, "--target", target)
        assert cli(*command, "--int8-share", 1).code == 0
        weights = onnx.load(artifact / "model.onnx").graph.initializer
        stored = [
            weight
            for weight in weights
            if weight.name.startswith("blocks.") and weight.name.endswith("/quantized")
        ]
        assert len(stored) == linears * SPEC.depth
        parity = ("parity", artifact, "--images", calibration, "--runtime", "onnxruntime")
        assert cli(*parity).code == 0


def test_what_is_left_slower_is_said(cli: Cli, calibration: Path, tmp_path: Path) -> None:
    """Packed projections with a step behind them that no pass follows."""
    graph = canonical_graph(TinyVit(replace(SPEC, qkv="fused")).model())
    for block in view_encoder(graph).blocks:
        (reshape,) = block.attention.projections[0].output.outputs
        scaled = gs.Variable(f"{block.index}/scaled", np.float32)
        number = gs.Constant(f"{block.index}/number", np.array(1.1, np.float32))
        inputs = [reshape.inputs[0], number]
        graph.nodes.append(gs.Node("Mul", f"{block.index}/scale", {}, inputs, [scaled]))
        reshape.inputs[0] = scaled
    path, artifact = tmp_path / "packed.onnx", tmp_path / "artifact"
    save_graph(graph.toposort(), path)
    sidecar(path).write_text(RECIPE.to_json())
    command = ("compile", path, "--images", calibration, "-o", artifact)
    compiled = cli(*command, "--target", "tensorrt-rtx", "--registers", "off", "--no-equalize")
    assert compiled.code == 0, compiled
    line = (
        f"split_qkv left blocks.0.qkv and {SPEC.depth - 1} more alone: the way to its parts is "
        "none that is known; TensorRT computes it in float"
    )
    assert compiled.err.count(f"warning: {line}\n") == 1
    passes = json.loads((artifact / "manifest.json").read_text())["passes"]
    assert [record["slower"] for record in passes if record["name"] == "split_qkv"] == [[line]]
