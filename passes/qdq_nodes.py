"""Shared by the passes that quantize linears: which linears, nodes to add, and checks."""

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import onnx_graphsurgeon as gs
from numpy.typing import NDArray

from regcache.passes.base import Skip
from regcache.passes.encoder import EncoderView, Linear, Site
from regcache.passes.errors import InputError
from regcache.passes.find_blocks import view_encoder


def check_names(
    step: str, graph: gs.Graph, activations: Mapping[str, object], linears: Iterable[str]
) -> dict[str, Linear]:
    """The encoder's linears by name.

    Raises InputError, beginning with the pass's name `step`, where `activations` names no tensor of
    the graph, `linears` no linear, or the encoder cannot be read.
    """
    unknown = activations.keys() - graph.tensors().keys()
    if unknown:
        raise InputError(f"{step}: no tensor {min(unknown)!r} in the graph")
    known = {linear.name: linear for linear in view_encoder(graph).linears}
    for name in sorted(linears):
        if name not in known:
            raise InputError(f"{step}: no linear {name!r}")
    return known


def plan_sites(
    view: EncoderView, activations: Mapping[str, object], only: frozenset[str] | None
) -> tuple[list[Site], tuple[Skip, ...]]:
    """The sites to quantize, each with those of its linears that `only` names (None: all)."""
    sites, skips = [], []
    for whole in view.sites:
        wanted = [item for item in whole.linears if only is None or item.name in only]
        others = tuple(item for item in whole.linears if item not in wanted)
        if others:
            skips.append(Skip(Site(whole.tensor, others).name, "not among those to quantize"))
        if not wanted:
            continue
        site = Site(whole.tensor, tuple(wanted))
        if any(linear.quantized for linear in wanted):
            skips.append(Skip(site.name, "quantized already"))
        elif site.tensor.name not in activations:
            skips.append(Skip(site.name, "no scale for its activation"))
        else:
            sites.append(site)
    return sites, tuple(skips)


def insert_pair(
    graph: gs.Graph,
    tensor: gs.Tensor,
    name: str,
    scale: float,
    zero_point: NDArray[Any],
    limits: tuple[int, int] | None = None,
) -> gs.Variable:
    """The float32 output of a new Q/DQ pair behind a tensor, per tensor.

    `zero_point`: a scalar of the quantized dtype. `limits`: clip the integers to these between.
    """
    dtype = zero_point.dtype
    numbers = [
        gs.Constant(f"{name}/scale", np.array(scale, dtype=np.float32)),
        gs.Constant(f"{name}/zero_point", zero_point),
    ]
    quantized = gs.Variable(f"{name}/quantized", dtype=dtype)
    graph.nodes.append(gs.Node("QuantizeLinear", f"{name}/q", {}, [tensor, *numbers], [quantized]))
    if limits is not None:
        ends = [
            gs.Constant(f"{name}/{end}", np.array(limit, dtype=dtype))
            for end, limit in zip(("min", "max"), limits, strict=True)
        ]
        clipped = gs.Variable(f"{name}/clipped", dtype=dtype)
        graph.nodes.append(gs.Node("Clip", f"{name}/clip", {}, [quantized, *ends], [clipped]))
        quantized = clipped
    floats = gs.Variable(f"{name}/dequantized", dtype=np.float32)
    graph.nodes.append(
        gs.Node("DequantizeLinear", f"{name}/dq", {}, [quantized, *numbers], [floats])
    )
    return floats


def insert_weight(
    graph: gs.Graph,
    name: str,
    stored: NDArray[Any],
    scales: NDArray[np.float32],
    zero_point: int,
    axis: int = 1,
) -> gs.Variable:
    """The float32 output of a new DequantizeLinear for `stored`, [K, N] or more, `scales` [N].

    `axis`: which of its axes has N.
    """
    inputs = [
        gs.Constant(f"{name}/quantized", stored),
        gs.Constant(f"{name}/scale", scales),
        gs.Constant(f"{name}/zero_point", np.full(scales.shape, zero_point, stored.dtype)),
    ]
    output = gs.Variable(f"{name}/dequantized", dtype=np.float32)
    graph.nodes.append(gs.Node("DequantizeLinear", f"{name}/dq", {"axis": axis}, inputs, [output]))
    return output


def free_name(name: str, taken: frozenset[str]) -> str:
    """A prefix for new tensors that an earlier run, for other linears, did not use."""
    while f"{name}/dequantized" in taken:
        name += "/again"
    return name


def check_planned(before: EncoderView, after: EncoderView, sites: Iterable[Site]) -> None:
    """Assert the same linears in the same places, newly quantized exactly where planned."""
    planned = {linear.name for site in sites for linear in site.linears}
    for one, other in zip(before.linears, after.linears, strict=True):
        assert (one.name, one.weight_shape) == (other.name, other.weight_shape)
        assert other.quantized == (one.quantized or one.name in planned)
