"""Options that name several things: repeated, with commas between, or both."""

from pathlib import Path

import pytest
import typer
from support.command_line import run_regcache

from regcache.compiler.cli import build as cli_build
from regcache.compiler.cli.main import app
from regcache.compiler.cli.options import INPUT, OUTPUT, QUALITY, REGISTERS, REPORT, SPEED, listed
from regcache.compiler.engines.build import BuildReport
from regcache.compiler.engines.toolchain import BuildOptions
from regcache.compiler.reporter import Reporter

PANELS = {"Activations", INPUT, OUTPUT, QUALITY, REGISTERS, SPEED, REPORT}


def test_items_keep_their_order() -> None:
    assert listed(["b, a", "b", "c,"]) == ["b", "a", "b", "c", ""]


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ((), None),
        (("8.6,8.9",), ("8.6", "8.9")),
        (("8.6", "8.9, 12.0"), ("8.6", "8.9", "12.0")),
        (("",), ("",)),
    ],
)
def test_builds_are_for_all_that_was_named(
    monkeypatch: pytest.MonkeyPatch, given: tuple[str, ...], expected: tuple[str, ...] | None
) -> None:
    asked = []

    def build(
        _artifact: Path, options: BuildOptions, _reporter: Reporter, **_keys: object
    ) -> BuildReport:
        asked.append(options.compute_capabilities)
        return BuildReport(artifact="artifact", engines=[])

    monkeypatch.setattr(cli_build, "build_engines", build)
    options = [part for one in given for part in ("--compute-capability", one)]
    assert run_regcache("build", "artifact", *options).code == 0
    assert asked == [expected]


@pytest.mark.parametrize(
    "command",
    ["export", "inspect", "compile", "parity", "build", "bench", "bundle", "report", "reproduce"],
)
def test_every_command_can_be_asked_for_help(command: str) -> None:
    """A bracket in a help text is markup to what prints it, and may end in a traceback."""
    asked = run_regcache(command, "--help")
    assert asked.code == 0
    assert "Usage" in asked.out


def test_every_option_of_compile_stands_in_a_panel() -> None:
    """-h is --help, also of a command; only --help itself is in no panel."""
    done = run_regcache("compile", "-h")
    assert done.code == 0
    assert done.out == run_regcache("compile", "--help").out
    panels = [line.split("─")[1].strip() for line in done.out.splitlines() if "╭─" in line]
    assert set(panels) == {"Arguments", "Options", *PANELS}
    command = typer.main.get_command(app).commands["compile"]  # type: ignore[attr-defined]
    loose = [
        option.name
        for option in command.params
        if option.param_type_name == "option" and option.rich_help_panel not in PANELS
    ]
    assert loose == []
