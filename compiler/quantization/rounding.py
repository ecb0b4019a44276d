"""Round weights and correct biases by what the layers read, in one pass over the images."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import onnx_graphsurgeon as gs
from numpy.typing import NDArray

from regcache.compiler.calibration.number_formats import Rounded, Scale, Weight, number_format
from regcache.compiler.calibration.observe import observe
from regcache.compiler.job.targets import Target
from regcache.compiler.reporter import Reporter
from regcache.passes.encoder import Linear, Site
from regcache.passes.external_weights import let_go

Floats = NDArray[np.float32]

# About as many rows as the Gram matrix of the widest layer needs to be more than noise.
_ROWS = 4096
_LEAST_ROWS_OF_AN_IMAGE = 8
# Gram matrices that are held at a time; a larger encoder takes more than one pass.
_BYTES = 512 << 20
# Channels from which the rows themselves are less than their Gram matrix, and are kept on disk.
_MANY_CHANNELS = _ROWS // 2


@dataclass
class LayerInput:
    """Second moments of an activation [..., K] as its layers read it, rounded by `scale` if any.

    Takes the first token of every image, which is the class token where there is one, and others
    drawn at random. `total`, `float_total` [K]: sum of x, rounded and not, over `rows` rows.
    `store`: a file for the rows where channels are many; the Gram matrix is then made of it.
    """

    scale: Scale | None
    rows_of_an_image: int
    random: np.random.Generator
    store: Path | None = None
    rows: int = 0
    products: NDArray[np.float64] = field(default_factory=lambda: np.zeros((0, 0)))
    total: NDArray[np.float64] = field(default_factory=lambda: np.zeros(0))
    float_total: NDArray[np.float64] = field(default_factory=lambda: np.zeros(0))

    def update(self, tokens: Floats) -> None:
        """Take in activations [B, T, K]."""
        if not self.rows:
            channels = tokens.shape[-1]
            self.total, self.float_total = np.zeros(channels), np.zeros(channels)
            if self.store is None or channels < _MANY_CHANNELS:
                self.products = np.zeros((channels, channels))
        drawn = [image[self._drawn(len(image))] for image in tokens]
        plain = np.concatenate(drawn)
        rounded = plain if self.scale is None else self.scale.round_trip(plain)
        if self.store is None or len(self.products):
            self.products += rounded.T @ rounded
        else:
            with self.store.open("ab") as file:
                np.ascontiguousarray(rounded).tofile(file)
        self.total += rounded.sum(axis=0, dtype=np.float64)
        self.float_total += plain.sum(axis=0, dtype=np.float64)
        self.rows += len(plain)

    @property
    def gram(self) -> NDArray[np.float64]:
        """The sum of x^T x over all rows, [K, K]."""
        if self.store is not None and not len(self.products):
            rows = np.fromfile(self.store, np.float32).reshape(self.rows, -1)
            self.products = (rows.T @ rows).astype(np.float64)
        return self.products

    def close(self) -> None:
        """Remove what is on disk."""
        if self.store is not None:
            self.store.unlink(missing_ok=True)

    def _drawn(self, tokens: int) -> NDArray[np.intp]:
        others = min(self.rows_of_an_image, tokens) - 1
        chosen = self.random.permutation(tokens - 1)[:others] + 1
        return np.concatenate([np.zeros(1, np.intp), chosen])


def round_weights(
    graph: gs.Graph,
    sites: Iterable[Site],
    scales: Mapping[str, Scale | None],
    batches: Callable[[], Iterable[Floats]],
    model_path: Path,
    *,
    target: Target,
    images: int,
    seed: int = 0,
    threads: int | None = None,
    reporter: Reporter | None = None,
) -> Rounded:
    """GPTQ rounding and bias correction of the linears behind the sites that `scales` names.

    A scale of None leaves the activation in float. Weights of E4M3 are rounded to the nearest, for
    the biases alone. `batches` gives the images [B, 3, H, W], anew on each call: one pass over them
    for every half GB of Gram matrices. `images`: how many there are.
    """
    of_an_image = max(_ROWS // max(images, 1), _LEAST_ROWS_OF_AN_IMAGE)
    found, form = Rounded(), number_format(target)
    for group in _groups([site for site in sites if site.tensor.name in scales]):
        inputs = {
            site.tensor.name: LayerInput(
                scales[site.tensor.name],
                of_an_image,
                np.random.default_rng(seed),
                model_path.with_name(f"rows{number}.bin"),
            )
            for number, site in enumerate(group)
        }
        observe(graph, inputs, batches(), model_path, threads=threads)
        for site in group if reporter is None else reporter.progress(group, len(group), "rounding"):
            seen = inputs.pop(site.tensor.name)
            for linear in site.linears:
                _note(linear, seen, form.round(linear, seen), found)
                let_go(linear.weight)
            seen.close()
    return found


def _note(linear: Linear, seen: LayerInput, rounded: Weight, found: Rounded) -> None:
    """Enter a rounded weight, and what it makes the bias lack."""
    found.weights[linear.name] = rounded
    lost = seen.float_total @ linear.weight - seen.total @ rounded.dequantized()
    found.biases[linear.name] = np.asarray(lost / seen.rows, np.float32)


def _groups(sites: list[Site]) -> Iterator[list[Site]]:
    """Sites whose Gram matrices fit into memory together, at least one at a time."""
    group: list[Site] = []
    used = 0
    for site in sites:
        channels = site.linears[0].weight_shape[0]
        needed = 8 * channels**2 if channels < _MANY_CHANNELS else 0
        if group and used + needed > _BYTES:
            yield group
            group, used = [], 0
        group.append(site)
        used += needed
    if group:
        yield group
