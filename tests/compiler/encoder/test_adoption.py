"""A file becomes float.onnx and is held against its original: what differs is not shipped."""

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import pytest
from onnx import TensorProto, helper, numpy_helper
from rich.console import Console
from support.adopted_graphs import VIT, masked, mixing
from support.small_models import Draft, bake
from support.tiny_vit import Spec, TinyVit

from regcache.compiler.encoder.adoption import adopt_file
from regcache.compiler.reporter import Reporter
from regcache.export.onnx_file import OnnxFileSource, sidecar
from regcache.passes.base import Log
from regcache.passes.errors import InputError
from regcache.passes.free_batch import FreeBatch
from regcache.passes.preprocess import Preprocess
from regcache.runtime.session import OrtSession

SIZE = VIT.spec.size
RECIPE = Preprocess(SIZE, SIZE, "squash", (SIZE, SIZE), "bicubic", (0.5, 0.5, 0.5), (0.2, 0.2, 0.2))


class Told(Reporter):
    """What was said."""

    def __init__(self) -> None:
        self.text = io.StringIO()
        super().__init__(Console(file=self.text, soft_wrap=True, width=500))

    @property
    def lines(self) -> list[str]:
        return self.text.getvalue().splitlines()


@pytest.fixture
def adopt(tmp_path: Path) -> Callable[..., list[str]]:
    """Adopt a model; returns what was said. The result lies at `tmp_path`/float.onnx."""

    def run(model: onnx.ModelProto, **options: Any) -> list[str]:
        path, told = tmp_path / "theirs.onnx", Told()
        path.write_bytes(model.SerializeToString())
        source = OnnxFileSource("theirs.onnx", path)
        resolution = options.pop("resolution", None)
        adopt_file(source, tmp_path / "float.onnx", resolution, told, threads=1, **options)
        return told.lines

    return run


Adopt = Callable[..., list[str]]


def assert_computes(path: Path, vit: TinyVit, batches: tuple[int, ...] = (1, 3, 8)) -> None:
    with OrtSession(path, threads=1) as session:
        for batch in batches:
            images = vit.images(batch)
            found = dict(zip(session.output_names, session.run(images), strict=True))
            wanted = dict(zip(("pooled", "last_hidden_state"), vit.reference(images), strict=True))
            for name, values in found.items():
                np.testing.assert_allclose(values, wanted[name], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("batch", "label"), [(None, None), (1, None), (2, None), (8, None), (1, "n"), (8, "n")]
)
def test_a_file_that_agrees_is_written_in_silence(
    batch: int | None, label: str | None, adopt: Adopt, tmp_path: Path
) -> None:
    """Its original is run with the batch that it holds."""
    model = VIT.model() if batch is None else bake(VIT.model(), batch, label)
    assert adopt(model) == []
    assert_computes(tmp_path / "float.onnx", VIT)
    assert not list(tmp_path.glob("*.data"))


def test_notes_are_warnings_that_name_the_source(adopt: Adopt, tmp_path: Path) -> None:
    (line,) = adopt(masked("kept"))
    assert line == "warning: theirs.onnx: takes the image alone: mask = 1, which masks nothing"
    assert_computes(tmp_path / "float.onnx", VIT)


def test_a_batch_that_stays_is_explained(adopt: Adopt, tmp_path: Path) -> None:
    (line,) = adopt(mixing(4))
    assert line.startswith("warning: theirs.onnx: compiled for its batch of 4 alone, which cannot")
    with OrtSession(tmp_path / "float.onnx", threads=1) as session:
        assert session.fixed_batch == 4


def _freed_wrongly(self: FreeBatch, graph: gs.Graph) -> Log:
    """As it should be, but that the class tokens are doubled."""
    log = _rewrite(self, graph)
    if log.edits:
        position = next(item for item in graph.tensors().values() if item.name == "position")
        position.values = position.values * 2
    return log


_rewrite = FreeBatch.rewrite


