"""A linear's activations with outliers, for tests of factors and shifts."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx_graphsurgeon as gs
from numpy.typing import NDArray
from support.canonical import canonical_graph
from support.number_formats import S8S8, U8S8
from support.site_choices import choose_equalizations
from support.tiny_vit import Spec, TinyVit

from regcache.compiler.calibration.folds import Fold, Folded, Observed, join
from regcache.compiler.calibration.observe import HalvedStatistics, halved_statistics, observe
from regcache.compiler.calibration.quantizer import Quantizer
from regcache.compiler.job.options import Calibrator
from regcache.compiler.job.targets import Simulation, simulate
from regcache.compiler.quantization.factors import Equalization
from regcache.passes.affine import Affine
from regcache.passes.encoder import EncoderView, Site, by_tensor
from regcache.passes.find_blocks import view_encoder

Floats = NDArray[np.float32]
QUANTIZERS = {
    "u8s8": Quantizer(U8S8),
    "u8s8 min-max": Quantizer(U8S8, Calibrator.MIN_MAX),
    "s8s8": Quantizer(S8S8),
    "s8s8 min-max": Quantizer(S8S8, Calibrator.MIN_MAX),
    "w6a6": Quantizer(simulate(U8S8, Simulation.W6A6)),
}
MIDDLE, ZERO_POINT = "each channel's middle", "a zero point"


@dataclass(frozen=True)
class Case:
    """A tiny encoder and the statistics of its activations."""

    vit: TinyVit
    graph: gs.Graph
    view: EncoderView
    statistics: dict[str, HalvedStatistics]
    folder: Path

    def site(self, name: str) -> Site:
        return next(site for site in self.view.sites if site.name == name)

    def choose(self, quantizer: str = "u8s8") -> dict[str, Equalization]:
        """By the site's name."""
        return choose_equalizations(self.view, self.statistics, QUANTIZERS[quantizer])


def observed(graph: gs.Graph, images: Floats, folder: Path) -> dict[str, HalvedStatistics]:
    """By the site's name."""
    view = view_encoder(graph)
    statistics = halved_statistics(view, len(images), seed=0)
    batches = [images[start : start + 5] for start in range(0, len(images), 5)]
    observers = by_tensor(view.sites, statistics)
    observe(graph, observers, batches, threads=1)
    return statistics


def make_case(folder: Path, vit: TinyVit, images: int = 16) -> Case:
    graph = canonical_graph(vit.model())
    statistics = observed(graph, vit.images(images), folder)
    return Case(vit, graph, view_encoder(graph), statistics, folder)


def with_outliers(spec: Spec | None = None) -> TinyVit:
    """Channels that are far larger than the others: behind a norm, in V, and behind GELU."""
    vit = TinyVit(spec or Spec(width=32, hidden=64, heads=4))
    weights = vit.weights
    for name in ("1.norm1", "1.norm1.b"):
        weights[name][3] *= 40
    for name in ("1.q", "1.k", "1.v"):
        weights[name][3] /= 40
    for name in ("1.v", "1.v.b"):
        weights[name][..., 5] *= 40
    weights["1.out"][5] /= 40
    for name in ("1.fc1", "1.fc1.b"):  # where the MLP is gated, this is the one that is not
        weights[name][..., 7] *= 40
    weights["1.fc2"][7] /= 40
    return vit


def see(rows: Floats) -> Observed:
    return Observed(rows.min(axis=0), rows.max(axis=0), rows)


def see_halves(one: Floats, other: Floats) -> Folded:
    """What images show of which each half has some rows."""
    halves = see(one), see(other)
    return Folded(join(halves), (Fold(*halves), Fold(*halves[::-1])))


def layer_error(
    scale: Affine, weights: list[Floats], factors: Floats, rows: Floats, bits: int
) -> float:
    """||Q(X / f) Q(f W) - X W||^2 in float64, but for the mean over rows: a bias makes it good."""
    x, total = rows.astype(np.float64), 0.0
    integers = np.clip(np.rint(x / factors / scale.scale) + scale.zero_point, *scale.limits)
    read = (integers - scale.zero_point) * scale.scale
    for weight in weights:
        scaled = weight.astype(np.float64) * factors[:, None]
        steps = np.abs(scaled).max(axis=0) / (2 ** (bits - 1) - 1)
        difference = read @ (np.rint(scaled / steps) * steps) - x @ weight
        total += len(x) * difference.var(axis=0).sum()
    return total
