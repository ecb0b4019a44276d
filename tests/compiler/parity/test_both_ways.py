"""The finished model with registers against the one without: what helps for certain ships."""

from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest
from support.command_line import Outcome, run_regcache
from support.tiny_artifact import write_tiny
from support.tiny_source import SPEC, photos

from regcache.compiler import pipeline
from regcache.compiler.artifact.artifact import Artifact
from regcache.compiler.curation.curate import Curated
from regcache.compiler.curation.decision import Improvement
from regcache.compiler.curation.record import CurationRecord
from regcache.compiler.curation.setting import Setting
from regcache.compiler.parity import both_ways
from regcache.runtime.images import read_image
from regcache.runtime.list_images import list_images

pytestmark = pytest.mark.xdist_group("both_ways")

SETTING = Setting(candidates=(0, 1), start=0, end=2)
TOKENS = np.random.default_rng(0).standard_normal((2, SPEC.width)).astype(np.float32)
COUNT = 26
WAYS: dict[str, tuple[object, ...]] = {
    "ort-cpu": ("--target", "ort-cpu"),
    "tensorrt": ("--target", "tensorrt-rtx"),
    "bound": ("--min-cosine", 0.9),
}


def found(setting: Setting = SETTING) -> Curated:
    """What a search might have found, though it helps nobody."""
    record = CurationRecord(reason="Registers: found by the test", setting=setting)
    return Curated(setting, TOKENS[: setting.count], record)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("both_ways")
    photos(folder / "photos", COUNT, seed=1)
    write_tiny(folder, depth=2)
    return folder


def compile_to(folder: Path, out: Path, *options: object) -> Outcome:
    images = ("--images", folder / "photos", "--threads", 1, "--accept-slower")
    return run_regcache("compile", folder / "tiny.onnx", *images, *options, "-o", out)


@pytest.mark.parametrize("way", WAYS)
def test_registers_that_the_finished_model_does_not_need_are_overruled(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, way: str
) -> None:
    plain = compile_to(folder, tmp_path / "plain", "--registers", "off", *WAYS[way])
    assert plain.code == 0, plain
    monkeypatch.setattr(pipeline, "find_registers", lambda *_: found())
    done = compile_to(folder, tmp_path / "done", *WAYS[way])
    assert done.code == 0, done
    record = Artifact.open(tmp_path / "done").manifest.curation
    assert record.setting == Setting()
    assert record.reason.startswith("Registers: none after all (they do not help the finished")
    assert done.err.count("none after all") == 1
    assert record.finished is not None
    assert not record.finished.certain
    assert record.finished.without < record.finished.with_setting
    names = {path.name for path in (tmp_path / "done").iterdir()}
    assert names == {path.name for path in (tmp_path / "plain").iterdir()}
    model = "model.onnx"
    assert (tmp_path / "done" / model).read_bytes() == (tmp_path / "plain" / model).read_bytes()


def test_the_errors_are_those_of_the_finished_models(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pipeline, "find_registers", lambda *_: found())
    assert compile_to(folder, tmp_path / "out").code == 0
    opened = Artifact.open(tmp_path / "out")
    images = np.stack([read_image(path, opened.recipe) for path in list_images(folder / "photos")])
    decide = np.concatenate([images[2::4], images[3::4]])
    # twice as many as were left to fit and to rank
    pooled = []
    for path in (opened.float_model, tmp_path / "out" / "model.onnx"):
        session = ort.InferenceSession(path, providers=["CPUExecutionProvider"])
        (vector,) = session.run(["pooled"], {session.get_inputs()[0].name: decide})
        pooled.append(vector.astype(np.float64))
    reference, quantized = pooled
    cosines = (reference * quantized).sum(1)
    cosines /= np.linalg.norm(reference, axis=1) * np.linalg.norm(quantized, axis=1)
    finished = opened.manifest.curation.finished
    assert finished is not None
    assert finished.n_images == len(decide)
    assert finished.without == pytest.approx(1 - cosines.mean(), rel=0.02)


def test_registers_that_help_ship(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gain: dict[str, Any] = {"gain": 0.1, "gain_low": 0.05, "gain_high": 0.2}
    certain = Improvement(n_images=12, without=0.3, with_setting=0.2, **gain)
    monkeypatch.setattr(pipeline, "find_registers", lambda *_: found())
    monkeypatch.setattr(both_ways, "_improvement", lambda *_: certain)
    done = compile_to(folder, tmp_path / "out")
    assert done.code == 0, done
    record = Artifact.open(tmp_path / "out").manifest.curation
    assert (record.setting, record.reason) == (SETTING, "Registers: found by the test")
    assert record.finished == certain
    assert "after all" not in done.err
    np.testing.assert_array_equal(np.load(tmp_path / "out" / "registers.npz")["tokens"], TOKENS)


def test_without_registers_nothing_is_compared(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pipeline, "find_registers", lambda *_: found(Setting()))
    monkeypatch.setattr(pipeline, "choose_way", lambda *_: pytest.fail("is not needed"))
    done = compile_to(folder, tmp_path / "out")
    assert done.code == 0, done
    assert Artifact.open(tmp_path / "out").manifest.curation.finished is None
