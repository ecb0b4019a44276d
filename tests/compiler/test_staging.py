"""Artifacts appear whole or not at all."""

import errno
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from regcache.compiler import staging as staging_module
from regcache.compiler.staging import (
    MANIFEST,
    check_output,
    recover,
    rewritten_folder,
    staged_file,
    staged_folder,
    write_text,
)
from regcache.passes.errors import InputError
from regcache.passes.temporary import held_folder, locked


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def write_artifact(output: Path, content: str, *, force: bool = False) -> list[str]:
    """Replace an artifact by one with a file of that name; returns what was told."""
    told: list[str] = []
    with staged_folder(output, force=force, tell=told.append) as staging:
        (staging / content).write_text("")
        (staging / MANIFEST).write_text(json.dumps({"files": {content: {}}}))
    return told


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
        assert write_artifact(output, content) == []
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
    write_artifact(output, "old")
    with pytest.raises(RuntimeError), staged_folder(output):
        raise RuntimeError
    assert names(output) == [MANIFEST, "old"]
    assert names(tmp_path) == ["artifact"]


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


def left_behind(output: Path, name: str) -> Path:
    """What a run leaves that is killed between the two renames that replace an artifact."""
    with held_folder(output.parent, f".{output.name}.staged-") as outer:
        (outer / name).mkdir()
        (outer / name / MANIFEST).write_text(name)
        return outer.rename(outer.with_name(f"{outer.name}x"))


@pytest.mark.parametrize("name", ["artifact", "lr[0.1]", "old"])
def test_an_artifact_that_a_kill_left_aside_is_put_back(tmp_path: Path, name: str) -> None:
    """Whose process id it was says nothing: in another container, that one may live."""
    output = tmp_path / name
    left_behind(output, "old")
    recover(output)
    assert names(tmp_path) == [name]
    assert (output / MANIFEST).read_text() == "old"
    left_behind(output, "new")
    recover(output)
    assert names(tmp_path) == [name]


def test_what_a_living_process_writes_is_left_alone(tmp_path: Path) -> None:
    output = tmp_path / "artifact"
    with staged_folder(output) as staging:
        (staging / "first").write_text("")
        with pytest.raises(InputError, match="another regcache is writing it"):
            write_artifact(output, "second")
        recover(output)
    assert names(output) == ["first"]
    assert names(tmp_path) == ["artifact"]


def test_a_change_waits_for_the_change_before(tmp_path: Path) -> None:
    """Each of two reads what is there, adds a file, and both are kept."""
    output = tmp_path / "artifact"
    output.mkdir()
    entered = threading.Event()

    def add(name: str) -> None:
        with rewritten_folder(output) as staging:
            entered.set()
            for path in output.iterdir():
                (staging / path.name).write_text("")
            time.sleep(0.1)
            (staging / name).write_text("")

    first = threading.Thread(target=add, args=("one",))
    first.start()
    assert entered.wait(5)
    add("two")
    first.join()
    assert names(output) == ["one", "two"]
    assert names(tmp_path) == ["artifact"]


def test_a_place_that_stays_locked_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("regcache.passes.temporary._PATIENCE", 0.05)
    with (
        locked(tmp_path / "artifact"),
        pytest.raises(InputError, match=r"keeps \.artifact\.lock locked"),
    ):
        recover(tmp_path / "artifact")


def test_a_users_own_file_is_not_deleted(tmp_path: Path) -> None:
    output = tmp_path / "artifact"
    write_artifact(output, "model")
    (output / "notes").mkdir()
    (output / "notes" / "mine.txt").write_text("mine")
    (output / "link").symlink_to(tmp_path)
    with pytest.raises(InputError, match="artifact/link and 1 more: not part of the artifact"):
        write_artifact(output, "other")
    assert (output / "notes" / "mine.txt").read_text() == "mine"
    for number in ("", "-2"):
        told = write_artifact(output, "other", force=True)
        kept = tmp_path / f"artifact.kept{number}"
        assert names(output) == [MANIFEST, "other"]
        assert (kept / "notes" / "mine.txt").read_text() == "mine"
        assert told == [f"2 files of {output} that are not regcache's are now in {kept}"]
        (output / "notes").mkdir()
        (output / "notes" / "mine.txt").write_text("mine")
        (output / "other2").write_text("")


def test_an_artifact_of_unknown_files_is_not_replaced(tmp_path: Path) -> None:
    output = tmp_path / "artifact"
    write_artifact(output, "model")
    (output / MANIFEST).write_text('{"files"')
    with pytest.raises(InputError, match=r"manifest\.json: lists no files"):
        write_artifact(output, "other")
    write_artifact(output, "other", force=True)
    assert names(tmp_path / "artifact.kept") == ["model"]


