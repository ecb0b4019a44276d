"""Open an image file with Pillow's readers, and touch nothing that the process shares.

`Image.open` holds the size against a limit of the whole process, and raises before it can be told.
"""

import struct
from typing import IO

from PIL import Image, UnidentifiedImageError

from regcache.runtime.image_formats import readable_formats

_PREFIX = 16


def open_image(file: IO[bytes], name: str) -> Image.Image:
    """The image in a file that is open, its pixels not decoded yet; as `Image.open` finds it.

    Raises UnidentifiedImageError for a file of none of the formats that are read, and whatever
    Pillow's readers raise.
    """
    prefix = file.read(_PREFIX)
    for kind in readable_formats():
        factory, accepts = Image.OPEN[kind]
        taken = accepts is None or accepts(prefix)
        if not taken or isinstance(taken, str):  # a text says what is missing to read it
            continue
        file.seek(0)
        try:
            return factory(file, name)
        except (SyntaxError, IndexError, TypeError, struct.error):  # another format after all
            continue
    raise UnidentifiedImageError(name)
