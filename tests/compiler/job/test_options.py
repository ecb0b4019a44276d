"""What options come to together: by effort, and which of them contradict one another."""

from pathlib import Path
from typing import Any

import pytest
from support.command_line import assert_refused, run_regcache

from regcache.compiler.job.effort import Effort, Preset, RegisterChoice
from regcache.compiler.job.options import CompileOptions
from regcache.passes.errors import InputError


def options(**given: Any) -> CompileOptions:
    """Options of a source that is never read."""
    return CompileOptions(source="x.onnx", images="photos", **given)


@pytest.mark.parametrize(
    ("effort", "registers", "rotate", "share"),
    [
        (Effort.FAST, RegisterChoice.OFF, False, 1.0),
        (Effort.BALANCED, RegisterChoice.AUTO, True, 0.967),
        (Effort.THOROUGH, RegisterChoice.AUTO, True, 0.967),
    ],
)
def test_an_effort_decides_what_is_not_given(
    effort: Effort, registers: RegisterChoice, rotate: bool, share: float
) -> None:
    found = options(effort=effort)
    assert (found.registers, found.rotate, found.share) == (registers, rotate, share)
    assert options(effort=effort.value, registers=None, rotate=None) == found


def test_balanced_is_the_default_and_changes_nothing() -> None:
    assert options() == options(effort="balanced")
    assert options().registers is RegisterChoice.AUTO
    assert options().rotate


def test_what_is_given_goes_before_the_effort() -> None:
    found = options(effort="fast", registers="auto", rotate=True, int8_share=0.9)
    assert found.registers is RegisterChoice.AUTO
    assert found.rotate
    assert found.share == 0.9
    plain = options(effort="thorough", registers="off", rotate=False)
    assert plain.registers is RegisterChoice.OFF
    assert not plain.rotate


def test_a_simulation_rotates_where_told_and_then_whatever_it_costs() -> None:
    assert not options(simulate="w4a4").rotates
    told = options(simulate="w4a4", rotate=True)
    assert told.rotates
    assert (told.share, told.rotations_leave) == (1, 0)
    bounded = options(simulate="w4a4", rotate=True, int8_share=0.9)
    assert (bounded.share, bounded.rotations_leave) == (0.9, 0.9)
    assert not options(simulate="w4a16", rotate=True).rotates
    assert options().rotations_leave == options().share


@pytest.mark.parametrize("effort", list(Effort))
@pytest.mark.parametrize("rotate", [True, False])
def test_what_was_done_is_written_and_read_again(effort: Effort, rotate: bool) -> None:
    found = options(effort=effort, registers="auto", rotate=rotate)
    written = found.model_dump(mode="json")
    assert (written["effort"], written["registers"], written["rotate"]) == (effort, "auto", rotate)
    assert CompileOptions.model_validate_json(found.model_dump_json()) == found


def test_options_from_before_there_were_efforts_are_read() -> None:
    written = options(registers="off", rotate=False).model_dump(mode="json")
    del written["effort"]
    found = CompileOptions.model_validate(written)
    assert found.effort is Effort.BALANCED
    assert found.registers is RegisterChoice.OFF
    assert not found.rotate


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        ({"effort": "fast", "search_budget": 60.0}, "--search-budget says nothing with --effort"),
        ({"registers": "off", "search_budget": 60.0}, "nothing with --registers off"),
        ({"effort": "thorough", "precision": "w4a16"}, "there is neither"),
        ({"effort": "thorough", "simulate": "w4a16"}, "there is neither"),
        ({"effort": "thorough", "registers": "off", "int8_share": 1.0}, "there is neither"),
        ({"effort": "thorough", "registers": "off", "target": "tensorrt"}, "there is neither"),
    ],
)
def test_contradictions_are_refused(given: dict[str, Any], reason: str) -> None:
    with pytest.raises(InputError, match=reason):
        options(**given)


