"""A run of `regcache reproduce` that was stopped goes on, and memory does not grow with images."""

import json
import os
import signal
import subprocess
import sys
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from support.reproducing import RECIPE, Files, Run, run_cli, write_encoder, write_files

from regcache.compiler.encoder import prepare
from regcache.compiler.reporter import Reporter
from regcache.compiler.reproduce import workshop
from regcache.compiler.reproduce.embed import EmbedOnce, Encoders
from regcache.compiler.reproduce.kept import Kept, work_folder
from regcache.passes.errors import InputError
from regcache.passes.preprocess import Preprocess
from regcache.runtime import images as image_files
from regcache.runtime.device import CPU

pytestmark = pytest.mark.xdist_group("reproduce")  # one worker runs the command for all

# Images read before the first is evaluated: 12 to calibrate, and as many for each search.
CALIBRATED = 3 * 12

_KILLED = """
import os, sys
from regcache.runtime import images
from regcache.compiler.cli.main import main
read, left = images.read_image, [36 + 13]
def reading(path, recipe):
    left[0] -= 1
    if left[0] < 0:
        os.kill(os.getpid(), 9)
    return read(path, recipe)
images.read_image = reading
sys.exit(main())
"""


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Files:
    return write_files(tmp_path_factory.mktemp("files"))


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_encoder(tmp_path_factory.mktemp("encoder"))


def arguments(encoder: Path, files: Files, output: Path) -> list[object]:
    chosen = ["--bits", "8,4", "--calibrators", "min-max", "--batch-size", "3"]
    tasks = ["--imagenet", files.val, "--images", files.train]
    return ["--model", encoder, *tasks, *chosen, "--json", output]


