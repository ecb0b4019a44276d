"""Large graphs on disk: the same numbers, out of memory, and no file left behind."""

from pathlib import Path

import numpy as np
import onnx_graphsurgeon as gs
import pytest
from support.canonical import canonical_graph
from support.tiny_vit import Spec, TinyVit

from regcache.compiler.calibration import mapped
from regcache.compiler.calibration.mapped import keep_on_disk, let_graph_go
from regcache.passes.external_weights import mapping


def graph() -> gs.Graph:
    return canonical_graph(TinyVit(Spec(width=32, hidden=64, heads=4)).model())


def constants(graph: gs.Graph) -> dict[str, gs.Constant]:
    return {n: one for n, one in graph.tensors().items() if isinstance(one, gs.Constant)}


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mapped, "LARGE", 1000)
    monkeypatch.setattr(mapped, "_LEAST", 1000)


def test_a_small_graph_stays_in_memory(tmp_path: Path) -> None:
    found = graph()
    keep_on_disk(found, tmp_path)
    assert all(mapping(one.values) is None for one in constants(found).values())


@pytest.mark.usefixtures("small")
def test_large_constants_are_mapped_and_keep_their_numbers(tmp_path: Path) -> None:
    before, after = graph(), graph()
    keep_on_disk(after, tmp_path)
    assert not list(tmp_path.iterdir())  # the file has no name
    for name, constant in constants(after).items():
        values = constants(before)[name].values
        assert (mapping(constant.values) is not None) == (values.nbytes >= 1000)
        np.testing.assert_array_equal(constant.values, values)
        assert constant.values.dtype == values.dtype
    let_graph_go(after)
    for name, constant in constants(after).items():
        np.testing.assert_array_equal(constant.values, constants(before)[name].values)


@pytest.mark.usefixtures("small")
def test_what_is_mapped_stays_where_it_is_and_copies_share(tmp_path: Path) -> None:
    found = graph()
    weights = [one for one in constants(found).values() if one.values.nbytes >= 1000]
    weights[1].values = weights[0].values
    copy = found.copy()
    keep_on_disk(found, tmp_path)
    assert weights[0].values is weights[1].values
    first = mapping(weights[0].values)
    keep_on_disk(found, tmp_path)
    assert mapping(weights[0].values) is first
    assert mapping(constants(copy)[weights[0].name].values) is None
