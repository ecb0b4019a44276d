"""Ways to use an embedder: batch by batch, from asyncio, in other processes, at a prompt."""

import asyncio
import copy
import pickle
import shutil
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from support.tiny_artifact import SPEC, tiny_artifact
from support.tiny_source import photos

import regcache


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("ways")


@pytest.fixture(scope="module")
def embedder(folder: Path) -> Iterator[regcache.Embedder]:
    with regcache.load(tiny_artifact(folder), threads=1) as loaded:
        yield loaded


@pytest.fixture(scope="module")
def paths(folder: Path) -> list[Path]:
    return sorted(photos(folder / "photos", 5, seed=3).iterdir())


@pytest.fixture(scope="module")
def expected(embedder: regcache.Embedder, paths: list[Path]) -> NDArray[np.float32]:
    """Each image alone."""
    return np.concatenate([embedder.embed(path) for path in paths])


def assert_same(found: NDArray[np.float32], expected: NDArray[np.float32]) -> None:
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


def test_batch_by_batch(
    embedder: regcache.Embedder, paths: list[Path], expected: NDArray[np.float32]
) -> None:
    found = embedder.embed_batches(iter(paths), batch_size=2)
    first = next(found)
    assert first.shape == (2, SPEC.width)
    rest = list(found)
    assert [len(rows) for rows in rest] == [2, 1]
    assert_same(np.concatenate([first, *rest]), expected)


def test_images_may_come_without_an_end(
    embedder: regcache.Embedder, paths: list[Path], expected: NDArray[np.float32]
) -> None:
    def endless() -> Iterator[Path]:
        while True:
            yield from paths

    assert_same(next(embedder.embed_batches(endless(), batch_size=3)), expected[:3])


def test_from_asyncio(
    embedder: regcache.Embedder, paths: list[Path], expected: NDArray[np.float32]
) -> None:
    """The loop goes on meanwhile."""

    async def images() -> AsyncIterator[Path]:
        for path in paths:
            await asyncio.sleep(0)
            yield path

    async def nothing() -> AsyncIterator[Path]:
        return
        yield

    async def main() -> list[NDArray[np.float32]]:
        ways = (paths, iter(paths), images(), nothing(), paths[0])
        return list(await asyncio.gather(*(embedder.aembed(way, batch_size=2) for way in ways)))

    *all_of_them, none, one = asyncio.run(main())
    for found in all_of_them:
        assert_same(found, expected)
    assert none.shape == (0, SPEC.width)
    assert_same(one, expected[:1])


def test_a_copy_opens_the_artifact_again(
    embedder: regcache.Embedder, paths: list[Path], expected: NDArray[np.float32]
) -> None:
    content = pickle.dumps(embedder)
    assert len(content) < 2000  # no weights
    with pickle.loads(content) as again, copy.copy(embedder) as other:
        for found in (again, other):
            assert repr(found) == repr(embedder)
            assert_same(found.embed(paths), expected)
    with pytest.raises(ValueError, match="closed"):
        pickle.loads(pickle.dumps(again)).embed(paths)


@pytest.mark.slow
def test_in_another_process(
    embedder: regcache.Embedder, paths: list[Path], expected: NDArray[np.float32]
) -> None:
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        assert_same(pool.submit(embedder.embed, paths).result(), expected)


def test_a_replaced_artifact_is_not_taken_for_the_same(tmp_path: Path) -> None:
    for name in ("first", "second"):
        (tmp_path / name).mkdir()
    artifact, other = (
        tiny_artifact(tmp_path / "first"),
        tiny_artifact(tmp_path / "second", depth=2),
    )
    with regcache.load(artifact) as loaded:
        content = pickle.dumps(loaded)
    shutil.rmtree(artifact)
    other.rename(artifact)
    with pytest.raises(regcache.InputError, match="another model"):
        pickle.loads(content)


def test_says_what_it_is(embedder: regcache.Embedder) -> None:
    text, source = repr(embedder), embedder.manifest.options.source
    assert Path(source).name == "tiny.onnx"
    size = f"{SPEC.size} x {SPEC.size}"
    assert text == f"<Embedder of {source}: ort-cpu int8, images of {size}>"
    closed = copy.copy(embedder)
    closed.close()
    assert repr(closed) == text.replace(">", ", closed>")
