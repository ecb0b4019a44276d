"""An artifact that is replaced while it is opened is one of the two, never half of each."""

import shutil
import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from support.tiny_artifact import tiny_artifact

import regcache
from regcache.compiler.artifact import artifact as artifact_module
from regcache.compiler.artifact.artifact import Artifact, ReplacedError
from regcache.compiler.bundle.edge import bundle_edge
from regcache.compiler.job.staging import staged_folder
from regcache.runtime.session import OrtSession

BLACK = np.zeros((16, 16, 3), np.uint8)


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    return [tiny_artifact(tmp_path_factory.mktemp("two"), depth=depth) for depth in (1, 2)]


@pytest.fixture
def output(two: list[Path], tmp_path: Path) -> Path:
    return Path(shutil.copytree(two[0], tmp_path / "artifact"))


def replace(output: Path, by: Path) -> None:
    with staged_folder(output) as staging:
        shutil.copytree(by, staging, dirs_exist_ok=True)


def hash_of(artifact: Path) -> str:
    return Artifact.open(artifact).manifest.files["model.onnx"].sha256


def once(before: Callable[[], None], call: Callable[..., object]) -> Callable[..., object]:
    """`call`, with something done before it is called for the first time."""
    waiting = [before]

    def wrapped(*arguments: object, **keywords: object) -> object:
        while waiting:
            waiting.pop()()
        return call(*arguments, **keywords)

    return wrapped


@pytest.mark.parametrize("step", ["read_manifest", "Preprocess.from_json", "open_session"])
def test_what_is_loaded_is_what_the_manifest_says(
    two: list[Path], output: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    holder, _, name = f".{step}".rpartition(".")
    target = getattr(artifact_module, holder[1:]) if holder[1:] else artifact_module
    original = getattr(target, name)
    monkeypatch.setattr(target, name, once(lambda: replace(output, two[1]), original))
    with regcache.load(output) as encoder, regcache.load(two[1]) as wanted:
        assert encoder.manifest == wanted.manifest
        np.testing.assert_array_equal(encoder.embed(BLACK), wanted.embed(BLACK))


def test_one_that_is_replaced_for_ever_is_said_to_be(
    two: list[Path], output: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def replaced(*arguments: object, **keywords: object) -> OrtSession:
        replace(output, two[1])
        return OrtSession(two[1] / "model.onnx")

    monkeypatch.setattr(artifact_module, "open_session", replaced)
    monkeypatch.setattr("regcache.compiler.artifact.embedder._TRIES", 2)
    with pytest.raises(ReplacedError, match="was replaced while it was read; try again"):
        regcache.load(output)


def test_a_bundle_is_of_one_artifact(two: list[Path], output: Path, tmp_path: Path) -> None:
    opened = Artifact.open(output)
    replace(output, two[1])
    with pytest.raises(ReplacedError):
        bundle_edge(opened, tmp_path / "bundle")
    assert not (tmp_path / "bundle").exists()


@pytest.mark.parametrize("exchanges", [True, False])
def test_loading_while_another_replaces(
    two: list[Path], output: Path, monkeypatch: pytest.MonkeyPatch, exchanges: bool
) -> None:
    """Without an exchange in one step there is an instant in which nothing is there."""
    if not exchanges:
        monkeypatch.setattr("regcache.compiler.job.staging.exchange", lambda one, other: False)
    wanted = {}
    for artifact in two:
        with regcache.load(artifact) as encoder:
            wanted[hash_of(artifact)] = encoder.embed(BLACK)
    over = threading.Event()

    def keep_replacing() -> None:
        number = 0
        while not over.wait(0.02):
            number += 1
            replace(output, two[number % 2])

    thread = threading.Thread(target=keep_replacing)
    thread.start()
    try:
        for _ in range(12):
            with regcache.load(output) as encoder:
                sha256 = encoder.manifest.files["model.onnx"].sha256
                np.testing.assert_array_equal(encoder.embed(BLACK), wanted[sha256])
    finally:
        over.set()
        thread.join()
