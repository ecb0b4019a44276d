"""`regcache.load(ARTIFACT).embed(IMAGES)`: order, forms of images, batches and what is refused."""

import io
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, assert_type

import numpy as np
import pytest
from numpy.typing import NDArray
from onnx import TensorProto, helper
from PIL import Image
from support.tiny_artifact import SPEC, tiny_artifact
from support.tiny_source import RECIPE, photos

import regcache
from regcache.compiler.artifact.artifact import Artifact
from regcache.compiler.artifact.embedder import Embedder
from regcache.compiler.artifact.image_input import ImageInput
from regcache.export.recipe import for_input
from regcache.passes.errors import InputError
from regcache.runtime.images import read_image
from regcache.runtime.session import OrtSession


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_artifact(tmp_path_factory.mktemp("embedder"))


@pytest.fixture(scope="module")
def embedder(artifact: Path) -> Iterator[regcache.Embedder]:
    with regcache.load(artifact, threads=1) as loaded:
        yield loaded


@pytest.fixture(scope="module")
def paths(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = photos(tmp_path_factory.mktemp("images") / "photos", 5, seed=3)
    return sorted(folder.iterdir(), reverse=True)


@pytest.fixture(scope="module")
def expected(artifact: Path, paths: list[Path]) -> NDArray[np.float32]:
    """Each image alone, by the parts that `embed` is made of."""
    with Artifact.open(artifact).session(threads=1) as session:
        found = [session.run(read_image(path, RECIPE)[np.newaxis])[0] for path in paths]
    return np.concatenate(found)


def test_its_types_are_seen(artifact: Path) -> None:
    loaded = assert_type(regcache.load(artifact), regcache.Embedder)
    assert_type(loaded.dim, int)
    loaded.close()


@pytest.mark.parametrize("batch_size", [1, 2, 8])
def test_embeds_in_order(
    embedder: regcache.Embedder,
    paths: list[Path],
    expected: NDArray[np.float32],
    batch_size: int,
) -> None:
    found = embedder.embed(paths, batch_size=batch_size)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)
    assert not np.allclose(expected[0], expected[1], rtol=1e-2)


def test_every_form_of_image_is_the_same(
    embedder: regcache.Embedder, paths: list[Path], expected: NDArray[np.float32]
) -> None:
    opened = Image.open(paths[1])
    mixed: list[ImageInput] = [str(paths[0]), opened, np.asarray(Image.open(paths[2])), paths[3]]
    np.testing.assert_allclose(embedder.embed(iter(mixed)), expected[:4], rtol=1e-4, atol=1e-5)
    for image in mixed[:3]:
        assert embedder.embed(image).shape == (1, SPEC.width)
    stack = np.stack([np.asarray(Image.open(path)) for path in paths])
    np.testing.assert_allclose(embedder.embed(stack), expected, rtol=1e-4, atol=1e-5)


def test_all_outputs(
    embedder: regcache.Embedder, paths: list[Path], expected: NDArray[np.float32]
) -> None:
    found = embedder.outputs(paths, batch_size=2)
    assert tuple(found) == embedder.output_names == ("pooled", "last_hidden_state")
    np.testing.assert_allclose(found["pooled"], expected, rtol=1e-4, atol=1e-5)
    assert found["last_hidden_state"].shape == (5, SPEC.tokens, SPEC.width)


def test_nothing_gives_no_rows(embedder: regcache.Embedder) -> None:
    assert embedder.embed([]).shape == (0, SPEC.width)
    assert embedder.outputs([])["last_hidden_state"].shape == (0, SPEC.tokens, SPEC.width)


def test_says_what_it_is(embedder: regcache.Embedder) -> None:
    assert embedder.dim == SPEC.width
    assert embedder.recipe == RECIPE
    assert embedder.manifest.encoder.blocks == 1


def test_reads_one_batch_ahead(embedder: regcache.Embedder, paths: list[Path]) -> None:
    taken: list[Path] = []

    def endless() -> Iterator[Path]:
        for path in [*paths[:3], Path("missing.png"), *paths]:
            taken.append(path)
            yield path

    with pytest.raises(InputError, match="missing"):
        embedder.embed(endless(), batch_size=2)
    assert len(taken) <= 4 + 2


