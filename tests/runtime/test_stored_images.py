"""Images in tar archives, in data sets and in arrays: the same pixels as of files, read lazily."""

import io
import json
import os
import sys
import tarfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.command_line import assert_refused, run_regcache
from support.tiny_artifact import tiny_artifact
from support.tiny_source import RECIPE, photos

import regcache
from regcache.passes.errors import InputError, MissingExtraError
from regcache.runtime import dataset_images
from regcache.runtime.baseline import fingerprint
from regcache.runtime.images import ImageFolder, UnreadableImageError, read_image
from regcache.runtime.list_images import list_images
from regcache.runtime.stored_images import StoredImage

Write = Callable[[Path, Path], Path]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return photos(tmp_path_factory.mktemp("stored") / "photos", 6, seed=1)


def write_tar(file: Path, members: Mapping[str, bytes | tarfile.TarInfo]) -> Path:
    """A tar archive of files by name, or of other members."""
    with tarfile.open(file, "w") as archive:
        for name, content in members.items():
            member = content if isinstance(content, tarfile.TarInfo) else tarfile.TarInfo(name)
            data = b"" if isinstance(content, tarfile.TarInfo) else content
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return file


def as_tar(folder: Path, to: Path) -> Path:
    """A webdataset's shard: each image beside what is known of it."""
    members: dict[str, bytes | tarfile.TarInfo] = {}
    for path in sorted(folder.iterdir()):
        members |= {f"{path.stem}.json": b"{}", path.name: path.read_bytes()}
    return write_tar(to / "shard.tar", members)


def as_shards(folder: Path, to: Path) -> Path:
    """A folder of two shards."""
    (to / "shards").mkdir()
    paths = sorted(folder.iterdir())
    for number, part in enumerate((paths[:4], paths[4:])):
        write_tar(to / f"shards/{number:05}.tar", {path.name: path.read_bytes() for path in part})
    return to / "shards"


def as_pattern(folder: Path, to: Path) -> Path:
    return as_shards(folder, to) / "*.tar"


def as_list(folder: Path, to: Path) -> Path:
    """A list of shards."""
    as_shards(folder, to)
    (to / "list.txt").write_text("shards/00000.tar\nshards/00001.tar\n")
    return to / "list.txt"


def write_arrow(file: Path, table: Any) -> None:
    import pyarrow as pa

    with pa.OSFile(str(file), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table, max_chunksize=3)


def as_dataset(folder: Path, to: Path, column: Mapping[str, Any] | None = None) -> Path:
    """What datasets.Dataset.save_to_disk writes, in two files."""
    pa = pytest.importorskip("pyarrow", reason="NOT CHECKED: pyarrow is not installed")
    data = to / "data"
    data.mkdir()
    features = {"label": {"dtype": "int64", "_type": "Value"}, "image": {"_type": "Image"}}
    (data / "dataset_info.json").write_text(
        json.dumps({"features": {**features, **(column or {})}})
    )
    names, paths = [], sorted(folder.iterdir())
    for number, part in enumerate((paths[:4], paths[4:])):
        rows = [{"bytes": path.read_bytes(), "path": path.name} for path in part]
        table = pa.table({"label": list(range(len(part))), "image": rows})
        names.append(f"data-{number:05}-of-00002.arrow")
        write_arrow(data / names[-1], table)
    files = [{"filename": name} for name in names]
    (data / "state.json").write_text(json.dumps({"_data_files": files, "_split": None}))
    return data


KINDS = {"tar": as_tar, "shards": as_shards, "pattern": as_pattern, "list": as_list,
         "dataset": as_dataset}  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_the_same_images_as_files(folder: Path, tmp_path: Path, kind: str) -> None:
    files = list_images(folder)
    images = list_images(KINDS[kind](folder, tmp_path))
    assert [image.name for image in images] == [file.name for file in files]
    assert fingerprint(images) == fingerprint(files)
    ours, wanted = (ImageFolder(every, RECIPE, 4) for every in (images, files))
    for batch, other in zip(ours, wanted, strict=True):
        np.testing.assert_array_equal(batch.images, other.images)


