"""Parts of an encoder behind a block's input, run on hidden states that are known already."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import onnx_graphsurgeon as gs
from numpy.typing import NDArray

from regcache.compiler.calibration.graph_session import open_graph, run_all
from regcache.passes.cut_graph import cut_graph, needed_before
from regcache.passes.errors import InputError
from regcache.runtime.device import CPU, Device
from regcache.runtime.similarity import row_cosines

Floats = NDArray[np.float32]


@dataclass(frozen=True)
class State:
    """The hidden state [N, T, width] at a block's input, and tensors from before that block.

    `others` [N, ...], by name: what the outputs read from before the block, besides that hidden
    state.
    """

    stream: Floats
    others: Mapping[str, Floats]


@dataclass(frozen=True)
class Part:
    """The nodes that compute `outputs` from the hidden state `start` and `others`, all names."""

    graph: gs.Graph
    start: str
    outputs: tuple[str, ...]
    others: tuple[str, ...]

    @classmethod
    def of(cls, graph: gs.Graph, start: str, outputs: Sequence[str]) -> Self:
        """Cut a part out of an encoder; outputs that come before it are among `others`."""
        before = {start, *needed_before(graph, start, outputs)}
        made = [name for name in outputs if name not in before]
        others = needed_before(graph, start, made)
        return cls(cut_graph(graph, start, made, others), start, tuple(outputs), tuple(others))

    def with_graph(self, graph: gs.Graph) -> Self:
        """The same part after a pass."""
        return type(self)(graph, self.start, self.outputs, self.others)

    @contextmanager
    def open(
        self, device: Device = CPU, workers: int = 1
    ) -> Iterator[Callable[[State, int], list[Floats]]]:
        """Yield a function of a state and a batch size that computes the part's outputs.

        `workers`: batches that run at a time.
        """
        made = [output.name for output in self.graph.outputs]
        with ExitStack() as stack:
            session = None
            if made:
                session = stack.enter_context(
                    open_graph(self.graph, threads=1, brief=True, device=device)
                )

            def compute(state: State, batch: int) -> list[Floats]:
                known = {**state.others, self.start: state.stream}
                if session is not None:
                    others = [state.others[name] for name in self.others]
                    outputs = run_all(session, state.stream, batch, workers, others)
                    known |= zip(made, outputs, strict=True)
                return [known[name] for name in self.outputs]

            yield compute


def run_named(
    graph: gs.Graph,
    names: Sequence[str],
    sets: Sequence[Floats],
    batch: int,
    workers: int,
    device: Device = CPU,
    *,
    on_disk: bool = False,
) -> list[dict[str, Floats]]:
    """Tensors of a graph for each set of images, by name, float32 [N, ...].

    `on_disk`: see gather. Raises InputError where a tensor does not have the batch in front.
    """
    source = graph.inputs[0].name
    wanted = [name for name in dict.fromkeys(names) if name != source]
    tensors = [{source: images} if source in names else {} for images in sets]
    if wanted:
        with open_graph(cut_graph(graph, None, wanted), threads=1, device=device) as session:
            for known, images in zip(tensors, sets, strict=True):
                made = run_all(session, images, batch, workers, on_disk=on_disk)
                known.update(zip(wanted, made, strict=True))
    for known, images in zip(tensors, sets, strict=True):
        check_batch(known, len(images))
        known.update(
            (name, values.astype(np.float32, copy=False)) for name, values in known.items()
        )
    return tensors


def check_batch(tensors: Mapping[str, NDArray[Any]], count: int) -> None:
    """Raise InputError, naming a tensor, where one does not have a batch of `count` in front."""
    for name, values in tensors.items():
        if len(values) != count:
            raise InputError(f"{name!r} does not have the batch in front")


def output_errors(
    references: Sequence[Floats], candidates: Sequence[Floats]
) -> NDArray[np.float64]:
    """1 - cosine of each image's outputs [N, ...] to the references, the mean over outputs [N]."""
    errors = []
    for pair in zip(references, candidates, strict=True):
        reference, candidate = (item.reshape(len(item), -1).astype(np.float64) for item in pair)
        errors.append(1 - row_cosines(reference, candidate))
    mean: NDArray[np.float64] = np.mean(errors, axis=0)
    return mean
