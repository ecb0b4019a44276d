"""The reader equals torchvision on PIL images, and streams."""

import io
import tracemalloc
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image
from support.examples import examples

from regcache.passes.errors import InputError
from regcache.passes.preprocess import Interpolation, Preprocess, ResizeMode
from regcache.runtime.images import ImageFolder, preprocess_image, read_image, resized_size

MODES = ["1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK", "YCbCr", "HSV"]


def recipe(
    side: int = 32,
    resize: ResizeMode = "shortest",
    resize_to: tuple[int, int] = (36, 36),
    interpolation: Interpolation = "bicubic",
) -> Preprocess:
    return Preprocess(
        side, side, resize, resize_to, interpolation, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    )


def noise(width: int, height: int, mode: str = "RGB", seed: int = 0) -> Image.Image:
    random = np.random.default_rng(seed)
    rgb = Image.fromarray(random.integers(0, 256, (height, width, 3), np.uint8))
    return rgb.convert("L").convert("LA").convert("PA") if mode == "PA" else rgb.convert(mode)


def torchvision_pixels(image: Image.Image, how: Preprocess) -> NDArray[np.float32]:
    transforms = pytest.importorskip("torchvision.transforms")
    mode = transforms.InterpolationMode(how.interpolation)
    steps = [transforms.Lambda(lambda found: found.convert("RGB"))]
    if how.resize == "shortest":
        steps.append(transforms.Resize(how.resize_to[0], interpolation=mode))
    if how.resize == "squash":
        steps.append(transforms.Resize(how.resize_to, interpolation=mode))
    steps += [
        transforms.CenterCrop((how.height, how.width)),
        transforms.ToTensor(),
        transforms.Normalize(how.mean, how.std),
    ]
    pixels: NDArray[np.float32] = transforms.Compose(steps)(image).numpy()
    return pixels


sides = st.integers(1, 90)
recipes = st.builds(
    Preprocess,
    height=sides,
    width=sides,
    resize=st.sampled_from(["shortest", "squash", "none"]),
    resize_to=st.tuples(sides, sides),
    interpolation=st.sampled_from(["nearest", "bilinear", "bicubic", "lanczos"]),
    mean=st.tuples(*[st.floats(0, 1)] * 3),
    std=st.tuples(*[st.floats(0.2, 2)] * 3),
)


@examples(150)
@given(how=recipes, width=sides, height=sides, mode=st.sampled_from(MODES), seed=st.integers(0, 9))
def test_equals_torchvision(how: Preprocess, width: int, height: int, mode: str, seed: int) -> None:
    image = noise(width, height, mode, seed)
    found = preprocess_image(image, how)
    assert found.dtype == np.float32
    assert found.shape == (3, how.height, how.width)
    assert found.flags.c_contiguous
    np.testing.assert_allclose(found, torchvision_pixels(image, how), atol=3e-6)


@pytest.mark.parametrize(
    "size", [(1, 1), (1, 700), (700, 1), (35, 38), (39, 36), (2, 3), (500, 375)]
)
def test_equals_torchvision_at_awkward_sizes(size: tuple[int, int]) -> None:
    image = noise(*size)
    for how in (recipe(), recipe(resize_to=(20, 20)), recipe(33)):
        found = preprocess_image(image, how)
        np.testing.assert_allclose(found, torchvision_pixels(image, how), atol=3e-6)


@given(width=st.integers(1, 5000), height=st.integers(1, 5000), short=st.integers(1, 600))
def test_the_shorter_edge_reaches_its_size(width: int, height: int, short: int) -> None:
    wide, high = resized_size((width, height), recipe(resize_to=(short, short)))
    assert min(wide, high) == short
    assert max(wide, high) == int(short * max(width, height) / min(width, height))


@pytest.mark.parametrize(
    ("mode", "name"),
    [("RGBA", "a.png"), ("P", "a.gif"), ("CMYK", "a.jpg"), ("LA", "a.tif")]
    + [
        ("RGB", name) for name in ("a.webp", "a.bmp", "a.ppm", "a.avif", "a.jp2", "A.JPEG", "a.jpe")
    ],
)
def test_reads_files_as_pillow_does(tmp_path: Path, mode: str, name: str) -> None:
    path = tmp_path / name
    noise(50, 41, mode).save(path)
    with Image.open(path) as image:
        expected = preprocess_image(image.convert("RGB"), recipe())
    np.testing.assert_array_equal(read_image(path, recipe()), expected)


