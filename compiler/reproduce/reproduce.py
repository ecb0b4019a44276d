"""`regcache reproduce`: the tables of the RegCache paper, base quantizer x {off, RegCache}."""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from enum import StrEnum
from pathlib import Path
from typing import Self

import numpy as np
from numpy.typing import NDArray

from regcache.compiler.calibration.calibrate import calibrate
from regcache.compiler.calibration.folds import Observed
from regcache.compiler.calibration.quantizer import Quantizer
from regcache.compiler.curation.find import find_registers, splice
from regcache.compiler.encoder.float_encoder import FloatEncoder
from regcache.compiler.encoder.prepare import prepare
from regcache.compiler.encoder.split import split_for_target
from regcache.compiler.job.context import Context, choose_target
from regcache.compiler.job.options import Calibrator, CompileOptions
from regcache.compiler.job.stages import Stage
from regcache.compiler.job.targets import Precision, Simulation
from regcache.compiler.quantization.plain import quantize_plainly
from regcache.compiler.reporter import Reporter, Step
from regcache.compiler.reproduce.table import Recipe, Row, Table
from regcache.compiler.reproduce.tasks import (
    Embedded,
    Tasks,
    load_tasks,
    measure,
)
from regcache.export.text_tower import embed_texts
from regcache.passes.onnx_file import save_graph
from regcache.passes.preprocess import Preprocess
from regcache.passes.temporary import temporary_folder
from regcache.runtime.device import computing_on, find_device
from regcache.runtime.images import ImageFolder, evenly
from regcache.runtime.list_images import list_images
from regcache.runtime.session import OrtSession
from regcache.runtime.similarity import row_cosines

Floats = NDArray[np.float32]

_READ, _MEASURE = "reading the tasks", "measuring all encoders"
# Images through the float model that take as long as a search.
_SEARCH = 700.0
# What the table calls the base quantizer of floats whose scales are found as they are rounded.
_BLOCK_SCALES = "block scales"


@dataclass(frozen=True)
class Plan:
    """What to reproduce: every number format of `formats` with every base quantizer.

    Floats that share a scale in blocks have ranges that no calibrator chooses: one quantizer alone.
    `options.images`: the calibration folder, of which `calibration_images` are used.
    """

    options: CompileOptions
    formats: Sequence[Simulation | Precision]
    calibrators: Sequence[Calibrator]
    calibration_images: int = 128

    @property
    def steps(self) -> list[Step]:
        """What takes long, in order."""
        variants = [
            Step(_variant(form, calibrator), images=_SEARCH)
            for form in self.formats
            if form is not Simulation.W4A16
            for calibrator in self.quantizers(form)
        ]
        calibrate = Step(Stage.CALIBRATE, images=self.calibration_images)
        return [Step(_READ), Step(Stage.EXPORT), calibrate, *variants, Step(_MEASURE)]

    def quantizers(self, form: Simulation | Precision) -> Sequence[Calibrator | None]:
        """The calibrators for a number format; None where none has a say."""
        return (None,) if isinstance(form, Precision) else self.calibrators


def _variant(form: Simulation | Precision, calibrator: Calibrator | None) -> str:
    return f"{form.value}, {_BLOCK_SCALES if calibrator is None else calibrator.value}"


def reproduce(plan: Plan, tasks: Tasks, reporter: Reporter) -> Table:
    """Quantize the source in every way and measure all encoders in one pass over the images.

    In memory are every encoder, in float, and its embeddings. Raises InputError on bad input,
    where no task is given, and where a task needs texts but the source has no text encoder.
    """
    options = plan.options
    device = find_device(options.device, algebra=True)
    available = list_images(Path(options.images), reporter.warn)
    paths = evenly(available, plan.calibration_images)
    with (
        reporter.command(*plan.steps),
        temporary_folder() as scratch,
        ExitStack() as stack,
    ):
        stack.enter_context(computing_on(device))
        reporter.begin(_READ)
        loaded = load_tasks(tasks, lambda texts: embed_texts(options.source, texts), reporter)
        encoder = prepare(options, scratch, reporter)
        target = choose_target(options)
        encoder = split_for_target(encoder, target)
        batch = encoder.batch(options.batch_size)
        folder = ImageFolder(paths, encoder.recipe, batch, reporter.skipped)
        journal = scratch / "search.jsonl"
        context = Context(options, target, folder, scratch, journal, reporter, device)
        workshop = _Workshop.of(context, encoder)
        variants = list(workshop.make(plan))
        files = list(dict.fromkeys(path for _, path in variants))
        sessions = [
            OrtSession(
                path,
                threads=options.threads,
                integers=False,
                outputs=encoder.outputs.first,
                device=device,
            )
            for path in files
        ]
        for session in sessions:
            stack.enter_context(session)
        passes = _OnePass(sessions, encoder.recipe, batch, reporter)
        reporter.begin(_MEASURE)
        metrics = measure(loaded, passes, reporter, options.seed)
    measured = dict(zip(files, zip(passes.cosines, metrics, strict=True), strict=True))
    rows = []
    for recipe, path in variants:
        cosine, shares = measured[path]
        rows.append(Row(**recipe.model_dump(), cosine=cosine, metrics=shares))
    return Table(
        source=options.source,
        target=options.target.value,
        evaluated=[str(item) for item in (tasks.labelled, tasks.captions) if item is not None],
        n_images=passes.count,
        n_available=loaded.available,
        limit=tasks.limit,
        train=None if tasks.train is None else str(tasks.train),
        train_limit=tasks.train_limit,
        calibration=options.images,
        n_calibration=len(workshop.context.images.paths),
        rows=rows,
    )


