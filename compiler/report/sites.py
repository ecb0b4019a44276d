"""The sections on sites: what it costs to quantize each, and the ranges that were chosen."""

import re
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import NamedTuple

from regcache.compiler.artifact.manifest import Manifest, SiteRecord
from regcache.compiler.curation.record import SensitivityRecord
from regcache.compiler.job.effort import RegisterChoice
from regcache.compiler.report.page import Figure, Section, Sentence, Table
from regcache.compiler.report.plot import (
    PANEL,
    SERIES,
    WIDE,
    Bands,
    Line,
    Plot,
    Rect,
    Series,
    limits,
    polyline,
    short,
    y_scale,
)
from regcache.compiler.report.subject import Subject
from regcache.passes.errors import InputError

_HEIGHT, _PANEL_HEIGHT = 300, 230
_SITE = re.compile(r"blocks\.(?P<block>\d{1,4})\.(?P<role>.+)")


class Place(NamedTuple):
    """Where a site stands: its block, and the roles of the linears that read it."""

    block: int
    role: str

    @classmethod
    def of(cls, site: str) -> "Place":
        """The place that a site's name tells, such as `blocks.3.q+k+v`.

        Raises InputError for a name that no compilation gives: manifests may come from anywhere.
        """
        found = _SITE.fullmatch(site)
        if found is None:
            raise InputError(f"the manifest names a layer {site!r}, as regcache names none")
        return cls(int(found["block"]), found["role"])


def roles_of(sites: Sequence[str]) -> list[str]:
    """The roles among some sites, in the order in which they first come."""
    return list(dict.fromkeys(Place.of(site).role for site in sites))


def damages(manifest: Manifest) -> dict[str, float]:
    """What quantizing each site costs, alone, by its name; empty where nobody measured it."""
    measured = manifest.curation.sensitivity
    if measured:
        return {record.site: record.damage for record in measured}
    points = manifest.quantization.pareto
    return {
        point.left_float: max(before.error - point.error, 0.0)
        for before, point in pairwise(points)
        if point.left_float is not None
    }


def why_no_damage(manifest: Manifest) -> str:
    """Why the damage of single sites was not measured, in words."""
    options = manifest.options
    if not options.precision.quantizes:
        return f"Nothing is quantized in {options.precision.value}, so that nothing can lose by it."
    if manifest.quantization.activation_bits is None:
        return "Activations stay float, so that no layer was quantized alone to see what it costs."
    if options.registers is RegisterChoice.OFF:
        return (
            "Neither registers nor linears to keep float were asked for, so that no layer was "
            "quantized alone to see what it costs."
        )
    return f"No layer was quantized alone to see what it costs: {manifest.curation.reason}."


def sensitivity_section(subject: Subject) -> Section:
    """What quantizing each layer costs, by block."""
    name, title = "sensitivity", "What each layer costs"
    found = damages(subject.manifest)
    if not found:
        return Section(name, title, [Sentence(why_no_damage(subject.manifest))])
    records = {record.site: record for record in subject.manifest.curation.sensitivity}
    worst = max(found, key=lambda site: found[site])
    text = (
        "How far the outputs move from float (1 - cosine, the mean over a few images) where one "
        f"layer alone is quantized. {worst} costs most: {short(found[worst])}."
    )
    if records:
        some = sum(record.alone for record in records.values())
        text += (
            f" {some} layers were measured alone; the others have their share of what their block "
            "cost as a whole."
        )
    ordered = sorted(found, key=lambda site: -found[site])
    rows = [(site, *_outlier(records.get(site)), short(found[site])) for site in ordered]
    header = ("layer", "largest value in", "largest value", "largest / median token", "damage")
    table = Table("Damage of every layer, most first", header, rows, texts=2)
    about = "One bar is a block; its parts are the layers that read one activation each."
    figure = Figure(
        "Damage by block", about, [_stack(found)], table, _legend(roles_of(list(found)))
    )
    return Section(name, title, [Sentence(text), figure])


def _outlier(record: SensitivityRecord | None) -> tuple[str, str, str]:
    """What holds a layer's largest value, that value, and how far its token stands out."""
    if record is None:
        return "", "", ""
    holder = f"{record.holder} token {record.token}"
    return holder, f"{record.value:.3g}", f"{record.outlier_ratio:.2f}"


def _legend(roles: Sequence[str]) -> list[tuple[Series, str, bool]]:
    return [(_series(roles, role), role, False) for role in roles]


def _series(roles: Sequence[str], role: str) -> Series:
    return SERIES[roles.index(role) % len(SERIES)]


