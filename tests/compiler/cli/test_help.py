"""The help of every command can be read on narrow terminals, and ends with examples."""

import pytest
import typer.rich_utils
from support.command_line import run_regcache
from typer.main import get_command

from regcache.compiler.cli.examples import examples_of
from regcache.compiler.cli.main import app

COMMANDS = list(get_command(app).commands)  # type: ignore[attr-defined]


@pytest.mark.parametrize("width", [60, 100])
@pytest.mark.parametrize("command", COMMANDS)
def test_nothing_is_cut_off(command: str, width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(typer.rich_utils, "MAX_WIDTH", width)
    outcome = run_regcache(command, "-h")
    assert outcome.code == 0
    lines = outcome.out.splitlines()
    cut = [line for line in lines if "…" in line]
    two_names = ("--class-scores", "--models")  # of one option
    assert [line for line in cut if not any(name in line for name in two_names)] == []
    assert max(map(len, lines)) <= width


@pytest.mark.parametrize("command", COMMANDS)
def test_ends_with_examples(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(typer.rich_utils, "MAX_WIDTH", 100)
    lines = [line.strip() for line in run_regcache(command, "-h").out.splitlines() if line.strip()]
    examples = examples_of(command)
    assert lines[-len(examples) - 1 :] == ["For example:", *examples]
    assert all(example.startswith(f"regcache {command}") for example in examples)
