"""`regcache parity`: an artifact against PyTorch, or against the float ONNX inside it."""

import importlib.util
from contextlib import ExitStack
from enum import StrEnum
from pathlib import Path

from regcache.compiler.artifact import Artifact
from regcache.compiler.comparison import Encoder, compare, compare_knn
from regcache.compiler.prepare import FLOAT
from regcache.compiler.reporter import Reporter
from regcache.export.source import open_source
from regcache.passes.errors import InputError, MissingExtraError, RegcacheError
from regcache.runtime.images import ImageFolder, list_images
from regcache.runtime.parity import ParityResult, Reference


class ReferenceChoice(StrEnum):
    """What an artifact is compared with."""

    AUTO = "auto"
    PYTORCH = "pytorch"
    FLOAT_ONNX = "float-onnx"


def measure_artifact(
    artifact: Path,
    images: Path,
    reporter: Reporter,
    *,
    min_cosine: float,
    choice: ReferenceChoice,
    labelled: tuple[Path, Path] | None = None,
    batch_size: int = 4,
    threads: int | None = None,
) -> ParityResult:
    """Run an artifact and its original over a folder of images.

    `labelled` is (gallery, query) for nearest-neighbour accuracy. Raises InputError when the
    artifact's files are not those of its manifest, and where there is nothing to compare with.
    """
    opened = Artifact.open(artifact)
    paths = list_images(images)
    with ExitStack() as sessions:
        candidate = sessions.enter_context(opened.session(threads=threads))
        kind, reference = _reference(opened, choice, sessions, threads, reporter)
        batch_size = candidate.fixed_batch or batch_size
        folder = ImageFolder(paths, opened.recipe, batch_size, reporter.skipped)
        prefix = opened.manifest.encoder.prefix_tokens or 0
        meter = compare(reference, candidate.run, folder, reporter, prefix_tokens=prefix)
        knn = (
            (None, None)
            if labelled is None
            else compare_knn(
                reference, candidate.run, *labelled, opened.recipe, reporter, batch_size=batch_size
            )
        )
    return meter.result(min_cosine, kind, knn_top1_float=knn[0], knn_top1_quantized=knn[1])


def _reference(
    artifact: Artifact,
    choice: ReferenceChoice,
    sessions: ExitStack,
    threads: int | None,
    reporter: Reporter,
) -> tuple[Reference, Encoder]:
    """The PyTorch original where wanted and possible, else the float ONNX; auto says which."""
    options = artifact.manifest.options
    if choice is not ReferenceChoice.FLOAT_ONNX:
        try:
            original = _pytorch(options.source, options.resolution, threads)
        except RegcacheError as error:
            if choice is ReferenceChoice.PYTORCH:
                raise
            reporter.warn(f"comparing with {FLOAT}, not PyTorch: {error}")
        else:
            if original is not None:
                return "pytorch", original
            if choice is ReferenceChoice.PYTORCH:
                raise InputError(f"{options.source}: is an ONNX file, there is no PyTorch original")
    return "float-onnx", sessions.enter_context(artifact.float_session(threads=threads)).run


def _pytorch(source: str, resolution: int | None, threads: int | None) -> Encoder | None:
    if source.endswith(".onnx"):
        return None
    if importlib.util.find_spec("torch") is None:
        raise MissingExtraError("the PyTorch original", extra="export", module="torch")
    import torch

    if threads is not None:
        torch.set_num_threads(threads)
    return open_source(source).reference(resolution=resolution)
