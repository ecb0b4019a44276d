"""Small valid images, broken in every way that a file can be: by seed, always the same.

`draw_image(seed)` takes an image of one of the formats that are read, in any mode that it stores,
and changes its bytes once to three times.
"""

import functools
import io
import struct
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from random import Random

from PIL import Image, features

_SIZE = (24, 20)
_NUMBERS = (0, 1, 255, 256, 65535, 65536, 100_000, 2**24, 2**31 - 1, 2**31, 2**32 - 1)
KINDS: tuple[tuple[str, str, dict[str, object]], ...] = (
    *(("PNG", mode, {}) for mode in ("1", "L", "LA", "P", "RGB", "RGBA", "I;16")),
    ("PNG", "P", {"transparency": 3}),
    *(("JPEG", mode, {}) for mode in ("L", "RGB", "CMYK")),
    ("JPEG", "RGB", {"progressive": True}),
    *(("TIFF", mode, {}) for mode in ("1", "L", "RGB", "RGBA", "CMYK", "I;16", "F", "LAB")),
    ("TIFF", "RGB", {"compression": "tiff_lzw"}),
    ("TIFF", "RGB", {"compression": "tiff_deflate"}),
    ("TIFF", "RGB", {"compression": "jpeg"}),
    ("TIFF", "1", {"compression": "group4"}),
    *(("GIF", mode, {}) for mode in ("L", "P")),
    *(("BMP", mode, {}) for mode in ("1", "L", "P", "RGB")),
    *(("PPM", mode, {}) for mode in ("1", "L", "RGB", "I;16")),
    *(("WEBP", mode, {}) for mode in ("RGB", "RGBA")),
    ("WEBP", "RGB", {"lossless": True}),
    *(("JPEG2000", mode, {}) for mode in ("L", "RGB", "RGBA")),
    *([("AVIF", "RGB", {})] if features.check("avif") else []),
)
"""Format, mode and options of Pillow's `save`."""


@dataclass
class Picture:
    """The bytes of an image file, and what was changed in them."""

    content: bytes
    suffix: str
    changes: list[str] = field(default_factory=list)

    def write(self, folder: Path) -> Path:
        """Put it into a folder."""
        path = folder / f"mutated{self.suffix}"
        path.write_bytes(self.content)
        return path


def draw_image(seed: int) -> Picture:
    """The mutated image of that seed."""
    random = Random(seed)
    index = random.randrange(len(KINDS))
    kind, mode, _ = KINDS[index]
    picture = Picture(stored(index), f".{kind.lower()}", [f"{kind} {mode}"])
    for _ in range(random.choice((1, 1, 2, 3))):
        change = random.choice(_CHANGES)
        picture.content = change(picture.content, random)
        picture.changes.append(change.__name__.strip("_"))
    return picture


@functools.cache
def stored(index: int) -> bytes:
    """An image of that kind, of smooth noise."""
    kind, mode, options = KINDS[index]
    coarse = Image.frombytes("RGB", (6, 5), Random(index).randbytes(90))
    image = coarse.resize(_SIZE, Image.Resampling.BICUBIC)
    if mode == "I;16":
        image = Image.frombytes(mode, _SIZE, Random(index).randbytes(2 * _SIZE[0] * _SIZE[1]))
    elif mode == "LAB":
        image = Image.frombytes(mode, _SIZE, image.tobytes())
    elif mode == "LA":
        image = image.convert("RGBA").convert("LA")
    else:
        image = image.convert(mode)
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def _flip(content: bytes, random: Random) -> bytes:
    """Some bits, anywhere."""
    changed = bytearray(content)
    for _ in range(random.choice((1, 2, 4, 16, 64))):
        if changed:
            changed[random.randrange(len(changed))] ^= 1 << random.randrange(8)
    return bytes(changed)


def _flip_header(content: bytes, random: Random) -> bytes:
    """Some bytes of the first hundred, where sizes and kinds stand."""
    changed = bytearray(content)
    for _ in range(random.choice((1, 1, 2, 4))):
        if changed:
            changed[random.randrange(min(len(changed), 100))] = random.randrange(256)
    return bytes(changed)


def _number(content: bytes, random: Random) -> bytes:
    """A number of two or four bytes, in either order."""
    form = random.choice((">I", "<I", ">H", "<H"))
    size = struct.calcsize(form)
    value = struct.pack(form, random.choice(_NUMBERS) % 256**size)
    where = random.randrange(min(max(len(content) - size, 1), random.choice((64, 10**6))))
    return content[:where] + value + content[where + size :]


def _cut_off(content: bytes, random: Random) -> bytes:
    return content[: random.randrange(len(content) + 1)]


def _cut_out(content: bytes, random: Random) -> bytes:
    start = random.randrange(len(content) + 1)
    return content[:start] + content[start + random.choice((1, 4, 16, 64)) :]


def _put_in(content: bytes, random: Random) -> bytes:
    start = random.randrange(len(content) + 1)
    return content[:start] + random.randbytes(random.choice((1, 4, 64))) + content[start:]


def _double(content: bytes, random: Random) -> bytes:
    start, end = sorted(random.randrange(len(content) + 1) for _ in range(2))
    return content[:end] + content[start:]


def _other_head(content: bytes, random: Random) -> bytes:
    """The beginning of another format's file."""
    head = stored(random.randrange(len(KINDS)))
    count = random.choice((4, 12, 32))
    return head[:count] + content[count:]


_CHANGES: tuple[Callable[[bytes, Random], bytes], ...] = (
    *(_flip, _flip_header, _flip_header, _number, _number, _cut_off, _cut_out, _put_in, _double),
    _other_head,
)
