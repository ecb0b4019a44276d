"""The section on outliers: in which block they arise, and what is left of them."""

from collections.abc import Sequence

from regcache.compiler.curation.record import CurationRecord
from regcache.compiler.inspection.record import BlockRecord
from regcache.compiler.report.page import Cell, Figure, Part, Section, Sentence, Table
from regcache.compiler.report.plot import (
    PANEL,
    WIDE,
    Bands,
    Dot,
    Line,
    Plot,
    Series,
    limits,
    polyline,
    short,
    y_scale,
)
from regcache.compiler.report.sites import Place, damages, roles_of, why_no_damage
from regcache.compiler.report.subject import Outliers, Subject

_HEIGHT, _PANEL_HEIGHT = 300, 230

_READY = "rotated and equalized"

Curve = tuple[str, Series, list[float | None], bool]
"""A name, its series, a value for each place in a row or None, and whether it is dashed."""


def outliers_section(subject: Subject) -> Section:
    """Norms of tokens by block, and how far an activation's largest token stands out."""
    measured = None if subject.measured is None else subject.measured.outliers
    curation = subject.manifest.curation
    parts: list[Part] = [Sentence(_introduction(subject))]
    if measured is not None or curation.streams:
        parts.append(_stream_figure(curation, measured))
    if measured is not None or curation.sensitivity:
        parts.append(_site_figure(curation, measured))
    parts += [Sentence(text) for text in _missing(subject)]
    if curation.universality is not None:
        parts.append(Sentence(_universality(curation)))
    return Section("outliers", "Where outliers arise", parts)


def _introduction(subject: Subject) -> str:
    text = (
        "A few tokens with massive activations widen the range that all tokens share: every step "
        "of the integers becomes coarser for the rest."
    )
    measured = None if subject.measured is None else subject.measured.outliers
    streams = subject.manifest.curation.streams
    maxima = [item.maximum for item in streams]
    if measured is not None:
        maxima = [b.stream.linf.maximum for b in measured.before if b.stream is not None]
    if not maxima:
        return text
    at = max(range(len(maxima)), key=lambda number: maxima[number])
    where = f"block {at if measured is not None else at - 1}"
    where = "the embeddings" if measured is None and at == 0 else where
    return f"{text} The largest token of this encoder stands behind {where}: {short(maxima[at])}."


def _missing(subject: Subject) -> list[str]:
    """What the section does not show, and why."""
    found, manifest = [], subject.manifest
    if not manifest.curation.streams and not manifest.curation.sensitivity:
        why = "" if damages(manifest) else f" {why_no_damage(manifest)}"
        found.append(f"While compiling, nothing was measured of it.{why}")
    if subject.measured is None:
        beside = " beside what is quantized" if manifest.curation.sensitivity else ""
        beside += " and with its registers" if manifest.curation.setting.changes else ""
        found.append(
            f"To see the float encoder as it was exported{beside}, write the report with --images."
        )
    elif subject.measured.outliers is None:
        found.append(
            "The artifact keeps no float.onnx (--no-float): its encoder cannot be looked into."
        )
    return found


def _universality(curation: CurationRecord) -> str:
    found = curation.universality
    assert found is not None
    if not found.outliers:
        return f"Behind block {found.block}, no token stands out from the others (mean + 3 sigma)."
    return (
        f"Behind block {found.block}, {found.outliers} tokens stand out (mean + 3 sigma). Those of "
        f"different images are alike with a cosine of {found.largest:.2f}, ordinary tokens with "
        f"{found.ordinary:.2f}: near 1, one register can stand for all of them."
    )


def _stream_figure(curation: CurationRecord, measured: Outliers | None) -> Figure:
    """Norms behind every block: of the median, the 99th percentile and the largest token."""
    curves: list[Curve] = []
    if measured is None:
        streams, first = curation.streams, -1
        what = "on the reference images of the search, in float"
        curves += [
            ("largest token", "a", [item.maximum for item in streams], False),
            ("99 % are below", "b", [item.p99 for item in streams], False),
            ("median token", "quiet", [item.median for item in streams], False),
        ]
    else:
        first, what = 0, f"on {measured.n_images} of the images, in float"
        norms = [block.stream.linf for block in measured.before if block.stream is not None]
        plain = " without registers" if measured.after is not None else ""
        curves += [
            (f"largest token{plain}", "a", [item.maximum for item in norms], False),
            (f"99 % are below{plain}", "b", [item.p99 for item in norms], False),
            (f"median token{plain}", "quiet", [item.median for item in norms], False),
        ]
        if measured.after is not None:
            with_them = [b.stream.linf for b in measured.after if b.stream is not None]
            curves.insert(
                1, ("largest token with registers", "c", [n.maximum for n in with_them], True)
            )
    about = (
        f"l-infinity norms of the residual stream's tokens, {what}. Where the largest token leaves "
        "the others behind, an outlier arises. The scale is logarithmic."
    )
    names = ["embeddings" if n + first < 0 else str(n + first) for n in range(len(curves[0][2]))]
    plot = _curves("Norms of tokens behind every block", curves, first, WIDE, _HEIGHT)
    return Figure("The residual stream, block by block", about, [plot], _table(curves, names),
                  [(series, name, False) for name, series, _, _ in curves])  # fmt: skip


