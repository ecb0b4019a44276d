"""Bring an ONNX file that somebody else exported into the form that our own exporter writes.

That form: FP32, standard operators, one image input of fixed size with a free batch, every other
shape static. Outputs keep their names and their order.
"""

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import NamedTuple

import numpy as np
import onnx_graphsurgeon as gs

from regcache.passes.base import Edit, Pass, run
from regcache.passes.clean_up import clean_up
from regcache.passes.copy_graph import copy_graph
from regcache.passes.drop_neutral import DropNeutral, fill_masks
from regcache.passes.errors import InputError
from regcache.passes.free_batch import BATCH, FreeBatch
from regcache.passes.image_input import ImageInput, find_image
from regcache.passes.keep_vision import KeepVision, other_inputs
from regcache.passes.lower_einsum import LowerEinsum
from regcache.passes.pin_image import PinImage, forget_shapes
from regcache.passes.read_graph import read_graph
from regcache.passes.settle import check_settled, loops, settle
from regcache.passes.to_float32 import ToFloat32
from regcache.passes.unfuse_microsoft import UnfuseMicrosoft
from regcache.passes.walk import is_constant

# A batch that no exporter bakes in: what it is multiplied into is told apart from all else.
_PROBE = 2
# More than an attention mask and a patch mask is a model of another kind.
_MOST_MASKS = 3


@dataclass(frozen=True)
class Adopted:
    """A file in our own form.

    `notes`: what was done to it that a user would want to know. `half`: whether it computed in less
    than FP32. `masks`: inputs that were set to a number that masks nothing. `batch`: the batch size
    that its own shapes hold, whatever its input says; None where they hold none. `loops`: whether
    the file, in what is dropped of it, holds a loop, so that running it need not end.
    """

    graph: gs.Graph
    image: ImageInput
    notes: tuple[str, ...]
    half: bool
    masks: Mapping[str, float]
    batch: int | None
    loops: bool


def adopt(
    path: Path,
    *,
    resolution: int | None = None,
    size: tuple[int, int] | None = None,
    free_batch: bool = True,
) -> Adopted:
    """Read the ONNX file at `path` and rewrite it; the file itself is left alone.

    `resolution`: side of the square image, for a file that leaves it open; `size`: height and width
    that its preprocessing makes, for such a file when no resolution is given. `free_batch`: whether
    a batch that the file fixes may be freed.
    Raises InputError where the file cannot be read, holds operators that cannot be understood,
    takes no image, leaves the size open, does not compute at that size, or loops.
    """
    notes: list[str] = []
    graph = read_graph(path)
    looping = any(loops(graph))
    graph, converted = _edit(ToFloat32(), graph)
    if converted:
        notes.append("its weights are taken in FP32: some of the file is in another precision")
    image = find_image(graph)
    height, width = _size(image, resolution, size)
    names, masks = _masks(graph, image), dict[str, float]()
    if not names:
        graph, edits = _edit(KeepVision(image.name), graph)
        if edits:
            notes.append(_dropped(graph, edits))
    graph, unfused = _edit(UnfuseMicrosoft(), graph)
    if unfused:
        kinds = ", ".join(sorted({edit.what.split()[0] for edit in unfused}))
        notes.append(f"written as ONNX's own operators: {kinds}")
    if names:
        fixed, masks = _without_masks(graph, names, image, height, width, free_batch)
    else:
        fixed = _fix_shapes(graph, image, height, width, free_batch)
    notes += fixed.notes
    check_settled(fixed.graph)
    shape = image.at(fixed.graph.inputs[0].shape[0], height, width)
    pinned = ImageInput(image.name, image.layout, image.dtype, shape, image.pixels)
    half = bool(converted)
    return Adopted(fixed.graph, pinned, tuple(notes), half, masks, fixed.batch, looping)


def _edit(step: Pass, graph: gs.Graph) -> tuple[gs.Graph, tuple[Edit, ...]]:
    """Run a pass on a graph whose shapes cannot be inferred yet."""
    step.requires(graph)
    after = copy_graph(graph)
    log = step.rewrite(after)
    clean_up(after)
    step.ensures(graph, after)
    return after, log.edits


def _dropped(graph: gs.Graph, edits: tuple[Edit, ...]) -> str:
    kept = ", ".join(item.name for item in graph.outputs)
    gone = ", ".join(edit.site for edit in edits)
    return f"only what depends on the image alone is kept, {kept}; dropped: {gone}"


def _masks(graph: gs.Graph, image: ImageInput) -> list[str]:
    """Inputs that every output of the image needs too: masks, perhaps; none where there is one."""
    needs = [found for found in other_inputs(graph, image.name).values() if image.name in found]
    if not needs or any(found == {image.name} for found in needs):
        return []
    least = min(needs, key=len)
    return [item.name for item in graph.inputs if item.name in least - {image.name}]


