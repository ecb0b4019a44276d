"""A command line that cannot be read: one line, with what may have been meant."""

from inspect import signature
from pathlib import Path

import pytest
import typer
from support.command_line import assert_refused, run_regcache

from regcache.compiler.cli.configuration import _keys
from regcache.compiler.cli.main import app
from regcache.compiler.cli.usage import choices_of

GROUP = typer.main.get_command(app)
COMMANDS = sorted(GROUP.commands)  # type: ignore[attr-defined]


def _choice_options() -> list[tuple[str, str, str]]:
    """Every option that takes one of several values: command, option, and a value misspelled."""
    found = []
    for name in COMMANDS:
        command = GROUP.commands[name]  # type: ignore[attr-defined]
        kinds = signature(command.callback, eval_str=True).parameters
        for option in command.params:
            if option.name in kinds and (values := choices_of(kinds[option.name].annotation)):
                found.append((name, option.opts[0], max(values, key=len)))
    return found


@pytest.mark.parametrize(("command", "option", "value"), _choice_options())
def test_every_choice_is_suggested(command: str, option: str, value: str) -> None:
    refused = run_regcache(command, option, f"{value}x")
    assert_refused(refused, option, f"'{value}x'", f"did you mean {value}?")
    assert len(refused.err.splitlines()) == 1
    assert len(refused.err) <= 101


def test_every_command_with_choices_is_tried() -> None:
    assert {name for name, _, _ in _choice_options()} >= {"bench", "bundle", "compile", "parity"}
    assert ("compile", "--target", "tensorrt-rtx") in _choice_options()


@pytest.mark.parametrize("command", COMMANDS)
def test_an_option_that_is_misspelled_is_suggested(command: str) -> None:
    assert_refused(run_regcache(command, "--quit"), "--quit", "did you mean --quiet?")


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (("compil",), ("did you mean regcache compile?",)),
        (("zzz",), ("there is no such command", "regcache -h")),
        (("--versio",), ("did you mean --version?",)),
        (("compile", "x.onnx"), ("--out is missing", "regcache compile -h")),
        (("parity",), ("ARTIFACT is missing", "regcache parity -h")),
        (("compile", "x.onnx", "-o"), ("'-o' requires an argument",)),
        (("compile", "x.onnx", "y", "-o", "o"), ("unexpected extra argument",)),
        (("compile", "x.onnx", "-o", "o", "--batch-size", "0"), ("--batch-size", "than or equal")),
        (("compile", "x.onnx", "-o", "o", "--batch-size", "a"), ("--batch-size", "valid integer")),
        (("compile", "x.onnx", "-o", "o", "--target", "zzz"), ("must be of ort-cpu, tensorrt,",)),
        (("compile", "x.onnx", "-o", "o", "--target", "it's"), ("it's", "must be of ort-cpu")),
        (("compile", "x.onnx", "-o", "o", "--zzz"), ("no such option; regcache compile -h",)),
        (("compile", "x.onnx", "-o", "o", "--target", "a\nb"), ("must be of ort-cpu",)),
    ],
)
def test_bad_usage_is_one_line(arguments: tuple[str, ...], parts: tuple[str, ...]) -> None:
    refused = run_regcache(*arguments)
    assert_refused(refused, *parts)
    assert len(refused.err.splitlines()) == 1


def test_without_a_command_there_is_help() -> None:
    asked = run_regcache()
    assert asked.code == 2
    assert "Usage" in asked.out + asked.err
    assert "regcache: error" not in asked.err


def test_choices_of_the_environment_and_of_a_file_are_suggested(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("REGCACHE_COMPILE_TARGET", "openvin")
    refused = run_regcache("compile", "x.onnx", "-o", "o")
    assert_refused(refused, "REGCACHE_COMPILE_TARGET = 'openvin'", "did you mean openvino?")
    monkeypatch.delenv("REGCACHE_COMPILE_TARGET")
    (tmp_path / "regcache.toml").write_text('[parity]\nreference = "float-onx"\n')
    refused = run_regcache("parity", "a", "--images", "b")
    assert_refused(refused, "parity.reference = 'float-onx'", "did you mean float-onnx?")


def test_keys_of_regcache_toml_are_the_options_as_they_are_written() -> None:
    for name in COMMANDS:
        command = GROUP.commands[name]  # type: ignore[attr-defined]
        context = command.make_context(name, [], resilient_parsing=True)
        long = {
            opt.removeprefix("--")
            for one in command.params
            for opt in one.opts
            if one.param_type_name == "option"
        }
        arguments = {one.name for one in command.params if one.param_type_name == "argument"}
        assert _keys(context).keys() <= long | arguments
    assert "from" not in _keys(
        GROUP.commands["compile"].make_context("compile", [], resilient_parsing=True)  # type: ignore[attr-defined]
    )


@pytest.mark.parametrize("option", ["--batch-size", "--threads", "--resolution", "--max-images"])
def test_a_number_that_no_library_holds_is_refused(option: str) -> None:
    refused = run_regcache("compile", "x.onnx", "-o", "o", option, "9" * 20)
    assert_refused(refused, option, "less than or equal to")


@pytest.mark.parametrize("seed", ["-1", "9" * 30])
def test_a_seed_is_no_negative_number(seed: str) -> None:
    assert_refused(run_regcache("compile", "x.onnx", "-o", "o", "--seed", seed), "--seed")


def test_bench_refuses_batches_without_end() -> None:
    assert_refused(run_regcache("bench", "a", "--batch", "9" * 5000), "must be a batch size")
