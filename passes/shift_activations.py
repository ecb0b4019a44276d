"""Move activations so that symmetric integers fit them (Outlier Suppression+, arXiv 2304.09145).

A constant is taken off each channel of an activation and what it did comes back through the biases
of the linears that read it, so that the encoder computes the same.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_graphsurgeon as gs
from numpy.typing import NDArray

from regcache.passes.base import Close, Edit, Log, Parity, Skip
from regcache.passes.correct_bias import add_to_bias
from regcache.passes.encoder import EncoderView, Linear, Role, Site
from regcache.passes.equalize_sources import Columns, norm_behind, refusal, value_behind
from regcache.passes.errors import InputError
from regcache.passes.find_blocks import view_encoder
from regcache.passes.walk import is_output, producer, skip_back

Floats = NDArray[np.float32]


@dataclass(frozen=True)
class ShiftActivations:
    """Take `shifts` [K] off the channels of activations [..., K], by the name of their tensor.

    It goes into the bias of the norm, or of the value projection (for the output projection, as
    the weights of attention sum to 1; registers in V are moved too), that makes the activation;
    one behind another function gets an Add.
    Refused: what Equalize refuses, an activation behind a norm without a bias, and a linear whose
    product is a graph output before its bias.
    """

    shifts: Mapping[str, Floats]
    name: ClassVar[str] = "shift_activations"
    parity: ClassVar[Parity] = Close(rtol=1e-3, atol=1e-4)

    def requires(self, graph: gs.Graph) -> None:
        """A readable encoder, and for each named activation a finite number per channel."""
        sites = {site.tensor.name: site for site in view_encoder(graph).sites}
        for name, shifts in self.shifts.items():
            if name not in sites:
                raise InputError(f"shift_activations: {name!r} is no activation of a linear")
            channels = sites[name].linears[0].weight_shape[0]
            if shifts.shape != (channels,) or not np.isfinite(shifts).all():
                raise InputError(f"shift_activations: {name!r} needs {channels} finite numbers")

    def rewrite(self, graph: gs.Graph) -> Log:
        """Move each site's shift from its activation into the biases of its linears."""
        edits, skips = [], []
        view = view_encoder(graph)
        biases = {
            linear.name: np.zeros(linear.weight_shape[1], np.float32) for linear in view.linears
        }
        changed: dict[str, Linear] = {}
        for site in view.sites:
            shifts = self.shifts.get(site.tensor.name)
            if shifts is None:
                continue
            reason = refusal(view, site) or _given_away(view, site)
            source = None if reason else _subtract(view, site, shifts, biases)
            if source is None:
                skips.append(Skip(site.name, reason or "its norm has no bias to move it into"))
                continue
            for linear in site.linears:
                biases[linear.name] += shifts @ linear.weight
            changed |= {linear.name: linear for linear in (*site.linears, *source.linears)}
            edits.append(Edit(site.name, source.where))
        for name, linear in changed.items():
            add_to_bias(graph, linear, biases[name])
        return Log(tuple(edits), tuple(skips))

    def ensures(self, before: gs.Graph, after: gs.Graph) -> None:
        """The same linears, and at most an Add more for an activation and for each bias."""
        old, new = view_encoder(before), view_encoder(after)
        bare = 0
        for one, other in zip(old.linears, new.linears, strict=True):
            assert (one.name, one.weight_shape) == (other.name, other.weight_shape)
            bare += one.bias_add is None
        assert 0 <= len(after.nodes) - len(before.nodes) <= len(self.shifts) + bare


@dataclass(frozen=True)
class _Moved:
    """What a log says, and the linears whose own output was moved."""

    where: str
    linears: tuple[Linear, ...] = ()


def _subtract(
    view: EncoderView, site: Site, shifts: Floats, biases: dict[str, Floats]
) -> _Moved | None:
    """Take the shifts off an activation; `biases` are what is to be added to linears' biases."""
    if site.role not in (Role.OUT, Role.FC2):
        norm = norm_behind(view.graph, site)
        if norm is None or len(norm.inputs) < 3 or norm.inputs[2].is_empty():
            return None
        bias = np.asarray(norm.inputs[2].values - shifts, np.float32)
        norm.inputs[2] = gs.Constant(f"{norm.name}/bias/shifted", bias)
        return _Moved("into the norm")
    value = _value(view, site) if site.role is Role.OUT else None
    if value is not None:
        biases[value.linear.name][value.columns] -= shifts
        value.change_registers(lambda registers, by_head: registers - by_head, shifts)
        return _Moved("into the value projection", (value.linear,))
    name = f"{site.tensor.name}/shifted"
    shifted = gs.Variable(name, dtype=np.float32, shape=site.tensor.shape)
    constant = gs.Constant(f"{name}/shift", np.asarray(-shifts, np.float32))
    node = gs.Node("Add", f"shift/{site.tensor.name}", {}, [site.tensor, constant], [shifted])
    view.graph.nodes.append(node)
    for linear in site.linears:
        linear.matmul.inputs[0] = shifted
    return _Moved("an Add of its own")


def _given_away(view: EncoderView, site: Site) -> str | None:
    """Why a product may not change before its bias makes it good; None: it may."""
    products = [one.matmul.outputs[0] for one in site.linears if one.bias_add is not None]
    if any(is_output(view.graph, product) for product in products):
        return "its product is an output of the graph"
    return None


def _value(view: EncoderView, site: Site) -> Columns | None:
    """The value projection behind an output projection, where the weights do sum to 1."""
    out = site.linears[0]
    (attention,) = (block.attention for block in view.blocks if block.attention.out is out)
    weights = skip_back(attention.context.inputs[0], frozenset({"Cast", "Identity", "Reshape"}))
    whole = attention.context is attention.softmax or producer(weights) is attention.softmax
    return value_behind(view, site) if whole else None
