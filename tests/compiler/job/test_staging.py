"""Artifacts appear whole or not at all."""

import errno
import hashlib
import json
import os
from pathlib import Path

import numpy as np
import pytest
from support.staging import names, write_artifact

from regcache.compiler.job import staging as staging_module
from regcache.compiler.job.staging import (
    CARD,
    MANIFEST,
    check_output,
    staged_file,
    staged_folder,
    write_text,
)
from regcache.passes.errors import InputError
from regcache.passes.external_weights import keep_weights


def test_a_folder_appears_when_the_block_ends(tmp_path: Path) -> None:
    output = tmp_path / "deep" / "artifact"
    with staged_folder(output) as staging:
        (staging / "model.onnx").write_text("x")
        assert not output.exists()
    assert names(output) == ["model.onnx"]
    assert names(output.parent) == ["artifact"]
    assert output.stat().st_mode & 0o777 == 0o777 & ~_umask()


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def test_weights_that_are_mapped_still_are_no_part_of_it(tmp_path: Path) -> None:
    with staged_folder(tmp_path / "artifact") as staging:
        (staging / "manifest.json").write_text("{}")
        (mapped,) = keep_weights([np.arange(4)], staging)
    assert names(tmp_path / "artifact") == ["manifest.json"]
    assert mapped.tolist() == [0, 1, 2, 3]


def test_an_artifact_is_replaced_whole(tmp_path: Path) -> None:
    output = tmp_path / "artifact"
    for content in ("old", "new"):
        assert write_artifact(output, content) == []
    assert names(output) == [MANIFEST, "new"]
    assert names(tmp_path) == ["artifact"]


@pytest.mark.parametrize("error", [RuntimeError("a bug"), KeyboardInterrupt()])
def test_nothing_is_left_when_the_block_fails(tmp_path: Path, error: BaseException) -> None:
    def write_half() -> None:
        with staged_folder(tmp_path / "artifact") as staging:
            (staging / "model.onnx").write_text("half")
            raise error

    with pytest.raises(type(error)):
        write_half()
    assert names(tmp_path) == []


def test_the_old_artifact_outlives_a_failure(tmp_path: Path) -> None:
    output = tmp_path / "artifact"
    write_artifact(output, "old")
    with pytest.raises(RuntimeError), staged_folder(output):
        raise RuntimeError
    assert names(output) == [MANIFEST, "old"]
    assert names(tmp_path) == ["artifact"]


def test_a_full_disk_is_one_line(tmp_path: Path) -> None:
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "model.onnx")
    with (
        pytest.raises(InputError, match=r"model\.onnx: No space left on device"),
        staged_folder(tmp_path / "artifact"),
    ):
        raise full
    assert names(tmp_path) == []


def test_what_is_no_artifact_is_not_replaced(tmp_path: Path) -> None:
    folder, file = tmp_path / "photos", tmp_path / "file"
    folder.mkdir()
    (folder / "holiday.jpg").write_text("")
    file.write_text("")
    for output in (folder, file):
        with pytest.raises(InputError, match=str(output)), staged_folder(output):
            pytest.fail("the block must not run")
    assert names(folder) == ["holiday.jpg"]
    empty = tmp_path / "empty"
    empty.mkdir()
    with staged_folder(empty) as staging:
        (staging / "x").write_text("")
    assert names(empty) == ["x"]


def test_a_file_appears_with_what_lies_beside_it(tmp_path: Path) -> None:
    output = tmp_path / "encoder.onnx"
    with staged_file(output) as staged:
        staged.write_text("model")
        staged.with_name("encoder.onnx.data").write_text("weights")
        assert names(tmp_path) != ["encoder.onnx", "encoder.onnx.data"]
    assert names(tmp_path) == ["encoder.onnx", "encoder.onnx.data"]

    def write_half() -> None:
        with staged_file(output) as staged:
            staged.write_text("half")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        write_half()
    assert output.read_text() == "model"
    with pytest.raises(InputError, match="is a folder"), staged_file(tmp_path):
        pytest.fail("the block must not run")


