"""What a user can choose of a compilation."""

from collections.abc import Mapping
from enum import StrEnum
from pathlib import Path
from typing import Any, Self

from pydantic import Field, field_validator, model_validator
from pydantic.json_schema import SkipJsonSchema

from regcache.compiler.job.effort import Effort, Preference, Preset, RegisterChoice, fill_in
from regcache.compiler.job.record import Record
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
from regcache.runtime.device import Device


class Calibrator(StrEnum):
    """The rule that chooses an activation's range: by its layers' output error, or its values."""

    OUTPUT_ERROR = "output-error"
    MIN_MAX = "min-max"
    PERCENTILE = "percentile"
    ENTROPY = "entropy"
    MSE = "mse"


# The others choose where integers clip.
FLOAT8_CALIBRATORS = frozenset({Calibrator.OUTPUT_ERROR, Calibrator.MIN_MAX})


class Rounding(StrEnum):
    """How weights become integers: by the error at the layer's output, or each to the nearest.

    Biases are corrected with `gptq` only: both come from the same pass over the images.
    """

    GPTQ = "gptq"
    NEAREST = "nearest"


class AttentionChoice(StrEnum):
    """The number format of attention's own two products: `scores`, the first alone is int8."""

    FLOAT = "float"
    SCORES = "scores"
    INT8 = "int8"


