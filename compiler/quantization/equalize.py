"""An encoder with the channels of its activations moved and evened out."""

from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

from threadpoolctl import threadpool_limits

from regcache.compiler.calibration.folds import Folded, Halved, Observed
from regcache.compiler.calibration.quantizer import Quantizer
from regcache.compiler.encoder.prepare import FloatEncoder
from regcache.compiler.pass_record import PassRecord, pass_record
from regcache.compiler.quantization.factors import (
    Equalization,
    Standing,
    choose_equalization,
    rules_for,
)
from regcache.compiler.quantization.shifts import Shift, choose_shift, is_shiftable, refine_shift
from regcache.passes.affine import Affine
from regcache.passes.base import Pass, run
from regcache.passes.encoder import EncoderView, Site
from regcache.passes.equalize import Equalize, foldable
from regcache.passes.external_weights import let_go
from regcache.passes.find_blocks import view_encoder
from regcache.passes.shift_activations import ShiftActivations
from regcache.runtime.session import available_cpus


@dataclass(frozen=True)
class Equalized:
    """An encoder with its channels evened out, and what calibration would see in it.

    `statistics`: by the names that activations have now; `for_scales`: the same, but what images
    look like that had no say in how channels were moved, where they were. `scales`: those of
    activations that were moved for one scale and no other. `how`: what was done to a site, by the
    site's name. `even`: what of it equalizes `original`, where channels were moved too.
    """

    encoder: FloatEncoder
    original: FloatEncoder
    even: Equalize | None
    statistics: dict[str, Observed]
    for_scales: dict[str, Observed]
    scales: dict[str, Affine]
    how: dict[str, str]
    logs: list[PassRecord]

    def unmoved(self) -> FloatEncoder:
        """The encoder with channels evened out alone.

        For what rounds to nearest with scales of its own: a constant in an activation needs its
        bias corrected. Made anew on each call, for its weights are a copy.
        """
        if self.even is None:
            return self.encoder
        view, _ = _run(self.even, self.original.view, [])
        return _with_view(self.original, view)


def equalize_encoder(
    encoder: FloatEncoder,
    statistics: Mapping[str, Halved],
    quantizer: Quantizer,
    threads: int | None = None,
) -> Equalized:
    """Move channels and even them out where that helps; the encoder computes the same.

    Activations are chosen for side by side, each by one of `threads`, so nothing depends on those.
    """

    def choose(site: Site) -> _Choice:
        chosen = _choose(site, statistics[site.tensor.name], quantizer, encoder.view)
        for linear in site.linears:
            let_go(linear.weight)
        return chosen

    sites = encoder.view.sites
    with threadpool_limits(1, "blas"), ThreadPoolExecutor(threads or available_cpus()) as pool:
        found = pool.map(choose, sites)
        choices = {site.tensor.name: one for site, one in zip(sites, found, strict=True)}
    shifts = {name: one.shift for name, one in choices.items() if one.shift is not None}
    even = {name: one.even for name, one in choices.items() if one.even is not None}
    return _apply(encoder, statistics, shifts, even)


@dataclass(frozen=True)
class _Choice:
    """What is done to one activation."""

    shift: Shift | None = None
    even: Equalization | None = None


def _choose(site: Site, statistics: Halved, quantizer: Quantizer, view: EncoderView) -> _Choice:
    seen, free = Folded.of(statistics), foldable(view, site)
    if not seen.folds or not (rules_for(quantizer, free=free) or is_shiftable(quantizer)):
        return _Choice()
    now = Standing.untouched(site, seen, quantizer)
    shift = choose_shift(now, quantizer)
    if shift is not None:
        now = replace(now, seen=seen.shifted(shift.values), error=shift.error)
    even = choose_equalization(now, quantizer, free=free)
    if even is not None:
        now = replace(now, factors=even.factors, error=even.error)
    return _Choice(refine_shift(now, shift, quantizer), even)


def as_it_is(encoder: FloatEncoder, statistics: Mapping[str, Halved]) -> Equalized:
    """The encoder unchanged."""
    return _apply(encoder, statistics, {}, {})


def _apply(
    encoder: FloatEncoder,
    statistics: Mapping[str, Halved],
    shifts: Mapping[str, Shift],
    chosen: Mapping[str, Equalization],
) -> Equalized:
    """Run the passes, sites by sites; what a pass refuses stays as it was."""
    logs, how = list[PassRecord](), dict[str, list[str]]()
    names = {site.name: site.tensor.name for site in encoder.view.sites}
    seen = {site: Folded.of(statistics[name]) for site, name in names.items()}
    moves = {site: shifts[name] for site, name in names.items() if name in shifts}
    scales = {site: chosen[name] for site, name in names.items() if name in chosen}

    shifting = ShiftActivations({names[site]: one.values.whole for site, one in moves.items()})
    view, done = _run(shifting, encoder.view, logs)
    for site, what in done.items():
        seen[site] = seen[site].shifted(moves[site].values)
        how.setdefault(site, []).append(f"{moves[site].name} taken off, {what}")

    moved, fixed = frozenset(done), {site: moves[site].scale for site in done}
    names = {site.name: site.tensor.name for site in view.sites}
    equalizing = Equalize({names[site]: one.factors.whole for site, one in scales.items()})
    view, done = _run(equalizing, view, logs)
    for site, what in done.items():
        seen[site] = seen[site].divided(scales[site].factors)
        how.setdefault(site, []).append(f"{scales[site].rule}, {what}")
    fixed = {site: scale for site, scale in fixed.items() if site in done or site not in scales}

    # Channels that were moved fit the images at hand too well.
    for_scales = {
        site.tensor.name: one.held_out if site.name in moved else one.whole
        for site in view.sites
        for one in [seen[site.name]]
    }
    even = Equalize({name: one.factors.whole for name, one in chosen.items()}) if moves else None
    return Equalized(
        _with_view(encoder, view),
        encoder,
        even,
        {site.tensor.name: seen[site.name].whole for site in view.sites},
        for_scales,
        {
            site.tensor.name: scale
            for site in view.sites
            if (scale := fixed.get(site.name)) is not None
        },
        {site: "; ".join(parts) for site, parts in how.items()},
        logs,
    )


def _with_view(encoder: FloatEncoder, view: EncoderView) -> FloatEncoder:
    return replace(encoder, graph=view.graph, view=view)


def _run(
    step: Pass, view: EncoderView, logs: list[PassRecord]
) -> tuple[EncoderView, dict[str, str]]:
    """The view after a pass, and what it did by the name of the site."""
    result = run(step, view.graph)
    if result.log.edits or result.log.skips:
        logs.append(pass_record(step.name, result.log))
    if not result.changed:
        return view, {}
    return view_encoder(result.graph), {edit.site: edit.what for edit in result.log.edits}
