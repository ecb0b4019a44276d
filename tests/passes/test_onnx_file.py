"""Broken and hostile ONNX files: one clear line that names the file, never a traceback."""

from pathlib import Path

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import pytest
from hypothesis import HealthCheck, given
from hypothesis import strategies as st
from onnx import numpy_helper
from support.canonical import canonical_graph
from support.examples import examples
from support.running import run_graph
from support.tiny_vit import Spec, TinyVit

from regcache.passes.base import run
from regcache.passes.errors import InputError
from regcache.passes.observe import Observe
from regcache.passes.onnx_file import (
    import_graph,
    load_graph,
    load_model,
    save_graph,
    save_model,
    weight_bytes,
)
from regcache.passes.read_graph import read_graph


@pytest.fixture(scope="module")
def vit() -> TinyVit:
    return TinyVit(Spec())


@pytest.fixture
def file(vit: TinyVit, tmp_path: Path) -> Path:
    path = tmp_path / "encoder.onnx"
    onnx.save(vit.model(), path)
    return path


def external(vit: TinyVit, folder: Path) -> Path:
    path = folder / "big.onnx"
    onnx.save(vit.model(), path, save_as_external_data=True, location="big.data", size_threshold=0)
    return path


def refusal(path: Path) -> str:
    with pytest.raises(InputError) as caught:
        load_model(path)
    message = str(caught.value)
    assert str(path) in message
    assert "\n" not in message
    return message


def test_round_trip(vit: TinyVit, file: Path, tmp_path: Path) -> None:
    graph = load_graph(file)
    save_graph(graph, tmp_path / "again.onnx")
    images = vit.images(2)
    for found, wanted in zip(
        run_graph(load_graph(tmp_path / "again.onnx"), images),
        run_graph(graph, images),
        strict=True,
    ):
        np.testing.assert_array_equal(found, wanted)


def test_external_data_round_trip(vit: TinyVit, tmp_path: Path) -> None:
    images = vit.images(1)
    graph = load_graph(external(vit, tmp_path))
    np.testing.assert_allclose(run_graph(graph, images)[0], vit.reference(images)[0], atol=1e-5)


