"""Choose which blocks' hidden activations are rotated, by the error that it takes away."""

from collections.abc import Iterable
from functools import partial

import numpy as np
from numpy.typing import NDArray

from regcache.compiler.calibration.folds import Folded
from regcache.compiler.calibration.observe import halved_statistics, observe
from regcache.compiler.calibration.quantizer import Quantizer
from regcache.compiler.calibration.side_by_side import side_by_side
from regcache.compiler.encoder.float_encoder import FloatEncoder
from regcache.compiler.job.context import Context
from regcache.compiler.quantization.factors import Standing, choose_equalization
from regcache.passes.encoder import Site, by_tensor
from regcache.passes.external_weights import let_go
from regcache.passes.rotate_hidden import RotateHidden, hidden_sites, rotation, turned

Floats = NDArray[np.float32]

# Rows of so many images tell whether a layer's error falls by a third.
_IMAGES = 16


def choose_hidden(context: Context, encoder: FloatEncoder, size: int) -> frozenset[str]:
    """The sites whose rotation of `size` channels at a time is worth its node, by their names.

    Factors for each channel are the rival, and may come on top: of the four ways to leave a
    layer's input, the one of least error wins, where every node counts as much as the share of the
    error that the target wants it to take away (`node_gain`).
    """
    step, view = RotateHidden(size), encoder.view
    sites = [site for site in hidden_sites(view) if step.refusal(view, site) is None]
    images = context.images.some(_IMAGES)
    known = halved_statistics(view, len(images.paths), context.seed)
    statistics = {site.name: known[site.name] for site in sites}
    pixels = (batch.images for batch in images)
    observers = by_tensor(sites, statistics)
    observe(encoder.graph, observers, pixels, threads=context.threads, device=context.device)
    quantizer = Quantizer.of(context)

    def worth_it(site: Site) -> bool:
        folded = Folded.of(statistics[site.name])
        pays = bool(folded.folds) and rotation_pays(site, folded, quantizer, size)
        for linear in site.linears:
            let_go(linear.weight)
        return pays

    worth = side_by_side(worth_it, sites, context.threads)
    return frozenset(site.name for site, pays in zip(sites, worth, strict=True) if pays)


def rotation_pays(site: Site, statistics: Folded, quantizer: Quantizer, size: int) -> bool:
    """Whether the best way to leave a layer's input is one that rotates it.

    `statistics`: of that input as it is, in two halves of the images.
    """
    matrix = rotation(size)
    weights = [turned(linear.weight, matrix) for linear in site.linears]
    plain = Standing.untouched(site, statistics, quantizer)
    rotated = Standing.untouched(
        site, statistics.turned(partial(_rotated, matrix)), quantizer, weights
    )
    return min(_priced(rotated, quantizer, nodes=1)) < min(_priced(plain, quantizer, nodes=0))


def _priced(now: Standing, quantizer: Quantizer, nodes: int) -> Iterable[float]:
    """The error as it stands behind `nodes` nodes, and with factors, which are one more."""
    price = 1 / (1 - quantizer.target.node_gain)
    yield now.error * price**nodes
    even = choose_equalization(now, quantizer, free=False)
    if even is not None:
        yield even.error * price ** (nodes + 1)


def _rotated(matrix: Floats, rows: Floats) -> Floats:
    """Rows [S, K], as many channels at a time as the matrix has."""
    parts = rows.reshape(len(rows), -1, len(matrix)) @ matrix
    return np.asarray(parts.reshape(rows.shape), np.float32)
