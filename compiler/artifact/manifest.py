"""manifest.json: everything there is to know about an artifact, and proof of its files."""

import hashlib
import json
from pathlib import Path
from typing import Literal, Self

from pydantic import BaseModel, ConfigDict, ValidationError

from regcache.compiler.artifact.engine_record import EngineRecord
from regcache.compiler.artifact.seal import is_sealed, seal
from regcache.compiler.curation.record import CurationRecord
from regcache.compiler.encoder.pass_record import PassRecord
from regcache.compiler.job.options import CompileOptions
from regcache.compiler.quantization.int8_share import ParetoPoint
from regcache.compiler.staging import MANIFEST
from regcache.passes.errors import InputError
from regcache.runtime.parity import ParityResult
from regcache.runtime.speed import SpeedRatio

_HASHED = 1 << 20
LIBRARIES = ("numpy", "onnx", "onnx-graphsurgeon", "onnxruntime", "pillow", "torch",
             "transformers", "timm", "open_clip_torch")  # fmt: skip
"""What decides, by its version, what an artifact holds."""


class _Record(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class FileRecord(_Record):
    """A file of the artifact: its size in bytes and SHA-256."""

    size: int
    sha256: str

    @classmethod
    def of(cls, *paths: Path) -> Self:
        """Measure a file, or several as if they were one behind the other."""
        digest = hashlib.sha256()
        for path in paths:
            with path.open("rb") as stream:
                while chunk := stream.read(_HASHED):
                    digest.update(chunk)
        size = sum(path.stat().st_size for path in paths)
        return cls(size=size, sha256=digest.hexdigest())


class SourceRecord(_Record):
    """Where the encoder came from; `sha256` is of its ONNX form before any pass, weights last."""

    name: str
    sha256: str
    recipe: Literal["source", "option", "assumed"]


class EncoderRecord(_Record):
    """What the encoder view found.

    `embedding`: the name of the output that is the embedding, and `embedding_why` it is thought to
    be; `token_output`: of the one with the hidden state, and `token_prefix` how many of its tokens
    stand before the patches; `class_scores`: whether the embedding is a
    score for each class. In a manifest of format 4 there is none of them: the first output is the
    embedding, a second of rank 3 the hidden state.
    """

    blocks: int
    width: int
    heads: int
    head_dim: int
    tokens: int | None
    prefix_tokens: int | None
    activation: str
    embedding: str | None = None
    embedding_why: str | None = None
    token_output: str | None = None
    token_prefix: int | None = None
    class_scores: bool = False

    @property
    def first_outputs(self) -> tuple[str, ...]:
        """The embedding and the hidden state, as far as they are known by name."""
        return tuple(name for name in (self.embedding, self.token_output) if name is not None)

    @property
    def leading_tokens(self) -> int:
        """How many tokens of the hidden state stand before the patches."""
        found = self.prefix_tokens if self.token_prefix is None else self.token_prefix
        return found or 0

    @property
    def gives_tokens(self) -> bool:
        """Whether the second output may be the hidden state."""
        return self.embedding is None or self.token_output is not None


class SiteRecord(_Record):
    """The quantization of one activation and of the linears that read it.

    `observed` is the range seen in calibration, `covered` the one that the integers stand for.
    `equalization`: how its channels were equalized, if they were.
    """

    site: str
    tensor: str
    observed: tuple[float, float]
    covered: tuple[float, float]
    scale: float
    zero_point: int
    dtype: str
    equalization: str | None = None


class QuantizationRecord(_Record):
    """Number formats, the ranges that calibration chose, and what stays float.

    `int8_share`: of the multiply-accumulates of the blocks' linears and of rotations; 0 where
    activations stay float. `pareto`: what other shares would cost, where the damage of each layer
    was measured.
    """

    activation_dtype: str
    activation_symmetric: bool
    activation_bits: int | None
    weight_dtype: str
    weight_bits: int
    why: str
    int8_share: float
    left_float: list[str]
    pareto: list[ParetoPoint]
    sites: list[SiteRecord]


class CalibrationRecord(_Record):
    """The images that calibration saw; `skipped` are the ones that could not be read."""

    images: int
    skipped: list[str]


class ParityRecord(_Record):
    """Parity with the float ONNX on a few of the calibration images, measured while compiling."""

    images: Literal["calibration"] = "calibration"
    result: ParityResult


class SpeedRecord(_Record):
    """How fast the model is beside the float one, on ONNX Runtime on the machine that compiled.

    `integer_matmuls`: nodes that multiply integers in the graph as ONNX Runtime optimised it.
    `ratios` are for the one who compiles: manifest.json leaves them out, so that the same input
    gives the same bytes.
    """

    integer_matmuls: int
    ratios: list[SpeedRatio] = []


class Manifest(_Record):
    """The content of manifest.json. `speed` is None where ONNX Runtime is not the target.

    `engines`: what `regcache build` has added since.
    """

    format_version: Literal[4, 5] = 5
    regcache: str
    versions: dict[str, str]
    options: CompileOptions
    source: SourceRecord
    encoder: EncoderRecord
    calibration: CalibrationRecord
    curation: CurationRecord
    quantization: QuantizationRecord
    passes: list[PassRecord]
    parity: ParityRecord
    speed: SpeedRecord | None
    engines: list[EngineRecord] = []
    files: dict[str, FileRecord]

    def write(self, folder: Path) -> None:
        """Write manifest.json into the artifact's folder, sealed: no byte changes unseen."""
        text = self.model_dump_json(indent=2, exclude={"speed": {"ratios"}})
        (folder / MANIFEST).write_text(seal(text), encoding="utf-8")


def hash_files(folder: Path) -> dict[str, FileRecord]:
    """Every file of an artifact but the manifest itself, by its relative path."""
    return {
        path.relative_to(folder).as_posix(): FileRecord.of(path)
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != MANIFEST
    }


def read_manifest(folder: Path) -> Manifest:
    """Read an artifact's manifest and check every file against it.

    Raises InputError when the folder is no artifact, was made by another version of the format,
    or holds a file that is missing, changed or not listed.
    """
    path = folder / MANIFEST
    try:
        content = path.read_bytes()
    except OSError as error:
        raise InputError(f"{folder}: no regcache artifact ({MANIFEST} cannot be read)") from error
    manifest = _parse(path, content)
    if not is_sealed(content):
        raise InputError(f"{path}: changed; compile the artifact again")
    found = hash_files(folder)
    for name in sorted(found.keys() | manifest.files.keys()):
        if found.get(name) != manifest.files.get(name):
            state = "missing" if name not in found else "changed"
            state = state if name in manifest.files else "not in the manifest"
            raise InputError(f"{folder / name}: {state}; compile the artifact again")
    return manifest


def _parse(path: Path, content: bytes) -> Manifest:
    try:
        fields = json.loads(content)
        if isinstance(fields, dict):
            fields.pop("sha256", None)  # the seal
        return Manifest.model_validate(fields)
    except ValueError as error:  # ValidationError is one too
        reason = "it is no JSON"
        if isinstance(error, ValidationError):
            first = error.errors()[0]
            reason = f"{'.'.join(str(part) for part in first['loc'])} {first['msg']}"
        raise InputError(f"{path}: not a manifest of this version: {reason}") from error
