"""Let a graph whose batch is a number take any number of images."""

from dataclasses import dataclass
from typing import ClassVar

import onnx_graphsurgeon as gs

from regcache.passes.base import Close, Edit, Log, Parity, Skip
from regcache.passes.batch_place import StuckError, static_shape
from regcache.passes.batch_tracker import BatchTracker
from regcache.passes.errors import InputError

BATCH = "batch"
# With a batch of 1 a Reshape may leave its place open; few such choices turn out wrong.
_MOST_TRIES = 100


@dataclass(frozen=True)
class FreeBatch:
    """Put a symbol in the place of the batch size, in the input and in everything made from it.

    Matched: operators that treat images apart; the batch may be any axis or part of one, as
    attention merges it with its heads. Rewritten: the targets of Reshape, Expand and Resize, ends
    of Slice, constants that repeat the same numbers for every image. Refused, and then nothing is
    changed: an operator that mixes images, a constant that holds other numbers for each image, an
    output without the batch in front.
    """

    name: ClassVar[str] = "free_batch"
    parity: ClassVar[Parity] = Close(rtol=1e-5, atol=1e-6)

    def requires(self, graph: gs.Graph) -> None:
        """One input, whose shape is all numbers."""
        shape = graph.inputs[0].shape if len(graph.inputs) == 1 else None
        if not shape or not all(isinstance(dim, int) for dim in shape):
            raise InputError("free_batch needs one input of static shape")

    def rewrite(self, graph: gs.Graph) -> Log:
        """Follow the batch through the whole graph, then edit it, or nothing at all."""
        try:
            tracker = _follow(graph)
        except StuckError as error:
            return Log(skips=(Skip("batch", f"cannot be freed: {error}"),))
        for edit in tracker.edits:
            edit()
        graph.inputs[0].shape = [BATCH, *graph.inputs[0].shape[1:]]
        for output in graph.outputs:
            output.shape = [BATCH, *static_shape(output, output.inputs[0])[1:]]
        return Log((Edit(graph.inputs[0].name, f"a batch of {tracker.batch} becomes free"),))

    def ensures(self, before: gs.Graph, after: gs.Graph) -> None:
        """The input's batch is a symbol, its other dimensions are what they were."""
        assert after.inputs[0].shape == [BATCH, *before.inputs[0].shape[1:]]


def _follow(graph: gs.Graph) -> BatchTracker:
    """Follow the batch; where that gets stuck, change the last choice that was free.

    Raises StuckError, the first one, where no choice leads to the outputs.
    """
    choices: list[int] = []
    first: StuckError | None = None
    for _ in range(_MOST_TRIES):
        tracker = BatchTracker(graph, choices)
        try:
            tracker.follow()
        except StuckError as error:
            first = first or error
            made = tracker.made
            while made and made[-1][0] + 1 >= made[-1][1]:
                made.pop()
            if not made:
                break
            choices = [choice for choice, _ in made]
            choices[-1] += 1
        else:
            return tracker
    assert first is not None
    raise first
