"""The stage that keeps linears float, where a share of the multiply-accumulates may be."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from regcache.compiler.calibration.calibrate import Calibrated
from regcache.compiler.calibration.quantizer import Quantizer
from regcache.compiler.curation.curate import UnsearchableError, measure_sensitivity
from regcache.compiler.curation.record import SensitivityRecord
from regcache.compiler.curation.study import ReferenceImages, Study
from regcache.compiler.encoder.float_encoder import FloatEncoder
from regcache.compiler.job.breadth import Breadth
from regcache.compiler.job.context import Context
from regcache.compiler.job.record import Record
from regcache.compiler.job.stages import Stage
from regcache.compiler.quantization.equalize import Equalized, unshifted, without_shifts
from regcache.compiler.quantization.fastest import TimeModel, keep_dear_float
from regcache.compiler.quantization.rotation import rotation_work
from regcache.passes.encoder import EncoderView, Site
from regcache.runtime.engine_cost import PredictedTime

# A bound may lead to a lower share than was asked for: down to this damage is measured closely.
_BOUNDED_SHARE = 0.9


class ParetoPoint(Record):
    """One trade of quantized share against error."""

    share: float
    """Share of the multiply-accumulates of linears and rotations that is quantized."""
    error: float
    """1 - cosine to float of every site still quantized, each measured alone, in sum."""
    left_float: str | None = None
    """Name of the site that becomes float here; None for the first point."""


class TriedShare(Record):
    """One share that was measured where a bound was to be kept to."""

    share: float
    """Share of the multiply-accumulates of linears and rotations that was quantized."""
    cosine: float
    """Mean cosine to float on the images held out."""


class BoundRecord(Record):
    """A bound on the cosine that decided how much stays float."""

    min_cosine: float
    """The least mean cosine that was asked for."""
    cosine: float
    """The mean cosine of what ships."""
    images: int
    """Number of images that it was measured on, which calibrated nothing."""
    tried: list[TriedShare]
    """Every share that was measured, in order."""


@dataclass(frozen=True)
class Placement:
    """The sites that stay float, by name, and the share that is quantized.

    `pareto`: the trades of share against error, from all sites quantized to none. `predicted`: the
    times of its engine for TensorRT, told from shapes and peak rates before anything is built.
    """

    left_float: tuple[str, ...]
    share: float
    pareto: tuple[ParetoPoint, ...] = ()
    predicted: tuple[PredictedTime, ...] = ()


def keep_float(
    context: Context,
    encoder: FloatEncoder,
    even: tuple[Calibrated, Equalized],
    known: Sequence[SensitivityRecord],
    least_share: float,
) -> Placement:
    """Choose the linears that stay float: at least `least_share` of the work stays quantized.

    `even`: the calibration of `encoder`, and what equalizing made of it. `known`: its sensitivity,
    empty where it was not measured.
    """
    measures = context.options.measures_damage and Quantizer.of(context).quantizes_activations
    if not known and measures:
        known = _sensitivity(context, encoder, *even)
    damage = {record.site: record.damage for record in known}
    view = even[1].encoder.view
    rotations = rotation_work(view)
    placement = place_int8(view.sites, damage, least_share, rotations)
    if context.options.predicts_time:
        placement = _by_time(context, view, placement, damage)
    floats = [*(["rotations"] if rotations else []), *placement.left_float]
    if floats:
        more = f" and {len(floats) - 3} more" if len(floats) > 3 else ""
        context.reporter.step(
            f"{placement.share:.1%} of the work is in {context.precision.value}; in float stay "
            f"{', '.join(floats[:3])}{more}"
        )
    return placement


def leave_more(
    context: Context, view: EncoderView, placement: Placement, more: Sequence[str]
) -> Placement:
    """The placement with `more` sites in float, by name."""
    left, rotations = (*placement.left_float, *more), rotation_work(view)
    total = sum(site.work for site in view.sites) + rotations
    spent = rotations + sum(site.work for site in view.sites if site.name in left)
    placement = replace(placement, left_float=left, share=1 - spent / total)
    return _by_time(context, view, placement, {}) if context.options.predicts_time else placement


def _by_time(
    context: Context, view: EncoderView, placement: Placement, damage: Mapping[str, float]
) -> Placement:
    """The placement with its predicted times, chosen by them where that is asked for."""
    model = TimeModel.of(view, context.options)
    if model is None:
        return placement
    quantized = [site.name for site in view.sites if site.name not in placement.left_float]
    if context.options.prefer is not None:
        quantized = list(keep_dear_float(model, view.sites, damage))
        left = [site for site in view.sites if site.name not in quantized]
        total = sum(site.work for site in view.sites)
        share = 1 - sum(site.work for site in left) / total
        placement = replace(placement, left_float=tuple(site.name for site in left), share=share)
    return replace(placement, predicted=tuple(model.times(model.formats(quantized))))


def _sensitivity(
    context: Context, encoder: FloatEncoder, calibrated: Calibrated, equalized: Equalized
) -> list[SensitivityRecord]:
    context.reporter.begin(Stage.PLACE)
    breadth, quantizer = Breadth.of(context.effort), Quantizer.of(context)
    share = context.options.share
    if context.options.min_cosine is not None:
        share = min(share, _BOUNDED_SHARE)
    some = context.images.some(breadth.sensitivity)
    images = np.concatenate([batch.images for batch in some])
    plain = without_shifts(context, encoder, equalized)
    statistics = {
        name: unshifted(calibrated.statistics[name].whole, activation)
        for name, activation in equalized.activations.items()
    }
    study = Study.of(
        plain.graph,
        ReferenceImages(images, images[:1], images[:1]),
        quantizer,
        scales=quantizer.scales(plain.view.sites, statistics, context.threads),
        batch=some.batch_size,
        seed=context.seed,
        sensitivity_images=breadth.sensitivity,
        sites_alone=breadth.sites_alone(share),
        outputs=encoder.outputs.counted,
    )
    try:
        return measure_sensitivity(study, context.search, context.reporter)
    except UnsearchableError as error:
        context.reporter.warn(f"{context.source}: all linears are quantized: {error}")
        return []


def place_int8(
    sites: Sequence[Site],
    damage: Mapping[str, float],
    least_share: float,
    rotations: int = 0,
) -> Placement:
    """Choose the sites that stay float: those of most damage per multiply-accumulate.

    `damage`: of each site, by name. At least `least_share` of the multiply-accumulates stays
    quantized; a site that would go below it is passed over. The Pareto points go on until every
    site is float; there are none where no damage was measured. `rotations`: multiply-accumulates,
    for one token, of the rotations' products, which are float in any case.
    """
    # Every token costs as many.
    cost = {site.name: site.work for site in sites}
    order = sorted(cost, key=lambda name: -damage.get(name, 0.0) / cost[name])
    total = sum(cost.values()) + rotations
    pareto = (
        [ParetoPoint(share=1 - rotations / total, error=sum(damage.values()))] if damage else []
    )
    for name in order if damage else ():
        before = pareto[-1]
        share, error = before.share - cost[name] / total, before.error - damage.get(name, 0.0)
        pareto.append(ParetoPoint(share=max(share, 0.0), error=max(error, 0.0), left_float=name))
    # A little more, for a share that is read off the Pareto table.
    spare = (1 - least_share + 1e-9) * total - rotations
    left = []
    for name in order:
        if damage.get(name, 0.0) > 0 and cost[name] <= spare:
            left.append(name)
            spare -= cost[name]
    share = 1 - (rotations + sum(cost[name] for name in left)) / total
    return Placement(tuple(left), share, tuple(pareto))