def _stack(found: Mapping[str, float]) -> Plot:
    """A bar for each block, of its sites' damage one upon the other."""
    roles, places = roles_of(list(found)), {Place.of(site): site for site in found}
    depth = 1 + max(place.block for place in places)
    totals = [0.0] * depth
    for place, site in places.items():
        totals[place.block] += found[site]
    bands, y = Bands(depth), y_scale(*limits(totals), _HEIGHT)
    rects = []
    for block in range(depth):
        base, (left, wide) = 0.0, bands.bar(block)
        for role in roles:
            name = places.get(Place(block, role), "")
            damage = found.get(name, 0.0)
            if damage:
                top, says = y(base + damage), f"{name}: {short(damage)}"
                high = round(y(base) - top, 2)
                rects.append(Rect(left, top, wide, high, _series(roles, role), says))
                base += damage
    most = max(range(depth), key=lambda block: totals[block])
    summary = f"Bars for {depth} blocks; block {most} costs most, {short(totals[most])} in sum."
    return Plot(
        "Damage of quantizing the layers of each block", summary, WIDE, _HEIGHT,
        bands.ticks(), y.ticks(), "block", "1 - cosine to float", rects,
    )  # fmt: skip


def ranges_section(subject: Subject) -> Section:
    """What values every quantized activation took, and which its integers can stand for."""
    name, title = "ranges", "Calibrated ranges"
    quantization = subject.manifest.quantization
    if not quantization.sites:
        why = (
            "Nothing is quantized" if not subject.manifest.options.precision.quantizes
            else "Activations stay float" if quantization.activation_bits is None
            else "Every layer stays float"
        )  # fmt: skip
        return Section(name, title, [Sentence(f"{why}: there are no ranges to choose.")])
    sites = quantization.sites
    clipped = [site for site in sites if _clips(site)]
    text = (
        f"An activation becomes {quantization.activation_dtype}: its range decides how fine the "
        f"steps are and what is cut off. {len(clipped)} of {len(sites)} ranges cut off the "
        "largest values, because finer steps for all others lost less. What is cut off shows as "
        "an outline beyond the filled bar."
    )
    roles = roles_of([site.site for site in sites])
    plots = [_panel(role, [s for s in sites if Place.of(s.site).role == role]) for role in roles]
    rows = [
        (
            site.site, site.dtype, site.equalization or "no",
            f"{site.observed[0]:.4g}", f"{site.observed[1]:.4g}",
            f"{site.covered[0]:.4g}", f"{site.covered[1]:.4g}",
            f"{site.scale:.4g}", str(site.zero_point),
        )
        for site in sites
    ]  # fmt: skip
    header = (
        "layer", "format", "equalized", "least seen", "largest seen", "covered from", "to",
        "step", "zero point",
    )  # fmt: skip
    table = Table("Ranges of every quantized activation", header, rows, texts=3)
    legend: list[tuple[Series, str, bool]] = [("a", "covered", False), ("quiet", "seen", True)]
    figure = Figure(
        "Ranges by layer and block",
        "Values that integers can stand for, and those that were seen while calibrating.",
        plots,
        table,
        legend,
    )
    return Section(name, title, [Sentence(text), figure])


def _clips(site: SiteRecord) -> bool:
    """Whether more than half a step is cut off at an end."""
    spare = site.scale / 2 if not site.dtype.startswith("float") else 0.0
    low, high = site.covered[0] - site.observed[0], site.observed[1] - site.covered[1]
    return low > spare or high > spare


def _panel(role: str, sites: Sequence[SiteRecord]) -> Plot:
    places = [Place.of(site.site).block for site in sites]
    bands = Bands(1 + max(places), PANEL)
    ends = [end for site in sites for end in (*site.observed, *site.covered)]
    y = y_scale(*limits(ends), _PANEL_HEIGHT)
    rects = []
    for block, site in zip(places, sites, strict=True):
        left, wide = bands.bar(block)
        low, high = site.covered
        says = f"{site.site}: covered {low:.4g} to {high:.4g}"
        rects.append(Rect(left, y(high), wide, round(y(low) - y(high), 2), "a", says))
        low, high = site.observed
        seen = (left, y(high), wide, round(y(low) - y(high), 2))
        rects.append(Rect(*seen, "quiet", f"{site.site}: seen {low:.4g} to {high:.4g}", True))
    zero = Line(polyline([(bands(-0.5), y(0)), (bands(bands.count - 0.5), y(0))]), "quiet")
    widest = max(sites, key=lambda site: site.covered[1] - site.covered[0])
    return Plot(
        f"Ranges of {role}",
        f"One bar a block; the widest is {widest.site}, {widest.covered[0]:.3g} to "
        f"{widest.covered[1]:.3g}.",
        PANEL, _PANEL_HEIGHT, bands.ticks(), y.ticks(3), "block", role, rects, [zero],
    )  # fmt: skip
