"""Even out the channels of activations before they are quantized (SmoothQuant, arXiv 2211.10438).

Each channel of an activation is divided by a factor and the rows of the weights that read it are
multiplied by it, so that the encoder computes the same and one scale fits all channels.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_graphsurgeon as gs
from numpy.typing import NDArray

from regcache.passes.base import Close, Edit, Log, Parity, Skip
from regcache.passes.encoder import EncoderView, Role, Site
from regcache.passes.equalize_sources import FactorSource, find_source, refusal
from regcache.passes.errors import InputError
from regcache.passes.find_blocks import view_encoder

Floats = NDArray[np.float32]


@dataclass(frozen=True)
class Equalize:
    """Divide the channels of activations [..., K] by `factors` [K], by the name of their tensor.

    The division goes into what makes the activation, so that it costs nothing: the weight and bias
    of a norm, the value projection (for the output projection; registers in V are divided too), or
    SwiGLU's linear that is not gated. An activation behind another function gets a Mul.
    Refused: a site with a linear that is quantized, an activation that is a graph output or that
    something else than its linears reads, and one whose norm something else reads.
    """

    factors: Mapping[str, Floats]
    name: ClassVar[str] = "equalize"
    parity: ClassVar[Parity] = Close(rtol=1e-3, atol=1e-4)

    def requires(self, graph: gs.Graph) -> None:
        """A readable encoder, and for each named activation one positive factor per channel."""
        sites = {site.tensor.name: site for site in view_encoder(graph).sites}
        for name, factors in self.factors.items():
            if name not in sites:
                raise InputError(f"equalize: {name!r} is no activation that feeds a linear")
            channels = sites[name].linears[0].weight_shape[0]
            if factors.shape != (channels,):
                raise InputError(f"equalize: {name!r} has {channels} channels, not {factors.shape}")
            with np.errstate(divide="ignore", over="ignore"):
                both = np.concatenate([factors, 1 / factors.astype(np.float32)])
            if not (np.isfinite(both).all() and (both > 0).all()):
                raise InputError(f"equalize: the factors of {name!r} must be positive and finite")

    def rewrite(self, graph: gs.Graph) -> Log:
        """Move each site's factors from its activation into its weights."""
        edits, skips = [], []
        view = view_encoder(graph)
        for site in view.sites:
            factors = self.factors.get(site.tensor.name)
            if factors is None:
                continue
            source = find_source(view, site)
            reason = refusal(view, site)
            if reason is None and not source.free and site.role not in (Role.OUT, Role.FC2):
                reason = "its norm is read elsewhere"
            if reason is not None:
                skips.append(Skip(site.name, reason))
                continue
            source.divide(graph, factors)
            _multiply_weights(site, source, factors)
            edits.append(Edit(site.name, source.where))
        return Log(tuple(edits), tuple(skips))

    def ensures(self, before: gs.Graph, after: gs.Graph) -> None:
        """The same linears, and no node more than a Mul for an activation of its own."""
        old, new = view_encoder(before), view_encoder(after)
        assert old.linear_shapes == new.linear_shapes
        assert 0 <= len(after.nodes) - len(before.nodes) <= len(self.factors)


def foldable(view: EncoderView, site: Site) -> bool:
    """Whether equalizing the activation adds no node to the graph."""
    return find_source(view, site).free


def _multiply_weights(site: Site, source: FactorSource, factors: Floats) -> None:
    for linear in site.linears:
        weight = np.asarray(linear.weight * factors[:, None], np.float32)
        constant = gs.Constant(f"{linear.name}/equalized", weight)
        linear.matmul.inputs = [source.activation, constant]
