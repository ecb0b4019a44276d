"""Adding engines to an artifact: whole or not at all, and never to another artifact."""

import os
import shutil
import signal
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from support.command_line import run_regcache
from support.engine_artifacts import compiled, engine_record
from support.tiny_source import photos

from regcache.compiler.artifact.artifact import Artifact
from regcache.compiler.artifact.manifest import Manifest
from regcache.compiler.engines.update import NewEngine, add_engines
from regcache.passes.errors import InputError

pytestmark = pytest.mark.slow

ONE, TWO = "engines/one.engine", "engines/two.engine"


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("original")
    images = photos(folder / "images", 8, seed=1)
    return compiled(folder, images, "--target", "tensorrt")


@pytest.fixture
def artifact(original: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(original, tmp_path / "artifact"))


def add(artifact: Path, opened: Manifest, file: str, content: bytes) -> Manifest:
    return add_engines(artifact, opened, [NewEngine(engine_record(file), content)])


def test_engines_of_two_builds_at_once_are_both_kept(artifact: Path) -> None:
    opened = Artifact.open(artifact).manifest
    add(artifact, opened, TWO, b"2")
    returned = add(artifact, opened, ONE, b"1")
    found = Artifact.open(artifact).manifest
    assert found == returned
    assert [record.file for record in found.engines] == [ONE, TWO]
    assert list(found.files) == sorted(found.files)
    assert (artifact / TWO).read_bytes() == b"2"


def test_two_builds_that_end_together_lose_no_engine(original: Path, tmp_path: Path) -> None:
    """Each opens the artifact before the other has added its engine to it."""
    together = threading.Barrier(2, timeout=30)
    for number in range(10):
        artifact = Path(shutil.copytree(original, tmp_path / f"artifact{number}"))
        opened = Artifact.open(artifact).manifest

        def build(file: str, artifact: Path = artifact, opened: Manifest = opened) -> None:
            together.wait()
            add(artifact, opened, file, file.encode())

        with ThreadPoolExecutor(2) as pool:
            list(pool.map(build, [ONE, TWO]))
        records = Artifact.open(artifact).manifest.engines
        assert [record.file for record in records] == [ONE, TWO]
    assert len(list(tmp_path.iterdir())) == 10


def test_an_engine_takes_the_place_of_its_namesake(artifact: Path) -> None:
    opened = Artifact.open(artifact).manifest
    add(artifact, opened, ONE, b"old")
    os.link(artifact / ONE, artifact.parent / "kept")
    add(artifact, opened, ONE, b"new")
    assert (artifact / ONE).read_bytes() == b"new"
    assert (artifact.parent / "kept").read_bytes() == b"old"
    assert len(Artifact.open(artifact).manifest.engines) == 1


def test_an_artifact_that_was_compiled_again_gets_no_old_engine(
    artifact: Path, tmp_path: Path
) -> None:
    opened = Artifact.open(artifact).manifest
    images = photos(tmp_path / "images", 8, seed=2)
    other = (artifact.parent / "tiny.onnx", "--images", images, "-o", artifact, "--no-equalize")
    shutil.copy(artifact / "float.onnx", artifact.parent / "tiny.onnx")
    preprocess = shutil.copy(artifact / "preprocess.json", tmp_path / "preprocess.json")
    options = ("--target", "tensorrt", "--registers", "off", "--preprocess", preprocess)
    assert run_regcache("compile", *other, *options).code == 0
    with pytest.raises(InputError, match="was compiled again during the build"):
        add(artifact, opened, ONE, b"1")
    assert not Artifact.open(artifact).manifest.engines


def test_a_file_system_without_links_gets_copies(
    artifact: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(source: str, target: str) -> None:
        raise OSError(95, os.strerror(95), source, None, target)

    inode = (artifact / "model.onnx").stat().st_ino
    monkeypatch.setattr(os, "link", refuse)
    add(artifact, Artifact.open(artifact).manifest, ONE, b"1")
    assert (artifact / "model.onnx").stat().st_ino != inode
    monkeypatch.undo()
    inode = (artifact / "model.onnx").stat().st_ino
    add(artifact, Artifact.open(artifact).manifest, TWO, b"2")
    assert (artifact / "model.onnx").stat().st_ino == inode


KILLED = """
import pathlib, sys, time
from regcache.compiler.engines.update import NewEngine, add_engines
from regcache.compiler.artifact.engine_record import EngineRecord
from regcache.compiler.artifact.manifest import Manifest
from regcache.compiler.artifact.read_manifest import read_manifest
write = Manifest.write
def write_and_wait(manifest, folder):
    write(manifest, folder)
    print("ready", flush=True)
    time.sleep(60)
Manifest.write = write_and_wait
folder = pathlib.Path(sys.argv[1])
record = EngineRecord.model_validate_json(sys.argv[2])
add_engines(folder, read_manifest(folder), [NewEngine(record, b"half")])
"""


@pytest.mark.skipif(os.name == "nt", reason="needs POSIX signals")
def test_a_kill_leaves_the_old_artifact(artifact: Path) -> None:
    opened = Artifact.open(artifact).manifest
    command = [sys.executable, "-c", KILLED, str(artifact), engine_record(ONE).model_dump_json()]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"ready\n"
        process.send_signal(signal.SIGKILL)
    assert Artifact.open(artifact).manifest == opened
    assert len(list(artifact.parent.iterdir())) == 3  # its temporary folder, and the lock's file
    add(artifact, opened, TWO, b"2")
    assert [path.name for path in artifact.parent.iterdir()] == ["artifact"]
