"""`regcache parity`: an artifact against PyTorch, or against the float ONNX inside it."""

import importlib.util
from contextlib import ExitStack, nullcontext
from dataclasses import replace
from enum import StrEnum
from pathlib import Path

from regcache.compiler.artifact.artifact import Artifact
from regcache.compiler.encoder.prepare import FLOAT
from regcache.compiler.parity.blocks import BLOCKS, compare_blocks
from regcache.compiler.parity.comparison import GALLERY, QUERY, Encoder, compare, compare_knn
from regcache.compiler.reporter import Reporter, Step
from regcache.export.extras import uncollected, unfetched
from regcache.export.source import is_on_hub, is_onnx, open_source, refuse_memory
from regcache.passes.errors import InputError, MissingExtraError, RegcacheError
from regcache.runtime.device import CPU, Device, find_device
from regcache.runtime.images import ImageFolder, list_images
from regcache.runtime.parity import OUTPUT_NAMES, ParityResult, Reference
from regcache.runtime.run_with import RuntimeName, RunWith
from regcache.runtime.thresholds import Thresholds

_LOAD, _COMPARE = "loading both encoders", "comparing"


class ReferenceChoice(StrEnum):
    """What an artifact is compared with."""

    AUTO = "auto"
    PYTORCH = "pytorch"
    FLOAT_ONNX = "float-onnx"


class Against(StrEnum):
    """Which of an artifact's models is compared: what it ships, or the export it came from."""

    ARTIFACT = "artifact"
    FLOAT = "float"


def measure_artifact(
    artifact: Path,
    images: Path,
    reporter: Reporter,
    *,
    thresholds: Thresholds,
    choice: ReferenceChoice,
    against: Against = Against.ARTIFACT,
    per_layer: bool = False,
    labelled: tuple[Path, Path] | None = None,
    class_scores: bool | None = None,
    batch_size: int = 4,
    threads: int | None = None,
    device: str = "cpu",
    verify: Path | None = None,
    run_with: RunWith | None = None,
) -> ParityResult:
    """Run an artifact and its original over a folder of images.

    `per_layer` also compares the output of every block with the float ONNX's. `labelled` is
    (gallery, query) for nearest-neighbour accuracy. `class_scores`: whether the embedding is a
    score for each class; None: as the manifest says. `device`: what runs ONNX Runtime's graphs, but
    for the CPU's integer kernels. `verify`: the public key of whoever has to have signed it.
    `run_with`: what runs the artifact, by default what suits its target; blocks are compared in
    ONNX Runtime. Raises InputError where there is no such device, when the artifact's files are not
    those of its manifest or it is not signed as asked, where there is nothing to compare with, and
    for a threshold of something that is not measured.
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
            kind, reference = _reference(
                opened, choice, against, sessions, threads, place, reporter
            )
            if kind == "pytorch" and names[0] == OUTPUT_NAMES[1]:
                reference = _turned(reference)
            batch_size = candidate.fixed_batch or batch_size
            folder = ImageFolder(paths, opened.recipe, batch_size, reporter.skipped)
            reporter.begin(_COMPARE, f"{len(paths)} images")
            meter = compare(
                reference,
                candidate.run,
                folder,
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
                    reference,
                    candidate.run,
                    *labelled,
                    opened.recipe,
                    reporter,
                    batch_size=batch_size,
                )
            )
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
    return meter.result(
        thresholds, kind, knn_top1_float=knn[0], knn_top1_quantized=knn[1], blocks=blocks
    )


def _steps(labelled: bool, per_layer: bool) -> list[Step]:
    """What takes long; images of other folders take as long as the first do, for all we know."""
    steps = [Step(_LOAD), Step(_COMPARE, images=1)]
    if labelled:
        steps += [Step(GALLERY, images=1), Step(QUERY, images=1)]
    return [*steps, Step(BLOCKS, images=1)] if per_layer else steps


def _reference(
    artifact: Artifact,
    choice: ReferenceChoice,
    against: Against,
    sessions: ExitStack,
    threads: int | None,
    device: Device,
    reporter: Reporter,
) -> tuple[Reference, Encoder]:
    """The original to compare with: the PyTorch one where asked for, else the float ONNX.

    Under `auto` the float ONNX takes the place of a PyTorch original that cannot be run, or is not
    on this machine, with a warning.
    """
    options = artifact.manifest.options
    itself = against is Against.FLOAT
    if itself and choice is ReferenceChoice.FLOAT_ONNX:
        raise InputError(f"{artifact.folder}: {FLOAT} cannot be compared with itself")
    if choice is not ReferenceChoice.FLOAT_ONNX:
        try:
            # Whoever wrote the manifest named the source: only who asks for it goes and gets it.
            with nullcontext() if choice is ReferenceChoice.PYTORCH else unfetched():
                original = _pytorch(options.source, options.resolution, threads)
        except RegcacheError as error:
            if choice is ReferenceChoice.PYTORCH or itself:
                raise
            hint = (
                "; --reference pytorch fetches what is missing" if is_on_hub(options.source) else ""
            )
            reporter.warn(f"comparing with {FLOAT}, not PyTorch: {error}{hint}")
        else:
            if original is not None:
                return "pytorch", original
            if choice is ReferenceChoice.PYTORCH or itself:
                raise InputError(f"{options.source}: is an ONNX file, there is no PyTorch original")
    session = sessions.enter_context(artifact.float_session(threads=threads, device=device))
    return "float-onnx", session.run


def _turned(original: Encoder) -> Encoder:
    """An original with its outputs in reverse, where the last of OUTPUT_NAMES is compared."""
    return lambda images: original(images)[::-1]


def _pytorch(source: str, resolution: int | None, threads: int | None) -> Encoder | None:
    if is_onnx(source):
        return None
    refuse_memory(source)
    if importlib.util.find_spec("torch") is None:
        raise MissingExtraError("the PyTorch original", extra="export", module="torch")
    with uncollected():
        import torch

        if threads is not None:
            torch.set_num_threads(threads)
        return open_source(source).reference(resolution=resolution)
