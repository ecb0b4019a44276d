"""Options that no flag gave: regcache.toml, and the environment's REGCACHE_COMMAND_OPTION.

The model of a command's table is made of the command's own signature, so a new option is known here
as soon as it is known there. What is found becomes the defaults of the command's options: flags go
before it, and the environment before the file.
"""

import json
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from inspect import Parameter, signature
from pathlib import Path
from typing import Annotated, Any, get_args, get_origin

import typer
from pydantic import BaseModel, ConfigDict, Field, ValidationError, create_model
from typer.core import TyperGroup
from typer.models import OptionInfo, ParameterInfo

from regcache.compiler.cli.options import INPUT
from regcache.compiler.cli.usage import choice_problem, choices_of
from regcache.export.suggest import did_you_mean
from regcache.passes.errors import InputError
from regcache.passes.read_small import read_toml

FILE = Path("regcache.toml")
_PREFIX = "REGCACHE"
# A file that names a file, or an artifact in its own place, would have to be read twice.
_FLAGS_ONLY = frozenset({"config", "from"})
_REPEATS = "regcache.repeats"


@dataclass(frozen=True)
class _Given:
    """What a file or the environment gives: values by key, and how messages spell a key."""

    values: Mapping[str, Any]
    spell: Callable[[str], str] = str
    place: str = ""
    text: bool = False
    """Whether all values are text, as in the environment."""


def configure(ctx: typer.Context, file: Path | None) -> Path | None:
    """Make the file's and the environment's options the defaults of the command that begins.

    Without `file`, regcache.toml in the working directory is read where there is one, but not by a
    command that repeats another. Raises InputError, naming the file or the variable and the option,
    for one that there is not or that cannot be so.
    """
    if ctx.resilient_parsing:  # completion: nothing runs
        return file
    command, keys = str(ctx.info_name), _keys(ctx)
    wanted = file or (FILE if FILE.is_file() and _REPEATS not in ctx.meta else None)
    layers = [_environment(command, keys)]
    if wanted is not None:
        table = _table(wanted, command, _configured(ctx))
        layers.insert(0, _Given(table, place=f"{wanted}: {command}."))
    for layer in layers:
        if layer.values:  # making the model takes as long as reading a small encoder
            _check(keys, layer)
        found = {
            keys[key].name: [value] if layer.text and _is_list(keys[key]) else value
            for key, value in layer.values.items()
        }
        ctx.default_map = {**(ctx.default_map or {}), **found}
    return wanted


def repeats(ctx: typer.Context, artifact: Path | None) -> Path | None:
    """Note that an artifact's own options take the place of regcache.toml's."""
    if artifact is not None:
        ctx.meta[_REPEATS] = True
    return artifact


ConfigOption = Annotated[
    Path | None,
    typer.Option(
        "--config",
        metavar="FILE",
        envvar=f"{_PREFIX}_CONFIG",
        is_eager=True,
        callback=configure,
        help=f"Options from this TOML file; by default from {FILE}, if it is here.",
        rich_help_panel=INPUT,
    ),
]


def _keys(ctx: typer.Context) -> dict[str, Parameter]:
    """The parameters of a command, by the keys of its table: its options' names without dashes."""
    assert ctx.command.callback is not None
    parameters = signature(ctx.command.callback, eval_str=True).parameters.values()
    keys = {_key(one): one for one in parameters if one.annotation is not typer.Context}
    return {key: one for key, one in keys.items() if key not in _FLAGS_ONLY}


def _key(parameter: Parameter) -> str:
    """ "int8-share" of `int8_share`, or of the first long name that its option was given."""
    information = _information(parameter)
    # typer keeps the first of the names that an annotation gives where a default would be.
    named = (
        (information.default, *(information.param_decls or ()))
        if isinstance(information, OptionInfo)
        else ()
    )
    for name in named:
        if isinstance(name, str) and name.startswith("--"):
            return name.partition("/")[0].removeprefix("--")
    return parameter.name.replace("_", "-")


def _information(parameter: Parameter) -> ParameterInfo | None:
    """What typer is told of a parameter beside its type."""
    told = (one for one in get_args(parameter.annotation) if isinstance(one, ParameterInfo))
    return next(told, None)


def _type(parameter: Parameter) -> Any:
    plain = get_origin(parameter.annotation) is not Annotated
    return parameter.annotation if plain else get_args(parameter.annotation)[0]


def _is_list(parameter: Parameter) -> bool:
    kind = _type(parameter)
    return any(get_origin(one) is list for one in (kind, *get_args(kind)))


def _model(keys: Mapping[str, Parameter], *, text: bool) -> type[BaseModel]:
    """The model of a command's options: each by its key, of its type and in its range."""
    fields: dict[str, Any] = {}
    for key, parameter in keys.items():
        information = _information(parameter)
        least, most = (None, None) if information is None else (information.min, information.max)
        kind = str if text and _is_list(parameter) else _type(parameter)
        # Not by its own name: `json` is one that a model has.
        fields[f"option_{parameter.name}"] = (
            kind,
            Field(default=None, alias=key, ge=least, le=most),
        )
    closed = ConfigDict(extra="forbid")
    return create_model("Options", __config__=closed, __module__="regcache_toml", **fields)


def _check(keys: Mapping[str, Parameter], given: _Given) -> None:
    """Raise InputError for the first option that there is not or that cannot be so."""
    model = _model(keys, text=given.text)
    try:
        if given.text:
            model.model_validate_strings(given.values)
        else:  # as JSON, where names of choices and files are texts and nothing else is
            model.model_validate_json(json.dumps(given.values, default=str), strict=True)
    except ValidationError as error:
        first = error.errors()[0]
        key = str(first["loc"][0])
        name = given.spell(key)
        if first["type"] == "extra_forbidden":
            near = did_you_mean(name, map(given.spell, keys))
            raise InputError(f"{given.place}{name}: there is no such option{near}") from error
        value, reason = first["input"], first["msg"][0].lower() + first["msg"][1:]
        if first["type"] == "enum":
            reason = choice_problem(value, choices_of(_type(keys[key])))
        raise InputError(f"{given.place}{name} = {value!r}: {reason}") from error


def _table(file: Path, command: str, known: Iterable[str]) -> Mapping[str, Any]:
    """The command's table in a file; empty where there is none."""
    tables = read_toml(file)
    for name, table in tables.items():
        if not isinstance(table, dict):
            raise InputError(f"{file}: {name} stands in no table: write it below [{command}]")
        if name not in known:
            near = did_you_mean(name, known) or f"; there are {', '.join(sorted(known))}"
            raise InputError(f"{file}: [{name}] is the table of no command{near}")
    found: Mapping[str, Any] = tables.get(command, {})
    return found


def _configured(ctx: typer.Context) -> list[str]:
    """The commands that can be configured."""
    group = ctx.find_root().command
    commands = group.commands if isinstance(group, TyperGroup) else {}
    return [
        name
        for name, command in commands.items()
        if any(parameter.name == "config" for parameter in command.params)
    ]


def _environment(command: str, keys: Iterable[str]) -> _Given:
    """What the environment says; an empty variable says nothing."""

    def variable(key: str) -> str:
        return f"{_PREFIX}_{command}_{key}".upper().replace("-", "_")

    start, known = variable(""), {variable(key): key for key in keys}
    values = {
        known.get(name, name.removeprefix(start)): value
        for name, value in os.environ.items()
        if name.startswith(start) and value
    }
    return _Given(values, variable, text=True)
