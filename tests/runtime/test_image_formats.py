"""Files of formats that are not read are counted in one line; HEIC is read where its plugin is."""

import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
from PIL import Image, ImageFile

from regcache.passes.errors import InputError
from regcache.passes.preprocess import Preprocess
from regcache.runtime import image_formats
from regcache.runtime.image_formats import (
    IMAGE_SUFFIXES,
    describe_unread,
    image_suffixes,
    readable_formats,
    unread_suffix,
)
from regcache.runtime.images import read_image
from regcache.runtime.list_images import labelled_images, list_images

RECIPE = Preprocess(4, 4, "squash", (4, 4), "nearest", (0, 0, 0), (1, 1, 1), 1)


@pytest.fixture(autouse=True)
def without_plugin(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    image_formats.reads_heif.cache_clear()
    yield
    image_formats.reads_heif.cache_clear()


def touch(folder: Path, *names: str) -> Path:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()
    return folder


def test_what_is_left_out_is_counted_in_one_line(tmp_path: Path) -> None:
    photos = [f"{number}.HEIC" for number in range(9)] + ["deep/er/x.heic"]
    others = ["a.cr2", "deep/b.CR2", "notes.txt", "labels.json", ".hidden.svg", "heic", "a.jpg.md"]
    touch(tmp_path, *photos, *others, "one.jpg", "deep/two.png")
    told: list[str] = []
    found = list_images(tmp_path, told.append)
    assert found == [tmp_path / "deep/two.png", tmp_path / "one.jpg"]
    assert told == [
        f"image folder {tmp_path}: 12 files of formats that are not read were left out: "
        "10 .heic (pip install pillow-heif), 2 .cr2"
    ]
    assert list_images(tmp_path) == found


def test_where_all_is_read_nothing_is_said(tmp_path: Path) -> None:
    told: list[str] = []
    list_images(touch(tmp_path, *(f"a{suffix}" for suffix in IMAGE_SUFFIXES)), told.append)
    assert told == []


def test_a_folder_of_nothing_else_says_what_it_holds(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no image in it \(.*\); 1 file of a format that is not"):
        list_images(touch(tmp_path, "a.svg"))


def test_class_folders_are_counted_together(tmp_path: Path) -> None:
    told: list[str] = []
    touch(tmp_path, "cat/a.jpg", "cat/b.svg", "dog/a.jpg", "dog/b.svg", "dog/c.nef")
    assert len(labelled_images(tmp_path, told.append)) == 2
    assert told == [
        f"image folder {tmp_path}: 3 files of formats that are not read were left out: "
        "2 .svg, 1 .nef"
    ]


def test_suffixes_are_read_or_unread_never_both() -> None:
    assert unread_suffix("a.b.PSD") == ".psd"
    for name in ("a", "psd", "a.txt", "a.jpg", *IMAGE_SUFFIXES):
        assert unread_suffix(f"x{name}") is None
    assert describe_unread(Counter({".b": 1, ".a": 1, ".c": 3})).endswith("3 .c, 1 .a, 1 .b")


class ToyFile(ImageFile.ImageFile):
    """A format of one grey pixel: what pillow-heif is to Pillow."""

    format = "HEIF"

    def _open(self) -> None:
        assert self.fp is not None
        self._mode, self._size = "L", (1, 1)
        self.tile = [ImageFile._Tile("raw", (0, 0, 1, 1), 4, "L")]


def test_heic_is_read_where_its_plugin_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plugin = ModuleType("pillow_heif")

    def register() -> None:
        Image.register_open("HEIF", ToyFile, lambda prefix: prefix.startswith(b"heif"))
        Image.register_extension("HEIF", ".heic")

    plugin.register_heif_opener = register  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "pillow_heif", plugin)
    monkeypatch.setattr(Image, "OPEN", dict(Image.OPEN))
    monkeypatch.setattr(Image, "ID", list(Image.ID))
    monkeypatch.setattr(Image, "EXTENSION", dict(Image.EXTENSION))
    image_formats.reads_heif.cache_clear()
    (tmp_path / "a.HEIC").write_bytes(b"heif\x63")
    told: list[str] = []
    assert list_images(tmp_path, told.append) == [tmp_path / "a.HEIC"]
    assert told == []
    assert ".hif" in image_suffixes()
    assert "HEIF" in readable_formats()
    assert (read_image(tmp_path / "a.HEIC", RECIPE) == 0x63).all()
