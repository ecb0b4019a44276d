"""The example of a server: images that come at once, and clear words for what is no image."""

import http.client
import json
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from support.tiny_artifact import tiny_artifact

import regcache

uvicorn = pytest.importorskip("uvicorn", reason="NOT CHECKED: needs regcache[serve]")
pytest.importorskip("fastapi", reason="NOT CHECKED: needs regcache[serve]")

Reply = tuple[int, dict[str, Any]]


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_artifact(tmp_path_factory.mktemp("served"))


@pytest.fixture(scope="module")
def port(artifact: Path) -> Iterator[int]:
    """Where a server of the artifact listens."""
    from batch_server import make_app

    app = make_app(artifact, batch_size=4, wait=0.02, threads=1)
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="warning"))
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        assert thread.is_alive()
        time.sleep(0.01)
    yield server.servers[0].sockets[0].getsockname()[1]
    server.should_exit = True
    thread.join()


def post(port: int, body: bytes) -> Reply:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    connection.request("POST", "/embed", body)
    response = connection.getresponse()
    return response.status, json.load(response)


def test_images_that_come_at_once_get_their_own_vectors(artifact: Path, port: int) -> None:
    paths = sorted((artifact.parent / "calibration").iterdir())
    with regcache.load(artifact, threads=1) as embedder:
        expected = embedder.embed(paths)
    with ThreadPoolExecutor(len(paths)) as pool:
        replies = list(pool.map(lambda path: post(port, path.read_bytes()), paths * 3))
    assert {code for code, _ in replies} == {200}
    vectors = np.array([reply["embedding"] for _, reply in replies])
    np.testing.assert_allclose(vectors, np.tile(expected, (3, 1)), rtol=1e-3, atol=1e-4)


def test_a_broken_image_is_told_and_costs_its_neighbours_nothing(
    artifact: Path, port: int, tmp_path: Path
) -> None:
    good = (artifact.parent / "calibration" / "00.png").read_bytes()
    Image.new("RGB", (8, 8)).save(tmp_path / "a.bmp")
    other_format = (tmp_path / "a.bmp").read_bytes()
    bodies = [good, good[: len(good) // 2], b"", other_format, good]
    with ThreadPoolExecutor(len(bodies)) as pool:
        replies = list(pool.map(lambda body: post(port, body), bodies))
    assert [code for code, _ in replies] == [200, 422, 422, 422, 200]
    assert "broken or too large" in replies[1][1]["detail"]
    assert replies[2][1]["detail"] == "no image of JPEG, PNG, WEBP"


def test_too_many_bytes_are_not_read(port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("batch_server.MOST_BYTES", 1000)
    code, reply = post(port, bytes(2000))
    assert (code, reply["detail"]) == (413, "an image may have 1000 bytes at most")
