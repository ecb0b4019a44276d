"""What --dry-run foretells: the steps that will be taken, of what was seen of the encoder."""

import json
from pathlib import Path
from typing import Any

import onnx
import pytest
from support.command_line import assert_refused, run_regcache
from support.tiny_artifact import SPEC
from support.tiny_source import RECIPE, photos
from support.tiny_vit import TinyVit

from regcache.compiler.calibration.stored_rows import stored_bytes
from regcache.compiler.job.options import CompileOptions
from regcache.compiler.job.stages import Stage
from regcache.compiler.plan.forecast import StepForecast, foretell, model_bytes
from regcache.compiler.plan.measure import Look, Sizes
from regcache.compiler.plan.steps import TOKENS, planned_steps
from regcache.export.onnx_file import sidecar
from regcache.runtime.session import LARGE

MB = 1_000_000
SIZES = Sizes(
    weights=80 * MB, linears=18 * MB, tokens=TOKENS, activations=30 * MB, streams=5 * MB, pixels=MB
)
SEEN = Look(
    SIZES, process=200 * MB, exporting=0, export_seconds=7.0, decode_seconds=0.01, image_seconds=0.1
)


def options(**given: Any) -> CompileOptions:
    return CompileOptions(source="x.onnx", images="photos", **given)


def foretold(seen: Look = SEEN, images: int = 50, **given: Any) -> list[StepForecast]:
    return foretell(options(**given), images, seen)


def of(steps: list[StepForecast], stage: Stage) -> StepForecast:
    return next(step for step in steps if step.name == stage)


def test_the_steps_are_those_that_are_planned() -> None:
    planned = planned_steps(options(), 50)
    found = foretold()
    assert [(step.name, step.sure) for step in found] == [(one.name, one.sure) for one in planned]
    assert of(found, Stage.EXPORT).seconds == 7.0
    calibrate = next(step for step in planned if step.name == Stage.CALIBRATE)
    assert of(found, Stage.CALIBRATE).seconds == pytest.approx(0.1 * calibrate.images + 50 * 0.01)


def test_time_grows_with_images_and_with_what_one_takes() -> None:
    few, many = (sum(step.seconds for step in foretold(images=count)) for count in (20, 200))
    assert few < many
    slow = Look(SIZES, 0, 0, 7.0, 0.01, image_seconds=0.2)
    assert sum(step.seconds for step in foretold(slow)) > 1.5 * sum(
        step.seconds for step in foretold()
    )


def test_an_effort_costs_as_much_as_it_tries() -> None:
    fast, balanced, thorough = (
        sum(step.seconds for step in foretold(images=100, effort=effort))
        for effort in ("fast", "balanced", "thorough")
    )
    assert fast < balanced / 2
    assert balanced < thorough


def test_of_more_tokens_fewer_images_are_a_choice_of_ranges() -> None:
    sizes = Sizes(80 * MB, 18 * MB, 4 * TOKENS, 120 * MB, 20 * MB, 4 * MB)
    large = foretold(Look(sizes, 200 * MB, 0, 7.0, 0.0, 0.4))
    plain = foretold(Look(SIZES, 200 * MB, 0, 7.0, 0.0, 0.1))
    assert of(large, Stage.RANGES).seconds == pytest.approx(of(plain, Stage.RANGES).seconds)
    assert of(large, Stage.CALIBRATE).seconds == pytest.approx(
        4 * of(plain, Stage.CALIBRATE).seconds
    )


def test_memory_holds_the_weights_and_what_a_step_looks_at() -> None:
    found = foretold()
    assert min(step.memory for step in found) >= 280 * MB
    larger = of(foretold(batch_size=8), Stage.CALIBRATE).memory
    assert larger - of(found, Stage.CALIBRATE).memory >= 4 * SIZES.activations
    assert of(found, Stage.SEARCH).memory > of(foretold(images=20), Stage.SEARCH).memory
    exporting = Look(SIZES, 200 * MB, 900 * MB, 7.0, 0.01, 0.1)
    assert of(foretold(exporting), Stage.EXPORT).memory == 900 * MB


