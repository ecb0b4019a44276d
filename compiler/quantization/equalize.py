"""The stage that shifts the channels of activations and equalizes them."""

from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray
from threadpoolctl import threadpool_limits

from regcache.compiler.calibration.calibrate import Calibrated
from regcache.compiler.calibration.folds import Folded, Halved, Observed
from regcache.compiler.calibration.mapped import go_on_with
from regcache.compiler.calibration.quantizer import Quantizer
from regcache.compiler.encoder.float_encoder import FloatEncoder
from regcache.compiler.job.context import Context
from regcache.compiler.job.stages import Stage
from regcache.compiler.quantization.factors import (
    Equalization,
    Standing,
    choose_equalization,
    rules_for,
)
from regcache.compiler.quantization.shifts import Shift, choose_shift, refine_shift
from regcache.compiler.reporter import Reporter
from regcache.passes.affine import Affine
from regcache.passes.base import Pass, run_all
from regcache.passes.encoder import EncoderView, Site
from regcache.passes.equalize import Equalize, foldable
from regcache.passes.external_weights import let_go
from regcache.passes.shift_activations import ShiftActivations
from regcache.runtime.session import available_cpus

Floats = NDArray[np.float32]


@dataclass(frozen=True)
class Activation:
    """An activation that linears read, as it stands after equalizing.

    `seen`: what calibration would see of it; `for_scale`: the same, but of images that had no say
    in how its channels were shifted, where they were. `scale`: the one that it was shifted for and
    no other. `factors` [K]: what its channels are divided by; `how`: what was done, in words.
    """

    seen: Observed
    for_scale: Observed
    scale: Affine | None = None
    factors: Floats | None = None
    how: str | None = None


@dataclass(frozen=True)
class Equalized:
    """An encoder whose channels are shifted and equalized, and its activations by site name."""

    encoder: FloatEncoder
    activations: Mapping[str, Activation]


def equalize(context: Context, encoder: FloatEncoder, calibrated: Calibrated) -> Equalized:
    """Shift channels and equalize them where that helps; the encoder computes the same."""
    options = context.options
    if not options.equalize:
        return as_it_is(encoder, calibrated.statistics)
    context.reporter.begin(Stage.EQUALIZE)
    found = equalize_encoder(
        encoder, calibrated.statistics, Quantizer.of(context), options.threads, context.reporter
    )
    go_on_with(found.encoder.graph, encoder.graph, context.scratch)
    return found


def without_shifts(context: Context, encoder: FloatEncoder, equalized: Equalized) -> FloatEncoder:
    """`encoder`, of which `equalized` was made, with its channels equalized but not shifted.

    For what rounds to the nearest with scales of its own: a constant in an activation needs its
    bias corrected.
    """
    if all(one.for_scale is one.seen for one in equalized.activations.values()):
        return equalized.encoder
    found = encoder.after([_equalizing(encoder.view, equalized.activations)])
    go_on_with(found.graph, encoder.graph, context.scratch)
    return found


def equalize_encoder(
    encoder: FloatEncoder,
    statistics: Mapping[str, Halved],
    quantizer: Quantizer,
    threads: int | None = None,
    reporter: Reporter | None = None,
) -> Equalized:
    """Shift channels and equalize them where that helps, by statistics of every tensor's name.

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
        if reporter is not None:
            found = reporter.progress(found, len(sites), Stage.EQUALIZE)
        choices = {site.name: one for site, one in zip(sites, found, strict=True)}
    return _apply(encoder, statistics, choices)


@dataclass(frozen=True)
class _Choice:
    """What is done to one activation."""

    shift: Shift | None = None
    even: Equalization | None = None


def _choose(site: Site, statistics: Halved, quantizer: Quantizer, view: EncoderView) -> _Choice:
    seen, free = Folded.of(statistics), foldable(view, site)
    if not seen.folds or not (rules_for(quantizer, free=free) or quantizer.format.symmetric):
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
    return _apply(encoder, statistics, {})


def _apply(
    encoder: FloatEncoder, statistics: Mapping[str, Halved], choices: Mapping[str, _Choice]
) -> Equalized:
    """Run the passes; what one refuses at a site stays as it was."""
    shifts = {site: one.shift for site, one in choices.items() if one.shift is not None}
    even = {site: one.even for site, one in choices.items() if one.even is not None}
    tensors = {site.name: site.tensor.name for site in encoder.view.sites}
    shifting = ShiftActivations({tensors[site]: one.values.whole for site, one in shifts.items()})
    shifted, shifted_how = _run(shifting, encoder)
    tensors = {site.name: site.tensor.name for site in shifted.view.sites}
    equalizing = Equalize({tensors[site]: one.factors.whole for site, one in even.items()})
    after, even_how = _run(equalizing, shifted)

    activations = {}
    for site in encoder.view.sites:
        name, seen = site.name, Folded.of(statistics[site.tensor.name])
        how, scale, for_scale = list[str](), None, None
        if name in shifted_how:
            seen = seen.shifted(shifts[name].values)
            how.append(f"{shifts[name].name} taken off, {shifted_how[name]}")
            # It was chosen for equalized channels.
            scale = shifts[name].scale if name in even_how or name not in even else None
        if name in even_how:
            seen = seen.divided(even[name].factors)
            how.append(f"{even[name].rule}, {even_how[name]}")
        if name in shifted_how:
            for_scale = seen.held_out  # shifted channels fit the images at hand too well
        factors = even[name].factors.whole if name in even else None
        activations[name] = Activation(
            seen.whole, for_scale or seen.whole, scale, factors, "; ".join(how) or None
        )
    return Equalized(after, activations)


def _equalizing(view: EncoderView, activations: Mapping[str, Activation]) -> Equalize:
    factors = {site.tensor.name: activations[site.name].factors for site in view.sites}
    return Equalize({name: one for name, one in factors.items() if one is not None})


def _run(step: Pass, encoder: FloatEncoder) -> tuple[FloatEncoder, dict[str, str]]:
    """The encoder after a pass, and what that did, by the name of the site."""
    graph, ran = run_all([step], encoder.graph)
    edits = {edit.site: edit.what for one in ran for edit in one.log.edits}
    return encoder.rewritten(graph, ran), edits