@dataclass(frozen=True)
class _Workshop:
    """Makes the graphs to measure, as files in the context's scratch folder.

    `statistics`: of the encoder's activations, by the name of the site.
    """

    context: Context
    encoder: FloatEncoder
    statistics: dict[str, Observed]

    @classmethod
    def of(cls, context: Context, encoder: FloatEncoder) -> Self:
        """A workshop for an encoder, which is calibrated for it."""
        calibrated = calibrate(context, encoder)
        statistics = {name: activation.whole for name, activation in calibrated.statistics.items()}
        return cls(replace(context, images=calibrated.images), encoder, statistics)

    def make(self, plan: Plan) -> Iterator[tuple[Recipe, Path]]:
        """Every row of the table with its graph's file; without registers, two rows share it."""
        yield Recipe(bits="float"), self.encoder.path
        for form in plan.formats:
            if form is Simulation.W4A16:
                yield self._weights_only(form)
                continue
            for calibrator in plan.quantizers(form):
                yield from self._off_and_on(form, calibrator)

    def _weights_only(self, simulation: Simulation) -> tuple[Recipe, Path]:
        recipe = Recipe(
            bits=simulation.value,
            quantizer="round to nearest",
            reason="Registers: none (activations stay float)",
        )
        context = self._simulating(simulation)
        return recipe, self._save(recipe, self.encoder, self.statistics, context)

    def _off_and_on(
        self, form: Simulation | Precision, calibrator: Calibrator | None
    ) -> Iterator[tuple[Recipe, Path]]:
        """The base quantizer without registers, then with those that the search decides on."""
        off = Recipe(bits=form.value, quantizer=calibrator or _BLOCK_SCALES)
        self.context.reporter.begin(_variant(form, calibrator))
        context = self._simulating(form, calibrator)
        without = self._save(off, self.encoder, self.statistics, context)
        yield off, without
        curated = find_registers(context, self.encoder)
        shipped = {"registers": str(curated.setting), "reason": curated.record.reason}
        on = off.model_copy(update=shipped)
        if not curated.setting.changes:
            yield on, without
            return
        placed = splice(self.encoder, curated)
        again = self.of(context, placed)
        yield on, self._save(on, placed, again.statistics, context)

    def _simulating(
        self, form: Simulation | Precision, calibrator: Calibrator | None = None
    ) -> Context:
        """The context with another number format, and maybe another calibrator."""
        key = "precision" if isinstance(form, Precision) else "simulate"
        update: dict[str, StrEnum] = {key: form}
        if calibrator is not None:
            update["calibrator"] = calibrator
        options = self.context.options.model_copy(update=update)
        journal = self.context.scratch / f"{form}-{options.calibrator}.jsonl"
        return replace(
            self.context, options=options, target=choose_target(options), journal=journal
        )

    def _save(
        self,
        recipe: Recipe,
        encoder: FloatEncoder,
        statistics: dict[str, Observed],
        context: Context,
    ) -> Path:
        kind = "off" if recipe.registers == "off" else "on"
        path = context.scratch / f"{recipe.bits}-{recipe.quantizer}-{kind}.onnx"
        save_graph(quantize_plainly(encoder, statistics, Quantizer.of(context)), path)
        return path


class _OnePass:
    """Runs each image once through every encoder, the float one first; keeps pooled outputs."""

    def __init__(
        self, sessions: Sequence[OrtSession], recipe: Preprocess, batch: int, reporter: Reporter
    ) -> None:
        self._sessions, self._recipe, self._batch = sessions, recipe, batch
        self._reporter = reporter
        self._cosines = np.zeros(len(sessions))
        self.count = 0

    @property
    def cosines(self) -> list[float]:
        """The mean cosine to float of each encoder, over the `count` images evaluated."""
        return [float(total / self.count) for total in self._cosines]

    def __call__(self, paths: list[Path], label: str, *, evaluated: bool = True) -> Embedded:
        """The images' embeddings; those that are not `evaluated` do not count in the cosine."""
        folder = ImageFolder(paths, self._recipe, self._batch, self._reporter.skipped)
        kept: list[Floats] = []
        read: list[Path] = []
        for batch in self._reporter.images(folder, len(paths), label):
            outputs = [session.run(batch.images)[0] for session in self._sessions]
            pooled = [output.reshape(len(batch.paths), -1) for output in outputs]
            if not kept:
                kept = [np.empty((len(paths), part.shape[1]), np.float32) for part in pooled]
            for rows, part in zip(kept, pooled, strict=True):
                rows[len(read) : len(read) + len(part)] = part
            read += [path for path in batch.paths if isinstance(path, Path)]  # all of them are
            if evaluated:
                self._add_cosines(pooled)
        return Embedded(read, [rows[: len(read)] for rows in kept])

    def _add_cosines(self, pooled: list[Floats]) -> None:
        reference, *_ = wide = [part.astype(np.float64) for part in pooled]
        self._cosines += [row_cosines(reference, part).sum() for part in wide]
        self.count += len(reference)
