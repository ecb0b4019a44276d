"""A model in a runtime, timed or run in a process of its own.

Sessions that share a process spin against one another, and one runtime's threads against another's.
"""

import multiprocessing
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from pathlib import Path
from typing import ParamSpec, TypeVar

import numpy as np
from numpy.typing import NDArray

from regcache.passes.errors import InputError
from regcache.passes.preprocess import Preprocess
from regcache.runtime.bench_cold import peak_memory
from regcache.runtime.openvino_options import InferencePrecision, OpenVinoOptions
from regcache.runtime.run_with import RuntimeName, Session, open_session
from regcache.runtime.runners import Loading, RunnerName
from regcache.runtime.session import silence_runtime

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")

BATCHES = (1, 8)
_FEWEST, _WARM_UPS = 5, 2
_RUNNERS = {
    RuntimeName.ONNXRUNTIME: RunnerName.ORT_CPU,
    RuntimeName.OPENVINO: RunnerName.OPENVINO,
}


@dataclass(frozen=True)
class Deployed:
    """An ONNX file as it would be deployed: in a runtime on the CPU, with so many threads.

    `precision`: OpenVINO's, of what is not quantized. `outputs`: the names of those that come
    first.
    """

    model: Path
    runtime: RuntimeName
    threads: int
    precision: InferencePrecision = InferencePrecision.F32
    outputs: tuple[str, ...] = ()

    def open(self) -> Session:
        """Load it. Raises InputError, naming the file, where that fails."""
        return open_session(
            *(self.model, self.runtime),
            threads=self.threads,
            outputs=self.outputs,
            deployed=True,
            openvino=OpenVinoOptions(self.precision),
        )


@dataclass(frozen=True)
class Timed:
    """How long a model took: median milliseconds by batch size, and to load.

    `cpu_ms`: of all CPUs together, which other work lengthens less. `peak_mb`: megabytes of memory
    at most, None where the system does not say.
    """

    milliseconds: Mapping[int, float]
    load_ms: float
    peak_mb: float | None
    cpu_ms: Mapping[int, float] = field(default_factory=dict)


def least(rounds: Sequence[Timed]) -> dict[int, float]:
    """The least milliseconds of some rounds, by batch size: other work only adds to them."""
    return {
        batch: min(one.milliseconds[batch] for one in rounds) for batch in rounds[0].milliseconds
    }


def time_alone(deployed: Deployed, recipe: Preprocess, seconds: float) -> Timed:
    """Time a model at batch 1 and 8, or the batch size it fixes, in a new process.

    `seconds`: of timed runs for each batch size, five runs at least.
    Raises InputError where it cannot be loaded or run.
    """
    return alone(_time, deployed, recipe, seconds)


def embed_alone(deployed: Deployed, images: NDArray[np.float32]) -> NDArray[np.float32]:
    """The first output [N, ...] for images [N, ...], in a new process."""
    return alone(_embed, deployed, images)


def alone(
    task: Callable[Arguments, Result], *given: Arguments.args, **named: Arguments.kwargs
) -> Result:
    """What a function returns in a new process that runs nothing else."""
    context = multiprocessing.get_context("spawn")
    try:
        with ProcessPoolExecutor(1, mp_context=context) as pool:
            return pool.submit(task, *given, **named).result()
    except BrokenProcessPool as error:
        raise InputError("the process that ran a model was killed (out of memory?)") from error


def _time(deployed: Deployed, recipe: Preprocess, seconds: float) -> Timed:
    silence_runtime()
    runner = _RUNNERS[deployed.runtime]
    loading = Loading(
        *(runner, deployed.model, deployed.threads, BATCHES, recipe.shape, recipe.dtype)
    )
    started = time.perf_counter()
    with deployed.open() as session:
        loaded = time.perf_counter()
        found, used = {}, {}
        for batch in [session.fixed_batch] if session.fixed_batch else BATCHES:
            images = loading.images(batch)
            for _ in range(_WARM_UPS):
                session.run(images)
            laps, cpu, begin = list[float](), list[float](), time.perf_counter()
            while len(laps) < _FEWEST or time.perf_counter() - begin < seconds:
                before, busy = time.perf_counter(), time.process_time()
                session.run(images)
                laps.append(time.perf_counter() - before)
                cpu.append(time.process_time() - busy)
            found[batch] = 1e3 * statistics.median(laps)
            used[batch] = 1e3 * statistics.median(cpu)
        peak = peak_memory()
        megabytes = None if peak is None else peak / 1e6
        return Timed(found, 1e3 * (loaded - started), megabytes, used)


def _embed(deployed: Deployed, images: NDArray[np.float32]) -> NDArray[np.float32]:
    silence_runtime()
    with deployed.open() as session:
        size = session.fixed_batch or BATCHES[-1]
        batches = (images[start : start + size] for start in range(0, len(images), size))
        return np.concatenate([outputs[0] for outputs in session.run_each(batches)])
