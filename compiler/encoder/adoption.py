"""Adopt an ONNX file that somebody else exported, and compare it with its original."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from regcache.compiler.reporter import Reporter
from regcache.export.adopt import Adopted
from regcache.export.onnx_file import OnnxFileSource
from regcache.passes.errors import InputError
from regcache.passes.image_input import ImageInput
from regcache.passes.onnx_file import save_graph
from regcache.passes.preprocess import Preprocess
from regcache.runtime.original import OriginalSession, relative_error
from regcache.runtime.session import OrtSession

# Three images, which no batch of 1 or 2 baked into the graph gets through.
_IMAGES = 3
# What other orders of adding make of FP32; in FP16 the original itself strays from its weights.
_CLOSE, _CLOSE_IN_HALF = 1e-3, 5e-2


def adopt_file(
    source: OnnxFileSource,
    path: Path,
    resolution: int | None,
    reporter: Reporter,
    *,
    recipe: Preprocess | None = None,
    verify: bool = True,
    threads: int | None = None,
) -> Preprocess | None:
    """Write `source` in our own form to `path`; returns its recipe where it has one.

    `recipe`: takes the place of the source's own. `verify`: whether both files are run on random
    images and compared. Where a batch that was freed computes something else than the original, the
    file's own batch is kept, and a warning says so. Raises InputError where the file cannot be
    adopted, or computes something else afterwards.
    """
    if recipe is None:
        recipe = source.recipe(resolution)
    for free_batch in (True, False):
        adopted = source.adopt(resolution, recipe, free_batch=free_batch)
        save_graph(adopted.graph, path)
        reason = _difference(source, adopted, path, reporter, threads) if verify else None
        if reason is None:
            break
    else:
        raise InputError(f"{source.name}: {reason}; please report this file")
    for note in adopted.notes:
        reporter.warn(f"{source.name}: {note}")
    return recipe


def _difference(
    source: OnnxFileSource, adopted: Adopted, path: Path, reporter: Reporter, threads: int | None
) -> str | None:
    """How the outputs of the file at `path` differ from the source's; None where they do not.

    None too where the source cannot be run. The sessions are opened one after the other: memory
    holds one model at a time.
    """
    if adopted.loops:
        reporter.warn(f"{source.name}: not run to check its rewritten form: it holds a loop")
        return None
    rows = adopted.graph.inputs[0].shape[0]
    batch = rows if isinstance(rows, int) else 1
    names = [o.name for o in adopted.graph.outputs if o.shape is None or _led(o.shape, rows)]
    images = _random_images(adopted.image, -(-_IMAGES // batch) * batch)
    try:
        with OriginalSession(
            source.path, adopted.image.name, masks=adopted.masks, threads=threads
        ) as original:
            wanted = original.run(images, names, adopted.batch)
    except InputError as error:
        reporter.warn(f"{source.name}: could not be run to check its rewritten form: {error}")
        return None
    try:
        with OrtSession(path, threads=threads) as session:
            size = session.fixed_batch or len(images)
            starts = range(0, len(images), size)
            runs = [
                dict(zip(session.output_names, session.run(images[n : n + size]), strict=True))
                for n in starts
            ]
    except InputError as error:
        return f"rewritten, it does not run: {error}"
    rewritten = {name: np.concatenate([run[name] for run in runs]) for name in names}
    limit = _CLOSE_IN_HALF if adopted.half else _CLOSE
    for name, original_output in zip(names, wanted, strict=True):
        apart = relative_error(rewritten[name], original_output)
        if apart > limit:
            return f"rewritten, its output {name!r} differs by {apart:.1e} from the original's"
    return None


def _led(shape: Sequence[int | str], rows: int | str) -> bool:
    """Whether a shape has one row for each image; a free batch may have several names."""
    return bool(shape) and (shape[0] == rows or {type(shape[0]), type(rows)} == {str})


def _random_images(image: ImageInput, count: int) -> NDArray[Any]:
    """Random images in the range, type and layout of the graph's image input."""
    random = np.random.default_rng(0)
    shape = [count, *(int(side) for side in image.shape[1:])]
    pixels = random.integers(0, 256, shape)
    if image.dtype == "uint8":
        return pixels.astype(np.uint8)
    if image.pixels is None:
        return random.standard_normal(shape, np.float32)
    return (pixels / (1 if image.pixels == "bytes" else 255)).astype(np.float32)