def _table(curves: Sequence[Curve], names: Sequence[str]) -> Table:
    rows: list[list[Cell]] = [
        [name, *("" if (value := curve[2][at]) is None else short(value) for curve in curves)]
        for at, name in enumerate(names)
    ]
    return Table("Norms behind every block", ("block", *(curve[0] for curve in curves)), rows)


def _curves(title: str, curves: Sequence[Curve], first: int, width: float, height: float) -> Plot:
    values = [value for curve in curves for value in curve[2] if value is not None]
    bands, y = Bands(len(curves[0][2]), width), y_scale(*limits(values, log=True), height, log=True)
    lines, dots = [], []
    for name, series, row, dashed in curves:
        points = [(bands(at), y(v)) for at, v in enumerate(row) if v is not None and v > 0]
        lines.append(Line(polyline(points), series, dashed))
        dots += [
            Dot(bands(at), y(v), series, f"{name}, block {at + first}: {short(v)}")
            for at, v in enumerate(row)
            if v is not None and v > 0
        ]
    most = max(curves, key=lambda curve: max(v for v in curve[2] if v is not None))
    summary = (
        f"{len(curves)} lines over {bands.count} places; {most[0]} reaches {short(max(values))}."
    )
    ticks = bands.ticks(first)
    if first < 0 and ticks:
        ticks = [ticks[0].__class__(ticks[0].at, "in", ticks[0].minor), *ticks[1:]]
    return Plot(
        title, summary, width, height, ticks, y.ticks(), "behind block", "l-infinity norm",
        lines=lines, dots=dots,
    )  # fmt: skip


def _site_figure(curation: CurationRecord, measured: Outliers | None) -> Figure:
    """Largest over median token of every activation, as exported and as it is quantized."""
    ready = {record.site: record.outlier_ratio for record in curation.sensitivity}
    plain = {} if measured is None else _ratios(measured.before)
    placed = {} if measured is None or measured.after is None else _ratios(measured.after)
    stages: list[tuple[str, Series, dict[str, float]]] = [
        ("as exported", "quiet", plain),
        ("with registers", "c", placed),
        (_READY + ("" if not curation.setting.changes else ", without registers"), "a", ready),
    ]
    stages = [stage for stage in stages if stage[2]]
    sites = list(dict.fromkeys(site for _, _, values in stages for site in values))
    plots = [_ratio_panel(role, stages, sites) for role in roles_of(sites)]
    rows: list[list[Cell]] = [
        [site, *(f"{values[site]:.3g}" if site in values else "" for _, _, values in stages)]
        for site in sites
    ]
    table = Table(
        "Largest over median token", ("activation", *(name for name, _, _ in stages)), rows
    )
    about = (
        "How far the largest token of what a layer reads stands above the median one (l-infinity "
        "norms). Near 1, no token widens the range. The scale is logarithmic."
    )
    legend = [(series, name, series == "quiet") for name, series, _ in stages]
    return Figure("What the layers read", about, plots, table, legend)


def _ratios(blocks: Sequence[BlockRecord]) -> dict[str, float]:
    return {
        f"blocks.{block.index}.{item.site}": item.outlier_ratio
        for block in blocks
        for item in block.activations or ()
        if item.outlier_ratio > 0
    }


def _ratio_panel(
    role: str, stages: Sequence[tuple[str, Series, dict[str, float]]], sites: Sequence[str]
) -> Plot:
    own = [site for site in sites if Place.of(site).role == role]
    values = [found[site] for _, _, found in stages for site in own if site in found]
    depth = 1 + max(Place.of(site).block for site in own)
    bands = Bands(depth, PANEL)
    y = y_scale(*limits([1.0, *values], log=True), _PANEL_HEIGHT, log=True)
    lines, dots = [], []
    for site in own:
        at = bands(Place.of(site).block)
        marks = [(series, found[site], name) for name, series, found in stages if site in found]
        ends = [(at, y(value)) for _, value, _ in marks]
        if len(ends) > 1:
            lines.append(Line(polyline(ends), "quiet"))
        dots += [
            Dot(at, y(value), series, f"{site}, {name}: {value:.3g}", series == "quiet")
            for series, value, name in marks
        ]
    worst = max(values, default=0.0)
    return Plot(
        f"Largest over median token, {role}",
        f"Dots for {depth} blocks; the largest is {worst:.3g}.",
        PANEL, _PANEL_HEIGHT, bands.ticks(), y.ticks(3), "block", role, lines=lines, dots=dots,
    )  # fmt: skip
