"""`regcache registers`: a float encoder with its registers, ready for anybody's quantizer."""

import shutil
from collections.abc import Mapping
from contextlib import ExitStack
from enum import StrEnum
from pathlib import Path
from typing import Any

import numpy as np

from regcache.compiler.curation.called_libraries import NNCF, ORT
from regcache.compiler.curation.curate import Curated
from regcache.compiler.curation.find import ForOthers, find_registers, splice
from regcache.compiler.curation.journal import journal_file
from regcache.compiler.curation.other_quantizer import OtherQuantizer
from regcache.compiler.curation.quantizer_command import QuantizerCommand
from regcache.compiler.curation.record import CurationRecord
from regcache.compiler.curation.study import ReferenceImages
from regcache.compiler.encoder.float_encoder import FloatEncoder
from regcache.compiler.encoder.pass_record import PassRecord
from regcache.compiler.encoder.prepare import prepare
from regcache.compiler.job.breadth import LEAST_IMAGES, Breadth
from regcache.compiler.job.calibration_images import calibration_images
from regcache.compiler.job.context import Context, choose_target
from regcache.compiler.job.effort import Effort
from regcache.compiler.job.options import Calibrator, CompileOptions
from regcache.compiler.job.record import Record
from regcache.compiler.job.stages import EXPORTING, Stage
from regcache.compiler.job.staging import real_path, staged_file
from regcache.compiler.job.targets import Precision, Simulation, TargetName
from regcache.compiler.reporter import Reporter, Step
from regcache.export.onnx_file import sidecar
from regcache.passes.errors import InputError
from regcache.passes.model_files import check_name, model_files
from regcache.passes.onnx_file import save_graph
from regcache.passes.read_graph import read_graph
from regcache.passes.temporary import temporary_folder
from regcache.runtime.device import computing_on, find_device
from regcache.runtime.images import ImageFolder, evenly

# The fields of CompileOptions that a search for registers goes by, beside source and images.
TAKEN = frozenset(
    {"max_images", "resolution", "batch_size", "threads", "device", "seed"}
    | {"effort", "search_budget", "scheduler", "ablate"}
)
# Images through the float model that take as long as a search, for each reference image.
_SEARCH = 3.6


class Judge(StrEnum):
    """What a search judges registers by: number formats that are simulated, or a real quantizer.

    Ranges are min-max, activations have one for a tensor and weights one for a channel. With `ort`
    and `nncf` the search is by `w8a8`, and the library's own quantizer decides at the end.
    """

    W8A8 = "w8a8"
    W6A6 = "w6a6"
    W4A4 = "w4a4"
    FP8 = "fp8"
    ORT = "ort"
    NNCF = "nncf"

    @property
    def other(self) -> OtherQuantizer | None:
        """The library whose quantizer decides; None for none."""
        return {Judge.ORT: ORT, Judge.NNCF: NNCF}.get(self)

    @property
    def formats(self) -> Mapping[str, Any]:
        """The fields of CompileOptions that mean its number formats."""
        if self is Judge.FP8:
            formats = {"target": TargetName.TENSORRT, "precision": Precision.FP8}
        else:
            bits = Simulation.W8A8 if self.other is not None else Simulation(self.value)
            formats = {"target": TargetName.ORT_CPU, "simulate": bits}
        return {**formats, "calibrator": Calibrator.MIN_MAX}


class RegistersResult(Record):
    """What `regcache registers` found and wrote."""

    source: str
    """The source, as it was named."""
    judge: Judge
    """What the search judged by."""
    quantizer: tuple[str, ...] | None = None
    """The command that had the last word, word by word; None where none was given."""
    registers: int
    """R, how many registers the written encoder has; 0 where they would not have helped."""
    deleted: int
    """How many sinks it deletes from each image."""
    curation: CurationRecord
    """The search: the setting, the candidates, what was tried, and the decision."""
    passes: tuple[PassRecord, ...]
    """What each pass did, from the source's file to the written one."""


