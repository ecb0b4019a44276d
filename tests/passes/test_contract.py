"""What every pass keeps to on every tiny encoder: valid graphs, second runs, named refusals."""

import importlib
import inspect
import pkgutil

import onnx
import onnx_graphsurgeon as gs
import pytest
from support.pass_contracts import CONTRACTS
from support.spellings import SPELLINGS
from support.untouched import told

from regcache import passes
from regcache.passes.base import Pass, Result, run
from regcache.passes.copy_graph import copy_graph
from regcache.passes.errors import InputError
from regcache.passes.walk import tensors_of


def passes_of_the_package() -> set[type]:
    """Every class under passes/ that has what a pass has."""
    found = set()
    for module in pkgutil.iter_modules(passes.__path__, f"{passes.__name__}."):
        for kind in vars(importlib.import_module(module.name)).values():
            parts = ("requires", "rewrite", "ensures")
            if inspect.isclass(kind) and all(hasattr(kind, part) for part in parts):
                found.add(kind)
    return found - {Pass}


def test_every_pass_is_under_contract() -> None:
    assert set(CONTRACTS) == passes_of_the_package()


def test_names_are_unique() -> None:
    names = [vars(kind)["name"] for kind in CONTRACTS]
    assert len(set(names)) == len(names)


def assert_named(text: str) -> None:
    """One line that says something."""
    assert text.strip()
    assert "\n" not in text


def unknown_shapes(graph: gs.Graph) -> set[str]:
    """Tensors whose rank shape inference does not tell; behind MatMulNBits it tells nothing."""
    if any(node.domain for node in graph.nodes):
        return set()
    return {name for name, tensor in tensors_of(graph).items() if tensor.shape is None}


def assert_valid(before: gs.Graph, graph: gs.Graph) -> None:
    """Valid by onnx in full, no shape less known than before, no name given twice."""
    model = gs.export_onnx(graph)
    onnx.checker.check_model(model, full_check=True)
    onnx.shape_inference.infer_shapes(model, check_type=True, strict_mode=True, data_prop=True)
    assert unknown_shapes(graph) <= unknown_shapes(before)
    # What onnx's version converter adds has no name at all, before the pass and after it.
    names = [node.name for node in graph.nodes if node.name]
    assert len(set(names)) == len(names)


def run_named(step: Pass, graph: gs.Graph) -> Result | None:
    """The result; None where the pass refuses the graph as a whole. All refusals are named."""
    original = told(graph)
    try:
        result = run(step, graph)
    except InputError as error:
        assert_named(str(error))
        return None
    finally:
        assert told(graph) == original
    if not result.changed:
        spare = copy_graph(graph)
        step.rewrite(spare)
        assert told(spare) == original
    for skip in result.log.skips:
        assert_named(skip.site)
        assert_named(skip.reason)
    for edit in result.log.edits:
        assert_named(edit.site)
        assert_named(edit.what)
    return result


@pytest.mark.parametrize("spelling", SPELLINGS)
@pytest.mark.parametrize("kind", CONTRACTS, ids=lambda kind: kind.__name__)
def test_contract(kind: type, spelling: str) -> None:
    contract = CONTRACTS[kind]
    graph = contract.prepare(spelling)
    step = contract.make(spelling, graph)
    assert isinstance(step, kind)
    result = run_named(step, graph)
    if result is None or not result.changed:
        return
    assert_valid(graph, result.graph)
    if contract.adds:
        again = run_named(contract.make(spelling, result.graph), result.graph)
        assert again is not None
        assert again.changed
        assert_valid(graph, again.graph)
        return
    again = run_named(step, result.graph)
    if again is not None:
        assert not again.log.edits
        assert again.graph is result.graph
