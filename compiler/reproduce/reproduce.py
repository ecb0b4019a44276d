"""`regcache reproduce`: the tables of the RegCache paper, base quantizer x {off, RegCache}."""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import cached_property
from importlib.metadata import version
from pathlib import Path

from regcache.compiler.encoder.prepare import FLOAT, prepare, reopen
from regcache.compiler.encoder.split import split_for_target
from regcache.compiler.job.context import Context, choose_target
from regcache.compiler.job.options import Calibrator, CompileOptions, Rounding
from regcache.compiler.job.stages import Stage
from regcache.compiler.job.targets import Precision, Simulation
from regcache.compiler.reporter import Reporter, Step
from regcache.compiler.reproduce.embed import EmbedOnce, Encoders
from regcache.compiler.reproduce.estimate import SEARCH_MOST, Work, measure_pace, tell_time
from regcache.compiler.reproduce.kept import Kept, digest, stamps
from regcache.compiler.reproduce.scores import measure
from regcache.compiler.reproduce.table import Recipe, Reproduction, Row, Table
from regcache.compiler.reproduce.tasks import Loaded, Tasks, load_tasks, tasks_for
from regcache.compiler.reproduce.workshop import Variant, Workshop, variants_of
from regcache.export.text_tower import embed_texts
from regcache.passes.model_files import remove_model
from regcache.passes.preprocess import Preprocess
from regcache.passes.temporary import temporary_folder
from regcache.runtime.device import Device, computing_on, find_device
from regcache.runtime.images import ImageFolder, evenly
from regcache.runtime.list_images import list_images
from regcache.runtime.stored_images import AnyImage

_READ, _MEASURE = "reading the tasks", "measuring all encoders"


@dataclass(frozen=True)
class Plan:
    """What to reproduce of one model: every number format of `formats` with every base quantizer.

    Floats that share a scale in blocks have ranges that no calibrator chooses: one quantizer alone.
    `options.images`: the calibration folder, of which `calibration_images` are used. `tasks`: what
    is measured.
    """

    options: CompileOptions
    formats: Sequence[Simulation | Precision]
    calibrators: Sequence[Calibrator]
    tasks: Tasks
    calibration_images: int = 128

    @property
    def variants(self) -> list[Variant]:
        """Every way to quantize."""
        return variants_of(self.formats, self.calibrators)

    @property
    def start(self) -> list[Step]:
        """What takes long before anything is quantized, in order."""
        return [Step(_READ), Step(Stage.EXPORT)]

    @property
    def steps(self) -> list[Step]:
        """What takes long then, in order."""
        searched = [
            Step(str(one), images=SEARCH_MOST) for one in self.variants if not one.weights_only
        ]
        calibrate = Step(Stage.CALIBRATE, images=self.calibration_images)
        return [calibrate, *searched, Step(_MEASURE)]


def reproduce(plans: Sequence[Plan], work: Path, reporter: Reporter) -> Reproduction:
    """Quantize each source in every way and measure its encoders in one pass over the images.

    `work`: a folder that keeps what is done; with the same plans a run goes on where a stopped one
    was. Memory holds the encoders of one model, in float, and what a metric needs of embeddings,
    which lie in files. Raises InputError on bad input, where no task is given, and where a task
    needs texts but the source has no text encoder.
    """
    device = find_device(plans[0].options.device, algebra=True)
    if len(plans) > 1:
        plans = [
            replace(plan, tasks=tasks_for(plan.options.source, plan.tasks, reporter))
            for plan in plans
        ]
    steps = [step for plan in plans for step in plan.start]
    steps += [step for plan in plans for step in plan.steps]
    with reporter.command(*steps), computing_on(device), ExitStack() as stack:
        models = []
        for plan in plans:
            available = list_images(Path(plan.options.images), reporter.warn)
            images = evenly(available, plan.calibration_images)
            kept = stack.enter_context(Kept.of(work, _key(plan, images)))
            models.append(_Model.open(plan, kept, images, device, reporter))
        _tell_estimates(models, reporter)
        return Reproduction(tables=[model.table() for model in models])


def _key(plan: Plan, images: Sequence[AnyImage]) -> str:
    """What decides which encoders are measured."""
    options = plan.options.model_dump(mode="json", exclude={"threads", "scheduler"})
    variants = [str(variant) for variant in plan.variants]
    source = stamps([plan.options.source])
    return digest(version("regcache"), options, variants, source, stamps(images))


def _tell_estimates(models: Sequence["_Model"], reporter: Reporter) -> None:
    """Say how long each model will take, by a few images, and all of them."""
    spans = []
    for model in models:
        work = model.left
        pace = measure_pace(model.encoders([FLOAT]), model.loaded.paths) if work.images else None
        if pace is not None:
            spans.append(work.seconds(pace))
            reporter.step(f"{model.source} takes about {tell_time(*spans[-1])}: {work}")
    if len(spans) > 1:
        least, most = (sum(span[end] for span in spans) for end in (0, 1))
        reporter.step(f"all models take about {tell_time(least, most)}")


