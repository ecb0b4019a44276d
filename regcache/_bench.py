"""What stands behind `regcache.bench`: input checked, as the command line checks its own."""

import math
from collections.abc import Sequence

from regcache._api import choice_of, count_of, folder_of, reporter_of, run_with_of
from regcache.compiler.bench.bench import BenchPlan, bench_artifact
from regcache.passes.errors import InputError
from regcache.passes.quiet import quiet
from regcache.runtime.bench_result import BenchResult
from regcache.runtime.runners import RunnerName


def measure_speed(
    artifact: object,
    *,
    against: str | None,
    runners: Sequence[str],
    batches: Sequence[int],
    seconds: float,
    threads: int | None,
    max_ratio: float | None,
    openvino: tuple[str, str, object],
    verbose: bool,
) -> BenchResult:
    """`regcache.bench`: see there."""
    for name, given in (("runners", runners), ("batches", batches)):
        if isinstance(given, str) or not isinstance(given, Sequence):
            raise InputError(f"{name}: several are wanted, as in ({given!r},)")
    if not (isinstance(seconds, (int, float)) and math.isfinite(seconds) and seconds >= 0):
        raise InputError(f"seconds: a number from 0 is wanted, not {seconds!r}")
    plan = BenchPlan(
        artifact=folder_of(artifact),
        against=against,
        runners=tuple(dict.fromkeys(choice_of(RunnerName, name, "runners") for name in runners)),
        batches=tuple(dict.fromkeys(count_of(batch, "batches") for batch in batches)),
        seconds=seconds,
        threads=None if threads is None else count_of(threads, "threads"),
        max_ratio=max_ratio,
        openvino=run_with_of(None, *openvino).openvino,
    )
    with quiet():
        return bench_artifact(plan, reporter_of(verbose))
