"""Manifests that somebody forged: a seal has no key, so nothing that they say is believed."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.command_line import assert_refused, run_regcache
from support.engine_artifacts import engine_record
from support.mutations import copy_artifact, forge
from support.tiny_artifact import tiny_artifact
from support.tiny_source import photos

from regcache.compiler.artifact.artifact import Artifact
from regcache.compiler.artifact.engine_record import EngineKind
from regcache.compiler.artifact.seal import seal
from regcache.compiler.job.staging import MANIFEST
from regcache.passes.errors import InputError


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_artifact(tmp_path_factory.mktemp("original"))


@pytest.fixture
def artifact(original: Path, tmp_path: Path) -> Path:
    return copy_artifact(original, tmp_path / "artifact")


def rewrite(artifact: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Change the manifest, and seal it again as whoever wrote it can."""
    path = artifact / MANIFEST
    fields = json.loads(path.read_text())
    del fields["sha256"]
    change(fields)
    path.write_text(seal(json.dumps(fields, indent=2)))


@pytest.mark.parametrize("file", ["/etc/hostname", "../../secret", "engines/missing.engine"])
def test_an_engine_is_a_file_of_the_artifact(artifact: Path, tmp_path: Path, file: str) -> None:
    """An absolute path went into a bundle, `..` was a traceback."""
    record = json.loads(engine_record(file, engine=EngineKind.TENSORRT).model_dump_json())
    rewrite(artifact, lambda fields: fields.update(engines=[record]))
    for command in (
        ("build", artifact),
        ("bundle", artifact, "--format", "triton", "--engine", "-o", tmp_path / "bundle"),
        ("parity", artifact, "--images", artifact.parent),
    ):
        assert_refused(run_regcache(*command), "not among its files")
    assert not (tmp_path / "bundle").exists()


def test_a_manifest_below_the_artifact_is_a_file_like_others(artifact: Path) -> None:
    (artifact / "notes").mkdir()
    (artifact / "notes" / MANIFEST).write_text("{}")
    with pytest.raises(InputError, match=r"notes/manifest\.json: not in the manifest"):
        Artifact.open(artifact)


@pytest.mark.skipif(os.name == "nt", reason="needs named pipes")
def test_a_pipe_is_not_waited_for(artifact: Path) -> None:
    os.mkfifo(artifact / "pipe")
    with pytest.raises(InputError, match="pipe: is no regular file"):
        Artifact.open(artifact)
    (artifact / MANIFEST).unlink()
    os.mkfifo(artifact / MANIFEST)
    with pytest.raises(InputError, match=r"manifest\.json: is no regular file"):
        Artifact.open(artifact)


def test_a_manifest_that_is_nested_too_deeply_is_refused(artifact: Path) -> None:
    (artifact / MANIFEST).write_text("[" * 100_000 + "]" * 100_000)
    with pytest.raises(InputError, match="nested too deeply"):
        Artifact.open(artifact)


def test_the_float_original_is_the_source(artifact: Path) -> None:
    model = artifact / "float.onnx"
    model.write_bytes(model.read_bytes() + b"\0")
    forge(artifact)
    with pytest.raises(InputError, match=r"float\.onnx: is not the source"):
        Artifact.open(artifact)


@pytest.mark.torch
def test_parity_asks_no_hub_for_what_a_manifest_names(
    artifact: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only --reference pytorch does; the manifest's writer has no say in it."""
    from huggingface_hub import constants

    asked: list[bool] = []

    def reference(*_: object, **__: object) -> None:
        asked.append(constants.HF_HUB_OFFLINE)
        raise InputError("no such checkpoint")

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr("regcache.export.huggingface.HuggingFaceSource.reference", reference)
    rewrite(artifact, lambda fields: fields["options"].update(source="hf:some/model"))
    command = ("parity", artifact, "--images", photos(artifact.parent / "images", 3, seed=4))
    found = run_regcache(*command)
    assert found.code == 0
    assert "--reference pytorch fetches what is missing" in found.err
    assert_refused(run_regcache(*command, "--reference", "pytorch"), "no such checkpoint")
    assert asked == [True, False]
    assert constants.HF_HUB_OFFLINE is False
