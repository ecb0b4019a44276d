"""Round weights and correct biases by the layers' inputs, in one pass over the images."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import onnx_graphsurgeon as gs
from numpy.typing import NDArray

from regcache.compiler.calibration.algebra import NUMPY, Algebra, Array
from regcache.compiler.calibration.number_formats import NumberFormat, Rounded, Scale, number_format
from regcache.compiler.calibration.observe import observe
from regcache.compiler.calibration.placing import algebra_on
from regcache.compiler.calibration.side_by_side import side_by_side
from regcache.compiler.job.targets import Target
from regcache.compiler.reporter import Reporter
from regcache.passes.encoder import Site, by_tensor
from regcache.passes.external_weights import let_go
from regcache.runtime.device import CPU, Device

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
    """Second moments of the input [..., K] of a site's linears; `scale`: rounds it, unless None.

    Counts the first token of every image, which is the class token where there is one, and tokens
    drawn at random, `rows_of_an_image` together. `total`, `float_total` [K]: sums over all `rows`
    of the input, rounded and not. `store`: a file for the rows of inputs with many channels, from
    which the Gram matrix is made at the end; None: it is summed in memory. `algebra`: where Gram
    matrices live.
    """

    scale: Scale | None
    rows_of_an_image: int
    random: np.random.Generator
    store: Path | None = None
    algebra: Algebra = NUMPY
    rows: int = 0
    products: Array = field(default_factory=lambda: np.zeros((0, 0)))
    total: NDArray[np.float64] = field(default_factory=lambda: np.zeros(0))
    float_total: NDArray[np.float64] = field(default_factory=lambda: np.zeros(0))

    def update(self, tokens: Floats) -> None:
        """Take in activations [B, T, K]."""
        if not self.rows:
            channels = tokens.shape[-1]
            self.total, self.float_total = np.zeros(channels), np.zeros(channels)
            if self.store is None or channels < _MANY_CHANNELS:
                self.products = self.algebra.zeros(channels)
        drawn = [image[self._drawn(len(image))] for image in tokens]
        plain = np.concatenate(drawn)
        rounded = plain if self.scale is None else self.scale.round_trip(plain)
        if self.store is None or len(self.products):
            placed = self.algebra.put(rounded)
            self.products += placed.T @ placed
        else:
            with self.store.open("ab") as file:
                np.ascontiguousarray(rounded).tofile(file)
        self.total += rounded.sum(axis=0, dtype=np.float64)
        self.float_total += plain.sum(axis=0, dtype=np.float64)
        self.rows += len(plain)

    @property
    def gram(self) -> Array:
        """X^T X of all rows X, float64 [K, K], where `algebra` computes."""
        if self.store is not None and not len(self.products):
            rows = np.fromfile(self.store, np.float32).reshape(self.rows, -1)
            self.products = self.algebra.gram(self.algebra.put(rows))
        return self.products

    def close(self) -> None:
        """Remove the file of rows."""
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
    device: Device = CPU,
    reporter: Reporter | None = None,
) -> Rounded:
    """GPTQ rounding and bias correction of the linears of the sites that `scales` names.

    `scales`: by the site's name; None leaves the activation in float. Weights of E4M3 are rounded
    to the nearest, and only their biases corrected. `batches`: gives the images [B, 3, H, W], anew
    on each call: one pass over them for every half GB of Gram matrices. `images`: how many there
    are. `device`: what runs the graph and rounds.
    """
    of_an_image = max(_ROWS // max(images, 1), _LEAST_ROWS_OF_AN_IMAGE)
    algebra = algebra_on(device)
    rounded, form = Rounded(), number_format(target, algebra)
    for group in _groups([site for site in sites if site.name in scales]):
        inputs = {
            site.name: LayerInput(
                scales[site.name],
                of_an_image,
                np.random.default_rng(seed),
                model_path.with_name(f"rows{number}.bin"),
                algebra,
            )
            for number, site in enumerate(group)
        }
        tensors = by_tensor(group, inputs)
        observe(graph, tensors, batches(), model_path, threads=threads, device=device)
        found = _round_sites(group, inputs, form, threads)
        if reporter is not None:
            found = reporter.progress(found, len(group), "rounding")
        for site in found:
            rounded.weights.update(site.weights)
            rounded.biases.update(site.biases)
    return rounded


def _round_sites(
    group: Sequence[Site],
    inputs: dict[str, LayerInput],
    form: NumberFormat,
    threads: int | None,
) -> Iterator[Rounded]:
    """The rounded linears of each site in turn; `inputs` is emptied on the way.

    `threads` sites at a time, but one by one where Gram matrices are too large for several.
    """

    def round_site(site: Site) -> Rounded:
        rounded, read = Rounded(), inputs.pop(site.name)
        for linear in site.linears:
            weight = form.round(linear, read)
            lost = read.float_total @ linear.weight - read.total @ weight.dequantized()
            rounded.weights[linear.name] = weight
            rounded.biases[linear.name] = np.asarray(lost / read.rows, np.float32)
            let_go(linear.weight)
        read.close()
        return rounded

    if any(site.linears[0].weight_shape[0] >= _MANY_CHANNELS for site in group):
        yield from map(round_site, group)
        return
    yield from side_by_side(round_site, group, threads)


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
