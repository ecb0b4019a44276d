"""What a bundle consists of: a folder that another program serves an artifact from."""

from collections.abc import Iterator
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path

from regcache.compiler.artifact.manifest import FileRecord
from regcache.compiler.artifact.read_manifest import hash_files
from regcache.compiler.job.record import Record
from regcache.compiler.job.staging import MANIFEST, staged_folder
from regcache.passes.errors import InputError

BUNDLE = "regcache-bundle.json"
"""The file in a bundle that says what regcache wrote."""


class BundleFormat(StrEnum):
    """What runs the bundle."""

    TRITON = "triton"
    ORT_EDGE = "ort-edge"
    OPENVINO_EDGE = "openvino-edge"
    OPENVINO_SERVER = "ovms"


class BundleRecord(Record):
    """The content of regcache-bundle.json."""

    format: BundleFormat
    """What runs the bundle."""
    manifest: str
    """SHA-256 of the artifact's manifest.json, and so of all that the bundle was made from."""
    files: dict[str, FileRecord]
    """Every other file of the bundle, by its path inside the bundle."""


@contextmanager
def staged_bundle(output: Path, artifact: Path) -> Iterator[Path]:
    """Yield a folder that takes the place of `output` when the block ends without an error.

    An older bundle at `output` is replaced, as is an empty folder. Raises InputError where anything
    else lies there, where files were added to the older bundle since it was written or its README
    was edited, and where `output` is inside the artifact, whose manifest lists every file.
    """
    if output.resolve().is_relative_to(artifact.resolve()):
        raise InputError(f"{output}: lies in the artifact; write the bundle elsewhere")
    with staged_folder(output, marker=BUNDLE) as staging:
        yield staging


def record_bundle(staging: Path, kind: BundleFormat, artifact: Path) -> BundleRecord:
    """Write regcache-bundle.json, last of all, and return what it says."""
    manifest = FileRecord.of(artifact / MANIFEST).sha256
    record = BundleRecord(format=kind, manifest=manifest, files=hash_files(staging))
    (staging / BUNDLE).write_text(record.model_dump_json(indent=2) + "\n", encoding="utf-8")
    return record
