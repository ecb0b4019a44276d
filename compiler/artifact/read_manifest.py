"""Read a manifest that anybody may have written, and hold the artifact's files against it."""

import json
from pathlib import Path

from pydantic import ValidationError

from regcache.compiler.artifact.manifest import FileRecord, Manifest
from regcache.compiler.artifact.seal import is_sealed
from regcache.compiler.artifact.signature import SIGNATURE, verify
from regcache.compiler.encoder.prepare import FLOAT
from regcache.compiler.job.staging import CARD, MANIFEST
from regcache.passes.errors import InputError
from regcache.passes.model_files import data_file


def hash_files(folder: Path) -> dict[str, FileRecord]:
    """Every file of an artifact but the manifest and its signature, by its relative path.

    Raises InputError for what is neither a file nor a folder: to read a pipe would never end.
    """
    files = {}
    for path in sorted(folder.rglob("*")):
        if path in (folder / MANIFEST, folder / SIGNATURE) or path.is_dir():
            continue
        if not path.is_file():
            raise InputError(f"{path}: is no regular file")
        files[path.relative_to(folder).as_posix()] = FileRecord.of(path)
    return files


def read_manifest(folder: Path, public_key: Path | None = None) -> Manifest:
    """Read an artifact's manifest and check every file against it.

    Raises InputError when the folder is no artifact, was made by another version of the format,
    or holds a file that is missing, changed or not listed, or no file at all; the model card alone
    may be edited. A float.onnx of one file has to be the source, too. `public_key`: of whoever has
    to have signed it (see signature).
    """
    path = folder / MANIFEST
    try:
        if path.exists() and not path.is_file():
            raise InputError(f"{path}: is no regular file")
        content = path.read_bytes()
    except OSError as error:
        raise InputError(f"{folder}: no regcache artifact ({MANIFEST} cannot be read)") from error
    if public_key is not None:
        verify(folder, content, public_key)
    manifest = _parse(path, content)
    if not is_sealed(content):
        raise InputError(f"{path}: changed; compile the artifact again")
    hashed = hash_files(folder)
    for name in sorted((hashed.keys() | manifest.files.keys()) - {CARD}):
        if hashed.get(name) != manifest.files.get(name):
            state = "missing" if name not in hashed else "changed"
            state = state if name in manifest.files else "not in the manifest"
            raise InputError(f"{folder / name}: {state}; compile the artifact again")
    whole = FLOAT in hashed and data_file(Path(FLOAT)).name not in hashed
    if whole and hashed[FLOAT].sha256 != manifest.source.sha256:
        raise InputError(f"{folder / FLOAT}: is not the source; compile the artifact again")
    return manifest


def _parse(path: Path, content: bytes) -> Manifest:
    try:
        fields = json.loads(content)
        if isinstance(fields, dict):
            fields.pop("sha256", None)  # the seal
        return Manifest.model_validate(fields)
    except (ValueError, RecursionError) as error:  # ValidationError is a ValueError
        reason = "it is no JSON" if isinstance(error, ValueError) else "it is nested too deeply"
        if isinstance(error, ValidationError):
            first = error.errors()[0]
            reason = f"{'.'.join(str(part) for part in first['loc'])} {first['msg']}".strip()
        raise InputError(f"{path}: not a manifest of this version: {reason}") from error
