"""A comparison held against an earlier one: whether it has become worse, and by more than noise."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from math import log10
from pathlib import Path
from typing import BinaryIO, Literal, Self

from pydantic import ValidationError

from regcache.passes.errors import InputError
from regcache.passes.read_small import read_small
from regcache.runtime.parity_result import Compared, ParityResult
from regcache.runtime.stored_images import AnyImage, open_image_file
from regcache.runtime.thresholds import Check, how_to_measure

DEFAULT_MAX_REGRESSION = 0.2
"""By how much the error may grow, as a share of the baseline's."""
# One image says less than the mean over all.
_WORST_IMAGE = 3
# Of shares of images, so many may change sides.
_SPARE_IMAGES = 2
# What float32 alone leaves of a cosine: an original held against itself would fail by it.
_FLOOR = 1e-6
_CHUNK = 1 << 20
_SHARES = ("nn_agreement", "top1_agreement", "knn_top1_quantized")
_MEASURED_BY = {"top1_agreement": "top1_agreement", "knn_top1_quantized": "knn_top1_drop",
                "patch_cosine_mean": "patch_cosine_mean"}  # fmt: skip


@dataclass(frozen=True)
class Baseline:
    """An earlier comparison, and by how much of its error a later one may be worse."""

    file: Path
    result: ParityResult
    max_regression: float = DEFAULT_MAX_REGRESSION

    @classmethod
    def read(cls, file: Path, max_regression: float = DEFAULT_MAX_REGRESSION) -> Self:
        """Read what `parity --json` wrote.

        Raises InputError, naming the file, where it is none or does not say what was compared.
        """
        if not 0 <= max_regression < float("inf"):
            raise InputError(f"--max-regression {max_regression}: a share from 0 up is wanted")
        try:
            result = ParityResult.model_validate_json(read_small(file))
        except OSError as error:
            raise InputError(f"baseline {file}: {error.strerror or error}") from error
        except ValidationError as error:
            raise InputError(f"baseline {file}: is no JSON of this version's parity") from error
        if result.compared is None:
            raise InputError(f"baseline {file}: does not say what was compared: measure it anew")
        return cls(file, result, max_regression)

    def check_alike(self, compared: Compared) -> None:
        """Raise InputError, in one line, where other images or another source were compared."""
        before = self.result.compared
        assert before is not None
        if before.images_sha256 != compared.images_sha256:
            raise InputError(f"baseline {self.file}: is of other images than --images")
        names = before.source, compared.source
        if names[0] != names[1] and before.source_sha256 != compared.source_sha256:
            raise InputError(f"baseline {self.file}: is of {names[0]}, and this of {names[1]}")

    def hold(self, result: ParityResult) -> ParityResult:
        """The result with a check for each figure of the baseline, and its verdict by all checks.

        Raises InputError where the baseline was compared with another kind of original, or has a
        figure that the result has not.
        """
        if result.reference != self.result.reference:
            raise InputError(
                f"baseline {self.file}: compares with {self.result.reference}, and this with "
                f"{result.reference}: choose by --reference"
            )
        checks = (*result.checks, *self._checks(result))
        passed = all(check.passed for check in checks)
        return result.model_copy(update={"checks": checks, "passed": passed})

    def _checks(self, result: ParityResult) -> list[Check]:
        before, grown = self.result, 1 + self.max_regression
        limits = {
            "cosine_mean": _away(before.cosine_mean, grown),
            "cosine_min": _away(before.cosine_min, 1 + _WORST_IMAGE * self.max_regression),
            "sqnr_db": before.sqnr_db - 10 * log10(grown),
            "patch_cosine_mean": _away(before.patch_cosine_mean, grown),
        }
        for name in _SHARES:
            limits[name] = self._share(getattr(before, name))
        checks = []
        for name, limit in limits.items():
            if limit is None:
                continue
            value = getattr(result, name)
            if value is None:
                how = how_to_measure(_MEASURED_BY[name])
                raise InputError(f"baseline {self.file}: has {name}, not measured now: {how}")
            checks.append(_check(f"{name} since the baseline", value, limit))
        return checks

    def _share(self, before: float | None) -> float | None:
        """The least of a share of images: their number says how coarse it is."""
        if before is None:
            return None
        spare = max((1 - before) * self.max_regression, _SPARE_IMAGES / self.result.n_images)
        return max(before - spare, 0.0)


def fingerprint(images: Sequence[AnyImage]) -> str:
    """SHA-256 of the images' contents, whatever their names and order; of unreadable ones nothing.

    64 hexadecimal digits.
    """
    digests = []
    for image in images:
        try:
            with open_image_file(image) as stream:
                digests.append(_digest(stream))
        except OSError:  # told of where it is read to be compared
            continue
    return hashlib.sha256(b"".join(sorted(digests))).hexdigest()


def _digest(stream: BinaryIO) -> bytes:
    digest = hashlib.sha256()
    while chunk := stream.read(_CHUNK):
        digest.update(chunk)
    return digest.digest()


def _away(cosine: float | None, grown: float) -> float | None:
    """The least cosine where what is missing to 1 may grow so many times."""
    return None if cosine is None else max(1 - (1 - cosine) * grown - _FLOOR, -1.0)


def _check(name: str, value: float, limit: float) -> Check:
    bound: Literal["at least"] = "at least"
    return Check(name=name, value=value, bound=bound, limit=limit)
