"""`regcache report` and `compile --report`: what the page says, and what is refused."""

import base64
import io
import os
import shutil
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from support.command_line import assert_refused, run_regcache
from support.html_page import HtmlPage
from support.reported import bench_result
from support.tiny_artifact import tiny_artifact
from support.tiny_source import photos

from regcache.compiler.artifact.artifact import REGISTERS, Artifact
from regcache.compiler.artifact.manifest import FileRecord
from regcache.compiler.curation.setting import Setting
from regcache.compiler.report import write
from regcache.compiler.report.worst import thumbnail
from regcache.runtime.images import read_image

pytestmark = pytest.mark.slow


def report(artifact: Path, page: Path, *options: object, code: int = 0) -> HtmlPage:
    """The page that `regcache report` writes."""
    outcome = run_regcache("report", artifact, "-o", page, "--threads", 1, *options)
    assert outcome.code == code, outcome
    found = HtmlPage(page.read_text(encoding="utf-8"))
    found.check()
    return found


def test_a_page_without_images_says_how_to_get_what_it_lacks(
    compiled: Path, tmp_path: Path
) -> None:
    page = report(compiled, tmp_path / "page.html")
    assert not page.all_of("img")
    assert "Write it with --images FOLDER" in page.words
    assert "regcache bench ARTIFACT --json bench.json" in page.words
    assert "Parity passed" in page.words
    assert "a first look at 8 of the calibration images" in page.words
    assert len(page.all_of("section")) == 13
    assert len(page.figures) > 8


def test_what_compile_writes_has_the_times_of_its_speed_check(compiled: Path) -> None:
    page = HtmlPage((compiled.parent / "page.html").read_text(encoding="utf-8"))
    page.check()
    assert "How long a run takes" in page.words
    assert "float's time at batch 1" in page.words


def test_images_are_compared_and_the_worst_are_shown(
    compiled: Path, images: Path, tmp_path: Path
) -> None:
    page = report(compiled, tmp_path / "page.html", "--images", images, "--per-layer")
    shown = page.all_of("img")
    assert len(shown) == 6 * (1 + 3 + 3)
    assert {image["alt"] for image in shown} <= {path.name for path in images.iterdir()}
    assert "How the images spread" in page.words
    assert "The hidden state behind every block" in page.words
    assert "as exported" in page.words
    assert "on 16 images that were given" in page.words


def test_the_worst_image_comes_first_with_the_nearest_of_both(
    compiled: Path, images: Path, tmp_path: Path
) -> None:
    """Against an independent search through the embeddings of both models."""
    page = report(compiled, tmp_path / "page.html", "--images", images)
    artifact, rows = Artifact.open(compiled), []
    batch = np.stack([read_image(path, artifact.recipe) for path in sorted(images.iterdir())])
    for session in (artifact.float_session(threads=1), artifact.session(threads=1)):
        with session:
            rows.append(session.run(batch)[0].astype(np.float64))
    units = [row / np.linalg.norm(row, axis=1, keepdims=True) for row in rows]
    worst = int((units[0] * units[1]).sum(axis=1).argmin())
    names = sorted(path.name for path in images.iterdir())
    expected = [names[worst]]
    for unit in units:
        cosines = unit @ unit[worst]
        expected += [names[index] for index in np.argsort(-cosines) if index != worst][:3]
    assert [image["alt"] for image in page.all_of("img")[:7]] == expected


def test_names_of_images_and_sources_are_text(compiled: Path, tmp_path: Path) -> None:
    hostile = tmp_path / "<b>photos"
    photos(hostile, 4, seed=3)
    names = ['"><img src=x onerror=alert(1)>.png', "<script>alert(1)<script>.png", "{{ page }}.png"]
    for path, name in zip(sorted(hostile.iterdir()), names, strict=False):
        path.rename(hostile / name)
    (hostile / "broken.png").write_bytes(b"no image")
    os.rename(hostile / "03.png", os.fsencode(hostile) + b"/\xff.png")
    artifact = edited(
        compiled, tmp_path / "artifact", source={"name": "<script>alert(2)</script>&amp;"}
    )
    page = report(artifact, tmp_path / "page.html", "--images", hostile)
    assert "alert(2)" in page.words
    assert {image["alt"] for image in page.all_of("img")} == {*names, "\\udcff.png"}
    assert page.all_of("img")
    assert all("onerror" not in image for image in page.all_of("img"))


def edited(artifact: Path, place: Path, **fields: dict[str, object]) -> Path:
    """A copy of an artifact whose sealed manifest says something else."""
    shutil.copytree(artifact, place)
    manifest = Artifact.open(place).manifest
    for name, values in fields.items():
        part = getattr(manifest, name).model_copy(update=values)
        manifest = manifest.model_copy(update={name: part})
    manifest.write(place)
    return place


def test_registers_are_spliced_into_the_float_encoder(
    compiled: Path, images: Path, tmp_path: Path
) -> None:
    """A register far larger than any token shows in the stream behind its block, and not before."""
    artifact = tmp_path / "artifact"
    shutil.copytree(compiled, artifact)
    manifest = Artifact.open(artifact).manifest
    np.savez(artifact / REGISTERS, tokens=np.full((1, 32), 1000, np.float32))
    setting = Setting(candidates=(0,), start=1, end=3, mode="token")
    curation = manifest.curation.model_copy(update={"setting": setting})
    files = {**manifest.files, REGISTERS: FileRecord.of(artifact / REGISTERS)}
    manifest.model_copy(update={"curation": curation, "files": files}).write(artifact)
    page = report(artifact, tmp_path / "page.html", "--images", images)
    assert "largest token with registers" in page.words
    assert "largest token without registers" in page.words
    (_, *rows) = page.tables["Norms behind every block"]
    plain, largest = ([float(row[at]) for row in rows] for at in (1, 2))
    assert largest[0] == plain[0]
    assert largest[1] >= 900 > plain[1]


