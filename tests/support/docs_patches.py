"""What is not done for the documents' examples: to wait, to fetch, and to run on a GPU.

Each stand-in is called as the original is, so that a wrong call of it fails all the same.
"""

import functools
import importlib
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import regcache
from regcache.compiler.reproduce.reproduce import Plan
from regcache.compiler.reproduce.table import Reproduction, Row, Table
from regcache.compiler.reproduce.tasks import IMAGENET, Tasks
from regcache.runtime.bench_cold import measure_start
from regcache.runtime.time_alone import Timed


def _times(*_arguments: object) -> Timed:
    return Timed({1: 1.0, 8: 8.0}, 1.0, None)


def _embeddings(deployed: Any, pixels: Any) -> Any:
    with deployed.open() as session:
        return session.run(pixels)[0]


def _tables(plans: Sequence[Plan], _work: Path, _reporter: object) -> Reproduction:
    """Tables of float alone; every file that the tasks name has to be there."""
    return Reproduction(tables=[_table(plan, plan.tasks) for plan in plans])


def _table(plan: Plan, tasks: Tasks) -> Table:
    for value in vars(tasks).values():
        assert not isinstance(value, Path) or value == IMAGENET or value.exists(), value
    return Table(
        source=plan.options.source,
        target=plan.options.target.value,
        evaluated=["imagenet"],
        n_images=1,
        n_available=1,
        limit=tasks.limit,
        train=None,
        train_limit=tasks.train_limit,
        calibration=plan.options.images,
        n_calibration=1,
        rows=[Row(bits="float", cosine=1.0, metrics={"kNN top-1": 1.0})],
    )


def _fetched(*_arguments: object, **_options: object) -> str:
    """The folder of an artifact."""
    return "ARTIFACT"


def _entered(runner: Any) -> Any:
    return runner


def _ended(*_arguments: object) -> None: ...


def _inferred(_runner: object, feed_dict: Mapping[str, Any]) -> dict[str, Any]:
    (images,) = feed_dict.values()
    return {"pooled": np.zeros((len(images), 4), np.float32)}


def _compiled(*arguments: Any, **options: Any) -> Any:
    """As EXTRA and UNLESS of the commands: quickly, though int8 is slower than float."""
    quick = {"registers": "off", "rounding": "nearest", "equalize": False, "int8_share": 1.0}
    return _compile(*arguments, **{**quick, "accept_slower": True, **options})


_compile = regcache.compile
PATCHES: dict[str, Callable[..., Any]] = {
    # times of processes of their own, three rounds of each way
    "regcache.compiler.cli.measure_ways.time_alone": _times,
    "regcache.compiler.cli.measure_ways.embed_alone": _embeddings,
    # a process of its own for each model
    "regcache.compiler.bench.bench.cold_start": measure_start,
    # minutes, and text towers; tests/compiler/reproduce runs it
    "regcache.compiler.cli.reproduce.reproduce": _tables,
    "regcache.compile": _compiled,
    # the network
    "huggingface_hub.snapshot_download": _fetched,
    # a GPU
    "polygraphy.backend.trt.TrtRunner.__enter__": _entered,
    "polygraphy.backend.trt.TrtRunner.__exit__": _ended,
    "polygraphy.backend.trt.TrtRunner.infer": _inferred,
}
"""What stands in for what, while an example runs."""


@contextmanager
def without_waiting() -> Iterator[None]:
    """Put the stand-ins into place."""
    with pytest.MonkeyPatch.context() as patch:
        for name, stand_in in PATCHES.items():
            owner, attribute = _owner_of(name)
            patch.setattr(owner, attribute, _called_alike(getattr(owner, attribute), stand_in))
        yield


def _owner_of(name: str) -> tuple[Any, str]:
    """The module or class that holds a name, and what it is called there."""
    *path, attribute = name.split(".")
    for count in range(len(path), 0, -1):
        try:
            owner: Any = importlib.import_module(".".join(path[:count]))
        except ModuleNotFoundError:
            continue
        for part in path[count:]:
            owner = getattr(owner, part)
        return owner, attribute
    raise ModuleNotFoundError(name)


def _called_alike(original: Callable[..., Any], stand_in: Callable[..., Any]) -> Any:
    """The stand-in, which refuses arguments that the original does not take."""
    signature = inspect.signature(original)

    @functools.wraps(original)
    def call(*arguments: Any, **options: Any) -> Any:
        signature.bind(*arguments, **options)
        return stand_in(*arguments, **options)

    return call
