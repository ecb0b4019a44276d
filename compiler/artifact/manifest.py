"""manifest.json: everything there is to know about an artifact, and proof of its files."""

import hashlib
from pathlib import Path
from typing import Literal, Self

from pydantic import Field, model_validator
from pydantic.json_schema import SkipJsonSchema

from regcache.compiler.artifact.engine_record import EngineRecord
from regcache.compiler.artifact.seal import seal
from regcache.compiler.curation.record import CurationRecord
from regcache.compiler.encoder.pass_record import PassRecord
from regcache.compiler.job.options import CompileOptions
from regcache.compiler.job.record import Record
from regcache.compiler.job.staging import MANIFEST
from regcache.compiler.job.targets import TargetName
from regcache.compiler.quantization.int8_share import BoundRecord, ParetoPoint
from regcache.runtime.device import Device, device_name
from regcache.runtime.engine_cost import PredictedTime
from regcache.runtime.openvino_primitives import Primitives
from regcache.runtime.parity_result import ParityResult
from regcache.runtime.run_with import RuntimeName
from regcache.runtime.speed import SpeedRatio

_HASHED = 1 << 20
LIBRARIES = ("numpy", "onnx", "onnx-graphsurgeon", "onnxruntime", "onnxruntime-gpu", "openvino",
             "pillow", "torch", "transformers", "timm", "open_clip_torch")  # fmt: skip
"""What decides, by its version, what an artifact holds."""


class DeviceRecord(Record):
    """What `options.device` turned out to be."""

    gpu: str | None = None
    """The GPU's name; None on the CPU, and where PyTorch is not there to tell it."""
    algebra: Literal["numpy", "torch"] = "numpy"
    """What computed ranges, factors and rounded weights."""

    @classmethod
    def of(cls, device: Device) -> Self:
        """The record of a device that was found."""
        return cls(gpu=device_name(device), algebra="torch" if device.arrays else "numpy")


class FileRecord(Record):
    """A file of an artifact."""

    size: int
    """Size in bytes."""
    sha256: str
    """SHA-256 of the bytes, 64 hexadecimal digits."""

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


class SourceRecord(Record):
    """The source of an encoder, and of its preprocessing."""

    name: str
    """The source as it was named: a path, or `hf:`, `timm:`, `openclip:`, `sample:` with a name."""
    sha256: str
    """SHA-256 of its ONNX form before any pass: the graph, then external weights."""
    recipe: Literal["source", "option", "assumed"]
    """Where the preprocessing came from: the source, `--preprocess`, or assumed, having neither."""


class EncoderRecord(Record):
    """What was found in the encoder's graph.

    The last five fields are not in a manifest of format 4: the first output is the embedding there,
    a second of rank 3 the hidden state.
    """

    blocks: int
    """Number of transformer blocks."""
    width: int
    """Channels of the residual stream."""
    heads: int
    """Attention heads of a block."""
    head_dim: int
    """Channels of one head."""
    tokens: int | None
    """Tokens in the residual stream; None where the graph does not fix their number."""
    prefix_tokens: int | None
    """How many tokens (class, own registers) stand before the patches; None if unknown."""
    activation: str
    """The MLP's nonlinearity in the first block, such as `gelu`."""
    embedding: str | None = None
    """Name of the output that is the embedding."""
    embedding_why: str | None = None
    """Why that output is taken for the embedding, in words."""
    token_output: str | None = None
    """Name of the output with the hidden state [batch, tokens, width]; None without one."""
    token_prefix: int | None = None
    """How many tokens of that output stand before the patches."""
    class_scores: bool = False
    """Whether the embedding is a score for each class."""

    @property
    def first_outputs(self) -> tuple[str, ...]:
        """The embedding and the hidden state, as far as they are known by name."""
        return tuple(name for name in (self.embedding, self.token_output) if name is not None)

    @property
    def leading_tokens(self) -> int:
        """How many tokens of the hidden state stand before the patches."""
        leading = self.prefix_tokens if self.token_prefix is None else self.token_prefix
        return leading or 0

    @property
    def gives_tokens(self) -> bool:
        """Whether the second output may be the hidden state."""
        return self.embedding is None or self.token_output is not None


class SiteRecord(Record):
    """The quantization of one activation and of the linears that read it."""

    site: str
    """The site's name: its block and the roles of the linears, such as `blocks.3.q+k+v`."""
    tensor: str
    """Name of the activation in the float graph."""
    observed: tuple[float, float]
    """Least and largest value on the calibration images, after equalizing."""
    covered: tuple[float, float]
    """Least and largest value that the number format can stand for with this scale."""
    scale: float
    """Step between neighbouring integers; for FP8, what values are divided by."""
    zero_point: int
    """The integer that stands for 0; 0 for symmetric formats."""
    dtype: str
    """The number format, in ONNX's words: `uint8`, `int8`, `float8e4m3fn`."""
    equalization: str | None = None
    """How its channels were shifted and equalized, in words; None where they were not."""