def test_a_file_that_comes_while_it_is_written_is_kept(tmp_path: Path) -> None:
    """Hours of work are not thrown away for it, and neither is the file."""
    output = tmp_path / "artifact"
    output.mkdir()
    told: list[str] = []
    with staged_folder(output, tell=told.append) as staging:
        (staging / "model").write_text("")
        (output / "mine").write_text("mine")
    assert names(output) == ["model"]
    assert (tmp_path / "artifact.kept" / "mine").read_text() == "mine"
    assert len(told) == 1


def test_a_link_to_the_output_stays_one(tmp_path: Path) -> None:
    real, link = tmp_path / "real", tmp_path / "link"
    link.symlink_to(real)
    for content in ("first", "second"):
        write_artifact(link, content)
        assert link.is_symlink()
        assert names(real) == sorted([MANIFEST, content])
    file = tmp_path / "file.json"
    file.symlink_to(tmp_path / "target.json")
    write_text(file, "{}")
    assert file.is_symlink()
    assert file.read_text() == "{}"
    assert names(tmp_path) == ["file.json", "link", "real", "target.json"]


@pytest.mark.parametrize("error", [errno.EBUSY, errno.EACCES])
def test_a_place_that_cannot_be_replaced_is_refused_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: int
) -> None:
    """A mount point, as a container's volume is; a folder in one of another user's."""
    output = tmp_path / "artifact"
    write_artifact(output, "model")

    def refuse(path: Path) -> None:
        raise OSError(error, os.strerror(error), str(path))

    monkeypatch.setattr(Path, "rmdir", refuse)
    reason = "mount point" if error == errno.EBUSY else os.strerror(error)
    with pytest.raises(InputError, match=f"cannot be replaced: .*{reason}"), staged_folder(output):
        pytest.fail("the block must not run")
    with pytest.raises(InputError, match=reason):
        check_output(output)
    assert names(output) == [MANIFEST, "model"]


def test_a_check_leaves_an_empty_folder_as_it_was(tmp_path: Path) -> None:
    output = tmp_path / "empty"
    output.mkdir()
    output.chmod(0o750)
    check_output(output)
    assert output.stat().st_mode & 0o777 == 0o750
    assert names(tmp_path) == ["empty"]
    check_output(tmp_path / "none" / "there")
    assert names(tmp_path) == ["empty"]


@pytest.mark.skipif(os.name == "nt", reason="needs devices")
def test_a_device_is_written_to_and_not_replaced(tmp_path: Path) -> None:
    write_text(Path("/dev/null"), "{}")
    assert not Path("/dev/null").is_file()
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(InputError, match="is no regular file"), staged_file(tmp_path / "pipe"):
        pytest.fail("the block must not run")


@pytest.mark.parametrize("exchanges", [True, False])
def test_a_folder_is_replaced_with_and_without_an_exchange(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, exchanges: bool
) -> None:
    if not exchanges:
        monkeypatch.setattr(staging_module, "exchange", lambda one, other: False)
    for content in ("first", "second"):
        write_artifact(tmp_path / "artifact", content)
    assert names(tmp_path / "artifact") == [MANIFEST, "second"]
    assert names(tmp_path) == ["artifact"]


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="needs a place where nothing can be made")
def test_a_place_for_no_lock_is_said_at_once() -> None:
    """filelock itself would try for as long as it is told to wait."""
    began = time.monotonic()
    for attempt in (recover, check_output):
        with pytest.raises(InputError, match=r"^/proc: No such file or directory \(\.a\.lock\)$"):
            attempt(Path("/proc/a"))
    with pytest.raises(InputError, match=r"^/proc: "):
        write_text(Path("/proc/a"), "{}")
    assert time.monotonic() - began < 5


def test_a_lock_that_is_a_link_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / ".artifact.lock").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(InputError, match=r"\.artifact\.lock"):
        recover(tmp_path / "artifact")
    assert not (tmp_path / "elsewhere").exists()


@pytest.mark.parametrize("error", [KeyboardInterrupt(), SystemExit(143), OSError(5, "no")])
def test_an_end_between_the_two_renames_keeps_the_old_artifact(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    output = tmp_path / "artifact"
    write_artifact(output, "old")
    monkeypatch.setattr(staging_module, "exchange", lambda one, other: False)
    replace = Path.replace

    def fail(path: Path, target: Path) -> Path:
        if path.name == "new":
            raise error
        return replace(path, target)

    monkeypatch.setattr(Path, "replace", fail)
    with pytest.raises((type(error), InputError)):
        write_artifact(output, "new")
    assert names(output) == [MANIFEST, "old"]
    assert names(tmp_path) == ["artifact"]
