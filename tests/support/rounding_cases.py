"""Tiny encoders to round, with all that their layers read."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import onnx_graphsurgeon as gs
from numpy.typing import NDArray
from support.canonical import canonical_graph
from support.number_formats import S8S8, U8S8, affines
from support.tiny_vit import Spec, TinyVit

from regcache.compiler.calibration.number_format import Rounded, Scale
from regcache.compiler.calibration.observe import observe, site_statistics
from regcache.compiler.calibration.quantizer import Quantizer
from regcache.compiler.calibration.stored_rows import stored_rows
from regcache.compiler.job.options import Calibrator
from regcache.compiler.job.targets import (
    Simulation,
    Target,
    simulate,
)
from regcache.compiler.quantization.layer_input import LayerInput
from regcache.compiler.quantization.rounding import round_weights
from regcache.passes.affine import Affine
from regcache.passes.encoder import EncoderView, Linear, Site, by_tensor
from regcache.passes.find_blocks import view_encoder
from regcache.passes.quantize_linears import RoundedWeight

Floats = NDArray[np.float32]
Doubles = NDArray[np.float64]
TARGETS = {"u8s8": U8S8, "s8s8": S8S8, "w4a4": simulate(U8S8, Simulation.W4A4)}
IMAGES = 24


@dataclass
class Recorder:
    """All the activations [B, T, K] of a site."""

    parts: list[Floats] = field(default_factory=list)

    def update(self, tokens: Floats) -> None:
        self.parts.append(tokens.copy())

    @property
    def tokens(self) -> Floats:
        return np.concatenate(self.parts)

    @property
    def rows(self) -> Floats:
        return self.tokens.reshape(-1, self.tokens.shape[-1])


@dataclass(frozen=True)
class Case:
    """A tiny encoder, its activations on the images, and their scales."""

    graph: gs.Graph
    view: EncoderView
    images: Floats
    seen: dict[str, Recorder]
    scales: dict[str, Affine]
    target: Target
    folder: Path

    def inputs(
        self, scales: Mapping[str, Scale | None], images: int = IMAGES, seed: int = 0
    ) -> dict[str, LayerInput]:
        """What the linears of the sites that `scales` names read, stored batch by batch."""
        rows = stored_rows(self.view.sites, self.folder, images, seed)
        for name, store in rows.items():
            for batch in np.array_split(self.seen[name].tokens, 5):
                store.update(batch)
        return {name: LayerInput(rows[name], scale) for name, scale in scales.items()}

    def round(self, seed: int = 0, threads: int = 1) -> Rounded:
        inputs = self.inputs(self.scales, seed=seed)
        return round_weights(self.view.sites, inputs, target=self.target, threads=threads)

    @property
    def linears(self) -> Iterator[tuple[Site, Linear]]:
        return ((site, linear) for site in self.view.sites for linear in site.linears)

    def rounded_rows(self, site: Site) -> Doubles:
        """What the integer kernels read, in float64."""
        scale, rows = self.scales[site.name], self.seen[site.name].rows
        integers = np.rint(rows / np.float32(scale.scale)) + scale.zero_point
        integers = np.clip(integers, *scale.limits).astype(np.float64)
        return np.asarray((integers - scale.zero_point) * float(np.float32(scale.scale)))

    def shift(self, site: Site, linear: Linear, given: RoundedWeight) -> Doubles:
        """X W - Q(X) W' [rows, N] in float64, for a rounded weight W'."""
        rows = self.seen[site.name].rows.astype(np.float64)
        weight = given.integers.astype(np.float64) * given.scales
        wanted = rows @ linear.weight.astype(np.float64)
        return np.asarray(wanted - self.rounded_rows(site) @ weight)


def make_case(folder: Path, spec: Spec | None = None, target: str = "u8s8") -> Case:
    vit = TinyVit(spec or Spec())
    graph = canonical_graph(vit.model())
    view, images = view_encoder(graph), vit.images(IMAGES)
    seen = {site.name: Recorder() for site in view.sites}
    observe(graph, by_tensor(view.sites, seen), np.array_split(images, 5), threads=1)
    statistics = site_statistics(view, IMAGES, seed=0)
    for name, recorder in seen.items():
        statistics[name].update(recorder.tokens)
    quantizer = Quantizer(TARGETS[target], Calibrator.OUTPUT_ERROR)
    scales = affines(quantizer.scales(view.sites, statistics))
    return Case(graph, view, images, seen, scales, quantizer.target, folder)
