"""Read the settings that a document shows by what reads them: schemas, commands and workflows."""

import json
import os
import re
import tomllib
from pathlib import Path
from typing import Any
from unittest.mock import patch

import yaml
from support.docs_shell import ROOT, run_shell, run_words
from support.docs_world import with_stand_ins

from regcache.passes.preprocess import Preprocess
from regcache.runtime.thresholds import Thresholds

_UNKNOWN = "nothing here knows what reads it"
# What a table of regcache.toml leaves to the command line in the documents.
_ARGUMENTS = {"compile": [], "parity": ["ARTIFACT"], "bench": ["ARTIFACT"], "build": ["ARTIFACT"]}
_ACTION = "regcache/regcache@"


def read_json(text: str) -> None:
    """A preprocessing recipe."""
    fields = json.loads(text)
    assert "resize_to" in fields, _UNKNOWN
    Preprocess.from_fields(fields)


def read_toml(text: str, world: Path) -> None:
    """Thresholds of `parity`; or options, with which each command that they are of is run."""
    fields, path = tomllib.loads(text), world / "shown.toml"
    path.write_text(with_stand_ins(text), encoding="utf-8")
    if fields.keys() <= Thresholds.model_fields.keys():
        Thresholds.read(path)
        return
    assert fields.keys() <= _ARGUMENTS.keys(), _UNKNOWN
    for command in fields:
        run_words([command, *_ARGUMENTS[command], "--config", path.name], world)


def read_yaml(text: str, world: Path) -> None:
    """A workflow of GitHub's, whose steps are run, or a job of GitLab's."""
    fields: dict[str, Any] = yaml.safe_load(text)
    if "jobs" in fields:
        for job in fields["jobs"].values():
            for step in job["steps"]:
                _run_step(step, world)
    else:
        assert "include" in fields, _UNKNOWN
        _run_gitlab(fields, world)


def _run_step(step: dict[str, Any], world: Path) -> None:
    assert {"uses", "run"} & step.keys(), step
    if "run" in step:
        run_shell(step["run"], world)
    elif step["uses"].startswith(_ACTION):
        action = yaml.safe_load((ROOT / "action.yml").read_text(encoding="utf-8"))
        inputs = action["inputs"]
        assert step["with"].keys() <= inputs.keys(), step["with"]
        needed = {name for name, field in inputs.items() if field.get("required")}
        assert needed <= step["with"].keys(), needed


def _run_gitlab(fields: dict[str, Any], world: Path) -> None:
    """The commands of the jobs that are extended, with the variables of the page."""
    included: dict[str, Any] = {}
    for item in fields.pop("include"):
        place = re.fullmatch(r"https://\S+/regcache/main/(\S+)", item["remote"])
        assert place is not None, item
        included |= yaml.safe_load((ROOT / place[1]).read_text(encoding="utf-8"))
    assert fields
    for job in fields.values():
        given = {name: str(value) for name, value in job["variables"].items()}
        with patch.dict(os.environ, given):
            for line in included[job["extends"]]["script"]:
                run_shell(line, world)
