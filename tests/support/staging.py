"""Artifacts of files without content, to be put in one another's place."""

import json
from pathlib import Path

from regcache.compiler.job.staging import MANIFEST, staged_folder


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def write_artifact(output: Path, content: str, *, force: bool = False) -> list[str]:
    """Replace an artifact by one with a file of that name; returns what was told."""
    told: list[str] = []
    with staged_folder(output, force=force, tell=told.append) as staging:
        (staging / content).write_text("")
        (staging / MANIFEST).write_text(json.dumps({"files": {content: {}}}))
    return told