def test_disk_holds_the_float_file_and_what_passes() -> None:
    found = foretold()
    assert of(found, Stage.EXPORT).disk == 80 * MB
    rows = of(found, Stage.CALIBRATE).disk - 80 * MB
    assert rows == stored_bytes(SIZES.activations // TOKENS, 50, TOKENS)
    assert rows > 80 * SIZES.activations // TOKENS * 49
    assert of(foretold(rounding="nearest"), Stage.CALIBRATE).disk == 80 * MB
    assert found[-1].disk == 80 * MB + model_bytes(SIZES, options())
    large = Sizes(LARGE, LARGE // 8, TOKENS, 30 * MB, 5 * MB, MB)
    kept = foretold(Look(large, 200 * MB, 0, 7.0, 0.01, 0.1), effort="fast")
    rows = stored_bytes(30 * MB // TOKENS, 50, TOKENS)
    assert of(kept, Stage.RANGES).disk == 3 * LARGE + rows


@pytest.mark.parametrize(
    ("given", "size"),
    [
        ({}, 18 + 8),
        ({"target": "tensorrt-rtx"}, 18 + 4),
        ({"target": "tensorrt-rtx", "half": False}, 18 + 8),
        ({"precision": "w4a16"}, 18 * 0.625 + 8),
    ],
)
def test_a_model_is_as_large_as_its_formats(given: dict[str, Any], size: float) -> None:
    assert model_bytes(SIZES, options(**given)) == pytest.approx(size * MB)


@pytest.fixture
def command(tmp_path: Path) -> tuple[object, ...]:
    encoder = tmp_path / "tiny.onnx"
    onnx.save(TinyVit(SPEC).model(), encoder)
    sidecar(encoder).write_text(RECIPE.to_json())
    images = photos(tmp_path / "calibration", 20, seed=1)
    return "compile", encoder, "--images", images, "-o", tmp_path / "out" / "artifact", "--dry-run"


@pytest.mark.parametrize("more", [[], ["--effort", "fast"], ["--target", "tensorrt-rtx"]])
def test_a_dry_run_prints_the_plan_and_writes_nothing(
    command: tuple[object, ...], more: list[str], tmp_path: Path
) -> None:
    before = sorted(tmp_path.rglob("*"))
    outcome = run_regcache(*command, "--json", "-", "--threads", "1", *more)
    assert outcome.code == 0, outcome
    assert sorted(tmp_path.rglob("*")) == before
    found = json.loads(outcome.out)
    fields = dict(zip((name.removeprefix("--") for name in more[::2]), more[1::2], strict=True))
    planned = planned_steps(options(**fields), 20)
    assert [step["name"] for step in found["steps"]] == [step.name for step in planned]
    assert found["images"] == 20
    assert found["memory"] == max(step["memory"] for step in found["steps"])
    assert found["seconds"] == pytest.approx(
        sum(step["seconds"] for step in found["steps"] if step["sure"])
    )
    assert min(found[name] for name in ("weights", "image_seconds", "artifact", "free")) > 0


def test_a_dry_run_is_a_table_for_people(command: tuple[object, ...], tmp_path: Path) -> None:
    file = tmp_path / "plan.json"
    outcome = run_regcache(*command, "--threads", "1", "--json", file)
    assert outcome.code == 0, outcome
    assert f"5. {Stage.SEARCH.value}" in outcome.out
    assert "nothing was written" in outcome.out
    assert json.loads(file.read_text())["source"] in outcome.out
    told = run_regcache(*command, "--threads", "1", "--no-rotate").out
    assert f"{Stage.CALIBRATE.value}, if registers ship" in told
    assert "more where registers ship" in told


def test_a_dry_run_refuses_what_compiling_refuses(
    command: tuple[object, ...], tmp_path: Path
) -> None:
    encoder, broken = Path(str(command[1])), tmp_path / "broken.onnx"
    broken.write_bytes(encoder.read_bytes()[:100])
    assert_refused(run_regcache(command[0], broken, *command[2:]), "broken.onnx")
    missing = (*command[:3], tmp_path / "nowhere", *command[4:])
    assert_refused(run_regcache(*missing), "nowhere")
