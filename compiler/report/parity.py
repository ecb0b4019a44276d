"""The section on parity: what was compared, what is held against which limit, image by image."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from regcache.compiler.report.page import Figure, Part, Section, Sentence, Table, Verdict
from regcache.compiler.report.plot import (
    WIDE,
    Label,
    Line,
    Plot,
    Rect,
    limits,
    polyline,
    x_scale,
    y_scale,
)
from regcache.compiler.report.subject import Subject
from regcache.runtime.parity_output import jump_sentence, reference_name, tensor_cells
from regcache.runtime.parity_result import ParityResult
from regcache.runtime.similarity import row_cosines
from regcache.runtime.tensor_parity import TensorParity

_FEWEST_BINS, _MOST_BINS, _HEIGHT = 8, 32, 310
# What the highest bar is multiplied by, so that marks have their names above the bars.
_HEADROOM = 1.4
_FIRST_LOOK = {
    "calibration": "a first look at {count} of the calibration images, which the ranges were "
    "chosen on as well",
    "held-out": "a first look at {count} of the images that calibrated nothing",
    "given": "a first look at {count} of the images that were given when it was compiled",
    "drawn": "a first look at {count} pictures drawn at random, as no images were given",
}
_TENSORS = ("cosine, mean", "cosine, worst", "relative error", "largest difference")


def parity_section(subject: Subject) -> Section:
    """Verdict, limits and outputs; with images, also how the cosines spread."""
    result, record = subject.parity, subject.manifest.parity
    against = reference_name(result)
    if subject.measured is None:
        look = _FIRST_LOOK[record.images].format(count=result.n_images)
        text = (
            f"Compared with {against} in {record.runtime.value}: {look}. For proof on images of "
            "your own, write the report with --images."
        )
    else:
        text = f"Compared with {against} on {result.n_images} images that were given for it."
    parts: list[Part] = [Sentence(text), _checks(result)]
    if subject.measured is not None:
        found = subject.measured.embeddings
        parts.append(_spread(row_cosines(found.original, found.artifact), result))
    parts.append(_others(result))
    if result.outputs:
        parts.append(_tensors("Every output, with all of its tokens", "output", result.outputs))
    if result.blocks:
        parts.append(Sentence(f"Block by block, {jump_sentence(result.first_jump)}."))
        parts.append(_tensors("The hidden state behind every block", "block", result.blocks))
    return Section("parity", "Parity with the original", parts)


def _checks(result: ParityResult) -> Table:
    rows = [
        (check.name, f"{check.value:.5g}", f"{check.bound} {check.limit:g}", Verdict(check.passed))
        for check in result.checks
    ]
    return Table("Limits", ("what", "measured", "limit", "verdict"), rows)


def _others(result: ParityResult) -> Table:
    known = {
        "cosine, mean": f"{result.cosine_mean:.5f}",
        "cosine, worst image": f"{result.cosine_min:.5f}",
        "worst image": result.worst_image,
        "signal to noise": f"{result.sqnr_db:.1f} dB",
        "same nearest neighbour": f"{result.nn_agreement:.1%}",
    }
    if result.patch_cosine_mean is not None:
        known["cosine of patch tokens, mean"] = f"{result.patch_cosine_mean:.5f}"
    if result.top1_agreement is not None:
        known["same top class"] = f"{result.top1_agreement:.1%}"
    if result.pixels is not None:
        known["grey levels between pixels"] = f"{result.pixels.max_difference:.3g}"
    return Table("What was measured", ("what", "value"), list(known.items()))


def _tensors(caption: str, kind: str, tensors: Sequence[TensorParity]) -> Table:
    rows = [tensor_cells(tensor) for tensor in tensors]
    return Table(caption, (kind, *_TENSORS), rows, folded=True)


def _spread(cosines: NDArray[np.float64], result: ParityResult) -> Figure:
    """How many images have which cosine, with the mean and the limit."""
    count = int(np.clip(len(cosines) // 4, _FEWEST_BINS, _MOST_BINS))
    low = float(cosines.min())
    low -= (1 - low) * 0.02 or 1e-6
    counts, edges = np.histogram(cosines, bins=count, range=(low, 1.0))
    x, y = x_scale(low, 1.0), y_scale(*limits([_HEADROOM * counts.max()]), _HEIGHT)
    rects = [
        Rect(
            x(left),
            y(number),
            round(max(x(right) - x(left) - 1.5, 1), 2),
            round(y(0) - y(number), 2),
            "a",
            f"{number} images from {left:.5f} to {right:.5f}",
        )
        for number, left, right in zip(counts, edges, edges[1:], strict=False)
        if number
    ]
    mean = result.cosine_mean
    marks = [(mean, f"mean {mean:.5f}")]
    if low < result.min_cosine < 1:
        marks.append((result.min_cosine, f"limit of the mean {result.min_cosine:g}"))
    ends = [x(value) > WIDE / 2 for value, _ in marks]
    plot = Plot(
        "Cosine to the original, image by image",
        f"A histogram of {len(cosines)} images from {cosines.min():.5f}, the worst, to "
        f"{cosines.max():.5f}; the mean is {mean:.5f}.",
        WIDE,
        _HEIGHT,
        x.ticks(4),
        y.ticks(4),
        "cosine to the original",
        "images",
        rects,
        [Line(polyline([(x(v), y.end), (x(v), y.start)]), "quiet", True) for v, _ in marks],
        labels=[
            Label(x(value) + (-6 if end else 6), y.end + 14 + 26 * number, text, end)
            for number, ((value, text), end) in enumerate(zip(marks, ends, strict=True))
        ],
    )
    shares = (0, 1, 5, 25, 50, 75, 100)
    names = ("worst", "1 %", "5 %", "25 %", "half", "75 %", "best")
    levels = np.percentile(cosines, shares)
    table = Table(
        "Cosines, by the share of images that are no better",
        ("images", "cosine"),
        [(name, f"{level:.6f}") for name, level in zip(names, levels, strict=True)],
    )
    about = (
        "Each image's embedding beside that of the original. One far to the left of the others is "
        "worth a look: it is among the worst images below."
    )
    return Figure("How the images spread", about, [plot], table)
