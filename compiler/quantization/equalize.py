"""The stage that shifts the channels of activations and equalizes them."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from regcache.compiler.calibration.calibrate import Calibrated, calibrate
from regcache.compiler.calibration.folds import Folded, Halved, Observed
from regcache.compiler.calibration.mapped import go_on_with
from regcache.compiler.calibration.quantizer import Quantizer
from regcache.compiler.calibration.side_by_side import side_by_side
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
from regcache.passes.encoder import EncoderView, Site, by_tensor
from regcache.passes.equalize import Equalize, foldable
from regcache.passes.external_weights import let_go
from regcache.passes.shift_activations import ShiftActivations

Floats = NDArray[np.float32]


@dataclass(frozen=True)
class Activation:
    """The activation at a site, after shifting and equalizing.

    `for_scale`: the statistics to choose a scale by, which are cross-checked where channels were
    shifted (see Folded.held_out). `scale`: the scale that a shift by a zero point was chosen with,
    and needs; else None. `shifts` [K]: what is taken off its channels; `factors` [K]: what they are
    divided by then; `how`: what was done, in words.
    """

    statistics: Observed
    for_scale: Observed
    scale: Affine | None = None
    shifts: Floats | None = None
    factors: Floats | None = None
    how: str | None = None


@dataclass(frozen=True)
class Equalized:
    """An encoder whose channels are shifted and equalized, and its activations by site name."""

    encoder: FloatEncoder
    activations: Mapping[str, Activation]


class Even(NamedTuple):
    """The calibration of an encoder, and the encoder that equalizing made of it."""

    calibrated: Calibrated
    equalized: Equalized


def calibrate_and_equalize(context: Context, encoder: FloatEncoder) -> Even:
    """Calibrate an encoder, and equalize it if the options ask for that."""
    calibrated = calibrate(context, encoder)
    if context.options.equalize:
        return Even(calibrated, equalize(context, encoder, calibrated))
    return Even(calibrated, as_it_is(encoder, calibrated.statistics))


def equalize(context: Context, encoder: FloatEncoder, calibrated: Calibrated) -> Equalized:
    """Shift channels and equalize them where that helps; the encoder computes the same."""
    context.reporter.begin(Stage.EQUALIZE)
    quantizer = Quantizer.of(context)
    equalized = equalize_encoder(
        encoder, calibrated.statistics, quantizer, context.threads, context.reporter
    )
    go_on_with(equalized.encoder.graph, encoder.graph, context.scratch)
    return equalized


def without_shifts(context: Context, encoder: FloatEncoder, equalized: Equalized) -> FloatEncoder:
    """`encoder`, of which `equalized` was made, with its channels equalized but not shifted.

    Where weights are rounded to the nearest nothing corrects biases, as a shifted activation needs
    it.
    """
    if all(
        activation.for_scale is activation.statistics
        for activation in equalized.activations.values()
    ):
        return equalized.encoder
    unshifted = encoder.after([_equalizing(encoder.view, equalized.activations)])
    go_on_with(unshifted.graph, encoder.graph, context.scratch)
    return unshifted


def unshifted(statistics: Observed, activation: Activation) -> Observed:
    """Statistics of an activation as calibrated, with its channels equalized but not shifted."""
    return statistics if activation.factors is None else statistics.divided(activation.factors)


def equalize_encoder(
    encoder: FloatEncoder,
    statistics: Mapping[str, Halved],
    quantizer: Quantizer,
    threads: int | None = None,
    reporter: Reporter | None = None,
) -> Equalized:
    """Shift channels and equalize them where that helps.

    `statistics`: of every site, by its name. `threads` of them are chosen for at a time, each by
    one thread, so that nothing depends on their number.
    """

    def choose(site: Site) -> _Choice:
        chosen = _choose(site, statistics[site.name], quantizer, encoder.view)
        for linear in site.linears:
            let_go(linear.weight)
        return chosen

    sites = encoder.view.sites
    chosen = side_by_side(choose, sites, threads)
    if reporter is not None:
        chosen = reporter.progress(chosen, len(sites), Stage.EQUALIZE)
    choices = {site.name: choice for site, choice in zip(sites, chosen, strict=True)}
    return _apply(encoder, statistics, choices)


@dataclass(frozen=True)
class _Choice:
    """The shift and the factors that were chosen for one activation; None where none helps."""

    shift: Shift | None = None
    even: Equalization | None = None


def _choose(site: Site, statistics: Halved, quantizer: Quantizer, view: EncoderView) -> _Choice:
    folded, free = Folded.of(statistics), foldable(view, site)
    if not folded.folds or not (rules_for(quantizer, free=free) or quantizer.format.symmetric):
        return _Choice()
    now = Standing.untouched(site, folded, quantizer)
    shift = choose_shift(now, quantizer)
    if shift is not None:
        now = replace(now, statistics=now.statistics.shifted(shift.values), error=shift.error)
    even = choose_equalization(now, quantizer, free=free)
    if even is not None:
        now = replace(now, factors=even.factors, error=even.error)
    return _Choice(refine_shift(now, shift, quantizer), even)


def as_it_is(encoder: FloatEncoder, statistics: Mapping[str, Halved]) -> Equalized:
    """The encoder unchanged, with the statistics of its sites."""
    return _apply(encoder, statistics, {})


def _apply(
    encoder: FloatEncoder, statistics: Mapping[str, Halved], choices: Mapping[str, _Choice]
) -> Equalized:
    """Run the passes with what was chosen by site; a site that a pass refuses stays as it was."""
    shifts = {site: choice.shift for site, choice in choices.items() if choice.shift is not None}
    even = {site: choice.even for site, choice in choices.items() if choice.even is not None}
    values = {site: shift.values.whole for site, shift in shifts.items()}
    shifting = ShiftActivations(by_tensor(encoder.view.sites, values))
    shifted, shifted_how = _run(shifting, encoder)
    factors = {site: equalization.factors.whole for site, equalization in even.items()}
    after, even_how = _run(Equalize(by_tensor(shifted.view.sites, factors)), shifted)

    activations = {}
    for site in encoder.view.sites:
        name, folded = site.name, Folded.of(statistics[site.name])
        how, scale, for_scale = list[str](), None, None
        if name in shifted_how:
            folded = folded.shifted(shifts[name].values)
            how.append(f"{shifts[name].name} taken off, {shifted_how[name]}")
            # It was chosen for equalized channels.
            scale = shifts[name].scale if name in even_how or name not in even else None
        if name in even_how:
            folded = folded.divided(even[name].factors)
            how.append(f"{even[name].rule}, {even_how[name]}")
        if name in shifted_how:
            for_scale = folded.held_out  # shifted channels fit the images at hand too well
        activations[name] = Activation(
            folded.whole,
            for_scale or folded.whole,
            scale,
            values[name] if name in shifted_how else None,
            factors[name] if name in even_how else None,
            "; ".join(how) or None,
        )
    return Equalized(after, activations)


def _equalizing(view: EncoderView, activations: Mapping[str, Activation]) -> Equalize:
    factors = {
        site: activation.factors
        for site, activation in activations.items()
        if activation.factors is not None
    }
    return Equalize(by_tensor(view.sites, factors))


def _run(step: Pass, encoder: FloatEncoder) -> tuple[FloatEncoder, dict[str, str]]:
    """The encoder after a pass, and the pass's edits by the name of the site."""
    graph, ran = run_all([step], encoder.graph)
    edits = {edit.site: edit.what for done in ran for edit in done.log.edits}
    return encoder.rewritten(graph, ran), edits
