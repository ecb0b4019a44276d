"""Whether a setting is better than none, on images that the search never used."""

from collections.abc import Sequence

import numpy as np

from regcache.compiler.job.record import Record

_RESAMPLES = 2000


class Improvement(Record):
    """Errors of two encoders over the same images; an error is 1 - cosine to the float outputs."""

    n_images: int
    """Number of images."""
    without: float
    """Mean error without registers and deletion."""
    with_setting: float
    """Mean error with registers and deletion."""
    gain: float
    """`without` - `with_setting`."""
    gain_low: float
    """Lower end of the gain's 95 % bootstrap interval."""
    gain_high: float
    """Upper end of the gain's 95 % bootstrap interval."""

    @property
    def certain(self) -> bool:
        """Whether the gain is more than its confidence interval: the interval is above zero."""
        return self.gain_low > 0


def measure_improvement(
    without: Sequence[float], with_setting: Sequence[float], seed: int
) -> Improvement:
    """The paired bootstrap of errors [N] on the same images: percentiles of the mean gain."""
    gains = np.asarray(without) - np.asarray(with_setting)
    drawn = np.random.default_rng(seed).integers(len(gains), size=(_RESAMPLES, len(gains)))
    low, high = np.percentile(gains[drawn].mean(axis=1), [2.5, 97.5])
    return Improvement(
        n_images=len(gains),
        without=float(np.mean(without)),
        with_setting=float(np.mean(with_setting)),
        gain=float(gains.mean()),
        gain_low=float(low),
        gain_high=float(high),
    )