def _without_masks(
    graph: gs.Graph,
    masks: list[str],
    image: ImageInput,
    height: int,
    width: int,
    free_batch: bool,
) -> tuple["_Fixed", dict[str, float]]:
    """Find the values at which the masks mask nothing, and take them out.

    Raises InputError where no value is proved to: then the inputs are more than masks.
    """
    reasons = []
    for fills in product((1.0, 0.0), repeat=len(masks)) if len(masks) <= _MOST_MASKS else ():
        values = dict(zip(masks, fills, strict=True))
        filled, names = fill_masks(graph, values)
        filled, _ = _edit(KeepVision(image.name), filled)
        try:
            fixed = _fix_shapes(filled, image, height, width, free_batch)
        except InputError as error:
            reasons.append(str(error))
            continue
        cleared = run(DropNeutral(names), fixed.graph)
        if not cleared.log.skips:
            given = ", ".join(f"{name} = {value:g}" for name, value in values.items())
            note = f"takes the image alone: {given}, which masks nothing"
            return _Fixed(cleared.graph, fixed.batch, (*fixed.notes, note)), values
        reasons.append("; ".join(skip.reason for skip in cleared.log.skips[:1]))
    because = f" ({reasons[0]})" if reasons else ""
    raise InputError(
        f"its outputs need {', '.join(masks)} besides the image {image.name!r}, and no value is "
        f"proved to mask nothing{because}; export it with the image as its only input"
    )


def _size(
    image: ImageInput, resolution: int | None, preferred: tuple[int, int] | None
) -> tuple[int, int]:
    """Height and width to compile for: the file's own, else what is asked for."""
    own = image.size
    wanted = (resolution, resolution) if resolution is not None else preferred
    if all(isinstance(side, int) for side in own):
        if resolution is not None and own != wanted:
            raise InputError(f"the image is fixed at {own[0]} x {own[1]} in the file")
        return own  # type: ignore[return-value]
    if wanted is None:
        raise InputError(
            f"height and width are open in the file, {list(image.shape)}; add --resolution PIXELS"
        )
    for side, asked in zip(own, wanted, strict=True):
        if isinstance(side, int) and side != asked:
            raise InputError(f"the image is fixed at {own[0]} x {own[1]} in the file")
    return wanted


class _Fixed(NamedTuple):
    """A graph of static shapes but for the batch, the batch that it held, and what was done."""

    graph: gs.Graph
    batch: int | None
    notes: tuple[str, ...] = ()


def _fix_shapes(
    graph: gs.Graph, image: ImageInput, height: int, width: int, free_batch: bool
) -> _Fixed:
    """Make every shape static but the batch; say what became of a batch that was fixed."""
    reasons, stuck = [], list[_Fixed]()
    declared = image.shape[0]
    for batch in _batches(graph, declared):
        try:
            fixed = _settled(graph, image.at(batch, height, width))
        except InputError as error:
            reasons.append(str(error))
            continue
        fixed = run(LowerEinsum(), fixed).graph
        held = None if batch == _PROBE != declared else batch
        freed = run(FreeBatch(), fixed) if free_batch else None
        if freed is not None and freed.changed:
            return _Fixed(freed.graph, held)
        if _leads(fixed, batch) or declared == batch:
            why = "" if freed is None else f", which {freed.log.skips[0].reason}"
            note = f"compiled for its batch of {batch} alone{why}"
            stuck.append(_Fixed(fixed, held, (note,)))
    if not stuck and not reasons:
        raise InputError("no output has a row for each image")
    if not stuck:
        raise InputError(f"does not compute at {height} x {width} pixels: {reasons[0]}")
    if stuck[0].batch is None:  # it is free as it stands
        return _Fixed(_settled(graph, image.at(BATCH, height, width)), None)
    return stuck[0]


def _leads(graph: gs.Graph, batch: int) -> bool:
    """Whether an output has that many rows, one for each image, or an unknown number of them."""
    first = [item.shape[0] if item.shape else item.shape for item in graph.outputs]
    return any(rows is None or isinstance(rows, str) or rows == batch for rows in first)


def _settled(graph: gs.Graph, shape: tuple[int | str, ...]) -> gs.Graph:
    pinned, _ = _edit(PinImage(shape), graph)
    forget_shapes(pinned)  # what the file says of them may be wrong
    return settle(pinned)


def _batches(graph: gs.Graph, declared: int | str) -> Iterator[int]:
    """Batch sizes that the graph may compute with, likeliest first."""
    if isinstance(declared, int):
        yield declared
        return
    yield _PROBE
    # Called free, but the Reshape nodes inside say otherwise.
    leading = Counter(
        int(node.inputs[1].values.ravel()[0])
        for node in graph.nodes
        if node.op == "Reshape" and is_constant(node.inputs[1]) and node.inputs[1].values.size
    )
    for batch in dict.fromkeys([1, *(number for number, _ in leading.most_common(3))]):
        if 0 < batch <= np.iinfo(np.int16).max and batch != _PROBE:
            yield batch
