"""`regcache parity`: an artifact against PyTorch, or against the float ONNX inside it."""

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from regcache.compiler.artifact.artifact import Artifact
from regcache.compiler.parity.blocks import BLOCKS, compare_blocks
from regcache.compiler.parity.comparison import GALLERY, QUERY, compare, compare_knn
from regcache.compiler.parity.own_original import OwnOriginal
from regcache.compiler.parity.reference import Against, Original, ReferenceChoice, open_original
from regcache.compiler.reporter import Reporter, Step
from regcache.export.extras import quiet
from regcache.passes.errors import InputError
from regcache.runtime.baseline import Baseline, fingerprint
from regcache.runtime.device import CPU, find_device
from regcache.runtime.images import ImageFolder, Skipped
from regcache.runtime.list_images import list_images
from regcache.runtime.parity_result import Compared, ParityResult
from regcache.runtime.pixel_parity import PixelParity, compare_pixels
from regcache.runtime.run_with import RuntimeName, RunWith
from regcache.runtime.stored_images import AnyImage
from regcache.runtime.thresholds import Thresholds

_LOAD, _COMPARE = "loading both encoders", "comparing"


@dataclass(frozen=True)
class Embeddings:
    """The embeddings of the images that were compared, float64 [N, D] each, in order of `paths`."""

    paths: Sequence[AnyImage]
    original: NDArray[np.float64]
    artifact: NDArray[np.float64]


def measure_artifact(
    artifact: Path,
    images: Path,
    reporter: Reporter,
    *,
    thresholds: Thresholds,
    choice: ReferenceChoice | OwnOriginal,
    against: Against = Against.ARTIFACT,
    per_layer: bool = False,
    labelled: tuple[Path, Path] | None = None,
    class_scores: bool | None = None,
    batch_size: int = 4,
    threads: int | None = None,
    device: str = "cpu",
    verify: Path | None = None,
    run_with: RunWith | None = None,
    told: Callable[[Embeddings], None] | None = None,
    baseline: Baseline | None = None,
) -> ParityResult:
    """Run an artifact and its original over a folder of images.

    `choice`: what to compare with, by the artifact's source, or given. `per_layer` also compares
    the output of every block with the float ONNX's. `labelled` is (gallery, query) for
    nearest-neighbour accuracy. `class_scores`: whether the embedding is a score for each class;
    None: as the manifest says. `device`: what runs ONNX Runtime's graphs, but for the CPU's integer
    kernels. `verify`: the public key of whoever has to have signed it. `run_with`: what runs the
    artifact, by default what suits its target; blocks are compared in ONNX Runtime. `told`: is
    given the embeddings that were compared. `baseline`: an earlier comparison, of the same source
    and images. Raises InputError where there is no such device, when the artifact's files are not
    those of its manifest or it is not signed as asked, where there is nothing to compare with, for
    a threshold of something that is not measured, and for a baseline of something else.
    """
    thresholds.ask_for(knn=labelled is not None, blocks=per_layer)
    place = find_device(device)
    run_with = run_with or RunWith()
    if per_layer and run_with.runtime is RuntimeName.OPENVINO:
        raise InputError("--per-layer looks into ONNX Runtime: --runtime onnxruntime")
    with reporter.command(*_steps(labelled is not None, per_layer)):
        reporter.begin(_LOAD)
        opened = Artifact.open(artifact, verify=verify)
        encoder = opened.manifest.encoder
        scores = encoder.class_scores if class_scores is None else class_scores
        thresholds.ask_for(knn=labelled is not None, blocks=per_layer, scores=scores)
        paths = list_images(images, reporter.warn)
        source = opened.manifest.source
        compared = Compared(
            source=source.name, source_sha256=source.sha256, images_sha256=fingerprint(paths)
        )
        if baseline is not None:
            baseline.check_alike(compared)
        with ExitStack() as sessions:
            candidate = sessions.enter_context(
                opened.session(
                    threads=threads,
                    device=CPU if opened.runs_integers else place,
                    run_with=run_with,
                )
                if against is Against.ARTIFACT
                else opened.float_session(threads=threads, device=place, run_with=run_with)
            )
            names = candidate.output_names
            original = (
                choice.giving(names)
                if isinstance(choice, OwnOriginal)
                else open_original(
                    opened, choice, against, sessions, threads, place, reporter
                ).led_by(names[0])
            )
            batch_size = candidate.fixed_batch or batch_size
            skipped: list[Skipped] = []
            folder = ImageFolder(paths, opened.recipe, batch_size, reporter.skipped)
            pixels = _pixels(opened, original, paths, reporter)
            reporter.begin(_COMPARE, f"{len(paths)} images")
            meter = compare(
                original.run,
                candidate.run,
                folder.telling(skipped.append),
                reporter,
                names,
                prefix_tokens=encoder.leading_tokens,
                tokens=encoder.gives_tokens,
                class_scores=scores,
            )
            knn = (
                (None, None)
                if labelled is None
                else compare_knn(
                    original.run,
                    candidate.run,
                    *labelled,
                    opened.recipe,
                    reporter,
                    batch_size=batch_size,
                )
            )
        if told is not None:
            told(Embeddings(folder.without(skipped).paths, *meter.embeddings()))
        said = replace(folder, on_skip=None)
        with opened.unreplaced():
            blocks = (
                compare_blocks(
                    opened,
                    said,
                    reporter,
                    float_model=against is Against.FLOAT,
                    threads=threads,
                    device=place,
                )
                if per_layer
                else None
            )
    result = meter.result(
        thresholds,
        original.kind,
        knn_top1_float=knn[0],
        knn_top1_quantized=knn[1],
        blocks=blocks,
        pixels=pixels,
        compared=compared,
    )
    return result if baseline is None else baseline.hold(result)


def _pixels(
    artifact: Artifact, original: Original, paths: Sequence[AnyImage], reporter: Reporter
) -> PixelParity | None:
    """The recipe beside the source's own processor, as both sides are given the recipe's pixels."""
    if original.processor is None:
        return None
    with quiet():
        pixels = compare_pixels(paths, artifact.recipe, original.processor)
    said = None if pixels is None else pixels.warning(artifact.manifest.options.source)
    if said is not None:
        reporter.warn(said)
    return pixels


def _steps(labelled: bool, per_layer: bool) -> list[Step]:
    """What takes long; images of other folders take as long as the first do, for all we know."""
    steps = [Step(_LOAD), Step(_COMPARE, images=1)]
    if labelled:
        steps += [Step(GALLERY, images=1), Step(QUERY, images=1)]
    return [*steps, Step(BLOCKS, images=1)] if per_layer else steps
