"""What every stage of a compilation is told."""

from dataclasses import dataclass
from pathlib import Path

from regcache.compiler.job.options import CompileOptions
from regcache.compiler.job.targets import Target, resolve_target, simulate
from regcache.compiler.reporter import Reporter
from regcache.runtime.device import CPU, Device
from regcache.runtime.images import ImageFolder
from regcache.runtime.session import u8s8_saturates


@dataclass(frozen=True)
class SearchOptions:
    """Where the search runs and how long it may take.

    `scheduler`: "threads", "processes" or the address of a Dask scheduler. `budget`: seconds after
    which nothing more is tried; None for no limit. `journal`: where results are noted.
    """

    journal: Path
    scheduler: str = "threads"
    workers: int | None = None
    budget: float | None = None


@dataclass(frozen=True)
class Context:
    """What a compilation is asked for, and where it works.

    `target`: the number formats that the options come to on this CPU. `images`: the calibration
    images; without the unreadable ones, once the first calibration has found these. `scratch`: a
    folder for files that do not last. `journal`: where a search notes results until it is done.
    `device`: what runs graphs and computes with dense arrays.
    """

    options: CompileOptions
    target: Target
    images: ImageFolder
    scratch: Path
    journal: Path
    reporter: Reporter
    device: Device = CPU

    @property
    def search(self) -> SearchOptions:
        """Where a search runs, and how long it may take."""
        options = self.options
        return SearchOptions(
            self.journal, options.scheduler, options.threads, options.search_budget
        )


def choose_target(options: CompileOptions) -> Target:
    """The number formats that the options ask for, on this CPU."""
    target = resolve_target(
        options.target,
        u8s8_saturates=options.profile.integers and u8s8_saturates(),
        precision=options.precision,
    )
    return target if options.simulate is None else simulate(target, options.simulate)