def test_a_broken_image_is_named(
    embedder: regcache.Embedder, paths: list[Path], tmp_path: Path
) -> None:
    broken = tmp_path / "broken.png"
    broken.write_bytes(paths[0].read_bytes()[:200])
    with pytest.raises(InputError, match=r"broken\.png"):
        embedder.embed([paths[0], broken])
    with pytest.raises(InputError, match="image 1"):
        embedder.embed([paths[0], Image.open(broken)])
    found = embedder.embed([paths[0], broken, paths[1]], on_error="nan")
    assert np.isnan(found).all(axis=1).tolist() == [False, True, False]
    np.testing.assert_allclose(found[[0, 2]], embedder.embed(paths[:2]), rtol=1e-4, atol=1e-5)


def test_an_oversized_image_does_not_end_its_batch(
    embedder: regcache.Embedder, paths: list[Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    Image.new("RGB", (50, 60)).save(tmp_path / "large.png")
    monkeypatch.setattr("regcache.runtime.images.PIXEL_LIMIT", 50 * 60 - 1)
    large: list[Any] = [
        tmp_path / "large.png",
        Image.new("L", (50, 60)),
        np.zeros((60, 50, 3), np.uint8),
    ]
    found = embedder.embed([paths[0], *large, paths[1]], on_error="nan")
    assert np.isnan(found).all(axis=1).tolist() == [False, True, True, True, False]
    for image in large:
        with pytest.raises(InputError, match="50 x 60 pixels is over the limit"):
            embedder.embed([image])


def in_unit(pixels: NDArray[np.uint8]) -> NDArray[np.float32]:
    return pixels.astype(np.float32) / np.float32(255)


@pytest.mark.parametrize(
    "as_given",
    [
        lambda path: path.read_bytes(),
        lambda path: bytearray(path.read_bytes()),
        lambda path: path.open("rb"),
        lambda path: io.BytesIO(path.read_bytes()),
        lambda path: np.asarray(Image.open(path)).transpose(2, 0, 1),
        lambda path: in_unit(np.asarray(Image.open(path))),
        lambda path: in_unit(np.asarray(Image.open(path))).transpose(2, 0, 1).astype(np.float64),
    ],
)
def test_every_form_of_an_image_is_the_file(
    embedder: regcache.Embedder,
    paths: list[Path],
    expected: NDArray[np.float32],
    as_given: Callable[[Path], ImageInput],
) -> None:
    found = embedder.embed(as_given(path) for path in paths[:2])
    np.testing.assert_allclose(found, expected[:2], rtol=1e-4, atol=1e-5)
    alone = embedder.embed(as_given(paths[0]))
    np.testing.assert_allclose(alone, expected[:1], rtol=1e-4, atol=1e-5)


def test_a_folder_a_pattern_and_a_list_are_their_images(
    embedder: regcache.Embedder, paths: list[Path], expected: NDArray[np.float32], tmp_path: Path
) -> None:
    folder, listed = paths[0].parent, tmp_path / "some.txt"
    listed.write_text("\n".join(map(str, paths)))
    for given, wanted in (
        (folder, expected[::-1]),
        (f"{folder}/*.png", expected[::-1]),
        (listed, expected),
    ):
        np.testing.assert_allclose(embedder.embed(given), wanted, rtol=1e-4, atol=1e-5)


def test_broken_bytes_are_named_by_their_number(
    embedder: regcache.Embedder, paths: list[Path]
) -> None:
    content = paths[0].read_bytes()
    for broken in (content[:40], b"", io.BytesIO(b"no image")):
        with pytest.raises(InputError, match=r"^image 1: "):
            embedder.embed([content, broken])
    with pytest.raises(InputError, match="image 0: a file has to be opened to read bytes"):
        embedder.embed([io.StringIO("text")])  # type: ignore[list-item]


@pytest.mark.parametrize(
    "image",
    [
        np.full((4, 4, 3), 1.5, np.float32),
        np.full((4, 4, 3), np.nan, np.float32),
        np.zeros((4, 4, 3), np.int32),
        np.zeros((4, 4, 1), np.uint8),
        np.zeros(3, np.uint8),
    ],
)
def test_other_arrays_are_refused(embedder: regcache.Embedder, image: NDArray[Any]) -> None:
    with pytest.raises(InputError, match=r"image 0: pixels must be \[height, width, 3\] or \[3"):
        embedder.embed([image])


def test_what_says_nothing_is_refused(embedder: regcache.Embedder, paths: list[Path]) -> None:
    with pytest.raises(InputError, match="batch size"):
        embedder.embed(paths, batch_size=0)
    with pytest.raises(InputError, match="on_error"):
        embedder.embed(paths, on_error="skip")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="image 0: a int is no path"):
        embedder.embed([1])  # type: ignore[list-item]


def test_a_fixed_batch(tmp_path: Path, paths: list[Path]) -> None:
    with regcache.load(tiny_artifact(tmp_path, batch=2), threads=1) as loaded:
        found = loaded.embed(paths)
        assert found.shape == (5, SPEC.width)
        np.testing.assert_array_equal(found[4:], loaded.embed(paths[4]))


def test_an_encoder_that_takes_bytes(
    artifact: Path, paths: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    graph = helper.make_graph(
        [
            helper.make_node("Cast", ["images"], ["floats"], to=TensorProto.FLOAT),
            helper.make_node("ReduceMean", ["floats"], ["pooled"], axes=[1, 2], keepdims=0),
        ],
        "bytes",
        [helper.make_tensor_value_info("images", TensorProto.UINT8, ["batch", 16, 16, 3])],
        [helper.make_tensor_value_info("pooled", TensorProto.FLOAT, ["batch", 3])],
    )
    model = helper.make_model(graph, ir_version=8, opset_imports=[helper.make_opsetid("", 17)])
    recipe = for_input(RECIPE, "nhwc", "uint8")
    session = OrtSession(model.SerializeToString())
    monkeypatch.setattr(Artifact, "session", lambda *_args, **_options: session)
    monkeypatch.setattr(Embedder, "recipe", recipe)
    with regcache.load(artifact) as loaded:
        assert loaded.dim == 3
        found = loaded.embed(paths)
        wanted = [read_image(path, recipe).mean(axis=(0, 1)) for path in paths]
        np.testing.assert_allclose(found, wanted, rtol=1e-5)
        assert np.isnan(loaded.embed(["missing.png", paths[0]], on_error="nan")[0]).all()


def test_deep_and_transparent_objects_are_as_their_files(
    embedder: regcache.Embedder, paths: list[Path], tmp_path: Path
) -> None:
    grey = Image.open(paths[0]).convert("L")
    deep = Image.fromarray(np.asarray(grey) * np.uint16(257))
    clear = Image.open(paths[1]).convert("RGBA")
    clear.putalpha(7)
    for index, image in enumerate((deep, clear)):
        image.save(tmp_path / f"{index}.png")
    objects = embedder.embed([deep, clear])
    np.testing.assert_array_equal(embedder.embed(sorted(tmp_path.iterdir())), objects)
    expected = embedder.embed([grey, Image.open(paths[1])])
    np.testing.assert_allclose(objects, expected, rtol=1e-4, atol=1e-5)


def test_a_changed_artifact_is_refused(artifact: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(artifact, tmp_path / "copy"))
    (copy / "preprocess.json").write_text("{}")
    with pytest.raises(InputError, match=r"preprocess\.json: changed"):
        regcache.load(copy)
    with pytest.raises(InputError, match="no regcache artifact"):
        regcache.load(str(tmp_path))


def test_closed_is_closed(artifact: Path, paths: list[Path]) -> None:
    loaded = regcache.load(artifact)
    loaded.close()
    loaded.close()
    with pytest.raises(ValueError, match="closed"):
        loaded.embed(paths)