def test_tensors_are_taken_as_they_are(folder: Path, tmp_path: Path) -> None:
    wanted = np.stack([read_image(path, RECIPE) for path in list_images(folder)])
    np.save(tmp_path / "x.npy", wanted)
    images = list_images(tmp_path / "x.npy")
    assert [image.name for image in images] == [f"x.npy[{row}]" for row in range(6)]
    (batch,) = ImageFolder(images, RECIPE, 8)
    np.testing.assert_array_equal(batch.images, wanted)


@pytest.mark.parametrize(
    ("array", "reason"),
    [
        (
            np.zeros((2, 3, 8, 8), np.float32),
            r"float32 tensors \[3, 8, 8\], where the encoder",
        ),
        (np.zeros((2, 16, 16, 3), np.float32), r"\[16, 16, 3\], where the encoder takes float32"),
        (np.zeros((2, 3, 16, 16), np.uint8), r"uint8 tensors"),
        (np.zeros((3, 16, 16), np.float32), r"no batch of images \[N, 3, H, W\]"),
        (np.zeros((0, 3, 16, 16), np.float32), r"no batch of images"),
        (np.array([{"a": 1}], object), r"is no \.npy file of numbers"),
    ],
)
def test_other_arrays_are_refused(tmp_path: Path, array: Any, reason: str) -> None:
    np.save(tmp_path / "x.npy", array, allow_pickle=True)
    with pytest.raises(InputError, match=rf"x\.npy: .*{reason}"):
        list(ImageFolder(list_images(tmp_path / "x.npy"), RECIPE, 8))


def test_tensors_with_nan_are_left_out(tmp_path: Path) -> None:
    array = np.zeros((3, *RECIPE.shape), np.float32)
    array[1, 0, 0, 0] = np.nan
    np.save(tmp_path / "x.npy", array)
    told: list[str] = []
    images = ImageFolder(
        list_images(tmp_path / "x.npy"), RECIPE, 8, lambda one: told.append(one.reason)
    )
    assert [len(batch.images) for batch in images] == [2]
    assert told == ["holds NaN or infinity"]


@pytest.mark.parametrize(
    "header",
    [
        "{'descr': '<f4', 'fortran_order': False, 'shape': (True, 3, 16, 16)}",
        "{'descr': '<f4', 'fortran_order': False, 'shape': (-17, 3, 16, 16)}",
        "{'descr': '|O', 'fortran_order': False, 'shape': (17, 3, 16, 16)}",
        "{'descr': '<f4', 'fortran_order': False, 'shape': (2**62, 3, 2**40, 16)}",
        "{'descr': '<f4', 'fortran_order': False, 'shape': (1000000000, 3, 16, 16)}",
        "__import__('os')",
        "(" * 3000,
    ],
)
def test_tensors_with_a_broken_header_are_refused(tmp_path: Path, header: str) -> None:
    padded = f"{header}\n".encode()
    file = tmp_path / "a.npy"
    file.write_bytes(b"\x93NUMPY\x01\x00" + len(padded).to_bytes(2, "little") + padded + bytes(99))
    with pytest.raises(InputError, match=r"a\.npy: is no \.npy file of numbers, or a broken one"):
        list_images(file)


