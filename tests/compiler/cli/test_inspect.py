"""`regcache inspect` on a tiny encoder."""

import json
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from support.cli_runs import Cli
from support.tiny_source import RECIPE, SPEC

# One worker compiles for all.
pytestmark = pytest.mark.xdist_group("cli")


def test_inspect_prints_blocks_and_outliers(
    cli: Cli, encoder: Path, calibration: Path, tmp_path: Path
) -> None:
    plain = cli("inspect", encoder)
    assert plain.code == 0
    assert f"{SPEC.depth} blocks" in " ".join(plain.out.split())
    found = cli("inspect", encoder, "--images", calibration, "--json", "-")
    assert found.code == 0
    report = json.loads(found.out)
    assert report["n_images"] == 12
    assert report["tokens"] == 17
    _check_inspection(report, encoder, calibration)
    table = cli("inspect", encoder, "--images", calibration)
    assert "Residual stream" in table.out
    assert "fc2" in table.out


def _check_inspection(report: dict[str, object], encoder: Path, calibration: Path) -> None:
    """The numbers against numpy over the activations of all images at once."""
    from regcache.runtime.images import ImageFolder
    from regcache.runtime.list_images import list_images

    (batch,) = ImageFolder(list_images(calibration), RECIPE, batch_size=99)
    model = onnx.load(encoder)
    add = [node for node in model.graph.node if node.op_type == "Add"][-2].output[0]
    block = report["blocks"][-1]  # type: ignore[index]
    assert set(block["linears"]) == {"q", "k", "v", "out", "fc1", "fc2"}
    name = next(
        node.input[0] for node in reversed(model.graph.node) if node.op_type == "LayerNormalization"
    )
    model.graph.output.append(onnx.helper.make_tensor_value_info(name, 1, None))
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    stream = session.run([name], {"pixel_values": batch.images})[0]
    assert add
    peaks = np.abs(stream).max(axis=-1)
    found = block["stream"]
    assert found["linf"]["maximum"] == pytest.approx(peaks.max(), rel=1e-4)
    assert found["linf"]["median"] == pytest.approx(np.median(peaks), rel=0.05)
    first = found["outliers"][0]
    image, token = np.unravel_index(peaks.argmax(), peaks.shape)
    assert first["token"] == token
    assert first["image"] == batch.paths[int(image)].name
    assert first["kind"] == ("class" if token == 0 else "patch")
    assert first["channel"] == np.abs(stream[image, token]).argmax()
