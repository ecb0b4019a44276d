"""What a user can choose of a compilation."""

from enum import StrEnum
from pathlib import Path
from typing import Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from regcache.compiler.job.targets import (
    PROFILES,
    Precision,
    Simulation,
    TargetName,
    TargetProfile,
    resolve_target,
)
from regcache.passes.errors import InputError
from regcache.passes.preprocess import Preprocess


class Calibrator(StrEnum):
    """How the range of an activation is chosen: by its layers' output error, or by its values."""

    OUTPUT_ERROR = "output-error"
    MIN_MAX = "min-max"
    PERCENTILE = "percentile"
    ENTROPY = "entropy"
    MSE = "mse"


# The others choose where integers clip.
FLOAT8_CALIBRATORS = frozenset({Calibrator.OUTPUT_ERROR, Calibrator.MIN_MAX})


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

    @model_validator(mode="after")
    def _go_together(self) -> Self:
        """Raise InputError for options that no target runs together, before anything is read."""
        resolve_target(self.target, u8s8_saturates=False, precision=self.precision)
        if not self.profile.half and (self.half or self.attention is AttentionChoice.INT8):
            raise InputError(
                f"--half and --attention int8 are for TensorRT, not {self.target.value}"
            )
        if self.precision is Precision.W4A16 and self.int8_share is not None:
            raise InputError("--int8-share says nothing about w4a16: activations stay float")
        if self.precision is Precision.FP8 and self.calibrator not in FLOAT8_CALIBRATORS:
            raise InputError(f"the {self.calibrator.value} calibrator is for integers, not for fp8")
        if self.simulate is not None and self.precision is not Precision.INT8:
            raise InputError("--simulate and --precision do not go together")
        return self

    @property
    def profile(self) -> TargetProfile:
        """What is particular to the target."""
        return PROFILES[self.target]

    @property
    def share(self) -> float:
        """`int8_share`, or the target's default; all where other bit-widths are simulated."""
        if self.int8_share is not None:
            return self.int8_share
        return 1.0 if self.simulate is not None else self.profile.int8_share

    @property
    def in_half(self) -> bool:
        """`half`, or the target's default; nothing where other bit-widths are simulated."""
        if self.half is not None:
            return self.half
        return self.profile.half and self.simulate is None
