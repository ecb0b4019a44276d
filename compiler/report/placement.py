"""The section on what stays float, and what other shares of int8 would cost."""

from regcache.compiler.artifact.manifest import Manifest
from regcache.compiler.report.page import Cell, Figure, Part, Section, Sentence, Table
from regcache.compiler.report.plot import (
    WIDE,
    Dot,
    Line,
    Plot,
    Series,
    Tick,
    limits,
    polyline,
    short,
    x_scale,
    y_scale,
)
from regcache.compiler.report.sites import damages, why_no_damage
from regcache.compiler.report.subject import Subject

_HEIGHT = 310


def placement_section(subject: Subject) -> Section:
    """Which layers stay float, why, and the trade of quantized share against error."""
    manifest = subject.manifest
    quantization, options = manifest.quantization, manifest.options
    parts: list[Part] = []
    if not options.precision.quantizes:
        parts.append(Sentence(f"Everything is float: it computes in {options.precision.value}."))
    elif quantization.activation_bits is None:
        parts.append(Sentence("All activations stay float; only weights are of fewer bits."))
    else:
        left = ", ".join(quantization.left_float) or "no layer"
        parts.append(
            Sentence(
                f"{quantization.int8_share:.1%} of the linears' work is quantized "
                f"({_asked(manifest)}). In float: {left}."
            )
        )
    if quantization.pareto:
        parts.append(_curve(subject))
    elif options.precision.quantizes:
        parts.append(Sentence(f"There is no curve of other shares. {why_no_damage(manifest)}"))
    return Section("float", "What stays float", parts)


def _asked(manifest: Manifest) -> str:
    """What decided how much is quantized, in words."""
    bound, options = manifest.quantization.bound, manifest.options
    if bound is not None:
        return (
            f"--min-cosine {bound.min_cosine} was asked for: {bound.cosine:.6f} on "
            f"{bound.images} images that calibrated nothing, after {len(bound.tried)} tries"
        )
    if options.prefer is not None:
        return "--prefer fastest decides by predicted time"
    return f"at least {options.share:.0%} was asked for"


def _curve(subject: Subject) -> Figure:
    quantization = subject.manifest.quantization
    points, left = quantization.pareto, set(quantization.left_float)
    shares = [point.share for point in points]
    x, y = x_scale(0.0, 1.0), y_scale(*limits([point.error for point in points]), _HEIGHT)
    places = [(x(point.share), y(point.error)) for point in points]
    dots = [
        Dot(*place, "a", f"{point.share:.1%} quantized, error {short(point.error)}")
        for place, point in zip(places, points, strict=True)
    ]
    # The choice may pass over a site that is too large: it need not lie on the curve.
    damage = damages(subject.manifest)
    error = sum(damage[site] for site in damage if site not in left)
    chosen = Dot(
        x(quantization.int8_share), y(error), "b",
        f"shipped: {quantization.int8_share:.1%} quantized, error {short(error)}",
        large=True,
    )  # fmt: skip
    percents = [Tick(x(part / 10), f"{part * 10} %", bool(part % 4)) for part in range(0, 11, 2)]
    plot = Plot(
        "Error left over the share that is quantized",
        f"{len(points)} points, from {shares[0]:.1%} quantized with an error of "
        f"{short(points[0].error)} to none; {quantization.int8_share:.1%} ships.",
        WIDE, _HEIGHT, percents, y.ticks(), "share of the linears' work that is quantized",
        "error left, in sum", lines=[Line(polyline(places), "a")], dots=[*dots, chosen],
    )  # fmt: skip
    rows: list[list[Cell]] = [
        [
            point.left_float or "none",
            "stays float" if point.left_float in left else "",
            f"{point.share:.2%}",
            short(point.error),
        ]
        for point in points
    ]
    header = ("next to become float", "as shipped", "share left", "error left")
    table = Table("The trade, point by point", header, rows, texts=2)
    about = (
        "Each dot makes one more layer float, those of most damage for their work first. The "
        "error is 1 - cosine of every layer still quantized, measured alone, in sum. --int8-share "
        "chooses another point."
    )
    legend: list[tuple[Series, str, bool]] = [("a", "possible", False), ("b", "shipped", False)]
    return Figure("Share against error", about, [plot], table, legend)