class QuantizationRecord(Record):
    """Number formats, the ranges that calibration chose, and what stays float."""

    activation_dtype: str
    """Number format of activations, in ONNX's words."""
    activation_symmetric: bool
    """Whether every zero point of an activation is 0."""
    activation_bits: int | None
    """Bits of an activation that are used; None where activations stay float."""
    weight_dtype: str
    """Number format of weights, in ONNX's words."""
    weight_bits: int
    """Bits of a weight that are used."""
    why: str
    """Why these formats, in words."""
    int8_share: float
    """Share of the multiply-accumulates of linears and rotations that is quantized, 0 to 1; 0 where
    activations stay float.
    """
    left_float: list[str]
    """Names of the sites whose linears stay float."""
    pareto: list[ParetoPoint]
    """What other shares would cost; empty where the damage of the sites was not measured."""
    sites: list[SiteRecord]
    """Every quantized site, in the order of the graph."""
    bound: BoundRecord | None = None
    """The bound that `--min-cosine` set; None without one."""
    predicted: list[PredictedTime] = Field(default_factory=list)
    """The times of its engine for TensorRT beside FP16's, predicted from shapes and peak rates and
    not measured; empty for other targets, and where the graph leaves the number of tokens open.
    """


class CalibrationRecord(Record):
    """The images of calibration."""

    images: int
    """Number of images that could be read."""
    skipped: list[str]
    """Images that could not be read: file name, colon, reason."""


class ParityRecord(Record):
    """A first look at parity while compiling, beside the float ONNX."""

    images: Literal["calibration", "held-out", "given", "drawn"] = "calibration"
    """Which images were compared: a few that ranges were chosen on as well; of those that were held
    out of it; of those given, where nothing was calibrated; or pictures drawn at random, where none
    were given.
    """
    runtime: RuntimeName = RuntimeName.ONNXRUNTIME
    """What ran the model; a manifest from before there was a choice does not say."""
    result: ParityResult
    """What the comparison gave."""


class SpeedRecord(Record):
    """How fast the model is beside the float one, on ONNX Runtime on the machine that compiled."""

    integer_matmuls: int
    """Nodes that multiply integers in the graph as ONNX Runtime optimised it."""
    ratios: SkipJsonSchema[list[SpeedRatio]] = Field(default_factory=list)
    """Times of both, by batch size. Only `compile --json` tells them: manifest.json leaves them
    out, so that the same input gives the same bytes.
    """


class Manifest(Record):
    """The content of manifest.json, without the seal that stands at its end."""

    format_version: Literal[4, 5] = 5
    """Version of this format; 4 lacks the names of outputs in `encoder`."""
    regcache: str
    """Version of regcache that compiled."""
    versions: dict[str, str]
    """Versions of the libraries that decide what an artifact holds, by name, where installed."""
    options: CompileOptions
    """All that was chosen, by option or by default."""
    device: DeviceRecord = Field(default_factory=DeviceRecord)
    """What compiled; not in a manifest that was written before there was a choice."""
    source: SourceRecord
    """Where the encoder came from."""
    encoder: EncoderRecord
    """What was found in the encoder's graph."""
    calibration: CalibrationRecord
    """The images that calibration saw."""
    curation: CurationRecord
    """The registers that ship, or why none do."""
    quantization: QuantizationRecord
    """Number formats, ranges, and what stays float."""
    passes: list[PassRecord]
    """What each pass over the graph did and refused, in the order in which they ran."""
    parity: ParityRecord
    """How close the model is to float, on a few calibration images."""
    speed: SpeedRecord | None
    """How fast it is beside float; None where ONNX Runtime is not the target."""
    primitives: Primitives | None = None
    """What OpenVINO computed in; None where it is not the target, or was not installed."""
    engines: list[EngineRecord] = Field(default_factory=list)
    """Engines that `regcache build` has added since."""
    files: dict[str, FileRecord]
    """Every file of the artifact but this one, by its path inside the artifact. README.md, the
    model card, may have been edited since: its hash is that of the card as it was written.
    """

    @model_validator(mode="after")
    def _engines_are_files_of_it(self) -> Self:
        """Paths come from whoever wrote the manifest: they lead to files that were hashed."""
        for engine in self.engines:
            for file in (engine.file, engine.model):
                if file not in self.files:
                    raise ValueError(f"engine of {file!r}, which is not among its files")
        return self

    @property
    def target(self) -> TargetName:
        """What runs the artifact."""
        return self.options.target

    @property
    def quantizes(self) -> bool:
        """Whether anything is quantized."""
        return self.options.precision.quantizes

    @property
    def number_format(self) -> str:
        """What the linears compute in, or what is simulated, as the command line calls it."""
        return (self.options.simulate or self.options.precision).value

    def write(self, folder: Path) -> None:
        """Write manifest.json into the artifact's folder, sealed: no byte changes unseen."""
        text = self.model_dump_json(indent=2, exclude={"speed": {"ratios"}})
        (folder / MANIFEST).write_text(seal(text), encoding="utf-8")
