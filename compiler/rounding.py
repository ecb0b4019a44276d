"""Round weights and correct biases by what the layers read, in one pass over the images."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import onnx_graphsurgeon as gs
from numpy.typing import NDArray

from regcache.compiler.calibration import observe
from regcache.compiler.gptq import choose_steps, round_by_error
from regcache.passes.affine import Affine
from regcache.passes.encoder import Site
from regcache.passes.quantize_linears import RoundedWeight

Floats = NDArray[np.float32]

# About as many rows as the Gram matrix of the widest layer needs to be more than noise.
_ROWS = 4096
_LEAST_ROWS_OF_AN_IMAGE = 8
# Gram matrices that are held at a time; a larger encoder takes more than one pass.
_BYTES = 512 << 20


@dataclass(frozen=True)
class Rounded:
    """Integers of every linear, and what its bias lacks [N], by the linear's name."""

    weights: dict[str, RoundedWeight]
    biases: dict[str, Floats]


@dataclass
class LayerInput:
    """Second moments of an activation [..., K] as its layers read it, rounded by `scale`.

    Takes the first token of every image, which is the class token where there is one, and others
    drawn at random. `gram` [K, K]: sum of x^T x, `total`, `float_total` [K]: sum of x, rounded and
    not, over `rows` rows.
    """

    scale: Affine
    rows_of_an_image: int
    random: np.random.Generator
    rows: int = 0
    gram: NDArray[np.float64] = field(default_factory=lambda: np.zeros((0, 0)))
    total: NDArray[np.float64] = field(default_factory=lambda: np.zeros(0))
    float_total: NDArray[np.float64] = field(default_factory=lambda: np.zeros(0))

    def update(self, tokens: Floats) -> None:
        """Take in activations [B, T, K]."""
        if not self.rows:
            channels = tokens.shape[-1]
            self.gram, self.total = np.zeros((channels, channels)), np.zeros(channels)
            self.float_total = np.zeros(channels)
        drawn = [image[self._drawn(len(image))] for image in tokens]
        plain = np.concatenate(drawn)
        rounded = self.scale.round_trip(plain)
        self.gram += rounded.T @ rounded
        self.total += rounded.sum(axis=0, dtype=np.float64)
        self.float_total += plain.sum(axis=0, dtype=np.float64)
        self.rows += len(plain)

    def _drawn(self, tokens: int) -> NDArray[np.intp]:
        others = min(self.rows_of_an_image, tokens) - 1
        chosen = self.random.permutation(tokens - 1)[:others] + 1
        return np.concatenate([np.zeros(1, np.intp), chosen])


def round_weights(
    graph: gs.Graph,
    sites: Iterable[Site],
    scales: Mapping[str, Affine],
    batches: Callable[[], Iterable[Floats]],
    model_path: Path,
    *,
    images: int,
    bits: int = 8,
    seed: int = 0,
    threads: int | None = None,
) -> Rounded:
    """GPTQ rounding and bias correction of the linears behind the sites that `scales` names.

    `batches` gives the images [B, 3, H, W], anew on each call: one pass over them for every half
    GB of Gram matrices. `images`: how many there are.
    """
    of_an_image = max(_ROWS // max(images, 1), _LEAST_ROWS_OF_AN_IMAGE)
    found = Rounded({}, {})
    for group in _groups([site for site in sites if site.tensor.name in scales]):
        inputs = {
            site.tensor.name: LayerInput(
                scales[site.tensor.name], of_an_image, np.random.default_rng(seed)
            )
            for site in group
        }
        observe(graph, inputs, batches(), model_path, threads=threads)
        for site in group:
            _round_site(site, inputs.pop(site.tensor.name), bits, found)
    return found


def _round_site(site: Site, seen: LayerInput, bits: int, found: Rounded) -> None:
    last = 2 ** (bits - 1) - 1
    moments = np.diag(seen.gram) / seen.rows
    for linear in site.linears:
        weight = linear.weight
        steps = choose_steps(weight, moments, last)
        integers = round_by_error(weight, seen.gram, steps, last)
        found.weights[linear.name] = RoundedWeight(integers, steps[0])
        lost = seen.float_total @ weight - seen.total @ (integers * steps[0])
        found.biases[linear.name] = np.asarray(lost / seen.rows, np.float32)


def _groups(sites: list[Site]) -> Iterator[list[Site]]:
    """Sites whose Gram matrices fit into memory together, at least one at a time."""
    group: list[Site] = []
    used = 0
    for site in sites:
        needed = 8 * site.linears[0].weight_shape[0] ** 2
        if group and used + needed > _BYTES:
            yield group
            group, used = [], 0
        group.append(site)
        used += needed
    if group:
        yield group
