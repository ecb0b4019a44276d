"""Runs that are killed, and runs that write to one place at once, lose and leave nothing."""

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from support.staging import names, write_artifact

from regcache.compiler.job import staging as staging_module
from regcache.compiler.job.staging import (
    MANIFEST,
    check_output,
    recover,
    rewritten_folder,
    staged_folder,
    write_text,
)
from regcache.passes.errors import InputError
from regcache.passes.temporary import held_folder, locked

KILLED = """
import pathlib, sys, time
from regcache.compiler.job.staging import staged_folder
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
