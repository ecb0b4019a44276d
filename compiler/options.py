"""What a user can choose of a compilation."""

from enum import StrEnum
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field

from regcache.compiler.calibration.quantizer import Calibrator
from regcache.compiler.targets import (
    Precision,
    Simulation,
    TargetName,
    default_int8_share,
    runs_integers,
)
from regcache.passes.preprocess import Preprocess


class RegisterChoice(StrEnum):
    """Whether registers are searched for."""

    AUTO = "auto"
    OFF = "off"


class Rounding(StrEnum):
    """How weights become integers: by the error at the layer's output, or each to the nearest.

    Only the first corrects biases: both come from the same pass over the images.
    """

    GPTQ = "gptq"
    NEAREST = "nearest"


class AttentionChoice(StrEnum):
    """What attention's own two products compute in."""

    FLOAT = "float"
    INT8 = "int8"


class CompileOptions(BaseModel):
    """Everything that decides what `regcache compile` makes of a source.

    `output`: the name of the one that is the embedding; None for the most likely.
    `search_budget` is in seconds; None for no limit. `int8_share`: the least share of the linears'
    and rotations' multiply-accumulates that is int8; None for the target's default. `rotate`:
    whether activations are rotated where that leaves room. `half`: whether the rest is FP16; None
    for the target's default. `preprocess`: a file with a recipe, or the recipe itself.
    `source_file`: an ONNX file that holds a source of no place of its own, an object in memory; no
    manifest tells it.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    source: str
    source_file: Path | None = Field(default=None, exclude=True, repr=False)
    images: str
    target: TargetName = TargetName.ORT_CPU
    resolution: int | None = None
    output: str | None = None
    preprocess: str | Preprocess | None = None
    batch_size: int = 4
    threads: int | None = None
    seed: int = 0
    keep_float: bool = True
    calibrator: Calibrator = Calibrator.OUTPUT_ERROR
    precision: Precision = Precision.INT8
    simulate: Simulation | None = None
    registers: RegisterChoice = RegisterChoice.AUTO
    search_budget: float | None = None
    scheduler: str = "threads"
    equalize: bool = True
    rotate: bool = True
    rounding: Rounding = Rounding.GPTQ
    int8_share: float | None = None
    accept_slower: bool = False
    half: bool | None = None
    attention: AttentionChoice = AttentionChoice.FLOAT

    @property
    def share(self) -> float:
        """`int8_share`, or the target's default; all where other bit-widths are simulated."""
        if self.int8_share is not None:
            return self.int8_share
        return 1.0 if self.simulate is not None else default_int8_share(self.target)

    @property
    def in_half(self) -> bool:
        """`half`, or whether TensorRT runs it; nothing where other bit-widths are simulated."""
        if self.half is not None:
            return self.half
        return not runs_integers(self.target) and self.simulate is None