def test_a_limit_that_is_missed_is_shown_and_is_exit_code_1(
    compiled: Path, images: Path, tmp_path: Path
) -> None:
    options = ("--images", images, "--min-cosine", "0.9999999")
    page = report(compiled, tmp_path / "page.html", *options, code=1)
    assert "Parity failed" in page.words
    assert "is below 0.9999999" in page.words
    assert 'class="mark fail"' in page.text


def test_times_of_a_benchmark_are_shown(compiled: Path, tmp_path: Path) -> None:
    file = tmp_path / "bench.json"
    file.write_text(bench_result("elsewhere").model_dump_json(), encoding="utf-8")
    page = report(compiled, tmp_path / "page.html", "--bench", file)
    assert "2 threads of A <CPU>" in page.words
    assert "The benchmark is of the artifact elsewhere." in page.words
    assert "0.50 x float's" in page.words
    file.write_text("{}", encoding="utf-8")
    outcome = run_regcache("report", compiled, "-o", tmp_path / "other.html", "--bench", file)
    assert_refused(outcome, str(file), "regcache bench --json")
    assert not (tmp_path / "other.html").exists()


def test_what_was_not_measured_is_a_sentence(images: Path, tmp_path: Path) -> None:
    """No registers, no damage, all in int8, no float.onnx."""
    artifact = tiny_artifact(tmp_path, "--no-float")
    page = report(artifact, tmp_path / "page.html")
    for words in (
        "Neither registers nor linears to keep float were asked for",
        "There is no curve of other shares.",
        "there is no float.onnx to compare it with",
    ):
        assert words in page.words
    outcome = run_regcache("report", artifact, "--images", images, "-o", tmp_path / "none.html")
    assert_refused(outcome, "--no-float")
    assert not (tmp_path / "none.html").exists()


def test_an_image_alone_has_no_neighbours(compiled: Path, images: Path, tmp_path: Path) -> None:
    page = report(compiled, tmp_path / "page.html", "--images", images / "00.png")
    assert len(page.all_of("img")) == 1


def test_a_thumbnail_is_what_the_encoder_sees(compiled: Path, tmp_path: Path) -> None:
    path = tmp_path / "wide.png"
    picture = Image.new("RGB", (90, 30), (200, 0, 0))
    picture.paste((0, 0, 200), (30, 0, 60, 30))
    picture.save(path)
    source = thumbnail(path, Artifact.open(compiled).recipe)
    found = Image.open(io.BytesIO(base64.b64decode(source.partition(",")[2])))
    assert found.size == (16, 16)
    red, _, blue = np.asarray(found.convert("RGB"), np.float64).mean(axis=(0, 1))
    assert red < 50  # the crop's middle alone
    assert blue > 150
    assert thumbnail(tmp_path / "gone.png", Artifact.open(compiled).recipe) == ""


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        (("-o", "{artifact}/page.html"), ("lies in the artifact",)),
        (("-o", "{artifact}"), ("is a folder",)),
        (("-o", "-"), ("name a file",)),
        (("--min-cosine", "0.9"), ("--min-cosine", "--images")),
        (("--per-layer",), ("--per-layer", "--images")),
        (("--images", "{artifact}/none"), ("none",)),
        (("--bench", "{artifact}/none.json"), ("none.json",)),
    ],
)
def test_bad_input_is_one_line(
    compiled: Path, tmp_path: Path, options: tuple[str, ...], parts: tuple[str, ...]
) -> None:
    page = tmp_path / "page.html"
    told = [option.format(artifact=compiled) for option in options]
    outcome = run_regcache("report", compiled, *(() if "-o" in told else ("-o", page)), *told)
    assert_refused(outcome, *parts)
    assert not page.exists()
    assert not (compiled / "page.html").exists()


def test_compile_refuses_a_place_for_the_page_before_it_begins(tmp_path: Path) -> None:
    out = tmp_path / "artifact"
    for page in (out, out / "page.html", tmp_path):
        outcome = run_regcache("compile", "none.onnx", "-o", out, "--report", page)
        assert_refused(outcome, "--report", str(page))
    assert not out.exists()


def test_an_artifact_that_changed_is_refused(compiled: Path, tmp_path: Path) -> None:
    place = tmp_path / "artifact"
    shutil.copytree(compiled, place)
    (place / "model.onnx").write_bytes((place / "model.onnx").read_bytes() + b" ")
    outcome = run_regcache("report", place, "-o", tmp_path / "page.html")
    assert_refused(outcome, "model.onnx", "changed")


def test_layers_of_unknown_names_are_refused(compiled: Path, tmp_path: Path) -> None:
    sites = Artifact.open(compiled).manifest.quantization.sites
    named = [sites[0].model_copy(update={"site": "blocks.999999999.fc1"})]
    place = edited(compiled, tmp_path / "artifact", quantization={"sites": named})
    outcome = run_regcache("report", place, "-o", tmp_path / "page.html")
    assert_refused(outcome, "blocks.999999999.fc1")


@pytest.mark.parametrize("command", ["report", "compile"])
def test_a_missing_jinja2_is_told_before_anything_is_done(
    compiled: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: str
) -> None:
    monkeypatch.setattr(
        write, "find_spec", lambda name: None if name == "jinja2" else find_spec(name)
    )
    options = {
        "report": ("report", compiled, "-o", tmp_path / "page.html"),
        "compile": ("compile", "none.onnx", "-o", tmp_path / "made", "--report", "page.html"),
    }
    outcome = run_regcache(*options[command])
    assert_refused(outcome, 'needs jinja2: pip install "regcache[report]"')
    assert not list(tmp_path.iterdir())
