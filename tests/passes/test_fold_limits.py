"""Constants that would take gigabytes or minutes to compute are left for whoever runs the file."""

import resource
import time
from collections.abc import Callable

import numpy as np
import onnx_graphsurgeon as gs
import pytest
from support.small_models import Draft, with_shapes

from regcache.passes.base import run
from regcache.passes.fold_constants import FoldConstants
from regcache.passes.settle import settle

ONE = np.ones(1, np.float32)


def numbers(*values: int) -> np.ndarray:
    return np.array(values, np.int64)


def folded(build: Callable[[Draft], str], rounds: Callable[[gs.Graph], gs.Graph]) -> list[str]:
    """The operators left of x + f(constants), folded in little time and memory."""
    draft = Draft()
    made = build(draft)
    total = draft.node("Add", "x", made)
    graph = with_shapes(draft.model({"x": [1]}, [total]))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    started = time.process_time()
    ops = [node.op for node in rounds(graph).nodes]
    assert time.process_time() - started < 10
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 900_000  # KiB
    return ops


def once(graph: gs.Graph) -> gs.Graph:
    return run(FoldConstants(), graph).graph


def expand_and_reduce(draft: Draft, *shape: int) -> str:
    """A mean over many numbers that are all one: small at both ends."""
    large = draft.node("Expand", draft.weight(ONE), draft.weight(numbers(*shape)))
    return draft.node("ReduceMean", large, keepdims=0)


def hidden_size(draft: Draft) -> str:
    """A size that shape inference does not follow, 2 ** 15 twice."""
    power = draft.node("Pow", draft.weight(np.full(2, 2.0, np.float32)), draft.weight(ONE * 15))
    size = draft.node("Cast", power, to=7)
    large = draft.node("Expand", draft.weight(ONE), size)
    return draft.node("ReduceMean", large, keepdims=0)


def several(draft: Draft) -> str:
    """Eight times 256 MB, each allowed by itself."""
    total = draft.weight(ONE)
    for power in range(8):
        shape = draft.weight(numbers(1 << power, 1 << (26 - power)))
        part = draft.node("Expand", draft.weight(ONE), shape)
        total = draft.node("Add", total, draft.node("ReduceMax", part, keepdims=0))
    return total


def outer(draft: Draft) -> str:
    """Two rows of a hundred thousand, one of them turned into a column."""
    row = draft.weight(np.ones((1, 100_000), np.float32))
    column = draft.node("Transpose", row)
    return draft.node("ReduceMean", draft.node("Mul", row, column), keepdims=0)


def product(draft: Draft) -> str:
    """8192 x 8192 x 8192 multiplications."""
    side = draft.weight(numbers(8192, 8192))
    large = draft.node("Expand", draft.weight(ONE), side)
    return draft.node("ReduceMean", draft.node("MatMul", large, large), keepdims=0)


@pytest.mark.parametrize("rounds", [once, settle])
@pytest.mark.parametrize(
    ("build", "left"),
    [
        (lambda draft: expand_and_reduce(draft, 1 << 15, 1 << 15), ["Expand", "ReduceMean", "Add"]),
        (hidden_size, ["Expand", "ReduceMean", "Add"]),
        (outer, ["Mul", "ReduceMean", "Add"]),
        (product, ["MatMul", "ReduceMean", "Add"]),
    ],
)
def test_what_is_too_much_stays(
    build: Callable[[Draft], str], left: list[str], rounds: Callable[[gs.Graph], gs.Graph]
) -> None:
    assert folded(build, rounds)[-len(left) :] == left


def test_what_each_is_allowed_is_too_much_together() -> None:
    ops = folded(several, once)
    assert ops.count("Expand") == 7
    assert ops[-1] == "Add"


@pytest.mark.parametrize("rounds", [once, settle])
def test_what_is_little_goes(rounds: Callable[[gs.Graph], gs.Graph]) -> None:
    assert folded(lambda draft: expand_and_reduce(draft, 1 << 20), rounds) == ["Add"]