def test_text_is_written_whole(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_text(tmp_path / "a.json", "{}\n")
    assert (tmp_path / "a.json").read_text() == "{}\n"
    write_text(Path("-"), "{}\n")
    assert capsys.readouterr().out == "{}\n"


def test_a_users_own_file_is_not_deleted(tmp_path: Path) -> None:
    output = tmp_path / "artifact"
    write_artifact(output, "model")
    (output / "notes").mkdir()
    (output / "notes" / "mine.txt").write_text("mine")
    (output / "link").symlink_to(tmp_path)
    with pytest.raises(InputError, match="artifact/link and 1 more: not part of the artifact"):
        write_artifact(output, "other")
    assert (output / "notes" / "mine.txt").read_text() == "mine"
    for number in ("", "-2"):
        told = write_artifact(output, "other", force=True)
        kept = tmp_path / f"artifact.kept{number}"
        assert names(output) == [MANIFEST, "other"]
        assert (kept / "notes" / "mine.txt").read_text() == "mine"
        assert told == [f"2 files of {output} that are not regcache's are now in {kept}"]
        (output / "notes").mkdir()
        (output / "notes" / "mine.txt").write_text("mine")
        (output / "other2").write_text("")


def test_an_artifact_of_unknown_files_is_not_replaced(tmp_path: Path) -> None:
    output = tmp_path / "artifact"
    write_artifact(output, "model")
    (output / MANIFEST).write_text('{"files"')
    with pytest.raises(InputError, match=r"manifest\.json: lists no files"):
        write_artifact(output, "other")
    write_artifact(output, "other", force=True)
    assert names(tmp_path / "artifact.kept") == ["model"]


def test_an_edited_card_is_its_user_s(tmp_path: Path) -> None:
    output = tmp_path / "artifact"
    write_artifact(output, CARD)
    files = {CARD: {"sha256": hashlib.sha256(b"").hexdigest()}}
    (output / MANIFEST).write_text(json.dumps({"files": files}))
    assert write_artifact(output, "model") == []
    for record in (files[CARD], {}, None):
        (output / CARD).write_text("mine")
        (output / MANIFEST).write_text(json.dumps({"files": {CARD: record, "model": {}}}))
        with pytest.raises(InputError, match=r"README\.md: edited since it was written; .*--force"):
            write_artifact(output, "model")
        with pytest.raises(InputError, match="edited"):
            check_output(output)
    assert len(write_artifact(output, "model", force=True)) == 1
    assert (tmp_path / "artifact.kept" / CARD).read_text() == "mine"


def test_a_file_that_comes_while_it_is_written_is_kept(tmp_path: Path) -> None:
    """Hours of work are not thrown away for it, and neither is the file."""
    output = tmp_path / "artifact"
    output.mkdir()
    told: list[str] = []
    with staged_folder(output, tell=told.append) as staging:
        (staging / "model").write_text("")
        (output / "mine").write_text("mine")
    assert names(output) == ["model"]
    assert (tmp_path / "artifact.kept" / "mine").read_text() == "mine"
    assert len(told) == 1


def test_a_link_to_the_output_stays_one(tmp_path: Path) -> None:
    real, link = tmp_path / "real", tmp_path / "link"
    link.symlink_to(real)
    for content in ("first", "second"):
        write_artifact(link, content)
        assert link.is_symlink()
        assert names(real) == sorted([MANIFEST, content])
    file = tmp_path / "file.json"
    file.symlink_to(tmp_path / "target.json")
    write_text(file, "{}")
    assert file.is_symlink()
    assert file.read_text() == "{}"
    assert names(tmp_path) == ["file.json", "link", "real", "target.json"]


@pytest.mark.parametrize("error", [errno.EBUSY, errno.EACCES])
def test_a_place_that_cannot_be_replaced_is_refused_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: int
) -> None:
    """A mount point, as a container's volume is; a folder in one of another user's."""
    output = tmp_path / "artifact"
    write_artifact(output, "model")

    def refuse(path: Path) -> None:
        raise OSError(error, os.strerror(error), str(path))

    monkeypatch.setattr(Path, "rmdir", refuse)
    reason = "mount point" if error == errno.EBUSY else os.strerror(error)
    with pytest.raises(InputError, match=f"cannot be replaced: .*{reason}"), staged_folder(output):
        pytest.fail("the block must not run")
    with pytest.raises(InputError, match=reason):
        check_output(output)
    assert names(output) == [MANIFEST, "model"]


def test_a_check_leaves_an_empty_folder_as_it_was(tmp_path: Path) -> None:
    output = tmp_path / "empty"
    output.mkdir()
    output.chmod(0o750)
    check_output(output)
    assert output.stat().st_mode & 0o777 == 0o750
    assert names(tmp_path) == ["empty"]
    check_output(tmp_path / "none" / "there")
    assert names(tmp_path) == ["empty"]


@pytest.mark.skipif(os.name == "nt", reason="needs devices")
def test_a_device_is_written_to_and_not_replaced(tmp_path: Path) -> None:
    write_text(Path("/dev/null"), "{}")
    assert not Path("/dev/null").is_file()
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(InputError, match="is no regular file"), staged_file(tmp_path / "pipe"):
        pytest.fail("the block must not run")


@pytest.mark.parametrize("exchanges", [True, False])
def test_a_folder_is_replaced_with_and_without_an_exchange(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, exchanges: bool
) -> None:
    if not exchanges:
        monkeypatch.setattr(staging_module, "exchange", lambda one, other: False)
    for content in ("first", "second"):
        write_artifact(tmp_path / "artifact", content)
    assert names(tmp_path / "artifact") == [MANIFEST, "second"]
    assert names(tmp_path) == ["artifact"]