def add_registers(
    asked: CompileOptions,
    judge: Judge,
    output: Path,
    reporter: Reporter,
    command: QuantizerCommand | None = None,
) -> RegistersResult:
    """Write the float encoder with the registers that the search finds to `output`, an ONNX file.

    Its recipe goes beside it (see sidecar). Without registers that help, it is the float encoder as
    `regcache export` writes it. `asked`: source, images and what bounds the search; its number
    formats are those of `judge`. `command`: a quantizer that has the last word. Raises InputError
    on bad input, and then writes nothing.
    """
    given = CompileOptions(**{**_told(asked), **judge.formats})
    if asked.effort is Effort.FAST:
        raise InputError("--effort fast looks for no registers: balanced or thorough")
    check_name(output)
    if output.exists() and real_path(Path(given.source)) == real_path(output):
        raise InputError(f"{output}: is the source; name another file")
    other = _last_word(judge, command)
    device = find_device(given.device, algebra=True)
    drawn = calibration_images(
        given.images, given.max_images, given.seed, reporter.warn, calibrates=False
    )
    paths = evenly(drawn, Breadth.of(given.effort).images)
    steps = (EXPORTING, Step(Stage.SEARCH, images=_SEARCH * len(paths)), Step(Stage.WRITE))
    with ExitStack() as ends:
        scratch = ends.enter_context(temporary_folder())
        ends.enter_context(computing_on(device))
        ends.enter_context(reporter.command(*steps))
        staged = ends.enter_context(staged_file(output))
        encoder = prepare(given, scratch, reporter, threads=given.threads)
        folder = ImageFolder(
            paths, encoder.recipe, encoder.batch(given.batch_size), reporter.skipped
        )
        journal = journal_file(output)
        target = choose_target(given)
        context = Context(given, target, folder, scratch, journal, reporter, device)
        others = ForOthers(_reference(folder, given.images), other)
        curated = find_registers(context, encoder, others)
        reporter.begin(Stage.WRITE)
        placed = splice(encoder, curated)
        _write(encoder, placed, staged)
        sidecar(staged).write_text(encoder.recipe.to_json(), encoding="utf-8")
    return _result(given.source, judge, command, curated, placed)


def _last_word(judge: Judge, command: QuantizerCommand | None) -> OtherQuantizer | None:
    """The quantizer that decides. Raises InputError where it cannot be called, or there are two."""
    if command is not None and judge.other is not None:
        raise InputError(f"{command.asked_by} and --for {judge.value}: only one can decide")
    other = command or judge.other
    if other is not None:
        other.check()
    return other


def _told(asked: CompileOptions) -> dict[str, Any]:
    """The fields that somebody gave; `source_file` is left out of a dump."""
    return {name: getattr(asked, name) for name in asked.model_fields_set}


def _reference(folder: ImageFolder, images: str) -> ReferenceImages:
    """The images that can be read. Raises InputError for too few to search with."""
    read = np.concatenate([batch.images for batch in folder])
    if len(read) < LEAST_IMAGES:
        raise InputError(f"{images}: a search needs {LEAST_IMAGES} images, not {len(read)}")
    return ReferenceImages.deal(read)


def _write(encoder: FloatEncoder, placed: FloatEncoder, path: Path) -> None:
    """Write the encoder with registers, or the file as it was exported where there are none."""
    if placed.graph is not encoder.graph:
        save_graph(placed.graph, path)
    elif len(model_files(encoder.path)) > 1:  # the file names the one that holds its weights
        save_graph(read_graph(encoder.path), path)
    else:
        shutil.move(encoder.path, path)


def _result(
    source: str,
    judge: Judge,
    command: QuantizerCommand | None,
    curated: Curated,
    placed: FloatEncoder,
) -> RegistersResult:
    setting = curated.setting
    return RegistersResult(
        source=source,
        judge=judge,
        quantizer=None if command is None else command.words,
        registers=setting.count,
        deleted=setting.delete_count,
        curation=curated.record,
        passes=placed.passes,
    )
