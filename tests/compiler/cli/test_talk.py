"""How much a command tells: `-q`, `-v` and `--log-file`, and lines that people can read."""

import re
from pathlib import Path

import pytest
from support.command_line import assert_refused, run_regcache
from support.tiny_artifact import write_tiny
from support.tiny_source import photos
from typer.main import get_command

from regcache.compiler.cli.main import app

FAST = ("--accept-slower", "--threads", "1")
LINE = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ (DEBUG|INFO|WARNING|ERROR) \S.*")
# A step that begins; how far one is stands behind it where a machine is slow.
BEGUN = re.compile(r"step \d+ of \d+: (?!.* \d+:\d\d ).*")
VERB = re.compile(
    r"\b(\w+ing|are|comes|falls|found|gives?|have|is|prove|ran|refuse|skipped|stay|takes|try|were|wrote)\b"
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("talk")
    write_tiny(folder, depth=2)
    photos(folder / "photos", 16, seed=1)
    return folder


@pytest.fixture(autouse=True)
def inside(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the folder, so that paths in lines are as short as people's."""
    monkeypatch.chdir(folder)


def compiled(tmp_path: Path, *options: object) -> tuple[str, str]:
    """What is told on standard error, and on standard output."""
    out = tmp_path / "artifact"
    outcome = run_regcache("compile", "tiny.onnx", "--images", "photos", "-o", out, *FAST, *options)
    assert outcome.code == 0, outcome
    return outcome.err, outcome.out


def test_quiet_tells_results_alone(tmp_path: Path) -> None:
    err, out = compiled(tmp_path, "--effort", "fast", "-q")
    assert err == ""
    assert "wrote" in out


def test_quiet_still_warns(tmp_path: Path) -> None:
    (few := tmp_path / "few.txt").write_text(
        "".join(f"{path.absolute()}\n" for path in sorted(Path("photos").iterdir())[:3])
    )
    err, _ = compiled(tmp_path, "--effort", "fast", "-q", "--images", few)
    assert err.splitlines() == ["warning: 3 images to calibrate on are few: give 16 or more"]


@pytest.mark.slow
def test_verbose_tells_what_passes_did_and_how_long_steps_took(tmp_path: Path) -> None:
    usual, _ = compiled(tmp_path / "usual", "--effort", "fast")
    err, _ = compiled(tmp_path / "verbose", "--effort", "fast", "-v")
    more = [line for line in err.splitlines() if line not in usual.splitlines()]
    assert "quantize_linears changed 8 places" in more
    took = [line for line in more if re.fullmatch(r"[a-z ]+ took \d+\.\d s", line)]
    begun = [line for line in err.splitlines() if BEGUN.fullmatch(line)]
    assert len(took) == len(begun) > 5
    assert "took" not in usual


@pytest.mark.slow
def test_a_log_has_everything_with_its_time(tmp_path: Path) -> None:
    log = tmp_path / "log.txt"
    err, _ = compiled(tmp_path / "first", "--effort", "fast", "-q", "--log-file", log)
    assert err == ""
    first = log.read_text().splitlines()
    assert all(map(LINE.fullmatch, first))
    assert "compile begins, with regcache" in first[0]
    assert re.search(r"done after \d+:\d\d$", first[-1])
    assert any("quantize_linears changed" in line for line in first)
    compiled(tmp_path / "second", "--effort", "fast", "--log-file", log)
    assert log.read_text().splitlines()[: len(first)] == first


def test_a_log_tells_how_a_command_failed(tmp_path: Path) -> None:
    log = tmp_path / "log.txt"
    assert_refused(run_regcache("inspect", "none.onnx", "--log-file", log), "none.onnx")
    assert "ERROR none.onnx: no such file" in log.read_text().splitlines()[-1]


def test_a_log_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    outcome = run_regcache("inspect", "tiny.onnx", "--log-file", tmp_path / "none" / "log.txt")
    assert_refused(outcome, "--log-file", "No such file or directory")
    assert not (tmp_path / "none").exists()


def test_quiet_and_verbose_exclude_one_another() -> None:
    assert_refused(run_regcache("inspect", "tiny.onnx", "-q", "-v"), "exclude one another")


def test_every_command_has_them() -> None:
    commands = get_command(app).commands  # type: ignore[attr-defined]
    assert len(commands) >= 9
    for name, command in commands.items():
        options = {option for parameter in command.params for option in parameter.opts}
        assert {"-q", "--quiet", "-v", "--verbose", "--log-file"} <= options, name


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        ("--registers", "auto"),
        ("--registers", "off", "--int8-share", "0.8"),
        ("--target", "tensorrt-rtx", "--registers", "off"),
        ("--precision", "w4a16"),
        ("--target", "tensorrt", "--precision", "fp16"),
    ],
    ids=" ".join,
)
def test_every_line_has_a_verb_and_fits_a_hundred_characters(
    options: tuple[str, ...], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for path in ("tiny.onnx", "tiny.preprocess.json", "photos"):
        if Path(path).exists():
            (tmp_path / path).symlink_to(Path(path).absolute())
    monkeypatch.chdir(tmp_path)
    for line in "".join(compiled(Path(), *options)).splitlines():
        assert len(line) <= 100, line
        assert VERB.search(line), line
