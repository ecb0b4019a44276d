"""Images are read by many threads at once, and nothing of the process is changed meanwhile."""

import threading
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, UnidentifiedImageError
from support.tiny_source import RECIPE

from regcache.runtime.image_formats import readable_formats
from regcache.runtime.images import read_image
from regcache.runtime.open_image import open_image


@pytest.mark.parametrize("kind", ["AVIF", "BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP"])
def test_an_image_is_what_pillow_itself_opens(kind: str, tmp_path: Path) -> None:
    if kind not in readable_formats():
        pytest.skip(f"Pillow was built without {kind}")
    path = tmp_path / "image.bin"
    pixels = np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path, kind)
    with path.open("rb") as file, open_image(file, str(path)) as found, Image.open(path) as wanted:
        assert (found.format, found.mode, found.size) == (wanted.format, wanted.mode, wanted.size)
        np.testing.assert_array_equal(np.asarray(found), np.asarray(wanted))


def test_what_is_of_no_format_is_not_identified(tmp_path: Path) -> None:
    path = tmp_path / "text"
    path.write_text("%!PS-Adobe: Pillow would run a program to read it")
    with path.open("rb") as file, pytest.raises(UnidentifiedImageError):
        open_image(file, str(path))


def test_threads_leave_the_process_as_it_is(tmp_path: Path) -> None:
    """Its limit on pixels was lifted, and its warnings silenced, for good in the end."""
    Image.new("RGB", (40, 30)).save(tmp_path / "a.png")
    limit, filters, show = Image.MAX_IMAGE_PIXELS, list(warnings.filters), warnings.showwarning
    seen: set[object] = set()
    together = threading.Barrier(4)

    def read(_: int) -> None:
        together.wait()
        for _ in range(100):
            read_image(tmp_path / "a.png", RECIPE)
            seen.add((Image.MAX_IMAGE_PIXELS, len(warnings.filters)))

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(read, range(4)))
    assert seen == {(limit, len(filters))}
    assert warnings.showwarning is show
