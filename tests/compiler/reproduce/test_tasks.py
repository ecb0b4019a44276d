"""The tasks of `regcache reproduce`: limits, even choices, and bad input refused at once."""

import io
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console
from support.reproducing import CLASSES, Files, run_cli, write_encoder, write_files

from regcache.compiler.reporter import Reporter
from regcache.compiler.reproduce import tasks as reproduce_tasks
from regcache.compiler.reproduce.table import Reproduction
from regcache.compiler.reproduce.tasks import Tasks, balanced, tasks_for
from regcache.export.imagenet_texts import imagenet_texts
from regcache.passes.errors import InputError
from regcache.runtime.images import evenly

pytestmark = pytest.mark.xdist_group("reproduce")  # one worker runs the command for all


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Files:
    return write_files(tmp_path_factory.mktemp("files"))


@pytest.fixture
def encoder(tmp_path: Path) -> Path:
    return write_encoder(tmp_path)


def test_a_limit_is_spread_over_classes_and_said(encoder: Path, files: Files) -> None:
    run = run_cli(
        *("--model", encoder, "--imagenet", files.val, "--limit", 7, "--json", "-"),
        *("--bits", "w4a16", "--train", files.train, "--train-limit", 6),
        *("--calibration-images", 16),
    )
    assert run.code == 0, run
    (table,) = Reproduction.model_validate_json(run.out).tables
    assert (table.n_images, table.n_available, table.limit) == (7, 16, 7)
    assert (table.n_calibration, table.train_limit) == (12, 6)
    chosen = Counter(path.parent.name for path in run.reads if path.is_relative_to(files.val))
    assert sorted(chosen.values()) == [2, 2, 3]
    assert "at most 7 of each: spread evenly, classes balanced" in table.markdown()


def test_calibrating_on_evaluated_images_is_said(encoder: Path, files: Files) -> None:
    run = run_cli("--model", encoder, "--imagenet", files.val, "--bits", "w4a16", "--limit", 4)
    assert run.code == 0, run
    assert "warning: calibrating on images that are evaluated too" in run.err
    assert "warning: 2 of 3 classes have one image only" in run.err


def test_even_choices() -> None:
    assert evenly(range(10), 4) == [0, 2, 5, 7]
    assert evenly("abc", 9) == ["a", "b", "c"]
    sizes = {"a": 1, "b": 4, "c": 9, "d": 9}
    labels = {Path(name, str(n)): name for name, size in sizes.items() for n in range(size)}
    for limit, expected in {
        1: [1],
        4: [1, 1, 1, 1],
        9: [1, 3, 3, 2],
        13: [1, 4, 4, 4],
        16: [1, 4, 6, 5],
        23: [1, 4, 9, 9],
        99: [1, 4, 9, 9],
    }.items():
        chosen = Counter(balanced(labels, limit).values())
        assert sum(chosen.values()) == min(limit, 23)
        assert sorted(chosen.values()) == sorted(expected)


def test_of_several_models_one_without_texts_is_measured_by_the_training_images(
    encoder: Path,
) -> None:
    reported = io.StringIO()
    reporter, source = Reporter(Console(file=reported, soft_wrap=True)), str(encoder)
    tasks = Tasks(Path("val"), Path("names"), Path("prompts"), train=Path("train"))
    told = tasks_for(source, tasks, reporter)
    assert told == Tasks(Path("val"), train=Path("train"))
    assert reported.getvalue() == f"{source} has no text encoder and is measured by --train\n"
    assert tasks_for("openclip:ViT-B-32/openai", tasks, reporter) is tasks
    assert tasks_for(source, told, reporter) is told
    for other in (replace(tasks, train=None), replace(tasks, captions=Path("captions"))):
        with pytest.raises(InputError, match="it has no text encoder"):
            tasks_for(source, other, reporter)
    with pytest.raises(InputError, match="no such file"):
        tasks_for("missing.onnx", tasks, reporter)


