"""Commands with times that are given, not measured."""

import pytest
from support.command_line import Outcome, run_regcache

from regcache.compiler.artifact import speed_check
from regcache.runtime.speed import SpeedRatio

RATIO = SpeedRatio(batch=1, threads=1, float_ms=2, quantized_ms=1, ratio=0.5, rounds=6)


def cli(*arguments: object, ratio: SpeedRatio = RATIO) -> Outcome:
    """Run `regcache ARGS` in this process; whatever is timed takes `ratio`."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(speed_check, "compare_speed", lambda *_, **__: [ratio])
        return run_regcache(*arguments)
