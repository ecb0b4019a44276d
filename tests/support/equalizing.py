"""A random equalization, applied to a tiny encoder and compared."""

from typing import Any

import numpy as np
import onnx
import onnx_graphsurgeon as gs
from numpy.typing import NDArray
from support.tiny_vit import Spec, TinyVit

from regcache.passes.base import Result, run
from regcache.passes.canonicalize import canonicalize
from regcache.passes.encoder import Site
from regcache.passes.equalize import Equalize
from regcache.passes.find_blocks import view_encoder

Floats = NDArray[np.float32]
NORM, VALUE = "folded into the norm", "folded into the value projection"
UP, MUL = "folded into the up projection", "a Mul of its own"
# Values that nothing can divide get a Mul.
UNFOLDED = {("attention operator, rank 3", None), ("attention operator, rank 3", 3)}


def graph_of(spec: Spec, batch: int | None = None) -> gs.Graph:
    """The canonical graph, its batch fixed where one is given."""
    model = TinyVit(spec).model()
    if batch is not None:
        for value in (*model.graph.input, *model.graph.output):
            value.type.tensor_type.shape.dim[0].dim_value = batch
    return canonicalize(model)


def random_factors(graph: gs.Graph, seed: int = 0, decades: float = 3) -> dict[str, Floats]:
    """Factors for every activation, from 10^-decades to 10^decades."""
    random = np.random.default_rng(seed)
    return {
        site.tensor.name: np.asarray(
            10 ** random.uniform(-decades, decades, site.linears[0].weight_shape[0]), np.float32
        )
        for site in view_encoder(graph).sites
    }


def apply(graph: gs.Graph, factors: dict[str, Floats] | None = None) -> Result:
    """Equalize, by random factors where none are given, and check the graph with onnx in full."""
    result = run(Equalize(random_factors(graph) if factors is None else factors), graph)
    onnx.checker.check_model(gs.export_onnx(result.graph), full_check=True)
    return result


def assert_agree(found: list[Any], wanted: Any, tolerance: float = 1e-5) -> None:
    for ours, truth in zip(found, wanted, strict=True):
        assert np.abs(ours - truth).max() <= tolerance * np.abs(truth).max()


def ways(result: Result) -> dict[str, str]:
    """How the sites took their factors, by the linears' names; the same in every block."""
    found = {(edit.site.split(".", 2)[2], edit.what) for edit in result.log.edits}
    assert len(dict(found)) == len(found), found
    return dict(found)


def site_of(graph: gs.Graph, name: str) -> Site:
    return next(site for site in view_encoder(graph).sites if site.name == name)


def one_site(graph: gs.Graph, name: str) -> dict[str, Floats]:
    tensor = site_of(graph, name).tensor.name
    return {tensor: random_factors(graph)[tensor]}


def read_elsewhere(graph: gs.Graph, tensor: gs.Variable) -> None:
    size = gs.Variable("size", dtype=np.float32, shape=tensor.shape)
    graph.nodes.append(gs.Node("Abs", "size", {}, [tensor], [size]))
    graph.outputs.append(size)
