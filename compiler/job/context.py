"""The context of a compilation, which every stage is given."""

from dataclasses import dataclass
from pathlib import Path

from regcache.compiler.job.effort import Effort
from regcache.compiler.job.options import Calibrator, CompileOptions, Rounding
from regcache.compiler.job.targets import Precision, Target, resolve_target, simulate
from regcache.compiler.reporter import Reporter
from regcache.runtime.device import CPU, Device
from regcache.runtime.images import ImageFolder
from regcache.runtime.session import u8s8_saturates


@dataclass(frozen=True)
class SearchOptions:
    """Where the search runs and how long it may take.

    `scheduler`: "threads", "processes" or the address of a Dask scheduler. `budget`: seconds after
    which nothing more is tried; None for no limit. `journal`: where results are noted. `ablate`:
    whether registers and deletion are measured apart, too.
    """

    journal: Path
    scheduler: str = "threads"
    workers: int | None = None
    budget: float | None = None
    ablate: bool = False


@dataclass(frozen=True)
class Context:
    """What a compilation is asked for, and where it works.

    `target`: the number formats that follow from the options and this CPU. `images`: the
    calibration images; once the first calibration has read them, without those that cannot be read.
    `scratch`: a folder for temporary files. `journal`: the file where a search notes results until
    it is done. `device`: what runs graphs and computes with dense arrays.
    """

    options: CompileOptions
    target: Target
    images: ImageFolder
    scratch: Path
    journal: Path
    reporter: Reporter
    device: Device = CPU

    @property
    def source(self) -> str:
        """The source, as messages name it."""
        return self.options.source

    @property
    def threads(self) -> int | None:
        """Threads of ONNX Runtime; None for all CPUs."""
        return self.options.threads

    @property
    def seed(self) -> int:
        """Seed of all that is drawn at random."""
        return self.options.seed

    @property
    def precision(self) -> Precision:
        """What the linears compute in."""
        return self.options.precision

    @property
    def calibrator(self) -> Calibrator:
        """How the range of an activation is chosen."""
        return self.options.calibrator

    @property
    def in_half(self) -> bool:
        """Whether what stays float computes in FP16."""
        return self.options.in_half

    @property
    def fuses(self) -> bool:
        """Whether the model is written for ONNX Runtime alone, and each node of it costs time."""
        return self.options.fuses

    @property
    def rounding(self) -> Rounding:
        """How weights are rounded, where their format allows it."""
        return self.options.rounding

    @property
    def effort(self) -> Effort:
        """How much is tried."""
        return self.options.effort

    @property
    def search(self) -> SearchOptions:
        """Where a search runs, and how long it may take."""
        options = self.options
        limits = (options.threads, options.search_budget, options.ablate)
        return SearchOptions(self.journal, options.scheduler, *limits)


def choose_target(options: CompileOptions) -> Target:
    """The number formats that the options ask for, on this CPU."""
    target = resolve_target(
        options.target,
        u8s8_saturates=options.profile.integers and u8s8_saturates(),
        precision=options.precision,
    )
    return target if options.simulate is None else simulate(target, options.simulate)
