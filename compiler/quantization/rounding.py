"""Round weights and correct biases by what the layers read, in one pass over the images."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import onnx_graphsurgeon as gs
from numpy.typing import NDArray

from regcache.compiler.calibration.observe import observe
from regcache.compiler.calibration.quantizer import Scale
from regcache.compiler.job.targets import Target
from regcache.compiler.quantization.gptq import choose_steps, refit_steps, round_by_error
from regcache.passes.encoder import Linear, Role, Site
from regcache.passes.external_weights import let_go
from regcache.passes.float8 import Float8Weight, round_weight
from regcache.passes.pack_weights import BlockWeight
from regcache.passes.quantize_linears import RoundedWeight

Floats = NDArray[np.float32]
Weight = RoundedWeight | BlockWeight | Float8Weight

# About as many rows as the Gram matrix of the widest layer needs to be more than noise.
_ROWS = 4096
_LEAST_ROWS_OF_AN_IMAGE = 8
# Gram matrices that are held at a time; a larger encoder takes more than one pass.
_BYTES = 512 << 20
# Channels from which the rows themselves are less than their Gram matrix, and are kept on disk.
_MANY_CHANNELS = _ROWS // 2
# Coarse steps overfit: measured on DINOv2-S, on images not calibrated on.
_BLOCK_DAMPING = 0.05
# A sixth of a block's weights; at 4 bits they do as much damage as the others together (DINOv2-S).
_WIDE, _WIDE_BITS = (Role.V, Role.OUT), 8
_TINY = float(np.finfo(np.float32).tiny)


@dataclass(frozen=True)
class Rounded:
    """Integers of every linear, and what its bias lacks [N], by the linear's name.

    `weights` are per output channel, `blocks` per output channel and block of input channels.
    """

    weights: dict[str, RoundedWeight] = field(default_factory=dict)
    biases: dict[str, Floats] = field(default_factory=dict)
    blocks: dict[str, BlockWeight] = field(default_factory=dict)


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
) -> Rounded:
    """GPTQ rounding and bias correction of the linears behind the sites that `scales` names.

    A scale of None leaves the activation in float. Weights of E4M3 are rounded to the nearest, for
    the biases alone. `batches` gives the images [B, 3, H, W], anew on each call: one pass over them
    for every half GB of Gram matrices. `images`: how many there are.
    """
    of_an_image = max(_ROWS // max(images, 1), _LEAST_ROWS_OF_AN_IMAGE)
    found = Rounded()
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
        for site in group:
            seen = inputs.pop(site.tensor.name)
            for linear in site.linears:
                _note(linear, seen, _round_linear(linear, seen, target), found)
                let_go(linear.weight)
            seen.close()
    return found


def nearest_blocks(weight: Floats, bits: int, block_size: int) -> BlockWeight:
    """Each weight [K, N] as the integer nearest to it, in symmetric steps that clip none."""
    last = 2 ** (bits - 1) - 1
    starts = range(0, len(weight), block_size)
    peaks = np.maximum.reduceat(np.abs(weight), starts, axis=0) / np.float32(last)
    steps = np.where(peaks > _TINY, peaks, np.float32(1)).astype(np.float32)
    repeated = np.repeat(steps, block_size, axis=0)[: len(weight)]
    integers = np.clip(np.rint(weight / repeated), -last, last).astype(np.int8)
    return BlockWeight(integers, steps, block_size, bits)


def _note(linear: Linear, seen: LayerInput, rounded: Weight, found: Rounded) -> None:
    """Enter a rounded weight, and what it makes the bias lack."""
    if isinstance(rounded, RoundedWeight):
        found.weights[linear.name] = rounded
    elif isinstance(rounded, BlockWeight):
        found.blocks[linear.name] = rounded
    lost = seen.float_total @ linear.weight - seen.total @ rounded.dequantized()
    found.biases[linear.name] = np.asarray(lost / seen.rows, np.float32)


def _round_linear(linear: Linear, seen: LayerInput, target: Target) -> Weight:
    weight = linear.weight
    if target.float8:
        return round_weight(weight)
    if target.block_size is not None:
        bits = block_bits(linear, target.weight_bits)
        return _round_blocks(weight, seen, bits, target.block_size)
    last = 2 ** (target.weight_bits - 1) - 1
    gram = seen.gram
    steps = choose_steps(weight, np.diag(gram) / seen.rows, last)
    return RoundedWeight(round_by_error(weight, gram, steps, last), steps[0])


def _round_blocks(weight: Floats, seen: LayerInput, bits: int, block_size: int) -> BlockWeight:
    first, last = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    gram = seen.gram
    steps = choose_steps(weight, np.diag(gram) / seen.rows, last, block_size, first=first)
    integers = round_by_error(
        weight, gram, steps, last, block_size, first=first, damping=_BLOCK_DAMPING
    )
    steps = refit_steps(weight, gram, integers, steps, block_size, _BLOCK_DAMPING)
    return BlockWeight(integers, steps, block_size, bits)


def block_bits(linear: Linear, bits: int) -> int:
    """The bits of a weight that is stored in blocks: 8 for the value and output projections."""
    return _WIDE_BITS if linear.role in _WIDE else bits


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
