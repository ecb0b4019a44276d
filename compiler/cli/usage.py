"""A command line that cannot be read: one line, as of all bad input, with what may have been meant.

typer holds a copy of click in its newer versions and imports click in its older ones: what is
caught here is known by what both have.
"""

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from enum import Enum
from inspect import signature
from typing import Any, get_args

import typer
from typer.core import TyperGroup

from regcache.export.suggest import did_you_mean
from regcache.passes.errors import InputError, RegcacheError

_USAGE_ERROR: type[Any] = typer.BadParameter.__bases__[0]
_HELP_IS_ASKED = "NoArgsIsHelpError"
_NO_CHOICE = re.compile(r"(?P<value>'.*'|\".*\") is not one of ", re.DOTALL)
_NO_COMMAND = re.compile(r"No such command '(?P<name>[^']*)'")


class Commands(TyperGroup):
    """The commands of regcache. Raises InputError for a command line that none of them takes."""

    def make_context(self, *arguments: Any, **named: Any) -> Any:
        """Read what stands before a command's name."""
        with _as_bad_input():
            return super().make_context(*arguments, **named)

    def invoke(self, ctx: Any) -> Any:
        """Read what stands behind a command's name, and run it."""
        with _as_bad_input():
            return super().invoke(ctx)


def choice_problem(value: object, choices: Sequence[str]) -> str:
    """What is wrong with a value that is none of the choices: the likeliest one, or all."""
    near = did_you_mean(str(value), choices)
    return f"there is no such choice{near}" if near else f"must be of {', '.join(choices)}"


@contextmanager
def _as_bad_input() -> Iterator[None]:
    try:
        yield
    except RegcacheError:
        raise
    except _USAGE_ERROR as error:
        if type(error).__name__ == _HELP_IS_ASKED:
            raise
        raise InputError(_line(error)) from error


def _line(error: Any) -> str:
    """What is wrong, and where to look for what is right."""
    context = error.ctx
    path = "regcache" if context is None else context.command_path
    help_line = "" if context is None else f"; {path} -h tells of all"
    parameter = getattr(error, "param", None)
    if parameter is not None:
        name = _name(parameter)
        if hasattr(error, "param_type"):
            return f"{name} is missing{help_line}"
        wrong = _NO_CHOICE.search(error.message)
        choices = _choices(context, parameter)
        if wrong and choices:
            value = wrong["value"][1:-1]
            return f"{name} {value!r}: {choice_problem(value, choices)}"
        return f"{name}: {_plain(error.message)}"
    if hasattr(error, "possibilities") and hasattr(error, "option_name"):
        return f"{error.option_name}: there is no such option" + (
            did_you_mean(error.option_name, _options(context)) or help_line
        )
    command = _NO_COMMAND.search(error.message)
    if command:
        known = context.command.list_commands(context)
        near = did_you_mean(command["name"], known, f"{path} ")
        return f"{command['name']}: there is no such command{near or help_line}"
    return f"{_plain(error.message)}{help_line}"


def _plain(message: str) -> str:
    """A library's sentence as one of a line: no capital, no full stop."""
    sentence = message.strip().removeprefix("Value error, ").removesuffix(".")
    return sentence[:1].lower() + sentence[1:]


def _name(parameter: Any) -> str:
    if parameter.param_type_name == "argument":
        return str(parameter.metavar or parameter.name.upper())
    return str(max(parameter.opts, key=len))


def _options(context: Any) -> list[str]:
    """The long options of the command that is read."""
    if context is None:
        return []
    parameters = context.command.get_params(context)
    return [
        name
        for one in parameters
        if one.param_type_name == "option"
        for name in (*one.opts, *one.secondary_opts)
        if name.startswith("--")
    ]


def _choices(context: Any, parameter: Any) -> list[str]:
    """The values that a parameter can have, of a command that takes one of several."""
    callback = None if context is None else context.command.callback
    if callback is None:
        return []
    found = signature(callback, eval_str=True).parameters.get(parameter.name)
    return [] if found is None else choices_of(found.annotation)


def choices_of(annotation: Any) -> list[str]:
    """The values of the Enum in an annotation; [] where there is none."""
    if isinstance(annotation, type) and issubclass(annotation, Enum):
        return [str(one.value) for one in annotation]
    return [value for part in get_args(annotation) for value in choices_of(part)]
