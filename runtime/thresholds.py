"""Thresholds of a comparison, and the TOML file that sets them."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import Field, ValidationError

from regcache.passes.errors import InputError
from regcache.passes.read_small import read_toml
from regcache.runtime.finite_record import FiniteRecord

DEFAULT_MIN_COSINE = 0.995

Cosine = Annotated[float, Field(ge=-1, le=1)]
Share = Annotated[float, Field(ge=0, le=1)]


class Check(FiniteRecord):
    """One threshold and what was measured."""

    name: str
    """What is asked for: the name of a number of the comparison."""
    value: float
    """What was measured."""
    bound: Literal["at least", "at most"]
    """Whether the limit is the least or the most."""
    limit: float
    """The limit."""

    @property
    def passed(self) -> bool:
        """Whether the value keeps to the limit."""
        return self.value >= self.limit if self.bound == "at least" else self.value <= self.limit

    def describe(self) -> str:
        """One line: "cosine_mean 0.99 is below 0.995"."""
        words = {"at least": ("is at least", "is below"), "at most": ("is at most", "is above")}
        return f"{self.name} {self.value:.9g} {words[self.bound][not self.passed]} {self.limit:.9g}"


class Thresholds(FiniteRecord):
    """The limits of `regcache parity`; None where a number is not looked at."""

    cosine_mean: Cosine = DEFAULT_MIN_COSINE
    """Least mean cosine over images."""
    cosine_min: Cosine | None = None
    """Least cosine of the worst image."""
    sqnr_db: float | None = None
    """Least signal to quantization noise, in decibels."""
    nn_agreement: Share | None = None
    """Least share of images with the same nearest other image."""
    patch_cosine_mean: Cosine | None = None
    """Least mean cosine over images and patch tokens."""
    top1_agreement: Share | None = None
    """Least share of images with the same largest class score."""
    knn_top1_drop: Share | None = None
    """Most that the share of images classified right may fall."""
    block_cosine_mean: Cosine | None = None
    """Least mean cosine of every block's output."""
    pixel_difference: Annotated[float, Field(ge=0, le=255)] | None = None
    """Most that a pixel may differ from the source's own processor's, in grey levels of 255."""

    @classmethod
    def read(cls, path: Path) -> Self:
        """Read a TOML file with a number for each threshold that it sets.

        Raises InputError, naming the file and the key, when it cannot be read or understood.
        """
        fields = read_toml(path)
        try:
            return cls.of(fields)
        except InputError as error:
            raise InputError(f"{path}: {error}") from error

    @classmethod
    def of(cls, limits: Mapping[str, object]) -> Self:
        """Limits by threshold. Raises InputError, naming the one that cannot be."""
        try:
            return cls.model_validate(limits, strict=True)
        except ValidationError as error:
            first = error.errors()[0]
            reason = first["msg"]
            if first["type"] == "extra_forbidden":
                reason = f"no such threshold; there are {', '.join(cls.model_fields)}"
            raise InputError(f"{'.'.join(map(str, first['loc']))}: {reason}") from error

    def ask_for(self, *, knn: bool, blocks: bool, scores: bool = True) -> None:
        """Refuse, before anything is measured, a threshold on something that will not be.

        `knn`, `blocks`: whether the run measures neighbours and single blocks; `scores`: whether
        the embedding is class scores.
        Raises InputError that names the threshold.
        """
        measures = {"knn_top1_drop": knn, "block_cosine_mean": blocks, "top1_agreement": scores}
        for name, measured in measures.items():
            if getattr(self, name) is not None and not measured:
                raise _unmeasured(name)

    def check(
        self, measured: Mapping[str, float | None], blocks: Sequence[tuple[str, float]]
    ) -> list[Check]:
        """Compare what was measured, by threshold, and each block's (name, mean cosine).

        Raises InputError for a threshold of something that was not measured, with how to.
        """
        checks = []
        for name, limit in self.model_dump(exclude={"block_cosine_mean"}).items():
            if limit is None:
                continue
            value = measured.get(name)
            if value is None:
                raise _unmeasured(name)
            bound: Literal["at least", "at most"] = "at most" if name in _AT_MOST else "at least"
            checks.append(Check(name=name, value=value, bound=bound, limit=limit))
        if self.block_cosine_mean is not None:
            if not blocks:
                raise _unmeasured("block_cosine_mean")
            checks += [
                Check(
                    name=f"{name} cosine_mean",
                    value=value,
                    bound="at least",
                    limit=self.block_cosine_mean,
                )
                for name, value in blocks
            ]
        return checks


_AT_MOST = {"knn_top1_drop", "pixel_difference"}
_HOW_TO_MEASURE = {
    "patch_cosine_mean": "the encoder has no output with a row for every patch",
    "top1_agreement": "the embedding is not known to be class scores: add --class-scores if it is",
    "knn_top1_drop": "add --gallery and --query",
    "block_cosine_mean": "add --per-layer",
    "pixel_difference": "compare with PyTorch, and a source that has a processor",
}


def how_to_measure(name: str) -> str:
    """What to do for the threshold `name` to be measured, or why it cannot be, in words."""
    return _HOW_TO_MEASURE[name]


def _unmeasured(name: str) -> InputError:
    return InputError(f"threshold {name}: not measured: {how_to_measure(name)}")


def finite_check(n_nonfinite: int) -> Check:
    """The check, made always, that no image gives NaN or infinity."""
    return Check(name="n_nonfinite", value=float(n_nonfinite), bound="at most", limit=0.0)
