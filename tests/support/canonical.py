"""Canonical graphs of small models, each made once in a process."""

from functools import lru_cache

import onnx
import onnx_graphsurgeon as gs

from regcache.passes.canonicalize import canonicalize
from regcache.passes.copy_graph import copy_graph


def canonical_graph(model: onnx.ModelProto) -> gs.Graph:
    """What `canonicalize` makes of a model, a copy of one's own."""
    return copy_graph(_canonical(model.SerializeToString(deterministic=True)))


# Most models are those of other tests as well.
@lru_cache(maxsize=256)
def _canonical(model: bytes) -> gs.Graph:
    return canonicalize(onnx.load_from_string(model))
