"""The stage that leaves linears float until a bound on the cosine holds on images held out."""

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import onnx_graphsurgeon as gs
from numpy.typing import NDArray

from regcache.compiler.artifact.artifact import MODEL
from regcache.compiler.calibration.mapped import return_memory
from regcache.compiler.encoder.float_encoder import FloatEncoder
from regcache.compiler.job.context import Context
from regcache.compiler.job.stages import Stage
from regcache.compiler.parity.first_look import open_candidate, open_float
from regcache.compiler.quantization.finish import Quantized, Ready
from regcache.compiler.quantization.int8_share import BoundRecord, Placement, TriedShare, leave_more
from regcache.passes.errors import FallsShortError
from regcache.passes.model_files import model_files, remove_model
from regcache.passes.onnx_file import save_graph
from regcache.runtime.images import ImageFolder, Skipped
from regcache.runtime.run_with import Session
from regcache.runtime.similarity import row_cosines

_MEASURING = "measuring images held out"
# Within an eighth of the sites nothing is tried any more: each halving costs a model.
_CLOSE = 8


@dataclass(frozen=True)
class Bounded:
    """The placement that keeps to a bound, what was quantized by it, and how that was found."""

    placement: Placement
    quantized: Quantized
    record: BoundRecord


def keep_bound(
    context: Context,
    encoder: FloatEncoder,
    ready: Ready,
    held: ImageFolder,
    least: float,
) -> Bounded:
    """Leave more linears float than `ready` does, until the mean cosine on `held` is `least`.

    `encoder`: as exported; `ready`: what is quantized, whose weights are rounded. For each share
    that is tried a model is written and run. Its files lie in the context's scratch folder when
    this returns. Raises FallsShortError where all linears but one site's in float are not close
    enough.
    """
    names, damage = _order(ready.placement)
    trials = _Trials(context, encoder, ready, names, held, least)
    most = max(len(names) - 1, 0)  # one site stays quantized: this is to be no float model
    if not trials.passes(0):
        guess = _guess(damage, 1 - trials.tried[0].cosine, 1 - least)
        if fewest(trials.passes, most, guess) is None:
            closest = max(trials.tried, key=lambda one: one.cosine)
            raise FallsShortError(
                f"--min-cosine {least} is not reached: {closest.cosine:.6f} at most, "
                f"{closest.share:.1%} of the work quantized"
            )
    assert trials.best is not None
    taken, quantized, cosine = trials.best
    record = BoundRecord(min_cosine=least, cosine=cosine, images=trials.images, tried=trials.tried)
    return Bounded(taken, quantized, record)


def fewest(passes: Callable[[int], bool], most: int, guess: int) -> int | None:
    """About the least number from 1 to `most` that passes; None where `most` does not.

    It begins at `guess`, doubles, and halves what is left: what is returned passed last of all that
    did, and is at most an eighth more than needed if more always pass where fewer do.
    """
    low, tried = 0, min(max(guess, 1), most)
    while tried > low and not passes(tried):
        low, tried = tried, min(2 * tried, most)
    if tried == low:
        return None
    high = tried
    while high - low > max(1, high // _CLOSE):
        middle = (low + high) // 2
        low, high = (low, middle) if passes(middle) else (middle, high)
    return high


def _order(placement: Placement) -> tuple[list[str], list[float]]:
    """The sites that are quantized in the order in which they become float, and their damages."""
    steps = zip(placement.pareto, placement.pareto[1:], strict=False)
    damage = {str(after.left_float): before.error - after.error for before, after in steps}
    names = [name for name in damage if name not in placement.left_float]
    return names, [damage[name] for name in names]


def _guess(damage: Sequence[float], error: float, allowed: float) -> int:
    """How many sites to leave float first: the error shrinks as the sum of damages does."""
    left = np.cumsum(damage[::-1])[::-1]  # of a site and of all behind it
    enough = np.flatnonzero(left * error <= allowed * left[:1])
    return int(enough[0]) if len(enough) else len(damage)


class _Trials:
    """Models of one encoder with more and more sites in float, each measured as it is written.

    `images`: how many images they are measured on. `tried`: what was measured, in order. `best`:
    the last that kept to the bound, whose files lie in the scratch folder, and its cosine.
    """

    def __init__(
        self,
        context: Context,
        encoder: FloatEncoder,
        ready: Ready,
        names: Sequence[str],
        held: ImageFolder,
        least: float,
    ) -> None:
        self._context, self._encoder, self._names = context, encoder, names
        self._least = least
        self._ready = ready
        context.reporter.begin(Stage.BOUND, str(least))
        with open_float(context, encoder) as original:
            skipped = list[Skipped]()
            self._held = held.telling(skipped.append)
            self._float = self._embeddings(original)
        self._held = replace(held.without(skipped), on_skip=None)
        self.images = len(self._float)
        self.tried: list[TriedShare] = []
        self.best: tuple[Placement, Quantized, float] | None = None

    def passes(self, count: int) -> bool:
        """Whether the model with so many more sites in float keeps to the bound."""
        context, view = self._context, self._ready.equalized.encoder.view
        placement = leave_more(context, view, self._ready.placement, self._names[:count])
        quantized = replace(self._ready, placement=placement).write(context)
        with tempfile.TemporaryDirectory(dir=context.scratch) as folder:
            model = Path(folder, MODEL)
            save_graph(quantized.graph, model)
            return_memory(quantized.graph)
            with open_candidate(context, self._encoder, model) as candidate:
                found = self._embeddings(candidate)
            cosine = float(row_cosines(self._float, found).mean())
            self.tried.append(TriedShare(share=placement.share, cosine=cosine))
            context.reporter.step(
                f"{placement.share:.1%} of the work quantized has a cosine of {cosine:.6f} on "
                f"{self.images} images held out"
            )
            if cosine < self._least:
                return False
            remove_model(context.scratch / MODEL)
            for file in model_files(model):
                file.replace(context.scratch / file.name)
        # The graph is on disk: memory holds one at a time.
        self.best = placement, replace(quantized, graph=gs.Graph()), cosine
        return True

    def _embeddings(self, session: Session) -> NDArray[np.float64]:
        """The embeddings [N, D] of the images held out."""
        found = []
        for batch in self._context.reporter.images(self._held, len(self._held.paths), _MEASURING):
            embedding = session.run(batch.images)[0]
            found.append(np.array(embedding, np.float64).reshape(len(embedding), -1))
        return np.concatenate(found)
