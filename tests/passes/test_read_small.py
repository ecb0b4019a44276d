"""Files of settings: read whole, from pipes too, and nothing that has no end is waited for."""

import os
import threading
from pathlib import Path

import pytest

from regcache.passes import read_small as module
from regcache.passes.errors import InputError
from regcache.passes.read_small import read_small, read_toml


def test_a_file_is_read_whole(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"x" * 5)
    assert read_small(tmp_path / "a") == b"x" * 5


def test_what_is_too_large_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "LARGEST", 2**20)
    with pytest.raises(InputError, match="/dev/zero: is larger than 1 MiB"):
        read_small(Path("/dev/zero"))
    (tmp_path / "a").write_bytes(bytes(2**20))
    assert len(read_small(tmp_path / "a")) == 2**20


def test_a_pipe_without_a_writer_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(InputError, match="pipe that nothing was written into"):
        read_small(tmp_path / "pipe")


def test_a_pipe_is_read_to_its_end(tmp_path: Path) -> None:
    """As of a shell's <(...), whose other end is open before and may be slow."""
    read_end, write_end = os.pipe()

    def write() -> None:
        with open(write_end, "wb") as pipe:
            pipe.write(b"a = 1\n")

    slow = threading.Timer(0.05, write)
    slow.start()
    try:
        assert read_toml(Path(f"/dev/fd/{read_end}")) == {"a": 1}
    finally:
        slow.join()
        os.close(read_end)


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (b"a = " + b"[" * 100_000, "nested too deeply"),
        (b"a = " + b"9" * 6000, "is no TOML: "),
        (b"\xff\xfe", "is no TOML: "),
        (b"a", "is no TOML: "),
    ],
)
def test_what_is_no_toml_is_refused(tmp_path: Path, content: bytes, why: str) -> None:
    file = tmp_path / "a.toml"
    file.write_bytes(content)
    with pytest.raises(InputError, match=why):
        read_toml(file)


def test_what_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="No such file"):
        read_toml(tmp_path / "none")
