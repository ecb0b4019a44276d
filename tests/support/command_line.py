"""Run `regcache` in this process."""

import contextlib
import functools
import io
import sys
from dataclasses import dataclass

import pytest
import typer.main

from regcache.compiler.cli.main import main

# The commands of `regcache`, read from its functions' signatures once, not for every run.
_get_command = functools.cache(typer.main.get_command)


@dataclass(frozen=True)
class Outcome:
    """Exit code and what was printed."""

    code: int
    out: str
    err: str


def run_regcache(*arguments: object) -> Outcome:
    """Run `regcache ARGS`."""
    out, err = io.StringIO(), io.StringIO()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["regcache", *map(str, arguments)])
        patch.setattr(typer.main, "get_command", _get_command)
        with (
            contextlib.redirect_stdout(out),
            contextlib.redirect_stderr(err),
            pytest.raises(SystemExit) as caught,
        ):
            main()
    code = caught.value.code
    return Outcome(code if isinstance(code, int) else 0, out.getvalue(), err.getvalue())


def assert_refused(outcome: Outcome, *parts: str) -> None:
    """Exit code 2 and a last line on stderr that names the cause; no traceback, no result."""
    assert outcome.code == 2, outcome
    lines = outcome.err.strip().splitlines()
    assert lines[-1].startswith("regcache: error: ")
    assert sum(line.startswith("regcache: error: ") for line in lines) == 1
    assert "Traceback" not in outcome.err
    for part in parts:
        assert part in lines[-1]