@pytest.fixture(scope="module")
def whole(encoder: Path, files: Files, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The record of a run that nothing stopped."""
    output = tmp_path_factory.mktemp("whole") / "table.json"
    run = run_cli(*arguments(encoder, files, output))
    assert run.code == 0, run
    return output


def kept_files(output: Path) -> list[str]:
    return [path.name for path in output.parent.iterdir()]


class _Stop(BaseException):
    """As an interrupt."""


def stopped_at(monkeypatch: pytest.MonkeyPatch, number: int) -> Callable[[], None]:
    """Stop before the image of that number is read; returns what lets runs go on."""
    read, left = image_files.read_image, [number]

    def reading(path: Path, recipe: Preprocess) -> np.ndarray:
        left[0] -= 1
        if left[0] < 0:
            raise _Stop
        return read(path, recipe)

    monkeypatch.setattr(image_files, "read_image", reading)
    return lambda: monkeypatch.setattr(image_files, "read_image", read)


def test_what_was_embedded_is_not_embedded_again(
    encoder: Path, files: Files, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "table.json"
    go_on = stopped_at(monkeypatch, CALIBRATED + 10)
    with pytest.raises(_Stop):
        run_cli(*arguments(encoder, files, output))
    assert kept_files(output) == [".table.json.reproduce"]
    go_on()
    unused = lambda *_, **__: pytest.fail("is done")  # noqa: E731
    monkeypatch.setattr(prepare, "export_source", unused)
    monkeypatch.setattr(workshop, "find_registers", unused)
    monkeypatch.setattr(workshop, "calibrate", unused)
    run = run_cli(*arguments(encoder, files, output))
    assert run.code == 0, run
    assert set(run.reads) == set(sorted(files.val.rglob("*.png"))[9:])
    assert set(run.reads.values()) == {1}
    assert "evaluating: 9 of 16 images are done" in run.err
    assert output.read_bytes() == whole.read_bytes()
    assert kept_files(output) == ["table.json"]


def test_what_was_quantized_is_not_quantized_again(
    encoder: Path, files: Files, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output, made = tmp_path / "table.json", list[str]()
    make = workshop.Workshop.make

    def making(self: workshop.Workshop, variant: workshop.Variant) -> object:
        if len(made) == 1 and not output.with_name("again").exists():
            raise _Stop
        made.append(str(variant))
        return make(self, variant)

    monkeypatch.setattr(workshop.Workshop, "make", making)
    with pytest.raises(_Stop):
        run_cli(*arguments(encoder, files, output))
    output.with_name("again").touch()
    assert run_cli(*arguments(encoder, files, output)).code == 0
    assert made == ["w8a8, min-max", "w4a4, min-max"]
    assert output.read_bytes() == whole.read_bytes()


def test_other_images_are_evaluated_anew(
    encoder: Path, files: Files, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "table.json"
    go_on = stopped_at(monkeypatch, CALIBRATED + 10)
    with pytest.raises(_Stop):
        run_cli(*arguments(encoder, files, output))
    go_on()
    run = run_cli(*arguments(encoder, files, output), "--limit", 8)
    assert run.code == 0, run
    assert sum(run.reads.values()) == 8  # and none to calibrate or to search
    assert "are done" not in run.err


@pytest.mark.slow
def test_a_killed_run_goes_on(encoder: Path, files: Files, whole: Path, tmp_path: Path) -> None:
    output = tmp_path / "table.json"
    texts = ["reproduce", *map(str, arguments(encoder, files, output))]
    killed = subprocess.run([sys.executable, "-c", _KILLED, *texts], check=False)
    assert killed.returncode == -signal.SIGKILL
    run = run_cli(*arguments(encoder, files, output))
    assert run.code == 0, run
    assert 0 < len(run.reads) < 16
    assert output.read_bytes() == whole.read_bytes()


def test_two_runs_do_not_share_a_folder(tmp_path: Path) -> None:
    output = tmp_path / "table.json"
    with work_folder(output) as work:
        assert work.is_dir()
        with (
            pytest.raises(InputError, match="another regcache is writing it just now"),
            work_folder(output),
        ):
            pass
    (tmp_path / ".table.json.reproduce").write_text("a file")
    with pytest.raises(InputError, match="is no folder"), work_folder(output):
        pass


def test_bad_input_leaves_nothing(encoder: Path, files: Files, tmp_path: Path) -> None:
    given = arguments(encoder, files, tmp_path / "table.json")
    run = run_cli(*given, "--classnames", files.names)
    assert run.code == 2
    assert "it has no text encoder" in run.err
    assert kept_files(tmp_path / "table.json") == []


def test_a_damaged_file_is_written_anew(encoder: Path, tmp_path: Path) -> None:
    paths = pictures(tmp_path, 7)
    encoders = Encoders([encoder], RECIPE, [], 2, 1, CPU)
    with Kept.of(tmp_path, "key") as kept, EmbedOnce(encoders, kept, Reporter()) as embed:
        first = [np.array(rows) for rows in embed(paths, "evaluating").embeddings]
    (file,) = kept.folder.glob("*.f32")
    os.truncate(file, 8)
    with Kept.of(tmp_path, "key") as kept, EmbedOnce(encoders, kept, Reporter()) as embed:
        again = embed(paths, "evaluating").embeddings
    np.testing.assert_array_equal(again, first)


def pictures(folder: Path, count: int) -> list[Path]:
    """So many pictures in one colour each."""
    paths = [folder / f"{number}.png" for number in range(count)]
    for number, path in enumerate(paths):
        Image.new("RGB", (18, 18), (number % 251, number % 241, 7)).save(path)
    return paths


def test_memory_does_not_grow_with_images(encoder: Path, tmp_path: Path) -> None:
    """Neither 3 kB of pixels of each nor 2 kB of embeddings, here all tokens, are held."""
    paths = pictures(tmp_path, 2000)
    encoders = Encoders([encoder], RECIPE, ["last_hidden_state"], 4, 1, CPU)
    peaks = []
    for count in (600, 2000):
        with Kept.of(tmp_path, str(count)) as kept, EmbedOnce(encoders, kept, Reporter()) as embed:
            chosen = paths[:count]
            embed(chosen[:8], "loading", evaluated=False)
            tracemalloc.start()
            found = embed(chosen, "evaluating")
            assert embed.cosines == [1.0]
            peaks.append(tracemalloc.get_traced_memory()[1])
            tracemalloc.stop()
        assert len(found.paths) == count
    # what grows is an image's name, and its part of the journal
    assert (peaks[1] - peaks[0]) / 1400 < 700, peaks


def test_the_estimate_comes_first(encoder: Path, files: Files, tmp_path: Path) -> None:
    run = run_cli(*arguments(encoder, files, tmp_path / "table.json"))
    assert_in_order(run, " takes about ", "calibrating", "measuring all encoders")
    (line,) = [line for line in run.err.splitlines() if "takes about" in line]
    assert line.endswith("seconds: 16 images, 3 to 5 encoders, 2 searches")
    assert line.startswith(str(encoder))


def assert_in_order(run: Run, *texts: str) -> None:
    places = [run.err.index(text) for text in texts]
    assert places == sorted(places), run.err


def test_every_model_has_a_table(encoder: Path, files: Files, tmp_path: Path) -> None:
    other = write_encoder(tmp_path)
    output, text = tmp_path / "table.json", tmp_path / "table.md"
    run = run_cli(
        *("--models", f"{encoder},{other}", "--imagenet", files.val, "--images", files.train),
        *("--bits", "w4a16", "--json", output, "--markdown", text),
    )
    assert run.code == 0, run
    first, second = json.loads(output.read_text())["tables"]
    assert (first["source"], second["source"]) == (str(encoder), str(other))
    assert first["rows"] == second["rows"]
    titles = [line for line in text.read_text().splitlines() if "simulated for" in line]
    assert [title.split(",")[0] for title in titles] == [str(encoder), str(other)]
    assert run.err.count(" takes about ") == 2
    assert "all models take about " in run.err


def test_options_of_one_model_are_refused_for_two(encoder: Path, files: Files) -> None:
    run = run_cli("--models", f"{encoder},other", "--imagenet", files.val, "--output", "pooled")
    assert run.code == 2
    assert "--output is of one model: --models names 2" in run.err


def test_a_model_without_texts_is_refused_before_others_are_read(
    encoder: Path, files: Files
) -> None:
    models = ("--models", f"openclip:ViT-B-32/{encoder},{encoder}")
    run = run_cli(*models, "--imagenet", files.val, "--classnames", files.names)
    assert run.code == 2
    assert run.texts == []


def test_the_names_of_imagenet_need_its_classes(encoder: Path, files: Files) -> None:
    run = run_cli("--model", encoder, "--imagenet", files.val, "--classnames", "imagenet")
    assert run.code == 2
    assert "there are 3 class folders, not ImageNet's 1,000" in run.err