def test_orientation_in_exif_is_not_applied(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    noise(60, 40).save(tmp_path / "plain.png")
    noise(60, 40).save(tmp_path / "turned.png", exif=exif)
    plain, turned = (read_image(tmp_path / f"{n}.png", recipe()) for n in ("plain", "turned"))
    np.testing.assert_array_equal(plain, turned)


@pytest.mark.parametrize("rgb_last", [False, True])
@pytest.mark.parametrize("mode", ["RGBA", "P", "L"])
def test_pixels_go_as_they_are_to_encoders_that_normalise(
    tmp_path: Path, mode: str, rgb_last: bool
) -> None:
    floats = replace(recipe(), background=(9, 99, 199), rgb_last=rgb_last)
    plain = replace(floats, mean=(0, 0, 0), std=(1, 1, 1), rescale=1, dtype="uint8", layout="nhwc")
    image = noise(50, 41, mode)
    found = preprocess_image(image, plain)
    assert found.dtype == np.uint8
    assert found.shape == plain.shape == (32, 32, 3)
    assert found.flags.c_contiguous
    normalised = (found.transpose(2, 0, 1) / 255 - np.reshape(floats.mean, (3, 1, 1))) / np.reshape(
        floats.std, (3, 1, 1)
    )
    np.testing.assert_allclose(preprocess_image(image, floats), normalised, atol=1e-5)
    first = preprocess_image(image, replace(plain, layout="nchw"))
    np.testing.assert_array_equal(first, found.transpose(2, 0, 1))
    last = preprocess_image(image, replace(floats, layout="nhwc"))
    np.testing.assert_array_equal(last, preprocess_image(image, floats).transpose(1, 2, 0))
    image.save(tmp_path / "a.png")
    np.testing.assert_array_equal(read_image(tmp_path / "a.png", plain), found)
    (batch,) = ImageFolder([tmp_path / "a.png"] * 2, plain, 8)
    np.testing.assert_array_equal(batch.images, [found, found])


def test_transparent_palettes_do_not_warn(tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    noise(40, 40, "P").save(tmp_path / "a.png", transparency=bytes(range(256)))
    read_image(tmp_path / "a.png", recipe())
    assert not recwarn.list


def write_images(folder: Path, count: int) -> list[Path]:
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(count):
        noise(40, 40, seed=number).save(folder / f"{number:03}.png")
    return sorted(folder.iterdir())


def test_batches_keep_order_and_are_full(tmp_path: Path) -> None:
    paths = write_images(tmp_path, 7)
    paths[1].write_text("not an image")
    told: list[str] = []
    folder = ImageFolder(paths, recipe(), 3, on_skip=lambda skipped: told.append(skipped.path.name))
    for _ in range(2):  # a second iteration starts over
        batches = list(folder)
        assert [len(batch.paths) for batch in batches] == [3, 3]
        assert [path for batch in batches for path in batch.paths] == [paths[0], *paths[2:]]
        for batch in batches:
            assert batch.images.shape == (3, 3, 32, 32)
            for path, image in zip(batch.paths, batch.images, strict=True):
                np.testing.assert_array_equal(image, read_image(path, recipe()))
    assert told == ["001.png"] * 2


def test_memory_is_flat_in_the_number_of_images(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    noise(64, 64).save(buffer, "JPEG")
    paths = [tmp_path / f"{number}.jpg" for number in range(300)]
    for path in paths:
        path.write_bytes(buffer.getvalue())

    def peak(count: int) -> int:
        tracemalloc.start()
        for _ in ImageFolder(paths[:count], recipe(64), 4):
            pass
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return peak

    peak(8)
    batch_bytes = 4 * 3 * 64 * 64 * 4
    assert peak(300) < peak(30) + batch_bytes


def test_nothing_readable_names_the_first_reason(tmp_path: Path) -> None:
    paths = [tmp_path / "a.jpg", tmp_path / "b.jpg"]
    for path in paths:
        path.touch()
    with pytest.raises(InputError, match=rf"none of the 2 images.*{tmp_path}/a.jpg: empty file"):
        list(ImageFolder(paths, recipe(), 2))


def test_a_folder_needs_images_and_a_batch_size() -> None:
    with pytest.raises(InputError, match="no images"):
        ImageFolder([], recipe(), 2)
    with pytest.raises(InputError, match="batch size"):
        ImageFolder([Path("a.jpg")], recipe(), 0)
