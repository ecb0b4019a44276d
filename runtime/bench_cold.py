"""Cold start and peak memory of one model, in a process that has run nothing else."""

import multiprocessing
import re
import time
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

from regcache.passes.errors import InputError
from regcache.runtime.bench_result import ColdStart
from regcache.runtime.gpu import used_memory
from regcache.runtime.open_runner import open_runner, preload
from regcache.runtime.runners import Loading
from regcache.runtime.session import silence_runtime

STATUS = Path("/proc/self/status")


def cold_start(loading: Loading) -> ColdStart:
    """Load a model and run it once at every batch size, in a new process.

    Raises InputError when it cannot be loaded or run, or needs more memory than there is.
    """
    context = multiprocessing.get_context("spawn")
    try:
        with ProcessPoolExecutor(1, mp_context=context) as pool:
            return pool.submit(measure_start, loading).result()
    except BrokenProcessPool as error:
        raise InputError(f"{loading.model}: the process was killed (out of memory?)") from error


def measure_start(loading: Loading) -> ColdStart:
    """As cold_start, in this process: its peak of memory includes all that ran before."""
    silence_runtime()
    preload(loading.runner)
    imports = peak_memory()
    gpu = used_memory() if loading.runner.on_gpu else None
    start = time.perf_counter()
    runner = open_runner(loading)
    loaded = time.perf_counter()
    with runner:
        sizes = [runner.fixed_batch] if runner.fixed_batch else sorted(loading.batches)
        first, *others = [loading.images(size) for size in sizes]
        before = time.perf_counter()
        runner.run(first)
        after = time.perf_counter()
        for images in others:
            runner.run(images)
        return ColdStart(
            load_ms=1e3 * (loaded - start),
            first_run_ms=1e3 * (after - before),
            cold_start_ms=1e3 * (loaded - start + after - before),
            peak_memory_mb=_megabytes(peak_memory()),
            imports_mb=_megabytes(imports),
            gpu_memory_mb=None if gpu is None else _megabytes(used_memory() - gpu),
        )


def peak_memory(status: Path = STATUS) -> int | None:
    """Bytes of memory that this process had resident at most; None where Linux does not say."""
    try:
        match = re.search(r"^VmHWM:\s*(\d+) kB$", status.read_text(), re.MULTILINE)
    except OSError:
        return None
    return 1024 * int(match[1]) if match else None


def _megabytes(size: int | None) -> float | None:
    return None if size is None else size / 1e6
