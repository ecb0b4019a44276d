"""A command that is told to end leaves nothing, and what a killed one left is cleared away."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from regcache.compiler.cli.ending import ended_cleanly
from regcache.passes.temporary import held_folder, temporary_folder

COMMAND = """
import pathlib, signal, sys, time
signal.signal(int(sys.argv[2]), signal.SIG_DFL)  # ignored where the tests run by nohup
from regcache.compiler.cli.ending import ended_cleanly
from regcache.compiler.job.staging import staged_folder
from regcache.passes.temporary import temporary_folder
with ended_cleanly(), temporary_folder(), staged_folder(pathlib.Path(sys.argv[1])) as staging:
    (staging / "half").write_text("")
    print("ready", flush=True)
    time.sleep(60)
"""


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.skipif(os.name == "nt", reason="needs POSIX signals")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_command_that_is_ended_clears_up(tmp_path: Path, number: signal.Signals) -> None:
    """As an orchestrator ends it, and as a terminal that is closed does."""
    with subprocess.Popen(
        [sys.executable, "-c", COMMAND, str(tmp_path / "artifact"), str(int(number))],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={**os.environ, "TMPDIR": str(tmp_path)},
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        assert process.stdout.readline() == b"ready\n"
        assert len(names(tmp_path)) == 2
        process.send_signal(number)
        assert process.wait(10) == 128 + number
        assert process.stderr.read() == b""
    assert names(tmp_path) == []


def test_the_signals_of_others_are_left_to_them() -> None:
    before = signal.signal(signal.SIGTERM, signal.SIG_IGN)
    try:
        with ended_cleanly():
            assert signal.getsignal(signal.SIGTERM) == signal.SIG_IGN
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        with ended_cleanly():
            assert callable(signal.getsignal(signal.SIGTERM))
        assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    finally:
        signal.signal(signal.SIGTERM, before)


def test_temporary_folders_of_killed_processes_go(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    with held_folder(tmp_path, "regcache-run-") as outer:
        (outer / "weights").write_text("")
        killed = outer.rename(tmp_path / "regcache-run-killed")
    (tmp_path / "regcache-run-young").mkdir()
    (tmp_path / "regcache-run-unlocked").mkdir()
    (tmp_path / "regcache-run-unlocked" / ".lock").touch()
    (tmp_path / "regcache-run-file").write_text("")
    with held_folder(tmp_path, "regcache-run-") as living, temporary_folder() as folder:
        assert folder.is_dir()
        assert living.is_dir()
        assert not killed.exists()
    assert names(tmp_path) == ["regcache-run-file", "regcache-run-unlocked", "regcache-run-young"]


INTERRUPTED = """
import os, signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored where the tests run by nohup
class Interrupt:
    def find_spec(self, name, path, target=None):
        if name == "regcache.compiler.cli.main":
            os.kill(os.getpid(), signal.SIGINT)
sys.meta_path.insert(0, Interrupt())
from regcache.compiler.cli.start import main
main()
"""


@pytest.mark.skipif(os.name == "nt", reason="needs POSIX signals")
def test_an_interrupt_while_the_commands_are_imported_is_silent() -> None:
    done = subprocess.run(
        [sys.executable, "-c", INTERRUPTED], capture_output=True, check=False, timeout=60
    )
    assert (done.returncode, done.stderr) == (-signal.SIGINT, b"")