class CompileOptions(Record):
    """Everything that decides what `regcache compile` makes of a source."""

    source: str
    """The source: a path, or `hf:`, `timm:`, `openclip:`, `sample:` with a name."""
    source_file: SkipJsonSchema[Path | None] = Field(default=None, exclude=True, repr=False)
    """An ONNX file that holds a source given as an object in memory; in no manifest."""
    images: str
    """The images to calibrate on: a folder, an image, a list of them, or a pattern; empty for none,
    where nothing is quantized.
    """
    max_images: int = 512
    """How many of them are looked at, at most; of more, so many are drawn by `seed`."""
    target: TargetName = TargetName.ORT_CPU
    """What will run the artifact."""
    resolution: int | None = None
    """Side of the square input in pixels; None for the source's own."""
    output: str | None = None
    """Name of the output that is the embedding; None for the most likely."""
    preprocess: str | Preprocess | None = None
    """A file with the preprocessing recipe, or the recipe; None for the source's own."""
    batch_size: int = 4
    """Images in a run of calibration."""
    threads: int | None = None
    """Threads of ONNX Runtime; None for all CPUs."""
    device: str = "cpu"
    """What compiles: `cpu`, or `cuda:N`, the GPU of that number. `cuda` is the first."""
    seed: int = 0
    """Seed of all that is drawn at random."""
    keep_float: bool = True
    """Whether the artifact holds float.onnx."""
    preset: Preset | None = None
    """A named bundle of options, which go behind those that are given; None for none."""
    effort: Effort = Effort.BALANCED
    """How much is tried; what is given of `registers`, `rotate` and `int8_share` goes before it."""
    calibrator: Calibrator = Calibrator.OUTPUT_ERROR
    """How the range of an activation is chosen."""
    precision: Precision = Precision.INT8
    """What the linears compute in."""
    simulate: Simulation | None = None
    """Other bit-widths, as fake quantization; None for none."""
    registers: RegisterChoice = RegisterChoice.AUTO
    """Whether to search for registers; `fast` does not unless told."""
    search_budget: float | None = None
    """Seconds that the search may take; None for no limit."""
    scheduler: str = "threads"
    """What runs the search: `threads`, `processes`, or a Dask cluster's address."""
    ablate: bool = False
    """Whether registers and deletion are measured apart, too, which takes more trials."""
    equalize: bool = True
    """Whether channels are shifted and equalized."""
    rotate: bool = True
    """Whether attention's values are rotated, and what else `int8_share` leaves room for; `fast`
    and `simulate` do not unless told."""
    rounding: Rounding = Rounding.GPTQ
    """How weights become integers."""
    int8_share: float | None = None
    """Least share of the multiply-accumulates of linears and rotations that is quantized, 0 to 1;
    None for what suits the target and the precision; all with `fast`.
    """
    min_cosine: float | None = None
    """Least mean cosine to float on images that calibrate nothing: more linears stay float, from
    `int8_share` on, until it is kept to; None for whatever comes out.
    """
    accept_slower: bool = False
    """Whether a model that is slower than float here is kept all the same."""
    half: bool | None = None
    """Whether the rest computes in FP16; None for the target's default."""
    attention: AttentionChoice | None = None
    """Number format of attention's own two products; None for the target's default."""
    prefer: Preference | None = None
    """What decides which linears are quantized; None for `int8_share`."""
    gpu: str | None = None
    """The GPU that times are predicted for, such as `RTX 4090`; None for those that the target is
    usually built for.
    """

    @field_validator("max_images")
    @classmethod
    def _one_or_more(cls, count: int) -> int:
        """The number. Raises InputError for one that leaves no image."""
        if count < 1:
            raise InputError(f"max_images: a whole number from 1 is wanted, not {count}")
        return count

    @field_validator("device")
    @classmethod
    def _known(cls, text: str) -> str:
        """The device's full name. Raises InputError for what is none."""
        return str(Device.parse(text))

    @model_validator(mode="before")
    @classmethod
    def _fill_in(cls, given: Any) -> Any:
        """Fill in what the preset and the effort imply; None stands for not given."""
        if not isinstance(given, Mapping):
            return given
        try:
            return fill_in(given)
        except ValueError:
            return given  # the field's own check says what is wrong

    @model_validator(mode="after")
    def _go_together(self) -> Self:
        """Raise InputError for options that exclude each other, before anything is read."""
        resolve_target(self.target, u8s8_saturates=False, precision=self.precision)
        if not self.precision.quantizes:
            self._nothing_to_quantize()
        if not self.profile.half and (self.half or self.attention is AttentionChoice.INT8):
            raise InputError(
                f"--half and --attention int8 are for TensorRT, not {self.target.value}"
            )
        if self.attention is AttentionChoice.SCORES and not self.profile.scores:
            raise InputError(f"--attention scores is for openvino, not {self.target.value}")
        if self.precision is Precision.W4A16 and self.int8_share is not None:
            raise InputError("--int8-share says nothing about w4a16: activations stay float")
        if self.precision.in_narrow_floats and self.calibrator not in FLOAT8_CALIBRATORS:
            raise InputError(
                f"the {self.calibrator.value} calibrator is for integers, not for "
                f"{self.precision.value}"
            )
        if self.simulate is not None and self.precision is not Precision.INT8:
            raise InputError("--simulate and --precision do not go together")
        for option, given in (("--search-budget", self.search_budget), ("--ablate", self.ablate)):
            if given and self.registers is RegisterChoice.OFF:
                why = "--effort fast" if self.effort is Effort.FAST else "--registers off"
                raise InputError(f"{option} says nothing with {why}: there is no search")
        self._by_bound()
        self._by_time()
        if self.effort is Effort.THOROUGH and not self._looks:
            raise InputError(
                "--effort thorough looks more closely for registers and for what stays float: with "
                "these options there is neither"
            )
        return self

    def _by_bound(self) -> None:
        """Raise InputError where `min_cosine` is no cosine, or nothing can be kept float for it."""
        if self.min_cosine is None:
            return
        if not -1 <= self.min_cosine <= 1:
            raise InputError(f"min_cosine {self.min_cosine}: a cosine from -1 to 1 is wanted")
        if self.precision is Precision.W4A16 or self.simulate is not None:
            raise InputError("--min-cosine keeps linears float: not w4a16's, nor with --simulate")

    def _by_time(self) -> None:
        """Raise InputError where `prefer` or `gpu` has nothing to say, or excludes an option."""
        for option, given in (("--prefer fastest", self.prefer), ("--gpu", self.gpu)):
            if given is not None and not self.predicts_time:
                raise InputError(f"{option} is for int8 and fp8 on TensorRT")
        if self.prefer is None:
            return
        shares = {"int8-share": self.int8_share, "min-cosine": self.min_cosine}
        for name in (name for name, value in shares.items() if value is not None):
            raise InputError(f"--prefer fastest and --{name} do not go together")
        if self.attention_in is AttentionChoice.INT8:
            raise InputError("--prefer fastest leaves attention's products in FP16")

    def _nothing_to_quantize(self) -> None:
        """Raise InputError for an option that says how, where nothing is quantized."""
        given = {
            "--int8-share": self.int8_share is not None,
            "--min-cosine": self.min_cosine is not None,
            "--attention": self.attention is not None,
            "--simulate": self.simulate is not None,
            "--search-budget": self.search_budget is not None,
            "--ablate": self.ablate,
            "--no-half": self.half is False,
        }
        for option, is_given in given.items():
            if is_given:
                raise InputError(f"{option} says nothing with --precision {self.precision.value}")

    @property
    def profile(self) -> TargetProfile:
        """The profile of the target."""
        return PROFILES[self.target]

    @property
    def share(self) -> float:
        """`int8_share`, or what suits target and precision; 1 with `fast` and where simulated."""
        if self.int8_share is not None:
            return self.int8_share
        whole = self.simulate is not None or self.effort is Effort.FAST
        return 1.0 if whole else self.profile.least_share(self.precision)

    @property
    def predicts_time(self) -> bool:
        """Whether the time of an engine can be predicted from the encoder's shapes."""
        in_8_bits = self.precision in (Precision.INT8, Precision.FP8) and self.simulate is None
        return self.profile.half and in_8_bits

    @property
    def measures_damage(self) -> bool:
        """Whether what stays float is chosen by the damage of quantizing it."""
        return self.share < 1 or self.prefer is not None or self.min_cosine is not None

    @property
    def _looks(self) -> bool:
        """Whether something is searched for or measured that an effort can look at closely."""
        plain = self.precision is Precision.W4A16 or not self.precision.quantizes
        plain = plain or self.simulate is Simulation.W4A16
        return not plain and (self.registers is RegisterChoice.AUTO or self.measures_damage)

    @property
    def rotates(self) -> bool:
        """Whether activations may be rotated: `rotate`, but never for FP8 or W4A16."""
        weights = self.simulate is Simulation.W4A16
        return self.rotate and self.precision is Precision.INT8 and not weights

    @property
    def rotations_leave(self) -> float:
        """The share of all work that rotations leave: `share`, or none of it where simulated."""
        return 0.0 if self.simulate is not None and self.int8_share is None else self.share

    @property
    def attention_in(self) -> AttentionChoice:
        """`attention`, or its default: the target's for int8, else float."""
        if self.attention is not None:
            return self.attention
        whole = self.profile.scores and self._in_integers
        return AttentionChoice.SCORES if whole else AttentionChoice.FLOAT

    @property
    def quantizes_patches(self) -> bool:
        """Whether the patch convolution is quantized."""
        return self.profile.patches and self._in_integers

    @property
    def fuses(self) -> bool:
        """Whether the model is written with operators of ONNX Runtime's own, for nothing else."""
        return self.profile.timed and self._in_integers

    @property
    def _in_integers(self) -> bool:
        return self.precision is Precision.INT8 and self.simulate is None

    @property
    def in_half(self) -> bool:
        """`half`, or its default: the target's, and false where other bit-widths are simulated."""
        if self.half is not None:
            return self.half
        return self.profile.half and self.simulate is None
