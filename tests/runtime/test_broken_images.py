"""No file, however broken or hostile, ends in anything but a named error."""

import contextlib
import io
import os
import struct
import zlib
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from support.examples import examples

from regcache.passes.preprocess import Preprocess
from regcache.runtime.images import (
    ImageFolder,
    OversizedImageError,
    UnreadableImageError,
    read_image,
)

RECIPE = Preprocess(16, 16, "shortest", (16, 16), "bicubic", (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n"


def encoded(kind: str, side: int = 64) -> bytes:
    buffer = io.BytesIO()
    Image.effect_noise((side, side), 80).convert("RGB").save(buffer, kind)
    return buffer.getvalue()


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(width: int, height: int, *extra: bytes) -> bytes:
    """A PNG that claims a size and holds hardly any pixel data."""
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    data = chunk(b"IDAT", zlib.compress(bytes(100)))
    return b"\x89PNG\r\n\x1a\n" + header + b"".join(extra) + data + chunk(b"IEND", b"")


def bad_crc(data: bytes) -> bytes:
    return data[:29] + bytes([data[29] ^ 1]) + data[30:]


TEXT_BOMB = chunk(b"zTXt", b"comment\0\0" + zlib.compress(bytes(30_000_000)))
BROKEN = {
    "empty": b"",
    "text": b"hello, I am no image\n" * 10,
    "html": b"<!doctype html><title>404</title>",
    "eps": EPS,
    "truncated jpeg": encoded("JPEG")[:900],
    "jpeg header": encoded("JPEG")[:20],
    "truncated png": encoded("PNG")[:5000],
    "truncated tiff": encoded("TIFF")[:600],
    "truncated webp": encoded("WEBP")[:300],
    "truncated bmp": encoded("BMP")[:500],
    "bad crc": bad_crc(encoded("PNG")),
    "no pixel data": png(500, 500),
    "no pixels": png(0, 7),
    "text bomb": png(8, 8, TEXT_BOMB),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_broken_files_are_named_with_a_reason(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "x.jpg"
    path.write_bytes(BROKEN[kind])
    with pytest.raises(UnreadableImageError) as caught:
        read_image(path, RECIPE)
    assert caught.value.path == path
    assert caught.value.reason
    assert str(caught.value) == f"{path}: {caught.value.reason}"
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda path: path.mkdir(), "not a regular file"),
        (lambda path: path.symlink_to("nowhere.jpg"), "No such file"),
        (lambda path: path.symlink_to(path), "symbolic links"),
        (os.mkfifo, "not a regular file"),
    ],
)
def test_what_is_no_file_is_named(
    tmp_path: Path, make: Callable[[Path], None], reason: str
) -> None:
    path = tmp_path / "x.jpg"
    make(path)
    with pytest.raises(UnreadableImageError, match=reason):
        read_image(path, RECIPE)


def test_a_forbidden_file_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "x.jpg"
    path.write_bytes(encoded("JPEG"))

    def refuse(*_args: object, **_options: object) -> None:  # root may read everything
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(UnreadableImageError, match="Permission denied"):
        read_image(path, RECIPE)


@pytest.mark.filterwarnings("ignore::UserWarning:PIL")
@examples(300)
@given(
    kind=st.sampled_from(["JPEG", "PNG", "TIFF", "WEBP", "BMP", "GIF", "PPM"]),
    cut=st.integers(0, 100),
    flips=st.lists(st.tuples(st.integers(0, 400), st.integers(0, 255)), max_size=6),
)
def test_damaged_files_are_read_or_named(
    kind: str, cut: int, flips: list[tuple[int, int]], tmp_path_factory: pytest.TempPathFactory
) -> None:
    data = bytearray(encoded(kind, 12))
    for place, value in flips:
        data[place % len(data)] = value
    path = tmp_path_factory.getbasetemp() / "damaged.img"
    path.write_bytes(data[: max(0, len(data) - cut)])
    with contextlib.suppress(UnreadableImageError, OversizedImageError):
        assert read_image(path, RECIPE).shape == (3, 16, 16)


@pytest.mark.parametrize(
    ("size", "message"),
    [
        ((30_000, 30_000), "30000 x 30000 pixels is over the limit of 178,956,970"),
        ((178_956_971, 1), "178956971 x 1 pixels is over the limit of 178,956,970"),
        ((1, 800_000), "1 x 800000, resized to 16 x 12800000 pixels, is over the limit of"),
    ],
)
def test_oversized_images_stop_the_run(
    tmp_path: Path, size: tuple[int, int], message: str, recwarn: pytest.WarningsRecorder
) -> None:
    (tmp_path / "sky.png").write_bytes(png(*size))
    limit = Image.MAX_IMAGE_PIXELS
    with pytest.raises(OversizedImageError, match=f"sky.png: {message}"):
        list(ImageFolder([tmp_path / "sky.png"], RECIPE, 1))
    assert limit == Image.MAX_IMAGE_PIXELS
    assert not recwarn.list


def test_large_images_under_the_limit_do_not_warn(
    tmp_path: Path, recwarn: pytest.WarningsRecorder
) -> None:
    path = tmp_path / "large.png"
    Image.new("1", (10_000, 9_000)).save(path)
    assert read_image(path, RECIPE).shape == (3, 16, 16)
    assert not recwarn.list
