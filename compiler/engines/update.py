"""Add engines to an artifact: the folder is replaced as a whole, so that it is never half-written.

A file that does not change is a second name of the same bytes until the old folder goes.
"""

import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from regcache.compiler.artifact.engine_record import EngineRecord, with_size_ratios
from regcache.compiler.artifact.manifest import FileRecord, Manifest
from regcache.compiler.artifact.read_manifest import read_manifest
from regcache.compiler.artifact.signature import check_signable, sign
from regcache.compiler.encoder.prepare import FLOAT
from regcache.compiler.job.staging import MANIFEST, rewritten_folder
from regcache.passes.errors import InputError
from regcache.passes.model_files import data_file


@dataclass(frozen=True)
class NewEngine:
    """A serialized engine and its record in the manifest."""

    record: EngineRecord
    engine: bytes


def model_hashes(manifest: Manifest, model: str) -> dict[str, str]:
    """SHA-256 of an ONNX file of the artifact and of its external data, by file."""
    names = {model, data_file(Path(model)).name}
    return {name: record.sha256 for name, record in manifest.files.items() if name in names}


def add_engines(
    folder: Path, opened: Manifest, new: Sequence[NewEngine], key: Path | None = None
) -> Manifest:
    """Put engines into an artifact, in the place of those of the same name; returns its manifest.

    `opened`: the manifest that they were built for. Another process may have added engines since.
    `key`: a private key of OpenSSH's to sign it with, without which a signature is refused.
    Raises InputError where the artifact's models are no longer those, or it cannot be written.
    """
    with rewritten_folder(folder) as staging:
        current = read_manifest(folder)
        check_signable(folder, key)
        for model in {item.record.model for item in new}:
            if model_hashes(current, model) != model_hashes(opened, model):
                raise InputError(f"{folder}: was compiled again during the build; build it again")
        shutil.copytree(folder, staging, copy_function=_link, dirs_exist_ok=True)
        files = dict(current.files)
        for item in new:
            path = staging / item.record.file
            path.parent.mkdir(exist_ok=True)
            path.unlink(missing_ok=True)
            path.write_bytes(item.engine)
            files[item.record.file] = FileRecord.of(path)
        fresh = {item.record.file: item.record for item in new}
        records = {record.file: record for record in current.engines} | fresh
        sizes = {name: record.size for name, record in files.items()}
        manifest = current.model_copy(
            update={
                "engines": with_size_ratios(records.values(), sizes, FLOAT),
                "files": dict(sorted(files.items())),
            }
        )
        (staging / MANIFEST).unlink()  # else the old folder's manifest would be written to
        manifest.write(staging)
        if key is not None:
            sign(staging, key)
    return manifest


def _link(source: str, target: str) -> None:
    """A second name for a file, or a copy where the file system has no such thing."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)
