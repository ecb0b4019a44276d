"""Small graphs with a fixed batch, freed and run with other batches."""

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import pytest
from support.small_models import Draft, with_shapes
from support.untouched import told

from regcache.passes.base import run
from regcache.passes.errors import InputError
from regcache.passes.free_batch import BATCH, FreeBatch

IMAGES = np.random.default_rng(0).standard_normal((5, 3, 4, 4)).astype(np.float32)
Build = Callable[[Draft, int], str]


def written(build: Build, batch: int, **more: Any) -> gs.Graph:
    """What `build` makes of "image" [batch, 3, 4, 4], with shapes."""
    draft = Draft()
    y = build(draft, batch)
    return with_shapes(draft.model({"image": [batch, 3, 4, 4]}, [y], **more))


def freed(graph: gs.Graph) -> gs.Graph:
    """The graph of any batch, and what has to hold of it."""
    before = told(graph)
    result = run(FreeBatch(), graph)
    assert [skip.reason for skip in result.log.skips] == []
    assert told(graph) == before
    assert result.graph.inputs[0].shape == [BATCH, *graph.inputs[0].shape[1:]]
    assert [item.name for item in result.graph.outputs] == [item.name for item in graph.outputs]
    onnx.checker.check_model(gs.export_onnx(result.graph), full_check=True)
    with pytest.raises(InputError, match="one input of static shape"):
        run(FreeBatch(), result.graph)
    return result.graph


def ints(draft: Draft, *values: int, dtype: type = np.int64) -> str:
    return draft.weight(np.array(values, dtype))


def floats(draft: Draft, *shape: int, batch: int = 1) -> str:
    """Random numbers, the same for every image where `batch` repeats them along the first axis."""
    values = np.random.default_rng(7).standard_normal(shape).astype(np.float32)
    return draft.weight(np.concatenate([values] * batch))


def rows(draft: Draft, batch: int) -> str:
    """[batch, 48]"""
    return draft.node("Reshape", "image", ints(draft, batch, 48))


def tokens(draft: Draft, batch: int) -> str:
    """[batch, 4, 12]"""
    return draft.node("Reshape", "image", ints(draft, batch, 4, 12))
