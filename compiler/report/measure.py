"""Measure an artifact for its report: parity on images, and outliers before and after registers."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from regcache.compiler.artifact.artifact import REGISTERS, Artifact
from regcache.compiler.curation.setting import place_registers
from regcache.compiler.encoder.float_encoder import FloatEncoder
from regcache.compiler.encoder.prepare import FLOAT, prepare
from regcache.compiler.inspection.measure import INSPECTING, measure_blocks
from regcache.compiler.job.stages import EXPORTING
from regcache.compiler.job.staging import unnamed
from regcache.compiler.parity.measure import Embeddings, measure_artifact
from regcache.compiler.parity.reference import ReferenceChoice
from regcache.compiler.report.subject import Measured, Outliers
from regcache.compiler.reporter import Reporter, Step
from regcache.passes.preprocess import Preprocess
from regcache.passes.temporary import temporary_folder
from regcache.runtime.device import Device, find_device
from regcache.runtime.images import evenly
from regcache.runtime.run_with import RunWith
from regcache.runtime.stored_images import AnyImage
from regcache.runtime.thresholds import Thresholds

# The ranges of a few dozen images tell where outliers stand; more cost a float pass each.
_INSPECTED = 48


@dataclass(frozen=True)
class Comparison:
    """How an artifact is compared on images; every field as `measure_artifact` has it."""

    thresholds: Thresholds
    choice: ReferenceChoice = ReferenceChoice.AUTO
    per_layer: bool = False
    batch_size: int = 4
    threads: int | None = None
    device: str = "cpu"
    verify: Path | None = None
    run_with: RunWith | None = None


@dataclass(frozen=True)
class _FloatFile:
    """The artifact's own float.onnx, as a source."""

    source: str
    preprocess: Preprocess
    output: str | None
    source_file: Path | None = None
    resolution: int | None = None


def measure(artifact: Artifact, images: Path, how: Comparison, reporter: Reporter) -> Measured:
    """Compare an artifact with its original and look for outliers in its float encoder.

    Raises InputError as `measure_artifact` does.
    """
    found: list[Embeddings] = []
    parity = measure_artifact(
        artifact.folder,
        images,
        reporter,
        thresholds=how.thresholds,
        choice=how.choice,
        per_layer=how.per_layer,
        batch_size=how.batch_size,
        threads=how.threads,
        device=how.device,
        verify=how.verify,
        run_with=how.run_with,
        told=found.append,
    )
    (embeddings,) = found
    outliers = None
    if FLOAT in artifact.manifest.files:
        paths = evenly(embeddings.paths, _INSPECTED)
        outliers = _outliers(artifact, paths, how, reporter)
    return Measured(parity, embeddings, outliers)


def _outliers(
    artifact: Artifact, paths: Sequence[AnyImage], how: Comparison, reporter: Reporter
) -> Outliers:
    device, setting = find_device(how.device), artifact.manifest.curation.setting
    again = [Step(INSPECTING, images=len(paths))] if setting.changes else []
    with (
        reporter.command(EXPORTING, Step(INSPECTING, images=len(paths)), *again),
        artifact.unreplaced(),
        temporary_folder() as scratch,
        unnamed(scratch),
    ):
        source = _FloatFile(
            str(artifact.float_model), artifact.recipe, artifact.manifest.options.output
        )
        encoder = prepare(source, scratch, reporter, verify=False)
        before = _blocks(encoder, paths, how, device, reporter)
        after = None
        if setting.changes:
            with np.load(artifact.folder / REGISTERS) as file:
                placed = place_registers(encoder.graph, encoder.view, setting, file["tokens"])
            after = _blocks(encoder.rewritten(*placed), paths, how, device, reporter)
    return replace(before, after=after.before if after else None)


def _blocks(
    encoder: FloatEncoder,
    paths: Sequence[AnyImage],
    how: Comparison,
    device: Device,
    reporter: Reporter,
) -> Outliers:
    blocks, count = measure_blocks(
        encoder, paths, reporter, batch_size=how.batch_size, threads=how.threads, device=device
    )
    return Outliers(count, blocks, None)
