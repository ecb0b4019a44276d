"""Run `regcache` in this process."""

import contextlib
import io
import sys
from dataclasses import dataclass

import pytest

from regcache.compiler.cli.main import main


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
        with (
            contextlib.redirect_stdout(out),
            contextlib.redirect_stderr(err),
            pytest.raises(SystemExit) as caught,
        ):
            main()
    code = caught.value.code
    return Outcome(code if isinstance(code, int) else 0, out.getvalue(), err.getvalue())