class TestHostileArchives:
    """Nothing is written, followed or believed."""

    def test_names_that_lead_elsewhere_are_names(self, folder: Path, tmp_path: Path) -> None:
        content = next(folder.iterdir()).read_bytes()
        names = ("../../up.png", "/absolute.png", "a/b/deep.PNG")
        archive = write_tar(tmp_path / "x.tar", dict.fromkeys(names, content))
        images = list_images(archive)
        assert [image.name for image in images] == list(names)
        assert all(read_image(image, RECIPE).shape == RECIPE.shape for image in images)
        assert os.listdir(tmp_path) == ["x.tar"]

    @pytest.mark.parametrize(
        "kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE, tarfile.CHRTYPE]
    )
    def test_links_and_devices_are_refused(self, tmp_path: Path, kind: bytes) -> None:
        member = tarfile.TarInfo("a.png")
        member.type, member.linkname = kind, "/etc/passwd"
        with pytest.raises(InputError, match=r"x\.tar: a\.png is a link, a device"):
            list_images(write_tar(tmp_path / "x.tar", {"a.png": member}))

    def test_hidden_members_and_others_are_left_out(self, folder: Path, tmp_path: Path) -> None:
        content = next(folder.iterdir()).read_bytes()
        names = ("._a.png", "a.png", "a.cls", "b/.hidden.png", "c.heicx", "d.exr")
        told: list[str] = []
        images = list_images(
            write_tar(tmp_path / "x.tar", dict.fromkeys(names, content)), told.append
        )
        assert [image.name for image in images] == ["a.png"]
        assert len(told) == 1
        assert "1 .exr" in told[0]

    def test_a_member_that_is_no_image_is_named(self, tmp_path: Path) -> None:
        (image,) = list_images(write_tar(tmp_path / "x.tar", {"a/b.png": b"no image"}))
        with pytest.raises(UnreadableImageError, match=r"x\.tar:a/b\.png: not an image"):
            read_image(image, RECIPE)

    @pytest.mark.parametrize(
        ("content", "reason"),
        [
            (b"", "no tar archive"),
            (b"no tar" * 1000, "no tar archive"),
            (bytes(10240), "no image in it"),
        ],
    )
    def test_what_is_no_archive(self, tmp_path: Path, content: bytes, reason: str) -> None:
        (tmp_path / "x.tar").write_bytes(content)
        with pytest.raises(InputError, match=rf"x\.tar: .*{reason}"):
            list_images(tmp_path / "x.tar")

    @pytest.mark.parametrize("cut", [600, 1100])
    def test_a_truncated_archive(self, folder: Path, tmp_path: Path, cut: int) -> None:
        archive = as_tar(folder, tmp_path)
        archive.write_bytes(archive.read_bytes()[:cut])
        with pytest.raises(InputError, match=r"shard\.tar"):
            list(ImageFolder(list_images(archive), RECIPE, 4))

    def test_no_more_is_read_than_a_member_holds(self, folder: Path, tmp_path: Path) -> None:
        archive = as_tar(folder, tmp_path)
        image = list_images(archive)[-1]
        assert isinstance(image, StoredImage)
        with image.open() as file:
            assert len(file.read()) == (folder / image.name).stat().st_size
            assert file.seek(-3, os.SEEK_END) == file.tell()
            assert len(file.read(100)) == 3

    def test_a_size_below_zero_ends(self, folder: Path, tmp_path: Path) -> None:
        """Python's reader went round and round (CVE-2025-8194)."""
        content = bytearray(as_tar(folder, tmp_path).read_bytes())
        content[124:136] = b"\xff" * 11 + b"\x00"  # base 256, negative
        header = content[:148] + b" " * 8 + content[156:512]
        content[148:156] = b"%06o\0 " % sum(header)
        (tmp_path / "x.tar").write_bytes(content)
        with pytest.raises(InputError, match=r"x\.tar"):
            list(ImageFolder(list_images(tmp_path / "x.tar"), RECIPE, 4))

    def test_a_compressed_one_says_what_to_do(self, folder: Path, tmp_path: Path) -> None:
        with tarfile.open(tmp_path / "x.tar.gz", "w:gz") as archive:
            archive.add(folder)
        with pytest.raises(InputError, match=r"x\.tar\.gz: is compressed: unpack it first"):
            list_images(tmp_path / "x.tar.gz")


