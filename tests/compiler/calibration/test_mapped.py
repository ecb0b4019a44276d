"""Large graphs on disk: the same numbers, out of memory, and no file left behind."""

from pathlib import Path
from typing import Any

import numpy as np
import onnx_graphsurgeon as gs
import pytest
from numpy.typing import NDArray
from support.canonical import canonical_graph
from support.tiny_vit import Spec, TinyVit

from regcache.compiler.calibration import mapped
from regcache.compiler.calibration.mapped import gather, keep_on_disk, let_graph_go
from regcache.passes.external_weights import KEPT, let_go, mapping


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
    (file,) = tmp_path.iterdir()
    assert file.name.startswith(KEPT)
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


@pytest.mark.parametrize("sizes", [(1,), (2, 2, 1), (3, 1, 4)])
def test_rows_are_gathered_alike_on_disk_and_in_memory(sizes: tuple[int, ...]) -> None:
    random = np.random.default_rng(len(sizes))
    whole: list[NDArray[Any]] = [
        random.standard_normal((sum(sizes), 3, 5), np.float32),
        np.arange(sum(sizes)),
    ]
    ends = np.cumsum(sizes)[:-1]
    parts = list(zip(*(np.split(one, ends) for one in whole), strict=True))
    for on_disk in (False, True):
        found = gather(parts, on_disk=on_disk)
        for one, wanted in zip(found, whole, strict=True):
            assert (mapping(one) is not None) == on_disk
            let_go(one)
            assert one.dtype == wanted.dtype
            np.testing.assert_array_equal(one, wanted)
