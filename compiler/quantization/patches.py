"""The weights of patch convolutions in integers, rounded by the patches of calibration images."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import numpy as np
import onnx_graphsurgeon as gs
from numpy.typing import NDArray

from regcache.compiler.calibration.gptq import choose_steps, round_by_error
from regcache.passes.affine import Affine
from regcache.passes.quantize_linears import RoundedWeight, quantize_weight
from regcache.passes.walk import name_of

Floats = NDArray[np.float32]
Doubles = NDArray[np.float64]


@dataclass
class PatchMoments:
    """X^T X [K, K] of the patches X [rows, K] of images, by the name of their tensor.

    `sides`: height and width of a patch, by that name.
    """

    sides: Mapping[str, tuple[int, int]]
    grams: dict[str, Doubles] = field(default_factory=dict)
    rows: dict[str, int] = field(default_factory=dict)

    @classmethod
    def of(cls, convolutions: Iterable[gs.Node]) -> "PatchMoments":
        """Of what patch convolutions read; nothing yet."""
        sides = {}
        for node in convolutions:
            _, _, height, width = node.inputs[1].shape
            sides[node.inputs[0].name] = (int(height), int(width))
        return cls(sides)

    def add(self, name: str, images: Floats) -> None:
        """Add images [B, channels, H, W]; what is left of a patch at an edge is not read."""
        height, width = self.sides[name]
        count, channels = images.shape[:2]
        down, across = images.shape[2] // height, images.shape[3] // width
        whole = images[:, :, : down * height, : across * width]
        parts = whole.reshape(count, channels, down, height, across, width)
        patches = parts.transpose(0, 2, 4, 1, 3, 5).reshape(count * down * across, -1)
        gram = (patches.T @ patches).astype(np.float64)
        self.grams[name] = self.grams[name] + gram if name in self.grams else gram
        self.rows[name] = self.rows.get(name, 0) + len(patches)


def round_patches(
    convolutions: Iterable[gs.Node],
    images: Mapping[str, Affine],
    moments: PatchMoments | None,
    bits: int,
) -> dict[str, RoundedWeight]:
    """The rounded weight [K, N] of each convolution, by its name.

    `moments`: of what they read, by which GPTQ rounds; None: to the nearest. `images`: the scales
    of that, whose rounding is noise beside it. Neighbouring pixels are much alike: errors that are
    as large, but cancel where they are, leave a seventh at the output (DINOv2-S).
    """
    last, rounded = 2 ** (bits - 1) - 1, {}
    for node in convolutions:
        name, values = node.inputs[0].name, node.inputs[1].values
        weight = np.ascontiguousarray(values.reshape(len(values), -1).T, np.float32)
        if moments is None:
            rounded[name_of(node)] = quantize_weight(weight, bits)
            continue
        rows = moments.rows[name]
        gram = moments.grams[name] + np.eye(len(weight)) * rows * images[name].scale ** 2 / 12
        steps = choose_steps(weight, np.diag(gram) / rows, last)
        rounded[name_of(node)] = RoundedWeight(round_by_error(weight, gram, steps, last), steps[0])
    return rounded