def test_weights_past_two_gigabytes_go_beside_the_file(
    vit: TinyVit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("regcache.passes.onnx_file.LARGEST_SINGLE_FILE", 1000)
    path, data = tmp_path / "large.onnx", tmp_path / "large.onnx.data"
    save_model(vit.model(), path)
    assert (size := data.stat().st_size) > 1000
    assert data.stat().st_mode == path.stat().st_mode
    save_model(vit.model(), path)
    assert data.stat().st_size == size  # not behind what was there
    images = vit.images(1)
    np.testing.assert_allclose(
        run_graph(load_graph(path), images)[0], vit.reference(images)[0], atol=1e-5
    )


@examples(60, ignore=[HealthCheck.function_scoped_fixture])
@given(share=st.floats(0, 0.999))
def test_truncated_files(file: Path, share: float) -> None:
    whole = file.read_bytes()
    cut = file.with_name("cut.onnx")
    cut.write_bytes(whole[: int(len(whole) * share)])
    refusal(cut)


@examples(60, ignore=[HealthCheck.function_scoped_fixture])
@given(noise=st.binary(max_size=200))
def test_noise_is_no_model(tmp_path: Path, noise: bytes) -> None:
    path = tmp_path / "noise.onnx"
    path.write_bytes(noise)
    refusal(path)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_weights_that_are_not_finite(vit: TinyVit, tmp_path: Path, value: float) -> None:
    model = vit.model()
    for weight in model.graph.initializer:
        if weight.name == "0.fc1":
            array = numpy_helper.to_array(weight).copy()
            array[3, 5] = value
            weight.CopyFrom(numpy_helper.from_array(array, weight.name))
    path = tmp_path / "bad.onnx"
    onnx.save(model, path)
    assert "'0.fc1' holds NaN or infinity" in refusal(path)


@pytest.mark.parametrize("location", ["../secret.data", "/etc/passwd", "a/../../secret.data", ""])
def test_external_data_outside_the_folder(vit: TinyVit, tmp_path: Path, location: str) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    (tmp_path / "secret.data").write_bytes(bytes(100_000))
    path = external(vit, folder)
    model = onnx.load(path, load_external_data=False)
    for weight in model.graph.initializer:
        for entry in weight.external_data:
            if entry.key == "location":
                entry.value = location
    path.write_bytes(model.SerializeToString())
    assert "points outside the model's folder" in refusal(path)


def test_external_data_through_a_link_outside(vit: TinyVit, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    path = external(vit, folder)
    (folder / "big.data").rename(tmp_path / "moved.data")
    (folder / "big.data").symlink_to(tmp_path / "moved.data")
    assert "points outside the model's folder" in refusal(path)


def test_external_data_missing_or_short(vit: TinyVit, tmp_path: Path) -> None:
    path = external(vit, tmp_path)
    data = tmp_path / "big.data"
    data.write_bytes(data.read_bytes()[:-8])
    assert "is truncated" in refusal(path)
    data.unlink()
    assert "is missing" in refusal(path)


def test_a_graph_the_checker_refuses(vit: TinyVit, tmp_path: Path) -> None:
    model = vit.model()
    model.graph.node[3].input[0] = "nothing_writes_this"
    path = tmp_path / "broken.onnx"
    path.write_bytes(model.SerializeToString())
    assert "not a valid ONNX graph" in refusal(path)


def test_a_quantized_graph_is_refused(vit: TinyVit, tmp_path: Path) -> None:
    model = vit.model()
    model.graph.node.insert(
        0, onnx.helper.make_node("DynamicQuantizeLinear", ["pixel_values"], ["q", "s", "z"], "ql")
    )
    model.graph.node.insert(
        1, onnx.helper.make_node("DequantizeLinear", ["q", "s", "z"], ["d"], "dq")
    )
    path = tmp_path / "quantized.onnx"
    path.write_bytes(model.SerializeToString())
    assert "quantized already (DynamicQuantizeLinear 'ql')" in refusal(path)
    model.graph.node[0].op_type = "Identity"
    path.write_bytes(model.SerializeToString())
    assert "quantized already (DequantizeLinear 'dq'); bring the float file" in refusal(path)


def test_missing_files_and_folders(tmp_path: Path) -> None:
    assert "No such file" in refusal(tmp_path / "nowhere.onnx")
    assert "directory" in refusal(tmp_path)


def test_saving_where_nothing_can_be_written(vit: TinyVit, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="No such file"):
        save_model(vit.model(), tmp_path / "missing" / "x.onnx")


def test_data_of_an_earlier_file_goes(
    vit: TinyVit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "model.onnx"
    with monkeypatch.context() as patch:
        patch.setattr("regcache.passes.onnx_file.LARGEST_SINGLE_FILE", 1000)
        save_model(vit.model(), path)
    graph = read_graph(path)  # its weights are mapped from the data
    save_graph(graph, path)
    assert [file.name for file in tmp_path.iterdir()] == ["model.onnx"]
    images = vit.images(1)
    np.testing.assert_allclose(
        run_graph(load_graph(path), images)[0], vit.reference(images)[0], atol=1e-5
    )


def test_weight_bytes_counts_every_initializer(vit: TinyVit) -> None:
    model = vit.model()
    wanted = sum(numpy_helper.to_array(weight).nbytes for weight in model.graph.initializer)
    assert weight_bytes(model) == wanted


def test_observe_appends_outputs(vit: TinyVit) -> None:
    graph = canonical_graph(vit.model())
    name = graph.nodes[3].outputs[0].name
    result = run(Observe((name, "pooled")), graph)
    assert [output.name for output in result.graph.outputs] == ["pooled", "last_hidden_state", name]
    assert [(skip.site, skip.reason) for skip in result.log.skips] == [
        ("pooled", "an output already")
    ]
    assert len(result.log.edits) == 1
    assert not run(Observe((name,)), result.graph).changed
    images = vit.images(2)
    for found, wanted in zip(
        run_graph(result.graph, images), run_graph(graph, images), strict=False
    ):
        np.testing.assert_array_equal(found, wanted)
    with pytest.raises(InputError, match="no tensor 'nowhere'"):
        run(Observe(("nowhere",)), graph)
    with pytest.raises(InputError, match="is not known"):
        run(Observe((name,)), import_graph(vit.model()))


def test_constants_are_shared_by_copies(vit: TinyVit) -> None:
    graph = import_graph(vit.model())
    copy = graph.copy()
    for name, tensor in copy.tensors().items():
        if isinstance(tensor, gs.Constant):
            assert tensor.values is graph.tensors()[name].values
