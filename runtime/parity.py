"""How close a compiled encoder stays to its float original: the numbers every claim rests on."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from regcache.passes.errors import InputError, printable
from regcache.runtime.parity_result import Compared, ImageCosine, ParityResult, Reference
from regcache.runtime.pixel_parity import PixelParity
from regcache.runtime.similarity import (
    finite_rows,
    nearest_agreement,
    row_cosines,
)
from regcache.runtime.tensor_parity import TensorMeter, TensorParity, first_jump
from regcache.runtime.thresholds import Thresholds, finite_check

# Equal outputs have an infinite ratio, which JSON cannot hold; float32 itself stays below 200 dB.
SQNR_CAP_DB = 200.0

OUTPUT_NAMES = ("pooled", "last_hidden_state")
"""What export calls an encoder's outputs."""
_DEFAULT = Thresholds()


class ParityMeter:
    """Compares two encoders batch by batch, keeping only the pooled embeddings.

    The first output is the pooled embedding (more than two dimensions are flattened per image), the
    second, where both encoders give one with three dimensions, the tokens [B, T, C].
    `prefix_tokens`: how many leading tokens (class, registers) are no patches.
    `output_names`: of all outputs, which are also compared one by one, but for integers and single
    numbers. `tokens`: whether the second output may be the tokens. `class_scores`: whether the
    embedding is a score for each class.
    """

    def __init__(
        self,
        prefix_tokens: int = 1,
        output_names: Sequence[str] = OUTPUT_NAMES,
        *,
        tokens: bool = True,
        class_scores: bool = False,
    ) -> None:
        self.prefix_tokens = prefix_tokens
        self._tokens, self._class_scores = tokens, class_scores
        self._outputs = [TensorMeter(name) for name in output_names]
        self._reference: list[NDArray[Any]] = []
        self._candidate: list[NDArray[Any]] = []
        self._names: list[str] = []
        self._n_nonfinite = 0
        self._patch_sum = 0.0
        self._patch_count = 0

    def update(
        self,
        reference_outputs: Sequence[NDArray[Any]],
        candidate_outputs: Sequence[NDArray[Any]],
        names: Sequence[str],
    ) -> None:
        """Add a batch of B images, one name each.

        Raises InputError when the two encoders' outputs differ in shape.
        """
        pooled = _same_shape("embedding", reference_outputs[0], candidate_outputs[0])
        if len(pooled[0]) != len(names):
            raise ValueError(f"{len(names)} names for {len(pooled[0])} images")
        finite = finite_rows(pooled[0]) & finite_rows(pooled[1])
        has_tokens = self._tokens and all(map(_has_tokens, (reference_outputs, candidate_outputs)))
        if has_tokens:
            truth, found = _same_shape("token output", reference_outputs[1], candidate_outputs[1])
            if truth.shape[1] <= self.prefix_tokens:
                raise InputError(
                    f"the token output {list(truth.shape)} has no patch after {self.prefix_tokens}"
                )
            finite &= finite_rows(truth) & finite_rows(found)
        triples = zip(self._outputs, reference_outputs, candidate_outputs, strict=False)
        cosines = {
            meter.name: meter.update(truth, found)
            for meter, truth, found in triples
            if meter is self._outputs[0] or why_no_cosine(found) is None
        }
        if has_tokens:
            patches = cosines[self._outputs[1].name][:, self.prefix_tokens :]
            self._patch_sum += float(patches.sum())
            self._patch_count += patches.size
        self._reference.append(pooled[0].reshape(len(names), -1).copy())
        self._candidate.append(pooled[1].reshape(len(names), -1).copy())
        self._names += names
        self._n_nonfinite += int((~finite).sum())

    def embeddings(self) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """The embeddings [N, D] of everything added so far: the original's, the candidate's."""
        truth, found = np.concatenate(self._reference), np.concatenate(self._candidate)
        return truth.astype(np.float64), found.astype(np.float64)

    def result(
        self,
        thresholds: Thresholds = _DEFAULT,
        reference: Reference = "pytorch",
        *,
        knn_top1_float: float | None = None,
        knn_top1_quantized: float | None = None,
        blocks: Sequence[TensorParity] | None = None,
        pixels: PixelParity | None = None,
        compared: Compared | None = None,
    ) -> ParityResult:
        """The comparison of everything added so far, held against `thresholds`.

        Raises InputError when there is nothing, or a threshold is of something not measured.
        """
        if not self._names:
            raise InputError("no images were compared")
        truth, found = self.embeddings()
        cosines = row_cosines(truth, found)
        mean, worst = float(cosines.mean()), int(cosines.argmin())
        numbers = {
            "cosine_mean": mean,
            "cosine_min": float(cosines[worst]),
            "sqnr_db": _sqnr_db(truth, found),
            "nn_agreement": float(nearest_agreement(truth, found).mean()),
        }
        patches = self._patch_sum / self._patch_count if self._patch_count else None
        top1 = _top1_agreement(truth, found) if self._class_scores else None
        drop = None
        if knn_top1_float is not None and knn_top1_quantized is not None:
            drop = knn_top1_float - knn_top1_quantized
        checks = thresholds.check(
            {
                **numbers,
                "patch_cosine_mean": patches,
                "top1_agreement": top1,
                "knn_top1_drop": drop,
                "pixel_difference": None if pixels is None else pixels.max_difference,
            },
            [(block.name, block.cosine_mean) for block in blocks or ()],
        )
        checks.append(finite_check(self._n_nonfinite))
        return ParityResult(
            **numbers,
            patch_cosine_mean=patches,
            n_images=len(cosines),
            passed=all(check.passed for check in checks),
            min_cosine=thresholds.cosine_mean,
            reference=reference,
            worst_image=printable(self._names[worst]),
            worst_images=self._worst(cosines),
            n_nonfinite=self._n_nonfinite,
            checks=tuple(checks),
            outputs=tuple(meter.result() for meter in self._outputs if meter.seen),
            blocks=None if blocks is None else tuple(blocks),
            first_jump=None if blocks is None else first_jump(blocks),
            top1_agreement=top1,
            knn_top1_float=knn_top1_float,
            knn_top1_quantized=knn_top1_quantized,
            pixels=pixels,
            compared=compared,
        )

    def _worst(self, cosines: NDArray[np.float64]) -> tuple[ImageCosine, ...]:
        """The five images with the least of their cosines [N]."""
        order = np.argsort(cosines, kind="stable")[:5]
        return tuple(
            ImageCosine(image=printable(self._names[index]), cosine=float(cosines[index]))
            for index in order
        )


