"""Statistics of activations, gathered in one pass over the images in flat memory."""

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]

# Norm histogram: bins of 2^(1/32), so that a percentile is within 2.2 %, over all of float32.
_BINS_PER_OCTAVE = 32
_LOWEST_OCTAVE = -64
_BINS = 128 * _BINS_PER_OCTAVE
# Rows kept per site over all images: 0.4 MB at width 384, whatever the number of images.
_SAMPLED_ROWS = 256
# Rows kept of tokens larger than all before them, in images that the stride passes over.
_RECORDS = 32


def tokens_per_image(activation: Floats, batch: int) -> Floats:
    """View an activation as [B, T, K].

    Takes [B, T, K], a flattened [B * T, K] and the sequence-first [T, B, K] of some exporters.
    Raises ValueError for any other shape.
    """
    if activation.ndim == 2 and activation.shape[0] % batch == 0:
        return activation.reshape(batch, -1, activation.shape[-1])
    if activation.ndim == 3 and activation.shape[0] == batch:
        return activation
    if activation.ndim == 3 and activation.shape[1] == batch:
        return activation.swapaxes(0, 1)
    raise ValueError(f"an activation of shape {activation.shape} holds no {batch} sequences")


@dataclass
class ChannelRange:
    """Smallest and largest value of every channel, [K] float32."""

    low: Floats = field(default_factory=lambda: np.empty(0, np.float32))
    high: Floats = field(default_factory=lambda: np.empty(0, np.float32))

    def update(self, tokens: Floats) -> None:
        """Take in activations [B, T, K]."""
        rows = tokens.reshape(-1, tokens.shape[-1])
        low, high = rows.min(axis=0), rows.max(axis=0)
        self.low = low if not self.low.size else np.minimum(self.low, low)
        self.high = high if not self.high.size else np.maximum(self.high, high)


@dataclass
class RowSample:
    """A sample of an activation's rows: of an image the first, the largest and some others.

    The first token (the class token, where there is one) and the token of largest l-infinity norm
    are always in, because clipping them is what breaks an encoder: a plain random sample misses
    them and costs 1 % of cosine on DINOv2-S. `others` more are drawn at random.

    Memory does not grow with the images: every `stride`-th image is sampled; of the rest only the
    latest tokens are kept that were larger than all before them. The rows lie in one buffer,
    allocated once: small arrays that outlive a batch would keep the heap from shrinking behind its
    large ones.
    """

    others: int
    stride: int
    capacity: int
    random: np.random.Generator
    images: int = 0
    peak: float = -1.0
    filled: int = 0
    records: int = 0
    buffer: Floats = field(default_factory=lambda: np.empty((0, 0), np.float32))

    @classmethod
    def of(cls, images: int, seed: int) -> "RowSample":
        """A sample of about 256 rows over `images` images, 4 to 10 rows an image."""
        others = min(8, max(2, _SAMPLED_ROWS // max(images, 1) - 2))
        stride = max(1, -(-images * (2 + others) // _SAMPLED_ROWS))
        capacity = -(-images // stride) * (2 + others)
        return cls(others, stride, capacity, np.random.default_rng(seed))

    def update(self, tokens: Floats) -> None:
        """Take in activations [B, T, K]."""
        if not self.buffer.size:
            self.buffer = np.empty((_RECORDS + self.capacity, tokens.shape[-1]), np.float32)
        peaks = np.maximum(tokens.max(axis=-1), -tokens.min(axis=-1))
        for image, image_peaks in zip(tokens, peaks, strict=True):
            largest = int(image_peaks.argmax())
            if self.images % self.stride == 0:
                self._keep(image, largest)
            elif image_peaks[largest] > self.peak:
                self.buffer[self.records % _RECORDS] = image[largest]
                self.records += 1
            self.peak = max(self.peak, float(image_peaks[largest]))
            self.images += 1

    def _keep(self, image: Floats, largest: int) -> None:
        drawn = self.random.choice(len(image), size=min(self.others, len(image)), replace=False)
        for token in (0, largest, *drawn):
            self.buffer[_RECORDS + self.filled] = image[token]
            self.filled += 1

    @property
    def rows(self) -> Floats:
        """The sample [S, K]."""
        records = self.buffer[: min(self.records, _RECORDS)]
        return np.concatenate([records, self.buffer[_RECORDS : _RECORDS + self.filled]])


@dataclass(frozen=True)
class Outlier:
    """One of an activation's largest values, and its place: image, token and channel, from 0."""

    value: float
    image: int
    token: int
    channel: int


@dataclass
class NormHistogram:
    """Distribution of non-negative numbers: exact maximum, percentiles within 2.2 %."""

    counts: NDArray[np.int64] = field(default_factory=lambda: np.zeros(_BINS, np.int64))
    maximum: float = 0.0

    def update(self, norms: Floats) -> None:
        """Count norms, an array of any shape."""
        self.maximum = max(self.maximum, float(norms.max()))
        positive = np.maximum(norms.ravel().astype(np.float64), 2.0**_LOWEST_OCTAVE)
        bins = ((np.log2(positive) - _LOWEST_OCTAVE) * _BINS_PER_OCTAVE).astype(np.int64)
        self.counts += np.bincount(np.clip(bins, 0, _BINS - 1), minlength=_BINS)

    def percentile(self, share: float) -> float:
        """The norm below which `share` percent of all lie."""
        total = int(self.counts.sum())
        if not total:
            return 0.0
        index = int(np.searchsorted(np.cumsum(self.counts), total * share / 100))
        middle = (min(index, _BINS - 1) + 0.5) / _BINS_PER_OCTAVE + _LOWEST_OCTAVE
        return min(float(2.0**middle), self.maximum)


@dataclass
class TokenNorms:
    """l-infinity and l2 norms of tokens, and the places of the largest values."""

    kept: int = 5
    linf: NormHistogram = field(default_factory=NormHistogram)
    l2: NormHistogram = field(default_factory=NormHistogram)
    outliers: list[Outlier] = field(default_factory=list)
    images: int = 0

    def update(self, tokens: Floats) -> None:
        """Take in activations [B, T, K]; images are numbered in the order they come."""
        magnitudes = np.abs(tokens)
        peaks = magnitudes.max(axis=-1)
        self.linf.update(peaks)
        self.l2.update(np.sqrt(np.einsum("btk,btk->bt", tokens, tokens)))
        for image, token in zip(
            *np.unravel_index(_largest(peaks, self.kept), peaks.shape), strict=True
        ):
            channel = int(magnitudes[image, token].argmax())
            value = float(tokens[image, token, channel])
            self.outliers.append(Outlier(value, self.images + int(image), int(token), channel))
        self.outliers = sorted(self.outliers, key=lambda o: -abs(o.value))[: self.kept]
        self.images += len(tokens)


def _largest(values: Floats, count: int) -> NDArray[np.intp]:
    """Flat indices of the `count` largest values."""
    flat = values.ravel()
    count = min(count, flat.size)
    return np.argpartition(flat, flat.size - count)[flat.size - count :]


def token_kind(token: int, prefix: int | None) -> str:
    """ "class", "register" or "patch", by a token's position; "unknown" without `prefix`."""
    if prefix is None:
        return "unknown"
    if token >= prefix:
        return "patch"
    return "class" if token == 0 else "register"
