"""What a graph pass is, and the one function that runs it.

A pass is a small frozen dataclass: facts (statistics, chosen registers) arrive as its fields, and
`rewrite` edits an onnx-graphsurgeon graph with them. A pass never runs a model.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Protocol

import onnx_graphsurgeon as gs

from regcache.passes.check import check_and_infer
from regcache.passes.clean_up import clean_up
from regcache.passes.copy_graph import copy_graph


@dataclass(frozen=True)
class Exact:
    """The rewritten graph computes the same numbers, bit for bit."""


@dataclass(frozen=True)
class Close:
    """The rewritten graph agrees within float rounding: |a - b| <= atol + rtol * |b|."""

    rtol: float
    atol: float


@dataclass(frozen=True)
class Lossy:
    """The rewritten graph approximates the original; parity has to be measured."""


Parity = Exact | Close | Lossy


@dataclass(frozen=True)
class Edit:
    """One place that was rewritten."""

    site: str
    what: str


@dataclass(frozen=True)
class Skip:
    """One place that looked like a match and was left alone, with the reason.

    `slower`: what that costs in speed, in words ("TensorRT computes it in float"); None: nothing.
    """

    site: str
    reason: str
    slower: str | None = None


@dataclass(frozen=True)
class Log:
    """What a rewrite did and what it refused to do."""

    edits: tuple[Edit, ...] = ()
    skips: tuple[Skip, ...] = ()


class Pass(Protocol):
    """A named transform of a graph with stated pre- and postconditions."""

    @property
    def name(self) -> str:
        """The pass's name, as written into logs and the manifest."""

    @property
    def parity(self) -> Parity:
        """How close the rewritten graph's numbers stay to the original's."""

    def requires(self, graph: gs.Graph) -> None:
        """Raise InputError where the graph does not meet the precondition."""

    def rewrite(self, graph: gs.Graph) -> Log:
        """Edit the graph in place. Weight arrays are shared: replace constants, never write.

        Without edits in the log, what the graph computes and its names stay as they are: the next
        pass of several may be given the same copy.
        """

    def ensures(self, before: gs.Graph, after: gs.Graph) -> None:
        """Raise AssertionError where the postcondition does not hold (a bug in the pass)."""


@dataclass(frozen=True)
class Result:
    """A rewritten graph and the log of what changed."""

    graph: gs.Graph
    log: Log

    @property
    def changed(self) -> bool:
        """Whether the pass edited anything."""
        return bool(self.log.edits)


def run(step: Pass, graph: gs.Graph) -> Result:
    """Run one pass on a copy of `graph`: precondition, rewrite, clean-up, checker, postcondition.

    Returns the graph itself when the pass edits nothing. Raises InputError when the precondition
    fails and onnx's ValidationError or InferenceError when the pass broke the graph.
    """
    return _run(step, graph, None)[0]


def _run(step: Pass, graph: gs.Graph, spare: gs.Graph | None) -> tuple[Result, gs.Graph | None]:
    """As `run`, on `spare` where there is such a copy already; also the copy if it is one still."""
    step.requires(graph)
    after = copy_graph(graph) if spare is None else spare
    log = step.rewrite(after)
    if not log.edits:
        return Result(graph, log), after
    clean_up(after)
    check_and_infer(after)
    step.ensures(graph, after)
    return Result(after, log), None


@dataclass(frozen=True)
class PassRun:
    """The name and log of a pass that edited or refused something."""

    name: str
    log: Log


def run_all(steps: Iterable[Pass], graph: gs.Graph) -> tuple[gs.Graph, list[PassRun]]:
    """Run passes one after the other; returns the last graph, and the logs.

    A pass that neither edited nor refused anything has no log there. Raises as `run` does.
    """
    ran: list[PassRun] = []
    spare = None
    for step in steps:
        result, spare = _run(step, graph, spare)
        graph = result.graph
        if result.log.edits or result.log.skips:
            ran.append(PassRun(step.name, result.log))
    return graph, ran
