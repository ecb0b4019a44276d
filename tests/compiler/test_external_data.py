"""Weights in files of their own, as past 2 GB: one name each, counted, shipped, removed along."""

import shutil
from pathlib import Path

import onnx
import pytest
from support.command_line import assert_refused, run_regcache
from support.tiny_source import RECIPE, photos
from support.tiny_vit import Spec, TinyVit

from regcache.compiler.artifact.manifest import FileRecord
from regcache.compiler.artifact.read_manifest import read_manifest
from regcache.compiler.engines.update import model_hashes
from regcache.compiler.job.staging import recover
from regcache.export.onnx_file import sidecar
from regcache.passes import onnx_file
from regcache.passes.model_files import data_file, model_files, model_size, remove_model

pytestmark = pytest.mark.slow

SPEC = Spec(width=128, heads=4, hidden=512, depth=1, grid=4)
FAST = ("--registers", "off", "--rounding", "nearest", "--no-equalize", "--accept-slower")
WHOLE = ["README.md", "manifest.json", "model.onnx", "model.onnx.data", "preprocess.json"]


def names(folder: Path) -> list[str]:
    return sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())


def save_external(path: Path, location: str) -> None:
    """Save a tiny encoder, its weights at `location`."""
    model = TinyVit(SPEC).model()
    onnx.save(model, path, save_as_external_data=True, location=location, size_threshold=0)


def compiled(folder: Path, *options: str) -> tuple[Path, str]:
    """An artifact of a source whose data bears the name that the artifact's model has for its own.

    Returns the artifact and what was printed.
    """
    source = folder / "source" / "tiny.onnx"
    source.parent.mkdir(exist_ok=True)
    save_external(source, "model.onnx.data")
    sidecar(source).write_text(RECIPE.to_json())
    images = photos(folder / "calibration", 8, seed=1)
    artifact = folder / "artifact"
    command = ("compile", source, "--images", images, "-o", artifact, "--threads", "1", *FAST)
    outcome = run_regcache(*command, *options)
    assert outcome.code == 0, outcome
    return artifact, outcome.out


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """Compiled as if a file could hold 1,000 bytes."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(onnx_file, "LARGEST_SINGLE_FILE", 1000)
        return compiled(tmp_path_factory.mktemp("large"))


def test_a_data_file_for_each_model(large: tuple[Path, str]) -> None:
    artifact, printed = large
    assert names(artifact) == sorted(["float.onnx", "float.onnx.data", *WHOLE])
    manifest = read_manifest(artifact)
    for model, label in (("model.onnx", "model.onnx"), ("float.onnx", "float")):
        graph = onnx.load(artifact / model, load_external_data=False).graph
        places = {
            entry.value
            for tensor in graph.initializer
            for entry in tensor.external_data
            if entry.key == "location"
        }
        assert places == {f"{model}.data"}
        both = [manifest.files[name].size for name in (model, f"{model}.data")]
        assert both[1] > 4 * both[0]
        assert model_size(artifact / model) == sum(both)
        assert f"{label} {sum(both) / 1e6:.1f} MB" in printed
        assert model_hashes(manifest, model).keys() == {model, f"{model}.data"}
    source = manifest.source.sha256
    assert source == FileRecord.of(artifact / "float.onnx", artifact / "float.onnx.data").sha256
    assert run_regcache("parity", artifact, "--images", artifact.parent / "calibration").code == 0


def test_a_small_source_keeps_no_data_file(tmp_path: Path) -> None:
    artifact, _ = compiled(tmp_path)
    assert names(artifact) == ["README.md", "float.onnx", *WHOLE[1:3], "preprocess.json"]


def test_without_float_nothing_of_it_is_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(onnx_file, "LARGEST_SINGLE_FILE", 1000)
    artifact, printed = compiled(tmp_path, "--no-float")
    assert names(artifact) == WHOLE
    assert ", float " not in printed


def test_bundles_ship_the_model_s_own_weights(large: tuple[Path, str], tmp_path: Path) -> None:
    artifact, _ = large
    triton = tmp_path / "triton"
    assert run_regcache("bundle", artifact, "--format", "triton", "-o", triton).code == 0
    assert names(triton / "tiny" / "1") == ["model.onnx", "model.onnx.data"]
    edge = run_regcache("bundle", artifact, "--format", "ort-edge", "-o", tmp_path / "edge")
    assert_refused(edge, "its weights pass 2 GB, too much for one file")


def test_the_files_of_a_model_are_its_own(tmp_path: Path) -> None:
    """Whatever the characters of its name stand for elsewhere, and whatever lies beside it."""
    model = tmp_path / "m[12]*.onnx"
    save_external(model, data_file(model).name)
    others = ["m1.onnx", "m1.onnx.data", "m[12]*.onnx.data.old", "m[12]*.onnx_"]
    for name in others:
        (tmp_path / name).write_text("another's")
    assert model_files(model) == [model, data_file(model)]
    assert model_size(model) == sum(path.stat().st_size for path in model_files(model))
    remove_model(model)
    assert names(tmp_path) == sorted(others)
    remove_model(model)

    plain = tmp_path / "plain.onnx"
    onnx.save(TinyVit(SPEC).model(), plain)
    shutil.copyfile(plain, data_file(plain))
    assert model_files(plain) == [plain]
    assert model_files(tmp_path / "m1.onnx") == [tmp_path / "m1.onnx"]  # it cannot be read


def test_what_a_killed_run_left_goes_by_its_whole_name(tmp_path: Path) -> None:
    left = {name: tmp_path / f".{name}.staged-x" for name in ("a*", "ab", "a")}
    for folder in left.values():
        folder.mkdir()
        (folder / ".lock").touch()
    recover(tmp_path / "a*")
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(
        left[name].name for name in ("ab", "a")
    )
