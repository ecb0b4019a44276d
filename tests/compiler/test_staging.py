"""Artifacts appear whole or not at all."""

import errno
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from regcache.compiler.staging import MANIFEST, recover, staged_file, staged_folder, write_text
from regcache.passes.errors import InputError


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_folder_appears_when_the_block_ends(tmp_path: Path) -> None:
    output = tmp_path / "deep" / "artifact"
    with staged_folder(output) as staging:
        (staging / "model.onnx").write_text("x")
        assert not output.exists()
    assert names(output) == ["model.onnx"]
    assert names(output.parent) == ["artifact"]
    assert output.stat().st_mode & 0o777 == 0o777 & ~_umask()


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def test_an_artifact_is_replaced_whole(tmp_path: Path) -> None:
    output = tmp_path / "artifact"
    for content in ("old", "new"):
        with staged_folder(output) as staging:
            (staging / MANIFEST).write_text(content)
            (staging / content).write_text("")
    assert names(output) == [MANIFEST, "new"]
    assert names(tmp_path) == ["artifact"]


@pytest.mark.parametrize("error", [RuntimeError("a bug"), KeyboardInterrupt()])
def test_nothing_is_left_when_the_block_fails(tmp_path: Path, error: BaseException) -> None:
    def write_half() -> None:
        with staged_folder(tmp_path / "artifact") as staging:
            (staging / "model.onnx").write_text("half")
            raise error

    with pytest.raises(type(error)):
        write_half()
    assert names(tmp_path) == []


def test_the_old_artifact_outlives_a_failure(tmp_path: Path) -> None:
    output = tmp_path / "artifact"
    with staged_folder(output) as staging:
        (staging / MANIFEST).write_text("old")
    with pytest.raises(RuntimeError), staged_folder(output):
        raise RuntimeError
    assert (output / MANIFEST).read_text() == "old"


def test_a_full_disk_is_one_line(tmp_path: Path) -> None:
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "model.onnx")
    with (
        pytest.raises(InputError, match=r"model\.onnx: No space left on device"),
        staged_folder(tmp_path / "artifact"),
    ):
        raise full
    assert names(tmp_path) == []


def test_what_is_no_artifact_is_not_replaced(tmp_path: Path) -> None:
    folder, file = tmp_path / "photos", tmp_path / "file"
    folder.mkdir()
    (folder / "holiday.jpg").write_text("")
    file.write_text("")
    for output in (folder, file):
        with pytest.raises(InputError, match=str(output)), staged_folder(output):
            pytest.fail("the block must not run")
    assert names(folder) == ["holiday.jpg"]
    empty = tmp_path / "empty"
    empty.mkdir()
    with staged_folder(empty) as staging:
        (staging / "x").write_text("")
    assert names(empty) == ["x"]


def test_a_file_appears_with_what_lies_beside_it(tmp_path: Path) -> None:
    output = tmp_path / "encoder.onnx"
    with staged_file(output) as staged:
        staged.write_text("model")
        staged.with_name("encoder.onnx.data").write_text("weights")
        assert names(tmp_path) != ["encoder.onnx", "encoder.onnx.data"]
    assert names(tmp_path) == ["encoder.onnx", "encoder.onnx.data"]

    def write_half() -> None:
        with staged_file(output) as staged:
            staged.write_text("half")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        write_half()
    assert output.read_text() == "model"
    with pytest.raises(InputError, match="is a folder"), staged_file(tmp_path):
        pytest.fail("the block must not run")


def test_text_is_written_whole(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_text(tmp_path / "a.json", "{}\n")
    assert (tmp_path / "a.json").read_text() == "{}\n"
    write_text(Path("-"), "{}\n")
    assert capsys.readouterr().out == "{}\n"


KILLED = """
import pathlib, sys, time
from regcache.compiler.staging import staged_folder
with staged_folder(pathlib.Path(sys.argv[1])) as staging:
    (staging / "half").write_text("")
    print("ready", flush=True)
    time.sleep(60)
"""


@pytest.mark.skipif(os.name == "nt", reason="needs POSIX signals")
def test_a_killed_process_leaves_no_artifact(tmp_path: Path) -> None:
    output = tmp_path / "artifact"
    with subprocess.Popen(
        [sys.executable, "-c", KILLED, str(output)], stdout=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"ready\n"
        process.send_signal(signal.SIGKILL)
    assert not output.exists()
    assert len(names(tmp_path)) == 1
    time.sleep(0.05)
    with staged_folder(output) as staging:
        (staging / "whole").write_text("")
    assert names(tmp_path) == ["artifact"]


def test_an_artifact_that_a_kill_left_aside_is_put_back(tmp_path: Path) -> None:
    """Between the two renames that replace an artifact, its folder has another name."""
    with subprocess.Popen([sys.executable, "-c", ""]) as process:
        process.wait()
    output = tmp_path / "artifact"
    for suffix in ("x-old", "x"):
        left = tmp_path / f".artifact.partial-{process.pid}-{suffix}"
        left.mkdir()
        (left / MANIFEST).write_text(suffix)
    recover(output)
    assert names(tmp_path) == ["artifact"]
    assert (output / MANIFEST).read_text() == "x-old"
    left = tmp_path / f".artifact.partial-{process.pid}-y-old"
    left.mkdir()
    recover(output)
    assert names(tmp_path) == ["artifact"]
    assert (output / MANIFEST).read_text() == "x-old"
