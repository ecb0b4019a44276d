"""Registers and deleted sinks on every source family and on the real DINOv2-S, against PyTorch."""

import functools
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import onnx_graphsurgeon as gs
import pytest
from numpy.typing import NDArray
from support import zoo
from support.running import run_graph
from support.torch_reference import RegisterReference, find_tower

from regcache.compiler.curation.registers import capture_registers
from regcache.export.reference import Source
from regcache.export.source import open_source
from regcache.passes.base import Pass, run
from regcache.passes.canonicalize import canonicalize
from regcache.passes.delete_sinks import DeleteSinks
from regcache.passes.encoder import EncoderView
from regcache.passes.find_blocks import view_encoder
from regcache.passes.onnx_file import load_model
from regcache.passes.splice_register_tokens import SpliceRegisterTokens
from regcache.passes.splice_registers import SpliceRegisters

TOLERANCE = 1e-4  # of the output's scale
COUNTS, BATCHES = (1, 4, 16), (1, 2, 3)


@dataclass(frozen=True)
class Pair:
    """An encoder as a canonical graph and as its PyTorch original; `real`: with its weights.

    Its images are `side` x `side`.
    """

    graph: gs.Graph
    view: EncoderView
    reference: RegisterReference
    side: int
    real: bool = False

    def ranges(self) -> tuple[tuple[int, int], ...]:
        """Block ranges [start, end): from the first block, through all, up to the last."""
        depth = len(self.view.blocks)
        return (0, depth // 2), (depth // 3, depth), (depth // 2, depth)

    def cases(self) -> Iterator[tuple[int, tuple[int, int], int]]:
        """Every count with every range, the batch sizes in turn (a Latin square).

        Of random weights only the diagonal: each count, range and batch size once.
        """
        for (i, count), (j, blocks) in product(enumerate(COUNTS), enumerate(self.ranges())):
            if i == j or self.real:
                yield count, blocks, BATCHES[(i + j) % 3]


@functools.lru_cache(maxsize=1)
def family(name: str, folder: Path) -> Pair:
    source = zoo.family_source(name, folder)
    return pair(zoo.canonical_family(name, folder), source, zoo.SIDE)


@pytest.fixture(scope="module")
def sample(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    """At a quarter of its resolution: a sixteenth of the tokens shows the same."""
    source, side = open_source("sample:dinov2-small"), 56
    path = tmp_path_factory.mktemp("sample") / "sample.onnx"
    source.export(path, resolution=side)
    return pair(canonicalize(load_model(path)), source, side, real=True)


def pair(graph: gs.Graph, source: Source, side: int, *, real: bool = False) -> Pair:
    reference = RegisterReference(find_tower(source, side))
    return Pair(graph, view_encoder(graph), reference, side, real)


def images(pair: Pair, batch: int) -> NDArray[np.float32]:
    shape = (batch, 3, pair.side, pair.side)
    return np.random.default_rng(batch).standard_normal(shape, dtype=np.float32)


def tokens(pair: Pair, count: int) -> NDArray[np.float32]:
    shape = (count, pair.view.width)
    return np.random.default_rng(count).standard_normal(shape, dtype=np.float32)


def assert_close(found: NDArray[Any], wanted: NDArray[Any]) -> None:
    assert found.shape == wanted.shape
    assert np.abs(found - wanted).max() <= TOLERANCE * np.abs(wanted).max()


def compute(step: Pass, pair: Pair, batch: int) -> list[NDArray[Any]]:
    return run_graph(run(step, pair.graph).graph, images(pair, batch), optimize=True)


def check_kv(pair: Pair) -> None:
    for count, (start, end), batch in pair.cases():
        keys, values = capture_registers(pair.view, start, end, tokens(pair, count))
        captured = pair.reference.capture(tokens(pair, count), start, end)
        for ours, theirs in zip((keys, values), captured, strict=True):
            assert_close(ours, theirs)
        found = compute(SpliceRegisters(start, end, keys, values), pair, batch)
        wanted = pair.reference.run_kv(images(pair, batch), start, end, keys, values)
        for ours, theirs in zip(found, wanted, strict=True):
            assert_close(ours, theirs)


def check_tokens(pair: Pair) -> None:
    for count, (start, end), batch in pair.cases():
        more = tokens(pair, count)
        found = compute(SpliceRegisterTokens(start, end, more), pair, batch)
        wanted = pair.reference.run_tokens(images(pair, batch), start, end, more)
        for ours, theirs in zip(found, wanted, strict=True):
            assert_close(ours, theirs)


def check_deletion(pair: Pair) -> None:
    depth, prefix = len(pair.view.blocks), pair.view.prefix_tokens
    assert prefix is not None
    cases = [(depth // 2, 10, 3), (0, 1, 1), (depth - 1, 5, 2)]
    for block, count, batch in cases[: None if pair.real else 1]:
        pooled, hidden = compute(DeleteSinks(block, count), pair, batch)
        wanted = pair.reference.run_without(images(pair, batch), block, count, prefix)
        assert_close(pooled, wanted.pooled)
        patches = np.take_along_axis(hidden[:, prefix:], wanted.kept[..., None], axis=1)
        assert_close(np.concatenate([hidden[:, :prefix], patches], axis=1), wanted.hidden)


@pytest.mark.parametrize("name", zoo.family_params())
def test_registers_in_keys_and_values(name: str, folder: Path) -> None:
    check_kv(family(name, folder))


@pytest.mark.parametrize("name", zoo.family_params())
def test_registers_as_tokens(name: str, folder: Path) -> None:
    check_tokens(family(name, folder))


@pytest.mark.parametrize("name", zoo.family_params())
def test_deleted_sinks(name: str, folder: Path) -> None:
    check_deletion(family(name, folder))


@pytest.mark.sample
@pytest.mark.xdist_group("sample")
@pytest.mark.parametrize("check", [check_kv, check_tokens, check_deletion])
def test_the_real_encoder(sample: Pair, check: Any) -> None:
    check(sample)
