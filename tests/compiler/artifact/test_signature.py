"""Who signed an artifact, by OpenSSH's own word."""

import shutil
import subprocess
from pathlib import Path

import pytest
from support.command_line import assert_refused, run_regcache
from support.engine_artifacts import engine_record
from support.mutations import copy_artifact, forge
from support.tiny_artifact import tiny_artifact

import regcache
from regcache.compiler.artifact.artifact import Artifact
from regcache.compiler.artifact.signature import SIGNATURE, sign
from regcache.compiler.engines.update import NewEngine, add_engines
from regcache.passes.errors import InputError

pytestmark = pytest.mark.skipif(shutil.which("ssh-keygen") is None, reason="needs OpenSSH")


def make_key(folder: Path, name: str) -> Path:
    command = ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(folder / name)]
    subprocess.run(command, check=True)
    return folder / name


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("keys")
    return [make_key(folder, name) for name in ("ours", "theirs")]


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory, keys: list[Path]) -> Path:
    """Signed as it was compiled."""
    return tiny_artifact(tmp_path_factory.mktemp("signed"), "--sign", str(keys[0]))


@pytest.fixture
def artifact(original: Path, tmp_path: Path) -> Path:
    return copy_artifact(original, tmp_path / "artifact")


def public(key: Path) -> Path:
    return key.with_name(f"{key.name}.pub")


def test_what_was_signed_opens_with_the_key_of_its_signer(
    artifact: Path, keys: list[Path], tmp_path: Path
) -> None:
    ours, theirs = map(public, keys)
    regcache.load(artifact, verify=ours).close()
    regcache.load(artifact).close()  # who does not ask is told nothing
    for command in (
        ("parity", artifact, "--images", tmp_path),
        ("bundle", artifact, "--format", "ort-edge", "-o", tmp_path / "bundle"),
        ("build", artifact),
        ("bench", artifact),
    ):
        outcome = run_regcache(*command, "--verify", theirs)
        assert_refused(outcome, "was not signed by the key of", theirs.name)
    bundled = run_regcache(*("bundle", artifact, "--format", "ort-edge"), "-o", tmp_path / "bundle",
                           "--verify", ours)  # fmt: skip
    assert bundled.code == 0
    assert not (tmp_path / "bundle" / SIGNATURE).exists()


def test_a_forger_with_a_seal_has_no_signature(artifact: Path, keys: list[Path]) -> None:
    model = artifact / "model.onnx"
    model.write_bytes(model.read_bytes() + b"\0")
    forge(artifact)
    Artifact.open(artifact)  # its seal is whole
    with pytest.raises(InputError, match="was not signed by the key of"):
        Artifact.open(artifact, verify=public(keys[0]))
    sign(artifact, keys[1])
    with pytest.raises(InputError, match="was not signed by the key of"):
        Artifact.open(artifact, verify=public(keys[0]))
    (artifact / SIGNATURE).unlink()
    with pytest.raises(InputError, match="is not signed"):
        Artifact.open(artifact, verify=public(keys[0]))


def test_a_change_of_a_signed_artifact_is_signed_or_refused(
    artifact: Path, keys: list[Path]
) -> None:
    opened = Artifact.open(artifact).manifest
    new = [NewEngine(engine_record("engines/one.engine"), b"1")]
    with pytest.raises(InputError, match="is signed, and a change would break that"):
        add_engines(artifact, opened, new)
    add_engines(artifact, opened, new, keys[1])
    assert len(Artifact.open(artifact, verify=public(keys[1])).manifest.engines) == 1
    with pytest.raises(InputError, match="was not signed by the key of"):
        Artifact.open(artifact, verify=public(keys[0]))


def test_what_is_no_key_is_said(artifact: Path, keys: list[Path], tmp_path: Path) -> None:
    (tmp_path / "key").write_text('* cert-authority,principals="x" nothing')
    for key, reason in (
        (tmp_path / "none", "cannot be read as a public key"),
        (tmp_path / "key", "is no public key"),
        (keys[0], "is no public key"),
    ):
        with pytest.raises(InputError, match=reason):
            Artifact.open(artifact, verify=key)
    with pytest.raises(InputError, match="key: cannot sign"):
        sign(artifact, tmp_path / "key")
    command = ("compile", artifact.parent / "tiny.onnx", "--images", tmp_path, "-o", tmp_path / "b")
    (tmp_path / "a.png").write_bytes(b"")
    assert_refused(run_regcache(*command, "--sign", tmp_path / "none"), "no such file to sign with")
