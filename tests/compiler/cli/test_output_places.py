"""Nothing is written into an artifact: it would be refused from then on."""

from pathlib import Path

import pytest
from support.cli_runs import Cli, Compiled
from support.command_line import assert_refused

from regcache.compiler.artifact.artifact import Artifact

# One worker compiles for all.
pytestmark = pytest.mark.xdist_group("cli")


@pytest.mark.parametrize("option", ["--json", "--junit", "--summary", "--log-file"])
def test_what_parity_writes_lies_beside(cli: Cli, compiled: Compiled, option: str) -> None:
    place = compiled.artifact / "written"
    command = ("parity", compiled.artifact, "--images", compiled.calibration)
    refused = cli(*command, option, place)
    assert_refused(refused, f"{option} {place}: lies in an artifact", "write it beside")
    assert not place.exists()
    Artifact.open(compiled.artifact)


def test_links_and_folders_below_are_seen_through(
    cli: Cli, compiled: Compiled, tmp_path: Path
) -> None:
    (tmp_path / "link").symlink_to(compiled.artifact)
    for place in (tmp_path / "link" / "x.log", compiled.artifact / "a" / ".." / "b" / "x.log"):
        assert_refused(cli("doctor", "--log-file", place), "lies in an artifact")


def test_other_commands_write_elsewhere_too(cli: Cli, compiled: Compiled) -> None:
    inside = compiled.artifact / "more"
    assert_refused(cli("export", compiled.encoder, "-o", f"{inside}.onnx"), "--out", "lies in an")
    command = ("compile", compiled.encoder, "--images", compiled.calibration)
    assert_refused(cli(*command, "-o", inside), f"--out {inside}: lies in an artifact")
    Artifact.open(compiled.artifact)


def test_nor_into_what_becomes_an_artifact(cli: Cli, compiled: Compiled, tmp_path: Path) -> None:
    out = tmp_path / "new"
    command = ("compile", compiled.encoder, "--images", compiled.calibration, "-o", out)
    assert_refused(cli(*command, "--json", out / "x.json"), "--json", "lies in an artifact")
    assert not out.exists()


def test_an_artifact_is_still_replaced_and_read_beside_others(
    cli: Cli, compiled: Compiled, tmp_path: Path
) -> None:
    """An output is no file in itself, and what lies beside an artifact is in none."""
    told = cli("inspect", compiled.encoder, "--log-file", compiled.artifact.parent / "i.log")
    assert told.code == 0
    command = ("compile", compiled.encoder, "--images", compiled.calibration, "--dry-run")
    assert cli(*command, "-o", compiled.artifact, "--json", "-").code == 0


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a disk that is full")
def test_a_full_disk_ends_the_log_and_not_the_command(cli: Cli, compiled: Compiled) -> None:
    """A result is worth more than what was told on the way, and no traceback stands between."""
    told = cli("inspect", compiled.encoder, "--log-file", "/dev/full")
    assert told.code == 0
    assert told.err.count("the log ends here: --log-file /dev/full: No space left on device") == 1
    assert "Traceback" not in told.err
    assert "Traceback" not in told.out
    assert "last_hidden_state" in told.out