def test_a_batch_freed_wrongly_is_kept_instead(
    adopt: Adopt, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(FreeBatch, "rewrite", _freed_wrongly)
    for model in (bake(VIT.model(), 2), bake(VIT.model(), 3, "n")):
        (line,) = adopt(model)
        assert "compiled for its batch of" in line
        assert_computes(tmp_path / "float.onnx", VIT, (1, 2))


@pytest.mark.slow
def test_what_computes_something_else_is_refused(
    adopt: Adopt, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where no batch was freed there is nothing to fall back to."""
    from regcache.passes.to_float32 import ToFloat32

    def halved(self: ToFloat32, graph: gs.Graph) -> Log:
        position = next(item for item in graph.tensors().values() if item.name == "position")
        position.values = position.values / 2
        return Log()

    monkeypatch.setattr(ToFloat32, "rewrite", halved)
    wanted = (
        r"theirs\.onnx: rewritten, its output 'pooled' differs by \d.*; please report this file"
    )
    for model in (VIT.model(), bake(VIT.model(), 2)):
        with pytest.raises(InputError, match=wanted):
            adopt(model)
        assert adopt(model, verify=False) == []


def test_an_original_that_does_not_run_is_said(adopt: Adopt, tmp_path: Path) -> None:
    """It takes numbers of a kind besides that are not made up."""
    model = VIT.model()
    model.graph.node.append(helper.make_node("Identity", ["words"], ["text"]))
    for ends, name in ((model.graph.input, "words"), (model.graph.output, "text")):
        ends.append(helper.make_tensor_value_info(name, TensorProto.INT8, ["n"]))
    lines = adopt(model)
    assert lines[0].startswith("warning: theirs.onnx: could not be run to check its rewritten form")
    assert len(lines) == 2
    assert_computes(tmp_path / "float.onnx", VIT)


@pytest.mark.parametrize("batch", [None, 1, 2])
def test_outputs_without_a_row_for_each_image_are_not_compared(
    batch: int | None, adopt: Adopt, tmp_path: Path
) -> None:
    """A score of the whole batch beside the embedding: the batch is not freed for it."""
    model = VIT.model() if batch is None else bake(VIT.model(), batch)
    model.graph.node.append(
        helper.make_node("ReduceMean", ["pooled"], ["score"], "mean", keepdims=0)
    )
    model.graph.output.append(helper.make_tensor_value_info("score", TensorProto.FLOAT, None))
    lines = adopt(model)
    assert len(lines) == (0 if batch is None else 1)
    with OrtSession(tmp_path / "float.onnx", threads=1) as session:
        assert session.output_names == ["pooled", "last_hidden_state", "score"]
        assert session.fixed_batch == batch


def test_half_precision_may_stray_further(adopt: Adopt, tmp_path: Path) -> None:
    model = TinyVit(Spec()).model()
    for tensor in model.graph.initializer:
        values = numpy_helper.to_array(tensor)
        if values.dtype == np.float32:
            tensor.CopyFrom(numpy_helper.from_array(values.astype(np.float16), tensor.name))
    for value in (*model.graph.input, *model.graph.output):
        value.type.tensor_type.elem_type = TensorProto.FLOAT16
    (line,) = adopt(model)
    assert "its weights are taken in FP32" in line
    with OrtSession(tmp_path / "float.onnx", threads=1) as session:
        (found, _) = session.run(VIT.images(3))
    np.testing.assert_allclose(found, TinyVit(Spec()).reference(VIT.images(3))[0], atol=0.02)


def test_recipes_give_the_size_that_the_file_leaves_open(adopt: Adopt, tmp_path: Path) -> None:
    model = VIT.model()
    for dim in model.graph.input[0].type.tensor_type.shape.dim[2:]:
        dim.Clear()
    with pytest.raises(InputError, match="add --resolution PIXELS"):
        adopt(model)
    assert adopt(model, resolution=SIZE) == []
    assert adopt(model, recipe=RECIPE) == []
    sidecar(tmp_path / "theirs.onnx").write_text(RECIPE.to_json())
    assert adopt(model) == []
    assert_computes(tmp_path / "float.onnx", VIT)


def test_weights_past_two_gigabytes_go_beside_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Under the new file's own name, whatever the source called them."""
    monkeypatch.setattr("regcache.passes.onnx_file.LARGEST_SINGLE_FILE", 1000)
    path, folder = tmp_path / "theirs.onnx", tmp_path / "out"
    onnx.save(VIT.model(), path, save_as_external_data=True, location="d.bin", size_threshold=0)
    folder.mkdir()
    adopt_file(OnnxFileSource("theirs.onnx", path), folder / "float.onnx", None, Told(), threads=1)
    assert sorted(file.name for file in folder.iterdir()) == ["float.onnx", "float.onnx.data"]
    assert_computes(folder / "float.onnx", VIT)


def test_refusals_name_the_source_not_the_path(adopt: Adopt, tmp_path: Path) -> None:
    draft = Draft()
    model = draft.model({"image": [1, 3, 4, 4]}, [draft.node("Relu", "image")], opset=99)
    with pytest.raises(InputError, match=r"^theirs\.onnx: opset 99 is newer"):
        adopt(model)
    assert not (tmp_path / "float.onnx").exists()