class TestDatasets:
    """A Hugging Face data set on disk."""

    def test_without_pyarrow(
        self, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        data = as_dataset(folder, tmp_path)
        dataset_images._rows.cache_clear()
        monkeypatch.setitem(sys.modules, "pyarrow", None)
        with pytest.raises(
            MissingExtraError, match=r'needs pyarrow: pip install "regcache\[datasets'
        ):
            list_images(data)

    def test_splits_are_named(self, tmp_path: Path) -> None:
        (tmp_path / "dataset_dict.json").write_text('{"splits": ["train", "test"]}')
        with pytest.raises(InputError, match="has splits, name the folder of one: train, test"):
            list_images(tmp_path)

    def test_a_file_outside_is_refused(self, folder: Path, tmp_path: Path) -> None:
        data = as_dataset(folder, tmp_path)
        (data / "state.json").write_text('{"_data_files": [{"filename": "../x.arrow"}]}')
        with pytest.raises(InputError, match=r"names a file outside of it: \.\./x\.arrow"):
            list_images(data)

    def test_columns(self, folder: Path, tmp_path: Path) -> None:
        data = as_dataset(folder, tmp_path, {"mask": {"_type": "Image"}})
        told: list[str] = []
        assert len(list_images(data, told.append)) == 6
        assert told == [f"data set {data}: images are read from image, not mask"]
        (data / "dataset_info.json").write_text('{"features": {"label": {"_type": "Value"}}}')
        with pytest.raises(InputError, match="no column of it holds images: label"):
            list_images(data)

    def test_rows_without_an_image_are_left_out(self, folder: Path, tmp_path: Path) -> None:
        data = as_dataset(folder, tmp_path)
        pa = pytest.importorskip("pyarrow")
        whole = {"bytes": next(folder.iterdir()).read_bytes(), "path": None}
        rows = [whole, {"bytes": None, "path": "/etc/passwd"}, None]
        table = pa.table({"image": rows})
        for file in data.glob("*.arrow"):
            with (
                pa.OSFile(str(file), "wb") as sink,
                pa.ipc.new_stream(sink, table.schema) as writer,
            ):
                writer.write_table(table)
        told: list[str] = []
        images = ImageFolder(list_images(data), RECIPE, 8, lambda one: told.append(one.reason))
        assert [len(batch.images) for batch in images] == [2]
        assert told == ["the row holds no bytes of an image"] * 4

    @pytest.mark.parametrize(
        "name", ["state.json", "dataset_info.json", "data-00001-of-00002.arrow"]
    )
    def test_broken_files_are_named(self, folder: Path, tmp_path: Path, name: str) -> None:
        data = as_dataset(folder, tmp_path)
        next(data.glob(f"*{name}")).write_text("[")
        with pytest.raises(InputError, match=name):
            list_images(data)


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_artifact(tmp_path_factory.mktemp("artifact"))


@pytest.mark.parametrize("kind", ["tar", "dataset"])
@pytest.mark.slow
def test_commands_take_them(artifact: Path, folder: Path, tmp_path: Path, kind: str) -> None:
    """The same artifact and figures as of files, and the members' names in the reports."""
    stored, found = KINDS[kind](folder, tmp_path), []
    for number, images in enumerate((folder, stored)):
        out, report = tmp_path / f"a{number}", tmp_path / f"{number}.json"
        fast = ("--registers", "off", "--rounding", "nearest", "--no-equalize", "--accept-slower")
        given = ("--images", images, "--threads", 1, "--int8-share", 1)
        source = artifact.parent / "tiny.onnx"
        assert run_regcache("compile", source, "-o", out, *given, *fast).code == 0
        done = run_regcache("parity", artifact, "--images", images, "--json", report)
        assert done.code == 0, done
        found.append((json.loads(report.read_text()), (out / "model.onnx").read_bytes()))
        assert run_regcache("inspect", source, "--images", images).code == 0
    assert found[0] == found[1]
    assert found[0][0]["worst_image"].endswith(".png")


def test_parity_of_tensors(artifact: Path, folder: Path, tmp_path: Path) -> None:
    wanted = np.stack([read_image(path, RECIPE) for path in list_images(folder)])
    np.save(tmp_path / "x.npy", wanted)
    found = [
        regcache.parity(artifact, images, threads=1) for images in (folder, tmp_path / "x.npy")
    ]
    assert found[0].cosine_mean == found[1].cosine_mean
    np.save(tmp_path / "x.npy", wanted[..., :8])
    outcome = run_regcache("parity", artifact, "--images", tmp_path / "x.npy")
    assert_refused(outcome, "x.npy: holds float32 tensors [3, 16, 8], where the encoder takes")


def test_embedding_them(artifact: Path, folder: Path, tmp_path: Path) -> None:
    np.save(
        tmp_path / "x.npy", np.stack([read_image(path, RECIPE) for path in list_images(folder)])
    )
    with regcache.load(artifact, threads=1) as embedder:
        wanted = embedder.embed(folder)
        for images in (as_tar(folder, tmp_path), as_pattern(folder, tmp_path), tmp_path / "x.npy"):
            np.testing.assert_array_equal(embedder.embed(images), wanted)
        np.testing.assert_array_equal(
            embedder.embed(list_images(as_tar(folder, tmp_path))[2]), wanted[2:3]
        )