@pytest.mark.parametrize("precision", ["nvfp4", "mxfp8"])
def test_a_share_of_floats_in_blocks_goes_by_their_name(precision: str) -> None:
    found = options(precision=precision, target="tensorrt", fp4_share=0.7)
    assert found == options(precision=precision, target="tensorrt", int8_share=0.7)
    assert found.share == 0.7
    preset = options(precision=precision, target="tensorrt", fp4_share=0.7, preset="accurate")
    assert preset.int8_share == 0.7  # what is given goes before what the preset stands for
    unsaid = options(precision=precision, target="tensorrt", fp4_share=None)
    assert unsaid.int8_share is None


@pytest.mark.parametrize(
    ("given", "share"),
    [
        ({"precision": "mxfp8"}, 0.9),
        ({"precision": "mxfp8", "fp4_share": 1.0}, 1.0),
        ({"precision": "mxfp8", "effort": "fast"}, 1.0),
        ({"precision": "nvfp4"}, 1.0),
        ({"precision": "fp8"}, 1.0),
        ({}, 1.0),
    ],
)
def test_mxfp8_leaves_some_linears_in_half(given: dict[str, Any], share: float) -> None:
    found = options(target="tensorrt", **given)
    assert found.share == share
    assert found.measures_damage == (share < 1)


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        ({}, "nvfp4 and mxfp8: int8 takes --int8-share"),
        ({"precision": "fp8", "target": "tensorrt"}, "fp8 takes --int8-share"),
        ({"precision": "w4a16"}, "nvfp4 and mxfp8, not for w4a16"),
        ({"precision": "fp16", "target": "tensorrt"}, "nvfp4 and mxfp8, not for fp16"),
        (
            {"precision": "nvfp4", "target": "tensorrt", "int8_share": 0.7},
            "--fp4-share and --int8-share say the same",
        ),
    ],
)
def test_a_share_by_another_name_is_refused_elsewhere(given: dict[str, Any], reason: str) -> None:
    with pytest.raises(InputError, match=reason):
        options(fp4_share=0.7, **given)


@pytest.mark.parametrize(
    "given",
    [
        {"effort": "fast", "registers": "auto", "search_budget": 60.0},
        {"effort": "thorough", "registers": "off"},
        {"effort": "thorough", "target": "tensorrt"},
        {"effort": "thorough", "precision": "fp8", "target": "tensorrt"},
        {"effort": "fast", "precision": "w4a16"},
        {"effort": "fast", "simulate": "w6a6"},
    ],
)
def test_what_goes_together_is_not(given: dict[str, Any]) -> None:
    assert options(**given).effort == given["effort"]


def test_an_effort_that_there_is_not_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="effort"):
        options(effort="heroic")
    command = ("compile", "x.onnx", "--images", tmp_path, "-o", tmp_path / "out")
    assert_refused(
        run_regcache(*command, "--effort", "fast", "--search-budget", "5m"), "there is no search"
    )
    assert run_regcache(*command, "--effort", "heroic").code == 2


@pytest.mark.parametrize(
    "given",
    [
        {"precision": "fp16", "target": "tensorrt", "images": ""},
        {"precision": "w4a16"},
        {"simulate": "w4a16"},
        {"simulate": "w6a6"},
        {"prefer": "fastest", "target": "tensorrt"},
        {"precision": "fp8", "target": "tensorrt"},
    ],
)
@pytest.mark.parametrize("preset", list(Preset))
def test_a_preset_leaves_out_what_says_nothing(preset: Preset, given: dict[str, Any]) -> None:
    """Options that would be refused, or a share where all is meant, are no part of it."""
    options = CompileOptions(**{"source": "x", "images": "y", "preset": preset, **given})
    shares = preset is Preset.ACCURATE and given.get("precision") == "fp8"
    assert options.int8_share == (0.9 if shares else None)
    assert CompileOptions.model_validate_json(options.model_dump_json()) == options


def test_what_is_given_goes_before_a_preset() -> None:
    options = CompileOptions(
        source="x", images="y", preset=Preset.FAST, effort=Effort.THOROUGH, max_images=7
    )
    assert (options.effort, options.max_images) == (Effort.THOROUGH, 7)
    assert options.registers is RegisterChoice.AUTO
