"""One streaming pass of the float model over the calibration images."""

from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import onnx_graphsurgeon as gs
from numpy.typing import NDArray

from regcache.compiler.calibration.folds import Fold, Observed, join
from regcache.compiler.calibration.graph_session import open_graph
from regcache.compiler.calibration.statistics import (
    ChannelRange,
    Floats,
    RowSample,
    tokens_per_image,
)
from regcache.passes.base import run
from regcache.passes.encoder import EncoderView
from regcache.passes.errors import InputError
from regcache.passes.observe import Observe
from regcache.passes.rotated_stream import stream_ends
from regcache.runtime.device import CPU, Device
from regcache.runtime.session import available_cpus

# Parts of a batch that run side by side: two halves take a tenth less than one run of all threads
# (DINOv2-S). The same for any number of threads, so that nothing depends on that.
_AT_ONCE = 2


class ActivationStatistics(Protocol):
    """The range of an activation [..., K], and a sample of its rows."""

    @property
    def low(self) -> float:
        """Smallest value."""

    @property
    def high(self) -> float:
        """Largest value."""

    @property
    def rows(self) -> Floats:
        """The sampled rows, float32 [S, K]."""


class Observer(Protocol):
    """A statistic that is updated with activations [B, T, K], batch by batch."""

    def update(self, tokens: Floats) -> None:
        """Take in one batch [B, T, K]."""


@dataclass(frozen=True)
class SiteStatistics:
    """The range of every channel and a sample of the rows of the activation at one site."""

    channels: ChannelRange
    sample: RowSample

    @property
    def low(self) -> float:
        """Smallest value of any channel."""
        return float(self.channels.low.min())

    @property
    def high(self) -> float:
        """Largest value of any channel."""
        return float(self.channels.high.max())

    @property
    def rows(self) -> Floats:
        """The sampled rows [S, K]."""
        return self.sample.rows

    def update(self, tokens: Floats) -> None:
        """Take in activations [B, T, K]."""
        self.channels.update(tokens)
        self.sample.update(tokens)


@dataclass
class HalvedStatistics:
    """Statistics of both halves of the images apart; every other image is in the second half."""

    halves: tuple[SiteStatistics, SiteStatistics]
    images: int = 0

    def update(self, tokens: Floats) -> None:
        """Take in activations [B, T, K], images in the order they come."""
        for half, statistics in enumerate(self.halves):
            part = tokens[(half + self.images) % 2 :: 2]
            if len(part):
                statistics.update(part)
        self.images += len(tokens)

    @property
    def observed(self) -> tuple[Observed, ...]:
        """The statistics of each half; of the first alone where there was a single image."""
        return tuple(
            Observed(half.channels.low, half.channels.high, half.rows)
            for half in self.halves
            if half.sample.images
        )

    @property
    def whole(self) -> Observed:
        """The statistics over all images."""
        return join(self.observed)

    @property
    def folds(self) -> tuple[Fold, ...]:
        """Each half as `fit`, with the other half; none where there was a single image."""
        if len(self.observed) < 2:
            return ()
        first, second = self.observed
        return Fold(first, second), Fold(second, first)


def observe(
    graph: gs.Graph,
    observers: Mapping[str, Observer],
    batches: Iterable[NDArray[np.float32]],
    *,
    threads: int | None = None,
    device: Device = CPU,
) -> int:
    """Run the graph over `batches` [B, 3, H, W] and feed each named tensor to its observer.

    Returns the number of images. Raises InputError, naming the tensor, when an activation is not
    finite or has no token axis.
    """
    observed = run(Observe(tuple(observers)), graph).graph
    whole = device.on_gpu or isinstance(graph.inputs[0].shape[0], int)
    at_once, count, images = 1 if whole else _AT_ONCE, threads or available_cpus(), 0
    with (
        open_graph(observed, threads=max(1, count // at_once), device=device) as session,
        ThreadPoolExecutor(count) as pool,
    ):
        for batch in batches:
            parts = [part for part in np.array_split(batch, at_once) if len(part)]
            full = [session.filled(part) for part in parts]
            ran = zip(*pool.map(session.run, full), strict=True)
            sizes = [(len(part), len(filled)) for part, filled in zip(parts, full, strict=True)]
            updates = [
                pool.submit(_update, name, found, observers[name], sizes)
                for name, found in zip(session.output_names, ran, strict=True)
                if name in observers
            ]
            for done in updates:
                done.result()
            images += len(batch)
    return images


def _update(
    name: str, found: Iterable[Floats], observer: Observer, sizes: Iterable[tuple[int, int]]
) -> None:
    """Show an observer an activation of the parts of a batch.

    `sizes`: for each part, how many images it shows, and how many were run.
    """
    for activation, (taken, ran) in zip(found, sizes, strict=True):
        observer.update(_finite_tokens(name, activation, ran)[:taken])


def _finite_tokens(name: str, activation: Floats, batch: int) -> Floats:
    try:
        tokens = tokens_per_image(activation, batch)
    except ValueError as error:
        raise InputError(f"{name}: {error}") from error
    # A sum is finite exactly when no term is NaN or infinite, short of overflow.
    if not np.isfinite(np.sum(tokens, dtype=np.float64)):
        raise InputError(f"{name}: the float model computes NaN or infinity there")
    return tokens


def halved_statistics(view: EncoderView, images: int, seed: int) -> dict[str, HalvedStatistics]:
    """Empty statistics for every site, by its name, sized for a number of images."""

    def half(number: int) -> SiteStatistics:
        return SiteStatistics(ChannelRange(), RowSample.of(-(-images // 2), seed + number))

    return {site.name: HalvedStatistics((half(0), half(1))) for site in view.sites}


def stream_ranges(view: EncoderView) -> dict[str, ChannelRange]:
    """Empty ranges for the residual stream around every block, by the name of the tensor.

    Where the stream is rotated, also for the tensors before and after the rotation.
    """
    blocks = view.blocks
    names = {item.name for block in blocks for item in (block.input, block.middle, block.output)}
    names |= {item.name for item in stream_ends(view.graph)}
    return {name: ChannelRange() for name in sorted(names)}


def site_statistics(view: EncoderView, images: int, seed: int) -> dict[str, SiteStatistics]:
    """Empty statistics for every site, by its name, sized for a number of images."""
    return {
        site.name: SiteStatistics(ChannelRange(), RowSample.of(images, seed)) for site in view.sites
    }