def _sqnr_db(reference: NDArray[np.float64], candidate: NDArray[np.float64]) -> float:
    with np.errstate(all="ignore"):
        signal, noise = (reference**2).sum(), ((reference - candidate) ** 2).sum()
    if not np.isfinite(signal + noise):
        return -SQNR_CAP_DB
    if noise == 0:
        return SQNR_CAP_DB
    if signal == 0:
        return -SQNR_CAP_DB
    decibels = 10 * (math.log10(signal) - math.log10(noise))
    return min(max(decibels, -SQNR_CAP_DB), SQNR_CAP_DB)


def _top1_agreement(reference: NDArray[np.float64], candidate: NDArray[np.float64]) -> float:
    """Of scores [N, D], the share of rows whose largest stands in the same place, all finite."""
    finite = finite_rows(reference) & finite_rows(candidate)
    return float((finite & (reference.argmax(axis=1) == candidate.argmax(axis=1))).mean())


def why_no_cosine(output: NDArray[Any]) -> str | None:
    """Why a cosine says nothing of an output [B, ...]; None: each image's has a direction."""
    if output.dtype.kind != "f":
        return "integers"
    return None if output.size > len(output) else "one number for each image"


def _has_tokens(outputs: Sequence[NDArray[Any]]) -> bool:
    return len(outputs) > 1 and outputs[1].ndim == 3


def _same_shape(
    what: str, reference: NDArray[Any], candidate: NDArray[Any]
) -> tuple[NDArray[Any], NDArray[Any]]:
    if reference.shape != candidate.shape:
        raise InputError(
            f"the {what} is {list(candidate.shape)} where the original's is {list(reference.shape)}"
        )
    return reference, candidate
