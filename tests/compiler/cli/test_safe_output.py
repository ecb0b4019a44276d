"""What can be refused is refused before the work, and what is not ours is kept."""

import json
import os
import shutil
import sys
from pathlib import Path
from typing import NamedTuple

import onnx
import pytest
from support.canonical import canonical_graph
from support.command_line import Outcome, assert_refused, run_regcache
from support.tiny_artifact import tiny_artifact
from support.tiny_vit import Spec, TinyVit

from regcache.compiler.artifact.artifact import Artifact
from regcache.passes.errors import InputError
from regcache.passes.onnx_file import save_graph


class Usage(NamedTuple):
    total: int
    used: int
    free: int


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_artifact(tmp_path_factory.mktemp("original"))


def compile_again(original: Path, output: Path, *options: object) -> Outcome:
    encoder, images = original.parent / "tiny.onnx", original.parent / "calibration"
    fast = ("--registers", "off", "--rounding", "nearest", "--no-equalize", "--int8-share", "1")
    command = ("compile", encoder, "--images", images, "-o", output, "--accept-slower", *fast)
    return run_regcache(*command, "--threads", "1", *options)


def test_a_users_file_in_an_artifact_stops_a_compile(original: Path, tmp_path: Path) -> None:
    artifact = Path(shutil.copytree(original, tmp_path / "artifact"))
    (artifact / "notes.txt").write_text("mine")
    outcome = compile_again(original, artifact)
    assert_refused(outcome, "notes.txt: not part of the artifact there", "--force")
    assert "exporting" not in outcome.err
    assert (artifact / "notes.txt").read_text() == "mine"
    forced = compile_again(original, artifact, "--force")
    assert forced.code == 0
    assert "are now in" in forced.err
    assert not (artifact / "notes.txt").exists()
    assert (tmp_path / "artifact.kept" / "notes.txt").read_text() == "mine"


def test_a_disk_without_room_is_said_before_the_work(
    original: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """There is room for float.onnx, but none for model.onnx among the temporary files."""
    there = tmp_path / "temporary"
    there.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(there))
    monkeypatch.setattr(
        "shutil.disk_usage", lambda path: Usage(0, 0, 100 if Path(path) == there else 10**9)
    )
    outcome = compile_again(original, tmp_path / "artifact")
    assert_refused(outcome, str(there), "0.0 MB are free there")
    assert "calibrating" not in outcome.err
    assert [path.name for path in tmp_path.iterdir()] == ["temporary"]


def test_a_graph_that_the_disk_has_no_room_for_is_not_begun(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    graph = canonical_graph(TinyVit(Spec()).model())
    monkeypatch.setattr("shutil.disk_usage", lambda path: Usage(0, 0, 1000))
    with pytest.raises(InputError, match=r"m\.onnx: needs .* MB, and 0\.0 MB are free"):
        save_graph(graph, tmp_path / "m.onnx")
    assert not list(tmp_path.iterdir())


def test_a_journal_that_is_a_link_is_not_written_to(original: Path, tmp_path: Path) -> None:
    target = tmp_path / "precious"
    target.write_text("precious")
    (tmp_path / ".artifact.search.jsonl").symlink_to(target)
    outcome = compile_again(original, tmp_path / "artifact", "--registers", "auto")
    assert_refused(outcome, ".artifact.search.jsonl: is no regular file")
    assert target.read_text() == "precious"


def test_no_markup_in_a_name_is_followed(tmp_path: Path, original: Path) -> None:
    """Rich would stop at a closing tag without an opening one."""
    encoder = tmp_path / "[" / "i]a.onnx"  # its path holds [/i]
    encoder.parent.mkdir()
    shutil.copy(original.parent / "tiny.onnx", encoder)
    exported = run_regcache("export", encoder, "-o", tmp_path / "[/b].onnx")
    assert exported.code == 0
    assert f"wrote {tmp_path}/[/b].onnx" in exported.out
    inspected = run_regcache("inspect", encoder)
    assert inspected.code == 0
    assert "[/i]a.onnx" in "".join(inspected.out.split())
    images = original.parent / "calibration"
    artifact = Path(shutil.copytree(original, tmp_path / "[/b]"))
    dry = ("--dry-run", "--registers", "off")
    for command in (
        ("parity", artifact, "--images", images),
        ("bundle", artifact, "--format", "ort-edge", "-o", tmp_path / "[/c]"),
        ("compile", encoder, "--images", images, "-o", tmp_path / "[/d]", *dry),
    ):
        assert run_regcache(*command).code == 0, command


def test_no_escape_of_a_file_reaches_the_terminal(tmp_path: Path) -> None:
    model = TinyVit(Spec(depth=1)).model()
    model.graph.output[0].name = "pooled\x1b]0;owned\x07"
    model.graph.node[-1].name = "last\x1b[31m"
    for node in model.graph.node:
        node.output[:] = [
            "pooled\x1b]0;owned\x07" if name == "pooled" else name for name in node.output
        ]
    onnx.save(model, tmp_path / "a.onnx")
    outcome = run_regcache("inspect", tmp_path / "a.onnx")
    assert "\x1b" not in outcome.out + outcome.err


@pytest.mark.skipif(sys.platform != "linux", reason="needs names of any bytes")
def test_names_that_are_no_utf8_are_escaped_where_they_are_written(
    original: Path, tmp_path: Path
) -> None:
    strange = os.fsdecode(b"n\xff")
    folder = tmp_path / strange
    images = Path(shutil.copytree(original.parent / "calibration", folder / "images"))
    (images / f"{strange}.png").write_bytes(b"no image")
    for name in ("tiny.onnx", "tiny.preprocess.json"):
        shutil.copy(original.parent / name, folder / name)
    fast = ("--registers", "off", "--rounding", "nearest", "--no-equalize", "--int8-share", "1")
    compiled = run_regcache(
        "compile", folder / "tiny.onnx", "--images", images, "-o", tmp_path / "artifact", *fast,
        "--accept-slower",
    )  # fmt: skip
    assert compiled.code == 0, compiled
    manifest = json.loads((tmp_path / "artifact" / "manifest.json").read_text())
    assert manifest["options"]["images"] == f"{tmp_path}/n\\udcff/images"
    assert manifest["calibration"]["skipped"][0].startswith("n\\udcff.png: ")
    Artifact.open(tmp_path / "artifact")
    written = ("--json", tmp_path / "a.json", "--junit", tmp_path / "a.xml", "--summary")
    for image in sorted(images.glob("0*")):
        image.rename(image.with_name(strange + image.name))
    parity = ("parity", original, "--images", images, *written, tmp_path / "a.md")
    assert run_regcache(*parity).code == 0
    assert json.loads((tmp_path / "a.json").read_text())["worst_image"].startswith("n\\udcff0")
    inspected = run_regcache("inspect", folder / "tiny.onnx", "--json", tmp_path / "b.json")
    assert inspected.code == 0
    assert "n\\udcff" in inspected.out
    for command in (
        ("export", folder / "tiny.onnx", "-o", folder / "b.onnx"),
        ("compile", folder / "tiny.onnx", "--images", images, "-o", folder / "artifact"),
        ("bundle", original, "--format", "ort-edge", "-o", folder / "bundle"),
    ):
        assert_refused(run_regcache(*command), "n\\udcff/", "its name is not UTF-8")
