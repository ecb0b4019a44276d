"""Which files are images, by their names: those that can be read here and those that cannot."""

import os
from collections import Counter
from functools import cache
from importlib import import_module

from PIL import Image

IMAGE_SUFFIXES = (
    *(".avif", ".bmp", ".gif", ".jfif", ".jp2", ".jpe", ".jpeg"),
    *(".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"),
)
_HEIF_SUFFIXES = (".heic", ".heif", ".hif")
# Named, so that a file posing as a photo never reaches Pillow's other readers: EPS runs a program.
_FORMATS = {"AVIF", "BMP", "GIF", "JPEG", "JPEG2000", "PNG", "PPM", "TIFF", "WEBP"}
_UNREAD_SUFFIXES = {
    *_HEIF_SUFFIXES,
    *(".apng", ".cur", ".dcm", ".dds", ".dib", ".djvu", ".emf", ".eps", ".exr", ".fits", ".fts"),
    *(".hdr", ".icns", ".ico", ".j2c", ".j2k", ".jpc", ".jpf", ".jpx", ".jxl", ".jxr", ".mpo"),
    *(".pbm", ".pcx", ".pfm", ".pict", ".pnm", ".psb", ".psd", ".qoi", ".ras", ".sgi", ".svg"),
    *(".svgz", ".tga", ".wdp", ".wmf", ".xbm", ".xcf", ".xpm"),
    # Raw files of cameras.
    *(".3fr", ".arw", ".cr2", ".cr3", ".crw", ".dcr", ".dng", ".erf", ".fff", ".iiq", ".kdc"),
    *(".mef", ".mos", ".mrw", ".nef", ".nrw", ".orf", ".pef", ".raf", ".raw", ".rw2", ".rwl"),
    *(".sr2", ".srf", ".srw", ".x3f"),
}


def image_suffixes() -> tuple[str, ...]:
    """How the names of images end that can be read here, in lower case."""
    return (*IMAGE_SUFFIXES, *_HEIF_SUFFIXES) if reads_heif() else IMAGE_SUFFIXES


def readable_formats() -> list[str]:
    """Pillow's names of the formats that are read, as far as it was built with them."""
    wanted = {*_FORMATS, "HEIF"} if reads_heif() else _FORMATS
    return sorted(wanted.intersection(Image.registered_extensions().values()))


def unread_suffix(name: str) -> str | None:
    """The suffix of an image's name, in lower case, whose format is not read here; else None."""
    suffix = os.path.splitext(name)[1].lower()
    return suffix if suffix in _UNREAD_SUFFIXES and suffix not in image_suffixes() else None


def describe_unread(counts: Counter[str]) -> str:
    """One line about the files that were left out, by their suffixes."""
    total = counts.total()
    what = "file of a format that is not read was"
    if total > 1:
        what = "files of formats that are not read were"
    most_first = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    kinds = ", ".join(f"{count} {suffix}{_remedy(suffix)}" for suffix, count in most_first)
    return f"{total} {what} left out: {kinds}"


def _remedy(suffix: str) -> str:
    return " (pip install pillow-heif)" if suffix in _HEIF_SUFFIXES else ""


@cache
def reads_heif() -> bool:
    """Whether pillow-heif is installed; it is made known to Pillow where it is."""
    try:
        import_module("pillow_heif").register_heif_opener()
    except ImportError:
        return False
    return True