@dataclass(frozen=True)
class _Model:
    """A model whose tasks are read and whose float encoder is kept. `images`: to calibrate on."""

    plan: Plan
    kept: Kept
    images: Sequence[AnyImage]
    loaded: Loaded
    device: Device
    reporter: Reporter

    @classmethod
    def open(
        cls,
        plan: Plan,
        kept: Kept,
        images: Sequence[AnyImage],
        device: Device,
        reporter: Reporter,
    ) -> "_Model":
        """Read the tasks of a model and export it, as far as that is not done."""
        source = plan.options.source
        reporter.begin(_READ)
        loaded = load_tasks(
            plan.tasks,
            lambda texts: kept.rows(digest(texts), lambda: embed_texts(source, texts)),
            reporter,
        )
        model = cls(plan, kept, images, loaded, device, reporter)
        kept.result("encoder", model._export)
        return model

    @property
    def source(self) -> str:
        """The source, as it was named."""
        return self.plan.options.source

    @property
    def left(self) -> Work:
        """What is not done yet."""
        if self._done in self.kept.journal:
            return Work(0, 0, 0, 0)
        least, most, searches = 1, 1, 0
        for variant in self.plan.variants:
            if str(variant) in self.kept.journal:
                files = {file for _, file in self.kept.journal[str(variant)]}
                least, most = least + len(files), most + len(files)
            else:
                parts = 0 if variant.weights_only else 3 if self.plan.options.ablate else 1
                least, most = least + 1, most + 1 + parts
                searches += not variant.weights_only
        budget = self.plan.options.search_budget
        return Work(len(self.loaded.paths), least, most, searches, budget)

    def encoders(self, names: Sequence[str]) -> Encoders:
        """Files of the kept folder as encoders of this model, the float one first."""
        known = self.kept.journal["encoder"]
        return Encoders(
            [self.kept.folder / name for name in names],
            Preprocess.from_fields(known["recipe"]),
            known["outputs"],
            known["batch"],
            self.plan.options.threads,
            self.device,
        )

    def table(self) -> Table:
        """Everything measured, as far as it is not known yet."""
        found = self.kept.result(self._done, lambda: self._measure().model_dump(mode="json"))
        return Table.model_validate(found)

    @cached_property
    def _done(self) -> str:
        """What the table is kept by: all that was evaluated."""
        tasks = vars(self.plan.tasks)
        files = [value for value in tasks.values() if isinstance(value, Path)]
        return f"table {digest(tasks, stamps(files), stamps(self.loaded.paths))}"

    @property
    def _calibrated(self) -> int:
        """How many images were calibrated on; none where nothing was to be quantized."""
        return int(self.kept.journal.get("calibrated", 0))

    def _export(self) -> dict[str, object]:
        remove_model(self.kept.folder / FLOAT)  # of a run that was killed just then
        options = self.plan.options
        encoder = prepare(options, self.kept.folder, self.reporter, threads=options.threads)
        return {
            "recipe": vars(encoder.recipe),
            "recipe_from": encoder.recipe_from,
            "outputs": encoder.outputs.first,
            "batch": encoder.batch(options.batch_size),
        }

    def _measure(self) -> Table:
        with temporary_folder() as scratch:
            rows = list(self._rows(scratch))
        names = list(dict.fromkeys(name for _, name in rows))
        self.reporter.begin(_MEASURE)
        with EmbedOnce(self.encoders(names), self.kept, self.reporter) as embed:
            metrics = measure(self.loaded, embed, self.reporter, self.plan.options.seed)
            measured = dict(zip(names, zip(embed.cosines, metrics, strict=True), strict=True))
        tasks, options = self.plan.tasks, self.plan.options
        table = Table(
            source=options.source,
            target=options.target.value,
            evaluated=[str(item) for item in (tasks.labelled, tasks.captions) if item is not None],
            n_images=embed.count,
            n_available=self.loaded.available,
            limit=tasks.limit,
            train=None if tasks.train is None else str(tasks.train),
            train_limit=tasks.train_limit,
            calibration=options.images,
            n_calibration=self._calibrated,
            rows=[
                Row(**recipe.model_dump(), cosine=measured[name][0], metrics=measured[name][1])
                for recipe, name in rows
            ],
        )
        return table.beside_paper(self.loaded.classes)

    def _rows(self, scratch: Path) -> Iterator[tuple[Recipe, str]]:
        """Every row of the table with its graph's file; a variant that is done is not made anew."""
        yield Recipe(bits="float"), FLOAT
        journal, workshop = self.kept.journal, None
        for variant in self.plan.variants:
            key = str(variant)
            if key not in journal:
                workshop = workshop or self._workshop(scratch)
                if not variant.weights_only:
                    self.reporter.begin(key)
                made = workshop.make(variant)
                journal.put(key, [(recipe.model_dump(mode="json"), name) for recipe, name in made])
            for recipe, name in journal[key]:
                yield Recipe.model_validate(recipe), name

    def _workshop(self, scratch: Path) -> Workshop:
        """What quantizes the float encoder that is kept."""
        # Weights are rounded to the nearest, which needs no rows of activations.
        options = self.plan.options.model_copy(update={"rounding": Rounding.NEAREST})
        target, known = choose_target(options), self.kept.journal["encoder"]
        recipe, recipe_from = Preprocess.from_fields(known["recipe"]), known["recipe_from"]
        encoder = reopen(options, self.kept.folder, recipe, recipe_from, self.reporter)
        encoder = split_for_target(encoder, target)
        folder = ImageFolder(self.images, recipe, known["batch"], self.reporter.skipped)
        journal = scratch / "search.jsonl"
        context = Context(options, target, folder, scratch, journal, self.reporter, self.device)
        workshop = Workshop.of(context, encoder, self.kept)
        self.kept.journal.put("calibrated", len(workshop.context.images.paths))
        return workshop
