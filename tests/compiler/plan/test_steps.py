"""The steps that options come to are those that a compilation takes, in that order."""

import json
import re
from pathlib import Path
from typing import Any

import onnx
import pytest
from support.command_line import run_regcache
from support.tiny_artifact import SPEC
from support.tiny_source import RECIPE, photos
from support.tiny_vit import TinyVit

from regcache.compiler.job.options import CompileOptions
from regcache.compiler.job.stages import Stage
from regcache.compiler.plan.steps import planned_steps
from regcache.export.onnx_file import sidecar

IMAGES = 20


def names(images: int = IMAGES, **options: Any) -> list[str]:
    """The steps, those that may not come in brackets."""
    steps = planned_steps(CompileOptions(source="x.onnx", images="y", **options), images)
    return [step.name if step.sure else f"[{step.name}]" for step in steps]


def test_the_default_command_takes_every_step() -> None:
    """What was measured before the search is measured again where registers ship."""
    even = [Stage.CALIBRATE, Stage.EQUALIZE]
    again = [f"[{name}]" for name in (*even, Stage.PLACE)]
    compared = f"[{Stage.BOTH_WAYS}]"
    assert names() == [
        Stage.EXPORT, Stage.ROTATE, *even, Stage.SEARCH, *again, Stage.RANGES,
        Stage.ROUND, Stage.WRITE, compared, Stage.PARITY, Stage.SPEED, Stage.SEAL,
    ]  # fmt: skip


def test_where_nothing_stays_float_the_search_decides_on_the_rest() -> None:
    found = names(target="tensorrt-rtx")
    assert found[4:7] == [Stage.SEARCH, f"[{Stage.CALIBRATE}]", f"[{Stage.EQUALIZE}]"]
    end = [f"[{Stage.BOTH_WAYS}]", Stage.PARITY, Stage.SEAL]
    assert found[7:] == [Stage.RANGES, Stage.ROUND, Stage.WRITE, *end]


@pytest.mark.parametrize(
    "options",
    [{"registers": "off"}, {"images": 15}, {"precision": "w4a16"}],
    ids=["off", "few images", "weights only"],
)
def test_without_a_search_all_is_calibrated_once(options: dict[str, Any]) -> None:
    found = names(**options)
    assert Stage.SEARCH not in found
    assert found.count(Stage.CALIBRATE) == found.count(Stage.EQUALIZE) == 1
    assert not [name for name in found if name.startswith("[")]


@pytest.mark.parametrize(
    ("options", "left_out"),
    [
        ({"rotate": False}, Stage.ROTATE),
        ({"int8_share": 1.0}, Stage.PLACE),
        ({"precision": "w4a16"}, Stage.ROTATE),
        ({"simulate": "w8a8"}, Stage.ROTATE),
        ({"equalize": False}, Stage.EQUALIZE),
        ({"rounding": "nearest"}, Stage.ROUND),
        ({"target": "tensorrt", "precision": "fp8"}, Stage.PLACE),
        ({"simulate": "w4a16"}, Stage.ROUND),
        ({"simulate": "w6a6"}, Stage.SPEED),
        ({"target": "tensorrt"}, Stage.SPEED),
        ({"target": "openvino"}, Stage.SPEED),
        ({"target": "openvino", "precision": "bf16"}, Stage.CALIBRATE),
    ],
)
def test_options_leave_steps_out(options: dict[str, Any], left_out: Stage) -> None:
    assert left_out not in names(**options)


@pytest.mark.parametrize(
    "options",
    [
        ["--registers", "off"],
        ["--no-rotate"],
        ["--int8-share", "1", "--rounding", "nearest", "--no-equalize"],
        ["--target", "tensorrt-rtx", "--registers", "off"],
        ["--precision", "w4a16"],
        ["--simulate", "w6a6", "--registers", "off"],
        ["--simulate", "w4a4", "--rotate"],
        ["--target", "openvino", "--registers", "off", "--int8-share", "1"],
        ["--target", "tensorrt", "--precision", "fp16"],
    ],
    ids=" ".join,
)
@pytest.mark.slow
def test_a_compilation_takes_the_steps_that_were_planned(
    options: list[str], tmp_path: Path
) -> None:
    """In that order, each with its number, and none but those that may not come is left out."""
    encoder = tmp_path / "tiny.onnx"
    onnx.save(TinyVit(SPEC).model(), encoder)
    sidecar(encoder).write_text(RECIPE.to_json())
    images = photos(tmp_path / "calibration", IMAGES, seed=1)
    outcome = run_regcache(
        "compile", encoder, "--images", images, "-o", tmp_path / "artifact", "--accept-slower",
        "--threads", "1", "--json", "-", *options,
    )  # fmt: skip
    assert outcome.code == 0, outcome
    chosen = CompileOptions.model_validate(json.loads(outcome.out)["options"])
    planned = planned_steps(chosen, IMAGES)
    heartbeat = re.compile(r"\d:\d\d (so far|of about .*)$")
    lines = [line for line in outcome.err.splitlines() if not heartbeat.search(line)]
    said = [line for line in lines if line.startswith("step ")]
    begun = []
    for line in said:
        place, _, rest = line.partition(": ")
        _, number, _, total = place.split()
        assert int(total) == len(planned)
        step = planned[int(number) - 1]
        assert rest.startswith(step.name)
        begun.append(int(number))
    assert begun == sorted(set(begun))
    left_out = [step for number, step in enumerate(planned, 1) if number not in begun]
    assert all(not step.sure or step.name == Stage.ROTATE for step in left_out), left_out