def test_the_names_and_prompts_of_imagenet() -> None:
    names, prompts = imagenet_texts()
    assert (len(names), len(prompts)) == (1000, 80)
    assert (names[0], names[-1]) == ("tench", "toilet paper")
    assert prompts[0] == "a bad photo of a {}."
    assert all(prompt.count("{}") == 1 for prompt in prompts)


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ([], "no images to calibrate on: give --images, --train or --imagenet"),
        (["--images", "{train}"], "nothing to measure: give --imagenet or --captions"),
        (["--train", "{train}"], "nothing to measure: give --imagenet or --captions"),
        (["--captions", "{captions}", "--train", "{train}"], "--train {train}: needs --imagenet"),
        (["--imagenet", "{val}", "--templates", "{names}"], "needs --classnames too"),
        (["--imagenet", "{val}", "--train", "{val}"], "is the folder that is evaluated"),
        (["--imagenet", "{names}"], "names.txt: Not a directory"),
        (
            ["--imagenet", "{val}", "--bits", "8,5"],
            "--bits '5': must be 8, 6, 4, w4a16, nvfp4 or mxfp8",
        ),
        (
            ["--imagenet", "{val}", "--bits", "8,nvfp4", "--target", "ort-cpu"],
            "nvfp4 runs on tensorrt and tensorrt-rtx, not on ort-cpu",
        ),
        (["--imagenet", "{val}", "--bits", ""], "--bits '': must be"),
        (["--imagenet", "{val}", "--calibrators", "minmax"], "'minmax': must be output-error or"),
        (["--imagenet", "{val}", "--search-budget", "soon"], "'soon' is no duration"),
        (["--imagenet", "{val}", "--classnames", "{names}"], "it has no text encoder"),
        (["--captions", "{captions}", "--images", "{train}"], "it has no text encoder"),
        (["--imagenet", "{val}", "--classnames", "{missing}"], "no-such-file"),
        (["--imagenet", "{val}", "--classnames", "{short}"], "no name for 2 class folders, first"),
        (["--captions", "{lost}", "--images", "{train}"], "none of its images is there, first"),
        (["--imagenet", "{val}", "--train", "{part}"], "class 'n03000001' is not in the train"),
        (
            ["--imagenet", "{val}", "--train", "{train}", "--train-limit", "2"],
            "--train-limit 2: leaves classes of",
        ),
    ],
)
def test_bad_input_is_one_line_before_anything_is_made(
    arguments: list[str], reason: str, encoder: Path, files: Files, tmp_path: Path
) -> None:
    (tmp_path / "short.txt").write_text("n01440764 tench\n")
    (tmp_path / "lost.tsv").write_text("gone.png\ta caption\n")
    for name in list(CLASSES)[:2]:
        (tmp_path / "part").mkdir(exist_ok=True)
        (tmp_path / "part" / name).symlink_to(files.train / name)
    places: dict[str, Path] = {
        **vars(files),
        "missing": tmp_path / "no-such-file",
        "short": tmp_path / "short.txt",
        "lost": tmp_path / "lost.tsv",
        "part": tmp_path / "part",
    }
    run = run_cli("--model", encoder, *(argument.format(**places) for argument in arguments))
    assert run.code == 2, run
    lines = run.err.strip().splitlines()
    assert lines[-1].startswith("regcache: error: ")
    assert reason.format(**places) in lines[-1]
    assert "Traceback" not in run.err
    assert not any("exporting" in line for line in lines)
    assert run.out == ""


def test_a_missing_scikit_learn_is_named_at_once(
    encoder: Path, files: Files, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reproduce_tasks, "find_spec", lambda _: None)
    run = run_cli("--model", encoder, "--imagenet", files.val, "--train", files.train)
    assert run.code == 2
    assert 'the linear probe needs scikit-learn: pip install "regcache[eval]"' in run.err
    assert "exporting" not in run.err
