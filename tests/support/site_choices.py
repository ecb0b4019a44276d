"""What is chosen for every activation of a view, one stage at a time, by the site's name."""

from collections.abc import Iterator, Mapping
from dataclasses import replace

from regcache.compiler.calibration.folds import Folded, Halved
from regcache.compiler.calibration.quantizer import Quantizer
from regcache.compiler.quantization.factors import Equalization, Standing, choose_equalization
from regcache.compiler.quantization.shifts import Shift, choose_shift, refine_shift
from regcache.passes.encoder import EncoderView
from regcache.passes.equalize import foldable


def choose_equalizations(
    view: EncoderView, statistics: Mapping[str, Halved], quantizer: Quantizer
) -> dict[str, Equalization]:
    """As though nothing had been shifted."""
    free = {site.name: foldable(view, site) for site in view.sites}
    return {
        name: found
        for name, now in _untouched(view, statistics, quantizer)
        if (found := choose_equalization(now, quantizer, free=free[name])) is not None
    }


def choose_shifts(
    view: EncoderView, statistics: Mapping[str, Halved], quantizer: Quantizer
) -> dict[str, Shift]:
    """Middles alone."""
    return {
        name: found
        for name, now in _untouched(view, statistics, quantizer)
        if (found := choose_shift(now, quantizer)) is not None
    }


def refine_shifts(
    view: EncoderView,
    statistics: Mapping[str, Halved],
    shifts: Mapping[str, Shift],
    equalizations: Mapping[str, Equalization],
    quantizer: Quantizer,
) -> dict[str, Shift]:
    """What becomes of the given shifts, with zero points."""
    found = {}
    for name, untouched in _untouched(view, statistics, quantizer):
        now, before, even = untouched, shifts.get(name), equalizations.get(name)
        if before is not None:
            now = replace(now, statistics=now.statistics.shifted(before.values), error=before.error)
        if even is not None:
            now = replace(now, factors=even.factors, error=even.error)
        shift = refine_shift(now, before, quantizer)
        if shift is not None:
            found[name] = shift
    return found


def _untouched(
    view: EncoderView, statistics: Mapping[str, Halved], quantizer: Quantizer
) -> Iterator[tuple[str, Standing]]:
    for site in view.sites:
        seen = Folded.of(statistics[site.name])
        if seen.folds:
            yield site.name, Standing.untouched(site, seen, quantizer)
