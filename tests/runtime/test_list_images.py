"""Folders, lists, patterns and single files are listed completely, and in order."""

from pathlib import Path

import pytest

from regcache.passes.errors import InputError
from regcache.runtime.list_images import labelled_images, list_images


def touch(folder: Path, count: int) -> list[Path]:
    """Empty files that are named like images; nothing that lists opens them."""
    folder.mkdir(parents=True)
    paths = [folder / f"{index:03}.png" for index in range(count)]
    for path in paths:
        path.touch()
    return paths


def test_lists_recursively_sorted_and_without_hidden_files(tmp_path: Path) -> None:
    names = ["b/x.JPG", "a.png", "b/a/deep.TiFf", "c.webp", "b.d/y.jpeg"]
    others = [".hidden.jpg", ".cache/x.jpg", "notes.txt", "jpg", "x.jpg.part"]
    for name in names + others:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "folder.jpg").mkdir()
    assert list_images(tmp_path) == sorted(tmp_path / name for name in names)


def test_lists_linked_folders_once_and_survives_a_loop(tmp_path: Path) -> None:
    touch(tmp_path / "real", 1)
    (tmp_path / "top").mkdir()
    (tmp_path / "top/link").symlink_to(tmp_path / "real")
    (tmp_path / "real/loop").symlink_to(tmp_path / "top")
    assert list_images(tmp_path / "top") == [tmp_path / "top/link/000.png"]


def test_unusable_folders_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "empty").mkdir()
    for name, reason in [
        ("missing", "No such file"),
        ("empty", "no image"),
    ]:
        with pytest.raises(InputError, match=f"{tmp_path / name}: {reason}"):
            list_images(tmp_path / name)

    def refuse(folder: str) -> None:
        raise PermissionError(13, "Permission denied", str(folder))

    monkeypatch.setattr("os.scandir", refuse)
    with pytest.raises(InputError, match=f"{tmp_path}: Permission denied"):
        list_images(tmp_path)
    with pytest.raises(InputError, match=f"{tmp_path}: Permission denied"):
        labelled_images(tmp_path)


def test_labels_are_the_class_folders(tmp_path: Path) -> None:
    cats, dogs = touch(tmp_path / "cat", 2), touch(tmp_path / "dog/young", 1)
    (tmp_path / ".git").mkdir()
    (tmp_path / "stray.jpg").touch()
    expected = [(cats[0], "cat"), (cats[1], "cat"), (dogs[0], "dog")]
    assert labelled_images(tmp_path) == expected
    with pytest.raises(InputError, match="two or more classes"):
        labelled_images(tmp_path / "dog")
    (tmp_path / "eel").mkdir()
    with pytest.raises(InputError, match="eel: no image"):
        labelled_images(tmp_path)


def test_a_single_image_is_itself(tmp_path: Path) -> None:
    (image,) = touch(tmp_path / "a", 1)
    assert list_images(image) == [image]


def test_a_list_keeps_its_order_and_its_gaps(tmp_path: Path) -> None:
    """Paths are the list's folder's, not the working folder's; what is missing is listed too."""
    first, second = touch(tmp_path / "photos", 2)
    lines = ["# chosen by hand", "photos/001.png", "", f"  {first}  ", "photos/gone.png"]
    (tmp_path / "some.txt").write_text("\n".join(lines))
    assert list_images(tmp_path / "some.txt") == [second, first, tmp_path / "photos/gone.png"]


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "names no image"),
        (b"# a\n\n", "names no"),
        (b"\xff\n", "UTF-8"),
        (b"a\0b\n", "is no text"),
    ],
)
def test_a_list_that_names_nothing_is_refused(tmp_path: Path, content: bytes, reason: str) -> None:
    (tmp_path / "list.lst").write_bytes(content)
    with pytest.raises(InputError, match=f"list.lst: .*{reason}"):
        list_images(tmp_path / "list.lst")


def test_patterns_match_files_and_folders(tmp_path: Path) -> None:
    cats, dogs = touch(tmp_path / "in/cat", 3), touch(tmp_path / "in/dog", 2)
    (tmp_path / "in/cat/notes.txt").touch()
    (tmp_path / "in/cat/drawing.svg").touch()
    told: list[str] = []
    assert list_images(tmp_path / "in/cat/00[12].png", told.append) == cats[1:]
    assert list_images(tmp_path / "**/*.png") == [*cats, *dogs]
    assert not told
    assert list_images(tmp_path / "in/c*/*", told.append) == cats
    assert "svg" in told[0]
    assert list_images(tmp_path / "in/*", told.append) == [*cats, *dogs]  # folders, each once
    with pytest.raises(InputError, match="matches no image"):
        list_images(tmp_path / "in/*.jpg")


def test_a_folder_with_the_name_of_a_pattern_is_a_folder(tmp_path: Path) -> None:
    images = touch(tmp_path / "photos[1]", 2)
    assert list_images(tmp_path / "photos[1]") == images
